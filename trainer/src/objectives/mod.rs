//! Pretraining and fine-tuning objectives on one packed forward pass.
//!
//! [`StepBatch::build`] draws a step's samples and packs them; [`StepBatch::losses`] reads every objective's loss off the
//! hidden states. Draws depend on the seed and the step alone.

mod contrastive;
mod masking;
mod self_critical;

use anyhow::Result;
use candle_core::{D, Tensor};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

pub use contrastive::{Contrast, contrastive_loss, cross_modal_contrast};
pub use masking::{Fragments, MaskedText, Vocabulary, mask_regions, mask_text, take_fragments};
pub use self_critical::Critic;

use crate::backbone::{Backbone, CLASSES, FEATURES};
use crate::corpus::Corpus;
use crate::model::{Dropout, Features, PackedBatch, Packer, Regions, Unimo};
use crate::ops::reference::log_softmax;
use crate::recipe::{BatchConfig, Recipe};
use crate::seed;
use crate::tfidf::TfIdfIndex;
use crate::vision::Vision;

/// Share of the regions that is masked.
const MASKED_REGIONS: f64 = 0.15;
/// Tokens after which a sampled caption is cut off.
const SAMPLED_TOKENS: usize = 20;

/// Rows that predict tokens.
#[derive(Default)]
struct Predictions {
    rows: Vec<usize>,
    targets: Vec<u32>,
}

impl Predictions {
    /// The rows of `ids[..len−1]`, starting at `first`, predict the token after them.
    fn next_tokens(&mut self, first: usize, ids: &[u32]) {
        self.rows.extend(first..first + ids.len() - 1);
        self.targets.extend(&ids[1..]);
    }

    fn masked(&mut self, first: usize, masked: &MaskedText) {
        for &(position, target) in &masked.targets {
            self.rows.push(first + position);
            self.targets.push(target);
        }
    }
}

/// Rows that predict sampled tokens, and how much better than its siblings each row's caption was.
#[derive(Default)]
struct Sampled {
    predictions: Predictions,
    advantages: Vec<f32>,
    rewards: Vec<f64>,
}

/// Masked regions: where they are and what they were.
#[derive(Default)]
struct RegionTargets {
    rows: Vec<usize>,
    features: Vec<f32>,
}

/// One step's samples, packed, with what each row has to predict.
pub struct StepBatch {
    packed: PackedBatch,
    captions: Predictions,
    sampled: Sampled,
    texts: Predictions,
    fragments: Predictions,
    masked_words: Predictions,
    regions: RegionTargets,
    image_rows: Vec<usize>,
    text_rows: Vec<usize>,
    image_of_text: Vec<usize>,
    match_images: Vec<usize>,
    match_texts: Vec<usize>,
    match_labels: Vec<f32>,
    match_image_of: Vec<usize>,
    /// Pictures in the step, for throughput.
    pub pictures: usize,
}

/// What a step draws from.
pub struct Source<'a> {
    /// Samples.
    pub corpus: &'a Corpus,
    /// Hard negatives; its texts are all pairs' captions in order.
    pub tfidf: Option<&'a TfIdfIndex>,
    /// First text in `tfidf` of each pair.
    pub first_text: &'a [usize],
    /// Makes region features of records, and the soft labels of masked regions.
    pub vision: &'a Vision,
    /// What masking has to know of the tokenizer.
    pub vocabulary: &'a Vocabulary,
    /// Rewards sampled captions.
    pub critic: Option<&'a Critic>,
}

/// Draws without replacement inside a pass: position `at` of the endless sequence of seeded permutations of `count` items.
fn shuffled(seed_value: u64, count: usize, at: u64, cache: &mut Option<(u64, Vec<u32>)>) -> usize {
    let pass = at / count as u64;
    if cache.as_ref().is_none_or(|(p, _)| *p != pass) {
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.shuffle(&mut seed::rng(seed::mix(seed_value, pass)));
        *cache = Some((pass, order));
    }
    cache.as_ref().map_or(0, |(_, order)| order[(at % count as u64) as usize] as usize)
}

