//! `unimo watch`: captions of a camera go where they are asked to go, what becomes of the frames is counted, and it ends cleanly,
//! whoever ends it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde::Deserialize;
use tempfile::TempDir;
use unimo_tests::{Run, command, engine, program, program_with_input};
use unimo_wire::{Decoder, Message};

/// The samples and the captions that the README shows.
const SAMPLES: [(&str, &str); 3] = [
    ("blue-circle.png", "a small blue circle at the bottom"),
    ("purple-square.png", "a small purple square at the top"),
    ("red-star.png", "a small red star in the center"),
];

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct WatchLine {
    schema: u32,
    source: String,
    caption: String,
    score: f64,
    tokens: usize,
    frame: u64,
    captured: String,
    dropped: u64,
    temperature_c: Option<f64>,
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

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("runtime/samples").canonicalize().unwrap()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn watch(arguments: &[&str]) -> Run {
    program("unimo", &[&["watch"], arguments].concat())
}

fn lines(run: &Run) -> Vec<WatchLine> {
    run.json_lines()
        .into_iter()
        .map(|line| serde_json::from_value(line).unwrap_or_else(|error| panic!("{error}: {run:?}")))
        .collect()
}

/// A number of the last line on standard error, by the word behind it.
fn counted(stderr: &str, what: &str) -> u64 {
    let summary = stderr.lines().rfind(|line| line.starts_with("watched ")).unwrap_or_else(|| panic!("no summary: {stderr}"));
    let before = summary.split(what).next().filter(|before| before.len() < summary.len());
    let number = before.and_then(|before| before.split_whitespace().last());
    number.and_then(|number| number.trim_start_matches('(').parse().ok()).unwrap_or_else(|| panic!("no {what}: {summary}"))
}

/// A folder with copies of one sample.
fn copies(count: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for copy in 0..count {
        fs::copy(samples().join("red-star.png"), folder.path().join(format!("{copy}.png"))).unwrap();
    }
    folder
}

/// The samples as JPEGs, one after another, `rounds` times.
fn mjpeg(rounds: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    for (name, _) in SAMPLES.iter().cycle().take(3 * rounds) {
        let image = image::open(samples().join(name)).unwrap().into_rgb8();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut stream, 95);
        image.write_with_encoder(encoder).unwrap();
    }
    stream
}

