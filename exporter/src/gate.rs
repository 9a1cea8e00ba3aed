//! What a precision or form must be worth before it is let into a bundle.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use unimo::bundle::manifest::{Form, Manifest, Precision};
use unimo::engine::EngineKind;

use crate::forms::WrittenForm;
use crate::parity::ParityReport;
use crate::quality::{Development, Figures, MaxDrop};
use crate::writing::Writing;

/// What every precision and form is measured on, and what it may lose against f32.
#[derive(Debug, Clone)]
pub struct Gate {
    /// Pictures and captions.
    pub development: Arc<Development>,
    /// The largest loss.
    pub max_drop: MaxDrop,
}

impl Gate {
    /// Measures a form of a precision in a bundle's folder, refuses one that loses more than it may against the reference, and writes
    /// the figures into the manifest.
    pub(crate) fn pass_form(
        &self,
        bundle: &Path,
        precision: Precision,
        reference: &Figures,
        written: &mut WrittenForm,
        library: Option<&Path>,
        note: &dyn Fn(u64),
    ) -> Result<()> {
        for &engine in engines(written.form) {
            let mut figures = self.development.measure(bundle, (precision, written.form, engine), library, note)?;
            let name = Manifest::quality_name(precision, written.form, engine);
            self.max_drop.check(&name, &figures, reference)?;
            // The form was compared on ONNX Runtime.
            if engine == EngineKind::Ort {
                figures.extend(errors(&written.parity));
            }
            put_figures(bundle, &name, &figures)?;
            written.figures.insert(name, figures);
        }
        Ok(())
    }
}

/// The engines that run a form on a processor, and may differ in what they compute.
fn engines(form: Form) -> &'static [EngineKind] {
    match form {
        Form::Expanded => &[EngineKind::Tract],
        Form::Dynamic => &[EngineKind::Ort, EngineKind::Tract],
        Form::Static => &[EngineKind::Ort],
    }
}

/// How often [`Gate::pass_form`] measures.
pub(crate) fn runs(written: &WrittenForm) -> usize {
    engines(written.form).len()
}

/// Each output's error as a figure, with three significant digits.
pub(crate) fn errors(parity: &ParityReport) -> Figures {
    let significant = |value: f64| format!("{value:.2e}").parse().unwrap_or(value);
    let error = |o: &crate::parity::OutputParity| (format!("error_{}_{}", o.graph, o.output), significant(o.relative_error));
    parity.outputs.iter().map(error).collect()
}

/// Adds figures to a bundle's manifest, under a [`Manifest::quality_name`].
pub(crate) fn put_figures(bundle: &Path, name: &str, figures: &Figures) -> Result<()> {
    let (writing, mut manifest) = Writing::again(bundle)?;
    manifest.quality.entry(name.to_owned()).or_default().extend(figures.clone());
    writing.describe_again(manifest)
}
