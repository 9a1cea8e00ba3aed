//! `unimo-train data` and `eval`: scenes are the same for the same seed, what is packed is unpacked again, damaged records are
//! counted, listed and skipped, and scores are only given for files that belong together.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use unimo_tests::{Run, program};

fn unimo_train(arguments: &[&str]) -> Run {
    program("unimo-train", arguments)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The only JSON object on standard output.
fn object(run: &Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}\n{}", run.stdout, run.stderr))
}

fn scenes(out: &Path, count: usize, seed: u64, more: &[&str]) -> Value {
    let (count, seed) = (count.to_string(), seed.to_string());
    let mut arguments = vec!["data", "scenes", "--out", text(out), "--count", &count, "--seed", &seed, "--json"];
    arguments.extend(more);
    let run = unimo_train(&arguments);
    assert_eq!(run.code, 0, "{}", run.stderr);
    object(&run)
}

/// Appends a member to a tar file in memory.
fn member(builder: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, bytes).unwrap();
}

fn jpeg(seed: u8) -> Vec<u8> {
    let image = image::RgbImage::from_fn(48, 32, |x, y| image::Rgb([seed.wrapping_mul(40), 4 * x as u8, 7 * y as u8]));
    let mut bytes = Vec::new();
    image.write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Jpeg).unwrap();
    bytes
}

fn write_lines(path: &Path, lines: &[Value]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(path, text).unwrap();
}

#[test]
fn the_same_seed_gives_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    for (name, seed) in [("a", 4), ("b", 4), ("c", 5)] {
        let report = scenes(&out(name), 5, seed, &["--shard-size", "3", "--format", "png"]);
        assert_eq!((&report["schema"], &report["scenes"]), (&json!(1), &json!(5)));
    }
    let shard = |name: &str, number: usize| std::fs::read(out(name).join(format!("scenes-{number:04}.tar"))).unwrap();
    assert_eq!(shard("a", 0), shard("b", 0));
    assert_eq!(shard("a", 1), shard("b", 1));
    assert_ne!(shard("a", 0), shard("c", 0));
    assert!(!out("a").join("scenes-0002.tar").exists());
}

#[test]
fn a_held_out_corpus_shares_no_scene_with_the_excluded_one() {
    let folder = tempfile::tempdir().unwrap();
    let (train, dev) = (folder.path().join("train"), folder.path().join("dev"));
    scenes(&train, 400, 1, &["--max-objects", "1"]);
    let report = scenes(&dev, 100, 2, &["--max-objects", "1", "--distinct", "--exclude", text(&train)]);
    assert!(report["left_out"].as_u64().unwrap() > 0, "this small world must overlap: {report}");
    let (train, _) = unimo_train::scenes::read_records(&[train]).unwrap();
    let (dev, _) = unimo_train::scenes::read_records(&[dev]).unwrap();
    assert_eq!(dev.len(), 100);
    let known: Vec<String> = train.iter().map(|(_, r)| r.graph.signature()).collect();
    assert!(dev.iter().all(|(_, r)| !known.contains(&r.graph.signature())));
}

