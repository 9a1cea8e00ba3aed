//! What masked regions were: their features, and soft labels of their classes.

use anyhow::Result;
use candle_core::Tensor;

use super::draft::RegionTargets;
use crate::model::Unimo;
use crate::ops;
use crate::vision::Vision;

/// What the masked regions of a pass were.
pub(super) struct MaskedRegions {
    /// Standardised, `[n, region_feature]`.
    pub features: Tensor,
    /// Where they are asked for, class distributions, `[n, region_classes]`.
    pub labels: Option<Tensor>,
}

impl MaskedRegions {
    /// Puts them on the model's device; nothing where no region is masked. Labels are those of the backbone as it was given, or the
    /// detector's.
    ///
    /// # Errors
    /// A backbone without a classifier, and those of candle.
    pub fn of(targets: &RegionTargets, labelled: bool, model: &Unimo, vision: &Vision) -> Result<Option<Self>> {
        let (n, config, device) = (targets.rows.len(), model.config(), model.device());
        if n == 0 {
            return Ok(None);
        }
        let features = model.statistics().standardise(&targets.features);
        let features = ops::from_host(features, (n, config.region_feature), device)?;
        let mut labels = None;
        if labelled {
            let distributions = match config.detects() {
                true => scaled(&targets.probabilities, config.region_classes),
                false => softmax(vision.given()?.classify(&targets.features)?, config.region_classes),
            };
            labels = Some(ops::from_host(distributions, (n, config.region_classes), device)?);
        }
        Ok(Some(Self { features, labels }))
    }
}

/// Probabilities `[n, classes]`, each region's scaled to a sum of 1.
fn scaled(probabilities: &[f32], classes: usize) -> Vec<f32> {
    let rows = probabilities.chunks_exact(classes);
    let scaled = rows.flat_map(|row| {
        let sum = row.iter().sum::<f32>().max(f32::MIN_POSITIVE);
        row.iter().map(move |p| p / sum)
    });
    scaled.collect()
}

/// Softmax of the rows of `[n, classes]`.
fn softmax(mut logits: Vec<f32>, classes: usize) -> Vec<f32> {
    for row in logits.chunks_exact_mut(classes) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|logit| *logit = (*logit - largest).exp());
        let sum = row.iter().sum::<f32>();
        row.iter_mut().for_each(|exponential| *exponential /= sum);
    }
    logits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_labels_add_up_to_one() {
        assert_eq!(scaled(&[0.2, 0.2, 0.0, 0.5], 2), [0.5, 0.5, 0.0, 1.0]);
        // e/(1 + e), also where exponentials alone would overflow.
        let found = softmax(vec![1.0, 0.0, 500.0, 501.0], 2);
        for (found, expected) in found.iter().zip([0.731_059, 0.268_941, 0.268_941, 0.731_059]) {
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
    }
}
