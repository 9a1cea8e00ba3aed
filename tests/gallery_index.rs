//! The search index beside a gallery: with it, a search finds exactly what reading every embedding finds, at every moment,
//! whatever has happened to the gallery or to the index's file.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rusqlite::Connection;
use unimo::gallery::{Entry, Filter, Gallery, Hit, Method, Time};

const BUNDLE: &str = "1f0c6b5fd8a1e4b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f607182930";
const WIDTH: usize = 40;
/// More than a gallery needs to get an index.
const PICTURES: u64 = 1500;

/// Numbers in −0.5..0.5 (a linear congruential generator; its quality does not matter).
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn normalized(values: Vec<f32>) -> Vec<f32> {
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

fn unit(seed: u64) -> Vec<f32> {
    normalized(noise(seed, WIDTH))
}

fn entry(source: String, seed: u64, embedding: Vec<f32>) -> Entry {
    let time = Time::from_milliseconds(1_700_000_000_000 + 1000 * i64::try_from(seed).unwrap());
    Entry { source, hash: [0; 32], embedding, caption: Some(format!("caption {seed}")), time }
}

fn plain(seed: u64) -> Entry {
    entry(format!("a/{seed}"), seed, unit(seed))
}

fn gallery(path: &Path) -> Gallery {
    Gallery::open_or_create(path, BUNDLE, WIDTH).unwrap()
}

/// A gallery of `a/0 … `, closed again.
fn filled(folder: &Path, pictures: u64) -> PathBuf {
    let path = folder.join("g");
    gallery(&path).put(&(0..pictures).map(plain).collect::<Vec<_>>()).unwrap();
    path
}

fn index_of(path: &Path) -> PathBuf {
    gallery(path).index_path()
}

/// What reading every embedding finds: a folder stands where the copy's index would be made.
fn reference(path: &Path) -> (tempfile::TempDir, Gallery) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    Connection::open(path).unwrap().execute("VACUUM INTO ?1", [copy.to_str().unwrap()]).unwrap();
    let copy = gallery(&copy);
    fs::create_dir(copy.index_path()).unwrap();
    (folder, copy)
}

fn found(stored: &Gallery, query: &[f32], filter: &Filter, count: usize) -> (Vec<Hit>, Method) {
    let found = stored.find(query, filter, count).unwrap();
    (found.hits, found.method)
}

/// Checks searches of several kinds against the reference; gives how many used the index.
fn check(stored: &Gallery, path: &Path, queries: &[Vec<f32>]) -> usize {
    let (_folder, reference) = reference(path);
    let from = |seconds: i64| Some(Time::from_milliseconds(1_700_000_000_000 + 1000 * seconds));
    let filters = [
        Filter::default(),
        Filter { since: from(1000), until: from(1200), ..Filter::default() },
        Filter { source: Some("a/12".to_owned()), ..Filter::default() },
        Filter { source: Some("a/1".to_owned()), since: from(150), ..Filter::default() },
        Filter { source: Some("nowhere/".to_owned()), ..Filter::default() },
    ];
    let mut indexed = 0;
    for query in queries {
        for filter in &filters {
            for count in [1, 10, 300] {
                let (hits, method) = found(stored, query, filter, count);
                let (expected, by_reading) = found(&reference, query, filter, count);
                assert!(matches!(by_reading, Method::ScanWithoutIndex(_)), "{by_reading:?}");
                // To the last bit: the scores are computed from the same numbers in the same way.
                assert_eq!(hits, expected, "{filter:?}, {count}, {method:?}");
                indexed += usize::from(matches!(method, Method::Index { .. }));
            }
        }
    }
    indexed
}

fn indexed(method: &Method) -> bool {
    matches!(method, Method::Index { .. })
}

/// Whether a fresh program finds what is there, by the index.
fn sound(path: &Path) {
    let stored = gallery(path);
    assert!(check(&stored, path, &[unit(77_777)]) > 0, "the index is used");
}

