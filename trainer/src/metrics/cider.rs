//! CIDEr-D (Vedantam et al., CVPR 2015): clipped TF-IDF similarity of n-grams, with a penalty on length.

use std::collections::HashMap;

use super::ngrams::{LONGEST, Ngram, NgramCounts, WordIds};
use super::tokenise;
use rayon::prelude::*;

/// Width of the Gaussian penalty on the difference in length.
const SIGMA: f64 = 6.0;

/// Stands behind the last word of every reference: without it, a caption that stops in the middle of a phrase ("a dog with a")
/// would be rewarded like a finished one.
const END: &str = "</s>";

/// How many images' references hold each n-gram.
#[derive(Debug, Default)]
struct DocumentFrequency {
    holding: HashMap<Ngram, u64>,
    images: u64,
}

impl DocumentFrequency {
    fn of(references: &[Vec<NgramCounts>]) -> Self {
        let mut frequency = Self::default();
        for captions in references {
            frequency.add(captions);
        }
        frequency
    }

    /// Counts one more image's references.
    fn add(&mut self, captions: &[NgramCounts]) {
        for n in 0..LONGEST {
            let mut distinct: Vec<&Ngram> = captions.iter().flat_map(|c| c.order(n).keys()).collect();
            distinct.sort_unstable();
            distinct.dedup();
            for ngram in distinct {
                *self.holding.entry(ngram.clone()).or_default() += 1;
            }
        }
        self.images += 1;
    }

    /// An n-gram that no reference holds counts as held by one.
    fn inverse(&self, ngram: &Ngram) -> f64 {
        let holding = self.holding.get(ngram).copied().unwrap_or(1).max(1);
        (self.images as f64).ln() - (holding as f64).ln()
    }

    fn weigh<'a>(&self, counts: &'a NgramCounts) -> Weights<'a> {
        let mut weights = Weights::default();
        for n in 0..LONGEST {
            // In the order of the n-grams, so that sums do not depend on the hash map's order.
            let mut ngrams: Vec<_> = counts.order(n).iter().collect();
            ngrams.sort_unstable();
            for (ngram, &count) in ngrams {
                let weight = count as f64 * self.inverse(ngram);
                weights.norms[n] += weight * weight;
                weights.orders[n].push((ngram, weight));
            }
            weights.norms[n] = weights.norms[n].sqrt();
        }
        // The penalty compares numbers of bigrams, as the reference implementation does.
        weights.length = counts.words().saturating_sub(1) as f64;
        weights
    }

    /// Ten times the mean similarity of one caption to its references.
    fn score(&self, candidate: &NgramCounts, references: &[NgramCounts]) -> f64 {
        let candidate = self.weigh(candidate);
        let sum: f64 = references.iter().map(|r| similarity(&candidate, &self.weigh(r))).sum();
        10.0 * sum / references.len().max(1) as f64
    }
}