#[test]
fn what_is_packed_is_unpacked_again() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    std::fs::create_dir_all(pictures.join("dogs")).unwrap();
    std::fs::write(pictures.join("one.jpg"), jpeg(1)).unwrap();
    std::fs::write(pictures.join("dogs/two.v2.JPG"), jpeg(2)).unwrap();
    std::fs::write(pictures.join("silent.jpg"), jpeg(3)).unwrap();
    std::fs::write(pictures.join("notes.txt"), "not a picture").unwrap();
    let captions = folder.path().join("captions.csv");
    std::fs::write(&captions, "picture,caption\none.jpg,\"a cat, asleep\"\none.jpg,a grey cat\ndogs/two.v2.JPG,a dog\n").unwrap();
    let (shards, out) = (folder.path().join("shards"), folder.path().join("out"));

    let run = unimo_train(&[
        "data",
        "pack",
        "--pictures",
        text(&pictures),
        "--captions",
        text(&captions),
        "--out",
        text(&shards),
        "--json",
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let report = object(&run);
    assert_eq!((&report["pictures"], &report["captions"], &report["uncaptioned"]), (&json!(2), &json!(3), &json!(1)));

    let stats = object(&unimo_train(&["data", "stats", text(&shards), "--json"]));
    assert_eq!((&stats["pairs"], &stats["captions"], &stats["vocabulary"]), (&json!(2), &json!(3), &json!(5)));
    assert_eq!(stats["caption_lengths"], json!({ "2": 1, "3": 2 }));
    assert_eq!(stats["picture_sizes"], json!({ "48x32": 2 }));

    let run = unimo_train(&["data", "unpack", text(&shards), "--out", text(&out)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(std::fs::read(out.join("one.jpg")).unwrap(), jpeg(1), "bytes are kept as they are");
    assert_eq!(std::fs::read(out.join("dogs/two_v2.jpg")).unwrap(), jpeg(2));
    assert_eq!(std::fs::read_to_string(out.join("captions.txt")).unwrap(), "a dog\na cat, asleep\na grey cat\n");
    let table = std::fs::read_to_string(out.join("captions.tsv")).unwrap();
    assert_eq!(table, "picture\tcaption\ndogs/two_v2.jpg\ta dog\none.jpg\ta cat, asleep\none.jpg\ta grey cat\n");

    // What was unpacked can be packed again.
    let again = folder.path().join("again");
    let run = unimo_train(&[
        "data",
        "pack",
        "--pictures",
        text(&out),
        "--captions",
        text(&out.join("captions.tsv")),
        "--out",
        text(&again),
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let shard = |folder: &PathBuf| std::fs::read(folder.join("shard-0000.tar")).unwrap();
    assert_eq!(shard(&again), shard(&shards));
}

#[test]
fn packing_leaves_out_and_lists_what_it_cannot_use() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).unwrap();
    std::fs::write(pictures.join("good.jpg"), jpeg(1)).unwrap();
    std::fs::write(pictures.join("good.png"), jpeg(1)).unwrap();
    std::fs::write(pictures.join("cut.jpg"), &jpeg(2)[..400]).unwrap();
    std::fs::write(pictures.join("empty.jpg"), b"").unwrap();
    let captions = folder.path().join("captions.jsonl");
    let line = |picture: &str| json!({ "picture": picture, "captions": ["a caption"] });
    write_lines(&captions, &["good.jpg", "good.png", "cut.jpg", "empty.jpg", "gone.jpg"].map(line));
    let out = folder.path().join("out");
    let run = unimo_train(&[
        "data",
        "pack",
        "--pictures",
        text(&pictures),
        "--captions",
        text(&captions),
        "--out",
        text(&out),
        "--size",
        "32",
        "--json",
    ]);
    assert_eq!(run.code, 3, "{}", run.stderr);
    let report = object(&run);
    assert_eq!(report["pictures"], json!(1));
    assert_eq!(report["unknown"], json!(["gone.jpg"]));
    let mut skipped: Vec<&str> = report["skipped"].as_array().unwrap().iter().map(|s| s["picture"].as_str().unwrap()).collect();
    skipped.sort_unstable();
    assert_eq!(skipped, ["cut.jpg", "empty.jpg", "good.png"]);
    let stats = object(&unimo_train(&["data", "stats", text(&out), "--json"]));
    assert_eq!(stats["picture_sizes"], json!({ "32x32": 1 }));

    let nothing = folder.path().join("nothing");
    std::fs::create_dir(&nothing).unwrap();
    let run = unimo_train(&["data", "pack", "--pictures", text(&nothing), "--out", text(&out)]);
    assert_eq!(run.code, 3);
    assert!(run.stderr.contains("holds no JPEG, PNG or WebP picture"), "{}", run.stderr);
}

#[test]
fn damaged_records_are_counted_listed_and_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let captions = br#"{"captions":["a caption"]}"#;
    member(&mut builder, "whole.jpg", &jpeg(1));
    member(&mut builder, "whole.json", captions);
    member(&mut builder, "cut-picture.jpg", &jpeg(2)[..500]);
    member(&mut builder, "cut-picture.json", captions);
    member(&mut builder, "alone.jpg", &jpeg(3));
    member(&mut builder, "bad-json.jpg", &jpeg(4));
    member(&mut builder, "bad-json.json", b"{\"captions\":");
    member(&mut builder, "bad-utf8.jpg", &jpeg(5));
    member(&mut builder, "bad-utf8.json", b"{\"captions\":[\"\xff\xfe\"]}");
    member(&mut builder, "last.jpg", &jpeg(6));
    let bytes = builder.into_inner().unwrap();
    let shard = folder.path().join("damaged.tar");
    // Without the two closing blocks and half of the last member.
    std::fs::write(&shard, &bytes[..bytes.len() - 1024 - jpeg(6).len() / 2]).unwrap();

    let run = unimo_train(&["data", "stats", text(&shard), "--json"]);
    assert_eq!(run.code, 3, "{}", run.stderr);
    let stats = object(&run);
    assert_eq!((&stats["samples"], &stats["pairs"], &stats["pictures_alone"]), (&json!(2), &json!(1), &json!(1)));
    let mut damaged: Vec<&str> = stats["damaged"].as_array().unwrap().iter().map(|d| d["key"].as_str().unwrap()).collect();
    damaged.sort_unstable();
    assert_eq!(damaged, ["bad-json", "bad-utf8", "cut-picture", "last"]);
    assert!(damaged.iter().all(|key| run.stderr.contains(key)), "each is listed: {}", run.stderr);

    let out = folder.path().join("out");
    let run = unimo_train(&["data", "unpack", text(&shard), "--out", text(&out)]);
    assert_eq!(run.code, 3);
    assert!(out.join("whole.jpg").exists() && !out.join("last.jpg").exists());

    std::fs::write(&shard, b"this is not a tar file at all").unwrap();
    let run = unimo_train(&["data", "stats", text(&shard), "--json"]);
    assert_eq!((run.code, &object(&run)["samples"]), (3, &json!(0)));

    let run = unimo_train(&["data", "stats", text(&folder.path().join("nowhere.tar"))]);
    assert_eq!(run.code, 3);
    assert!(run.stderr.contains("does not exist"), "{}", run.stderr);
}

#[test]
fn a_shard_cannot_write_outside_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    // The crate refuses to write such a name itself.
    let name = b"../escaped.jpg";
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    let bytes = jpeg(1);
    header.set_size(bytes.len() as u64);
    header.set_cksum();
    builder.append(&header, &bytes[..]).unwrap();
    let shard = folder.path().join("hostile.tar");
    std::fs::write(&shard, builder.into_inner().unwrap()).unwrap();
    let run = unimo_train(&["data", "unpack", text(&shard), "--out", text(&folder.path().join("out"))]);
    assert_eq!(run.code, 3, "{}", run.stderr);
    assert!(run.stderr.contains("leads out of the folder"), "{}", run.stderr);
    assert!(!folder.path().join("escaped.jpg").exists());
}

#[test]
fn captions_are_scored_against_their_references() {
    let folder = tempfile::tempdir().unwrap();
    let shards = folder.path().join("scenes");
    scenes(&shards, 20, 3, &["--distinct"]);
    let (records, _) = unimo_train::scenes::read_records(std::slice::from_ref(&shards)).unwrap();
    let file = folder.path().join("captions.jsonl");
    let line =
        |(key, caption): (&str, &str)| json!({ "schema": 1, "source": format!("some/where/{key}.jpg"), "caption": caption });
    let perfect: Vec<Value> = records.iter().map(|(key, r)| line((key, &r.captions[2]))).collect();
    let eval = |verb: &str, more: &[&str]| {
        let mut arguments = vec!["eval", verb, "--references", text(&shards), "--predictions", text(&file), "--json"];
        arguments.extend(more);
        unimo_train(&arguments)
    };

    write_lines(&file, &perfect);
    let scores = object(&eval("captions", &[]));
    assert_eq!(scores["images"], json!(20));
    assert!((scores["bleu"][3].as_f64().unwrap() - 1.0).abs() < 1e-6, "{scores}");
    assert!((scores["rouge_l"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{scores}");
    assert_eq!(object(&eval("scenes", &["--min-right", "1"]))["right"], json!(1.0));

    // A wrong caption for each of the first five: the threshold is missed.
    let mut worse = perfect.clone();
    for (index, wrong) in worse.iter_mut().take(5).enumerate() {
        *wrong = line((&records[index].0, "a dog in the park"));
    }
    write_lines(&file, &worse);
    let run = eval("scenes", &["--min-right", "0.9"]);
    assert_eq!((run.code, &object(&run)["right"]), (6, &json!(0.75)));

    // A picture that could not be read, one without a line, and one too many.
    let mut lines = perfect[..18].to_vec();
    lines.push(json!({ "schema": 1, "source": format!("{}.jpg", records[18].0), "error": "the file is empty" }));
    lines.push(line(("stranger", "a dog")));
    write_lines(&file, &lines);
    let run = eval("captions", &[]);
    assert_eq!((run.code, run.stdout.as_str()), (3, ""), "no score for a part that was not asked for");
    for expected in ["2 of 20", "the file is empty", records[19].0.as_str(), "stranger"] {
        assert!(run.stderr.contains(expected), "{expected} in {}", run.stderr);
    }
    let run = eval("captions", &["--allow-missing"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(object(&run)["missing"], json!([records[18].0, records[19].0]));

    write_lines(&file, &[perfect[0].clone(), perfect[0].clone()]);
    assert_eq!(eval("captions", &["--allow-missing"]).code, 3, "two lines for one picture");
    std::fs::write(&file, "{\"schema\":2,\"source\":\"x\"}\n").unwrap();
    assert!(eval("captions", &[]).stderr.contains("schema 2"));
}

#[test]
fn retrieval_is_scored_in_the_order_of_the_unpacked_captions() {
    let folder = tempfile::tempdir().unwrap();
    let (shards, out) = (folder.path().join("scenes"), folder.path().join("out"));
    scenes(&shards, 12, 3, &["--distinct"]);
    assert_eq!(unimo_train(&["data", "unpack", text(&shards), "--out", text(&out)]).code, 0);
    let (records, _) = unimo_train::scenes::read_records(std::slice::from_ref(&shards)).unwrap();
    let captions = std::fs::read_to_string(out.join("captions.txt")).unwrap();
    assert_eq!(captions.lines().count(), 60);

    // Image i and its texts point along axis i; two images are swapped.
    let axis = |i: usize| (0..12).map(|j| f32::from(u8::from(i == j))).collect::<Vec<_>>();
    let swap = |i: usize| if i < 2 { 1 - i } else { i };
    let image =
        |i: usize| json!({ "schema": 1, "source": out.join(format!("{}.jpg", records[i].0)), "embedding": axis(swap(i)) });
    // The order of the pictures does not matter, that of the texts does.
    let images: Vec<Value> = (0..12).rev().map(image).collect();
    let texts: Vec<Value> =
        captions.lines().enumerate().map(|(t, text)| json!({ "schema": 1, "text": text, "embedding": axis(t / 5) })).collect();
    let (image_file, text_file) = (folder.path().join("images.jsonl"), folder.path().join("texts.jsonl"));
    let eval = |images: &[Value], texts: &[Value]| {
        write_lines(&image_file, images);
        write_lines(&text_file, texts);
        unimo_train(&[
            "eval",
            "retrieval",
            "--references",
            text(&shards),
            "--images",
            text(&image_file),
            "--texts",
            text(&text_file),
            "--json",
        ])
    };
    let run = eval(&images, &texts);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let scores = object(&run);
    let first = |name: &str| scores[name][0].as_f64().unwrap();
    assert!((first("image_to_text") - 10.0 / 12.0).abs() < 1e-9, "{scores}");
    assert!((first("text_to_image") - 10.0 / 12.0).abs() < 1e-9, "{scores}");

    let mut shuffled = texts.clone();
    shuffled.swap(0, 7);
    let run = eval(&images, &shuffled);
    assert_eq!(run.code, 3);
    assert!(run.stderr.contains("text 1 of"), "{}", run.stderr);
    assert_eq!(eval(&images, &texts[..59]).code, 3, "a text is missing");
    assert_eq!(eval(&images[1..], &texts).code, 3, "a picture is missing");
}
