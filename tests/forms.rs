//! Promise: the forms of 8- and 4-bit graphs compute what the expanded form does, over the same weights; the static one keeps TensorRT's
//! rules. There is no bundle with a form that does not.
//!
//! Forms run on ONNX Runtime; without one these tests say so, as those of `engines.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use prost::Message;
use tract_onnx::pb::ModelProto;
use unimo::bundle::manifest::{Form, Manifest, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::{EngineKind, EngineOptions, preferred_form};
use unimo::model::Model;
use unimo_export::calibrate::Range;
use unimo_export::export::{ExportOptions, Written, export};
use unimo_export::forms::{self, FormOptions};
use unimo_export::gate::Gate;
use unimo_export::quality::{Development, MaxDrop};
use unimo_export::sample::{drawn_samples, random_checkpoint};
use unimo_export::tensorrt;
use unimo_export::upgrade::{UpgradeOptions, upgrade};
use unimo_tests::{ort_is_there, program};
use unimo_train::scenes::{CorpusOptions, write_corpus};

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("forms");
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

static CHECKPOINT: LazyLock<PathBuf> = LazyLock::new(|| random_checkpoint(&scratch("checkpoint"), "pico", 5).unwrap());

const KEPT: [&str; 2] = ["backbone.block", "backbone.stem"];

fn options(forms: &[Form]) -> ExportOptions {
    let forms = FormOptions { forms: forms.to_vec(), calibration: drawn_samples(4), ..FormOptions::default() };
    // Rounding adds up in a chain of 50 convolutions of random weights: all but the last one stay in floats.
    let keep_f16 = KEPT.map(str::to_owned).to_vec();
    ExportOptions { precisions: vec![Precision::I8], keep_f16, forms, force: true, ..ExportOptions::default() }
}

/// A pico bundle of random weights in 8 bits with all forms, and what its export reported.
static EXPORTED: LazyLock<(PathBuf, Vec<Written>)> = LazyLock::new(|| {
    let out = scratch("all.tar");
    let written = export(&CHECKPOINT, &out, &options(&[Form::Dynamic, Form::Static]), &drawn_samples(2), &|_, _| ()).unwrap();
    (out, written)
});

fn open(bundle: &Path) -> Bundle {
    Bundle::open(&BundleSource::Path(bundle.to_path_buf())).unwrap()
}

fn graph(bundle: &Bundle, form: Form, name: &str) -> ModelProto {
    ModelProto::decode(bundle.read(&Manifest::form_file(Precision::I8, form, name)).unwrap()).unwrap()
}

fn operators(model: &ModelProto, operator: &str) -> usize {
    model.graph.as_ref().unwrap().node.iter().filter(|node| node.op_type == operator).count()
}

#[test]
fn forms_share_their_weights_and_agree() {
    if !ort_is_there() {
        return;
    }
    let (out, written) = &*EXPORTED;
    let bundle = open(out);
    bundle.verify().unwrap();
    assert_eq!(bundle.manifest().forms(Precision::I8), Form::ALL);
    let weights: Vec<&String> = bundle.manifest().files.keys().filter(|file| file.ends_with(".bin")).collect();
    assert_eq!(weights, ["i8/weights.bin"]);
    for (written, form) in written[0].forms.iter().zip([Form::Dynamic, Form::Static]) {
        assert_eq!(written.form, form);
        // Another form is another result, within what is allowed.
        let errors = written.parity.outputs.iter().map(|output| (output.output.as_str(), output.relative_error));
        let errors: Vec<_> = errors.filter(|(output, _)| *output != "regions").collect();
        assert!(errors.len() == 8 && errors.iter().all(|(_, error)| (1e-6..forms::TOLERANCE).contains(error)), "{errors:?}");
    }
    let decode = graph(&bundle, Form::Dynamic, "decode");
    // Two layers of four products, the output layer's two.
    assert_eq!((operators(&decode, "MatMulInteger"), operators(&decode, "DequantizeLinear")), (10, 0));
}

/// Of an embedding, in units of its largest value, where 8 bits are multiplied. The exporter lets pass so much; on tract the backbone
/// rounds pixels too, which costs a trained model a hundredth, and these random weights a tenth.
fn lost_at_most(engine: EngineKind) -> f32 {
    forms::TOLERANCE as f32 * if engine == EngineKind::Tract { 2.0 } else { 1.0 }
}

#[test]
fn the_engine_takes_the_form_that_it_is_fast_with_and_others_when_asked() {
    if !ort_is_there() {
        return;
    }
    let sample = &drawn_samples(1)[0];
    let model = |engine, form| {
        let options = EngineOptions { engine, form, ..EngineOptions::default() };
        Model::open(&BundleSource::Path(EXPORTED.0.clone()), &options)
    };
    for engine in [EngineKind::Tract, EngineKind::Ort] {
        let own = EngineOptions { engine, ..EngineOptions::default() };
        assert_eq!(model(engine, None).unwrap().form(), preferred_form(&own, &Form::ALL).unwrap());
    }
    let expected = model(EngineKind::Tract, Some(Form::Expanded)).unwrap().see(&sample.image).unwrap().embedding;
    let forms = Form::ALL.map(|form| (EngineKind::Ort, form)).into_iter().chain([(EngineKind::Tract, Form::Dynamic)]);
    for (engine, form) in forms {
        let model = model(engine, Some(form)).unwrap();
        assert_eq!(model.form(), form);
        let found = model.see(&sample.image).unwrap().embedding;
        let error = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        // Floats agree as `engines.rs` says; levels differ, and by no more than the exporter lets pass.
        let (least, most) = if form == Form::Expanded { (0.0, 1e-4) } else { (1e-6, lost_at_most(engine) * largest) };
        assert!((least..=most).contains(&error), "{engine}, {form}: {error}");
        model.caption(&model.see(&sample.image).unwrap(), &model.decode_options()).unwrap();
        model.match_score(&model.see(&sample.image).unwrap(), &sample.text).unwrap();
    }
    let error = model(EngineKind::Tract, Some(Form::Static)).err().unwrap().to_string();
    assert_eq!(error, "engine tract does not run the static form of graphs");
}

#[test]
fn the_static_form_keeps_tensorrts_rules_and_the_dynamic_one_does_not() {
    if !ort_is_there() {
        return;
    }
    let bundle = open(&EXPORTED.0);
    let weights = bundle.read("i8/weights.bin").unwrap();
    for name in ["vision", "decode", "text", "match"] {
        let mut model = graph(&bundle, Form::Static, name);
        assert_eq!(tensorrt::check(&model, weights), Ok(()), "{name}");
        // Two layers of four products. Beside them: the last convolution, the regions' and the embedding's; what goes before the
        // output layer, which is in floats; the embedding's; the regions', both pooled vectors' and the score's.
        let others = [("vision", 3), ("decode", 1), ("text", 1), ("match", 4)].into_iter().find(|(graph, _)| *graph == name);
        assert_eq!(operators(&model, "QuantizeLinear"), 2 * 4 + others.unwrap().1, "{name}");
        model.opset_import[0].version = 21;
        let error = tensorrt::check(&model, weights).unwrap_err().to_string();
        assert_eq!(error, format!("node `{name}` (graph): operator set 21 is outside 9 to 20"));
        let error = tensorrt::check(&graph(&bundle, Form::Dynamic, name), weights).unwrap_err();
        assert!(error.rule.contains("does not take this operator"), "{error}");
    }
}

#[test]
fn ranges_give_other_scales() {
    if !ort_is_there() {
        return;
    }
    let scales = |range| {
        let out = scratch(&format!("{range}.tar"));
        let mut options = options(&[Form::Static]);
        options.forms.range = range;
        export(&CHECKPOINT, &out, &options, &drawn_samples(1), &|_, _| ()).unwrap();
        let model = graph(&open(&out), Form::Static, "text").graph.unwrap();
        let of = |node: &tract_onnx::pb::NodeProto| {
            let scale = model.initializer.iter().find(|tensor| tensor.name == node.input[1]).unwrap();
            f32::from_le_bytes(scale.raw_data[..4].try_into().unwrap())
        };
        model.node.iter().filter(|node| node.op_type == "QuantizeLinear").map(of).collect::<Vec<f32>>()
    };
    let (largest, least_error) = (scales(Range::MinMax), scales(Range::Mse));
    assert!(largest.len() == least_error.len() && largest.iter().zip(&least_error).all(|(a, b)| a >= b && *b > 0.0));
    assert_ne!(largest, least_error);
}

#[test]
fn an_upgrade_adds_forms_and_leaves_weights_alone() {
    if !ort_is_there() {
        return;
    }
    let (plain, out) = (scratch("plain.tar"), scratch("upgraded.tar"));
    export(&CHECKPOINT, &plain, &options(&[]), &drawn_samples(1), &|_, _| ()).unwrap();
    let options = UpgradeOptions { force: true, forms: options(&[Form::Dynamic]).forms, gate: None };
    let (_, forms) = upgrade(&plain, &out, &options, &drawn_samples(1), &|_, _| ()).unwrap();
    assert_eq!(
        forms.iter().map(|(precision, form)| (*precision, form.form)).collect::<Vec<_>>(),
        [(Precision::I8, Form::Dynamic)]
    );
    let [before, after] = [&plain, &out].map(|bundle| open(bundle));
    assert_eq!(after.manifest().forms(Precision::I8), [Form::Expanded, Form::Dynamic]);
    assert_eq!(before.read("i8/weights.bin").unwrap(), after.read("i8/weights.bin").unwrap());
    assert_eq!(after.read("i8/decode.dynamic.onnx").unwrap(), open(&EXPORTED.0).read("i8/decode.dynamic.onnx").unwrap());
}

#[test]
fn every_form_is_measured_on_the_engines_that_run_it() {
    if !ort_is_there() {
        return;
    }
    let (shards, plain, out) = (scratch("scenes"), scratch("unmeasured.tar"), scratch("measured.tar"));
    write_corpus(&shards, &CorpusOptions { seed: 9, count: 4, ..Default::default() }).unwrap();
    export(&CHECKPOINT, &plain, &options(&[]), &drawn_samples(1), &|_, _| ()).unwrap();
    let gate = |max_drop| Gate { development: Development::read(std::slice::from_ref(&shards), 4).unwrap().into(), max_drop };
    // The folder outlives a run of the tests.
    let _ = fs::remove_file(&out);
    let told = std::cell::Cell::new((0, 0));
    let run = |max_drop| {
        let forms = options(&[Form::Dynamic, Form::Static]).forms;
        let options = UpgradeOptions { force: true, forms, gate: Some(gate(max_drop)) };
        upgrade(&plain, &out, &options, &drawn_samples(1), &|done, all| told.set((done, all)))
    };
    let error = format!("{:#}", run(MaxDrop(-9.0)).unwrap_err());
    assert!(error.contains(": i8-dynamic loses ") && !out.exists(), "{error}");
    let (_, forms) = run(MaxDrop(9.0)).unwrap();
    let measured: Vec<&String> = forms.iter().flat_map(|(_, form)| form.figures.keys()).collect();
    assert_eq!(measured, ["i8-dynamic", "i8-dynamic-tract", "i8-static"]);
    assert_eq!(told.get(), (16, 16), "four pictures: expanded, dynamic twice, static");
    let manifest = open(&out).manifest().clone();
    for (form, engine) in
        [(Form::Expanded, EngineKind::Ort), (Form::Dynamic, EngineKind::Ort), (Form::Dynamic, EngineKind::Tract)]
    {
        let figures = manifest.figures(Precision::I8, form, engine).unwrap();
        assert!(figures["images"] == 4.0 && figures["text_to_image_r10"] == 1.0, "{form} {engine}: {figures:?}");
    }
}

#[test]
fn four_bit_graphs_have_a_dynamic_form_that_both_engines_run() {
    if !ort_is_there() {
        return;
    }
    let out = scratch("four-bit.tar");
    let all = options(&[Form::Dynamic, Form::Static]);
    let options = ExportOptions { precisions: vec![Precision::I4, Precision::I8], ..all };
    let written = export(&CHECKPOINT, &out, &options, &drawn_samples(1), &|_, _| ()).unwrap();
    let names = |of: &Written| of.forms.iter().map(|form| form.form).collect::<Vec<_>>();
    assert_eq!([names(&written[0]), names(&written[1])], [vec![Form::Dynamic], vec![Form::Dynamic, Form::Static]]);
    let bundle = open(&out);
    assert_eq!(bundle.manifest().forms(Precision::I4), [Form::Expanded, Form::Dynamic]);
    for form in [Form::Expanded, Form::Dynamic] {
        let file = Manifest::form_file(Precision::I4, form, "decode");
        let decode = ModelProto::decode(bundle.read(&file).unwrap()).unwrap();
        // Two layers of four products; the output layer's two have 8 bits.
        assert_eq!(operators(&decode, "MatMulNBits"), 8);
        assert_eq!(operators(&decode, "MatMulInteger"), if form == Form::Dynamic { 2 } else { 0 });
    }
    let sample = &drawn_samples(1)[0];
    let seen = |engine, form| {
        let options = EngineOptions { engine, form, precision: Some(Precision::I4), ..EngineOptions::default() };
        let model = Model::open(&BundleSource::Path(out.clone()), &options).unwrap();
        let seen = model.see(&sample.image).unwrap();
        model.caption(&seen, &model.decode_options()).unwrap();
        seen.embedding
    };
    let expected = seen(EngineKind::Tract, Some(Form::Expanded));
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let both = |engine| [Form::Expanded, Form::Dynamic].map(|form| (engine, form));
    for (engine, form) in [EngineKind::Tract, EngineKind::Ort].into_iter().flat_map(both) {
        let found = seen(engine, Some(form));
        let error = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max) / largest;
        let (least, most) = if form == Form::Expanded { (0.0, 1e-3) } else { (1e-6, lost_at_most(engine)) };
        assert!((least..=most).contains(&error), "{engine}, {form}: {error}");
    }
}

