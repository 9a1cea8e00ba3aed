//! `unimo caption`, `embed`, `match` and the small commands: what they print is a contract, order is kept, one bad picture does
//! not spoil the others, and every failure has its exit code and one sentence.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use image::{ImageFormat, Rgb, RgbImage};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use unimo_tests::{Run, engine, program, program_with_input};

/// A bundle of random weights: its captions mean nothing, but are the same every time.
static BUNDLE: LazyLock<String> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("caption_cli");
    let bundle = unimo_export::sample::random_bundle(&folder, 3).unwrap();
    bundle.to_str().unwrap().to_owned()
});

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaptionLine {
    schema: u32,
    source: String,
    caption: String,
    score: f64,
    tokens: usize,
    ms: Times,
    engine: String,
    provider: String,
    precision: String,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Times {
    decode_image: f64,
    vision: f64,
    text: f64,
    total: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ErrorLine {
    schema: u32,
    source: Option<String>,
    text: Option<String>,
    error: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmbeddingLine {
    schema: u32,
    source: Option<String>,
    text: Option<String>,
    embedding: Vec<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatchLine {
    schema: u32,
    source: String,
    text: String,
    score: f64,
}

fn unimo(command: &str, arguments: &[&str]) -> Run {
    program("unimo", &[&[command, "--bundle", BUNDLE.as_str()], arguments].concat())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn lines<T: DeserializeOwned>(run: &Run) -> Vec<T> {
    assert_eq!(run.code, 0, "{}", run.stderr);
    run.json_lines().into_iter().map(|line| serde_json::from_value(line).unwrap()).collect()
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_to(&mut std::io::Cursor::new(&mut bytes), format).unwrap();
    bytes
}

fn picture(seed: u8) -> RgbImage {
    RgbImage::from_fn(90, 60, |x, y| Rgb([seed.wrapping_mul(67), (x * 2) as u8, (y * 4) as u8 ^ seed]))
}

/// Pictures `a.jpg`, `b.png` and `c.webp` in a folder.
fn pictures() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let files = [("a.jpg", ImageFormat::Jpeg), ("b.png", ImageFormat::Png), ("c.webp", ImageFormat::WebP)];
    let paths = files.iter().zip(1..).map(|((name, format), seed)| {
        let path = folder.path().join(name);
        fs::write(&path, encoded(&picture(seed), *format)).unwrap();
        path
    });
    let paths = paths.collect();
    (folder, paths)
}

#[test]
fn a_caption_line_has_these_fields_and_no_others() {
    let (_folder, paths) = pictures();
    let arguments: Vec<&str> = paths.iter().map(|path| text(path)).chain(["--jsonl"]).collect();
    let found: Vec<CaptionLine> = lines(&unimo("caption", &arguments));
    assert_eq!(found.iter().map(|line| line.source.as_str()).collect::<Vec<_>>(), arguments[..3]);
    for line in &found {
        assert_eq!((line.schema, line.engine.as_str(), line.provider.as_str()), (1, engine().as_str(), "cpu"));
        assert_eq!(line.precision, "f16");
        assert!(line.tokens >= 1 && !line.caption.is_empty() && line.score < 0.0, "{line:?}");
        let parts = line.ms.decode_image + line.ms.vision + line.ms.text;
        // The parts are rounded to a microsecond each.
        assert!(parts > 0.0 && (parts - line.ms.total).abs() < 0.1, "{line:?}");
    }
}

#[test]
fn one_picture_gives_its_caption_and_several_their_names() {
    let (folder, paths) = pictures();
    let json: Vec<CaptionLine> = lines(&unimo("caption", &["--jsonl", text(folder.path())]));
    let captions: Vec<&str> = json.iter().map(|line| line.caption.as_str()).collect();

    let single = unimo("caption", &[text(&paths[0])]);
    assert_eq!((single.code, single.stdout), (0, format!("{}\n", captions[0])));
    let uri = unimo("caption", &[&format!("file://{}", text(&paths[0]))]);
    assert_eq!((uri.code, uri.stdout), (0, format!("{}\n", captions[0])));
    let bytes = fs::read(&paths[1]).unwrap();
    let piped = program_with_input("unimo", &["caption", "-", "--bundle", &BUNDLE], &bytes);
    assert_eq!((piped.code, piped.stdout), (0, format!("{}\n", captions[1])), "{}", piped.stderr);

    let expected: String = paths.iter().zip(&captions).map(|(path, caption)| format!("{}: {caption}\n", text(path))).collect();
    for threads in ["1", "3"] {
        let several = unimo("caption", &[text(folder.path()), "--threads", threads]);
        assert_eq!((several.code, &several.stdout), (0, &expected), "{threads} threads");
    }
}

#[test]
fn a_folder_is_walked_in_the_order_of_its_paths() {
    let (folder, _) = pictures();
    let below = folder.path().join("b");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("Z.JPEG"), encoded(&picture(9), ImageFormat::Jpeg)).unwrap();
    fs::write(below.join("notes.txt"), "no picture").unwrap();
    let found: Vec<CaptionLine> = lines(&unimo("caption", &[text(folder.path()), "--jsonl"]));
    let names = found.iter().map(|line| Path::new(&line.source).strip_prefix(folder.path()).unwrap().to_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["a.jpg", "b/Z.JPEG", "b.png", "c.webp"]);
}

#[test]
fn a_bad_picture_among_good_ones_has_its_place_in_the_output() {
    let (folder, paths) = pictures();
    let bad = folder.path().join("bad.jpg");
    fs::write(&bad, b"\xff\xd8\xff\xe0nonsense").unwrap();
    let missing = folder.path().join("missing.png");
    let arguments = [text(&paths[2]), text(&bad), text(&paths[0]), text(&missing), text(&paths[1])];

    for threads in ["1", "4"] {
        let run = unimo("caption", &[&arguments[..], &["--jsonl", "--threads", threads]].concat());
        assert_eq!(run.code, 3);
        let sources: Vec<String> = run.json_lines().iter().map(|line| line["source"].as_str().unwrap().to_owned()).collect();
        assert_eq!(sources, arguments);
        for (place, line) in run.json_lines().into_iter().enumerate() {
            if place % 2 == 1 {
                let line: ErrorLine = serde_json::from_value(line).unwrap();
                assert!(line.schema == 1 && line.text.is_none() && line.source.is_some() && !line.error.is_empty());
            } else {
                serde_json::from_value::<CaptionLine>(line).unwrap();
            }
        }
    }

    let document = unimo("caption", &[&arguments[..], &["--json"]].concat());
    assert_eq!(document.code, 3);
    let [object] = document.json_lines().try_into().unwrap();
    assert_eq!((object["schema"].as_u64(), object["results"].as_array().map(Vec::len)), (Some(1), Some(5)));
    assert!(object["results"][1]["error"].is_string() && object["results"][2]["caption"].is_string());

    let plain = unimo("caption", &arguments);
    assert_eq!((plain.code, plain.stdout.lines().count(), plain.stderr.lines().count()), (3, 3, 2), "{plain:?}");
    assert!(plain.stderr.starts_with(&format!("error: {}: ", text(&bad))), "{}", plain.stderr);
}

#[test]
fn hostile_pictures_are_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let jpeg = encoded(&picture(1), ImageFormat::Jpeg);
    let png = encoded(&picture(1), ImageFormat::Png);
    let webp = encoded(&picture(1), ImageFormat::WebP);
    // The same PNG, declaring 60,000 x 60,000 pixels.
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    let crc = !bomb[12..29].iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    });
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let cases: [(&str, &[u8], &str); 8] = [
        ("half.jpg", &jpeg[..jpeg.len() / 2], "the JPEG file is cut short"),
        ("no-end.jpg", &jpeg[..jpeg.len() - 2], "the JPEG file is cut short"),
        ("half.png", &png[..png.len() / 2], "the PNG file is cut short"),
        ("half.webp", &webp[..webp.len() / 2], "the WebP file is cut short"),
        ("bomb.png", &bomb, "60000x60000 pixels are more than the limit"),
        ("empty.jpg", b"", "the file is empty"),
        ("text.jpg", b"this is no picture", "not a JPEG, PNG or WebP picture"),
        ("header.png", &png[..8], "the PNG file is cut short"),
    ];
    for (name, bytes, message) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        for command in [&["caption"][..], &["embed", "--image"], &["match"]] {
            let mut arguments = [&command[1..], &[text(&path)]].concat();
            if command[0] == "match" {
                arguments.push("a dog");
            }
            let run = unimo(command[0], &arguments);
            assert_eq!((run.code, run.stdout.as_str()), (3, ""), "{name}, {command:?}");
            assert!(run.stderr.contains(message) && run.stderr.lines().count() == 1, "{name}: {}", run.stderr);
        }
    }
}

