//! Promise: an exported bundle computes what the checkpoint computes, or there is no bundle.
//!
//! The golden values come from a NumPy forward that shares no code with this project, `exporter/tests/reference/reference.py`;
//! that script also checks the files with `onnx.checker` and runs them in ONNX Runtime.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use candle_core::Device;
use tempfile::TempDir;
use unimo::bundle::manifest::{Manifest, Precision, Sizes};
use unimo::bundle::{Bundle, BundleSource, MANIFEST, sha256_hex};
use unimo::engine::{self, EngineOptions, Graph, GraphSource, Tensor};
use unimo::model::Model;
use unimo::tokenizer::{CLS, PAD, SEP};
use unimo_export::checkpoint::Checkpoint;
use unimo_export::export::{ExportOptions, Written, export};
use unimo_export::forms::FormOptions;
use unimo_export::from_bundle::{self, Embeddings};
use unimo_export::gate::Gate;
use unimo_export::parity;
use unimo_export::quality::{Development, MaxDrop};
use unimo_export::sample::drawn_samples;
use unimo_export::upgrade::{UpgradeOptions, upgrade};
use unimo_tests::reference::{checkpoint, golden};
use unimo_train::backbone::Backbone;
use unimo_train::model::{ImageEmbedding, TextEmbedding};
use unimo_train::scenes::{CorpusOptions, write_corpus};

mod replacing;

/// Largest difference from NumPy, as a share of the output's root mean square: both compute in f32, but sum in another order
/// (of a trained `edge-s`, tract and candle differ by 5e-5 of an output's largest value, ONNX Runtime and NumPy by 8e-6). A
/// missing bias or a shifted padding gives 1e-1 and more.
const TOLERANCE: f64 = 2e-4;
/// What the runtime adds to the scores of empty slots.
const EMPTY: f32 = -1e4;

fn options(precisions: &[Precision]) -> ExportOptions {
    ExportOptions { precisions: precisions.to_vec(), ..ExportOptions::default() }
}

/// A checkpoint, its bundle in all precisions as a folder, and the reports of its export.
struct Exported {
    checkpoint: TempDir,
    out: TempDir,
    reports: Vec<Written>,
}

impl Exported {
    fn bundle(&self) -> PathBuf {
        self.out.path().join("bundle")
    }
}

fn exported() -> &'static Exported {
    static EXPORTED: OnceLock<Exported> = OnceLock::new();
    EXPORTED.get_or_init(|| {
        let (checkpoint, out) = (checkpoint(ImageEmbedding::Token, TextEmbedding::Token), tempfile::tempdir().unwrap());
        let all = options(&Precision::ALL);
        let reports = export(checkpoint.path(), &out.path().join("bundle"), &all, &drawn_samples(2), &|_, _| ()).unwrap();
        Exported { checkpoint, out, reports }
    })
}

fn open(path: &Path) -> Bundle {
    Bundle::open(&BundleSource::Path(path.to_path_buf())).unwrap()
}

fn graph(bundle: &Bundle, precision: Precision, name: &str) -> Box<dyn Graph> {
    let signature = bundle.manifest().graphs.iter().find(|graph| graph.name == name).unwrap();
    let onnx = bundle.read(&Manifest::graph_file(precision, name)).unwrap();
    let external = |location: &str| bundle.share(&format!("{precision}/{location}")).ok();
    // One text at a time, as the reference script decodes it.
    let sizes = Sizes::of_beam(1, bundle.manifest().model.max_text);
    let source = GraphSource { signature: &signature.fixed(sizes), sizes, onnx, external: &external };
    engine::open(&EngineOptions::default()).unwrap().load(&source).unwrap()
}

/// Every file below a folder, by its path in it.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, fs::read(&path).unwrap());
        }
    }
    found
}

