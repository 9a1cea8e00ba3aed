//! Retrieval in two passes: what the embeddings find first is put in order by reading each candidate together with its query.

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;
use unimo::lanes::log_sum_exp;
use unimo::reranking::score;

use crate::corpus::Corpus;
use crate::metrics::{RecallScores, recall_of_ranks};
use crate::model::{Packer, Regions, Unimo};
use crate::vision::Vision;

/// Pairs read in one forward pass.
const BATCH: usize = 64;

/// Recall after the second pass. A right answer that is not among the candidates is not found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Reranked {
    /// Answers to each query that the second pass reads.
    pub candidates: usize,
    /// By the matching logit alone.
    pub by_matching: RecallScores,
    /// By the likelihood of the text as the picture's caption together with the cosine, as `unimo search --rerank` does it. Of
    /// texts for a picture, each text's likelihood is divided by its mean over the pictures that it was read with: what is likely
    /// of any picture says little of one.
    pub by_likelihood: RecallScores,
}

/// Unit vectors of pictures and texts, and whose text is whose.
pub(super) struct Embedded {
    pub images: Vec<Vec<f32>>,
    pub texts: Vec<Vec<f32>>,
    pub image_of_text: Vec<usize>,
}

/// A picture and a text that one of them has as a candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pair {
    text: usize,
    /// Whether the picture is a candidate of the text, and the text one of the picture.
    of_text: bool,
    of_image: bool,
    cosine: f32,
    logit: f32,
    log_likelihood: f32,
}

/// Reads each of the `candidates` nearest answers to each picture and each text.
pub(super) fn rerank(
    model: &Unimo,
    vision: &Vision,
    corpus: &Corpus,
    embedded: &Embedded,
    candidates: usize,
) -> Result<Reranked> {
    let mut pairs = nearest(embedded, candidates);
    let texts: Vec<&Vec<u32>> = corpus.pairs[..embedded.images.len()].iter().flat_map(|pair| &pair.captions).collect();
    for (image, pairs) in pairs.iter_mut().enumerate() {
        let record = vision.regions(vec![corpus.pair_record(image, 0)])?.remove(0);
        for pairs in pairs.chunks_mut(BATCH) {
            let regions = Regions::of(&record, &[]);
            let read: Vec<&[u32]> = pairs.iter().map(|pair| texts[pair.text].as_slice()).collect();
            let (logits, likelihoods) = (matching(model, regions, &read)?, log_likelihoods(model, regions, &read)?);
            for (pair, (logit, log_likelihood)) in pairs.iter_mut().zip(logits.into_iter().zip(likelihoods)) {
                (pair.logit, pair.log_likelihood) = (logit, log_likelihood);
            }
        }
    }
    let of_text = mean_likelihoods(&pairs, texts.len());
    let image_of_text = &embedded.image_of_text;
    Ok(Reranked {
        candidates,
        by_matching: recall(&pairs, image_of_text, |pair| pair.logit),
        by_likelihood: RecallScores {
            text_to_image: recall(&pairs, image_of_text, |pair| score(pair.log_likelihood, pair.cosine)).text_to_image,
            image_to_text: recall(&pairs, image_of_text, |pair| score(pair.log_likelihood - of_text[pair.text], pair.cosine))
                .image_to_text,
        },
    })
}

/// Matching logits of a picture and each text.
fn matching(model: &Unimo, regions: Regions<'_>, texts: &[&[u32]]) -> Result<Vec<f32>> {
    let mut packer = Packer::new(model);
    let rows: Vec<_> = texts.iter().map(|ids| packer.pair(regions, ids)).collect();
    let hidden = model.evaluate(&packer.finish(model.device())?)?;
    let images: Vec<usize> = rows.iter().map(|rows| rows.image).collect();
    let texts: Vec<usize> = rows.iter().map(|rows| rows.texts[0]).collect();
    Ok(model.match_logits(&model.at_once(), &hidden.rows(&images)?, &hidden.rows(&texts)?)?.squeeze(1)?.to_vec1()?)
}

/// Logarithm of each text's probability as the picture's caption; texts are `[CLS] w1 … wn [SEP]`.
fn log_likelihoods(model: &Unimo, regions: Regions<'_>, texts: &[&[u32]]) -> Result<Vec<f32>> {
    let mut packer = Packer::new(model);
    let inputs: Vec<&[u32]> = texts.iter().map(|ids| &ids[..ids.len() - 1]).collect();
    let firsts = packer.image_with_captions(regions, &inputs).texts;
    let hidden = model.evaluate(&packer.finish(model.device())?)?;
    let rows: Vec<usize> = firsts.iter().zip(&inputs).flat_map(|(&first, ids)| first..first + ids.len()).collect();
    let logits = model.language_logits(&hidden.rows(&rows)?)?.to_vec2::<f32>()?;
    let targets: Vec<u32> = texts.iter().flat_map(|ids| &ids[1..]).copied().collect();
    let of_ids: Vec<f32> =
        logits.par_iter().zip(targets).map(|(logits, target)| logits[target as usize] - log_sum_exp(logits)).collect();
    let mut of_ids = of_ids.into_iter();
    Ok(inputs.iter().map(|ids| of_ids.by_ref().take(ids.len()).sum()).collect())
}