/// Permutations in use, so that they are not made anew for every draw.
#[derive(Default)]
pub struct Orders {
    pairs: Option<(u64, Vec<u32>)>,
    images: Option<(u64, Vec<u32>)>,
    texts: Option<(u64, Vec<u32>)>,
}

struct Picture {
    /// Its place in the step.
    number: usize,
    pair: usize,
    view: usize,
    /// Region features with a frozen backbone, else what they are computed from.
    record: Vec<f32>,
}

impl StepBatch {
    /// Draws and packs step `step` of a recipe.
    ///
    /// # Errors
    /// Those of candle.
    pub fn build(model: &Unimo, recipe: &Recipe, source: &Source, orders: &mut Orders, step: u64) -> Result<Self> {
        let b = &recipe.batch;
        let mut rng = seed::rng(seed::mix(recipe.seed ^ 0x5eed_0001, step));
        let mut draft = Draft {
            packer: Packer::new(model),
            grid: model.config().grid,
            hidden_regions: b.hidden_regions,
            source,
            parts: Parts::default(),
        };
        let pictures: Vec<Picture> = (0..b.images)
            .map(|number| {
                let at = step * b.images as u64 + number as u64;
                let pair = shuffled(recipe.seed, source.corpus.pairs.len(), at, &mut orders.pairs);
                let view = rng.random_range(0..source.corpus.views(pair));
                Picture { number, pair, view, record: source.corpus.pair_record(pair, view) }
            })
            .collect();
        let mut seen = None;
        if source.vision.trained_blocks() > 0 && !pictures.is_empty() {
            let records: Vec<&[f32]> = pictures.iter().map(|p| p.record.as_slice()).collect();
            seen = Some(source.vision.differentiable_regions(&records, model.device())?);
        }
        let samples = sample(model, recipe, &pictures, seen.as_ref(), step)?;
        for (i, picture) in pictures.iter().enumerate() {
            let samples = &samples[i * b.sampled_captions..(i + 1) * b.sampled_captions];
            draft.generate_and_contrast(picture, samples, b, &mut rng);
        }
        for picture in pictures.iter().take(b.match_images) {
            draft.match_pairs(picture, b, &mut rng);
        }
        for (i, picture) in pictures.iter().rev().take(b.masked_pairs).enumerate() {
            draft.masked_pair(picture, (step + i as u64).is_multiple_of(2), &mut rng);
        }
        for picture in pictures.iter().rev().take(b.fragment_pairs) {
            draft.fragment_pair(picture, &mut rng);
        }
        for i in 0..b.texts + b.fragment_texts {
            let at = step * (b.texts + b.fragment_texts) as u64 + i as u64;
            let text = shuffled(recipe.seed ^ 0x7e87, source.corpus.texts.len(), at, &mut orders.texts);
            let ids = &source.corpus.texts[text];
            match i.checked_sub(b.texts) {
                None => draft.text(ids, i % 2 == 0, &mut rng),
                Some(_) => draft.fragments(None, ids, &mut rng),
            }
        }
        for i in 0..b.images_alone {
            let at = step * b.images_alone as u64 + i as u64;
            let image = shuffled(recipe.seed ^ 0x1337, source.corpus.image_count(), at, &mut orders.images);
            let features = source.corpus.image_record(image, rng.random_range(0..2));
            draft.masked_image(&features, &mut rng);
        }
        let Parts {
            captions,
            sampled,
            texts,
            fragments,
            masked_words,
            regions,
            image_rows,
            text_rows,
            image_of_text,
            match_images,
            match_texts,
            match_labels,
            match_image_of,
        } = draft.parts;
        Ok(Self {
            packed: draft.packer.finish_with(model.device(), seen.as_ref())?,
            captions,
            sampled,
            texts,
            fragments,
            masked_words,
            regions,
            image_rows,
            text_rows,
            image_of_text,
            match_images,
            match_texts,
            match_labels,
            match_image_of,
            pictures: b.images,
        })
    }