/// A copy that a test may damage.
fn copy(folder: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for (name, bytes) in files(folder) {
        let path = copy.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    copy
}

/// All outputs for the reference script's inputs, decoded step by step.
fn outputs(bundle: &Bundle, precision: Precision) -> BTreeMap<String, Vec<f32>> {
    let model = &bundle.manifest().model;
    let (slots, depth) = (model.max_text, model.hidden / model.heads);
    let mut found = BTreeMap::new();
    let mut note = |graph: &str, names: &[&str], tensors: &[Tensor]| {
        for (name, tensor) in names.iter().zip(tensors) {
            found.entry(format!("{graph}.{name}")).or_insert_with(Vec::new).extend_from_slice(tensor.floats());
        }
    };

    let pixel = |c: usize, y: usize, x: usize| (0.05 * ((c + 1) * x) as f64 + 0.031 * y as f64).sin() as f32;
    let pixels = (0..3 * 224 * 224).map(|i| pixel(i / (224 * 224), i / 224 % 224, i % 224)).collect();
    let pixels = Tensor::f32(&[1, 3, 224, 224], pixels).unwrap();
    let seen = graph(bundle, precision, "vision").run(&[("pixels", &pixels)]).unwrap();
    note("vision", &["embedding", "prefix_keys", "prefix_values", "regions"], &seen);

    let words = (0..6).map(|i| 4 + (37 * i + 11) % (model.vocabulary as i64 - 5));
    let ids: Vec<i64> = [i64::from(CLS)].into_iter().chain(words).chain([i64::from(SEP)]).collect();
    let mut padded = ids.clone();
    padded.resize(slots, i64::from(PAD));
    let padded = Tensor::i64(&[1, slots], padded).unwrap();
    let mask = (0..slots).map(|slot| if slot < ids.len() { 0.0 } else { EMPTY }).collect();
    let mask = Tensor::f32(&[1, slots], mask).unwrap();
    note("text", &["embedding"], &graph(bundle, precision, "text").run(&[("ids", &padded), ("mask", &mask)]).unwrap());
    let pair = [("regions", &seen[3]), ("ids", &padded), ("mask", &mask)];
    note("match", &["score"], &graph(bundle, precision, "match").run(&pair).unwrap());

    let decode = graph(bundle, precision, "decode");
    let cache = [model.layers, model.heads, slots, depth];
    let (mut keys, mut values) = (Tensor::zeros(&cache), Tensor::zeros(&cache));
    let mut mask = Tensor::f32(&[1, slots], vec![EMPTY; slots]).unwrap();
    for (slot, &id) in ids.iter().enumerate() {
        let (token, position) = (Tensor::i64(&[1], vec![id]).unwrap(), Tensor::i64(&[1], vec![slot as i64]).unwrap());
        let inputs = [
            ("tokens", &token),
            ("position", &position),
            ("prefix_keys", &seen[1]),
            ("prefix_values", &seen[2]),
            ("past_keys", &keys),
            ("past_values", &values),
            ("mask", &mask),
        ];
        let step = decode.run(&inputs).unwrap();
        note("decode", &["logits"], &step[..1]);
        for (past, new) in [(&mut keys, &step[1]), (&mut values, &step[2])] {
            for (row, new) in past.floats_mut().chunks_exact_mut(slots * depth).zip(new.floats().chunks_exact(depth)) {
                row[slot * depth..][..depth].copy_from_slice(new);
            }
        }
        mask.floats_mut()[slot] = 0.0;
    }
    for (name, past) in [("decode.new_keys", &keys), ("decode.new_values", &values)] {
        let rows = past.floats().chunks_exact(slots * depth);
        found.insert(name.to_owned(), rows.flat_map(|row| &row[..ids.len() * depth]).copied().collect());
    }
    found
}

#[test]
fn the_graphs_compute_what_numpy_does() {
    let golden = golden();
    let found = outputs(&open(&exported().bundle()), Precision::F32);
    assert_eq!(found.keys().collect::<Vec<_>>(), golden.outputs.keys().collect::<Vec<_>>());
    for (name, expected) in &golden.outputs {
        let error = expected.error(&found[name]);
        println!("{name:22} {error:.1e}");
        assert!(error <= TOLERANCE, "{name} differs from NumPy by {error:.1e} of its root mean square");
    }
}

/// The embedding of a picture's mean feature, straight from a checkpoint's tensors in f64.
fn embedded_mean(checkpoint: &Path, pixels: &[f32]) -> Vec<f64> {
    let weights = candle_core::safetensors::load(checkpoint.join("model.safetensors"), &Device::Cpu).unwrap();
    let read = |name: &str| -> Vec<f64> {
        weights[name].flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
    };
    let [mean, deviation] = ["image.mean", "image.deviation"].map(read);
    let [weight, bias] = ["embed.image.weight", "embed.image.bias"].map(read);
    let regions = Backbone::load(&checkpoint.join("backbone.safetensors")).unwrap().forward(pixels).unwrap();
    let (width, count) = (mean.len(), regions.len() / mean.len());
    let of_feature = |i: usize| regions.iter().skip(i).step_by(width).map(|&v| f64::from(v)).sum::<f64>() / count as f64;
    let pooled: Vec<f64> = (0..width).map(|i| (of_feature(i) - mean[i]) / deviation[i]).collect();
    let product = |row: &[f64]| row.iter().zip(&pooled).map(|(w, x)| w * x).sum::<f64>();
    let embedded: Vec<f64> = weight.chunks_exact(width).zip(&bias).map(|(row, bias)| product(row) + bias).collect();
    let length = embedded.iter().map(|v| v * v).sum::<f64>().sqrt();
    embedded.into_iter().map(|v| v / length).collect()
}

#[test]
fn embeddings_of_means_are_so_in_every_precision_and_stay_so_when_upgraded() {
    let (checkpoint, out) = (checkpoint(ImageEmbedding::Pooled, TextEmbedding::Both), tempfile::tempdir().unwrap());
    let (target, mut samples) = (out.path().join("bundle"), drawn_samples(3));
    // Nothing but [CLS] and [SEP].
    samples[2].text.clear();
    let all = options(&[Precision::F32, Precision::F16, Precision::I8]);
    let reports = export(checkpoint.path(), &target, &all, &samples, &|_, _| ()).unwrap();
    assert!(reports.iter().all(|written| written.parity.holds()), "{reports:?}");

    let (bundle, golden) = (open(&target), golden());
    let found = outputs(&bundle, Precision::F32);
    for (name, expected) in &golden.outputs {
        // Everything else is as it was: only the embeddings are made of something else.
        let expected = match name.as_str() {
            "vision.embedding" => &golden.pooled_embedding,
            "text.embedding" => &golden.both_embedding,
            _ => expected,
        };
        let error = expected.error(&found[name]);
        println!("{name:22} {error:.1e}");
        assert!(error <= TOLERANCE, "{name} differs from NumPy by {error:.1e} of its root mean square");
    }
    // Of the last layer nothing is computed that nobody reads.
    let onnx = |precision| bundle.read(&Manifest::graph_file(precision, "vision")).unwrap();
    let vision = String::from_utf8_lossy(onnx(Precision::F32));
    assert!(vision.contains("layers.1.attention.qkv.weight") && !vision.contains("layers.1.attention.output"));

    let pixels = bundle.manifest().image.tensor(&samples[0].image);
    let expected = embedded_mean(checkpoint.path(), &pixels);
    // Rounded weights: as `smaller_weights_change_little` has it.
    for (precision, least) in [(Precision::F32, 1.0 - 1e-6), (Precision::F16, 0.9999), (Precision::I8, 0.98)] {
        let options = EngineOptions { precision: Some(precision), ..EngineOptions::default() };
        let model = Model::open(&BundleSource::Path(target.clone()), &options).unwrap();
        let embedding = model.embed_image(&samples[0].image).unwrap();
        let cosine = embedding.iter().zip(&expected).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
        println!("{precision} {cosine:.7}");
        assert!((least..1.0 + 1e-6).contains(&cosine), "{precision}: cosine {cosine}");
    }

    let again = out.path().join("again");
    let report = upgrade(&target, &again, &UpgradeOptions::default(), &samples, &|_, _| ()).unwrap().0;
    assert_eq!(files(&again), files(&target));
    assert!(report.outputs.iter().any(|output| output.output == "embedding" && output.graph == "vision"), "{report}");
}

#[test]
fn smaller_weights_change_little() {
    let bundle = open(&exported().bundle());
    let full = outputs(&bundle, Precision::F32);
    let size = |precision: Precision| bundle.length(&format!("{precision}/weights.bin")).unwrap() as f64;
    // 16-bit weights are off by up to 2⁻¹¹ of their size, at random: a few 1e-4 of an output after some layers. 8-bit ones by
    // up to 1/254 of the largest of their channel: some thirty times as much. 4-bit ones by up to 1/16 of the largest of their block;
    // most of a pico model is its backbone, which has none.
    for (precision, least, share) in [(Precision::F16, 0.9999, 0.53), (Precision::I8, 0.98, 0.29), (Precision::I4, 0.95, 0.285)] {
        let small = outputs(&bundle, precision);
        for (name, full) in &full {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let cosine = dot(full, &small[name]) / (dot(full, full) * dot(&small[name], &small[name])).sqrt();
            println!("{precision} {name:22} {cosine:.6}");
            assert!(cosine > least, "{precision} {name}: cosine {cosine}");
        }
        assert!(size(precision) < share * size(Precision::F32), "{precision}: {} bytes", size(precision));
    }
}

#[test]
fn precisions_are_measured_and_refused_where_they_lose_too_much() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let (shards, target) = (out.path().join("scenes"), out.path().join("bundle"));
    write_corpus(&shards, &CorpusOptions { seed: 9, count: 4, ..Default::default() }).unwrap();
    let development = Arc::new(Development::read(std::slice::from_ref(&shards), usize::MAX).unwrap());
    let told = std::cell::Cell::new((0, 0));
    let run = |max_drop| {
        let gate = Some(Gate { development: development.clone(), max_drop });
        let options = ExportOptions { gate, ..options(&[Precision::I8]) };
        export(exported.checkpoint.path(), &target, &options, &drawn_samples(1), &|done, all| told.set((done, all)))
    };
    // Weights are random: what is found is chance, but some of twenty captions find their picture, and none may find twice as many.
    let error = run(MaxDrop(-1.0)).unwrap_err().to_string();
    assert!(error.starts_with("i8 loses ") && error.contains("that --max-drop allows"), "{error}");
    let left = || fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!(left(), ["scenes"], "left behind after: {error}");

    let written = run(MaxDrop(1.0)).unwrap();
    assert_eq!((told.get(), left().len()), ((8, 8), 2), "four pictures in f32 and in i8: {:?}", left());
    let figures = written[0].figures.clone().unwrap();
    assert_eq!((written.len(), figures["images"]), (1, 4.0));
    assert!(figures["text_to_image_r10"] == 1.0 && figures["text_to_image_r1"] > 0.0, "{figures:?}");
    let error = figures["error_vision_prefix_keys"];
    assert!(error > 1e-4 && error < 0.2, "{error}");
    let manifest = open(&target).manifest().clone();
    assert_eq!(manifest.precisions, [Precision::I8]);
    assert_eq!(manifest.quality, BTreeMap::from([("i8".to_owned(), figures)]));
}