/// Logarithm of each text's mean likelihood over the pictures that it was read with; of a text that was read with none, −∞.
fn mean_likelihoods(pairs: &[Vec<Pair>], texts: usize) -> Vec<f32> {
    let mut of_texts = vec![Vec::new(); texts];
    pairs.iter().flatten().for_each(|pair| of_texts[pair.text].push(pair.log_likelihood));
    of_texts.iter().map(|read| log_sum_exp(read) - (read.len() as f32).ln()).collect()
}

/// Pairs of each picture, by their texts.
fn nearest(Embedded { images, texts, .. }: &Embedded, candidates: usize) -> Vec<Vec<Pair>> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let best = |query: &[f32], answers: &[Vec<f32>]| {
        let mut found: Vec<(f32, usize)> = answers.iter().enumerate().map(|(i, answer)| (dot(query, answer), i)).collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        found.truncate(candidates);
        found
    };
    let of_texts: Vec<_> = texts.par_iter().map(|text| best(text, images)).collect();
    let mut pairs: Vec<Vec<Pair>> = images
        .par_iter()
        .map(|image| {
            let pair = |(cosine, text)| Pair { text, of_text: false, of_image: true, cosine, logit: 0.0, log_likelihood: 0.0 };
            best(image, texts).into_iter().map(pair).collect()
        })
        .collect();
    for (text, found) in of_texts.into_iter().enumerate() {
        for (cosine, image) in found {
            match pairs[image].iter_mut().find(|pair| pair.text == text) {
                Some(pair) => pair.of_text = true,
                None => pairs[image].push(Pair { text, of_text: true, of_image: false, cosine, logit: 0.0, log_likelihood: 0.0 }),
            }
        }
    }
    pairs
}

/// Ties count against the model, as in [`recall_at_k`](crate::metrics::recall_at_k).
fn recall(pairs: &[Vec<Pair>], image_of_text: &[usize], score: impl Fn(&Pair) -> f32) -> RecallScores {
    // Not the negation of `>=`: a score that is no number counts as above.
    let below = |score: f32, best: f32| score < best;
    let image_rank = |(image, pairs): (usize, &Vec<Pair>)| {
        let candidates = || pairs.iter().filter(|pair| pair.of_image);
        let own = |pair: &&Pair| image_of_text[pair.text] == image;
        let best = candidates().filter(own).map(&score).reduce(f32::max)?;
        Some(candidates().filter(|pair| !own(pair) && !below(score(pair), best)).count())
    };
    let mut of_texts: Vec<Vec<(usize, f32)>> = vec![Vec::new(); image_of_text.len()];
    for (image, pairs) in pairs.iter().enumerate() {
        for pair in pairs.iter().filter(|pair| pair.of_text) {
            of_texts[pair.text].push((image, score(pair)));
        }
    }
    let text_rank = |(candidates, own): (&Vec<(usize, f32)>, &usize)| {
        let best = candidates.iter().find(|(image, _)| image == own)?.1;
        Some(candidates.iter().filter(|(image, score)| image != own && !below(*score, best)).count())
    };
    RecallScores {
        image_to_text: recall_of_ranks(&pairs.iter().enumerate().map(image_rank).collect::<Vec<_>>()),
        text_to_image: recall_of_ranks(&of_texts.iter().zip(image_of_text).map(text_rank).collect::<Vec<_>>()),
    }
}

#[cfg(test)]
mod tests {
    use unimo::tokenizer::{CLS, SEP};

    use super::*;
    use crate::metrics::recall_at_k;
    use crate::model::ModelConfig;

    fn vectors(count: usize, seed: usize) -> Vec<Vec<f32>> {
        // Multiplicative hashing, of which the upper bits look drawn.
        let number = |i: usize| ((i + seed * 1000).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..count).map(|i| (0..6).map(|d| number(i * 6 + d)).collect()).collect()
    }

