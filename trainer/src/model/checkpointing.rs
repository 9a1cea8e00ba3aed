//! Activation checkpointing: of every layer only the input is kept, and a backward pass computes the rest again, layer by layer
//! (Chen et al., arXiv 1604.06174).

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use super::{Dropout, PackedBatch, Passed, Unimo};
use crate::ops::gradients;

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
    /// Gradients by variables of `loss`, a scalar that was computed of this pass. `batch` is what was passed through `model`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn backward(self, model: &Unimo, batch: &PackedBatch, loss: Tensor, by: &[Var]) -> Result<GradStore> {
        let Self { hidden, features, dropout, kept } = self;
        let Some(Kept { embedded, layers, hidden: given }) = kept else { return gradients(loss, by) };
        let mut all = gradients(loss, by.iter().chain([&given]))?;
        let mut carried = all.remove(&given);
        // The last hidden states are not read again.
        drop((hidden, features, given));
        for (layer, input) in layers.into_iter().rev() {
            let Some(gradient) = carried else { return Ok(all) };
            let output = model.layer(layer, input.as_tensor(), batch, dropout)?;
            // The gradient of this sum by the output is the one carried, to the last bit.
            all.extend(gradients((output * gradient)?.sum_all()?, by.iter().chain([&input]))?)?;
            carried = all.remove(&input);
        }
        if let (Some(embedded), Some(gradient)) = (embedded, carried) {
            all.extend(gradients((embedded * gradient)?.sum_all()?, by)?)?;
        }
        Ok(all)
    }
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
    fn by_name(model: &Unimo, batch: &PackedBatch, [text, pair]: [usize; 2]) -> BTreeMap<String, Vec<f32>> {
        let passed = model.forward(batch, None, Dropout::of(0.3, 5)).unwrap();
        assert_eq!(passed.kept.is_some(), model.checkpoints_activations() && passed.hidden.track_op());
        assert!(passed.kept.is_none() || passed.hidden.is_variable(), "activations hang on the hidden states");
        let words = model.language_loss(&model.rows(&passed.hidden, &[text, pair]).unwrap(), vec![7, 9], 0.1).unwrap();
        let embedding = model.text_embedding(batch, &passed.hidden, &[text]).unwrap();
        let loss = (words + embedding.narrow(1, 0, 3).unwrap().sum_all().unwrap()).unwrap();
        let by: Vec<Var> = model.weights().values().cloned().collect();
        let found = passed.backward(model, batch, loss, &by).unwrap();
        let of = |(name, var): (&String, &Var)| Some((name.clone(), found.get(var)?.flatten_all().unwrap().to_vec1().unwrap()));
        let named: BTreeMap<String, Vec<f32>> = model.weights().iter().filter_map(of).collect();
        assert_eq!(found.get_ids().count(), named.len(), "something else is kept");
        assert!(by.iter().filter_map(|var| found.get(var)).all(|gradient| !gradient.track_op()), "a graph is kept");
        named
    }

    #[test]
    fn gradients_are_those_of_a_pass_that_keeps_everything() {
        let (mut model, batch, texts) = model_and_batch();
        // Everything; the last layer and a head alone; no layer at all.
        for (trained, layers) in [(&[][..], 3), (&["layers.2.", "embed."][..], 1), (&["embed.", "temperature"][..], 0)] {
            model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
            model.set_activation_checkpointing(false);
            let expected = by_name(&model, &batch, texts);
            model.set_activation_checkpointing(true);
            let found = by_name(&model, &batch, texts);
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
        let by: Vec<Var> = model.weights().values().cloned().collect();
        let found = passed.backward(&model, &batch, model.temperature().unwrap(), &by).unwrap();
        assert!(found.get_ids().count() == 1 && found.get(&model.weights()["temperature"]).is_some());
    }
}