#[test]
fn weights_that_are_kept_in_16_bits_are_as_in_f16() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let run = |target: &Path, kept: &[&str]| {
        let keep_f16 = kept.iter().map(ToString::to_string).collect();
        let options = ExportOptions { keep_f16, ..options(&[Precision::I8]) };
        export(exported.checkpoint.path(), target, &options, &drawn_samples(2), &|_, _| ())
    };
    let target = out.path().join("bundle");
    run(&target, &["backbone."]).unwrap();
    let (mixed, all) = (open(&target), open(&exported.bundle()));
    let found = outputs(&mixed, Precision::I8);
    let [halves, eighths] = [Precision::F16, Precision::I8].map(|precision| outputs(&all, precision));
    // What the backbone gives reaches `regions` unchanged; texts do not pass through it.
    let of = |outputs: &BTreeMap<String, Vec<f32>>, name: &str| outputs[name].clone();
    assert_eq!(of(&found, "vision.regions"), of(&halves, "vision.regions"));
    assert_ne!(of(&found, "vision.regions"), of(&eighths, "vision.regions"));
    assert_eq!(of(&found, "text.embedding"), of(&eighths, "text.embedding"));
    assert_ne!(of(&found, "text.embedding"), of(&halves, "text.embedding"));

    let none = out.path().join("none");
    let error = run(&none, &["backbone.", "elsewhere."]).unwrap_err().to_string();
    assert!(error.starts_with("no weight's name begins with `elsewhere.`") && !none.exists(), "{error}");
}

