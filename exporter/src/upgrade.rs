//! A bundle of an earlier version as one of this version: the graphs are written anew, the weights stay as they are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use unimo::bundle::manifest::{
    DecodingDefaults, Dtype, Form, GraphSignature, Manifest, ModelSizes, Precision, SCHEMA, Size, Sizes, WEIGHTS,
};
use unimo::bundle::{Bundle, BundleSource, MANIFEST, sha256_hex};
use unimo::engine::{self, Engine, EngineKind, EngineOptions, GraphSource, Tensor};
use unimo::image::ImagePreparation;
use unimo::tokenizer::{CLS, PAD, SEP, Tokenizer};

use crate::forms::{self, FormOptions, WrittenForm};
use crate::gate::{self, Gate, put_figures};
use crate::graphs::Graphs;
use crate::parity::{ParityReport, Sample};
use crate::stored;
use crate::writing::{About, Writing, publish, sibling};

/// Largest difference of a graph's outputs before and after, as a share of the output's largest magnitude: the same sums of the
/// same numbers, in an order that may be another.
const TOLERANCE: f64 = 1e-5;

/// What manifests of all versions hold.
#[derive(Deserialize)]
struct AnyManifest {
    schema: u32,
    precisions: Vec<Precision>,
    model: ModelSizes,
    image: ImagePreparation,
    decoding: DecodingDefaults,
    graphs: Vec<GraphSignature<Size>>,
    files: BTreeMap<String, String>,
    #[serde(default)]
    training: toml::Table,
    #[serde(default)]
    quality: BTreeMap<String, BTreeMap<String, f64>>,
}

/// What to do beside writing the graphs anew.
#[derive(Debug, Clone, Default)]
pub struct UpgradeOptions {
    /// Replaces a bundle that is already there.
    pub force: bool,
    /// Forms to add to the 8- and 4-bit graphs.
    pub forms: FormOptions,
    /// What the forms are measured on, and what they may lose against the expanded form.
    pub gate: Option<Gate>,
}

/// Writes the bundle at `bundle` (a folder or a `.tar`) to `out` with the graphs of this version. Graphs that read and give what
/// they did before are run on `samples` before and after. `progress` is told the picture that is measured, of how many.
///
/// # Errors
/// A bundle that is damaged or newer than this program, one at `out` unless `force`, graphs that compute something else, forms
/// that differ or lose too much.
pub fn upgrade(
    bundle: &Path,
    out: &Path,
    options: &UpgradeOptions,
    samples: &[Sample],
    progress: &dyn Fn(u64, u64),
) -> Result<(ParityReport, Vec<(Precision, WrittenForm)>)> {
    if out.exists() && !options.force {
        bail!("{} is already there; --force replaces it", out.display());
    }
    let partial = sibling(out, "partial");
    let written = || -> Result<_> {
        let old = files_of(bundle)?;
        let report = write(&old, &partial, samples)?;
        let forms = add_forms(&old, &partial, options, samples, progress)?;
        publish(&partial, out)?;
        Ok((report, forms))
    };
    let result = written().with_context(|| format!("bundle {}", bundle.display()));
    let _ = fs::remove_dir_all(&partial);
    result
}

