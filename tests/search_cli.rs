//! `unimo index` and `unimo search`: what they print is a contract, and adding again what is there costs nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use unimo::bundle::BundleSource;
use unimo::engine::EngineOptions;
use unimo::image::{DecodeLimits, read};
use unimo::model::Model;
use unimo::reranking;
use unimo_tests::index::{self, AddedLine, exported, lines, scratch, stats, statuses};
use unimo_tests::{Run, command, program, without_rights};
use unimo_train::scenes;

/// A bundle of random weights: it sees little, but the same every time.
static BUNDLE: LazyLock<String> = LazyLock::new(|| bundle("search_cli", 5));

fn bundle(name: &str, seed: u64) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    text(&unimo_export::sample::random_bundle(&folder, seed).unwrap())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Results {
    schema: u32,
    results: Vec<Found>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Found {
    source: String,
    score: f64,
    /// Absent without `--rerank`; `Some(None)` for a picture that cannot be read any more.
    #[serde(default, rename = "match", deserialize_with = "present")]
    matching: Option<Option<f64>>,
    caption: Option<String>,
    time: String,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<f64>>, D::Error> {
    Option::deserialize(value).map(Some)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn unimo(arguments: &[&str]) -> Run {
    program("unimo", arguments)
}

fn add(gallery: &str, more: &[&str]) -> Run {
    index::add(&BUNDLE, gallery, more)
}

fn search(gallery: &str, more: &[&str]) -> (i32, Vec<Found>) {
    let mut arguments = vec!["search", "--json", "--gallery", gallery, "--bundle", &BUNDLE];
    arguments.extend(more);
    let run = unimo(&arguments);
    let document: Results = serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    assert_eq!(document.schema, 1);
    (run.code, document.results)
}

fn all(pictures: &[String], status: &str) -> Vec<(String, String)> {
    pictures.iter().map(|picture| (picture.clone(), status.to_owned())).collect()
}

#[test]
fn pictures_are_added_and_found() {
    let (folder, pictures, gallery) = scratch(4);
    let taken = SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_208_000);
    File::options().write(true).open(&pictures[2]).unwrap().set_modified(taken).unwrap();
    let run = add(&gallery, &[&text(&folder.path().join("p"))]);
    assert_eq!((run.code, statuses(&run.stdout)), (0, all(&pictures, "added")), "{run:?}");
    let captions: Vec<Option<String>> = lines::<AddedLine>(&run.stdout).into_iter().map(|line| line.caption).collect();

    let stats = stats(&gallery);
    assert_eq!((stats["schema"].as_u64(), stats["images"].as_u64()), (Some(1), Some(4)));
    let bundle = unimo(&["bundle", "inspect", "--json", &BUNDLE]).json_lines().remove(0);
    assert_eq!(stats["bundle"], bundle["bundle"]);
    assert!(stats["bytes"].as_u64().unwrap() >= fs::metadata(&gallery).unwrap().len());

    // Every picture finds itself: nothing is more like it.
    for (picture, caption) in pictures.iter().zip(&captions) {
        let (code, found) = search(&gallery, &["--image", picture, "-k", "3"]);
        assert_eq!((code, found.len()), (0, 3));
        assert_eq!((&found[0].source, &found[0].caption), (picture, caption));
        assert!((found[0].score - 1.0).abs() < 1e-4, "{found:?}");
        assert!(found.is_sorted_by(|a, b| a.score >= b.score), "{found:?}");
    }
    let (code, found) = search(&gallery, &["--image", &pictures[2], "-k", "1"]);
    assert_eq!((code, found[0].time.as_str()), (0, "2024-02-29T12:00:00Z"));

    // By words: all are there, and the scores are the products of what `embed` prints.
    let words = "a red circle above a blue square";
    let (code, found) = search(&gallery, &[words]);
    assert_eq!((code, found.len()), (0, 4));
    let embed = |kind: &str, what: &str| -> Vec<f64> {
        let line = unimo(&["embed", "--bundle", &BUNDLE, "--jsonl", kind, what]).json_lines().remove(0);
        serde_json::from_value(line["embedding"].clone()).unwrap()
    };
    let query = embed("--text", words);
    for hit in &found {
        let product: f64 = embed("--image", &hit.source).iter().zip(&query).map(|(a, b)| a * b).sum();
        assert!((hit.score - product).abs() < 1e-4, "{hit:?}: {product}");
    }
    // Without --json: one line each, the best first.
    let plain = unimo(&["search", words, "-k", "2", "--gallery", &gallery, "--bundle", &BUNDLE]);
    assert_eq!((plain.code, plain.stdout.lines().count()), (0, 2));
    assert!(plain.stdout.contains(&found[0].source), "{plain:?}");
}

#[test]
fn adding_again_changes_only_what_changed() {
    let (_folder, pictures, gallery) = scratch(3);
    let names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    // The first is named twice.
    let run = add(&gallery, &[&["--no-captions", names[0]], &names[..]].concat());
    assert_eq!(run.code, 0, "{run:?}");
    let mut expected = all(&pictures[..1], "added");
    expected.extend(all(&pictures[..1], "unchanged"));
    expected.extend(all(&pictures[1..], "added"));
    assert_eq!(statuses(&run.stdout), expected);
    assert!(lines::<AddedLine>(&run.stdout).iter().all(|line| line.caption.is_none()));

    // A bundle that cannot see any more, of the same identity: nothing is looked at.
    let blind = tempfile::tempdir().unwrap();
    tar::Archive::new(File::open(&*BUNDLE).unwrap()).unpack(blind.path()).unwrap();
    let root = blind_root(blind.path());
    fs::write(root.join("f16/vision.onnx"), b"no graph").unwrap();
    let blind_add = |names: &[&str]| {
        let root = text(&root);
        unimo(&[&["index", "add", "--jsonl", "--no-captions", "--gallery", &gallery, "--bundle", &root], names].concat())
    };
    let run = blind_add(&names);
    assert_eq!((run.code, statuses(&run.stdout)), (0, all(&pictures, "unchanged")), "{run:?}");

    // A caption that is wanted now and was not before is made.
    let run = add(&gallery, &names[..1]);
    assert_eq!(statuses(&run.stdout), all(&pictures[..1], "updated"));
    let caption = lines::<AddedLine>(&run.stdout).remove(0).caption;
    assert!(caption.is_some());
    let run = add(&gallery, &[names[0], "--no-captions"]);
    assert_eq!(
        (statuses(&run.stdout), lines::<AddedLine>(&run.stdout).remove(0).caption),
        (all(&pictures[..1], "unchanged"), caption)
    );

    scenes::generate(12, 99).draw().save(&pictures[1]).unwrap();
    let run = blind_add(&names);
    assert_eq!(run.code, 3, "the changed picture cannot be looked at: {run:?}");
    let run = add(&gallery, &[&["--no-captions"], &names[..]].concat());
    assert_eq!(
        statuses(&run.stdout),
        [all(&pictures[..1], "unchanged"), all(&pictures[1..2], "updated"), all(&pictures[2..], "unchanged")].concat()
    );
    assert_eq!(stats(&gallery)["images"], 3);
    assert_eq!(search(&gallery, &["--image", names[1], "-k", "1"]).1[0].source, pictures[1]);

    let run = unimo(&["index", "remove", "--gallery", &gallery, names[1], "never there"]);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(exported(&gallery), [pictures[0].clone(), pictures[2].clone()]);
    assert_eq!(unimo(&["index", "remove", "--gallery", &gallery, names[1]]).code, 1);
}

#[test]
fn relative_names_mean_the_same_picture_from_any_folder() {
    let (folder, pictures, gallery) = scratch(2);
    let inside = |arguments: &[&str]| {
        let mut command = command("unimo");
        command.args(arguments).current_dir(folder.path().join("p")).stdin(Stdio::null());
        command.output().unwrap().status.code()
    };
    let add_inside = ["index", "add", "--no-captions", "--gallery", &gallery, "--bundle", &BUNDLE, "00.png", "01.png"];
    assert_eq!(inside(&add_inside), Some(0));
    assert_eq!(exported(&gallery), pictures);
    assert_eq!(statuses(&add(&gallery, &["--no-captions", &pictures[0]]).stdout), all(&pictures[..1], "unchanged"));
    let search_inside = |prefix| inside(&["search", "words", "--source", prefix, "--gallery", &gallery, "--bundle", &BUNDLE]);
    assert_eq!((search_inside("01"), search_inside("02")), (Some(0), Some(1)));
    assert_eq!(inside(&["index", "remove", "--gallery", &gallery, "00.png"]), Some(0));
    assert_eq!(exported(&gallery), pictures[1..]);
}

/// Where a bundle's manifest lies in what a .tar held.
fn blind_root(folder: &Path) -> PathBuf {
    if folder.join("manifest.toml").is_file() {
        return folder.to_owned();
    }
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.join("manifest.toml").is_file()).unwrap()
}

#[test]
fn bad_pictures_do_not_spoil_the_others() {
    let (folder, pictures, gallery) = scratch(2);
    let truncated = text(&folder.path().join("truncated.png"));
    let whole = fs::read(&pictures[0]).unwrap();
    fs::write(&truncated, &whole[..whole.len() / 2]).unwrap();
    let missing = text(&folder.path().join("missing.jpg"));
    let run = add(&gallery, &[&pictures[0], &missing, &truncated, &pictures[1]]);
    assert_eq!(run.code, 3, "{run:?}");
    let found = statuses(&run.stdout);
    let sources: Vec<&str> = found.iter().map(|(source, _)| source.as_str()).collect();
    assert_eq!(sources, [&pictures[0], &missing, &truncated, &pictures[1]]);
    assert_eq!((found[0].1.as_str(), found[3].1.as_str()), ("added", "added"));
    let errors: Vec<bool> = lines::<AddedLine>(&run.stdout).iter().map(|line| line.error.is_some()).collect();
    assert_eq!(errors, [false, true, true, false]);
    assert_eq!(exported(&gallery), pictures);
}

#[test]
fn filters_and_nothing_found() {
    let (_folder, pictures, gallery) = scratch(3);
    for (index, picture) in pictures.iter().enumerate() {
        let taken = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 * (20_000 + index as u64) + 6 * 3600);
        File::options().write(true).open(picture).unwrap().set_modified(taken).unwrap();
    }
    let names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    assert_eq!(add(&gallery, &[&["--no-captions"], &names[..]].concat()).code, 0);
    // Day 20,000 is 2024-10-04; all were taken at six in the morning.
    let cases: [(&[&str], &[usize]); 8] = [
        (&["--since", "2024-10-05"], &[1, 2]),
        (&["--until", "2024-10-05"], &[0, 1]),
        (&["--until", "2024-10-05T06:00:00Z"], &[0, 1]),
        (&["--until", "2024-10-05T05:59:59Z"], &[0]),
        (&["--since", "2024-10-05", "--until", "2024-10-05T12:00:00+01:00"], &[1]),
        (&["--since", "2100-01-01"], &[]),
        (&["--source", names[2]], &[2]),
        (&["--source", "elsewhere/"], &[]),
    ];
    for (filter, expected) in cases {
        let (code, found) = search(&gallery, &[&["words"], filter].concat());
        let mut sources: Vec<String> = found.into_iter().map(|hit| hit.source).collect();
        sources.sort();
        let expected: Vec<String> = expected.iter().map(|&i| pictures[i].clone()).collect();
        assert_eq!((code, sources), (i32::from(expected.is_empty()), expected), "{filter:?}");
    }
}

