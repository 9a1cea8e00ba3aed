//! The gallery file: adding again what is there changes nothing, search is exact, and a file of another model, of a later version,
//! of another kind or with damage in it is refused in words.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::Connection;
use unimo::gallery::{Entry, Filter, Gallery, GalleryError, Hit, Known, Time};

const BUNDLE: &str = "1f0c6b5fd8a1e4b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f607182930";
const OTHER: &str = "ffffffffffff5b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f6071829301";
const WIDTH: usize = 40;

/// A unit vector, different for each seed (a linear congruential generator; its quality does not matter).
fn unit(seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..WIDTH)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

fn entry(source: &str, seed: u64) -> Entry {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&seed.to_le_bytes());
    let time = Time::from_milliseconds(1_700_000_000_000 + 1000 * i64::try_from(seed).unwrap());
    Entry { source: source.to_owned(), hash, embedding: unit(seed), caption: Some(format!("caption {seed}")), time }
}

fn gallery(path: &Path) -> Gallery {
    Gallery::open_or_create(path, BUNDLE, WIDTH).unwrap()
}

/// A gallery of `a/0 … a/n`, closed again.
fn filled(folder: &Path, pictures: u64) -> PathBuf {
    let path = folder.join("g");
    let entries: Vec<Entry> = (0..pictures).map(|i| entry(&format!("a/{i}"), i)).collect();
    gallery(&path).put(&entries).unwrap();
    path
}

fn refusal<T>(result: Result<T, GalleryError>) -> GalleryError {
    result.err().expect("it must be refused")
}

#[test]
fn what_is_stored_is_known_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g");
    let mut first = gallery(&path);
    let (old, new) = (entry("p.jpg", 1), entry("p.jpg", 2));
    assert_eq!(first.known("p.jpg", &old.hash).unwrap(), Known::New);
    first.put(std::slice::from_ref(&old)).unwrap();
    assert_eq!(first.known("p.jpg", &old.hash).unwrap(), Known::Unchanged(Some("caption 1".to_owned())));
    assert_eq!(first.known("p.jpg", &new.hash).unwrap(), Known::Changed);
    drop(first);

    let mut second = gallery(&path);
    assert_ne!(second.known("p.jpg", &old.hash).unwrap(), Known::New, "it outlives the program");
    second.put(&[new.clone(), entry("q.jpg", 3)]).unwrap();
    let stats = second.stats().unwrap();
    assert_eq!((stats.images, stats.captions, stats.width), (2, 2, WIDTH));
    assert_eq!(stats.bundle, BUNDLE);
    assert!(stats.bytes >= 2 * 4 * WIDTH as u64);
    // The changed picture has replaced the old one in every respect.
    let mut seen = Vec::new();
    second
        .each(|hit, embedding| {
            seen.push((hit.source, hit.caption, hit.time, embedding));
            Ok::<(), GalleryError>(())
        })
        .unwrap();
    assert_eq!(seen[0], (new.source, new.caption, new.time, new.embedding));

    assert_eq!(second.remove(&["p.jpg".to_owned(), "never there".to_owned()]).unwrap(), 1);
    assert_eq!(second.known("p.jpg", &new.hash).unwrap(), Known::New);
    assert_eq!(second.verify().unwrap(), 1);
}

