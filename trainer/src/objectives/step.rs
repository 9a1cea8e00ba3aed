//! A step: its samples in one or several chunks, their losses and gradients.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use rand::Rng;

use super::draft::{Draft, Parts, Picture, Predictions};
use super::members::Members;
use super::tally::{CONTRAST, CROSS_MODAL, Tally};
use super::{Orders, Source, contrastive_loss, cross_modal_contrast, matching_loss, shuffled};
use super::{detected_labels, grid_labels, region_classification, region_regression};
use crate::model::{Dropout, PackedBatch, Packer, Unimo};
use crate::parallel::{Collective, Passes, share};
use crate::recipe::Recipe;
use crate::regions::alike;
use crate::seed;
use crate::tasks::task_loss;
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

/// One forward pass of a step.
pub(super) struct Chunk {
    packed: PackedBatch,
    pub(super) parts: Parts,
    /// Records of its pictures where the backbone is trained.
    records: Vec<Vec<f32>>,
}

/// One step's samples, packed, with what each row has to predict.
pub struct StepBatch {
    pub(super) chunks: Vec<Chunk>,
    /// Number of the first of them among the passes of all ranks.
    pub(super) first: usize,
    /// Pictures in the step, for throughput.
    pub pictures: usize,
}

/// What a step taught.
pub struct Learnt {
    /// The weighted sum of the losses.
    pub total: f64,
    /// Every objective's unweighted loss, by name. Objectives without samples are absent.
    pub losses: Vec<(&'static str, f64)>,
    /// Gradients of the weighted sum.
    pub gradients: GradStore,
}

/// An objective's loss in one forward pass.
pub(super) struct Term {
    name: &'static str,
    weight: f64,
    /// Share of the objective's samples that lie in this pass.
    share: f64,
    loss: Tensor,
}

/// What the contrasts compare; each absent where a chunk or step has none.
#[derive(Default, Clone)]
pub(super) struct Encoded {
    /// Unified-space embeddings `[n, embedding]` of pictures, captions, retrieved images and retrieved texts; then the matching
    /// logits `[n]` of jointly encoded pairs.
    pub(super) tensors: [Option<Tensor>; 5],
}

impl Encoded {
    pub(super) fn detached(&self) -> Self {
        Self { tensors: self.tensors.clone().map(|t| t.map(|t| t.detach())) }
    }
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
            let hidden = chunk.forward(model, source, dropout)?;
            let mut terms = chunk.local_terms(&hidden, model, recipe, source, whole)?;
            terms.extend(self.contrast_terms(&chunk.encode(&hidden, model, recipe)?, model, recipe)?);
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
            let hidden = chunk.forward(model, source, of_chunk(i))?;
            let terms = chunk.local_terms(&hidden, model, recipe, source, whole)?;
            learnt.add(terms, carrying.next(chunk.encode(&hidden, model, recipe)?)?)?;
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

impl Chunk {
    pub(super) fn forward(&self, model: &Unimo, source: &Source, dropout: Dropout) -> Result<Tensor> {
        let mut pictures = None;
        if !self.records.is_empty() {
            pictures = Some(source.vision.differentiable_regions(&self.records, model.device())?);
        }
        Ok(model.forward(&self.packed, pictures.as_ref(), dropout)?)
    }

    fn match_logits(&self, hidden: &Tensor, model: &Unimo) -> Result<Option<Tensor>> {
        let parts = &self.parts;
        if parts.match_labels.is_empty() {
            return Ok(None);
        }
        Ok(Some(model.match_logits(&model.rows(hidden, &parts.match_images)?, &model.rows(hidden, &parts.match_texts)?)?))
    }