/// TF-IDF vectors of one caption, one for each order, sorted by n-gram.
#[derive(Default)]
struct Weights<'a> {
    orders: [Vec<(&'a Ngram, f64)>; LONGEST],
    norms: [f64; LONGEST],
    length: f64,
}

fn similarity(candidate: &Weights, reference: &Weights) -> f64 {
    let difference = candidate.length - reference.length;
    let penalty = (-difference * difference / (2.0 * SIGMA * SIGMA)).exp();
    let orders = (0..LONGEST).map(|n| {
        let norm = candidate.norms[n] * reference.norms[n];
        if norm == 0.0 {
            return 0.0;
        }
        let weight = |ngram: &Ngram| {
            let vector = &reference.orders[n];
            vector.binary_search_by(|(other, _)| (*other).cmp(ngram)).map_or(0.0, |at| vector[at].1)
        };
        let clipped = |&(ngram, own): &(&Ngram, f64)| {
            let other = weight(ngram);
            own.min(other) * other
        };
        candidate.orders[n].iter().map(clipped).sum::<f64>() / norm
    });
    penalty * orders.sum::<f64>() / LONGEST as f64
}

/// Mean of the images' scores.
pub(super) fn cider(candidates: &[NgramCounts], references: &[Vec<NgramCounts>]) -> f64 {
    let frequency = DocumentFrequency::of(references);
    let scores = candidates.iter().zip(references).map(|(candidate, references)| frequency.score(candidate, references));
    scores.sum::<f64>() / candidates.len().max(1) as f64
}

/// CIDEr-D of one caption at a time against fixed sets of references: the reward of self-critical training.
///
/// Unlike the score of a corpus, words and references are counted once, and the end of a caption is a word of its own.
#[derive(Debug)]
pub struct CiderReward {
    words: WordIds,
    references: Vec<Vec<Vec<u32>>>,
    frequency: DocumentFrequency,
}

impl CiderReward {
    /// Takes one set of references for each image; document frequencies are theirs.
    #[must_use]
    pub fn new(references: &[Vec<String>]) -> Self {
        let tokens: Vec<Vec<Vec<String>>> =
            references.par_iter().map(|set| set.iter().map(|text| with_end(text, true)).collect()).collect();
        let mut words = WordIds::default();
        let references: Vec<Vec<Vec<u32>>> =
            tokens.iter().map(|set| set.iter().map(|caption| words.ids(caption)).collect()).collect();
        let mut frequency = DocumentFrequency::default();
        for set in &references {
            frequency.add(&set.iter().map(|caption| NgramCounts::new(caption)).collect::<Vec<_>>());
        }
        Self { words, references, frequency }
    }

    /// Score of a caption of image `image`, in `0..=10`. A caption that was cut off before its end is not `finished`.
    ///
    /// # Panics
    /// If there is no such image.
    #[must_use]
    pub fn score(&self, image: usize, caption: &str, finished: bool) -> f64 {
        let counts = NgramCounts::new(&self.words.known_ids(&with_end(caption, finished)));
        let references: Vec<NgramCounts> = self.references[image].iter().map(|ids| NgramCounts::new(ids)).collect();
        self.frequency.score(&counts, &references)
    }
}

fn with_end(caption: &str, finished: bool) -> Vec<String> {
    let mut words = tokenise(caption);
    if finished {
        words.push(END.to_owned());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_are_the_terms_of_the_corpus_score() {
        let references: Vec<Vec<String>> = [
            ["a dog runs on the beach", "the dog is running by the sea"],
            ["two children play with a red ball", "kids with a ball"],
            ["a man in a blue shirt", "a man stands on the street"],
        ]
        .map(|set| set.map(str::to_owned).to_vec())
        .to_vec();
        let candidates = ["a dog on the beach", "a ball with unheard words", "a man in a"];
        let reward = CiderReward::new(&references);
        let sum: f64 = candidates.iter().enumerate().map(|(i, caption)| reward.score(i, caption, i < 2)).sum();

        let mut words = WordIds::default();
        let mut count = |caption: &str, finished| NgramCounts::new(&words.ids(&with_end(caption, finished)));
        let references: Vec<Vec<NgramCounts>> =
            references.iter().map(|set| set.iter().map(|text| count(text, true)).collect()).collect();
        let candidates: Vec<NgramCounts> = candidates.iter().enumerate().map(|(i, text)| count(text, i < 2)).collect();
        assert!((cider(&candidates, &references) - sum / 3.0).abs() < 1e-12);
        assert!(sum > 0.5);
    }

    #[test]
    fn a_caption_that_stops_in_the_middle_earns_less() {
        let references = vec![vec!["a dog with a ball".to_owned()], vec!["two people".to_owned()]];
        let reward = CiderReward::new(&references);
        assert!(reward.score(0, "a dog with a ball", true) > reward.score(0, "a dog with a ball", false));
        assert!(reward.score(0, "a dog with a", false) > reward.score(0, "a dog with a", true));
        assert_eq!(reward.score(1, "nothing of it", false), 0.0);
    }
}