#[test]
fn reranking_reads_the_pictures_again() {
    let (_folder, pictures, gallery) = scratch(3);
    let names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    assert_eq!(add(&gallery, &[&["--no-captions"], &names[..]].concat()).code, 0);
    fs::remove_file(&pictures[1]).unwrap();
    let words = "a green triangle";
    let run = unimo(&["search", words, "--rerank", "--json", "--gallery", &gallery, "--bundle", &BUNDLE]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stderr.contains(names[1]) && run.stderr.contains("not reranked"), "{run:?}");
    let found = lines::<Results>(&run.stdout).remove(0).results;
    assert_eq!(found.len(), 3);
    assert_eq!(found[2].source, pictures[1], "what cannot be read stands behind the others");
    assert_eq!(found[2].matching, Some(None), "there is no probability of what was not read");
    // What the library makes of the same two pictures.
    let model = Model::open(&BundleSource::Path(BUNDLE.as_str().into()), &EngineOptions::default()).unwrap();
    let score = |hit: &Found| {
        let picture = read(hit.source.as_ref(), &DecodeLimits::default()).unwrap();
        let likelihood = model.log_likelihood(&model.see(&picture).unwrap(), words).unwrap();
        reranking::score(likelihood, hit.score as f32)
    };
    let scores = [score(&found[0]), score(&found[1])];
    assert!(scores[0] > scores[1], "{scores:?}");
    for (hit, expected) in found.iter().zip(reranking::probabilities(&scores)) {
        let probability = hit.matching.flatten().unwrap();
        // Engines agree on likelihoods to some 1e-3 nats.
        assert!((probability - f64::from(expected)).abs() < 1e-2, "{hit:?}: {expected}");
    }
    // The cosines stay what they are without --rerank.
    let (_, plain) = search(&gallery, &[words]);
    for hit in &found {
        let same = plain.iter().find(|other| other.source == hit.source).unwrap();
        assert_eq!((same.score, same.matching), (hit.score, None));
    }
    let run = unimo(&["search", words, "--rerank", "--gallery", &gallery, "--bundle", &BUNDLE]);
    assert!(run.stdout.lines().last().unwrap().starts_with("    -  "), "{run:?}");
}

