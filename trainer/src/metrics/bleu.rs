//! BLEU-1 to BLEU-4 of a corpus (Papineni et al., ACL 2002) with the closest reference length.

use super::ngrams::{LONGEST, NgramCounts};

/// Keep empty corpora from dividing by zero; the values of `pycocoevalcap`, which the scores agree with.
const SMALL: f64 = 1e-9;
const TINY: f64 = 1e-15;

/// BLEU of order 1 to 4 over the whole corpus.
pub(super) fn bleu(candidates: &[NgramCounts], references: &[Vec<NgramCounts>]) -> [f64; LONGEST] {
    let mut matched = [0u64; LONGEST];
    let mut guessed = [0u64; LONGEST];
    let (mut candidate_length, mut reference_length) = (0u64, 0u64);
    for (candidate, references) in candidates.iter().zip(references) {
        let length = candidate.words();
        candidate_length += length;
        // The closest length; of two that are equally close, the shorter.
        let closest = references.iter().map(NgramCounts::words).min_by_key(|&r| (r.abs_diff(length), r));
        reference_length += closest.unwrap_or(0);
        for n in 0..LONGEST {
            guessed[n] += (length + 1).saturating_sub(n as u64 + 1);
            for (ngram, &count) in candidate.order(n) {
                let allowed = references.iter().map(|r| r.count(n, ngram)).max().unwrap_or(0);
                matched[n] += count.min(allowed);
            }
        }
    }
    let ratio = (candidate_length as f64 + TINY) / (reference_length as f64 + SMALL);
    let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    std::array::from_fn(|n| {
        product *= (matched[n] as f64 + TINY) / (guessed[n] as f64 + SMALL);
        product.powf(1.0 / (n as f64 + 1.0)) * brevity
    })
}
