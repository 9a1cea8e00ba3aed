//! A step that several ranks share out (see [`crate::parallel`]).

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::chunk::{Encoded, KINDS, joined, rows, together};
use super::learning::{Carrying, Learning};
use super::tally::{CONTRAST, CROSS_MODAL, Tally, sum_losses};
use super::{Learnt, Source, StepBatch};
use crate::model::{Dropout, Unimo};
use crate::ops;
use crate::parallel::Collective;
use crate::parallel::contrast::{self, Own, Settings};
use crate::parallel::gradients::{self, Early};
use crate::recipe::Recipe;
use crate::seed;

/// What the names of the layers' weights begin with.
const LAYERS: &str = "layers.";

impl StepBatch {
    /// What [`StepBatch::learn`] gives, of this rank's passes together with those of the others.
    pub(super) fn learn_among(
        &self,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        dropout: Dropout,
        whole: &Tally,
        ranks: &dyn Collective,
    ) -> Result<Learnt> {
        let mut learnt = Learning::of(model, source.vision);
        let of_chunk = |i: usize| Dropout { seed: seed::mix(dropout.seed, (self.passes.own.start + i) as u64), ..dropout };
        let mut carrying = Carrying { gradients: Default::default(), at: [0; KINDS] };
        let mut kept = None;
        let w = &recipe.weights;
        if whole.samples(CONTRAST) > 0.0 && w.contrast + w.cross_modal > 0.0 {
            let mut first = Vec::new();
            for (i, chunk) in self.chunks.iter().enumerate() {
                let passed = chunk.forward(model, source, of_chunk(i))?;
                let encoded = chunk.encode(&passed, model, recipe)?;
                first.push(encoded.detached());
                // A rank's only pass need not be run again.
                kept = (self.chunks.len() == 1).then_some((passed, encoded));
            }
            carrying.gradients = self.compare(&first, model, recipe, ranks, &mut learnt)?;
        }
        let layers = of_layers(model);
        let (mut learnt, mut summed) = gradients::all_reduce_while(ranks, |early| {
            let mut layers_left = layers.as_slice();
            for (i, chunk) in self.chunks.iter().enumerate() {
                let (passed, encoded) = match kept.take() {
                    Some(both) => both,
                    None => {
                        let passed = chunk.forward(model, source, of_chunk(i))?;
                        let encoded = chunk.encode(&passed, model, recipe)?;
                        (passed, encoded)
                    }
                };
                let terms = chunk.local_terms(&passed.hidden, model, recipe, source, whole)?;
                // The last pass completes a layer's gradients.
                let last = i + 1 == self.chunks.len();
                let mut so_far = if last { learnt.gradients.take() } else { None };
                learnt.add(terms, carrying.next(encoded)?, |loss, by| {
                    passed.backward_by_layer(model, &chunk.packed, loss, by, &mut |layer, all| {
                        while last && layers_left.len() > layer {
                            give_away_last(&mut layers_left, [Some(&mut *all), so_far.as_mut()], early)?;
                        }
                        Ok(())
                    })
                })?;
                if let Some(so_far) = so_far {
                    learnt.add_gradients(so_far)?;
                }
            }
            // Layers that the last pass did not come to.
            while !layers_left.is_empty() {
                give_away_last(&mut layers_left, [learnt.gradients.as_mut(), None], early)?;
            }
            Ok(learnt)
        })?;
        let (total, losses) = learnt.losses()?;
        let (total, losses) = sum_losses(ranks, total, &losses)?;
        // A rank may have nothing to learn from in a step: its gradients are zeros.
        let mut rest = match learnt.gradients.take() {
            Some(gradients) => gradients,
            None => ops::gradients(model.temperature()?.affine(0.0, 0.0)?, &learnt.by)?,
        };
        let weights = model.weights().iter().filter(|(name, _)| !name.starts_with(LAYERS)).map(|(_, var)| var);
        gradients::all_reduce(ranks, weights.chain(source.vision.weights().values()), &mut rest)?;
        summed.extend(rest)?;
        Ok(Learnt { total, losses, gradients: summed })
    }

