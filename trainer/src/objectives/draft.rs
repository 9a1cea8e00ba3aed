//! Draws the samples of one chunk of a step and packs them, with notes of what each row has to predict.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::self_critical;
use super::{Fragments, MaskedText, Source, mask_detected, mask_regions, mask_text, take_fragments};
use crate::model::{Features, Packer, RegionStatistics, Regions};
use crate::recipe::BatchConfig;
use crate::regions::Record;
use crate::tasks::Example;

/// Share of the regions that is masked.
const MASKED_REGIONS: f64 = 0.15;

/// Rows that predict tokens.
#[derive(Default)]
pub(super) struct Predictions {
    pub rows: Vec<usize>,
    pub targets: Vec<u32>,
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
pub(super) struct Sampled {
    pub predictions: Predictions,
    pub advantages: Vec<f32>,
    pub rewards: Vec<f64>,
}

/// Masked regions: where they are and what they were.
#[derive(Default)]
pub(super) struct RegionTargets {
    pub rows: Vec<usize>,
    pub features: Vec<f32>,
    /// A detector's; of a grid, they are the backbone's of the features.
    pub probabilities: Vec<f32>,
}

/// A picture with captions, drawn for a step.
pub(super) struct Picture {
    /// Its number in the step.
    pub number: usize,
    /// Its place among the pictures of its chunk.
    pub place: usize,
    /// Which pair of the corpus.
    pub pair: usize,
    /// Which view of it.
    pub view: usize,
    /// Its regions, or with a trained backbone what they are computed from.
    pub record: Record,
}

/// What the rows of a chunk have to predict, and which of them are contrasted. Rows count from the start of the chunk, pictures
/// from the start of the step.
#[derive(Default)]
pub(super) struct Parts {
    /// Captions to write.
    pub captions: Predictions,
    /// Captions that the model drew.
    pub sampled: Sampled,
    /// Texts to write.
    pub texts: Predictions,
    /// Fragments to write.
    pub fragments: Predictions,
    /// Texts to write of other texts.
    pub written: Predictions,
    /// Masked words.
    pub masked_words: Predictions,
    /// Masked regions.
    pub regions: RegionTargets,
    /// `[IMG]` of each picture encoded alone.
    pub image_rows: Vec<usize>,
    /// `[CLS]` of each caption encoded alone, and its picture.
    pub text_rows: Vec<usize>,
    /// See `text_rows`.
    pub image_of_text: Vec<usize>,
    /// Means of the standardised features of pictures that are contrasted and nothing else, `[n · region_feature]`.
    pub further_means: Vec<f32>,
    /// `[CLS]` of a caption of each of these.
    pub further_text_rows: Vec<usize>,
    /// `[IMG]` of each image retrieved for a picture, and that picture.
    pub retrieved_image_rows: Vec<usize>,
    /// See `retrieved_image_rows`.
    pub retrieved_image_of: Vec<usize>,
    /// `[CLS]` of each text retrieved for a picture, and that picture.
    pub retrieved_text_rows: Vec<usize>,
    /// See `retrieved_text_rows`.
    pub retrieved_text_of: Vec<usize>,
    /// Examples of a downstream task: `[IMG]`s where they have pictures, `[CLS]`s, and which examples they are.
    pub task_images: Vec<usize>,
    /// See `task_images`.
    pub task_texts: Vec<usize>,
    /// See `task_images`.
    pub task_examples: Vec<usize>,
    /// `[IMG]` of each pair encoded jointly.
    pub match_images: Vec<usize>,
    /// `[CLS]` of each pair encoded jointly.
    pub match_texts: Vec<usize>,
    /// Whether they belong together.
    pub match_labels: Vec<f32>,
    /// Picture of each such pair.
    pub match_image_of: Vec<usize>,
}

/// A chunk in the making.
pub(super) struct Draft<'a> {
    /// Collects rows.
    pub packer: Packer<'a>,
    /// Cells along a side of the region grid.
    pub grid: usize,
    /// The recipe's batch.
    pub batch: &'a BatchConfig,
    /// How region features are standardised.
    pub statistics: &'a RegionStatistics,
    /// What is drawn from.
    pub source: &'a Source<'a>,
    /// What to predict.
    pub parts: Parts,
    /// Records of the pictures that are packed by their place; with a frozen backbone none are.
    pub records: Vec<Vec<f32>>,
}