fn add_forms(
    old: &BTreeMap<String, Vec<u8>>,
    folder: &Path,
    options: &UpgradeOptions,
    samples: &[Sample],
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<(Precision, WrittenForm)>> {
    let from = parse(file(old, MANIFEST)?)?;
    options.forms.check(&from.precisions)?;
    let mut written = Vec::new();
    for &precision in &from.precisions {
        let graphs = graphs_of(&from, precision, old)?;
        written
            .extend(forms::add(folder, &graphs, precision, &options.forms, samples)?.into_iter().map(|form| (precision, form)));
    }
    if let Some(gate) = &options.gate {
        measure(gate, folder, &mut written, options.forms.library.as_deref(), progress)?;
    }
    Ok(written)
}

/// Measures forms, each against the expanded form of its precision.
fn measure(
    gate: &Gate,
    folder: &Path,
    written: &mut [(Precision, WrittenForm)],
    library: Option<&Path>,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let precisions = written.chunk_by(|a, b| a.0 == b.0).count();
    let runs = precisions + written.iter().map(|(_, form)| gate::runs(form)).sum::<usize>();
    let all = (runs * gate.development.len()) as u64;
    let done = std::cell::Cell::new(0);
    let note = |n| {
        done.set(done.get() + n);
        progress(done.get(), all);
    };
    for forms in written.chunk_by_mut(|a, b| a.0 == b.0) {
        let precision = forms[0].0;
        let expanded = gate.development.measure(folder, (precision, Form::Expanded, EngineKind::Tract), None, &note)?;
        put_figures(folder, precision.name(), &expanded)?;
        for (_, form) in forms {
            gate.pass_form(folder, precision, &expanded, form, library, &note)?;
        }
    }
    Ok(())
}

/// Every file of a bundle by its path inside.
fn files_of(bundle: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    if bundle.is_dir() {
        let mut read = |name: &str| -> Result<()> {
            files.insert(name.to_owned(), fs::read(bundle.join(name)).with_context(|| format!("cannot read {name}"))?);
            Ok(())
        };
        read(MANIFEST)?;
        let manifest = parse(&fs::read(bundle.join(MANIFEST))?)?;
        manifest.files.keys().try_for_each(|name| read(name))?;
        return Ok(files);
    }
    let mut archive = tar::Archive::new(File::open(bundle).context("cannot be opened")?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
        files.insert(name, bytes);
    }
    Ok(files)
}

fn parse(bytes: &[u8]) -> Result<AnyManifest> {
    let text = std::str::from_utf8(bytes).context("the manifest is no text")?;
    let manifest: AnyManifest = toml::from_str(text).context("the manifest has not the form it should have")?;
    if manifest.schema > SCHEMA {
        bail!("it has schema {}, this program writes {SCHEMA}", manifest.schema);
    }
    Ok(manifest)
}

fn file<'a>(old: &'a BTreeMap<String, Vec<u8>>, name: &str) -> Result<&'a Vec<u8>> {
    old.get(name).with_context(|| format!("{name} is missing"))
}

/// The graphs of this version over the weights of a bundle.
fn graphs_of(from: &AnyManifest, precision: Precision, old: &BTreeMap<String, Vec<u8>>) -> Result<Graphs> {
    let names = from.graphs.iter().map(|graph| graph.name.as_str());
    let weights = stored::weights(names, precision, &|name| Ok(file(old, name)?.as_slice()))?;
    Ok(Graphs { sizes: from.model.clone(), signatures: GraphSignature::contract(&from.model, &from.image), weights })
}

fn write(old: &BTreeMap<String, Vec<u8>>, folder: &Path, samples: &[Sample]) -> Result<ParityReport> {
    let from = parse(file(old, MANIFEST)?)?;
    for (name, hash) in &from.files {
        if sha256_hex(file(old, name)?) != *hash {
            bail!("{name} is damaged: its hash is another than the manifest's");
        }
    }
    let mut writing = Writing::new(folder)?;
    writing.put("tokenizer.json".to_owned(), file(old, "tokenizer.json")?)?;
    let mut written = None;
    for &precision in &from.precisions {
        let graphs = graphs_of(&from, precision, old)?;
        writing.put_precision(&graphs, precision)?;
        written = Some(graphs);
    }
    // Figures of forms go with the forms.
    let expanded = |name: &String| from.precisions.iter().any(|precision| precision.name() == name);
    let about = About {
        precisions: from.precisions.clone(),
        image: from.image.clone(),
        decoding: from.decoding.clone(),
        training: from.training.clone(),
        quality: from.quality.clone().into_iter().filter(|(name, _)| expanded(name)).collect(),
    };
    writing.describe(&written.context("no precision")?, about)?;
    let new = Bundle::open(&BundleSource::Path(folder.to_path_buf()))?;
    new.verify()?;
    let tokenizer = new.tokenizer()?;
    let report = compare(old, &from.graphs, &from.precisions, &new, &tokenizer, samples)?;
    if let Some(other) = report.outputs.iter().find(|output| output.relative_error > report.tolerance) {
        bail!("the new graph {} computes another {}:\n{report}", other.graph, other.output);
    }
    Ok(report)
}