    fn embedded() -> Embedded {
        let (images, texts) = (vectors(20, 1), vectors(60, 2));
        // The pictures' own texts are a little nearer than chance has it.
        let near = |text: usize| images[text / 3].iter().zip(&texts[text]).map(|(a, b)| a + 0.5 * b).collect();
        Embedded { texts: (0..60).map(near).collect(), images, image_of_text: (0..60).map(|t| t / 3).collect() }
    }

    #[test]
    fn ordered_by_the_cosine_again_the_recall_is_that_of_the_first_pass() {
        let embedded = embedded();
        let first = recall_at_k(&embedded.images, &embedded.texts, &embedded.image_of_text);
        assert!(first.text_to_image[0] > 0.1 && first.text_to_image[0] < 0.9, "{first:?}");
        let pairs = nearest(&embedded, 10);
        assert_eq!(recall(&pairs, &embedded.image_of_text, |pair| pair.cosine), first);
        // Of fewer candidates no more can be found than was among them.
        let five = recall(&nearest(&embedded, 5), &embedded.image_of_text, |pair| pair.cosine);
        assert_eq!((five.text_to_image[1], five.text_to_image[2]), (first.text_to_image[1], first.text_to_image[1]));
    }

    #[test]
    fn a_second_pass_that_knows_finds_every_right_candidate_first_and_one_that_does_not_none() {
        let embedded = embedded();
        let first = recall_at_k(&embedded.images, &embedded.texts, &embedded.image_of_text);
        let mut pairs = nearest(&embedded, 10);
        for (image, pairs) in pairs.iter_mut().enumerate() {
            pairs.iter_mut().for_each(|pair| pair.logit = f32::from(embedded.image_of_text[pair.text] == image));
        }
        let known = recall(&pairs, &embedded.image_of_text, |pair| pair.logit);
        assert_eq!(known.text_to_image, [first.text_to_image[2]; 3]);
        assert_eq!(known.image_to_text, [first.image_to_text[2]; 3]);
        for same in [0.0, f32::NAN] {
            assert_eq!(recall(&pairs, &embedded.image_of_text, |_| same).text_to_image[0], 0.0);
        }
    }

    #[test]
    fn likelihoods_are_those_of_a_text_alone_behind_the_picture() {
        let model = Unimo::new(ModelConfig::named("pico").unwrap(), 3, &candle_core::Device::Cpu).unwrap();
        let features: Vec<f32> = vectors(model.config().regions(), 5).concat();
        let features: Vec<f32> =
            features.into_iter().cycle().take(model.config().regions() * model.config().region_feature).collect();
        let texts: [&[u32]; 3] = [&[CLS, 9, 17, 5, SEP], &[CLS, 9, SEP], &[CLS, 30, 31, 32, 33, SEP]];
        let found = log_likelihoods(&model, Regions::visible(&features), &texts).unwrap();
        for (ids, found) in texts.iter().zip(found) {
            // The language model's mean loss, of one text in a batch of its own.
            let mut packer = Packer::new(&model);
            let first = packer.target_after(Some(Regions::visible(&features)), &[], &ids[..ids.len() - 1]);
            let hidden = model.evaluate(&packer.finish(model.device()).unwrap()).unwrap();
            let rows: Vec<usize> = (first..first + ids.len() - 1).collect();
            let loss = model.language_loss(&hidden.rows(&rows).unwrap(), ids[1..].to_vec(), 0.0).unwrap();
            let expected = -loss.to_scalar::<f32>().unwrap() * (ids.len() - 1) as f32;
            assert!((found - expected).abs() < 1e-3, "{ids:?}: {found} {expected}");
        }
    }

    #[test]
    fn a_texts_mean_is_over_the_pictures_that_it_was_read_with() {
        let pair = |text, log_likelihood| Pair { text, of_text: true, of_image: true, cosine: 0.0, logit: 0.0, log_likelihood };
        let means = mean_likelihoods(&[vec![pair(0, -2.0), pair(1, -5.0)], vec![pair(0, -3.0)]], 3);
        let expected = (((-2f64).exp() + (-3f64).exp()) / 2.0).ln();
        assert!((f64::from(means[0]) - expected).abs() < 1e-5 && (means[1] + 5.0).abs() < 1e-5, "{means:?}");
    }

    #[test]
    fn who_is_no_candidate_of_a_query_does_not_stand_before_its_answer() {
        let pair = |of_text, of_image, logit| Pair { text: 0, of_text, of_image, cosine: 0.0, logit, log_likelihood: 0.0 };
        // The second picture has the text as a candidate; the text has not the picture.
        let pairs = [vec![pair(true, false, 0.0)], vec![pair(false, true, 5.0)]];
        let found = recall(&pairs, &[0], |pair| pair.logit);
        assert_eq!((found.text_to_image[0], found.image_to_text[2]), (1.0, 0.0));
    }
}
