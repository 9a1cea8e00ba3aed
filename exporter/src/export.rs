//! Checkpoint → bundle: written beside its place, compared with candle, and only then given its name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use unimo::bundle::manifest::{DecodingDefaults, Form, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::EngineKind;
use unimo::image::ImagePreparation;

use crate::checkpoint::Checkpoint;
use crate::compensate::{self, Moments};
use crate::forms::{self, FormOptions, WrittenForm};
use crate::gate::{self, Gate, errors, put_figures};
use crate::graph::Storage;
use crate::graphs::Graphs;
use crate::parity::{self, ParityReport, Sample};
use crate::quality::Figures;
use crate::writing::{About, Writing, publish, sibling};

/// What to write.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Precisions, the default one first.
    pub precisions: Vec<Precision>,
    /// Beginnings of the names of weights that 8- and 4-bit precision keep in 16 bits.
    pub keep_f16: Vec<String>,
    /// Text slots of the graphs, `[CLS]` and `[SEP]` included.
    pub max_text: usize,
    /// Decoding defaults.
    pub decoding: DecodingDefaults,
    /// Further forms of the 8- and 4-bit graphs.
    pub forms: FormOptions,
    /// Measured quality for the manifest, per precision.
    pub quality: BTreeMap<String, BTreeMap<String, f64>>,
    /// What every precision is measured on, and what it may lose.
    pub gate: Option<Gate>,
    /// Replaces a bundle that is already there.
    pub force: bool,
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
    /// Its other forms.
    pub forms: Vec<WrittenForm>,
}