#[test]
fn a_bundle_is_a_checkpoint_again() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let bundle = open(&exported.bundle());
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::I8, 1e-5), (Precision::I4, 1e-5)] {
        let (folder, again) = (out.path().join(format!("{precision}")), out.path().join(format!("{precision}.tar")));
        from_bundle::write(&bundle, Some(precision), Embeddings::default(), &folder).unwrap();
        let error = format!("{:#}", from_bundle::write(&bundle, None, Embeddings::default(), &folder).unwrap_err());
        assert!(error.ends_with("is already there"), "{error}");
        export(&folder, &again, &options(&[Precision::F32]), &drawn_samples(1), &|_, _| ()).unwrap();
        let (before, after) = (outputs(&bundle, precision), outputs(&open(&again), Precision::F32));
        for (name, before) in &before {
            let largest = before.iter().fold(0f32, |largest, v| largest.max(v.abs()));
            let error = before.iter().zip(&after[name]).map(|(b, a)| (b - a).abs()).fold(0.0, f32::max) / largest;
            assert!(error < tolerance, "{precision} {name}: {error}");
        }
    }
    // With an embedding of the other kind, all but that is what it was.
    let (pooled, again) = (out.path().join("pooled"), out.path().join("pooled.tar"));
    let others = Embeddings { image: Some(ImageEmbedding::Pooled), text: Some(TextEmbedding::Both) };
    from_bundle::write(&bundle, None, others, &pooled).unwrap();
    let fresh = candle_core::safetensors::load(pooled.join("model.safetensors"), &Device::Cpu).unwrap();
    for layer in ["embed.image", "embed.text"] {
        let values = fresh[&format!("{layer}.weight")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        // Two deviations of a tenth of the 0.04 of a size without a name.
        assert!((0.0078..=0.008001).contains(&largest), "{layer}: {largest}");
    }
    export(&pooled, &again, &options(&[Precision::F32]), &drawn_samples(1), &|_, _| ()).unwrap();
    let (before, after) = (outputs(&bundle, Precision::F32), outputs(&open(&again), Precision::F32));
    let differ = |name: &String| before[name].iter().zip(&after[name]).any(|(b, a)| (b - a).abs() > 1e-4);
    assert_eq!(before.keys().filter(|name| differ(name)).collect::<Vec<_>>(), ["text.embedding", "vision.embedding"]);
    from_bundle::write(&open(&again), None, Embeddings::default(), &out.path().join("still-pooled")).unwrap();
    let sizes = fs::read_to_string(out.path().join("still-pooled/model.toml")).unwrap();
    assert!(sizes.contains("image_embedding = \"pooled\"\ntext_embedding = \"both\""), "{sizes}");
    // Quantized once more, 8-bit weights are what they were.
    let again = out.path().join("again");
    export(&out.path().join("i8"), &again, &options(&[Precision::I8]), &drawn_samples(1), &|_, _| ()).unwrap();
    let (before, after) = (bundle.read("i8/weights.bin").unwrap(), fs::read(again.join("i8/weights.bin")).unwrap());
    assert!(before.len() == after.len() && before.iter().zip(&after).filter(|(b, a)| b != a).count() * 100 < before.len());
}