#[test]
fn every_kind_of_embedding_is_found_as_by_reading_all() {
    let base = unit(1);
    let near = |seed: u64, by: f32| normalized(base.iter().zip(noise(seed, WIDTH)).map(|(b, n)| b + by * n).collect());
    type Make<'a> = Box<dyn Fn(u64) -> Vec<f32> + 'a>;
    let kinds: [(&str, bool, Make); 6] = [
        ("random", true, Box::new(unit)),
        (
            "a few directions",
            true,
            Box::new(|i| normalized(unit(i % 9).iter().zip(noise(i, WIDTH)).map(|(b, n)| b + 0.1 * n).collect())),
        ),
        // Closer together than 8 bits can tell.
        ("nearly equal", false, Box::new(|i| near(i, 1e-4))),
        ("equal", false, Box::new(|_| base.clone())),
        ("pairs of twins", true, Box::new(|i| unit(i / 2))),
        ("one value", false, Box::new(|i| (0..WIDTH).map(|at| if at == i as usize % WIDTH { 1.0 } else { 0.0 }).collect())),
    ];
    for (name, by_index, make) in kinds {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("g");
        let entries: Vec<Entry> = (0..PICTURES).map(|i| entry(format!("a/{i}"), i, make(i))).collect();
        gallery(&path).put(&entries).unwrap();
        let stored = gallery(&path);
        let opposite = make(3).iter().map(|v| -v).collect();
        let indexed = check(&stored, &path, &[unit(123_456), make(0), near(5, 0.01), opposite]);
        assert!(indexed > 0, "{name}");
        let (hits, method) = found(&stored, &unit(99), &Filter::default(), 10);
        if by_index {
            let Method::Index { rescored } = method else { panic!("{name}: {method:?}") };
            assert!((10..400).contains(&rescored), "{name}: {rescored} of {PICTURES} were looked at for {}", hits.len());
        }
    }
}

#[test]
fn a_small_gallery_has_no_index() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), 100);
    let stored = gallery(&path);
    stored.prepare_search().unwrap();
    assert!(matches!(found(&stored, &unit(5), &Filter::default(), 3).1, Method::Scan));
    assert!(!stored.index_path().exists());
    assert_eq!(stored.stats().unwrap().index_bytes, 0);
}

#[test]
fn changes_are_seen_at_once_by_whom_and_however_they_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    // One that stays open, with an index in use, and a new one after each change.
    let resident = gallery(&path);
    assert!(indexed(&found(&resident, &unit(3), &Filter::default(), 3).1));
    let sql = |text: &str| Connection::open(&path).unwrap().execute_batch(text).unwrap();
    let blob = |seed: u64| unit(seed).iter().flat_map(|v| v.to_le_bytes()).map(|b| format!("{b:02x}")).collect::<String>();
    type Change<'a> = Box<dyn Fn() + 'a>;
    let changes: [(&str, Change); 13] = [
        ("one added", Box::new(|| gallery(&path).put(&[plain(PICTURES)]).unwrap())),
        ("one replaced", Box::new(|| gallery(&path).put(&[entry("a/7".into(), 7, unit(9999))]).unwrap())),
        ("some removed", Box::new(|| assert_eq!(gallery(&path).remove(&["a/1".into(), "a/120".into()]).unwrap(), 2))),
        ("many added", Box::new(|| gallery(&path).put(&(2000..2600).map(plain).collect::<Vec<_>>()).unwrap())),
        (
            "many replaced",
            Box::new(|| {
                let entries: Vec<Entry> = (1200..1500).map(|i| entry(format!("a/{i}"), i, unit(7 * i))).collect();
                gallery(&path).put(&entries).unwrap();
            }),
        ),
        ("a time", Box::new(|| sql("UPDATE pictures SET time = time + 1000000 WHERE source LIKE 'a/10%'"))),
        ("a source", Box::new(|| sql("UPDATE pictures SET source = 'a/12-' || id WHERE source LIKE 'a/3%'"))),
        ("an embedding", Box::new(|| sql(&format!("UPDATE pictures SET embedding = x'{}' WHERE source = 'a/9'", blob(77_777))))),
        ("a number", Box::new(|| sql("UPDATE pictures SET id = id + 100000 WHERE source LIKE 'a/20%'"))),
        // Nothing tells that the one before is gone.
        (
            "a replacement without a word",
            Box::new(|| {
                sql(&format!(
                    "REPLACE INTO pictures (source, hash, embedding, time, added) VALUES ('a/11', x'00', x'{}', 5, 5)",
                    blob(77_777)
                ));
            }),
        ),
        (
            "the last one again",
            Box::new(|| {
                sql("DELETE FROM pictures WHERE id = (SELECT max(id) FROM pictures)");
                gallery(&path).put(&[plain(77_777)]).unwrap();
            }),
        ),
        ("without the triggers", Box::new(|| sql("DROP TRIGGER picture_removed; DELETE FROM pictures WHERE source = 'a/77777'"))),
        ("a third removed", Box::new(|| sql("DELETE FROM pictures WHERE id % 3 = 0"))),
    ];
    let queries = [unit(77_777), unit(7), unit(9999), unit(2001), unit(11)];
    for (name, change) in changes {
        change();
        for stored in [&resident, &gallery(&path)] {
            assert!(check(stored, &path, &queries) > 0, "{name}");
        }
    }
    assert_eq!(resident.verify().unwrap(), resident.stats().unwrap().images);
}

