//! The other forms of a bundle's 8- and 4-bit graphs: written over the same weights, and compared with the expanded form.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use prost::Message;
use tract_onnx::pb::ModelProto;
use unimo::bundle::manifest::{Form, Manifest, Precision, WEIGHTS};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::{self, EngineKind, EngineOptions};

use crate::calibrate::{Calibrated, Range, calibrate};
use crate::graph::Products;
use crate::graphs::Graphs;
use crate::parity::{ParityReport, Sample};
use crate::quality::Figures;
use crate::tensorrt;
use crate::walk::{Loaded, walk};
use crate::writing::Writing;

/// Forms to add, and what that needs.
#[derive(Debug, Clone, Default)]
pub struct FormOptions {
    /// [`Form::Dynamic`], [`Form::Static`] or both; a precision gets those of them that it can have ([`Precision::forms`]).
    pub forms: Vec<Form>,
    /// Pictures and texts to calibrate the static form on, and to round 4-bit weights by.
    pub calibration: Vec<Sample>,
    /// How scales are chosen from what occurred.
    pub range: Range,
    /// ONNX Runtime's library, on which the forms are checked; it is looked for if none is named.
    pub library: Option<PathBuf>,
}

impl FormOptions {
    /// Those of the forms that a precision can have.
    #[must_use]
    pub fn of(&self, precision: Precision) -> Vec<Form> {
        self.forms.iter().copied().filter(|form| precision.forms().contains(form)).collect()
    }

    /// Refuses forms that none of the precisions can have.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self, precisions: &[Precision]) -> Result<()> {
        if self.forms.contains(&Form::Expanded) {
            bail!("the expanded form is always there; others are dynamic and static");
        }
        let impossible = |form: &&Form| !precisions.iter().any(|precision| precision.forms().contains(form));
        match self.forms.iter().find(impossible) {
            Some(Form::Static) => {
                bail!("the static form is one of 8-bit graphs, and there are none: i8 is among no precisions given")
            }
            Some(form) => bail!("the {form} form is one of 8- and 4-bit graphs, and there are none: neither i8 nor i4 is given"),
            None => Ok(()),
        }
    }
}

/// A form that was written.
#[derive(Debug, Clone)]
pub struct WrittenForm {
    /// Which.
    pub form: Form,
    /// Agreement with the expanded form on equal inputs.
    pub parity: ParityReport,
    /// What it is worth on each engine, by [`Manifest::quality_name`], where a gate measured it; also in the manifest.
    pub figures: BTreeMap<String, Figures>,
}

/// Largest difference from the expanded form, as a share of the output's largest magnitude. Rounding to 8 bits at each of up to 26
/// products in a row costs what it costs: of the shipped model 1.4e-2 with scales of the moment, 2.3e-2 with calibrated ones, and up to
/// 7e-2 where the range is chosen badly. A scale of a quarter gives 4e-1 and more, a zero point left out 1 and more. What a loss is
/// worth is for the gate to say.
pub const TOLERANCE: f64 = 0.1;

/// Adds those of the forms that the `precision` graphs can have to the bundle in `folder`; on failure the folder is no bundle any more.
///
/// # Errors
/// No ONNX Runtime to check them on, no pictures to calibrate on, graphs that TensorRT's rules
/// forbid, or outputs that differ by more than [`TOLERANCE`].
pub fn add(
    folder: &Path,
    graphs: &Graphs,
    precision: Precision,
    options: &FormOptions,
    samples: &[Sample],
) -> Result<Vec<WrittenForm>> {
    let forms = options.of(precision);
    if forms.is_empty() {
        return Ok(Vec::new());
    }
    let open = || Bundle::open(&BundleSource::Path(folder.to_path_buf()));
    let bundle = open()?;
    let calibrated = match forms.contains(&Form::Static) {
        true => calibrate(&bundle, graphs, precision, &options.calibration, options.range)?,
        false => Calibrated::new(),
    };
    let (mut writing, manifest) = Writing::again(folder)?;
    for &form in &forms {
        writing.put_graphs(graphs, precision, form, &|graph| match form {
            Form::Static => {
                calibrated.get(graph).map(Products::Static).with_context(|| format!("graph {graph} was not calibrated"))
            }
            _ => Ok(Products::Dynamic),
        })?;
    }
    writing.describe_again(manifest)?;
    let bundle = open()?;
    let compared = |&form: &Form| {
        if form == Form::Static {
            obeys_tensorrt(&bundle, precision)?;
        }
        let parity = compare(&bundle, precision, form, options, samples)?;
        if let Some(other) = parity.outputs.iter().find(|output| output.relative_error > TOLERANCE) {
            bail!("the {form} form of {} computes another {} than the expanded one:\n{parity}", other.graph, other.output);
        }
        Ok(WrittenForm { form, parity, figures: BTreeMap::new() })
    };
    forms.iter().map(compared).collect()
}

fn obeys_tensorrt(bundle: &Bundle, precision: Precision) -> Result<()> {
    let weights = bundle.read(&format!("{precision}/{WEIGHTS}"))?;
    for signature in &bundle.manifest().graphs {
        let file = Manifest::form_file(precision, Form::Static, &signature.name);
        let model = ModelProto::decode(bundle.read(&file)?).with_context(|| format!("{file} is not ONNX"))?;
        tensorrt::check(&model, weights).with_context(|| format!("{file} is none for TensorRT"))?;
    }
    Ok(())
}

/// Runs a form on ONNX Runtime and the expanded one on tract, on the inputs that the expanded one gets.
fn compare(bundle: &Bundle, precision: Precision, form: Form, options: &FormOptions, samples: &[Sample]) -> Result<ParityReport> {
    // What the file says is what is compared: nothing is rewritten, and no kernel of ours takes part.
    let library = options.library.clone();
    let runtime = engine::open(&EngineOptions { engine: EngineKind::Ort, rewriting: false, library, ..EngineOptions::default() })
        .with_context(|| format!("the {form} form is checked on ONNX Runtime"))?;
    let tract = engine::open(&EngineOptions::default())?;
    let expanded = Loaded::of(bundle, precision, Form::Expanded, tract.as_ref())?;
    let other = Loaded::of(bundle, precision, form, runtime.as_ref())?;
    let tokenizer = bundle.tokenizer()?;
    let mut report = ParityReport { samples: samples.len(), tolerance: TOLERANCE, outputs: Vec::new() };
    for sample in samples {
        walk(&expanded, bundle.manifest(), &tokenizer, sample, &mut |signature, inputs, expected| {
            let (_, found) = other.run(&signature.name, inputs)?;
            for ((output, found), expected) in signature.outputs.iter().zip(&found).zip(expected) {
                // The score is one logit: where it is near zero, its own magnitude says nothing.
                let least = if output.name == "score" { 1.0 } else { 1e-6 };
                report.note_against(&signature.name, &output.name, found.floats(), expected.floats(), least);
            }
            Ok(())
        })?;
    }
    Ok(report)
}
