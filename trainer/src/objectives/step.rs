//! A step: its samples, drawn and packed into one or several chunks, and what they teach together.

use anyhow::Result;
use candle_core::{Tensor, Var};
use rand::Rng;

use super::chunk::{Chunk, Encoded, Term, together};
use super::draft::{Draft, Parts, Picture};
use super::learning::{Carrying, Learning, Learnt};
use super::members::Members;
use super::tally::{CONTRAST, CROSS_MODAL, Tally};
use super::{Orders, Source, contrastive_loss, cross_modal_contrast, shuffled};
use crate::model::{Dropout, Packer, Unimo};
use crate::parallel::{Collective, Passes, share};
use crate::recipe::Recipe;
use crate::regions::alike;
use crate::seed;
use crate::vision::Vision;

/// Tokens after which a sampled caption is cut off.
pub(super) const SAMPLED_TOKENS: usize = 20;

/// Streams of draws: what they decide, so that no two are alike.
#[derive(Clone, Copy)]
enum Stream {
    View = 1,
    Caption,
    Match,
    Masked,
    Fragments,
    Text,
    ImageAlone,
    Retrieved,
}

/// One step's samples, packed, with what each row has to predict.
pub struct StepBatch {
    pub(super) chunks: Vec<Chunk>,
    /// Number of the first of them among the passes of all ranks.
    pub(super) first: usize,
    /// Pictures in the step, for throughput.
    pub pictures: usize,
}

impl StepBatch {
    /// Draws and packs step `step` of a recipe.
    ///
    /// # Errors
    /// Those of candle.
    pub fn build(model: &Unimo, recipe: &Recipe, source: &Source, orders: &mut Orders, step: u64) -> Result<Self> {
        Self::build_own(model, recipe, source, orders, step, &Passes::all(&recipe.batch))
    }