#[test]
fn captions_go_to_every_sink() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&folder.path().join(name));
    let (gallery, shots, serial) = (at("g"), at("shots"), at("serial"));
    File::create(&serial).unwrap();
    let (colour, mono) = (format!("png://{}?size=320x240", at("c.png")), format!("png://{}?size=128x64&mono=on", at("m.png")));
    let source = text(&samples());
    let sinks = ["--display", &colour, "--display", &mono, "--serial", &serial, "--gallery", &gallery, "--save", &shots];
    let run = watch(&[&[source.as_str(), "--jsonl"], &sinks[..]].concat());
    assert_eq!(run.code, 0, "{run:?}");

    let found = lines(&run);
    let captions: Vec<(String, &str)> = found.iter().map(|line| (line.source.clone(), line.caption.as_str())).collect();
    let expected: Vec<(String, &str)> = SAMPLES.iter().map(|(name, caption)| (text(&samples().join(name)), *caption)).collect();
    assert_eq!(captions, expected);
    for (number, line) in (0..).zip(&found) {
        assert_eq!((line.schema, line.frame, line.dropped), (1, number, 0));
        assert_eq!(line.engine, engine());
        let Times { decode_image, vision, text, total } = line.ms;
        assert!(decode_image > 0.0 && vision > 0.0 && text > 0.0 && (decode_image + vision + text - total).abs() < 0.01);
        assert!(line.tokens > 3 && line.score < 0.0, "{line:?}");
        assert!(line.captured.ends_with('Z') && line.captured.len() == 24, "{line:?}");
    }
    assert_eq!(
        (counted(&run.stderr, " frames"), counted(&run.stderr, " captioned"), counted(&run.stderr, " dropped")),
        (3, 3, 0)
    );

    // The screens show the last picture, a red star, and words.
    let screen = image::open(at("c.png")).unwrap().into_rgb8();
    assert_eq!(screen.dimensions(), (320, 240));
    let pixels = |is: fn(&image::Rgb<u8>) -> bool| screen.pixels().filter(|pixel| is(pixel)).count();
    assert!(pixels(|pixel| pixel.0 == [255; 3]) > 200 && pixels(|pixel| pixel.0[0] > 150 && pixel.0[1] < 90) > 20);
    let screen = image::open(at("m.png")).unwrap().into_luma8();
    assert_eq!(screen.dimensions(), (128, 64));
    assert!(screen.pixels().all(|pixel| [0, 255].contains(&pixel.0[0])) && screen.pixels().any(|pixel| pixel.0[0] == 255));

    let (mut decoder, mut greeted, mut sent, mut last) = (Decoder::new(), Vec::new(), Vec::new(), None);
    for byte in fs::read(&serial).unwrap() {
        match decoder.push(byte).map(|message| message.unwrap()) {
            Some(Message::Hello(hello)) => greeted.push(hello.source.to_owned()),
            Some(Message::Caption(caption)) => sent.push((caption.sequence, caption.text.to_owned(), caption.captured_ms)),
            Some(Message::Stats(stats)) => last = Some(stats),
            None => {}
        }
    }
    assert_eq!(greeted, [source]);
    assert_eq!(sent.iter().map(|(_, words, _)| words.as_str()).collect::<Vec<_>>(), SAMPLES.map(|(_, caption)| caption));
    assert!(sent.iter().all(|&(_, _, captured)| captured > 1_700_000_000_000), "{sent:?}");
    let last = last.unwrap();
    assert_eq!((last.frames, last.captioned, last.unchanged, last.dropped, last.corrupt), (3, 3, 0, 0, 0));

    // Saved frames are the samples as they were, and the gallery finds them.
    let mut saved: Vec<Vec<u8>> = fs::read_dir(&shots).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
    let mut originals: Vec<Vec<u8>> = SAMPLES.iter().map(|(name, _)| fs::read(samples().join(name)).unwrap()).collect();
    saved.sort();
    originals.sort();
    assert!(saved == originals);
    let search = program("unimo", &["search", "a blue circle", "--gallery", &gallery, "--json", "-k", "1"]);
    let results = search.json_lines().remove(0);
    let best = &results["results"][0];
    assert_eq!(best["caption"], SAMPLES[0].1, "{search:?}");
    assert_eq!(fs::read(best["source"].as_str().unwrap()).unwrap(), fs::read(samples().join(SAMPLES[0].0)).unwrap());
    assert_eq!(program("unimo", &["index", "verify", "--gallery", &gallery]).code, 0);
}

#[test]
fn a_gallery_without_saved_frames_knows_files_by_their_path() {
    let folder = tempfile::tempdir().unwrap();
    let gallery = text(&folder.path().join("g"));
    for _ in 0..2 {
        let run = watch(&[&text(&samples()), "--gallery", &gallery]);
        assert_eq!(run.code, 0, "{run:?}");
        let words: Vec<String> =
            SAMPLES.iter().map(|(name, caption)| format!("{}: {caption}", text(&samples().join(name)))).collect();
        assert_eq!(run.stdout.lines().collect::<Vec<_>>(), words);
    }
    let exported = program("unimo", &["index", "export", "--gallery", &gallery]).json_lines();
    let sources: Vec<String> = exported.iter().map(|line| line["source"].as_str().unwrap().to_owned()).collect();
    assert_eq!(sources, SAMPLES.map(|(name, _)| text(&samples().join(name))));
    // `index add` knows them.
    let added = program("unimo", &["index", "add", "--jsonl", "--gallery", &gallery, &text(&samples())]);
    assert!(added.json_lines().iter().all(|line| line["status"] == "unchanged"), "{added:?}");
}