    /// Rows of the packed batch.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.packed.rows()
    }

    /// Mean reward of the step's sampled captions, if there are any.
    #[must_use]
    pub fn reward(&self) -> Option<f64> {
        let rewards = &self.sampled.rewards;
        (!rewards.is_empty()).then(|| rewards.iter().sum::<f64>() / rewards.len() as f64)
    }

    /// The losses of this step, unweighted, by name. Objectives without samples are absent.
    ///
    /// # Errors
    /// Those of candle.
    pub fn losses(
        &self,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        dropout: Dropout,
    ) -> Result<Vec<(&'static str, f64, Tensor)>> {
        let hidden = model.forward(&self.packed, dropout)?;
        let w = &recipe.weights;
        let smoothing = w.label_smoothing as f32;
        let mut losses = Vec::new();
        for (name, weight, predictions, smoothing) in [
            ("caption", w.caption, &self.captions, smoothing),
            ("text", w.text, &self.texts, smoothing),
            ("fragments", w.fragments, &self.fragments, smoothing),
            ("masked_language", w.masked_language, &self.masked_words, 0.0),
        ] {
            if !predictions.rows.is_empty() {
                let rows = model.rows(&hidden, &predictions.rows)?;
                losses.push((name, weight, model.language_loss(&rows, predictions.targets.clone(), smoothing)?));
            }
        }
        if !self.sampled.advantages.is_empty() {
            let Predictions { rows, targets } = &self.sampled.predictions;
            let rows = model.rows(&hidden, rows)?;
            let temperature = recipe.batch.sampling_temperature;
            let loss = model.policy_loss(&rows, targets.clone(), self.sampled.advantages.clone(), temperature)?;
            losses.push(("self_critical", w.self_critical, loss));
        }
        let mut separate = None;
        if !self.text_rows.is_empty() {
            let images = model.image_embedding(&model.rows(&hidden, &self.image_rows)?)?;
            let texts = model.text_embedding(&model.rows(&hidden, &self.text_rows)?)?;
            losses.push(("contrast", w.contrast, contrastive_loss(&images, &texts, &self.image_of_text, &model.temperature()?)?));
            separate = Some(images.matmul(&texts.t()?)?.broadcast_div(&model.temperature()?)?);
        }
        let mut joint = None;
        if !self.match_labels.is_empty() {
            let logits =
                model.match_logits(&model.rows(&hidden, &self.match_images)?, &model.rows(&hidden, &self.match_texts)?)?;
            losses.push(("matching", w.matching, matching_loss(&logits, &self.match_labels)?));
            joint = Some(logits);
        }
        if w.cross_modal > 0.0
            && let (Some(joint), Some(separate)) = (joint, separate)
        {
            let scores = Tensor::cat(&[joint, separate.flatten_all()?], 0)?;
            let contrasts = contrasts(&self.match_labels, &self.match_image_of, &self.image_of_text, self.image_rows.len());
            losses.push(("cross_modal", w.cross_modal, cross_modal_contrast(&scores, &contrasts)?));
        }
        if !self.regions.rows.is_empty() {
            let rows = model.rows(&hidden, &self.regions.rows)?;
            losses.push(("region_features", w.region_features, region_regression(model, &rows, &self.regions.features)?));
            if w.region_classes > 0.0 {
                let loss = region_classification(model, source.vision.given(), &rows, &self.regions.features)?;
                losses.push(("region_classes", w.region_classes, loss));
            }
        }
        Ok(losses)
    }
}

