//! Backward passes that go layer by layer. A layer's gradients are complete as soon as the pass has left it, so that ranks can sum them
//! while it goes on. With activation checkpointing, of every layer only the input is kept, and the backward pass computes the rest
//! again (Chen et al., arXiv 1604.06174).

#[cfg(any(feature = "cuda", test))]
use std::{collections::HashSet, sync::Arc};

#[cfg(any(feature = "cuda", test))]
use candle_core::TensorId;
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

#[cfg(any(feature = "cuda", test))]
use super::LAYER_NORM_EPS;
use super::{Dropout, PackedBatch, Passed, Unimo};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::layers;
use crate::ops::{self, gradients};

/// What a forward pass keeps for a backward pass by layers.
pub(super) struct Kept {
    /// What the layers were given, where a gradient goes on from it to what embeds the rows.
    embedded: Option<Tensor>,
    layers: Layers,
    /// What the last layer gave.
    hidden: Var,
}

/// Layers that the backward pass goes through. They end with the last layer.
enum Layers {
    /// Composed of candle's operators and ours, first to last.
    Composed(Vec<Layer>),
    /// On the kernels for CUDA devices.
    #[cfg(any(feature = "cuda", test))]
    InKernels(Box<dyn layers::Kept>),
}

/// One layer of a forward pass, cut off from those before and after it.
struct Layer {
    number: usize,
    input: Var,
    /// What it gave, with all that it was computed of; `None` where that was thrown away.
    output: Option<Tensor>,
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

    /// From now on, backward passes go layer by layer (`true`), as they do with activation checkpointing in any case, or candle's way
    /// through all at once (`false`, as a fresh model's do). Gradients are the same. Such a pass has to be taken back by
    /// [`Passed::backward`] or [`Passed::backward_by_layer`]; so has every pass on a CUDA device, where layers go no other way.
    pub fn set_backward_by_layer(&mut self, on: bool) {
        self.goes_by_layer = on;
    }

    /// Runs the layers over embedded rows `x`, `[rows, hidden]`; what they give is a leaf if anything is kept.
    pub(super) fn layers_apart(&self, mut x: Tensor, batch: &PackedBatch, dropout: Dropout) -> Result<(Tensor, Option<Kept>)> {
        let embedded = x.track_op().then(|| x.clone());
        let mut layers = Vec::new();
        for number in 0..self.config.layers {
            // Where nothing up to here is trained, there is nothing to come back for.
            let begin = format!("layers.{number}.");
            if layers.is_empty() && !x.track_op() && !self.trained().any(|(name, _)| name.starts_with(&begin)) {
                x = self.layer(number, &x, batch, dropout)?;
                continue;
            }
            let input = Var::from_tensor(&x.detach())?;
            let output = self.layer(number, input.as_tensor(), batch, dropout)?;
            x = output.detach();
            layers.push(Layer { number, input, output: (!self.checkpoints_activations).then_some(output) });
        }
        if layers.is_empty() {
            return Ok((x, None));
        }
        let hidden = Var::from_tensor(&x)?;
        Ok((hidden.as_tensor().clone(), Some(Kept { embedded, layers: Layers::Composed(layers), hidden })))
    }

    /// The same where the kernels for CUDA devices work.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn layers_in_kernels(&self, x: &Tensor, batch: &PackedBatch, dropout: Dropout) -> Result<(Tensor, Option<Kept>)> {
        let given = |number: usize| -> Result<layers::Given> {
            let mut weights = Vec::with_capacity(layers::WEIGHTS.len());
            for part in layers::WEIGHTS {
                weights.push(self.weight(&format!("layers.{number}.{part}"))?.clone());
            }
            let Ok(weights) = weights.try_into() else { candle_core::bail!("a layer of another number of weights") };
            Ok(layers::Given { weights, seeds: Self::sites(number).map(|site| dropout.site(site)) })
        };
        let is_trained = |number: &usize| self.trained().any(|(name, _)| name.starts_with(&format!("layers.{number}.")));
        let all = 0..self.config.layers;
        let common = layers::Common {
            plan: Arc::clone(&batch.plan),
            heads: self.config.heads,
            eps: LAYER_NORM_EPS,
            rate: dropout.rate,
            precision: ops::precision(),
            first_kept: if x.track_op() { 0 } else { all.clone().find(is_trained).unwrap_or(all.end) },
            checkpointing: self.checkpoints_activations,
        };
        let (hidden, kept) = layers::run(x, all.map(given).collect::<Result<_>>()?, common)?;
        let Some(kept) = kept else { return Ok((hidden, None)) };
        let hidden = Var::from_tensor(&hidden)?;
        let kept = Kept { embedded: x.track_op().then(|| x.clone()), layers: Layers::InKernels(kept), hidden };
        Ok((kept.hidden.as_tensor().clone(), Some(kept)))
    }
}