#[test]
fn additions_are_appended_and_wear_is_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    let stored = gallery(&path);
    stored.prepare_search().unwrap();
    let index = stored.index_path();
    let first = fs::read(&index).unwrap();
    assert_eq!(stored.stats().unwrap().index_bytes, first.len() as u64);

    // A few stay in memory.
    gallery(&path).put(&(5000..5010).map(plain).collect::<Vec<_>>()).unwrap();
    sound(&path);
    assert_eq!(fs::read(&index).unwrap(), first);
    // More are written behind the rest, which stays as it is: 64 codes, 28 bytes and a source each.
    gallery(&path).put(&(5010..5500).map(plain).collect::<Vec<_>>()).unwrap();
    sound(&path);
    let second = fs::read(&index).unwrap();
    assert_eq!(second[..first.len()], first);
    assert!((500 * 92..500 * 105).contains(&(second.len() - first.len())), "{}", second.len() - first.len());
    assert!(check(&stored, &path, &[unit(5250)]) > 0, "who had the file open before goes on");

    // Pictures that are replaced again and again do not make it grow for ever.
    for round in 0..12 {
        let entries: Vec<Entry> = (0..400).map(|i| entry(format!("a/{i}"), i, unit(10_000 + 400 * round + i))).collect();
        gallery(&path).put(&entries).unwrap();
        sound(&path);
    }
    assert!(fs::metadata(&index).unwrap().len() < 2 * second.len() as u64);
    assert!(!index.with_file_name("g-index.new").exists());
}

#[test]
fn an_index_of_another_course_of_history_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    let backup = folder.path().join("backup");
    Connection::open(&path).unwrap().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    gallery(&path).put(&[entry("a/1".into(), 1, unit(5000))]).unwrap();
    sound(&path);
    // The backup is put back, and as many changes are made to it, of another kind.
    for suffix in ["", "-wal", "-shm"] {
        drop(fs::remove_file(folder.path().join(format!("g{suffix}"))));
    }
    fs::rename(&backup, &path).unwrap();
    gallery(&path).put(&[entry("a/2".into(), 2, unit(6000))]).unwrap();
    let stored = gallery(&path);
    assert_ne!(found(&stored, &unit(5000), &Filter::default(), 1).0[0].source, "a/1");
    assert_eq!(found(&stored, &unit(6000), &Filter::default(), 1).0[0].source, "a/2");
    sound(&path);
}

