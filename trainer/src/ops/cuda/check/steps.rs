//! A few steps of training a small model, to be compared between devices.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Device, Var};

use super::{Outcome, error, read, values};
use crate::model::{Back, Dropout, EmbeddedImages, Given, ModelConfig, Packer, Regions, Unimo, gradients_of};
use crate::objectives::losses::{Contrasting, Encoding, Kind, Language, Matching};
use crate::ops::cuda::layers::Counts;
use crate::ops::{self, Precision, Targets};
use crate::optimizer::{AdamW, OptimizerConfig};

/// What the steps came to.
pub struct Steps {
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Gradients of the first step, by weight.
    pub gradients: BTreeMap<String, Vec<f32>>,
    /// Steps whose pass through the layers was replayed.
    pub replayed: u64,
    /// Computations of the objectives.
    pub computed: Counts,
}

/// How large a model is trained, and on how much.
#[derive(Debug, Clone)]
pub struct Extent {
    /// The preset that the model is like.
    size: &'static str,
    layers: usize,
    /// Cells along a side of a picture.
    grid: usize,
    region_feature: usize,
    vocabulary: usize,
    pictures: usize,
    /// Of the shortest caption.
    words: usize,
    learning_rate: f64,
}

impl Extent {
    /// Small enough for kernels that run on a CPU.
    #[must_use]
    pub fn small() -> Self {
        Self { size: "pico", layers: 2, grid: 3, region_feature: 20, vocabulary: 90, pictures: 3, words: 5, learning_rate: 1e-2 }
    }

    /// Rows as wide as `base`'s, and more than a device works on at one time; seconds on a CPU with many cores.
    #[must_use]
    pub fn wide() -> Self {
        Self {
            size: "base",
            layers: 2,
            grid: 9,
            region_feature: 300,
            vocabulary: 5_003,
            pictures: 12,
            words: 30,
            learning_rate: 1e-4,
        }
    }

    fn config(&self) -> Result<ModelConfig> {
        Ok(ModelConfig {
            layers: self.layers,
            grid: self.grid,
            detected_regions: 0,
            region_feature: self.region_feature,
            region_classes: 7,
            vocabulary: self.vocabulary,
            ..ModelConfig::named(self.size)?
        })
    }
}

/// Runs three steps: captions with label smoothing, masked words, contrast and matching, all with dropout.
///
/// # Errors
/// Those of candle, and a weight that the losses reach without a gradient.
pub fn first_steps(extent: &Extent, device: &Device) -> Result<Steps> {
    let (config, pictures) = (extent.config()?, extent.pictures);
    let words_known = (config.vocabulary - 10) as u32;
    let (regions, width) = (config.regions(), config.region_feature);
    let model = Unimo::new(config, 5, device)?;
    let mut optimizer = AdamW::new(OptimizerConfig::default(), model.weights());
    let mut steps = Steps { losses: Vec::new(), gradients: BTreeMap::new(), replayed: 0, computed: Counts::default() };
    for step in 0..3u32 {
        let features: Vec<Vec<f32>> =
            (0..pictures).map(|picture| values(40 + 10 * step + picture as u32, regions * width)).collect();
        let caption = |picture: usize| -> Vec<u32> {
            (0..(extent.words + picture) as u32).map(|i| 5 + (i * 17 + step * 3 + picture as u32) % words_known).collect()
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
            let pair = packer.pair(Regions::masked(features, &[1, 4]), &caption((picture + 1) % pictures));
            joint_images.push(pair.image);
            joint_texts.extend(pair.texts);
        }
        let batch = packer.finish(device)?;
        let dropout = Dropout::of(0.1, 100 + u64::from(step));
        let passed = model.forward(&batch, None, dropout)?;
        let (computing, hidden) = (model.computing(), Some(&passed.hidden));
        let by: Vec<Var> = model.weights().values().cloned().collect();

        let rows = model.text_rows(&batch, &texts)?;
        let given = [Given::rows(&images), rows.given()];
        let kinds = vec![Kind::Images(EmbeddedImages::Described), Kind::Texts(rows.counts)];
        let (encoded, pending) = computing.forward(&Encoding { model: &model, dropout, kinds }, (hidden, &given), device)?;
        let leaves = encoded.iter().map(|of| Var::from_tensor(&of.detach())).collect::<candle_core::Result<Vec<_>>>()?;
        let given: Vec<_> = leaves.iter().map(|leaf| Given::matrix(leaf)).collect();
        let contrasting = Contrasting {
            temperature: model.log_temperature()?,
            image_of_text: &(0..pictures).collect::<Vec<_>>(),
            images: pictures,
            own: [0..pictures, 0..pictures],
        };
        let contrast = computing.losses(&contrasting, (None, &given), &[1.0; 2], device)?;
        let (mut gradients, _) = gradients_of(vec![contrast.back], by.iter().chain(&leaves))?;
        let by_encoded: Vec<_> = leaves.iter().map(|leaf| gradients.remove(leaf)).collect();

        let targets = Targets::of_one(targets, None, 0.1);
        let language = Language { model: &model, targets: &targets };
        let language = computing.losses(&language, (hidden, &[Given::varying_rows(&predicting)]), &[1.0], device)?;
        let matching = Matching {
            model: &model,
            labels: &(0..pictures).map(|picture| if picture % 2 == 0 { 1.0 } else { 0.0 }).collect::<Vec<_>>(),
        };
        let given = [Given::rows(&joint_images), Given::rows(&joint_texts)];
        let matching = computing.losses(&matching, (hidden, &given), &[1.0], device)?;
        let mut value = read(&language.outputs[0])?[0];
        for output in contrast.outputs.iter().chain(&matching.outputs) {
            value += output.to_scalar::<f32>().context("the loss is not a number")?;
        }
        let mut backs = vec![language.back, matching.back];
        match pending {
            Some(pending) => backs.push(Back::Gone(pending.backward(&by_encoded)?)),
            None => {
                for (of, gradient) in encoded.iter().zip(&by_encoded) {
                    let gradient = gradient.as_ref().context("the contrast leads nowhere")?;
                    backs.push(Back::Through(ops::carrying(of, gradient)?));
                }
            }
        }
        gradients.extend(passed.backward_by_layer(&model, &batch, backs, &by, &mut |_, _| Ok(()))?)?;
        if step == 0 {
            for (name, var) in model.weights() {
                if let Some(gradient) = gradients.get(var) {
                    steps.gradients.insert(name.clone(), read(gradient)?);
                }
            }
        }
        optimizer.step(&gradients, extent.learning_rate)?.read()?;
        steps.losses.push(f64::from(value));
    }
    steps.replayed = model.passes_through_layers().replayed;
    steps.computed = model.computing().counts();
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
            Precision::Tf32 => [5e-3, 5e-2],
            Precision::F32 => [1e-4, 1e-3],
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
        // All steps are of one shape, and each computes four things.
        let (steps, Counts { passes, replayed, .. }) = (self.losses.len() as u64, self.computed);
        for (name, as_wanted) in [
            (format!("{} of {steps} steps replayed in {precision:?}", self.replayed), self.replayed + 1 == steps),
            (
                format!("{replayed} of {passes} computations of objectives replayed in {precision:?}"),
                (passes, replayed) == (4 * steps, 4 * (steps - 1)),
            ),
        ] {
            outcomes.push(Outcome { name, error: if as_wanted { 0.0 } else { f64::INFINITY }, tolerance: 0.0 });
        }
        outcomes
    }
}
