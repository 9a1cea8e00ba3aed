//! A step: its samples, drawn and packed into one or several chunks.

use std::collections::HashSet;

use anyhow::{Result, bail};
use rand::Rng;

use super::chunk::Chunk;
use super::draft::{Draft, Parts, Picture};
use super::masked_regions::MaskedRegions;
use super::{Orders, Source, shuffled};
use crate::model::{Packer, Unimo};
use crate::ops;
use crate::parallel::{Passes, share};
use crate::recipe::Recipe;
use crate::regions::alike;
use crate::seed;
use crate::vision::{Pictures, Vision};

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
    FurtherPair,
}

/// One step's samples, packed, with what each row has to predict.
pub struct StepBatch {
    pub(super) chunks: Vec<Chunk>,
    /// Which of the passes of all ranks they are.
    pub(super) passes: Passes,
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
        let further = further_pairs(recipe, source.corpus.pairs.len(), orders, step)?;
        let chunks = passes.own.clone().map(|chunk| {
            let rng = |stream: Stream, number: usize| {
                let of_step = seed::mix(recipe.seed ^ 0x5eed_0001 ^ ((stream as u64) << 32), step);
                seed::rng(seed::mix(of_step, number as u64))
            };
            let first = part(b.images, chunk).start;
            let pictures: Vec<Picture> = part(b.images, chunk)
                .map(|number| {
                    let pair = described_pair(recipe, source.corpus.pairs.len(), orders, step, number);
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
                statistics: model.statistics(),
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
            for i in part(b.contrast_pairs, chunk) {
                draft.further_pair(further[i], &mut rng(Stream::FurtherPair, i));
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
            // All that a pass is made of is on the device before it is learnt from.
            let Draft { packer, mut parts, records, .. } = draft;
            let device = model.device();
            let means = std::mem::take(&mut parts.further_means);
            let shape = (parts.further_text_rows.len(), model.config().region_feature);
            let records: Vec<&[f32]> = records.iter().map(Vec::as_slice).collect();
            let ((further_means, regions, pictures, packed), ahead) = ops::ahead(device, || {
                let further_means = (shape.0 > 0).then(|| ops::from_host(means, shape, device)).transpose()?;
                let regions = MaskedRegions::of(&parts.regions, recipe.weights.region_classes > 0.0, model, source.vision)?;
                let pictures = (!records.is_empty()).then(|| source.vision.place(&records, device)).transpose()?;
                anyhow::Ok((further_means, regions, pictures, packer.finish(device)?))
            })?;
            (parts.regions.features, parts.regions.probabilities) = Default::default();
            Ok(Chunk { ahead, packed, parts, further_means, regions, pictures })
        });
        Ok(Self { chunks: chunks.collect::<Result<_>>()?, passes: passes.clone(), pictures: b.images })
    }

    /// Rows of the packed chunks.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.packed.rows()).sum()
    }

    /// Floating-point operations of the step's matrix products, two for each multiplication: forward, and twice as many backward
    /// where what they belong to is trained. Poolings, projections and task heads, a few rows each, and captions drawn from the model
    /// are left out.
    #[must_use]
    pub fn operations(&self, model: &Unimo, vision: &Vision) -> f64 {
        let c = model.config();
        let (h, f) = (c.hidden as f64, c.feed_forward as f64);
        let trains = |parts: &[&str]| model.trained().any(|(name, _)| parts.iter().any(|part| name.starts_with(part)));
        let times = |trained: bool| if trained { 3.0 } else { 1.0 };
        let layers_train = trains(&["text.", "image.", "layers."]);
        let heads_train = layers_train || trains(&["lm.", "region."]);
        let (mut products, mut again, mut through_layers) = (0.0, 0.0, 0.0);
        for chunk in &self.chunks {
            let (rows, parts) = (chunk.packed.rows() as f64, &chunk.parts);
            let layers = c.layers as f64 * (rows * (4.0 * h * h + 2.0 * h * f) + 2.0 * h * chunk.packed.attended() as f64);
            let regions = chunk.packed.image_rows() as f64 * (c.region_feature + 5) as f64 * h;
            let pictures = chunk.pictures.as_ref().map_or(0, Pictures::count) as f64 * vision.multiplications();
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
            products += times(layers_train) * (layers + regions + pictures) + times(heads_train) * heads;
            again += layers + regions + pictures;
            through_layers += layers;
        }
        // What is contrasted over several chunks is encoded twice; without activations, the layers are run again.
        let encoded = if self.chunks.len() > 1 && self.contrasted() { again } else { 0.0 };
        let recomputed = if model.checkpoints_activations() && layers_train { through_layers } else { 0.0 };
        2.0 * (products + encoded + recomputed)
    }

    /// Whether anything is compared over chunks.
    fn contrasted(&self) -> bool {
        self.chunks.iter().any(|chunk| !chunk.parts.text_rows.is_empty() || chunk.further_means.is_some())
    }
}

/// The pair of a step's picture with a number.
fn described_pair(recipe: &Recipe, pairs: usize, orders: &mut Orders, step: u64, number: usize) -> usize {
    shuffled(recipe.seed, pairs, step * recipe.batch.images as u64 + number as u64, &mut orders.pairs)
}

/// The pairs that a step contrasts besides those of its pictures: the next ones in an order of their own, without the step's
/// pictures and without any twice. The step's pictures are those of the recipe without further pairs.
fn further_pairs(recipe: &Recipe, pairs: usize, orders: &mut Orders, step: u64) -> Result<Vec<usize>> {
    let b = &recipe.batch;
    if b.contrast_pairs == 0 {
        return Ok(Vec::new());
    }
    if pairs < b.images + b.contrast_pairs {
        bail!(
            "a step of {} images and {} contrast_pairs shows no picture twice: there are only {pairs} pictures with captions",
            b.images,
            b.contrast_pairs
        );
    }
    let mut taken: HashSet<usize> = (0..b.images).map(|number| described_pair(recipe, pairs, orders, step, number)).collect();
    let order = (step * b.contrast_pairs as u64..).map(|at| shuffled(recipe.seed ^ 0xc04f, pairs, at, &mut orders.further_pairs));
    Ok(order.filter(|pair| taken.insert(*pair)).take(b.contrast_pairs).collect())
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::chunk::{Encoded, Term};
    use super::super::comparison::Comparison;
    use super::super::members::Members;
    use super::super::tally::{CONTRAST, CROSS_MODAL};
    use super::super::testing::{six_scenes, source};
    use super::super::{Tally, Vocabulary};
    use super::*;
    use crate::model::{Dropout, ImageEmbedding, ModelConfig, RegionStatistics};
    use crate::parallel::Alone;

    fn recipe(batch: &str) -> Recipe {
        Recipe::from_toml(&format!("steps = 9\nviews = 2\n[batch]\n{batch}\n")).unwrap()
    }

    #[test]
    fn a_step_shows_no_picture_twice_and_its_further_pairs_go_by_the_step_alone() {
        let (plain, further) = (recipe("images = 3\ncaptions = 0"), recipe("images = 3\ncaptions = 0\ncontrast_pairs = 4"));
        let (pairs, mut orders, mut drawn) = (11, Orders::default(), vec![0; 11]);
        for step in 0..60 {
            let found = further_pairs(&further, pairs, &mut orders, step).unwrap();
            let own: Vec<usize> = (0..3).map(|i| described_pair(&further, pairs, &mut orders, step, i)).collect();
            let distinct: HashSet<usize> = found.iter().copied().collect();
            assert_eq!((found.len(), distinct.len()), (4, 4), "step {step}: {found:?}");
            assert!(own.iter().all(|pair| !distinct.contains(pair)), "step {step}: {found:?} beside {own:?}");
            // What a run that is resumed here draws, and the pictures of the recipe without further pairs.
            assert_eq!(found, further_pairs(&further, pairs, &mut Orders::default(), step).unwrap());
            let described = |i| described_pair(&plain, pairs, &mut Orders::default(), step, i);
            assert_eq!(own, (0..3).map(described).collect::<Vec<_>>());
            found.iter().for_each(|&pair| drawn[pair] += 1);
        }
        // 240 draws among 11 pictures: about 22 each.
        assert!(drawn.iter().all(|times| (14..=30).contains(times)), "{drawn:?}");
        // Exactly enough, and one too few.
        assert_eq!(further_pairs(&further, 7, &mut Orders::default(), 5).unwrap().len(), 4);
        let error = further_pairs(&further, 6, &mut Orders::default(), 5).unwrap_err().to_string();
        assert_eq!(
            error,
            "a step of 3 images and 4 contrast_pairs shows no picture twice: there are only 6 pictures with captions"
        );
    }

    #[test]
    fn further_pairs_are_known_by_their_mean_and_are_in_the_contrast_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, backbone, tokenizer) = six_scenes(folder.path(), 0);
        let image_embedding = ImageEmbedding::Pooled;
        let config =
            ModelConfig { vocabulary: tokenizer.vocabulary_size(), image_embedding, ..ModelConfig::named("pico").unwrap() };
        let width = config.region_feature;
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let deviation = (0..width).map(|i| 0.5 + (i % 7) as f32 / 4.0).collect();
        model.set_statistics(RegionStatistics { mean: vec![0.25; width], deviation }).unwrap();
        let (vision, vocabulary) = (Vision::new(backbone, 0, &Device::Cpu).unwrap(), Vocabulary::of(&tokenizer));
        let source = source(&corpus, &vision, &vocabulary);

