//! Promise: the engines agree. What tract computes ONNX Runtime computes, in every precision, and the captions are the same.
//!
//! ONNX Runtime is a library that a machine may lack: then these tests say so and hold nothing, unless `UNIMO_REQUIRE_ORT` is
//! set, as in CI. Run on ONNX Runtime, the whole list of the command line's tests is `UNIMO_ENGINE=ort cargo test …`.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use unimo::bundle::BundleSource;
use unimo::bundle::manifest::{Form, Precision};
use unimo::engine::{EngineKind, EngineOptions, ort_library};
use unimo::model::Model;
use unimo_export::export::{ExportOptions, export};
use unimo_export::sample::{drawn_samples, random_checkpoint};
use unimo_tests::{ort_is_there, program};

/// A pico bundle of random weights in all precisions.
static BUNDLE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("engines");
    let checkpoint = random_checkpoint(&folder.join("checkpoint"), "pico", 3).unwrap();
    let out = folder.join("bundle.tar");
    let options = ExportOptions { precisions: Precision::ALL.to_vec(), force: true, ..Default::default() };
    export(&checkpoint, &out, &options, &drawn_samples(1), &|_, _| ()).unwrap();
    out
});

fn open(source: BundleSource, engine: EngineKind, precision: Option<Precision>) -> Model {
    // The form that both engines run; others have tests of their own.
    let form = Some(Form::Expanded);
    Model::open(&source, &EngineOptions { engine, precision, form, ..EngineOptions::default() }).unwrap()
}

/// What the files say: ONNX Runtime, with nothing rewritten and no kernel of ours, which both engines run otherwise.
fn reference(source: BundleSource, precision: Option<Precision>) -> Model {
    let (engine, form) = (EngineKind::Ort, Some(Form::Expanded));
    Model::open(&source, &EngineOptions { engine, precision, form, rewriting: false, ..EngineOptions::default() }).unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn embeddings_scores_and_captions_agree_in_every_precision() {
    if !ort_is_there() {
        return;
    }
    for precision in Precision::ALL {
        let source = || BundleSource::Path(BUNDLE.clone());
        let both = [EngineKind::Tract, EngineKind::Ort].map(|engine| open(source(), engine, Some(precision)));
        let reference = reference(source(), Some(precision));
        for (sample, model) in drawn_samples(3).iter().flat_map(|sample| both.iter().map(move |model| (sample, model))) {
            let (a, b) = (reference.see(&sample.image).unwrap(), model.see(&sample.image).unwrap());
            // All sum in f32, in other orders: 5e-5 of an output's largest value at most on trained weights.
            assert!(largest_difference(&a.embedding, &b.embedding) < 1e-4, "{precision}");
            let [a_text, b_text] = [&reference, model].map(|model| model.embed_text(&sample.text).unwrap());
            assert!(largest_difference(&a_text, &b_text) < 1e-4, "{precision}");
            let [p, q] = [reference.match_score(&a, &sample.text).unwrap(), model.match_score(&b, &sample.text).unwrap()];
            assert!((p - q).abs() < 1e-4, "{precision}: {p} {q}");
            let options = model.decode_options();
            let (x, y) = (reference.caption(&a, &options).unwrap(), model.caption(&b, &options).unwrap());
            assert!(x.tokens == y.tokens && (x.score - y.score).abs() < 1e-3, "{precision}: {x:?} {y:?}");
        }
    }
}

#[test]
fn the_shipped_model_says_the_same_on_both_engines() {
    if !ort_is_there() {
        return;
    }
    let both = [EngineKind::Tract, EngineKind::Ort].map(|engine| open(BundleSource::Embedded, engine, None));
    let reference = reference(BundleSource::Embedded, None);
    for (sample, model) in drawn_samples(6).iter().flat_map(|sample| both.iter().map(move |model| (sample, model))) {
        let (a, b) = (reference.see(&sample.image).unwrap(), model.see(&sample.image).unwrap());
        assert!(largest_difference(&a.embedding, &b.embedding) < 1e-4);
        let options = model.decode_options();
        let (a, b) = (reference.caption(&a, &options).unwrap(), model.caption(&b, &options).unwrap());
        assert_eq!(a.text, b.text);
    }
}

#[test]
fn threads_share_a_graph_of_onnx_runtime() {
    if !ort_is_there() {
        return;
    }
    let model = open(BundleSource::Path(BUNDLE.clone()), EngineKind::Ort, None);
    let samples = drawn_samples(4);
    let alone: Vec<Vec<f32>> = samples.iter().map(|sample| model.embed_image(&sample.image).unwrap()).collect();
    std::thread::scope(|scope| {
        for (sample, expected) in samples.iter().zip(&alone) {
            let model = &model;
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(&model.embed_image(&sample.image).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn the_doctor_tells_what_is_there_and_what_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let run = program("unimo", &["doctor", "--json", "--ort-lib", folder.path().to_str().unwrap()]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let report = run.json_lines().remove(0);
    assert_eq!((&report["schema"], &report["bundle"]["model"]), (&1.into(), &"edge-s".into()));
    assert_eq!((&report["engines"][0]["engine"], &report["engines"][0]["providers"][0]), (&"tract".into(), &"cpu".into()));
    let error = report["engines"][1]["error"].as_str().unwrap();
    assert!(error.contains("--ort-lib names") && error.contains("where there is none"), "{error}");

    // A file that is no library.
    let fake = folder.path().join("libonnxruntime.so.1.99.0");
    std::fs::write(&fake, "not a library").unwrap();
    let run = program("unimo", &["doctor", "--ort-lib", folder.path().to_str().unwrap()]);
    assert!(run.stdout.contains("ort      NOT USABLE: no usable library of ONNX Runtime: "), "{}", run.stdout);
    let loader = if cfg!(target_env = "gnu") { "file too short" } else { "" };
    assert!(run.stdout.contains(loader) && !run.stdout.contains("dlopen failed"), "the loader's own sentence: {}", run.stdout);
    let board = run.stdout.lines().find_map(|line| line.strip_prefix("board    "));
    assert!(board.is_some_and(|board| !board.is_empty()), "{}", run.stdout);
    assert!(run.stdout.contains("tract    inside this program; computes on cpu"), "{}", run.stdout);

    if ort_is_there() {
        let report = program("unimo", &["doctor", "--json"]).json_lines().remove(0);
        let ort = &report["engines"][1];
        assert!(ort["providers"].as_array().unwrap().contains(&"cpu".into()), "{ort}");
        assert!(Path::new(ort["library"].as_str().unwrap()).is_file(), "{ort}");
    }
}

#[test]
fn providers_that_the_library_lacks_are_refused_and_not_replaced() {
    if !ort_is_there() {
        return;
    }
    let library = ort_library(None).unwrap();
    for provider in ["cuda", "tensorrt", "xnnpack"].into_iter().filter(|p| !library.providers.iter().any(|has| has.name() == *p))
    {
        let run = program("unimo", &["embed", "--text", "a", "--engine", "ort", "--provider", provider]);
        assert_eq!((run.code, run.stdout.as_str()), (5, ""), "{provider}: {}", run.stderr);
        assert!(run.stderr.contains(&format!("engine ort cannot compute on {provider}")), "{}", run.stderr);
    }
}