#[test]
fn a_gallery_that_cannot_be_written_is_read() {
    let (folder, pictures, gallery) = scratch(2);
    assert_eq!(add(&gallery, &["--no-captions", &pictures[0], &pictures[1]]).code, 0);
    // A name with characters that mean something in a URI.
    let (shelf, bundle) = (folder.path().join("read only?#%41"), folder.path().join("bundle"));
    fs::create_dir(&shelf).unwrap();
    let shelved = text(&shelf.join("g"));
    fs::copy(&gallery, &shelved).unwrap();
    fs::copy(&*BUNDLE, &bundle).unwrap();
    let search = ["search", "a red circle", "--gallery", &shelved, "--bundle", &text(&bundle)];
    let run = without_rights(&shelf, &[&bundle], &search);
    assert!(run.status.success(), "{run:?}");
    assert_eq!(String::from_utf8(run.stdout).unwrap().lines().count(), 2);
    let add =
        without_rights(&shelf, &[&bundle], &["index", "add", "--gallery", &shelved, "--bundle", &text(&bundle), &pictures[0]]);
    assert_eq!(add.status.code(), Some(3), "{add:?}");

    // What the log holds must not be missed in silence.
    fs::write(shelf.join("g-wal"), [7; 100]).unwrap();
    let run = without_rights(&shelf, &[&bundle], &search);
    let message = String::from_utf8(run.stderr).unwrap();
    assert!(run.status.code() == Some(3) && message.contains("g-wal"), "{message}");
}