#[test]
fn what_has_not_changed_is_not_captioned_again() {
    let folder = copies(4);
    let source = text(folder.path());
    let run = watch(&[&source, "--jsonl"]);
    assert_eq!((run.code, lines(&run).len()), (0, 1), "{run:?}");
    assert_eq!((counted(&run.stderr, " unchanged"), counted(&run.stderr, " by their pixels")), (3, 3));
    let run = watch(&[&source, "--jsonl", "--gate", "off"]);
    assert_eq!((run.code, lines(&run).len(), counted(&run.stderr, " unchanged")), (0, 4, 0), "{run:?}");
    for (limit, looks) in [(&["--frames", "2"][..], 2), (&["--once"], 1)] {
        let run = watch(&[&[source.as_str(), "--jsonl", "--gate", "off"], limit].concat());
        assert_eq!((run.code, lines(&run).len()), (0, looks), "{run:?}");
    }
}

#[test]
fn a_stream_is_captioned_in_turn_or_by_its_newest_frames() {
    let stream = mjpeg(2);
    let run = program_with_input("unimo", &["watch", "pipe://-", "--all", "--jsonl"], &stream);
    assert_eq!(run.code, 0, "{run:?}");
    let captions: Vec<String> = lines(&run).into_iter().map(|line| line.caption).collect();
    assert_eq!(captions, [SAMPLES, SAMPLES].concat().iter().map(|(_, caption)| *caption).collect::<Vec<_>>());
    assert_eq!((counted(&run.stderr, " frames"), counted(&run.stderr, " dropped")), (6, 0));

    // All are there at once: the model is too slow for most. Every frame is accounted for, and the last one is captioned; with the
    // gate it need not be, where the one captioned before happens to show the same.
    let stream = mjpeg(20);
    let run = program_with_input("unimo", &["watch", "pipe://-", "--jsonl", "--gate", "off"], &stream);
    assert_eq!(run.code, 0, "{run:?}");
    let [frames, captioned, dropped] = [" frames", " captioned", " dropped"].map(|what| counted(&run.stderr, what));
    assert_eq!((frames, captioned + dropped), (60, 60), "{}", run.stderr);
    assert!(dropped > 0, "{}", run.stderr);
    let found = lines(&run);
    assert_eq!(found.len() as u64, captioned);
    assert_eq!(found.last().map(|line| (line.frame, line.caption.as_str())), Some((59, SAMPLES[2].1)));
    assert!(found.is_sorted_by(|a, b| a.frame < b.frame && a.dropped <= b.dropped), "{found:?}");
}

#[test]
fn bad_files_do_not_spoil_the_others() {
    let folder = copies(1);
    let whole = fs::read(samples().join("blue-circle.png")).unwrap();
    fs::write(folder.path().join("a.png"), &whole[..whole.len() / 2]).unwrap();
    let run = watch(&[&text(folder.path()), "--jsonl"]);
    assert_eq!(run.code, 3, "{run:?}");
    let found = run.json_lines();
    // 0.png before a.png.
    assert_eq!(
        (found[0]["caption"].as_str(), found[1]["error"].as_str()),
        (Some(SAMPLES[2].1), Some("the PNG file is cut short"))
    );
    assert_eq!(found[1]["source"], text(&folder.path().join("a.png")));
    assert_eq!(counted(&run.stderr, " corrupt"), 1);
    let run = watch(&[&text(folder.path())]);
    assert_eq!((run.code, run.stdout.lines().count()), (3, 1), "{run:?}");
    assert!(run.stderr.contains("a.png: the PNG file is cut short"), "{run:?}");
}

fn start(arguments: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut command = command("unimo");
    command.arg("watch").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

fn signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// Waits for the end: the exit code, what was still printed, and the complaints.
fn end(mut child: Child, mut output: BufReader<ChildStdout>) -> (Option<i32>, String, String) {
    let (mut rest, mut complaints) = (String::new(), String::new());
    output.read_to_string(&mut rest).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut complaints).unwrap();
    (child.wait().unwrap().code(), rest, complaints)
}

