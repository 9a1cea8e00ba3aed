//! What a step's passes teach together.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::chunk::{Chunk, Encoded, Forward, KINDS, together};
use super::comparison::Comparison;
use super::draft::Parts;
use super::learning::{Carrying, Learning, Learnt};
use super::members::Members;
use super::tally::{CONTRAST, Tally};
use super::{Source, StepBatch};
use crate::model::{Dropout, Unimo, gradients_of};
use crate::ops;
use crate::parallel::Collective;
use crate::parallel::gradients::{self, Early};
use crate::recipe::Recipe;
use crate::seed;

impl StepBatch {
    /// The step's losses and their gradients.
    ///
    /// With several chunks, memory holds the activations of one: embeddings are computed first and without activations kept, the
    /// contrasts' gradients by them are taken, and then each chunk is run again and carries its part of those gradients back
    /// together with its own losses (Gao et al., arXiv 2101.06983). The result is that of one large pass.
    ///
    /// With several ranks, each does this with its own passes, and losses and gradients are those of all together. `whole` is the
    /// tally of the whole step. The sums of gradients over the ranks begin while the last pass goes back.
    ///
    /// On a GPU no host waits for it here, or for another one, where these reach each other: losses are read later.
    ///
    /// # Errors
    /// Those of candle; a rank that is gone.
    pub fn learn(
        &self,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        dropout: Dropout,
        whole: &Tally,
        ranks: &dyn Collective,
    ) -> Result<Learnt> {
        let mut learnt = Learning::of(model, source.vision);
        let of_chunk = |i: usize| match self.passes.count {
            1 => dropout,
            _ => Dropout { seed: seed::mix(dropout.seed, (self.passes.own.start + i) as u64), ..dropout },
        };
        let encode = |i: usize, chunk: &Chunk| -> Result<(Forward, Encoded)> {
            let forward = chunk.forward(model, source, of_chunk(i))?;
            let encoded =
                if contrasted(recipe, whole) { chunk.encode(&forward.passed, model, recipe)? } else { Encoded::default() };
            Ok((forward, encoded))
        };
        let trained = (model, source.vision);
        let (mut carrying, mut kept) = (Carrying::default(), None);
        if contrasted(recipe, whole) {
            let mut first = Vec::new();
            for (i, chunk) in self.chunks.iter().enumerate() {
                let pass = encode(i, chunk)?;
                first.push(pass.1.detached());
                // The only pass need not be run again.
                kept = (self.chunks.len() == 1).then_some(pass);
            }
            carrying = Carrying::of(self.compare(&first, model, recipe, ranks, &mut learnt)?);
        }
        let mut layers = LayersLeft::of(model);
        let mut learn_passes = |early: Option<&Early>| -> Result<()> {
            for (i, chunk) in self.chunks.iter().enumerate() {
                let (forward, encoded) = kept.take().map_or_else(|| encode(i, chunk), Ok)?;
                let terms = chunk.local_terms(&forward.passed.hidden, model, recipe, source, whole)?;
                let carried = carrying.next(encoded)?;
                // The last pass completes a layer's gradients.
                let (Some(early), true) = (early, i + 1 == self.chunks.len()) else {
                    learnt.add(terms, carried, |backs, by| chunk.backward(forward, trained, backs, by, &mut |_, _| Ok(())))?;
                    continue;
                };
                let mut so_far = learnt.gradients.take();
                learnt.add(terms, carried, |backs, by| {
                    chunk.backward(forward, trained, backs, by, &mut |layer, all| {
                        layers.give_away_from(layer, [Some(&mut *all), so_far.as_mut()], early)
                    })
                })?;
                if let Some(so_far) = so_far {
                    learnt.add_gradients(so_far)?;
                }
            }
            // Layers that the last pass did not come to.
            let left = early.map(|early| layers.give_away_from(0, [learnt.gradients.as_mut(), None], early));
            Ok(left.transpose().map(|_| ())?)
        };
        if ranks.ranks() == 1 {
            learn_passes(None)?;
            let losses = learnt.losses()?;
            return Ok(Learnt { losses, gradients: learnt.gradients.context("the step has no objective")? });
        }
        let ((), mut summed) = gradients::all_reduce_while(ranks, |early| learn_passes(Some(early)))?;
        let losses = learnt.losses()?;
        // A rank may have nothing to learn from in a step: its gradients are zeros.
        let mut rest = match learnt.gradients {
            Some(gradients) => gradients,
            None => ops::gradients(model.temperature()?.affine(0.0, 0.0)?, &learnt.by)?,
        };
        gradients::all_reduce(ranks, layers.rest(model).chain(source.vision.weights().values()), &mut rest)?;
        summed.extend(rest)?;
        Ok(Learnt { losses, gradients: summed })
    }