#[test]
fn search_gives_what_a_sort_of_all_products_gives() {
    let folder = tempfile::tempdir().unwrap();
    let count = 300;
    let stored = gallery(&filled(folder.path(), count));
    let cases = [
        (Filter::default(), 0..count),
        (Filter { since: Some(entry("", 100).time), ..Filter::default() }, 100..count),
        (Filter { until: Some(entry("", 9).time), ..Filter::default() }, 0..10),
        (Filter { since: Some(entry("", 5).time), until: Some(entry("", 7).time), ..Filter::default() }, 5..8),
        (Filter { source: Some("a/29".to_owned()), since: Some(entry("", 30).time), ..Filter::default() }, 290..300),
        (Filter { source: Some("A/".to_owned()), ..Filter::default() }, 0..0),
        (Filter { source: Some("a/%".to_owned()), ..Filter::default() }, 0..0),
    ];
    for (filter, among) in cases {
        for k in [1, 7, 1000] {
            let query = unit(12_345 + k as u64);
            let product = |i: u64| unit(i).iter().zip(&query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let mut expected: Vec<u64> = among.clone().collect();
            expected.sort_by(|&a, &b| product(b).total_cmp(&product(a)));
            expected.truncate(k);
            let found = stored.search(&query, &filter, k).unwrap();
            let sources: Vec<String> = found.iter().map(|hit| hit.source.clone()).collect();
            assert_eq!(sources, expected.iter().map(|i| format!("a/{i}")).collect::<Vec<_>>(), "{filter:?}, {k}");
            for (hit, &i) in found.iter().zip(&expected) {
                // 40 f32 products of values below 1: an error of some 40 · 2⁻²⁴.
                assert!((f64::from(hit.score) - product(i)).abs() < 1e-5);
                assert_eq!((hit.caption.clone(), hit.time), (Some(format!("caption {i}")), entry("", i).time));
            }
        }
    }
}

#[test]
fn a_picture_finds_itself_and_equals_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut stored = gallery(&folder.path().join("g"));
    let twins: Vec<Entry> = (0..4).map(|i| Entry { source: format!("twin {i}"), ..entry("", 1) }).collect();
    stored.put(&[entry("other", 2)]).unwrap();
    stored.put(&twins).unwrap();
    let found: Vec<Hit> = stored.search(&unit(1), &Filter::default(), 3).unwrap();
    assert_eq!(found.iter().map(|hit| hit.source.as_str()).collect::<Vec<_>>(), ["twin 0", "twin 1", "twin 2"]);
    assert!((found[0].score - 1.0).abs() < 1e-5);
}

#[test]
fn another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), 2);
    let error = refusal(Gallery::open_or_create(&path, OTHER, WIDTH));
    assert!(matches!(error, GalleryError::OtherModel { .. }), "{error}");
    let said = error.to_string();
    for part in ["another model", "1f0c6b5fd8a1", "ffffffffffff", "--bundle", "new gallery"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(matches!(Gallery::open(&path).unwrap().require_bundle(OTHER), Err(GalleryError::OtherModel { .. })));
    assert_eq!(gallery(&path).verify().unwrap(), 2, "nothing has changed");
}

#[test]
fn only_unit_vectors_of_the_right_width_go_in() {
    let folder = tempfile::tempdir().unwrap();
    let mut stored = gallery(&folder.path().join("g"));
    let with = |embedding: Vec<f32>| Entry { embedding, ..entry("bad", 1) };
    let mut holed = unit(1);
    holed[3] = f32::NAN;
    let cases = [
        (with(vec![1.0]), "1 values does not go into a gallery of 40"),
        (with(holed), "length NaN, not 1"),
        (with(vec![0.0; WIDTH]), "length 0, not 1"),
        (with(unit(1).iter().map(|v| v * 1.01).collect()), "not 1"),
    ];
    for (bad, part) in cases {
        // All or nothing: the good one beside it does not go in either.
        let said = refusal(stored.put(&[entry("good", 2), bad])).to_string();
        assert!(said.contains(part), "{said}");
        assert_eq!(stored.stats().unwrap().images, 0);
    }
    let said = refusal(stored.search(&[1.0], &Filter::default(), 1)).to_string();
    assert!(said.contains("1 values does not go"), "{said}");
}

#[test]
fn files_that_are_no_gallery_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("text"), "milk, eggs, bread\n".repeat(100)).unwrap();
    fs::write(at("short"), "milk").unwrap();
    // Somebody's own database.
    Connection::open(at("database")).unwrap().execute_batch("CREATE TABLE stamps (country TEXT)").unwrap();
    for name in ["text", "short", "database"] {
        let before = fs::read(at(name)).unwrap();
        for result in [Gallery::open(&at(name)), Gallery::open_or_create(&at(name), BUNDLE, WIDTH)] {
            let error = refusal(result);
            assert!(matches!(error, GalleryError::NotAGallery { .. }), "{name}: {error}");
            assert!(error.to_string().contains("is not a gallery"), "{error}");
        }
        assert_eq!(fs::read(at(name)).unwrap(), before, "{name} was written to");
    }
    for result in [Gallery::open(folder.path()), Gallery::open_or_create(folder.path(), BUNDLE, WIDTH)] {
        assert!(matches!(refusal(result), GalleryError::NotAGallery { .. }));
    }
    let error = refusal(Gallery::open_or_create(&at("no/folder"), BUNDLE, WIDTH));
    assert!(matches!(error, GalleryError::NoFolder { .. }), "{error}");
    let error = refusal(Gallery::open(&at("missing")));
    assert!(matches!(error, GalleryError::NotFound { .. }), "{error}");
    assert!(!at("missing").exists());
    assert!(error.to_string().contains("unimo index add"), "{error}");
}

