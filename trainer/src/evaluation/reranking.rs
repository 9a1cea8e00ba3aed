//! Retrieval in two passes: what the embeddings find first is put in order by reading each candidate together with its query.

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;

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
    /// By its sum with the cosine over the contrast's temperature: both are logarithms of odds, up to a constant of the query.
    pub by_both: RecallScores,
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
            let mut packer = Packer::new(model);
            let rows: Vec<_> = pairs.iter().map(|pair| packer.pair(Regions::of(&record, &[]), texts[pair.text])).collect();
            let hidden = model.evaluate(&packer.finish(model.device())?)?;
            let rows_of = |row: &dyn Fn(usize) -> usize| model.rows(&hidden, &(0..rows.len()).map(row).collect::<Vec<_>>());
            let logits = model.match_logits(&rows_of(&|i| rows[i].image)?, &rows_of(&|i| rows[i].texts[0])?)?;
            for (pair, logit) in pairs.iter_mut().zip(logits.to_vec1::<f32>()?) {
                pair.logit = logit;
            }
        }
    }
    let temperature = model.temperature()?.to_scalar::<f32>()?;
    Ok(Reranked {
        candidates,
        by_matching: recall(&pairs, &embedded.image_of_text, |pair| pair.logit),
        by_both: recall(&pairs, &embedded.image_of_text, |pair| pair.logit + pair.cosine / temperature),
    })
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
            let pair = |(cosine, text)| Pair { text, of_text: false, of_image: true, cosine, logit: 0.0 };
            best(image, texts).into_iter().map(pair).collect()
        })
        .collect();
    for (text, found) in of_texts.into_iter().enumerate() {
        for (cosine, image) in found {
            match pairs[image].iter_mut().find(|pair| pair.text == text) {
                Some(pair) => pair.of_text = true,
                None => pairs[image].push(Pair { text, of_text: true, of_image: false, cosine, logit: 0.0 }),
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
    use super::*;
    use crate::metrics::recall_at_k;

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
    fn who_is_no_candidate_of_a_query_does_not_stand_before_its_answer() {
        let pair = |of_text, of_image, logit| Pair { text: 0, of_text, of_image, cosine: 0.0, logit };
        // The second picture has the text as a candidate; the text has not the picture.
        let pairs = [vec![pair(true, false, 0.0)], vec![pair(false, true, 5.0)]];
        let found = recall(&pairs, &[0], |pair| pair.logit);
        assert_eq!((found.text_to_image[0], found.image_to_text[2]), (1.0, 0.0));
    }
}