/// Captions drawn from the model as it is, without dropout, `sampled_captions` of each picture. `seen` holds the pictures' region
/// features where the backbone is trained; else their records are that.
fn sample(model: &Unimo, recipe: &Recipe, pictures: &[Picture], seen: Option<&Tensor>, step: u64) -> Result<Vec<Vec<u32>>> {
    let each = recipe.batch.sampled_captions;
    if each == 0 || pictures.is_empty() {
        return Ok(Vec::new());
    }
    let regions = match seen {
        Some(seen) => seen.detach(),
        None => {
            let features: Vec<f32> = pictures.iter().flat_map(|p| p.record.iter().copied()).collect();
            Tensor::from_vec(features, (pictures.len(), model.config().regions(), FEATURES), model.device())?
        }
    };
    let seed_value = seed::mix(recipe.seed ^ 0x5a3b_1e00, step);
    Ok(model.sample_captions(&regions, each, SAMPLED_TOKENS, recipe.batch.sampling_temperature, seed_value)?)
}

/// The contrast of every picture with captions: its own captions against rewritten and retrieved ones (encoded with the picture
/// `joint_image_of`; their scores come first) and against the other pictures and captions of the step (encoded alone,
/// `[images, texts]` behind them).
fn contrasts(joint_labels: &[f32], joint_image_of: &[usize], image_of_text: &[usize], images: usize) -> Vec<Contrast> {
    let place = |image: usize, text: usize| joint_labels.len() + image * image_of_text.len() + text;
    let of_image = |image: usize| {
        let mut contrast = Contrast::default();
        for (joint, _) in joint_image_of.iter().enumerate().filter(|&(_, &of)| of == image) {
            if joint_labels[joint] > 0.5 {
                contrast.positives.push(joint);
            } else {
                contrast.negatives.push(joint);
            }
        }
        for (text, &of) in image_of_text.iter().enumerate() {
            if of == image {
                contrast.positives.push(place(image, text));
                contrast.negatives.extend((0..images).filter(|&other| other != image).map(|other| place(other, text)));
            } else {
                contrast.negatives.push(place(image, text));
            }
        }
        contrast
    };
    (0..images).map(of_image).filter(|contrast| !contrast.positives.is_empty()).collect()
}

#[derive(Default)]
struct Parts {
    captions: Predictions,
    sampled: Sampled,
    texts: Predictions,
    fragments: Predictions,
    masked_words: Predictions,
    regions: RegionTargets,
    image_rows: Vec<usize>,
    text_rows: Vec<usize>,
    image_of_text: Vec<usize>,
    match_images: Vec<usize>,
    match_texts: Vec<usize>,
    match_labels: Vec<f32>,
    match_image_of: Vec<usize>,
}

struct Draft<'a> {
    packer: Packer<'a>,
    grid: usize,
    hidden_regions: f64,
    source: &'a Source<'a>,
    parts: Parts,
}