#[test]
fn a_damaged_cut_or_foreign_index_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    let stored = gallery(&path);
    stored.prepare_search().unwrap();
    // Two segments, so that a sound one stands before a bad one.
    gallery(&path).put(&(5000..5400).map(plain).collect::<Vec<_>>()).unwrap();
    sound(&path);
    let index = stored.index_path();
    let whole = fs::read(&index).unwrap();
    let gallery_before = fs::read(&path).unwrap();

    let other = tempfile::tempdir().unwrap();
    let other_path = other.path().join("g");
    gallery(&other_path).put(&(0..PICTURES).map(|i| entry(format!("b/{i}"), i, unit(i))).collect::<Vec<_>>()).unwrap();
    sound(&other_path);
    // With each, whether it is of no use.
    let mut cases: Vec<(String, Vec<u8>, bool)> = vec![
        ("empty".into(), vec![], true),
        ("text".into(), b"milk, eggs, bread\n".repeat(1000), true),
        ("another gallery's".into(), fs::read(index_of(&other_path)).unwrap(), true),
        ("more behind it".into(), [&whole[..], &[7; 200]].concat(), false),
        ("twice".into(), [&whole[..], &whole[64..]].concat(), false),
        ("a segment of zeros".into(), [&whole[..], &[0; 4096]].concat(), false),
    ];
    for length in [1, 63, 64, 65, 127, 128, 1000, whole.len() / 2, whole.len() - 64, whole.len() - 1] {
        // Behind the last source are zeros up to a multiple of 64, which nobody reads.
        cases.push((format!("cut at {length}"), whole[..length].to_vec(), length < whole.len() - 63));
    }
    // Each byte that says something in the first two headers, and some of everything else.
    for at in (0..28).chain(64..124).chain((128..whole.len() - 64).step_by(whole.len() / 60)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        cases.push((format!("byte {at}"), bytes, true));
    }
    for (name, bytes, must_be_made_again) in cases {
        // As another file, as the system would bring it: whoever has the old one mapped keeps it.
        fs::remove_file(&index).unwrap();
        fs::write(&index, &bytes).unwrap();
        let fresh = gallery(&path);
        for seed in [5100, 20] {
            let (hits, method) = found(&fresh, &unit(seed), &Filter::default(), 2);
            assert_eq!(hits[0].source, format!("a/{seed}"), "{name}");
            assert!(indexed(&method), "{name}: {method:?}");
        }
        let (hits, _) = found(&stored, &unit(5100), &Filter::default(), 2);
        assert_eq!(hits[0].source, "a/5100", "{name}");
        // A changed byte need not show in what is found; that the file was made again shows that it was seen.
        assert_eq!(fs::read(&index).unwrap() != bytes, must_be_made_again, "{name}");
    }
    sound(&path);
    assert_eq!(fs::read(&path).unwrap(), gallery_before, "the gallery has nothing to do with it");
}

#[test]
fn a_new_file_that_lacks_its_end_is_no_index() {
    let folder = tempfile::tempdir().unwrap();
    // More than one segment of a new file holds.
    let path = filled(folder.path(), 40_000);
    let stored = gallery(&path);
    stored.prepare_search().unwrap();
    let index = stored.index_path();
    let whole = fs::read(&index).unwrap();
    let begins: Vec<usize> = (0..whole.len()).step_by(64).filter(|&at| whole[at..].starts_with(b"segm")).collect();
    assert_eq!(begins.len(), 3);
    for &cut in &begins {
        fs::remove_file(&index).unwrap();
        fs::write(&index, &whole[..cut]).unwrap();
        let (hits, method) = found(&gallery(&path), &unit(39_999), &Filter::default(), 1);
        assert_eq!(hits[0].source, "a/39999", "cut at {cut}");
        assert!(indexed(&method));
        assert_eq!(fs::metadata(&index).unwrap().len(), whole.len() as u64);
    }
}

#[test]
fn a_deleted_index_is_made_again_and_one_that_cannot_be_made_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    let resident = gallery(&path);
    assert!(check(&resident, &path, &[unit(2)]) > 0);
    fs::remove_file(resident.index_path()).unwrap();
    assert!(check(&resident, &path, &[unit(2)]) > 0, "who had it open still has");
    sound(&path);
    assert!(resident.index_path().exists());

    // What a process that was killed has left is cleared away.
    fs::remove_file(resident.index_path()).unwrap();
    let draft = folder.path().join("g-index.new");
    fs::write(&draft, b"unimo-ix and no more").unwrap();
    sound(&path);
    assert!(!draft.exists());
    // While somebody is at it, or where nothing can be written, all is read.
    fs::remove_file(resident.index_path()).unwrap();
    let busy = fs::File::create(&draft).unwrap();
    busy.lock().unwrap();
    let (hits, method) = found(&gallery(&path), &unit(2), &Filter::default(), 1);
    assert_eq!(hits[0].source, "a/2");
    let Method::ScanWithoutIndex(reason) = method else { panic!("{method:?}") };
    assert!(reason.to_string().contains("another program"), "{reason}");
    drop(busy);
    fs::remove_file(&draft).unwrap();
    fs::create_dir(resident.index_path()).unwrap();
    let (hits, method) = found(&gallery(&path), &unit(2), &Filter::default(), 1);
    assert_eq!(hits[0].source, "a/2");
    let Method::ScanWithoutIndex(reason) = method else { panic!("{method:?}") };
    assert!(reason.to_string().contains("g-index cannot be made"), "{reason}");
}

