//! Checkpoint → bundle: written beside its place, compared with candle, and only then given its name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use prost::Message;
use unimo::bundle::manifest::{DecodingDefaults, Manifest, Precision, SCHEMA, WEIGHTS};
use unimo::bundle::{Bundle, BundleSource, MANIFEST, pack, sha256_hex};
use unimo::image::ImagePreparation;

use crate::checkpoint::Checkpoint;
use crate::graph::Storage;
use crate::graphs::Graphs;
use crate::parity::{self, ParityReport, Sample};
use crate::quality::{Development, Figures, MaxDrop};

/// What to write.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Precisions, the default one first.
    pub precisions: Vec<Precision>,
    /// Beginnings of the names of weights that 8-bit precision keeps in 16 bits.
    pub keep_f16: Vec<String>,
    /// Text slots of the graphs, `[CLS]` and `[SEP]` included.
    pub max_text: usize,
    /// Decoding defaults.
    pub decoding: DecodingDefaults,
    /// Measured quality for the manifest, per precision.
    pub quality: BTreeMap<String, BTreeMap<String, f64>>,
    /// What every precision is measured on, and what it may lose.
    pub gate: Option<Gate>,
    /// Replaces a bundle that is already there.
    pub force: bool,
}

/// What every precision is measured on, and what it may lose against f32.
#[derive(Debug, Clone)]
pub struct Gate {
    /// Pictures and captions.
    pub development: Arc<Development>,
    /// The largest loss.
    pub max_drop: MaxDrop,
}

/// A precision that was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// Its name.
    pub precision: Precision,
    /// Agreement of its graphs with candle, whose weights were rounded alike.
    pub parity: ParityReport,
    /// What it is worth, where a gate measured it; also in the manifest.
    pub figures: Option<Figures>,
}

impl ExportOptions {
    fn storage(&self, precision: Precision) -> Storage {
        Storage { precision, keep_f16: self.keep_f16.clone() }
    }
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precisions: vec![Precision::F16],
            keep_f16: Vec::new(),
            max_text: 32,
            decoding: DecodingDefaults { beam: 3, max_words: 30, length_penalty: 0.7, no_repeat: 3 },
            quality: BTreeMap::new(),
            gate: None,
            force: false,
        }
    }
}

/// Exports a checkpoint to `out`: a `.tar`, or else a folder. `progress` is told the picture that is measured, of how many.
///
/// # Errors
/// An unusable checkpoint, a bundle already there, failed writes, parity that does not hold, or a precision that loses more than
/// its gate allows; nothing is left at `out` then.
pub fn export(
    checkpoint: &Path,
    out: &Path,
    options: &ExportOptions,
    samples: &[Sample],
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<Written>> {
    if out.exists() && !options.force {
        bail!("{} is already there; --force replaces it", out.display());
    }
    if options.precisions.is_empty() {
        bail!("no precision to write");
    }
    let partial = sibling(out, "partial");
    let result = write_and_check(checkpoint, &partial, options, samples, progress).and_then(|reports| {
        publish(&partial, out)?;
        Ok(reports)
    });
    let _ = fs::remove_dir_all(&partial);
    let _ = fs::remove_dir_all(sibling(&partial, "f32"));
    result
}

pub(crate) fn sibling(out: &Path, suffix: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(format!(".{suffix}"));
    PathBuf::from(name)
}

pub(crate) fn clear(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    Ok(())
}

fn write_and_check(
    checkpoint: &Path,
    partial: &Path,
    options: &ExportOptions,
    samples: &[Sample],
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<Written>> {
    clear(partial)?;
    let source = Checkpoint::open(checkpoint)?;
    let rounded = options.precisions.iter().any(|&precision| precision != Precision::F32);
    if let (true, Some(name)) = (rounded, source.beyond_f16()) {
        bail!("the weight `{name}` holds values that 16 bits cannot; export with --precision f32");
    }
    if let Some(beginning) = options.keep_f16.iter().find(|beginning| !source.has(beginning)) {
        bail!("no weight's name begins with `{beginning}`; there are such as `backbone.`, `image.feature` and `layers.0.`");
    }
    write(&source, partial, options)?;
    let bundle = Bundle::open(&BundleSource::Path(partial.to_path_buf()))?;
    bundle.verify()?;
    let mut written = Vec::new();
    for &precision in &options.precisions {
        let mut rounded = Checkpoint::open(checkpoint)?;
        rounded.round(&options.storage(precision))?;
        let parity = parity::compare(&bundle, precision, &rounded, samples)?;
        if !parity.holds() {
            bail!("the exported {precision} graphs do not compute what the checkpoint does:\n{parity}");
        }
        written.push(Written { precision, parity, figures: None });
    }
    if let Some(gate) = &options.gate {
        for written in &mut written {
            let errors = parity::compare(&bundle, written.precision, &source, samples)?;
            let error = |o: parity::OutputParity| (format!("error_{}_{}", o.graph, o.output), significant(o.relative_error));
            written.figures = Some(errors.outputs.into_iter().map(error).collect());
        }
        gate.pass(&source, partial, options, &mut written, progress)?;
    }
    Ok(written)
}

/// Three significant digits.
fn significant(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}

impl Gate {
    /// Measures every precision, compares it with f32 and writes the figures into the manifest.
    fn pass(
        &self,
        source: &Checkpoint,
        bundle: &Path,
        options: &ExportOptions,
        written: &mut [Written],
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let mut reference = bundle.to_path_buf();
        if !options.precisions.contains(&Precision::F32) {
            reference = sibling(bundle, "f32");
            clear(&reference)?;
            write(source, &reference, &ExportOptions { precisions: vec![Precision::F32], ..options.clone() })?;
        }
        let rounded = written.iter().filter(|w| w.precision != Precision::F32).count() as u64;
        let (of_each, done) = (self.development.len() as u64, std::cell::Cell::new(0));
        let note = |n| {
            done.set(done.get() + n);
            progress(done.get(), (1 + rounded) * of_each);
        };
        let full = self.development.measure(&reference, Precision::F32, &note)?;
        let path = bundle.join(MANIFEST);
        let mut manifest = Manifest::parse(&fs::read(&path).context("cannot read the manifest")?)?;
        for one in written {
            let figures = match one.precision {
                Precision::F32 => full.clone(),
                precision => self.development.measure(bundle, precision, &note)?,
            };
            self.max_drop.check(one.precision, &figures, &full)?;
            let all = one.figures.get_or_insert_default();
            all.extend(figures);
            manifest.quality.entry(one.precision.to_string()).or_default().extend(all.clone());
        }
        fs::write(&path, manifest.to_toml()?).context("cannot write the manifest")
    }
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
        let graphs = Graphs::new(source, options.max_text, &image, options.storage(precision));
        for signature in &graphs.signatures {
            let model = graphs.build(signature).with_context(|| format!("graph {}", signature.name))?;
            put(Manifest::graph_file(precision, &signature.name), &model.encode_to_vec())?;
        }
        put(format!("{precision}/{WEIGHTS}"), graphs.weights.bytes())?;
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
pub(crate) fn publish(partial: &Path, out: &Path) -> Result<()> {
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