    /// Compares what this rank's passes have encoded with each other and with what those of other ranks have; the gradients by it.
    fn compare(
        &self,
        passes: &[Encoded],
        model: &Unimo,
        recipe: &Recipe,
        ranks: &dyn Collective,
        learnt: &mut Learning,
    ) -> Result<[Option<Tensor>; KINDS]> {
        let members = self.members(recipe);
        let own = Encoded { tensors: together(passes)?, pending: None };
        let comparison = Comparison::among(ranks, own, &members, model.config().embedding, model.device())?;
        let mut by_leaf = GradStore::default();
        let terms = comparison.terms(&recipe.weights, model.computing(), model.log_temperature()?)?;
        learnt.add(terms, Vec::new(), |backs, by| {
            let (mut all, _) = gradients_of(backs, by.iter().chain(comparison.leaves()))?;
            for leaf in comparison.leaves() {
                if let Some(gradient) = all.remove(leaf) {
                    by_leaf.insert(leaf, gradient);
                }
            }
            Ok(all)
        })?;
        comparison.own_gradients(ranks, &mut by_leaf)
    }

    /// Whose samples this rank's passes encode for the contrasts.
    pub(super) fn members(&self, recipe: &Recipe) -> Members {
        let described = || self.chunks.iter().map(|chunk| &chunk.parts).filter(|parts| !parts.text_rows.is_empty());
        let all = |of: fn(&Parts) -> &Vec<usize>| described().flat_map(of).copied().collect();
        let crossed = recipe.weights.cross_modal > 0.0;
        let first = self.passes.own_share(recipe.batch.images).start;
        Members {
            images: first..first + described().map(|parts| parts.image_rows.len()).sum::<usize>(),
            image_of_text: all(|p| &p.image_of_text),
            retrieved_image_of: all(|p| &p.retrieved_image_of),
            retrieved_text_of: all(|p| &p.retrieved_text_of),
            joint_image_of: if crossed { all(|p| &p.match_image_of) } else { Vec::new() },
            joint_labels: described().filter(|_| crossed).flat_map(|parts| &parts.match_labels).copied().collect(),
            further: self.chunks.iter().map(|chunk| chunk.parts.further_text_rows.len()).sum(),
        }
    }
}

/// Whether a step compares anything.
fn contrasted(recipe: &Recipe, whole: &Tally) -> bool {
    whole.samples(CONTRAST) > 0.0 && recipe.weights.contrast + recipe.weights.cross_modal > 0.0
}

/// What the names of the layers' weights begin with.
const LAYERS: &str = "layers.";

/// The trained weights of each layer whose gradients are not yet given away to be summed.
struct LayersLeft(Vec<Vec<Var>>);

impl LayersLeft {
    fn of(model: &Unimo) -> Self {
        let of = |layer: usize| {
            let begin = format!("{LAYERS}{layer}.");
            model.trained().filter(|(name, _)| name.starts_with(&begin)).map(|(_, var)| var.clone()).collect()
        };
        Self((0..model.config().layers).map(of).collect())
    }

    /// Has the gradients of layers from `first` on summed, the last one's first, those that are in either store together.
    fn give_away_from(
        &mut self,
        first: usize,
        mut stores: [Option<&mut GradStore>; 2],
        early: &Early,
    ) -> candle_core::Result<()> {
        while self.0.len() > first {
            let layer = self.0.pop().unwrap_or_default();
            if layer.is_empty() {
                continue;
            }
            let mut gradients = GradStore::default();
            for store in stores.iter_mut().flatten() {
                let mut own = GradStore::default();
                for var in &layer {
                    if let Some(gradient) = store.remove(var) {
                        own.insert(var, gradient);
                    }
                }
                gradients.extend(own)?;
            }
            early.all_reduce(layer, gradients);
        }
        Ok(())
    }

