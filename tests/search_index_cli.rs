//! The search index on the command line: `unimo index add` leaves one, a search that is killed while it makes one leaves nothing
//! that a later search is misled by, and one that cannot be made is said.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use unimo::bundle::{Bundle, BundleSource};
use unimo::gallery::{Entry, Gallery, Time};
use unimo_tests::{command, without_rights};

/// A bundle of random weights: it sees little, but the same every time.
static BUNDLE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("search_index_cli");
    unimo_export::sample::random_bundle(&folder, 5).unwrap()
});

/// A gallery of the bundle with so many random embeddings.
fn gallery(pictures: usize) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g");
    let bundle = Bundle::open(&BundleSource::Path(BUNDLE.clone())).unwrap();
    let width = bundle.manifest().model.embedding;
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut entry = |i: usize| {
        let values: Vec<f32> = (0..width).map(|_| next()).collect();
        let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
        let embedding = values.into_iter().map(|v| v / length).collect();
        Entry { source: format!("/p/{i}"), hash: [0; 32], embedding, caption: None, time: Time::from_milliseconds(i as i64) }
    };
    let entries: Vec<Entry> = (0..pictures).map(&mut entry).collect();
    Gallery::open_or_create(&path, bundle.id(), width).unwrap().put(&entries).unwrap();
    (folder, path)
}

fn search(gallery: &Path) -> Command {
    let mut command = command("unimo");
    command.args(["search", "a red circle", "-k", "20", "--json", "--gallery"]).arg(gallery).arg("--bundle").arg(&*BUNDLE);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a search prints, and what it says.
fn done(output: Output) -> (String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    assert!(output.status.success(), "{output:?}");
    (text(output.stdout), text(output.stderr))
}

fn index_of(gallery: &Path) -> PathBuf {
    gallery.with_file_name("g-index")
}

/// What is found by reading every embedding: a folder keeps the index from being made.
fn by_reading(gallery: &Path) -> String {
    drop(fs::remove_file(index_of(gallery)));
    fs::create_dir(index_of(gallery)).unwrap();
    let (found, said) = done(search(gallery).output().unwrap());
    assert!(said.contains("every embedding was read") && said.contains("g-index"), "{said}");
    fs::remove_dir(index_of(gallery)).unwrap();
    found
}

#[test]
fn a_search_killed_while_it_makes_the_index_misleads_nobody() {
    let (_folder, gallery) = gallery(60_000);
    let expected = by_reading(&gallery);
    let draft = gallery.with_file_name("g-index.new");
    let mut cut_short = 0;
    for turn in 0..6u64 {
        drop(fs::remove_file(index_of(&gallery)));
        let mut child = search(&gallery).spawn().unwrap();
        // As soon as it has begun, and a little later each time.
        let begun = Instant::now();
        while !draft.exists() && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not begin");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_millis(8 * turn));
        child.kill().unwrap();
        child.wait().unwrap();
        cut_short += usize::from(draft.exists());
        let (found, said) = done(search(&gallery).output().unwrap());
        assert_eq!((found.as_str(), said.as_str()), (expected.as_str(), ""));
        assert!(index_of(&gallery).exists() && !draft.exists());
    }
    assert!(cut_short > 0, "it was never caught in the act");
    let sound = command("unimo").args(["index", "verify", "--gallery"]).arg(&gallery).output().unwrap();
    assert!(sound.status.success(), "{sound:?}");
}

#[test]
fn several_at_once_find_the_same() {
    let (_folder, gallery) = gallery(30_000);
    let expected = by_reading(&gallery);
    let children: Vec<_> = (0..4).map(|_| search(&gallery).spawn().unwrap()).collect();
    for child in children {
        let (found, said) = done(child.wait_with_output().unwrap());
        assert_eq!(found, expected);
        // Who comes second reads all, and says so.
        assert!(said.is_empty() || said.contains("another program is making the search index"), "{said}");
    }
    let (found, said) = done(search(&gallery).output().unwrap());
    assert_eq!((found, said.as_str()), (expected, ""));
}

/// What a search prints and says whose user may not write into the gallery's folder.
fn search_without_rights(gallery: &Path) -> (String, String) {
    let folder = gallery.parent().unwrap();
    let bundle = folder.with_file_name("bundle.tar");
    fs::copy(&*BUNDLE, &bundle).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let places = ["--gallery", &text(gallery), "--bundle", &text(&bundle)];
    done(without_rights(folder, &[&bundle], &[&["search", "a red circle", "-k", "20", "--json"], &places[..]].concat()))
}

#[test]
fn where_nothing_can_be_written_an_index_is_used_and_a_missing_one_is_said() {
    let (folder, gallery) = gallery(2000);
    let expected = by_reading(&gallery);
    let shelf = folder.path().join("shelf");
    fs::create_dir(&shelf).unwrap();
    fs::copy(&gallery, shelf.join("g")).unwrap();
    let (found, said) = search_without_rights(&shelf.join("g"));
    assert_eq!(found, expected);
    assert!(said.contains("every embedding was read") && said.contains("g-index cannot be made"), "{said}");
    assert_eq!(fs::read_dir(&shelf).unwrap().count(), 1);

    done(search(&gallery).output().unwrap());
    fs::copy(index_of(&gallery), shelf.join("g-index")).unwrap();
    assert_eq!(search_without_rights(&shelf.join("g")), (expected, String::new()));
}

#[test]
fn adding_pictures_brings_the_index_up_to_date() {
    let (folder, gallery) = gallery(2000);
    let pictures = folder.path().join("p");
    fs::create_dir(&pictures).unwrap();
    for index in 0..2 {
        unimo_train::scenes::generate(11, index).draw().save(pictures.join(format!("{index}.png"))).unwrap();
    }
    let unimo = |arguments: &[&str]| {
        let output = command("unimo").args(arguments).arg("--gallery").arg(&gallery).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!index_of(&gallery).exists());
    let bundle = BUNDLE.to_str().unwrap();
    unimo(&["index", "add", "--no-captions", "--bundle", bundle, pictures.to_str().unwrap()]);
    let bytes = fs::metadata(index_of(&gallery)).unwrap().len();
    let stats: serde_json::Value = serde_json::from_str(&unimo(&["index", "stats", "--json"])).unwrap();
    assert_eq!((stats["images"].as_u64(), stats["index_bytes"].as_u64()), (Some(2002), Some(bytes)));
    let picture = pictures.join("1.png");
    let found = unimo(&["search", "--image", picture.to_str().unwrap(), "-k", "1", "--bundle", bundle]);
    assert!(found.contains(picture.to_str().unwrap()), "{found}");
}
