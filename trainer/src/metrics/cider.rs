//! CIDEr-D (Vedantam et al., CVPR 2015): clipped TF-IDF similarity of n-grams, with a penalty on length.

use std::collections::HashMap;

use super::ngrams::{LONGEST, Ngram, NgramCounts};

/// Width of the Gaussian penalty on the difference in length.
const SIGMA: f64 = 6.0;

/// How many images' references hold each n-gram.
struct DocumentFrequency {
    images: HashMap<Ngram, u64>,
    log_images: f64,
}

impl DocumentFrequency {
    fn of(references: &[Vec<NgramCounts>]) -> Self {
        let mut images: HashMap<Ngram, u64> = HashMap::new();
        for captions in references {
            for n in 0..LONGEST {
                let mut distinct: Vec<&Ngram> = captions.iter().flat_map(|c| c.order(n).keys()).collect();
                distinct.sort_unstable();
                distinct.dedup();
                for ngram in distinct {
                    *images.entry(ngram.clone()).or_default() += 1;
                }
            }
        }
        Self { images, log_images: (references.len() as f64).ln() }
    }

    /// An n-gram that no reference holds counts as held by one.
    fn inverse(&self, ngram: &Ngram) -> f64 {
        let images = self.images.get(ngram).copied().unwrap_or(1).max(1);
        self.log_images - (images as f64).ln()
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

/// Mean over the images of ten times the mean similarity to the references.
pub(super) fn cider(candidates: &[NgramCounts], references: &[Vec<NgramCounts>]) -> f64 {
    let frequency = DocumentFrequency::of(references);
    let scores = candidates.iter().zip(references).map(|(candidate, references)| {
        let candidate = frequency.weigh(candidate);
        let sum: f64 = references.iter().map(|r| similarity(&candidate, &frequency.weigh(r))).sum();
        10.0 * sum / references.len().max(1) as f64
    });
    scores.sum::<f64>() / candidates.len().max(1) as f64
}