#[test]
fn exit_codes() {
    let (folder, paths) = pictures();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let (picture, empty) = (text(&paths[0]), text(&empty));
    let cases: [(&[&str], i32, &str); 18] = [
        (&["caption", empty], 1, "holds no pictures"),
        (&["caption"], 2, "required"),
        (&["caption", picture, "--json", "--jsonl"], 2, "cannot be used with"),
        (&["caption", picture, "--beam", "0"], 2, "0 is not in 1..=64"),
        (&["caption", picture, "--max-len", "0"], 2, "captions of this model have 1 to 31 tokens"),
        (&["caption", picture, "--max-len", "999"], 2, "captions of this model have 1 to 31 tokens"),
        (&["caption", picture, "--threads", "0"], 2, "--threads"),
        (&["caption", picture, "--engine", "magic"], 2, "magic is none of tract, ort"),
        (&["caption", "warp://9/picture"], 2, "warp://"),
        (&["caption", "v4l2:///dev/video-of-nobody"], 4, "v4l2:///dev/video-of-nobody: not there"),
        (&["caption", "test://scenes?size=8"], 2, "size=8: not a size"),
        (&["caption", "pipe://-?size=8x8"], 2, "JPEGs tell their size themselves"),
        (&["caption", "pipe://-"], 4, "pipe://-: it ended without giving a picture"),
        (&["embed"], 2, "--image"),
        (&["embed", "--text", "a", "--image", picture], 2, "cannot be used with"),
        (&["caption", picture, "--precision", "i8"], 3, "it holds no i8 weights, only f16"),
        (&["caption", picture, "--engine", "ort", "--ort-lib", empty], 5, "no usable library of ONNX Runtime: --ort-lib names "),
        (&["caption", picture, "--engine", "tract", "--provider", "cuda"], 5, "engine tract cannot compute on cuda"),
    ];
    for (arguments, code, message) in cases {
        let run = unimo(arguments[0], &arguments[1..]);
        assert_eq!(run.code, code, "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(message) && run.stdout.is_empty(), "{arguments:?}: {run:?}");
    }
    let run = program("unimo", &["caption", picture, "--bundle", text(&folder.path().join("none.tar"))]);
    assert_eq!((run.code, run.stderr.contains("there is no such folder or file")), (3, true), "{}", run.stderr);
}

#[test]
fn decoding_options_reach_the_decoder() {
    let (_folder, paths) = pictures();
    let caption = |options: &[&str]| -> CaptionLine {
        lines(&unimo("caption", &[&[text(&paths[0]), "--jsonl"], options].concat())).remove(0)
    };
    let greedy = caption(&["--beam", "1", "--max-len", "9"]);
    assert!(greedy.tokens <= 9, "{greedy:?}");
    let two = caption(&["--beam", "1", "--max-len", "2"]);
    assert!(two.tokens <= 2, "{two:?}");
    // Random weights spread the probability so thin that a wide beam always finds something better than greedy decoding does.
    let wide = caption(&["--beam", "8", "--max-len", "9"]);
    assert!(wide.score > greedy.score, "{} {}", wide.score, greedy.score);
    for threads in ["1", "2"] {
        let again = caption(&["--beam", "1", "--max-len", "9", "--threads", threads]);
        assert_eq!((&again.caption, again.tokens), (&greedy.caption, greedy.tokens), "{threads} threads");
    }
}

#[test]
fn embeddings_are_unit_vectors_of_one_width() {
    let (folder, paths) = pictures();
    let images: Vec<EmbeddingLine> = lines(&unimo("embed", &["--jsonl", "--image", text(folder.path())]));
    let texts: Vec<EmbeddingLine> = lines(&unimo("embed", &["--jsonl", "--text", "a red circle", "A red  circle."]));
    assert_eq!((images.len(), texts.len()), (3, 2));
    let width = images[0].embedding.len();
    for line in images.iter().chain(&texts) {
        let length: f64 = line.embedding.iter().map(|x| x * x).sum::<f64>().sqrt();
        // f32 sums of a few dozen squares.
        assert!(line.schema == 1 && line.embedding.len() == width && (length - 1.0).abs() < 1e-4, "{line:?}");
    }
    assert_eq!(images[0].source.as_deref(), Some(text(&paths[0])));
    assert!(images[0].text.is_none() && texts[0].source.is_none());
    assert_eq!(texts[1].text.as_deref(), Some("A red  circle."));
    assert_eq!(texts[0].embedding, texts[1].embedding, "queries are normalised");
    assert_ne!(images[0].embedding, images[1].embedding);

    let plain = unimo("embed", &["--text", "a red circle"]);
    let numbers: Vec<f64> = plain.stdout.split_whitespace().map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers, texts[0].embedding);
}

