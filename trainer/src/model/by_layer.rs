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
use super::Hidden;
#[cfg(any(feature = "cuda", test))]
use super::LAYER_NORM_EPS;
use super::computing::{Back, gradients_of};
use super::{Dropout, PackedBatch, Passed, Unimo};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::layers;
use crate::ops::{self, gradients};

/// What a forward pass keeps for a backward pass by layers.
pub(super) struct Kept {
    /// Where a gradient goes on from: what the layers were given, if it leads to what embeds the rows; features of regions, if a pass in
    /// kernels was given such.
    embedded: Option<Tensor>,
    layers: Layers,
}

/// Layers that the backward pass goes through. They end with the last layer.
enum Layers {
    /// Composed of candle's operators and ours, first to last, and what the last one gave.
    Composed(Vec<Layer>, Var),
    /// On the kernels for CUDA devices, which have left the hidden states.
    #[cfg(any(feature = "cuda", test))]
    InKernels,
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

    /// How often batches went through the layers on the kernels for CUDA devices, and how often as a recording of an earlier pass of the
    /// same shape.
    #[cfg(any(feature = "cuda", test))]
    #[must_use]
    pub fn passes_through_layers(&self) -> layers::Counts {
        self.runs.counts()
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
        Ok((hidden.as_tensor().clone(), Some(Kept { embedded, layers: Layers::Composed(layers, hidden) })))
    }

    /// The whole pass where the kernels for CUDA devices work.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn pass_in_kernels(
        &self,
        features: Option<&Tensor>,
        batch: &PackedBatch,
        dropout: Dropout,
    ) -> Result<(Hidden, Option<Kept>)> {
        fn all<const N: usize>(weight: impl FnMut(usize) -> Result<Tensor>) -> Result<[Tensor; N]> {
            let weights = (0..N).map(weight).collect::<Result<Vec<_>>>()?;
            weights.try_into().map_err(|_| candle_core::Error::Msg("another number of weights".into()))
        }
        let given = |number: usize| -> Result<layers::Given> {
            let weight = |i: usize| self.weight(&format!("layers.{number}.{}", layers::WEIGHTS[i])).cloned();
            Ok(layers::Given { weights: all(weight)?, seeds: Self::sites(number).map(|site| dropout.site(site)) })
        };
        let is_trained = |number: &usize| self.trained().any(|(name, _)| name.starts_with(&format!("layers.{number}.")));
        let embedding = layers::Embedding {
            texts: [Arc::clone(&batch.ids), Arc::clone(&batch.positions)],
            images: match (features, &batch.boxes) {
                (Some(features), Some(boxes)) => Some([features.contiguous()?, boxes.contiguous()?]),
                _ => None,
            },
            order: Arc::clone(&batch.order),
            weights: all(|i| self.weight(layers::EMBEDDING_WEIGHTS[i]).cloned())?,
            seed: dropout.site(0),
        };
        let features = embedding.images.as_ref().map(|[features, _]| features).filter(|features| features.track_op()).cloned();
        let numbers = 0..self.config.layers;
        let common = layers::Common {
            plan: Arc::clone(&batch.plan),
            heads: self.config.heads,
            eps: LAYER_NORM_EPS,
            rate: dropout.rate,
            precision: ops::precision(),
            first_kept: if embedding.is_tracked() { 0 } else { numbers.clone().find(is_trained).unwrap_or(numbers.end) },
            checkpointing: self.checkpoints_activations,
        };
        let layers = numbers.map(given).collect::<Result<_>>()?;
        let hidden = Hidden::of_pass(&self.runs, self.runs.forward(embedding, layers, common)?)?;
        let kept = hidden.is_tracked().then_some(Kept { embedded: features, layers: Layers::InKernels });
        Ok((hidden, kept))
    }
}

impl Passed {
    /// Gradients by variables of `loss`, a scalar that was computed of this pass. `batch` is what was passed through `model`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn backward(self, model: &Unimo, batch: &PackedBatch, loss: Tensor, by: &[Var]) -> Result<GradStore> {
        self.backward_by_layer(model, batch, vec![loss.into()], by, &mut |_, _| Ok(()))
    }

    /// As [`Self::backward`], of the sum of all that leads back. Of a pass that goes by layers, `complete` is told the number of each
    /// that it has left, the last first, and may take the gradients by that layer's variables: nothing is added to them any more.
    ///
    /// # Errors
    /// Those of candle and of `complete`.
    pub fn backward_by_layer(
        self,
        model: &Unimo,
        batch: &PackedBatch,
        backs: Vec<Back>,
        by: &[Var],
        complete: &mut dyn FnMut(usize, &mut GradStore) -> Result<()>,
    ) -> Result<GradStore> {
        let Self { hidden, features, dropout, kept } = self;
        let Some(Kept { embedded, layers }) = kept else { return Ok(gradients_of(backs, by)?.0) };
        drop(features);
        let (mut all, mut carried);
        match layers {
            Layers::Composed(layers, given) => {
                all = gradients_of(backs, by.iter().chain([&given]))?.0;
                carried = all.remove(&given);
                // The last hidden states are not read again.
                drop((hidden, given));
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
            Layers::InKernels => {
                let Some(hidden) = hidden.in_kernels() else { candle_core::bail!("a pass in kernels has left no hidden states") };
                let mut by_rows;
                (all, by_rows) = gradients_of(backs, by.iter().chain(&hidden.leaves()))?;
                by_rows.extend(hidden.gradients(&mut all)?);
                if by_rows.is_empty() {
                    return Ok(all);
                }
                let wanted: HashSet<TensorId> = by.iter().map(|var| var.id()).collect();
                let found = model.runs.backward(&hidden.pass, &by_rows, &mut |number, by_weights| {
                    for (part, gradient) in layers::WEIGHTS.into_iter().zip(by_weights) {
                        let weight = model.weight(&format!("layers.{number}.{part}"))?;
                        if let (Some(gradient), true) = (gradient, wanted.contains(&weight.id())) {
                            all.insert(weight, gradient);
                        }
                    }
                    complete(number, &mut all)
                })?;
                let Some(found) = found else { return Ok(all) };
                let mut by_embedding = GradStore::default();
                for (name, gradient) in layers::EMBEDDING_WEIGHTS.into_iter().zip(found.weights) {
                    let weight = model.weight(name)?;
                    if let (Some(gradient), true) = (gradient, wanted.contains(&weight.id())) {
                        by_embedding.insert(weight, gradient);
                    }
                }
                all.extend(by_embedding)?;
                carried = found.features;
            }
        }
        if let (Some(embedded), Some(gradient)) = (embedded, carried) {
            all.extend(gradients(ops::carrying(&embedded, &gradient)?, by)?)?;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests;
