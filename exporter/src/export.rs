//! Checkpoint → bundle: written beside its place, compared with candle, and only then given its name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use prost::Message;
use unimo::bundle::manifest::{DecodingDefaults, Manifest, Precision, SCHEMA};
use unimo::bundle::{Bundle, BundleSource, MANIFEST, pack, sha256_hex};
use unimo::image::ImagePreparation;

use crate::checkpoint::Checkpoint;
use crate::graphs::Graphs;
use crate::parity::{self, ParityReport, Sample};

/// What to write.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Precisions, the default one first.
    pub precisions: Vec<Precision>,
    /// Text slots of the graphs, `[CLS]` and `[SEP]` included.
    pub max_text: usize,
    /// Decoding defaults.
    pub decoding: DecodingDefaults,
    /// Measured quality for the manifest, per precision.
    pub quality: BTreeMap<String, BTreeMap<String, f64>>,
    /// Replaces a bundle that is already there.
    pub force: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precisions: vec![Precision::F16],
            max_text: 32,
            decoding: DecodingDefaults { beam: 3, max_words: 30, length_penalty: 0.7, no_repeat: 3 },
            quality: BTreeMap::new(),
            force: false,
        }
    }
}

/// Exports a checkpoint to `out`: a `.tar`, or else a folder. Returns the parity report of each precision.
///
/// # Errors
/// An unusable checkpoint, a bundle already there, failed writes, or parity that does not hold; nothing is left at `out` then.
pub fn export(
    checkpoint: &Path,
    out: &Path,
    options: &ExportOptions,
    samples: &[Sample],
) -> Result<Vec<(Precision, ParityReport)>> {
    if out.exists() && !options.force {
        bail!("{} is already there; --force replaces it", out.display());
    }
    if options.precisions.is_empty() || options.precisions.contains(&Precision::I8) {
        bail!("this version writes the precisions f16 and f32");
    }
    let partial = sibling(out, "partial");
    let result = write_and_check(checkpoint, &partial, options, samples).and_then(|reports| {
        publish(&partial, out)?;
        Ok(reports)
    });
    let _ = fs::remove_dir_all(&partial);
    result
}

fn sibling(out: &Path, suffix: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(format!(".{suffix}"));
    PathBuf::from(name)
}

fn write_and_check(
    checkpoint: &Path,
    partial: &Path,
    options: &ExportOptions,
    samples: &[Sample],
) -> Result<Vec<(Precision, ParityReport)>> {
    if partial.exists() {
        fs::remove_dir_all(partial).with_context(|| format!("cannot clear {}", partial.display()))?;
    }
    let source = Checkpoint::open(checkpoint)?;
    if let (true, Some(name)) = (options.precisions.contains(&Precision::F16), source.beyond_f16()) {
        bail!("the weight `{name}` holds values that 16 bits cannot; export with --precision f32");
    }
    write(&source, partial, options)?;
    let bundle = Bundle::open(&BundleSource::Path(partial.to_path_buf()))?;
    bundle.verify()?;
    let mut reports = Vec::new();
    for &precision in &options.precisions {
        let mut source = Checkpoint::open(checkpoint)?;
        if precision == Precision::F16 {
            source.round_to_f16()?;
        }
        let report = parity::compare(&bundle, precision, &source, samples)?;
        if !report.holds() {
            bail!("the exported {precision} graphs do not compute what the checkpoint does:\n{report}");
        }
        reports.push((precision, report));
    }
    Ok(reports)
}

/// Writes the bundle's folder.
fn write(source: &Checkpoint, folder: &Path, options: &ExportOptions) -> Result<()> {
    let mut files = BTreeMap::new();
    let mut put = |name: String, bytes: &[u8]| -> Result<()> {
        let path = folder.join(&name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        files.insert(name, sha256_hex(bytes));
        Ok(())
    };
    let image = ImagePreparation::default();
    let tokenizer = source.folder.join("tokenizer.json");
    put("tokenizer.json".into(), &compact_json(&tokenizer)?)?;
    let mut described = None;
    for &precision in &options.precisions {
        let graphs = Graphs::new(source, options.max_text, &image, precision);
        for signature in &graphs.signatures {
            let model = graphs.build(signature).with_context(|| format!("graph {}", signature.name))?;
            put(Manifest::graph_file(precision, &signature.name), &model.encode_to_vec())?;
        }
        put(format!("{precision}/weights.bin"), graphs.weights.bytes())?;
        described = Some((graphs.sizes, graphs.signatures));
    }
    let (model, graphs) = described.context("no precision")?;
    let manifest = Manifest {
        schema: SCHEMA,
        precisions: options.precisions.clone(),
        model,
        image,
        decoding: options.decoding.clone(),
        graphs,
        files,
        training: source.training.clone(),
        quality: options.quality.clone(),
    };
    fs::write(folder.join(MANIFEST), manifest.to_toml()?).context("cannot write the manifest")
}

/// A JSON file without its white space, which is more than half of a `tokenizer.json`.
fn compact_json(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).with_context(|| format!("in {}", path.display()))?;
    Ok(serde_json::to_vec(&value)?)
}

/// Gives the checked bundle its name.
fn publish(partial: &Path, out: &Path) -> Result<()> {
    if out.extension().is_some_and(|e| e == "tar") {
        let bundle = Bundle::open(&BundleSource::Path(partial.to_path_buf()))?;
        pack(&bundle, out)?;
        return Ok(());
    }
    let old = sibling(out, "old");
    if out.exists() {
        fs::rename(out, &old).with_context(|| format!("cannot move {} away", out.display()))?;
    }
    fs::rename(partial, out).with_context(|| format!("cannot write {}", out.display()))?;
    if old.exists() {
        fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    Ok(())
}