#[test]
fn a_gallery_of_a_later_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), 1);
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
    for result in [Gallery::open(&path), Gallery::open_or_create(&path, BUNDLE, WIDTH)] {
        let error = refusal(result);
        assert!(matches!(error, GalleryError::NewerSchema { found: 2, supported: 1, .. }), "{error}");
        assert!(error.to_string().contains("update unimo"), "{error}");
    }
}

#[test]
fn a_creation_cut_short_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    // What a process killed at this or that moment leaves: no file, an empty one, a database with nothing in it yet.
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty"), b"").unwrap();
    Connection::open(at("header")).unwrap().pragma_update(None, "journal_mode", "WAL").unwrap();
    for name in ["none", "empty", "header"] {
        let mut stored = gallery(&at(name));
        stored.put(&[entry("p", 1)]).unwrap();
        assert_eq!(stored.verify().unwrap(), 1, "{name}");
    }
}

#[test]
fn damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut holed = unit(1);
    holed[0] = f32::NAN;
    let cases = [
        (bytes(&unit(1)[1..]), "a/1 has 156 bytes, not 160", true),
        (bytes(&holed), "a/1 has length NaN", true),
        (bytes(&[0.0; WIDTH]), "a/1 has length 0", false),
    ];
    for (index, (blob, part, search_sees_it)) in cases.into_iter().enumerate() {
        let inner = folder.path().join(index.to_string());
        fs::create_dir(&inner).unwrap();
        let path = filled(&inner, 3);
        let foreign = Connection::open(&path).unwrap();
        foreign.execute("UPDATE pictures SET embedding = ?1 WHERE source = 'a/1'", [blob]).unwrap();
        drop(foreign);
        let error = refusal(gallery(&path).verify());
        assert!(matches!(error, GalleryError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        let exported = gallery(&path).each(|_, _| Ok::<(), GalleryError>(()));
        assert_eq!(exported.is_err(), part.contains("bytes"));
        assert_eq!(gallery(&path).search(&unit(2), &Filter::default(), 3).is_err(), search_sees_it);
    }
}

#[test]
fn overwritten_pages_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), 200);
    assert_eq!(gallery(&path).verify().unwrap(), 200);
    let mut bytes = fs::read(&path).unwrap();
    assert!(bytes.len() > 8 * 4096);
    // Every page but the first three: schema, and roots of the tables.
    bytes[3 * 4096..].fill(0x5a);
    fs::write(&path, &bytes).unwrap();
    let error = refusal(gallery(&path).verify());
    assert!(matches!(error, GalleryError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("is damaged"), "{error}");
}

#[test]
fn damage_that_no_embedding_shows_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), 200);
    // A row of the index is lost: every embedding can still be read, and a picture could be added twice.
    let (root, page_size) = {
        let connection = Connection::open(&path).unwrap();
        let root: usize =
            connection.query_row("SELECT rootpage FROM sqlite_master WHERE type = 'index'", [], |row| row.get(0)).unwrap();
        (root, connection.query_row("PRAGMA page_size", [], |row| row.get::<_, usize>(0)).unwrap())
    };
    let mut bytes = fs::read(&path).unwrap();
    // The page's header: its kind (2 or 10, of an index), two bytes of free blocks, then two of its number of cells.
    let page = (root - 1) * page_size;
    assert!([2, 10].contains(&bytes[page]), "page {root} is no page of an index");
    bytes[page + 4] -= 1;
    fs::write(&path, &bytes).unwrap();
    let error = refusal(gallery(&path).verify());
    assert!(matches!(error, GalleryError::Damaged { .. }), "{error}");
}

#[test]
fn two_writers_wait_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = &path;
            scope.spawn(move || {
                // They race to create it, too.
                let mut stored = gallery(path);
                for i in 0..20 {
                    stored.put(&[entry(&format!("{writer}/{i}"), 20 * writer + i)]).unwrap();
                }
            });
        }
    });
    assert_eq!(gallery(&path).verify().unwrap(), 80);
}

#[test]
fn times_are_utc() {
    let time = Time::from(SystemTime::UNIX_EPOCH + Duration::from_millis(1_709_208_000_250));
    assert_eq!(time.to_string(), "2024-02-29T12:00:00.25Z");
    assert_eq!("2024-02-29T13:00:00.250+01:00".parse(), Ok(time));
    let before = Time::from(SystemTime::UNIX_EPOCH - Duration::from_secs(1));
    assert_eq!(before.to_string(), "1969-12-31T23:59:59Z");
}