#[test]
fn texts_come_from_files_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("texts.txt");
    fs::write(&file, "a red circle\n\na blue square\n").unwrap();
    let run = unimo("embed", &["--jsonl", "--text-file", text(&file)]);
    assert_eq!(run.code, 3, "an empty line is no text: {}", run.stderr);
    let found = run.json_lines();
    assert_eq!(found.len(), 3);
    let error: ErrorLine = serde_json::from_value(found[1].clone()).unwrap();
    assert_eq!((error.text.as_deref(), error.error.as_str(), error.source), (Some(""), "the text is empty", None));
    let piped = program_with_input("unimo", &["embed", "--jsonl", "--bundle", &BUNDLE, "--text-file", "-"], b"a blue square\n");
    assert_eq!((piped.code, &piped.json_lines()[0]["embedding"]), (0, &found[2]["embedding"]));
    let missing = unimo("embed", &["--text-file", "/no/such/file"]);
    assert_eq!((missing.code, missing.stderr.contains("cannot read /no/such/file")), (3, true), "{}", missing.stderr);
    let long = "word ".repeat(60);
    let run = unimo("embed", &["--jsonl", "--text", &long]);
    assert!(run.code == 0 && run.stderr.starts_with("warning: only the first 30 of "), "{}", run.stderr);
}