    /// Compares what this rank's passes have encoded with what those of the others have, notes the losses, and gives the gradients.
    fn compare(
        &self,
        passes: &[Encoded],
        model: &Unimo,
        recipe: &Recipe,
        ranks: &dyn Collective,
        learnt: &mut Learning,
    ) -> Result<[Option<Tensor>; KINDS]> {
        let members = self.members();
        let [images, texts, found_images, found_texts, joint, further_images, further_texts] = together(passes)?;
        let own = Own {
            encoded: &[images.clone(), texts.clone(), found_images, found_texts, joint],
            image_of_text: &members.image_of_text,
            retrieved_image_of: &members.retrieved_image_of,
            retrieved_text_of: &members.retrieved_text_of,
            joint_image_of: &members.joint_image_of,
            joint_labels: &members.joint_labels,
        };
        let (w, temperature) = (&recipe.weights, model.temperature()?);
        let divisor = f64::from(temperature.to_scalar::<f32>()?);
        let mut by_temperature = 0.0;
        let mut among = |own: &Own, [contrast, cross_modal]: [f64; 2]| -> Result<[Option<Tensor>; 5]> {
            let settings = Settings { contrast, cross_modal, temperature: divisor, width: model.config().embedding };
            let compared = contrast::compare(ranks, own, &settings, model.device())?;
            let weights = [(CONTRAST, contrast), (CROSS_MODAL, cross_modal)].into_iter().zip(compared.losses);
            weights.filter(|((_, weight), _)| *weight > 0.0).for_each(|((name, weight), loss)| learnt.note(name, weight, loss));
            by_temperature += compared.by_temperature;
            Ok(compared.gradients)
        };
        let mut gradients: [Option<Tensor>; KINDS] = Default::default();
        if recipe.batch.contrast_pairs == 0 {
            gradients[..5].clone_from_slice(&among(&own, [w.contrast, w.cross_modal])?);
        } else {
            // Further pairs are in the first contrast alone.
            if w.cross_modal > 0.0 {
                gradients[..5].clone_from_slice(&among(&own, [0.0, w.cross_modal])?);
            }
            let image_of_text = self.image_of_text(&members.image_of_text, recipe);
            let both = [joined(&images, &further_images)?, joined(&texts, &further_texts)?, None, None, None];
            let all = Own { image_of_text: &image_of_text, ..Own::separate(&both) };
            let by_both = among(&all, [w.contrast, 0.0])?;
            for (kind, (first, second)) in [(&images, &further_images), (&texts, &further_texts)].into_iter().enumerate() {
                let Some(gradient) = &by_both[kind] else { continue };
                let part = |at: usize, count: usize| (count > 0).then(|| gradient.narrow(0, at, count)).transpose();
                let (of_first, of_second) = (part(0, rows(first))?, part(rows(first), rows(second))?);
                gradients[kind] = sum(gradients[kind].take(), of_first)?;
                gradients[5 + kind] = of_second;
            }
        }
        learnt.add(Vec::new(), Some((temperature * by_temperature)?), |loss, by| ops::gradients(loss, by))?;
        Ok(gradients)
    }

    /// The picture of each of this rank's captions, the further ones last, where every rank's further pictures are numbered behind
    /// its others.
    fn image_of_text(&self, described: &[usize], recipe: &Recipe) -> Vec<usize> {
        let b = &recipe.batch;
        let further = self.passes.own_share(b.contrast_pairs);
        let others = if b.contrast_captions > 0 { self.passes.own_share(b.images).end } else { 0 };
        let described = described.iter().map(|image| image + further.start);
        described.chain(further.clone().map(|pair| others + pair)).collect()
    }
}

/// The trained weights of each layer.
fn of_layers(model: &Unimo) -> Vec<Vec<Var>> {
    let of = |layer: usize| {
        let begin = format!("{LAYERS}{layer}.");
        model.trained().filter(|(name, _)| name.starts_with(&begin)).map(|(_, var)| var.clone()).collect()
    };
    (0..model.config().layers).map(of).collect()
}

/// Has the last layer's gradients summed, those that are in either store together.
fn give_away_last(layers: &mut &[Vec<Var>], stores: [Option<&mut GradStore>; 2], early: &Early) -> candle_core::Result<()> {
    let Some((last, before)) = layers.split_last() else { return Ok(()) };
    *layers = before;
    if last.is_empty() {
        return Ok(());
    }
    let mut gradients = GradStore::default();
    for store in stores.into_iter().flatten() {
        let mut own = GradStore::default();
        for var in last {
            if let Some(gradient) = store.remove(var) {
                own.insert(var, gradient);
            }
        }
        gradients.extend(own)?;
    }
    early.all_reduce(last.clone(), gradients);
    Ok(())
}

fn sum(one: Option<Tensor>, other: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (one, other) {
        (Some(one), Some(other)) => Some((one + other)?),
        (one, other) => one.or(other),
    })
}
