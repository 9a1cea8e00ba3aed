//! Activation checkpointing: of every layer only the input is kept, and a backward pass computes the rest again, layer by layer
//! (Chen et al., arXiv 1604.06174).

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use super::{Dropout, PackedBatch, Passed, Unimo};

/// What a forward pass with thrown-away activations keeps for its backward pass.
pub(super) struct Kept {
    /// What the layers were given, where a gradient goes on from it to what embeds the rows.
    embedded: Option<Tensor>,
    /// Layers to be run again, and what each was given, first to last. They end with the last layer.
    layers: Vec<(usize, Var)>,
    /// What the last layer gave.
    hidden: Var,
}

impl Unimo {
    /// From now on, forward passes keep of every layer its input alone (`true`), or all that a backward pass takes (`false`, as a
    /// fresh model does). Gradients are the same; memory holds one layer's activations instead of all layers', for a second forward
    /// pass through the layers. Such a pass has to be taken back by [`Passed::backward`].
    pub fn set_activation_checkpointing(&mut self, on: bool) {
        self.checkpoints_activations = on;
    }

    /// Whether activations are thrown away.
    #[must_use]
    pub fn checkpoints_activations(&self) -> bool {
        self.checkpoints_activations
    }

    /// Runs the layers over embedded rows `x`, `[rows, hidden]`; what they give is a leaf if anything is kept.
    pub(super) fn layers_from_checkpoints(
        &self,
        mut x: Tensor,
        batch: &PackedBatch,
        dropout: Dropout,
    ) -> Result<(Tensor, Option<Kept>)> {
        let embedded = x.track_op().then(|| x.clone());
        let mut layers = Vec::new();
        for layer in 0..self.config.layers {
            let output = self.layer(layer, &x, batch, dropout)?;
            // Where nothing up to here is trained, there is nothing to come back for.
            if output.track_op() {
                layers.push((layer, Var::from_tensor(&x.detach())?));
            }
            x = output.detach();
        }
        if layers.is_empty() {
            return Ok((x, None));
        }
        let hidden = Var::from_tensor(&x)?;
        Ok((hidden.as_tensor().clone(), Some(Kept { embedded, layers, hidden })))
    }
}

impl Passed {
    /// Gradients of `loss`, a scalar that was computed of this pass. `batch` is what was passed through `model`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn backward(self, model: &Unimo, batch: &PackedBatch, loss: Tensor) -> Result<GradStore> {
        let Self { hidden, features, dropout, kept } = self;
        let mut gradients = loss.backward()?;
        // What the loss was computed by would otherwise stay in memory while the layers are run again.
        drop((loss, hidden, features));
        let Some(Kept { embedded, layers, hidden }) = kept else { return Ok(gradients) };
        let mut carried = gradients.remove(&hidden);
        drop(hidden);
        for (layer, input) in layers.into_iter().rev() {
            let Some(gradient) = carried else { return Ok(gradients) };
            carry(&model.layer(layer, input.as_tensor(), batch, dropout)?, &gradient, &mut gradients)?;
            carried = gradients.remove(&input);
        }
        if let (Some(embedded), Some(gradient)) = (embedded, carried) {
            carry(&embedded, &gradient, &mut gradients)?;
        }
        Ok(gradients)
    }
}

/// Adds to `gradients` those of what `output` was computed of, where `by_output` is the gradient by it.
fn carry(output: &Tensor, by_output: &Tensor, gradients: &mut GradStore) -> Result<()> {
    // The gradient of this sum by the output is the one carried, to the last bit.
    let mut further = (output * by_output)?.sum_all()?.backward()?;
    // candle has one by the other factor as well.
    further.remove(by_output);
    gradients.extend(further)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;

    use super::super::{ModelConfig, Packer, Regions};
    use super::*;

    /// A model of three layers, a batch of a text and a pair for it, and where their texts start.
    fn model_and_batch() -> (Unimo, PackedBatch, [usize; 2]) {
        let config = ModelConfig { grid: 2, region_feature: 3, layers: 3, ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let features: Vec<f32> = (0..12).map(|v| (v as f32 * 0.7).sin()).collect();
        let mut packer = Packer::new(&model);
        let text = packer.text(&[0, 7, 2], false);
        let pair = packer.pair(Regions::visible(&features), &[0, 9, 2]).texts[0];
        let batch = packer.finish(&Device::Cpu).unwrap();
        (model, batch, [text, pair])
    }

    /// Gradients by name of a loss that reads tokens (tied to their embeddings) and an embedding.
    fn gradients(model: &Unimo, batch: &PackedBatch, [text, pair]: [usize; 2]) -> BTreeMap<String, Vec<f32>> {
        let passed = model.forward(batch, None, Dropout::of(0.3, 5)).unwrap();
        assert_eq!(passed.kept.is_some(), model.checkpoints_activations() && passed.hidden.track_op());
        assert!(passed.kept.is_none() || passed.hidden.is_variable(), "activations hang on the hidden states");
        let words = model.language_loss(&model.rows(&passed.hidden, &[text, pair]).unwrap(), vec![7, 9], 0.1).unwrap();
        let embedding = model.text_embedding(batch, &passed.hidden, &[text]).unwrap();
        let loss = (words + embedding.narrow(1, 0, 3).unwrap().sum_all().unwrap()).unwrap();
        let found = passed.backward(model, batch, loss).unwrap();
        let of = |(name, var): (&String, &Var)| Some((name.clone(), found.get(var)?.flatten_all().unwrap().to_vec1().unwrap()));
        model.weights().iter().filter_map(of).collect()
    }

    #[test]
    fn gradients_are_those_of_a_pass_that_keeps_everything() {
        let (mut model, batch, texts) = model_and_batch();
        // Everything; the last layer and a head alone; no layer at all.
        for (trained, layers) in [(&[][..], 3), (&["layers.2.", "embed."][..], 1), (&["embed.", "temperature"][..], 0)] {
            model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
            model.set_activation_checkpointing(false);
            let expected = gradients(&model, &batch, texts);
            model.set_activation_checkpointing(true);
            let found = gradients(&model, &batch, texts);
            let of_layers = expected.keys().filter(|name| name.ends_with("attention.qkv.weight")).count();
            assert_eq!(of_layers, layers);
            assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
            for (name, expected) in expected {
                let largest = expected.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
                assert!(largest > 0.0, "{name} does not move");
                for (expected, found) in expected.iter().zip(&found[&name]) {
                    // The token embeddings' parts are summed in another order.
                    assert!((expected - found).abs() <= 1e-6 * largest, "{name}: {found} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn a_loss_that_reads_no_hidden_state_runs_no_layer_again() {
        let (mut model, batch, _) = model_and_batch();
        model.set_activation_checkpointing(true);
        let passed = model.forward(&batch, None, Dropout::OFF).unwrap();
        let gradients = passed.backward(&model, &batch, model.temperature().unwrap()).unwrap();
        let moved: Vec<&String> =
            model.weights().iter().filter(|(_, var)| gradients.get(var).is_some()).map(|(name, _)| name).collect();
        assert_eq!(moved, ["temperature"]);
    }
}