#[test]
fn matching_gives_a_probability_for_each_text() {
    let (folder, paths) = pictures();
    let run = unimo("match", &["--jsonl", text(&paths[0]), "a red circle", "a dog"]);
    let found: Vec<MatchLine> = lines(&run);
    assert_eq!(found.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["a red circle", "a dog"]);
    for line in &found {
        assert!(line.schema == 1 && line.source == text(&paths[0]) && (0.0..=1.0).contains(&line.score), "{line:?}");
    }
    assert_ne!(found[0].score, found[1].score);
    let plain = unimo("match", &[text(&paths[0]), "a red circle"]);
    assert_eq!(plain.stdout, format!("{:.4}  a red circle\n", found[0].score));
    assert_eq!(unimo("match", &[text(folder.path()), "a dog"]).code, 2, "a folder of several is not one picture");
}

#[test]
fn bundles_are_shown_checked_and_packed() {
    let folder = tempfile::tempdir().unwrap();
    let shown = program("unimo", &["bundle", "inspect", &BUNDLE]);
    assert!(shown.code == 0 && shown.stdout.contains("pico") && shown.stdout.contains("f16/vision.onnx"), "{shown:?}");
    let [json] = program("unimo", &["bundle", "inspect", "--json", &BUNDLE]).json_lines().try_into().unwrap();
    assert_eq!((json["schema"].as_u64(), json["manifest"]["model"]["name"].as_str()), (Some(1), Some("pico")));
    let checked = program("unimo", &["bundle", "verify", &BUNDLE]);
    assert!(checked.code == 0 && checked.stdout.contains("4 graphs load on tract"), "{checked:?}");
    let out = folder.path().join("again.tar");
    let packed = program("unimo", &["bundle", "pack", &BUNDLE, text(&out)]);
    assert_eq!(packed.code, 0, "{}", packed.stderr);
    assert_eq!(fs::read(&out).unwrap(), fs::read(BUNDLE.as_str()).unwrap(), "packing is reproducible");
}