#[test]
fn refusals_have_their_sentence_and_exit_code() {
    let (folder, pictures, gallery) = scratch(1);
    assert_eq!(add(&gallery, &["--no-captions", &pictures[0]]).code, 0);
    let other = bundle("search_cli_other", 6);
    let at = |name: &str| text(&folder.path().join(name));
    fs::write(at("notes"), "milk, eggs, bread\n".repeat(50)).unwrap();
    fs::create_dir(at("empty")).unwrap();
    let newer = at("newer");
    fs::copy(&gallery, &newer).unwrap();
    rusqlite::Connection::open(&newer).unwrap().pragma_update(None, "user_version", 7).unwrap();
    let (notes, missing, empty) = (at("notes"), at("missing"), at("empty"));
    let cases: [(&[&str], i32, &str); 12] = [
        (&["index", "add", "--gallery", &gallery, "--bundle", &other, &pictures[0]], 3, "another model"),
        (&["search", "words", "--gallery", &gallery, "--bundle", &other], 3, "--bundle"),
        (&["index", "verify", "--gallery", &notes], 3, "is not a gallery"),
        (&["index", "add", "--gallery", &notes, "--bundle", &BUNDLE, &pictures[0]], 3, "is not a gallery"),
        (&["index", "stats", "--gallery", &newer], 3, "schema 7"),
        (&["index", "stats", "--gallery", &missing], 3, "there is no gallery"),
        (&["search", "words", "--gallery", &missing, "--bundle", &BUNDLE], 3, "there is no gallery"),
        (&["index", "add", "--gallery", &missing, "--bundle", &BUNDLE, &empty], 1, "holds no pictures"),
        (&["index", "add", "--gallery", &missing, "--bundle", &BUNDLE, "pipe://-"], 2, "index files"),
        (&["index", "add", "--gallery", &missing, "--bundle", &BUNDLE, "-"], 2, "standard input"),
        (&["search", "--gallery", &gallery, "--bundle", &BUNDLE], 2, "WORDS"),
        (&["search", " ", "--gallery", &gallery, "--bundle", &BUNDLE], 2, "no words"),
    ];
    for (arguments, code, part) in cases {
        let run = unimo(arguments);
        assert_eq!((run.code, run.stdout.as_str()), (code, ""), "{arguments:?}: {run:?}");
        assert!(run.stderr.contains(part) && !run.stderr.contains("panicked"), "{arguments:?}: {run:?}");
    }
    assert!(!Path::new(&missing).exists());
    let run = unimo(&["index", "verify", "--gallery", &gallery]);
    assert_eq!((run.code, run.stdout.contains("1 pictures")), (0, true), "{run:?}");
}