impl ExportOptions {
    fn storage(&self, precision: Precision, moments: Option<&Arc<Moments>>) -> Storage {
        Storage { precision, keep_f16: self.keep_f16.clone(), moments: moments.cloned() }
    }
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precisions: vec![Precision::F16],
            keep_f16: Vec::new(),
            max_text: 32,
            decoding: DecodingDefaults { beam: 3, max_words: 30, length_penalty: 0.7, no_repeat: 3 },
            forms: FormOptions::default(),
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

fn write_and_check(
    checkpoint: &Path,
    partial: &Path,
    options: &ExportOptions,
    samples: &[Sample],
    progress: &dyn Fn(u64, u64),
) -> Result<Vec<Written>> {
    let source = Checkpoint::open(checkpoint)?;
    let rounded = options.precisions.iter().any(|&precision| precision != Precision::F32);
    if let (true, Some(name)) = (rounded, source.beyond_f16()) {
        bail!("the weight `{name}` holds values that 16 bits cannot; export with --precision f32");
    }
    if let Some(beginning) = options.keep_f16.iter().find(|beginning| !source.has(beginning)) {
        bail!("no weight's name begins with `{beginning}`; there are such as `backbone.`, `image.feature` and `layers.0.`");
    }
    options.forms.check(&options.precisions)?;
    let moments = moments(&source, partial, options)?;
    write(&source, partial, options, moments.as_ref())?;
    let bundle = Bundle::open(&BundleSource::Path(partial.to_path_buf()))?;
    bundle.verify()?;
    let mut written = Vec::new();
    for &precision in &options.precisions {
        let mut rounded = Checkpoint::open(checkpoint)?;
        let storage = options.storage(precision, moments.as_ref());
        rounded.round(&storage)?;
        let parity = parity::compare(&bundle, precision, &rounded, samples)?;
        if !parity.holds() {
            bail!("the exported {precision} graphs do not compute what the checkpoint does:\n{parity}");
        }
        let graphs = Graphs::new(&source, options.max_text, &bundle.manifest().image, storage)?;
        let forms = forms::add(partial, &graphs, precision, &options.forms, samples)?;
        written.push(Written { precision, parity, figures: None, forms });
    }
    if let Some(gate) = &options.gate {
        for written in &mut written {
            written.figures = Some(errors(&parity::compare(&bundle, written.precision, &source, samples)?));
        }
        pass(gate, &source, partial, options, &mut written, progress)?;
    }
    Ok(written)
}

/// Measures every precision and form, compares it with f32 and writes the figures into the manifest.
fn pass(
    gate: &Gate,
    source: &Checkpoint,
    bundle: &Path,
    options: &ExportOptions,
    written: &mut [Written],
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let mut reference = bundle.to_path_buf();
    if !options.precisions.contains(&Precision::F32) {
        reference = sibling(bundle, "f32");
        write(source, &reference, &ExportOptions { precisions: vec![Precision::F32], ..options.clone() }, None)?;
    }
    let measured = |w: &Written| usize::from(w.precision != Precision::F32) + w.forms.iter().map(gate::runs).sum::<usize>();
    let all = (1 + written.iter().map(measured).sum::<usize>() as u64) * gate.development.len() as u64;
    let done = std::cell::Cell::new(0);
    let note = |n| {
        done.set(done.get() + n);
        progress(done.get(), all);
    };
    let full = gate.development.measure(&reference, (Precision::F32, Form::Expanded, EngineKind::Tract), None, &note)?;
    for one in written {
        let figures = match one.precision {
            Precision::F32 => full.clone(),
            precision => gate.development.measure(bundle, (precision, Form::Expanded, EngineKind::Tract), None, &note)?,
        };
        gate.max_drop.check(one.precision.name(), &figures, &full)?;
        let all = one.figures.get_or_insert_default();
        all.extend(figures);
        put_figures(bundle, one.precision.name(), all)?;
        for form in &mut one.forms {
            gate.pass_form(bundle, one.precision, &full, form, options.forms.library.as_deref(), &note)?;
        }
    }
    Ok(())
}

/// What the weights are multiplied with on the calibration's samples, where 4-bit weights are to be rounded by it.
fn moments(source: &Checkpoint, partial: &Path, options: &ExportOptions) -> Result<Option<Arc<Moments>>> {
    let samples = &options.forms.calibration;
    if samples.is_empty() || !options.precisions.contains(&Precision::I4) {
        return Ok(None);
    }
    let folder = sibling(partial, "observed");
    let observed = || -> Result<Moments> {
        let eight = ExportOptions { precisions: vec![Precision::I8], keep_f16: Vec::new(), ..options.clone() };
        write(source, &folder, &eight, None)?;
        let bundle = Bundle::open(&BundleSource::Path(folder.clone()))?;
        let graphs = Graphs::new(source, options.max_text, &bundle.manifest().image, Storage::of(Precision::I8))?;
        compensate::moments(&bundle, &graphs, samples)
    };
    let moments = observed();
    let _ = fs::remove_dir_all(&folder);
    Ok(Some(Arc::new(moments?)))
}

/// Writes the bundle's folder.
fn write(source: &Checkpoint, folder: &Path, options: &ExportOptions, moments: Option<&Arc<Moments>>) -> Result<()> {
    let mut writing = Writing::new(folder)?;
    let image = ImagePreparation::default();
    let tokenizer = source.folder.join("tokenizer.json");
    writing.put("tokenizer.json".into(), &compact_json(&tokenizer)?)?;
    let mut written = None;
    for &precision in &options.precisions {
        let graphs = Graphs::new(source, options.max_text, &image, options.storage(precision, moments))?;
        writing.put_precision(&graphs, precision)?;
        written = Some(graphs);
    }
    let about = About {
        precisions: options.precisions.clone(),
        image,
        decoding: options.decoding.clone(),
        training: source.training.clone(),
        quality: options.quality.clone(),
    };
    writing.describe(&written.context("no precision")?, about)
}

/// A JSON file without its white space, which is more than half of a `tokenizer.json`.
fn compact_json(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).with_context(|| format!("in {}", path.display()))?;
    Ok(serde_json::to_vec(&value)?)
}