#[test]
fn four_bits_err_less_where_they_are_rounded_by_what_occurs() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let all = open(&exported.bundle());
    let target = out.path().join("bundle");
    let forms = FormOptions { calibration: drawn_samples(12), ..FormOptions::default() };
    let options = ExportOptions { forms, ..options(&[Precision::I4]) };
    export(exported.checkpoint.path(), &target, &options, &drawn_samples(2), &|_, _| ()).unwrap();
    let bundle = open(&target);
    assert_eq!(bundle.length("i4/weights.bin").unwrap(), all.length("i4/weights.bin").unwrap());
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "nothing is left beside the bundle");
    let [full, alone, together] = [outputs(&all, Precision::F32), outputs(&all, Precision::I4), outputs(&bundle, Precision::I4)];
    let error = |found: &BTreeMap<String, Vec<f32>>, name: &str| -> f64 {
        found[name].iter().zip(&full[name]).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    // What the reference script reads are noise and a text of its own, not what the rounding went by.
    for name in ["vision.prefix_keys", "vision.prefix_values", "decode.logits"] {
        let (alone, together) = (error(&alone, name), error(&together, name));
        println!("{name:22} {alone:.3e} {together:.3e}");
        assert!(together < alone, "{name}: {together} {alone}");
    }
}

#[test]
fn the_report_covers_every_output() {
    let exported = exported();
    let manifest = open(&exported.bundle()).manifest().clone();
    let all: Vec<String> =
        manifest.graphs.iter().flat_map(|g| g.outputs.iter().map(move |o| format!("{}.{}", g.name, o.name))).collect();
    for Written { precision, parity: report, .. } in &exported.reports {
        let mut covered: Vec<String> = report.outputs.iter().map(|o| format!("{}.{}", o.graph, o.output)).collect();
        covered.sort_by_key(|name| all.iter().position(|other| other == name));
        assert_eq!(covered, all, "{precision}");
        assert!(report.holds() && report.samples == 2, "{report}");
    }
}

