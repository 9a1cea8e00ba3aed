//! A step that several ranks share out (see [`crate::parallel`]).

use anyhow::Result;

use super::chunk::together;
use super::learning::{Carrying, Learning};
use super::tally::{CONTRAST, CROSS_MODAL, Tally, sum_losses};
use super::{Learnt, Source, StepBatch};
use crate::model::{Dropout, Unimo};
use crate::parallel::contrast::{self, Own, Settings};
use crate::parallel::{Collective, gradients};
use crate::recipe::Recipe;
use crate::seed;

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
        let mut learnt = Learning::default();
        let of_chunk = |i: usize| Dropout { seed: seed::mix(dropout.seed, (self.first + i) as u64), ..dropout };
        let mut carrying = Carrying { gradients: Default::default(), at: [0; 5] };
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
            let members = self.members();
            let own = Own {
                encoded: &together(&first)?,
                image_of_text: &members.image_of_text,
                retrieved_image_of: &members.retrieved_image_of,
                retrieved_text_of: &members.retrieved_text_of,
                joint_image_of: &members.joint_image_of,
                joint_labels: &members.joint_labels,
            };
            let temperature = model.temperature()?;
            let settings = Settings {
                contrast: w.contrast,
                cross_modal: w.cross_modal,
                temperature: f64::from(temperature.to_scalar::<f32>()?),
                width: model.config().embedding,
            };
            let compared = contrast::compare(ranks, &own, &settings, model.device())?;
            for ((name, weight), loss) in [(CONTRAST, w.contrast), (CROSS_MODAL, w.cross_modal)].into_iter().zip(compared.losses)
            {
                if weight > 0.0 {
                    learnt.note(name, weight, loss);
                }
            }
            learnt.add(Vec::new(), Some((temperature * compared.by_temperature)?))?;
            carrying.gradients = compared.gradients;
        }
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
            learnt.add(terms, carrying.next(encoded)?)?;
        }
        let (total, losses) = learnt.losses()?;
        let (total, losses) = sum_losses(ranks, total, &losses)?;
        // A rank may have nothing to learn from in a step: its gradients are zeros.
        let mut summed = match learnt.gradients {
            Some(gradients) => gradients,
            None => model.temperature()?.affine(0.0, 0.0)?.backward()?,
        };
        let weights = model.weights().values().chain(source.vision.weights().values());
        gradients::all_reduce(ranks, weights, &mut summed)?;
        Ok(Learnt { total, losses, gradients: summed })
    }
}