#[test]
fn help_completions_and_manual() {
    let help = program("unimo", &["--help"]);
    assert_eq!(help.code, 0);
    for part in ["caption", "embed", "match", "bundle", "Examples:", "Exit codes:"] {
        assert!(help.stdout.contains(part), "--help lacks {part}");
    }
    for command in ["caption", "embed", "match"] {
        let help = program("unimo", &[command, "--help"]);
        assert!(help.stdout.contains("Examples:") && help.stdout.contains("--bundle"), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = program("unimo", &["completions", shell]);
        assert!(script.code == 0 && script.stdout.contains("caption"), "{shell}");
    }
    assert!(program("unimo", &["man"]).stdout.contains(".TH unimo 1"));
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(program("unimo", &["man", "--out", text(folder.path())]).code, 0);
    assert!(folder.path().join("unimo-caption.1").is_file());
}

#[test]
fn captioning_is_measured() {
    let (folder, paths) = pictures();
    let engine = engine();
    let bench = |more: &[&str]| {
        let arguments = ["bench", "--bundle", &BUNDLE, "--engine", &engine, "--duration", "1", "--rounds", "2"];
        program("unimo", &[&arguments, more, &[text(folder.path())]].concat())
    };
    let [report] = bench(&["--json"]).json_lines().try_into().unwrap();
    let [row] = report["results"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!((row["engine"].as_str(), row["precision"].as_str()), (Some(engine.as_str()), Some("f16")));
    // All three pictures in each of both rounds.
    assert!(row["captions"].as_u64().unwrap() >= 6, "{row}");
    let enough = row["captions"].as_u64().unwrap() >= 64;
    assert_eq!(row["at_most_ms"]["p90"].as_f64().is_some(), enough, "{row}");
    assert!(!enough || row["at_most_ms"]["p90"].as_f64() >= row["ms"]["p90"].as_f64(), "{row}");
    let p50 = |part: &str| row[part]["p50"].as_f64().unwrap();
    let parts = ["decode_image_ms", "vision_ms", "text_ms"].map(p50);
    assert!(parts.iter().all(|&ms| ms > 0.0 && ms < p50("ms")), "{row}");
    assert!(row["ms"]["p99"].as_f64().unwrap() >= row["ms"]["p90"].as_f64().unwrap() && p50("ms") > 0.0);
    // The first caption waits for the graphs.
    assert!(row["first_ms"].as_f64().unwrap() > row["load_ms"].as_f64().unwrap(), "{row}");
    let weights = fs::metadata(BUNDLE.as_str()).unwrap().len();
    assert!((weights / 2..weights).contains(&row["model_bytes"].as_u64().unwrap()), "{row}");

    let [report] = bench(&["--json", "--roofline"]).json_lines().try_into().unwrap();
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    assert!(number(&report["peaks"]["gflops"]) > 0.1 && number(&report["peaks"]["gigabytes"]) > 0.01, "{report}");
    let row = &report["results"][0];
    for (part, measured) in [("prefill", &row["vision_ms"]["p50"]), ("decode", &row["step_ms"])] {
        let share = &row["roofline"][part];
        let achieved = number(&share["limit_ms"]) / number(measured);
        assert!(achieved > 0.0 && (number(&share["achieved"]) - achieved).abs() < 1e-9 * achieved, "{part}: {row}");
    }
    assert!(number(&row["step_ms"]) > 0.0 && number(&row["step_ms"]) <= number(&row["token_ms"]), "{row}");
    // MobileNetV2 1.0 on 224 by 224 has 300 million pairs of factors (Sandler et al., CVPR 2018, table 4), its classifier's included.
    let operations = row["roofline"]["prefill"]["operations"].as_u64().unwrap();
    assert!((580_000_000..680_000_000).contains(&operations), "{operations}");

    let slow = bench(&["--assert-p90-ms", "0.001"]);
    assert!(slow.code == 6 && slow.stdout.lines().count() >= 3 && slow.stderr.contains("not within 0.001"), "{slow:?}");

    // A line more for each run, with all that the row says and where it was measured.
    let ledger = folder.path().with_extension("ledger");
    let append = ["--ledger", text(&ledger), "--json"];
    let [report] = bench(&append).json_lines().try_into().unwrap();
    assert_eq!(bench(&append).code, 0);
    let written = fs::read_to_string(&ledger).unwrap();
    let lines: Vec<serde_json::Value> = written.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (name, value) in report["results"][0].as_object().unwrap() {
        assert_eq!(&lines[0][name], value, "{name}");
    }
    assert_eq!((lines[1]["schema"].as_u64(), &lines[1]["bundle"]), (Some(1), &report["bundle"]));
    assert!(lines[1]["machine"]["processors"].as_u64().unwrap() > 0 && lines[1]["date"].as_str().unwrap().ends_with('Z'));
    // What the ledger says of both runs.
    let [compared] = program("unimo", &["bench", "compare", "--json", text(&ledger)]).json_lines().try_into().unwrap();
    let [comparison] = compared["comparisons"].as_array().unwrap().as_slice() else { panic!("{compared}") };
    assert_eq!((comparison["earlier"].as_u64(), comparison["verdict"].as_str()), (Some(1), Some("too-few-rows")));
    assert_eq!(comparison["before_ms"], lines[0]["ms"]["p50"]);
    assert_eq!(comparison["newest"]["ms"]["p50"], lines[1]["ms"]["p50"]);
    let boards = program("unimo", &["bench", "table", text(&ledger), text(&ledger)]);
    assert!(boards.code == 0 && boards.stdout.lines().count() == 3 && boards.stdout.contains(" f16 |"), "{boards:?}");
    fs::write(&ledger, "nothing\n").unwrap();
    let nothing = program("unimo", &["bench", "compare", text(&ledger)]);
    assert!(nothing.code == 1 && nothing.stderr.contains("1 lines are no rows"), "{nothing:?}");
    fs::remove_file(&ledger).unwrap();
    assert_eq!(program("unimo", &["bench", "compare", text(&ledger)]).code, 3);

    for (more, code, message) in [
        (&["--ledger", "/nowhere/ledger"][..], 3, "cannot write the ledger /nowhere/ledger"),
        (&["--precision", "f32"], 3, "it holds no f32 weights"),
        (&["--duration", "0"], 2, "--duration"),
        (&["-"], 2, "must be files"),
        (&["--engine", "ort", "--ort-lib", "/nowhere"], 5, "where there is none"),
    ] {
        let run = bench(more);
        assert!(run.code == code && run.stderr.contains(message), "{more:?}: {run:?}");
    }
    fs::write(&paths[1], "no picture").unwrap();
    assert_eq!(bench(&[]).code, 3);
}