#[test]
fn one_changed_weight_is_found() {
    let exported = exported();
    let damaged = copy(&exported.bundle());
    let (weights, manifest) = (damaged.path().join("f32/weights.bin"), damaged.path().join(MANIFEST));
    // The token table lies first: this is the first number of [CLS], which only texts read.
    let mut bytes = fs::read(&weights).unwrap();
    bytes[..4].copy_from_slice(&2.5f32.to_le_bytes());
    fs::write(&weights, &bytes).unwrap();
    let error = open(damaged.path()).verify().unwrap_err().to_string();
    assert!(error.contains("f32/weights.bin is damaged"), "{error}");

    // Even where the manifest vouches for it, candle does not.
    let mut vouched = Manifest::parse(&fs::read(&manifest).unwrap()).unwrap();
    vouched.files.insert("f32/weights.bin".to_owned(), sha256_hex(&bytes));
    fs::write(&manifest, vouched.to_toml().unwrap()).unwrap();
    let bundle = open(damaged.path());
    bundle.verify().unwrap();
    let source = Checkpoint::open(exported.checkpoint.path()).unwrap();
    let report = parity::compare(&bundle, Precision::F32, &source, &drawn_samples(1)).unwrap();
    assert!(!report.holds() && report.to_string().contains("FAILS"), "{report}");
    for output in &report.outputs {
        assert_eq!(
            (output.relative_error <= report.tolerance),
            output.graph == "vision",
            "{}.{}\n{report}",
            output.graph,
            output.output
        );
    }
}

#[test]
fn equal_checkpoints_give_equal_bytes() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let elsewhere = copy(exported.checkpoint.path());
    let again = out.path().join("bundle");
    let all = options(&Precision::ALL);
    export(elsewhere.path(), &again, &all, &drawn_samples(1), &|_, _| ()).unwrap();
    let (first, second) = (files(&exported.bundle()), files(&again));
    assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>());
    for (name, bytes) in &first {
        assert!(bytes == &second[name], "{name} differs");
    }

    let tars = ["a.tar", "b.tar"].map(|name| out.path().join(name));
    for tar in &tars {
        export(elsewhere.path(), tar, &options(&[Precision::F16]), &drawn_samples(1), &|_, _| ()).unwrap();
        open(tar).verify().unwrap();
    }
    assert!(fs::read(&tars[0]).unwrap() == fs::read(&tars[1]).unwrap(), "the archives differ");
}