    /// Objectives whose loss is a mean over samples, each in one chunk.
    pub(super) fn local_terms(
        &self,
        hidden: &Tensor,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        whole: &Tally,
    ) -> Result<Vec<Term>> {
        type Of = fn(&Parts) -> &Predictions;
        let (parts, w) = (&self.parts, &recipe.weights);
        let smoothing = w.label_smoothing as f32;
        let generated: [(&str, f64, f32, Of); 5] = [
            ("caption", w.caption, smoothing, |p| &p.captions),
            ("text", w.text, smoothing, |p| &p.texts),
            ("fragments", w.fragments, smoothing, |p| &p.fragments),
            ("writing", w.task, smoothing, |p| &p.written),
            ("masked_language", w.masked_language, 0.0, |p| &p.masked_words),
        ];
        let mut terms = Vec::new();
        let mut put = |name, weight, count: usize, loss| {
            terms.push(Term { name, weight, share: count as f64 / whole.samples(name), loss });
        };
        for (name, weight, smoothing, of) in generated {
            let Predictions { rows, targets } = of(parts);
            if !rows.is_empty() {
                let loss = model.language_loss(&model.rows(hidden, rows)?, targets.clone(), smoothing)?;
                put(name, weight, rows.len(), loss);
            }
        }
        let Predictions { rows, targets } = &parts.sampled.predictions;
        if !rows.is_empty() {
            let (advantages, temperature) = (parts.sampled.advantages.clone(), recipe.batch.sampling_temperature);
            let loss = model.policy_loss(&model.rows(hidden, rows)?, targets.clone(), advantages, temperature)?;
            put("self_critical", w.self_critical, rows.len(), loss);
        }
        if let Some(logits) = self.match_logits(hidden, model)? {
            let loss = matching_loss(&logits, &parts.match_labels)?;
            put("matching", w.matching, parts.match_labels.len(), loss);
        }
        if let (Some(task), false) = (source.task, parts.task_examples.is_empty()) {
            let logits = model.task_logits(hidden, &parts.task_images, &parts.task_texts)?;
            let targets: Vec<&[(u32, f32)]> = parts.task_examples.iter().map(|&i| task.examples[i].target.as_slice()).collect();
            let loss = task_loss(&logits, task.spec.goal, &targets)?;
            put("task", w.task, targets.len(), loss);
        }
        let regions = &parts.regions;
        if !regions.rows.is_empty() {
            let rows = model.rows(hidden, &regions.rows)?;
            let loss = region_regression(model, &rows, &regions.features)?;
            put("region_features", w.region_features, regions.rows.len(), loss);
            if w.region_classes > 0.0 {
                let labels = match model.config().detects() {
                    true => detected_labels(&regions.probabilities, model.config().region_classes, model.device())?,
                    false => grid_labels(source.vision.given()?, &regions.features, regions.rows.len(), model.device())?,
                };
                let loss = region_classification(model, &rows, &labels)?;
                put("region_classes", w.region_classes, regions.rows.len(), loss);
            }
        }
        Ok(terms)
    }