impl Passed {
    /// Gradients by variables of `loss`, a scalar that was computed of this pass. `batch` is what was passed through `model`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn backward(self, model: &Unimo, batch: &PackedBatch, loss: Tensor, by: &[Var]) -> Result<GradStore> {
        self.backward_by_layer(model, batch, loss, by, &mut |_, _| Ok(()))
    }

    /// As [`Self::backward`]. Of a pass that goes by layers, `complete` is told the number of each that it has left, the last first,
    /// and may take the gradients by that layer's variables: nothing is added to them any more.
    ///
    /// # Errors
    /// Those of candle and of `complete`.
    pub fn backward_by_layer(
        self,
        model: &Unimo,
        batch: &PackedBatch,
        loss: Tensor,
        by: &[Var],
        complete: &mut dyn FnMut(usize, &mut GradStore) -> Result<()>,
    ) -> Result<GradStore> {
        let Self { hidden, features, dropout, kept } = self;
        let Some(Kept { embedded, layers, hidden: given }) = kept else { return gradients(loss, by) };
        let mut all = gradients(loss, by.iter().chain([&given]))?;
        let mut carried = all.remove(&given);
        // The last hidden states are not read again.
        drop((hidden, features, given));
        match layers {
            Layers::Composed(layers) => {
                for Layer { number, input, output } in layers.into_iter().rev() {
                    let Some(gradient) = carried else { return Ok(all) };
                    let output = match output {
                        Some(output) => output,
                        None => model.layer(number, input.as_tensor(), batch, dropout)?,
                    };
                    all.extend(gradients(ops::carrying(&output, &gradient)?, by.iter().chain([&input]))?)?;
                    carried = all.remove(&input);
                    complete(number, &mut all)?;
                }
            }
            #[cfg(any(feature = "cuda", test))]
            Layers::InKernels(layers) => {
                let Some(gradient) = carried else { return Ok(all) };
                let wanted: HashSet<TensorId> = by.iter().map(|var| var.id()).collect();
                carried = layers.backward(&gradient, &mut |number, by_weights| {
                    for (part, gradient) in layers::WEIGHTS.into_iter().zip(by_weights) {
                        let weight = model.weight(&format!("layers.{number}.{part}"))?;
                        if let (Some(gradient), true) = (gradient, wanted.contains(&weight.id())) {
                            all.insert(weight, gradient);
                        }
                    }
                    complete(number, &mut all)
                })?;
            }
        }
        if let (Some(embedded), Some(gradient)) = (embedded, carried) {
            all.extend(gradients(ops::carrying(&embedded, &gradient)?, by)?)?;
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
    use crate::ops::Precision;
    use crate::ops::cuda::emulation::{computing_in, emulated};

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

    /// What may be trained, how many layers of it, and the last of the layers that the pass goes back to.
    const TRAINED: [(&[&str], usize, Option<usize>); 5] = [
        (&[], 3, Some(0)),
        (&["layers.2.", "embed."], 1, Some(2)),
        (&["layers.1."], 1, Some(1)),
        (&["text."], 0, Some(0)),
        (&["embed.", "temperature"], 0, None),
    ];

    /// Gradients by name of a loss that reads tokens (tied to their embeddings) and an embedding, and the layers that were said to be
    /// complete. Their gradients are those that they had then.
    fn by_name(model: &Unimo, batch: &PackedBatch, [text, pair]: [usize; 2]) -> (BTreeMap<String, Vec<f32>>, Vec<usize>) {
        let passed = model.forward(batch, None, Dropout::of(0.3, 5)).unwrap();
        let by_layer = model.checkpoints_activations || model.goes_by_layer || ops::cuda::works_on(&Device::Cpu);
        assert_eq!(passed.kept.is_some(), by_layer && passed.hidden.track_op());
        assert!(passed.kept.is_none() || passed.hidden.is_variable(), "activations hang on the hidden states");
        let words = model.language_loss(&model.rows(&passed.hidden, &[text, pair]).unwrap(), vec![7, 9], 0.1).unwrap();
        let embedding = model.text_embedding(batch, &passed.hidden, &[text]).unwrap();
        let loss = (words + embedding.narrow(1, 0, 3).unwrap().sum_all().unwrap()).unwrap();
        let by: Vec<Var> = model.weights().values().cloned().collect();
        let (mut left, mut taken) = (Vec::new(), GradStore::default());
        let mut complete = |layer: usize, all: &mut GradStore| {
            left.push(layer);
            for (_, var) in model.trained().filter(|(name, _)| name.starts_with(&format!("layers.{layer}."))) {
                taken.insert(var, all.remove(var).unwrap());
            }
            Ok(())
        };
        let mut found = passed.backward_by_layer(model, batch, loss, &by, &mut complete).unwrap();
        for var in &by {
            let Some(gradient) = taken.remove(var) else { continue };
            assert!(found.insert(var, gradient).is_none(), "what was complete goes on");
        }
        let of = |(name, var): (&String, &Var)| Some((name.clone(), found.get(var)?.flatten_all().unwrap().to_vec1().unwrap()));
        let named: BTreeMap<String, Vec<f32>> = model.weights().iter().filter_map(of).collect();
        assert_eq!(found.get_ids().count(), named.len(), "something else is kept");
        assert!(by.iter().filter_map(|var| found.get(var)).all(|gradient| !gradient.track_op()), "a graph is kept");
        (named, left)
    }

    #[test]
    fn gradients_are_those_of_a_pass_through_all_at_once() {
        let (mut model, batch, texts) = model_and_batch();
        for (trained, count, last) in TRAINED {
            model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
            model.set_activation_checkpointing(false);
            model.set_backward_by_layer(false);
            let (expected, left) = by_name(&model, &batch, texts);
            assert!(left.is_empty());
            let of_layers = expected.keys().filter(|name| name.ends_with("attention.qkv.weight")).count();
            assert_eq!(of_layers, count);
            for (recomputed, by_layer) in [(true, false), (false, true), (true, true)] {
                model.set_activation_checkpointing(recomputed);
                model.set_backward_by_layer(by_layer);
                let (found, left) = by_name(&model, &batch, texts);
                assert_eq!(left, last.map_or(Vec::new(), |last| (last..3).rev().collect()));
                assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{trained:?}");
                // The token embeddings' parts are summed in another order.
                assert_near(&expected, &found, 1e-6);
            }
        }
    }

    /// In units of each weight's largest gradient.
    fn assert_near(expected: &BTreeMap<String, Vec<f32>>, found: &BTreeMap<String, Vec<f32>>, tolerance: f32) {
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        for (name, expected) in expected {
            let largest = expected.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
            assert!(largest > 0.0, "{name} does not move");
            for (expected, found) in expected.iter().zip(&found[name]) {
                assert!((expected - found).abs() <= tolerance * largest, "{name}: {found} is not {expected}");
            }
        }
    }

    #[test]
    fn gradients_in_kernels_are_those_of_the_composed_layers() {
        let (mut model, batch, texts) = model_and_batch();
        for (trained, _, last) in TRAINED {
            model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
            model.set_activation_checkpointing(false);
            let (expected, _) = by_name(&model, &batch, texts);
            for recomputed in [false, true] {
                model.set_activation_checkpointing(recomputed);
                let (found, left) = emulated(1, || by_name(&model, &batch, texts));
                assert_eq!(left, last.map_or(Vec::new(), |last| (last..3).rev().collect()));
                // Sums of products in another order, through three layers.
                assert_near(&expected, &found, 2e-4);
            }
        }
    }

    /// What was stored in bf16 has nothing in its lower half, which products of rounded factors alone would leave there.
    #[test]
    fn layers_in_kernels_store_what_they_give_in_the_precision_of_their_products() {
        let (model, batch, _) = model_and_batch();
        for (precision, stored) in [(Precision::F32, false), (Precision::Bf16, true)] {
            let pass = || model.forward(&batch, None, Dropout::OFF).unwrap().hidden;
            let hidden = emulated(0, || computing_in(precision, pass)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(hidden.iter().all(|value| value.to_bits() & 0xffff == 0), stored, "{precision:?}");
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