impl Draft<'_> {
    /// Where a picture's region features come from.
    fn features<'p>(&self, picture: &'p Picture) -> Features<'p> {
        match self.source.vision.trained_blocks() {
            0 => Features::Values(&picture.record),
            _ => Features::Picture(picture.number),
        }
    }

    /// Regions that the model is not shown this time: each with the recipe's probability.
    fn hidden(&self, rng: &mut ChaCha8Rng) -> Vec<usize> {
        if self.hidden_regions == 0.0 {
            return Vec::new();
        }
        (0..self.grid * self.grid).filter(|_| rng.random_bool(self.hidden_regions)).collect()
    }

    fn generate_and_contrast(&mut self, picture: &Picture, samples: &[Vec<u32>], batch: &BatchConfig, rng: &mut ChaCha8Rng) {
        let pair = &self.source.corpus.pairs[picture.pair];
        let mut order: Vec<usize> = (0..pair.captions.len()).collect();
        order.shuffle(rng);
        let all = pair.captions_for(picture.view);
        let chosen: Vec<&[u32]> = order.iter().take(batch.captions).map(|&c| all[c].as_slice()).collect();
        let inputs: Vec<&[u32]> =
            chosen.iter().copied().chain(samples.iter().map(Vec::as_slice)).map(|ids| &ids[..ids.len() - 1]).collect();
        let hidden = self.hidden(rng);
        let regions = Regions { features: self.features(picture), masked: &hidden };
        let rows = self.packer.image_with_captions(regions, &inputs);
        let (written, sampled) = rows.texts.split_at(chosen.len());
        for (&first, ids) in written.iter().zip(&chosen) {
            self.parts.captions.next_tokens(first, ids);
        }
        if let Some(critic) = self.source.critic {
            let parts = &mut self.parts.sampled;
            let rewards = critic.rewards(picture.pair, picture.view, samples);
            for ((&first, ids), advantage) in sampled.iter().zip(samples).zip(self_critical::advantages(&rewards)) {
                parts.predictions.next_tokens(first, ids);
                parts.advantages.resize(parts.predictions.rows.len(), advantage as f32);
            }
            parts.rewards.extend(rewards);
        }
        self.parts.image_rows.push(rows.image);
        for &c in order.iter().rev().take(batch.contrast_captions) {
            self.parts.text_rows.push(self.packer.text(&all[c], false));
            self.parts.image_of_text.push(picture.number);
        }
    }

    fn match_pairs(&mut self, picture: &Picture, batch: &BatchConfig, rng: &mut ChaCha8Rng) {
        let corpus = self.source.corpus;
        let pair = &corpus.pairs[picture.pair];
        let own = rng.random_range(0..pair.captions.len());
        let mut candidates = vec![(pair.captions_for(picture.view)[own].clone(), 1.0)];
        let near = self
            .source
            .tfidf
            .map(|index| index.hard_negatives(self.source.first_text[picture.pair] + own, 24))
            .unwrap_or_default();
        for k in 0..batch.match_negatives {
            // Every other negative is any caption at all: with near ones alone the head never learns what is far.
            let text = if k % 2 == 0 && !near.is_empty() {
                near[rng.random_range(0..near.len())]
            } else {
                self.any_other_text(picture.pair, rng)
            };
            let other = self.source.first_text.partition_point(|&first| first <= text) - 1;
            candidates.push((corpus.pairs[other].captions_for(picture.view)[text - self.source.first_text[other]].clone(), 0.0));
        }
        let rewritten = pair.rewrites_for(picture.view, own).choose_multiple(rng, batch.match_rewrites);
        candidates.extend(rewritten.map(|ids| (ids.clone(), 0.0)));
        let hidden = self.hidden(rng);
        for (ids, label) in candidates {
            let rows = self.packer.pair(Regions { features: self.features(picture), masked: &hidden }, &ids);
            self.parts.match_images.push(rows.image);
            self.parts.match_texts.push(rows.texts[0]);
            self.parts.match_labels.push(label);
            self.parts.match_image_of.push(picture.number);
        }
    }

    fn any_other_text(&self, pair: usize, rng: &mut ChaCha8Rng) -> usize {
        let pairs = &self.source.corpus.pairs;
        let mut other = rng.random_range(0..pairs.len());
        if other == pair {
            other = (other + 1) % pairs.len();
        }
        self.source.first_text[other] + rng.random_range(0..pairs[other].captions.len())
    }

    fn masked_pair(&mut self, picture: &Picture, words: bool, rng: &mut ChaCha8Rng) {
        let pair = &self.source.corpus.pairs[picture.pair];
        let ids = &pair.captions_for(picture.view)[rng.random_range(0..pair.captions.len())];
        if words {
            let masked = mask_text(ids, self.source.vocabulary, rng);
            let rows = self.packer.pair(Regions::visible(&picture.record), &masked.ids);
            self.parts.masked_words.masked(rows.texts[0], &masked);
        } else {
            let masked = mask_regions(self.grid, MASKED_REGIONS, rng);
            let rows = self.packer.pair(Regions::masked(&picture.record, &masked), ids);
            self.region_targets(rows.image, &picture.record, &masked);
        }
    }

    fn fragment_pair(&mut self, picture: &Picture, rng: &mut ChaCha8Rng) {
        let pair = &self.source.corpus.pairs[picture.pair];
        let ids = &pair.captions_for(picture.view)[rng.random_range(0..pair.captions.len())];
        self.fragments(Some(Regions { features: self.features(picture), masked: &[] }), ids, rng);
    }

    fn fragments(&mut self, regions: Option<Regions>, ids: &[u32], rng: &mut ChaCha8Rng) {
        let Fragments { source, target } = take_fragments(ids, self.source.vocabulary, rng);
        if target.len() > 1 {
            let first = self.packer.target_after(regions, &source, &target[..target.len() - 1]);
            self.parts.fragments.next_tokens(first, &target);
        }
    }

    fn masked_image(&mut self, features: &[f32], rng: &mut ChaCha8Rng) {
        let masked = mask_regions(self.grid, MASKED_REGIONS, rng);
        let rows = self.packer.image_with_captions(Regions::masked(features, &masked), &[]);
        self.region_targets(rows.image, features, &masked);
    }

    fn region_targets(&mut self, image_row: usize, features: &[f32], masked: &[usize]) {
        for &region in masked {
            self.parts.regions.rows.push(image_row + 1 + region);
            self.parts.regions.features.extend_from_slice(&features[region * FEATURES..(region + 1) * FEATURES]);
        }
    }

    fn text(&mut self, ids: &[u32], generate: bool, rng: &mut ChaCha8Rng) {
        if generate {
            let first = self.packer.text(&ids[..ids.len() - 1], true);
            self.parts.texts.next_tokens(first, ids);
        } else {
            let masked = mask_text(ids, self.source.vocabulary, rng);
            let first = self.packer.text(&masked.ids, false);
            self.parts.masked_words.masked(first, &masked);
        }
    }
}