    pub(super) fn encode(&self, hidden: &Tensor, model: &Unimo, recipe: &Recipe) -> Result<Encoded> {
        let parts = &self.parts;
        if parts.text_rows.is_empty() {
            return Ok(Encoded::default());
        }
        let images = |rows: &[usize]| -> Result<Option<Tensor>> {
            Ok(if rows.is_empty() { None } else { Some(model.image_embedding(&model.rows(hidden, rows)?)?) })
        };
        let texts = |rows: &[usize]| -> Result<Option<Tensor>> {
            Ok(if rows.is_empty() { None } else { Some(model.text_embedding(&model.rows(hidden, rows)?)?) })
        };
        Ok(Encoded {
            tensors: [
                images(&parts.image_rows)?,
                texts(&parts.text_rows)?,
                images(&parts.retrieved_image_rows)?,
                texts(&parts.retrieved_text_rows)?,
                if recipe.weights.cross_modal > 0.0 { self.match_logits(hidden, model)? } else { None },
            ],
        })
    }
}

/// What several passes have encoded, one after the other.
pub(super) fn together(passes: &[Encoded]) -> Result<[Option<Tensor>; 5]> {
    let mut whole: [Option<Tensor>; 5] = Default::default();
    for (kind, whole) in whole.iter_mut().enumerate() {
        let tensors: Vec<&Tensor> = passes.iter().filter_map(|e| e.tensors[kind].as_ref()).collect();
        if !tensors.is_empty() {
            *whole = Some(Tensor::cat(&tensors, 0)?);
        }
    }
    Ok(whole)
}

/// Gradients by what passes encode, which these carry back pass by pass.
pub(super) struct Carrying {
    pub(super) gradients: [Option<Tensor>; 5],
    /// Rows of each that are done.
    pub(super) at: [usize; 5],
}

impl Carrying {
    /// What has these gradients by what the next pass has encoded.
    pub(super) fn next(&mut self, encoded: Encoded) -> Result<Option<Tensor>> {
        let mut carried: Option<Tensor> = None;
        for (kind, tensor) in encoded.tensors.into_iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            let (start, count) = (self.at[kind], tensor.dim(0)?);
            self.at[kind] += count;
            let Some(gradient) = &self.gradients[kind] else { continue };
            let product = (tensor * gradient.narrow(0, start, count)?)?.sum_all()?;
            carried = Some(match carried {
                Some(sum) => (sum + product)?,
                None => product,
            });
        }
        Ok(carried)
    }
}

/// Sums of a step's passes.
#[derive(Default)]
pub(super) struct Learning {
    /// Objective, weight, share and value of losses. Read at the end, all at once: to read one means to wait for the device.
    terms: Vec<(&'static str, f64, f64, Tensor)>,
    /// Objective, weight and value of those that are numbers already.
    known: Vec<(&'static str, f64, f64)>,
    pub(super) gradients: Option<GradStore>,
}

impl Learning {
    /// Takes the losses of one pass, and what it carries for the contrasts of all, and adds their gradients.
    pub(super) fn add(&mut self, terms: Vec<Term>, carried: Option<Tensor>) -> Result<()> {
        let mut sum = carried;
        for Term { name, weight, share, loss } in terms {
            self.terms.push((name, weight, share, loss.detach()));
            let weighted = loss.affine(weight * share, 0.0)?;
            sum = Some(match sum {
                Some(sum) => (sum + weighted)?,
                None => weighted,
            });
        }
        let Some(sum) = sum else { return Ok(()) };
        let gradients = sum.backward()?;
        match &mut self.gradients {
            Some(so_far) => so_far.extend(gradients)?,
            None => self.gradients = Some(gradients),
        }
        Ok(())
    }

    pub(super) fn note(&mut self, name: &'static str, weight: f64, value: f64) {
        self.known.push((name, weight, value));
    }

    /// The weighted sum of the losses, and each objective's.
    pub(super) fn losses(&self) -> Result<(f64, Vec<(&'static str, f64)>)> {
        let mut values = self.known.clone();
        if !self.terms.is_empty() {
            let tensors = self.terms.iter().map(|(.., loss)| loss).collect::<Vec<_>>();
            let read = Tensor::stack(&tensors, 0)?.to_vec1::<f32>()?;
            let terms = self.terms.iter().zip(read);
            values.extend(terms.map(|(&(name, weight, share, _), value)| (name, weight, f64::from(value) * share)));
        }
        let (mut total, mut losses) = (0.0, Vec::<(&str, f64)>::new());
        for (name, weight, value) in values {
            total += weight * value;
            match losses.iter_mut().find(|(known, _)| *known == name) {
                Some((_, so_far)) => *so_far += value,
                None => losses.push((name, value)),
            }
        }
        Ok((total, losses))
    }

    fn finish(self) -> Result<Learnt> {
        let (total, losses) = self.losses()?;
        let gradients = self.gradients.context("the step has no objective")?;
        Ok(Learnt { total, losses, gradients })
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