    /// Draws and packs a rank's passes of step `step`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn build_own(
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        orders: &mut Orders,
        step: u64,
        passes: &Passes,
    ) -> Result<Self> {
        let b = &recipe.batch;
        let part = |count: usize, pass: usize| share(count, pass, passes.count);
        let chunks = passes.own.clone().map(|chunk| {
            let rng = |stream: Stream, number: usize| {
                let of_step = seed::mix(recipe.seed ^ 0x5eed_0001 ^ ((stream as u64) << 32), step);
                seed::rng(seed::mix(of_step, number as u64))
            };
            let first = part(b.images, chunk).start;
            let pictures: Vec<Picture> = part(b.images, chunk)
                .map(|number| {
                    let at = step * b.images as u64 + number as u64;
                    let pair = shuffled(recipe.seed, source.corpus.pairs.len(), at, &mut orders.pairs);
                    let view = rng(Stream::View, number).random_range(0..source.corpus.views(pair));
                    let record = source.corpus.pair_record(pair, view);
                    Picture { number, place: number - first, pair, view, record }
                })
                .collect();
            let records = match source.vision.trained_blocks() {
                0 => Vec::new(),
                _ => pictures.iter().map(|p| p.record.values.clone()).collect(),
            };
            let samples = sample(model, recipe, source, &pictures, step)?;
            let mut draft = Draft {
                packer: Packer::new(model),
                grid: model.config().grid,
                batch: b,
                source,
                parts: Parts::default(),
                records,
            };
            for (i, picture) in pictures.iter().enumerate() {
                let samples = &samples[i * b.sampled_captions..(i + 1) * b.sampled_captions];
                draft.generate_and_contrast(picture, samples, &mut rng(Stream::Caption, picture.number));
            }
            // Some objectives take the step's first pictures, some its last ones: with few of each they are not the same.
            let (number, last) = (|p: &&Picture| p.number, |p: &&Picture| b.images - 1 - p.number);
            for picture in pictures.iter().filter(|p| number(p) < b.match_images) {
                draft.match_pairs(picture, &mut rng(Stream::Match, picture.number));
            }
            for picture in pictures.iter().filter(|p| number(p) < b.retrieved_pairs) {
                draft.retrieved(picture, &mut rng(Stream::Retrieved, picture.number));
            }
            for picture in pictures.iter().filter(|p| last(p) < b.masked_pairs) {
                let words = (step + last(&picture) as u64).is_multiple_of(2);
                draft.masked_pair(picture, words, &mut rng(Stream::Masked, picture.number));
            }
            for picture in pictures.iter().filter(|p| last(p) < b.fragment_pairs) {
                draft.fragment_pair(picture, &mut rng(Stream::Fragments, picture.number));
            }
            let texts = b.texts + b.fragment_texts;
            for i in part(texts, chunk) {
                let at = step * texts as u64 + i as u64;
                let text = shuffled(recipe.seed ^ 0x7e87, source.corpus.texts.len(), at, &mut orders.texts);
                let (ids, rng) = (&source.corpus.texts[text], &mut rng(Stream::Text, i));
                match i.checked_sub(b.texts) {
                    None => draft.text(ids, i % 2 == 0, rng),
                    Some(_) => draft.fragments(None, ids, rng),
                }
            }
            if let Some(task) = source.task {
                for i in part(b.task_examples, chunk) {
                    let at = step * b.task_examples as u64 + i as u64;
                    let number = shuffled(recipe.seed ^ 0x7a5c, task.examples.len(), at, &mut orders.examples);
                    draft.task_example(number, &task.examples[number]);
                }
            }
            if let Some(writing) = source.writing {
                for i in part(b.task_examples, chunk) {
                    let at = step * b.task_examples as u64 + i as u64;
                    let number = shuffled(recipe.seed ^ 0x7a5c, writing.examples.len(), at, &mut orders.examples);
                    let (source, target) = &writing.examples[number];
                    draft.writing(source, target);
                }
            }
            for i in part(b.images_alone, chunk) {
                let at = step * b.images_alone as u64 + i as u64;
                let image = shuffled(recipe.seed ^ 0x1337, source.corpus.image_count(), at, &mut orders.images);
                let rng = &mut rng(Stream::ImageAlone, i);
                let record = source.corpus.image_record(image, rng.random_range(0..2));
                draft.masked_image(&record, rng);
            }
            Ok(Chunk { packed: draft.packer.finish(model.device())?, parts: draft.parts, records: draft.records })
        });
        Ok(Self { chunks: chunks.collect::<Result<_>>()?, first: passes.own.start, pictures: b.images })
    }

    /// Rows of the packed chunks.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.packed.rows()).sum()
    }

    /// Floating-point operations of the step's matrix products, two for each multiplication: forward, and twice as many backward.
    /// Poolings, projections and task heads, a few rows each, and captions drawn from the model are left out.
    #[must_use]
    pub fn operations(&self, model: &Unimo, vision: &Vision) -> f64 {
        let c = model.config();
        let (h, f) = (c.hidden as f64, c.feed_forward as f64);
        let (mut products, mut again) = (0.0, 0.0);
        for chunk in &self.chunks {
            let (rows, parts) = (chunk.packed.rows() as f64, &chunk.parts);
            let layers = c.layers as f64 * (rows * (4.0 * h * h + 2.0 * h * f) + 2.0 * h * chunk.packed.attended() as f64);
            let regions = chunk.packed.image_rows() as f64 * (c.region_feature + 5) as f64 * h;
            let pictures = chunk.records.len() as f64 * vision.multiplications();
            let generated = [
                &parts.captions,
                &parts.texts,
                &parts.fragments,
                &parts.written,
                &parts.masked_words,
                &parts.sampled.predictions,
            ];
            let predicted = generated.iter().map(|p| p.rows.len()).sum::<usize>() as f64;
            let heads = predicted * (h * h + h * c.vocabulary as f64)
                + parts.regions.rows.len() as f64 * h * (c.region_feature + c.region_classes) as f64;
            products += layers + regions + pictures + heads;
            again += layers + regions + pictures;
        }
        // What is contrasted over several chunks is encoded twice.
        let repeated = if self.chunks.len() > 1 && self.contrasted() { again } else { 0.0 };
        2.0 * (3.0 * products + repeated)
    }

    /// The step's losses and their gradients.
    ///
    /// With several chunks, memory holds the activations of one: embeddings are computed first and without activations kept, the
    /// contrasts' gradients by them are taken, and then each chunk is run again and carries its part of those gradients back
    /// together with its own losses (Gao et al., arXiv 2101.06983). The result is that of one large pass.
    ///
    /// With several ranks, each does this with its own passes, and losses and gradients are those of all together. `whole` is the
    /// tally of the whole step.
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
        if ranks.ranks() > 1 {
            return self.learn_among(model, recipe, source, dropout, whole, ranks);
        }
        let mut learnt = Learning::default();
        if let [chunk] = self.chunks.as_slice() {
            let passed = chunk.forward(model, source, dropout)?;
            let mut terms = chunk.local_terms(&passed.hidden, model, recipe, source, whole)?;
            terms.extend(self.contrast_terms(&chunk.encode(&passed, model, recipe)?, model, recipe)?);
            learnt.add(terms, None)?;
            return learnt.finish();
        }
        let contrasted = self.contrasted();
        let of_chunk = |i: usize| Dropout { seed: seed::mix(dropout.seed, i as u64), ..dropout };
        let mut first = Vec::new();
        for (i, chunk) in self.chunks.iter().enumerate().filter(|_| contrasted) {
            first.push(chunk.encode(&chunk.forward(model, source, of_chunk(i))?, model, recipe)?.detached());
        }
        let mut leaves: [Option<Var>; 5] = Default::default();
        for (leaf, tensor) in leaves.iter_mut().zip(together(&first)?) {
            *leaf = tensor.map(|tensor| Var::from_tensor(&tensor)).transpose()?;
        }
        let encoded = Encoded { tensors: leaves.clone().map(|leaf| leaf.map(|leaf| leaf.as_tensor().clone())) };
        let mut by_leaf: [Option<Tensor>; 5] = Default::default();
        let terms = self.contrast_terms(&encoded, model, recipe)?;
        if !terms.is_empty() {
            learnt.add(terms, None)?;
            let gradients = learnt.gradients.as_ref();
            by_leaf = leaves.each_ref().map(|leaf| gradients?.get(leaf.as_ref()?.as_tensor()).cloned());
        }
        let mut carrying = Carrying { gradients: by_leaf, at: [0; 5] };
        for (i, chunk) in self.chunks.iter().enumerate() {
            let passed = chunk.forward(model, source, of_chunk(i))?;
            let terms = chunk.local_terms(&passed.hidden, model, recipe, source, whole)?;
            learnt.add(terms, carrying.next(chunk.encode(&passed, model, recipe)?)?)?;
        }
        learnt.finish()
    }

    /// Whether anything is compared over chunks.
    fn contrasted(&self) -> bool {
        self.chunks.iter().any(|chunk| !chunk.parts.text_rows.is_empty())
    }

    /// Objectives that compare samples of all chunks.
    fn contrast_terms(&self, encoded: &Encoded, model: &Unimo, recipe: &Recipe) -> Result<Vec<Term>> {
        let [Some(images), Some(texts), retrieved_images, retrieved_texts, joint] = &encoded.tensors else {
            return Ok(Vec::new());
        };
        let w = &recipe.weights;
        let members = self.members();
        let temperature = model.temperature()?;
        let mut terms = Vec::new();
        if w.contrast > 0.0 {
            let loss = contrastive_loss(images, texts, &members.image_of_text, &temperature)?;
            terms.push(Term { name: CONTRAST, weight: w.contrast, share: 1.0, loss });
        }
        if w.cross_modal > 0.0 {
            let similarity =
                |images: &Tensor, texts: &Tensor| images.matmul(&texts.t()?)?.broadcast_div(&temperature)?.flatten_all();
            let mut scores = vec![similarity(images, texts)?];
            scores.extend(retrieved_images.as_ref().map(|found| similarity(found, texts)).transpose()?);
            scores.extend(retrieved_texts.as_ref().map(|found| similarity(images, found)).transpose()?);
            scores.extend(joint.clone());
            let loss = cross_modal_contrast(&Tensor::cat(&scores, 0)?, &members.contrasts())?;
            terms.push(Term { name: CROSS_MODAL, weight: w.cross_modal, share: 1.0, loss });
        }
        Ok(terms)
    }

    pub(super) fn members(&self) -> Members {
        let all = |of: fn(&Parts) -> &Vec<usize>| self.chunks.iter().flat_map(|c| of(&c.parts)).copied().collect();
        Members {
            images: self.chunks.iter().map(|c| c.parts.image_rows.len()).sum(),
            image_of_text: all(|p| &p.image_of_text),
            retrieved_image_of: all(|p| &p.retrieved_image_of),
            retrieved_text_of: all(|p| &p.retrieved_text_of),
            joint_image_of: all(|p| &p.match_image_of),
            joint_labels: self.chunks.iter().flat_map(|c| &c.parts.match_labels).copied().collect(),
        }
    }
}

/// Captions drawn from the model as it is, without dropout, `sampled_captions` of each picture.
fn sample(model: &Unimo, recipe: &Recipe, source: &Source, pictures: &[Picture], step: u64) -> Result<Vec<Vec<u32>>> {
    let each = recipe.batch.sampled_captions;
    if each == 0 || pictures.is_empty() {
        return Ok(Vec::new());
    }
    let records = source.vision.regions(pictures.iter().map(|p| p.record.clone()).collect())?;
    let of_step = seed::mix(recipe.seed ^ 0x5a3b_1e00, step);
    let mut samples = vec![Vec::new(); pictures.len() * each];
    for group in alike(&records, usize::MAX) {
        let encoded = model.encode_records(&group.iter().map(|&i| &records[i]).collect::<Vec<_>>())?;
        let seeds: Vec<u64> = group.iter().map(|&i| seed::mix(of_step, pictures[i].number as u64)).collect();
        let drawn = model.sample_captions(&encoded, each, SAMPLED_TOKENS, recipe.batch.sampling_temperature, &seeds)?;
        for (number, caption) in drawn.into_iter().enumerate() {
            samples[group[number / each] * each + number % each] = caption;
        }
    }
    Ok(samples)
}