/// Mean binary cross-entropy of matching logits `[n]` with labels 0 or 1, stable for large logits.
///
/// # Errors
/// Those of candle.
pub fn matching_loss(logits: &Tensor, labels: &[f32]) -> candle_core::Result<Tensor> {
    let labels = Tensor::new(labels, logits.device())?;
    // max(z, 0) − z·y + ln(1 + e^−|z|)
    let softplus = ((logits.abs()?.neg()?.exp()? + 1.0)?).log()?;
    (logits.relu()? - (logits * labels)? + softplus)?.mean_all()
}

/// Mean squared error of the masked regions' predicted features, standardised; `rows` is `[n, hidden]`, `features` `[n · 1292]`.
fn region_regression(model: &Unimo, rows: &Tensor, features: &[f32]) -> Result<Tensor> {
    let target = model.statistics().standardise(features);
    let target = Tensor::from_vec(target, (features.len() / FEATURES, FEATURES), rows.device())?;
    Ok((model.region_features(rows)? - target)?.sqr()?.mean_all()?)
}

/// Cross-entropy of the masked regions with the backbone's class distribution (its gradient is that of the
/// Kullback–Leibler divergence).
fn region_classification(model: &Unimo, backbone: &Backbone, rows: &Tensor, features: &[f32]) -> Result<Tensor> {
    let labels = Tensor::from_vec(backbone.classify(features)?, (features.len() / FEATURES, CLASSES), rows.device())?;
    let labels = log_softmax(&labels)?.exp()?.detach();
    let log_p = log_softmax(&model.region_logits(rows)?)?;
    Ok((labels * log_p)?.sum(D::Minus1)?.mean_all()?.neg()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_positives_and_everything_else_is_against_them() {
        // Two pictures with two captions and one; the first also read jointly with a caption of its own and a false one. Scores:
        // 0, 1 joint; 2, 3, 4 picture 0 with texts 0, 1, 2; 5, 6, 7 picture 1 with them.
        let found = contrasts(&[1.0, 0.0], &[0, 0], &[0, 0, 1], 2);
        let sorted = |mut places: Vec<usize>| {
            places.sort_unstable();
            places
        };
        let found: Vec<[Vec<usize>; 2]> = found.into_iter().map(|c| [sorted(c.positives), sorted(c.negatives)]).collect();
        assert_eq!(found, [[vec![0, 2, 3], vec![1, 4, 5, 6]], [vec![7], vec![4, 5, 6]]]);
    }
}