/// Runs every graph whose signature is what it was, before and after.
fn compare(
    old: &BTreeMap<String, Vec<u8>>,
    before: &[GraphSignature<Size>],
    precisions: &[Precision],
    new: &Bundle,
    tokenizer: &Tokenizer,
    samples: &[Sample],
) -> Result<ParityReport> {
    let engine = engine::open(&EngineOptions::default())?;
    let mut report = ParityReport { samples: samples.len(), tolerance: TOLERANCE, outputs: Vec::new() };
    for &precision in precisions {
        for signature in &new.manifest().graphs {
            if signature.name == "decode" || !before.contains(signature) {
                continue;
            }
            let file = Manifest::graph_file(precision, &signature.name);
            let weights = format!("{precision}/{WEIGHTS}");
            let was = old.get(&file).zip(old.get(&weights)).context("files of the manifest are there")?;
            let was = load(engine.as_ref(), signature, was.0, was.1)?;
            let is = load(engine.as_ref(), signature, new.read(&file)?, new.read(&weights)?)?;
            for sample in samples {
                let inputs = inputs_of(signature, new.manifest(), tokenizer, sample)?;
                let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
                for ((was, is), output) in was.run(&inputs)?.iter().zip(is.run(&inputs)?).zip(&signature.outputs) {
                    report.note(&signature.name, &output.name, is.floats(), was.floats());
                }
            }
        }
    }
    Ok(report)
}

fn load(engine: &dyn Engine, signature: &GraphSignature<Size>, onnx: &[u8], weights: &[u8]) -> Result<Box<dyn engine::Graph>> {
    let sizes = Sizes { hypotheses: 1, slots: 1 };
    let external = |location: &str| (location == WEIGHTS).then(|| weights.to_vec().into());
    Ok(engine.load(&GraphSource { signature: &signature.fixed(sizes), sizes, onnx, external: &external })?)
}

/// A sample as a graph's inputs; regions, which another graph makes, are numbers between −1 and 1.
fn inputs_of(
    signature: &GraphSignature<Size>,
    manifest: &Manifest,
    tokenizer: &Tokenizer,
    sample: &Sample,
) -> Result<Vec<(String, Tensor)>> {
    let room = manifest.model.max_text;
    let ids: Vec<u32> = [CLS].into_iter().chain(tokenizer.encode(&sample.text, room - 2)).chain([SEP]).collect();
    let fixed = signature.fixed(Sizes { hypotheses: 1, slots: 1 });
    let input = |input: &unimo::bundle::manifest::TensorSignature| {
        let count: usize = input.shape.iter().product();
        let at = |slot: usize| ids.get(slot).copied();
        let tensor = match (input.name.as_str(), input.dtype) {
            ("pixels", _) => Tensor::f32(&input.shape, manifest.image.tensor(&sample.image)),
            ("ids", _) => Tensor::i64(&input.shape, (0..count).map(|slot| i64::from(at(slot).unwrap_or(PAD))).collect()),
            ("mask", _) => {
                Tensor::f32(&input.shape, (0..count).map(|slot| if at(slot).is_some() { 0.0 } else { -1e4 }).collect())
            }
            (_, Dtype::F32) => Tensor::f32(&input.shape, (0..count).map(|i| (i as f32 * 0.37).sin()).collect()),
            (_, Dtype::I64) => Tensor::i64(&input.shape, vec![0; count]),
        };
        Ok((input.name.clone(), tensor.with_context(|| format!("input {}", input.name))?))
    };
    fixed.inputs.iter().map(input).collect()
}
