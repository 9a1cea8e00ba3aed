//! A few steps of training a small model, to be compared between devices.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Device, Var};

use super::{Outcome, error, read, values};
use crate::model::{Dropout, EmbeddedImages, ModelConfig, Packer, Regions, Unimo};
use crate::objectives::{contrastive_loss, matching_loss};
use crate::ops::Precision;
use crate::optimizer::{AdamW, OptimizerConfig};

/// What the steps came to.
pub struct Steps {
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Gradients of the first step, by weight.
    pub gradients: BTreeMap<String, Vec<f32>>,
    /// Steps whose pass through the layers was replayed.
    pub replayed: u64,
}

/// Pictures of a step.
const PICTURES: usize = 3;

/// Runs three steps: captions with label smoothing, masked words, contrast and matching, all with dropout.
///
/// # Errors
/// Those of candle, and a weight that the losses reach without a gradient.
pub fn first_steps(device: &Device) -> Result<Steps> {
    let config = ModelConfig { grid: 3, region_feature: 20, region_classes: 7, vocabulary: 90, ..ModelConfig::named("pico")? };
    let (regions, width) = (config.regions(), config.region_feature);
    let model = Unimo::new(config, 5, device)?;
    let mut optimizer = AdamW::new(OptimizerConfig::default(), model.weights());
    let mut steps = Steps { losses: Vec::new(), gradients: BTreeMap::new(), replayed: 0 };
    for step in 0..3u32 {
        let features: Vec<Vec<f32>> =
            (0..PICTURES).map(|picture| values(40 + 10 * step + picture as u32, regions * width)).collect();
        let caption = |picture: usize| -> Vec<u32> {
            (0..5 + picture as u32).map(|i| 5 + (i * 17 + step * 3 + picture as u32) % 80).collect()
        };
        let mut packer = Packer::new(&model);
        let (mut images, mut texts, mut joint_images, mut joint_texts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut predicting, mut targets) = (Vec::new(), Vec::new());
        for (picture, features) in features.iter().enumerate() {
            let ids = caption(picture);
            let rows = packer.image_with_captions(Regions::visible(features), &[&ids, &ids[..3]]);
            images.push(rows.image);
            for (first, length) in rows.texts.iter().zip([ids.len(), 3]) {
                predicting.extend((0..length - 1).map(|i| first + i));
                targets.extend_from_slice(&ids[1..length]);
            }
            texts.push(packer.text(&ids, picture % 2 == 0));
            let pair = packer.pair(Regions::masked(features, &[1, 4]), &caption((picture + 1) % PICTURES));
            joint_images.push(pair.image);
            joint_texts.extend(pair.texts);
        }
        let batch = packer.finish(device)?;
        let passed = model.forward(&batch, None, Dropout::of(0.1, 100 + u64::from(step)))?;
        let hidden = &passed.hidden;
        let language = model.language_loss(&hidden.rows(&predicting)?, targets, 0.1)?;
        let contrast = contrastive_loss(
            &model.image_embedding(&batch, &passed, &images, EmbeddedImages::Described)?,
            &model.text_embedding(&batch, hidden, &texts)?,
            &[0, 1, 2],
            &model.temperature()?,
        )?;
        let logits = model.match_logits(&hidden.rows(&joint_images)?, &hidden.rows(&joint_texts)?)?;
        let loss = ((language + contrast)? + matching_loss(&logits, &[1.0, 0.0, 1.0])?)?;
        let value = loss.to_scalar::<f32>().context("the loss is not a number")?;
        let by: Vec<Var> = model.weights().values().cloned().collect();
        let gradients = passed.backward(&model, &batch, loss, &by)?;
        if step == 0 {
            for (name, var) in model.weights() {
                if let Some(gradient) = gradients.get(var) {
                    steps.gradients.insert(name.clone(), read(gradient)?);
                }
            }
        }
        optimizer.step(&gradients, 1e-2)?.read()?;
        steps.losses.push(f64::from(value));
    }
    steps.replayed = model.passes_through_layers().replayed;
    Ok(steps)
}

impl Steps {
    /// How far these steps are from `expected`, which were run elsewhere, in f32. These were in `precision`.
    #[must_use]
    pub fn compare(&self, expected: &Self, precision: Precision) -> Vec<Outcome> {
        // Losses of order 5, sums in f32; weights that have moved by rounding of the steps before. In bf16 a layer's activations and
        // its gradients are rounded a dozen times, by up to 1/512.
        let [of_losses, of_gradients] = match precision {
            Precision::Bf16 => [1e-2, 1e-1],
            Precision::F32 | Precision::Tf32 => [1e-4, 1e-3],
        };
        let losses: Vec<f32> = self.losses.iter().map(|loss| *loss as f32).collect();
        let name = format!("losses of three steps in {precision:?}");
        let mut outcomes = vec![Outcome { name, error: error(&losses, &expected.losses), tolerance: of_losses }];
        let (mut worst, mut of) = (0f64, "none".to_owned());
        for (name, wanted) in &expected.gradients {
            let largest = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
            // In units of the tensor's own largest gradient, or of a thousandth where it has next to none (a key's bias).
            let unit = f64::from(largest.max(1e-3));
            let scaled = |values: &[f32]| values.iter().map(|v| f64::from(*v) / unit).collect::<Vec<f64>>();
            let got = self.gradients.get(name).map_or(f64::INFINITY, |got| {
                error(&scaled(got).into_iter().map(|v| v as f32).collect::<Vec<_>>(), &scaled(wanted))
            });
            // What is not a number was made infinite, which is worse than anything.
            if got > worst {
                (worst, of) = (got, name.clone());
            }
        }
        let name = format!("{} gradients in {precision:?}, worst {of}", expected.gradients.len());
        outcomes.push(Outcome { name, error: worst, tolerance: of_gradients });
        // All steps are of one shape.
        let as_wanted = self.replayed + 1 == self.losses.len() as u64;
        let name = format!("{} of {} steps replayed in {precision:?}", self.replayed, self.losses.len());
        outcomes.push(Outcome { name, error: if as_wanted { 0.0 } else { f64::INFINITY }, tolerance: 0.0 });
        outcomes
    }
}