        // Of every picture and view the mean of what is shown, as its record has it.
        let mut order = Orders::default();
        for (pair, view) in (0..6).flat_map(|pair| [(pair, 0), (pair, 1)]) {
            let standard = model.statistics().standardise(&corpus.pair_record(pair, view).values);
            let rows: Vec<&[f32]> = standard.chunks_exact(width).step_by(2).collect();
            let mut cell = 0;
            let mean = corpus.pair_mean(pair, view, model.statistics(), || {
                cell += 1;
                cell % 2 == 1
            });
            for (i, got) in mean.into_iter().enumerate() {
                let expected = rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / rows.len() as f64;
                // Sums of 25 numbers of order 10 in f32, standardised before or after.
                assert!((f64::from(got) - expected).abs() < 1e-4, "picture {pair}, view {view}, {i}: {got} is not {expected}");
            }
        }
        assert_eq!(corpus.pair_mean(0, 0, model.statistics(), || false), vec![0.0; width]);

        let recipe = Recipe::from_toml(
            "steps = 1\nviews = 2\n[batch]\nimages = 2\ncaptions = 0\ncontrast_captions = 2\ncontrast_pairs = 4\n\
             [weights]\ncross_modal = 1.0\n",
        )
        .unwrap();
        // Of a step nothing is left but gradients: a graph behind one would keep the activations of its chunk.
        for chunks in [1, 2] {
            let mut recipe = recipe.clone();
            recipe.batch.chunks = chunks;
            let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), 0).unwrap();
            let whole = Tally::of(&batch, &model, source.vision);
            let learnt = batch.learn(&model, &recipe, &source, Dropout::OFF, &whole, &Alone).unwrap();
            let moved: Vec<_> = model.weights().values().filter_map(|var| learnt.gradients.get(var)).collect();
            assert!(!moved.is_empty() && moved.iter().all(|gradient| !gradient.track_op()), "{chunks} chunks: a graph is kept");
            assert_eq!(learnt.gradients.get_ids().count(), moved.len(), "{chunks} chunks: something else is kept");
        }
        let batch = StepBatch::build(&model, &recipe, &source, &mut order, 0).unwrap();
        let [chunk] = batch.chunks.as_slice() else { panic!("one pass") };
        let means = chunk.further_means.as_ref().unwrap().to_vec2::<f32>().unwrap();
        let pairs = further_pairs(&recipe, 6, &mut Orders::default(), 0).unwrap();
        for (mean, pair) in means.iter().zip(pairs) {
            let views = [0, 1].map(|view| corpus.pair_mean(pair, view, model.statistics(), || true));
            assert!(views.contains(mean), "another picture than {pair}");
        }

        let passed = chunk.forward(&model, &source, Dropout::OFF).unwrap().passed;
        let encoded = chunk.encode(&passed, &model, &recipe).unwrap();
        let of = |kind: usize| -> Vec<Vec<f64>> {
            let rows = encoded.tensors[kind].as_ref().unwrap().to_vec2::<f32>().unwrap();
            rows.into_iter().map(|row| row.into_iter().map(f64::from).collect()).collect()
        };
        let temperature = f64::from(model.temperature().unwrap().to_scalar::<f32>().unwrap());
        let e = |a: &[f64], b: &[f64]| (a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / temperature).exp();
        let (images, texts) = ([of(0), of(5)].concat(), [of(1), of(6)].concat());
        let image_of_text = [0, 0, 1, 1, 2, 3, 4, 5];
        assert_eq!((images.len(), texts.len()), (6, 8));
        let mut expected = 0.0;
        for (i, image) in images.iter().enumerate() {
            let own = texts.iter().zip(image_of_text).filter(|(_, of)| *of == i).map(|(text, _)| e(image, text)).sum::<f64>();
            expected -= (own / texts.iter().map(|text| e(image, text)).sum::<f64>()).ln() / 12.0;
        }
        for (text, own) in texts.iter().zip(image_of_text) {
            expected -= (e(&images[own], text) / images.iter().map(|image| e(image, text)).sum::<f64>()).ln() / 16.0;
        }
        let loss = |encoded: &Encoded, members: &Members, name: &str| {
            let (width, temperature) = (model.config().embedding, model.log_temperature().unwrap());
            let comparison = Comparison::among(&Alone, encoded.detached(), members, width, model.device()).unwrap();
            let terms = comparison.terms(&recipe.weights, model.computing(), temperature).unwrap();
            terms.iter().map(Term::alone).find(|(of, _)| *of == name).unwrap().1
        };
        let members = batch.members(&recipe);
        // Exponentials of scores up to 14 in f32.
        let found = loss(&encoded, &members, CONTRAST);
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
        // The cross-modal contrast is that of the step without further pairs.
        let fewer = Encoded { tensors: [&encoded.tensors[..5], &[None, None]].concat().try_into().unwrap(), pending: None };
        let none_further = Members { further: 0, ..members.clone() };
        assert_eq!(loss(&encoded, &members, CROSS_MODAL), loss(&fewer, &none_further, CROSS_MODAL));
        assert_ne!(found, loss(&fewer, &none_further, CONTRAST));
    }
}