impl Draft<'_> {
    /// Whether pictures are packed by their place, because their features are still to be computed.
    fn by_place(&self) -> bool {
        self.source.vision.trained_blocks() > 0
    }

    /// The regions of a picture of the step, some hidden.
    fn regions<'p>(&self, picture: &'p Picture, masked: &'p [usize]) -> Regions<'p> {
        self.regions_at(picture.place, &picture.record, masked)
    }

    /// The regions of a record that stands, where features are still to be computed, at a place among the chunk's.
    fn regions_at<'p>(&self, place: usize, record: &'p Record, masked: &'p [usize]) -> Regions<'p> {
        match self.by_place() {
            true => Regions { features: Features::Picture(place), boxes: None, masked },
            false => Regions::of(record, masked),
        }
    }

    /// Regions that the model is not shown this time: each with the recipe's probability.
    fn hidden(&self, record: &Record, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let share = self.batch.hidden_regions;
        if share == 0.0 {
            return Vec::new();
        }
        let regions = record.boxes().map_or(self.grid * self.grid, |boxes| boxes.len() / 5);
        (0..regions).filter(|_| rng.random_bool(share)).collect()
    }

    /// Regions to be told from what is around them.
    fn masked_regions(&self, record: &Record, rng: &mut ChaCha8Rng) -> Vec<usize> {
        match record.boxes() {
            Some(boxes) => mask_detected(boxes, MASKED_REGIONS, rng),
            None => mask_regions(self.grid, MASKED_REGIONS, rng),
        }
    }

    /// A text to be written of another.
    pub fn writing(&mut self, source: &[u32], target: &[u32]) {
        let first = self.packer.target_after(None, source, &target[..target.len() - 1]);
        self.parts.written.next_tokens(first, target);
    }

    /// An example of the downstream task.
    pub fn task_example(&mut self, number: usize, example: &Example) {
        self.parts.task_examples.push(number);
        let Some(image) = example.image else {
            self.parts.task_texts.push(self.packer.text(&example.ids, false));
            return;
        };
        // Pictures as they are: a mirrored one would need its question and its answer mirrored.
        let record = self.source.corpus.image_record(image, 0);
        let regions = self.regions_at(self.records.len(), &record, &[]);
        let rows = self.packer.pair(regions, &example.ids);
        self.parts.task_images.push(rows.image);
        self.parts.task_texts.push(rows.texts[0]);
        if self.by_place() {
            self.records.push(record.values);
        }
    }

    /// Images and texts retrieved for a picture, each encoded alone.
    pub fn retrieved(&mut self, picture: &Picture, rng: &mut ChaCha8Rng) {
        let corpus = self.source.corpus;
        let pair = &corpus.pairs[picture.pair];
        for &image in pair.retrieved_images().choose_multiple(rng, self.batch.retrieved_images) {
            // Views of images alone are plain or mirrored.
            let record = corpus.image_record(image, rng.random_range(0..2));
            let regions = self.regions_at(self.records.len(), &record, &[]);
            let rows = self.packer.image_with_captions(regions, &[]);
            self.parts.retrieved_image_rows.push(rows.image);
            self.parts.retrieved_image_of.push(picture.number);
            if self.by_place() {
                self.records.push(record.values);
            }
        }
        for ids in pair.retrieved_texts(picture.view).choose_multiple(rng, self.batch.retrieved_texts) {
            self.parts.retrieved_text_rows.push(self.packer.text(ids, false));
            self.parts.retrieved_text_of.push(picture.number);
        }
    }

    pub fn generate_and_contrast(&mut self, picture: &Picture, samples: &[Vec<u32>], rng: &mut ChaCha8Rng) {
        let batch = self.batch;
        let pair = &self.source.corpus.pairs[picture.pair];
        let mut order: Vec<usize> = (0..pair.captions.len()).collect();
        order.shuffle(rng);
        let all = pair.captions_for(picture.view);
        let chosen: Vec<&[u32]> = order.iter().take(batch.captions).map(|&c| all[c].as_slice()).collect();
        let inputs: Vec<&[u32]> =
            chosen.iter().copied().chain(samples.iter().map(Vec::as_slice)).map(|ids| &ids[..ids.len() - 1]).collect();
        let hidden = self.hidden(&picture.record, rng);
        let rows = self.packer.image_with_captions(self.regions(picture, &hidden), &inputs);
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

    /// A pair that is contrasted and nothing else.
    pub fn further_pair(&mut self, pair: usize, rng: &mut ChaCha8Rng) {
        let corpus = self.source.corpus;
        let view = rng.random_range(0..corpus.views(pair));
        let captions = corpus.pairs[pair].captions_for(view);
        let caption = &captions[rng.random_range(0..captions.len())];
        let hidden = self.batch.hidden_regions;
        let mean = corpus.pair_mean(pair, view, self.statistics, || hidden == 0.0 || !rng.random_bool(hidden));
        self.parts.further_means.extend(mean);
        self.parts.further_text_rows.push(self.packer.text(caption, false));
    }

    pub fn match_pairs(&mut self, picture: &Picture, rng: &mut ChaCha8Rng) {
        let batch = self.batch;
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
        let sentences = pair.sentences_for(picture.view, own).choose_multiple(rng, batch.match_sentences);
        candidates.extend(sentences.map(|ids| (ids.clone(), 0.0)));
        let paraphrases = pair.paraphrases_for(picture.view, own).choose_multiple(rng, batch.match_paraphrases);
        candidates.extend(paraphrases.map(|ids| (ids.clone(), 1.0)));
        let hidden = self.hidden(&picture.record, rng);
        for (ids, label) in candidates {
            let regions = self.regions(picture, &hidden);
            let rows = self.packer.pair(regions, &ids);
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

    pub fn masked_pair(&mut self, picture: &Picture, words: bool, rng: &mut ChaCha8Rng) {
        let pair = &self.source.corpus.pairs[picture.pair];
        let ids = &pair.captions_for(picture.view)[rng.random_range(0..pair.captions.len())];
        if words {
            let masked = mask_text(ids, self.source.vocabulary, rng);
            let rows = self.packer.pair(Regions::of(&picture.record, &[]), &masked.ids);
            self.parts.masked_words.masked(rows.texts[0], &masked);
        } else {
            let masked = self.masked_regions(&picture.record, rng);
            let rows = self.packer.pair(Regions::of(&picture.record, &masked), ids);
            self.region_targets(rows.image, &picture.record, &masked);
        }
    }

    pub fn fragment_pair(&mut self, picture: &Picture, rng: &mut ChaCha8Rng) {
        let pair = &self.source.corpus.pairs[picture.pair];
        let ids = &pair.captions_for(picture.view)[rng.random_range(0..pair.captions.len())];
        self.fragments(Some(self.regions(picture, &[])), ids, rng);
    }

    pub fn fragments(&mut self, regions: Option<Regions>, ids: &[u32], rng: &mut ChaCha8Rng) {
        let Fragments { source, target } = take_fragments(ids, self.source.vocabulary, rng);
        if target.len() > 1 {
            let first = self.packer.target_after(regions, &source, &target[..target.len() - 1]);
            self.parts.fragments.next_tokens(first, &target);
        }
    }

    pub fn masked_image(&mut self, record: &Record, rng: &mut ChaCha8Rng) {
        let masked = self.masked_regions(record, rng);
        let rows = self.packer.image_with_captions(Regions::of(record, &masked), &[]);
        self.region_targets(rows.image, record, &masked);
    }

    fn region_targets(&mut self, image_row: usize, record: &Record, masked: &[usize]) {
        let regions = record.boxes().map_or(self.grid * self.grid, |boxes| boxes.len() / 5);
        let row = |values: usize, region: usize| {
            let width = values / regions;
            region * width..(region + 1) * width
        };
        let targets = &mut self.parts.regions;
        for &region in masked {
            targets.rows.push(image_row + 1 + region);
            targets.features.extend_from_slice(&record.values[row(record.values.len(), region)]);
            if let Some(detected) = &record.detected {
                let own = &detected.probabilities[row(detected.probabilities.len(), region)];
                targets.probabilities.extend(own.iter().map(|half| half.to_f32()));
            }
        }
    }

    pub fn text(&mut self, ids: &[u32], generate: bool, rng: &mut ChaCha8Rng) {
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

#[cfg(test)]
mod tests;