#[test]
fn what_cannot_be_checked_is_not_written() {
    let out = scratch("refused.tar");
    let refused = |change: &dyn Fn(&mut ExportOptions)| {
        let mut options = options(&[Form::Dynamic]);
        change(&mut options);
        let error = export(&CHECKPOINT, &out, &options, &drawn_samples(1), &|_, _| ()).unwrap_err();
        assert!(!out.exists());
        format!("{error:#}")
    };
    let error = refused(&|options| options.precisions = vec![Precision::F16]);
    assert!(error.contains("neither i8 nor i4 is given"), "{error}");
    let error = refused(&|options| (options.precisions, options.forms.forms) = (vec![Precision::I4], vec![Form::Static]));
    assert!(error.contains("the static form is one of 8-bit graphs"), "{error}");
    let error = refused(&|options| options.forms.forms = vec![Form::Expanded]);
    assert!(error.contains("the expanded form is always there"), "{error}");
    let error = refused(&|options| {
        options.forms.forms = vec![Form::Static];
        options.forms.calibration.clear();
    });
    assert!(error.contains("to calibrate on"), "{error}");
    if !ort_is_there() {
        assert!(refused(&|_| ()).contains("the dynamic form is checked on ONNX Runtime"));
    }
}

#[test]
fn a_form_that_is_not_there_is_refused() {
    let bundle = scratch("only-expanded.tar");
    export(&CHECKPOINT, &bundle, &options(&[]), &drawn_samples(1), &|_, _| ()).unwrap();
    let bundle = bundle.to_str().unwrap();
    let run = program("unimo", &["embed", "--text", "a", "--bundle", bundle, "--form", "static", "--engine", "tract"]);
    assert_eq!((run.code, run.stdout.as_str()), (5, ""), "{}", run.stderr);
    let run = program("unimo", &["embed", "--text", "a", "--bundle", bundle, "--form", "odd"]);
    assert!(run.code == 2 && run.stderr.contains("odd is none of expanded, dynamic, static"), "{}", run.stderr);
    if ort_is_there() {
        let run = program("unimo", &["embed", "--text", "a", "--bundle", bundle, "--form", "static", "--engine", "ort"]);
        assert_eq!((run.code, run.stdout.as_str()), (3, ""), "{}", run.stderr);
        assert!(run.stderr.contains("it holds no static form of i8, only expanded"), "{}", run.stderr);
    }
}