    /// What is in no layer.
    fn rest<'a>(&self, model: &'a Unimo) -> impl Iterator<Item = &'a Var> {
        model.weights().iter().filter(|(name, _)| !name.starts_with(LAYERS)).map(|(_, var)| var)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;

    use super::super::testing::{six_scenes, source};
    use super::super::{Orders, Vocabulary};
    use super::*;
    use crate::model::{ImageEmbedding, ModelConfig, TextEmbedding};
    use crate::ops::cuda::emulation::emulated;
    use crate::ops::cuda::layers::Counts;
    use crate::parallel::Alone;
    use crate::vision::Vision;

    /// Loss and gradients by name of a step.
    fn learnt(
        batch: &StepBatch,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        dropout: Dropout,
    ) -> (f64, BTreeMap<String, Vec<f32>>) {
        let whole = Tally::of(batch, model, source.vision);
        let learnt = batch.learn(model, recipe, source, dropout, &whole, &Alone).unwrap();
        let values = learnt.losses.array().unwrap().to_vec1().unwrap();
        let (total, _) = learnt.losses.told(&values, &Alone).unwrap();
        let named = model.trained().chain(source.vision.weights()).filter_map(|(name, var)| {
            let gradient = learnt.gradients.get(var)?;
            assert!(!gradient.track_op(), "{name} keeps a graph");
            Some((name.clone(), gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
        });
        let named: BTreeMap<String, Vec<f32>> = named.collect();
        assert_eq!(learnt.gradients.get_ids().count(), named.len(), "something else is kept");
        (total, named)
    }

    /// Gradients may be off by a share of each one's length.
    fn assert_near(
        (loss, found): (f64, BTreeMap<String, Vec<f32>>),
        (expected_loss, expected): (f64, BTreeMap<String, Vec<f32>>),
        share: f32,
    ) {
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        assert!((loss - expected_loss).abs() < 1e-5 * expected_loss, "{loss} is not {expected_loss}");
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
        for (name, expected) in &expected {
            let off = norm(&mut found[name].iter().zip(expected).map(|(found, expected)| found - expected));
            let tolerance = share * norm(&mut expected.iter().copied()).max(1e-6);
            assert!(off <= tolerance, "{name}: off by {off}, and {tolerance} is right");
        }
    }

    /// On the kernels, candle's way back ends before the backbone, and is taken up there by passes that are recorded from the second
    /// on. With two chunks, pictures pass through it without a way back first, and then again.
    #[test]
    fn a_trained_backbone_learns_on_the_kernels_what_it_learns_on_the_cpu() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, backbone, tokenizer) = six_scenes(folder.path(), 1);
        let config = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        for chunks in [1, 2] {
            let vision = Vision::new(backbone.clone(), 1, &Device::Cpu).unwrap();
            let vocabulary = Vocabulary::of(&tokenizer);
            let source = source(&corpus, &vision, &vocabulary);
            let recipe =
                format!("steps = 2\nviews = 2\n[batch]\nimages = 3\nchunks = {chunks}\ncaptions = 1\ncontrast_captions = 1");
            let recipe = Recipe::from_toml(&recipe).unwrap();
            for step in 0..2 {
                let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), step).unwrap();
                let learn = || learnt(&batch, &model, &recipe, &source, Dropout::of(0.1, step));
                let (expected, found) = (learn(), emulated(0, learn));
                assert!(vision.weights().keys().all(|name| found.1.contains_key(name)), "the backbone does not learn");
                // Sums in another order; of the last layer's 125,000 results a few lie so near ReLU6's edges that it cuts one off here and
                // not there, which everything below it sees.
                assert_near(found, expected, 1e-2);
            }
            // With two chunks, of two pictures and of one.
            assert_eq!(vision.recorded(), chunks);
        }
    }

    /// Every objective but a task's and that of sampled captions, with everything trained, with heads alone, and with layers alone. From
    /// the second step on most of them are recorded.
    #[test]
    fn objectives_learn_on_the_kernels_what_they_learn_on_the_cpu() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, backbone, tokenizer) = six_scenes(folder.path(), 0);
        let (image_embedding, text_embedding) = (ImageEmbedding::Pooled, TextEmbedding::Both);
        let pico = ModelConfig::named("pico").unwrap();
        let config = ModelConfig { vocabulary: tokenizer.vocabulary_size(), layers: 1, image_embedding, text_embedding, ..pico };
        let (vision, vocabulary) = (Vision::new(backbone, 0, &Device::Cpu).unwrap(), Vocabulary::of(&tokenizer));
        let source = source(&corpus, &vision, &vocabulary);
        let heads = ["lm.", "embed.", "match.", "pool.", "region.", "temperature"].map(str::to_owned);
        let layers = ["layers.".to_owned()];
        // Encoding, both contrasts, words, matching and masked regions; of two chunks, both are encoded twice, and one has nothing
        // to match.
        for (trained, chunks, steps, computed) in
            [(&[][..], 1, 3, 6), (&[][..], 2, 2, 11), (&heads[..], 1, 2, 6), (&layers[..], 1, 2, 6)]
        {
            let mut model = Unimo::new(config.clone(), 1, &Device::Cpu).unwrap();
            model.train_only(trained).unwrap();
            let recipe = format!(
                "steps = 3\nviews = 2\n[batch]\nimages = 3\nchunks = {chunks}\ncaptions = 1\ncontrast_captions = 2\ncontrast_pairs = 2\n\
                 match_images = 2\nmatch_negatives = 1\nmasked_pairs = 2\n[weights]\ncross_modal = 0.7\n"
            );
            let recipe = Recipe::from_toml(&recipe).unwrap();
            for step in 0..steps {
                let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), step).unwrap();
                let learn = || learnt(&batch, &model, &recipe, &source, Dropout::of(0.1, step));
                assert_near(emulated(0, learn), learn(), 1e-4);
            }
            let Counts { passes, replayed, .. } = model.computing().counts();
            assert_eq!(passes, steps * computed, "{trained:?}, {chunks} chunks");
            assert!(replayed > 0, "{trained:?}, {chunks} chunks: nothing was replayed");
        }
    }
}