#[test]
fn a_gallery_of_the_first_version_gets_its_index() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    // As it was made before there were lists of changes.
    let strip = "DROP TRIGGER picture_added; DROP TRIGGER picture_changed; DROP TRIGGER picture_removed; DROP TABLE changes;";
    Connection::open(&path).unwrap().execute_batch(strip).unwrap();
    assert_eq!(Gallery::open(&path).unwrap().verify().unwrap(), PICTURES);
    sound(&path);
    Connection::open(&path).unwrap().execute_batch(strip).unwrap();
    gallery(&path).put(&[plain(9000)]).unwrap();
    assert_eq!(found(&gallery(&path), &unit(9000), &Filter::default(), 1).0[0].source, "a/9000");
    sound(&path);
    // While somebody else writes, it is read as before, at once.
    Connection::open(&path).unwrap().execute_batch(strip).unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (hits, method) = found(&gallery(&path), &unit(9000), &Filter::default(), 1);
    assert_eq!(hits[0].source, "a/9000");
    assert!(matches!(method, Method::ScanWithoutIndex(_)), "{method:?}");
}

#[test]
fn a_long_list_of_changes_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    sound(&path);
    // More than the list holds: the index cannot catch up by it.
    let foreign = Connection::open(&path).unwrap();
    for _ in 0..70 {
        foreign.execute_batch("UPDATE pictures SET time = time + 1").unwrap();
    }
    foreign.execute_batch("UPDATE pictures SET source = 'a/12' WHERE source = 'a/40'").unwrap_err();
    gallery(&path).put(&[plain(8000)]).unwrap();
    let kept: i64 = foreign.query_row("SELECT count(*) FROM changes", [], |row| row.get(0)).unwrap();
    assert_eq!(kept, 100_000);
    sound(&path);
}

#[test]
fn what_was_stored_before_a_search_began_is_found_while_others_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), PICTURES);
    let stored = AtomicUsize::new(0);
    let removed = AtomicUsize::new(0);
    let searches = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut gallery = gallery(&path);
            for round in 0..60 {
                let first = 10_000 + 20 * round;
                gallery.put(&(first..first + 20).map(plain).collect::<Vec<_>>()).unwrap();
                stored.store(20 * (round as usize + 1), Ordering::SeqCst);
                if round >= 4 {
                    let gone = round - 4;
                    removed.store(20 * gone as usize + 10, Ordering::SeqCst);
                    let sources: Vec<String> = (0..10).map(|i| format!("a/{}", 10_000 + 20 * gone + i)).collect();
                    assert_eq!(gallery.remove(&sources).unwrap(), 10);
                }
            }
        });
        for reader in 0..2 {
            let (stored, removed, searches, path) = (&stored, &removed, &searches, &path);
            scope.spawn(move || {
                let mut resident = gallery(path);
                let mut turn = 0u64;
                while stored.load(Ordering::SeqCst) < 1200 {
                    let newest = stored.load(Ordering::SeqCst) as u64;
                    if newest == 0 {
                        continue;
                    }
                    turn += 1;
                    if turn.is_multiple_of(10) && reader == 1 {
                        resident = gallery(path);
                    }
                    // The last of a round is never removed.
                    let seed = 10_000 + newest - 1;
                    let hits = resident.search(&unit(seed), &Filter::default(), 1).unwrap();
                    assert_eq!(hits[0].source, format!("a/{seed}"));
                    // The one removed longest ago is gone for good.
                    if removed.load(Ordering::SeqCst) > 40 {
                        let hits = resident.search(&unit(10_003), &Filter::default(), 1).unwrap();
                        assert_ne!(hits[0].source, "a/10003");
                    }
                    searches.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    assert!(searches.load(Ordering::SeqCst) > 10);
    sound(&path);
}