#[test]
fn signals_end_it_cleanly() {
    let forever = format!("{}?loop=1", text(&samples()));
    for name in ["-INT", "-TERM"] {
        let serial = tempfile::NamedTempFile::new().unwrap();
        let (child, mut output) = start(&[&forever, "--jsonl", "--gate", "off", "--serial", &text(serial.path())]);
        let mut line = String::new();
        for _ in 0..2 {
            output.read_line(&mut line).unwrap();
        }
        signal(&child, name);
        let (code, rest, complaints) = end(child, output);
        assert_eq!(code, Some(130), "{complaints}");
        let printed: Vec<WatchLine> = (line + &rest).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let printed = printed.len() as u64;
        assert_eq!(counted(&complaints, " captioned"), printed);
        // The last message on the line tells the same.
        let (mut decoder, mut last) = (Decoder::new(), None);
        for byte in fs::read(serial.path()).unwrap() {
            if let Some(Ok(Message::Stats(stats))) = decoder.push(byte) {
                last = Some(stats.captioned);
            }
        }
        assert_eq!(last, Some(printed));
    }
    // While it waits for a frame that never comes.
    let (mut child, output) = start(&["pipe://-", "--jsonl"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(&mjpeg(1)).unwrap();
    let mut output = output;
    output.read_line(&mut String::new()).unwrap();
    signal(&child, "-TERM");
    let (code, _, complaints) = end(child, output);
    assert_eq!(code, Some(130), "{complaints}");
    drop(input);
}

#[test]
fn a_reader_that_has_seen_enough_ends_it() {
    let forever = format!("{}?loop=1", text(&samples()));
    let (child, mut output) = start(&[&forever, "--gate", "off"]);
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.ends_with("a small blue circle at the bottom\n"), "{line}");
    drop(output);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn refusals_have_their_sentence_and_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let (source, missing) = (text(&samples()), text(&folder.path().join("missing")));
    let not_a_gallery = text(&folder.path().join("words"));
    fs::write(&not_a_gallery, "words, words and more words; not a database at all, not even nearly").unwrap();
    let cases: [(&[&str], i32, &str); 15] = [
        (&["watch", "warp://9"], 2, "warp://"),
        (&["watch", &missing], 4, "not there"),
        (&["watch", &text(folder.path())], 1, "holds no pictures"),
        (&["watch", &source, "--display", "hologram://1"], 2, "hologram://1: no display"),
        (&["watch", &source, "--display", "fb:///nowhere/fb0"], 4, "the display /nowhere/fb0 is not available"),
        (&["watch", &source, "--display", "png:///nowhere/o.png"], 4, "no folder /nowhere"),
        (&["watch", &source, "--serial", "/nowhere/ttyUSB0"], 4, "the serial line /nowhere/ttyUSB0 is not available"),
        (&["watch", &source, "--gallery", &not_a_gallery], 3, "is not a gallery"),
        (&["watch", &source, "--save", &format!("{not_a_gallery}/in")], 3, "cannot save frames into"),
        (&["watch", &source, "--gate", "3"], 2, "a distance from 0 to 2"),
        (&["watch", &source, "--every", "soon"], 2, "say a time"),
        (&["watch", &source, "--frames", "0"], 2, "--frames"),
        (&["watch", &source, "--frames", "2", "--once"], 2, "cannot be used with"),
        (&["watch", &source, "--max-len", "999"], 2, "--max-len 999"),
        (&["watch", &source, "--bundle", &missing], 3, "missing"),
    ];
    for (arguments, code, part) in cases {
        let run = program("unimo", arguments);
        assert!(run.code == code && run.stderr.contains(part), "{arguments:?}: {run:?}");
        assert!(run.stdout.is_empty(), "{run:?}");
    }
}

#[test]
fn a_display_that_fails_is_told_of_and_the_captions_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let screens = folder.path().join("screens");
    fs::create_dir(&screens).unwrap();
    let display = format!("png://{}", text(&screens.join("out.png")));
    let forever = format!("{}?loop=1", text(&samples()));
    let (child, mut output) = start(&[&forever, "--jsonl", "--gate", "off", "--frames", "8", "--display", &display]);
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    // Away as a whole: it may be written at this moment.
    fs::rename(&screens, folder.path().join("elsewhere")).unwrap();
    let (code, rest, complaints) = end(child, output);
    assert_eq!((code, rest.lines().count()), (Some(4), 7), "{complaints}");
    assert!(complaints.contains("cannot show a picture on"), "{complaints}");
    assert!(complaints.contains("pictures could not be shown"), "{complaints}");
}
