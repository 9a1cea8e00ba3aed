//! What a precision or form must be worth before it is let into a bundle.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use unimo::bundle::manifest::{Form, Manifest, Precision};

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
    /// Measures forms of a precision in a bundle's folder, refuses one that loses more than it may against the reference, and
    /// writes the figures into the manifest.
    pub(crate) fn pass_forms(
        &self,
        bundle: &Path,
        precision: Precision,
        reference: &Figures,
        forms: &mut [WrittenForm],
        library: Option<&Path>,
        note: &dyn Fn(u64),
    ) -> Result<()> {
        for written in forms {
            let mut figures = self.development.measure(bundle, (precision, written.form), library, note)?;
            self.max_drop.check(&Manifest::quality_name(precision, written.form), &figures, reference)?;
            figures.extend(errors(&written.parity));
            put_figures(bundle, precision, written.form, &figures)?;
            written.figures = Some(figures);
        }
        Ok(())
    }
}

/// Each output's error as a figure, with three significant digits.
pub(crate) fn errors(parity: &ParityReport) -> Figures {
    let significant = |value: f64| format!("{value:.2e}").parse().unwrap_or(value);
    let error = |o: &crate::parity::OutputParity| (format!("error_{}_{}", o.graph, o.output), significant(o.relative_error));
    parity.outputs.iter().map(error).collect()
}

/// Adds figures to a bundle's manifest.
pub(crate) fn put_figures(bundle: &Path, precision: Precision, form: Form, figures: &Figures) -> Result<()> {
    let (writing, mut manifest) = Writing::again(bundle)?;
    manifest.quality.entry(Manifest::quality_name(precision, form)).or_default().extend(figures.clone());
    writing.describe_again(manifest)
}
