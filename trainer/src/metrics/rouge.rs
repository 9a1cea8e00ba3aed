//! ROUGE (Lin, ACL workshop 2004): of captions the F-score of the longest common subsequence as caption evaluation weighs it, of
//! other texts ROUGE-1, -2 and -L as summaries are scored.

use std::collections::HashMap;

/// Weight of recall against precision, as caption evaluation uses it.
const BETA: f64 = 1.2;

/// Mean over the captions of the F-score of best precision and best recall over the references.
pub(super) fn rouge_l(candidates: &[Vec<u32>], references: &[Vec<Vec<u32>>]) -> f64 {
    let scores = candidates.iter().zip(references).map(|(candidate, references)| {
        let (mut precision, mut recall) = (0.0f64, 0.0f64);
        for reference in references {
            let common = common_subsequence(candidate, reference) as f64;
            // An empty caption counts as one empty word, as in `pycocoevalcap`.
            precision = precision.max(common / candidate.len().max(1) as f64);
            recall = recall.max(common / reference.len().max(1) as f64);
        }
        if precision > 0.0 && recall > 0.0 {
            (1.0 + BETA * BETA) * precision * recall / (recall + BETA * BETA * precision)
        } else {
            0.0
        }
    });
    scores.sum::<f64>() / candidates.len().max(1) as f64
}

/// Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, of each text against its best reference, as the package `rouge-score` computes them
/// without stemming: words are runs of letters a–z and digits, lower case.
///
/// # Panics
/// If `references` is not as long as `candidates`.
#[must_use]
pub fn rouge_scores(candidates: &[String], references: &[Vec<String>]) -> [f64; 3] {
    assert_eq!(candidates.len(), references.len(), "one set of references for each candidate");
    let mut sums = [0f64; 3];
    for (candidate, references) in candidates.iter().zip(references) {
        let mut numbers = HashMap::new();
        let candidate = words(candidate, &mut numbers);
        let mut best = [0f64; 3];
        for reference in references {
            let reference = words(reference, &mut numbers);
            let subsequence =
                if candidate.is_empty() || reference.is_empty() { 0 } else { common_subsequence(&candidate, &reference) };
            let scores = [
                shared(&candidate, &reference, 1),
                shared(&candidate, &reference, 2),
                f1(subsequence, candidate.len(), reference.len()),
            ];
            best.iter_mut().zip(scores).for_each(|(best, score)| *best = best.max(score));
        }
        sums.iter_mut().zip(best).for_each(|(sum, best)| *sum += best);
    }
    sums.map(|sum| sum / candidates.len().max(1) as f64)
}

fn words(text: &str, numbers: &mut HashMap<String, u32>) -> Vec<u32> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()).filter(|word| !word.is_empty());
    words
        .map(|word| {
            let next = numbers.len() as u32;
            *numbers.entry(word.to_owned()).or_insert(next)
        })
        .collect()
}

/// F1 of the runs of `n` words that two texts share, each counted as often as both have it.
fn shared(candidate: &[u32], reference: &[u32], n: usize) -> f64 {
    let mut left: HashMap<&[u32], usize> = HashMap::new();
    reference.windows(n).for_each(|run| *left.entry(run).or_default() += 1);
    let mut common = 0;
    for run in candidate.windows(n) {
        if let Some(count) = left.get_mut(run).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    f1(common, candidate.windows(n).count(), reference.windows(n).count())
}

fn f1(common: usize, candidate: usize, reference: usize) -> f64 {
    if common == 0 {
        return 0.0;
    }
    2.0 * common as f64 / (candidate + reference) as f64
}

/// Length of the longest common subsequence.
fn common_subsequence(a: &[u32], b: &[u32]) -> usize {
    if a.is_empty() && b.is_empty() {
        return 1;
    }
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{common_subsequence, rouge_l, rouge_scores};
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Golden {
        candidate: String,
        references: Vec<String>,
        scores: [f64; 3],
    }

    #[test]
    fn scores_agree_with_the_rouge_score_package() {
        let golden: Vec<Golden> = serde_json::from_str(include_str!("reference/rouge_golden.json")).unwrap();
        assert!(golden.len() >= 8);
        for g in &golden {
            let got = rouge_scores(std::slice::from_ref(&g.candidate), std::slice::from_ref(&g.references));
            for (got, expected) in got.iter().zip(&g.scores) {
                assert!((got - expected).abs() < 1e-9, "{:?}: {got}, not {expected}", g.candidate);
            }
        }
        let (candidates, references): (Vec<_>, Vec<_>) =
            golden.iter().map(|g| (g.candidate.clone(), g.references.clone())).unzip();
        let mean = golden.iter().map(|g| g.scores[1]).sum::<f64>() / golden.len() as f64;
        assert!((rouge_scores(&candidates, &references)[1] - mean).abs() < 1e-9);
    }

    #[test]
    fn empty_texts_score_as_the_references_have_it() {
        // `pycocoevalcap` sees one empty word in each; `rouge-score` sees none.
        assert_eq!(rouge_l(&[vec![]], &[vec![vec![]]]), 1.0);
        assert_eq!(rouge_l(&[vec![]], &[vec![vec![1]]]), 0.0);
        assert_eq!(rouge_scores(&["...".to_owned()], &[vec![String::new()]]), [0.0; 3]);
    }

    #[test]
    fn common_subsequences() {
        for (a, b, expected) in [
            (&[1, 2, 3, 4][..], &[2, 4, 1, 3][..], 2),
            (&[1, 2, 3], &[1, 2, 3], 3),
            (&[1, 9, 2, 9, 3], &[1, 2, 3], 3),
            (&[], &[1], 0),
            (&[1, 1, 1], &[1, 1], 2),
        ] {
            assert_eq!(common_subsequence(a, b), expected);
            assert_eq!(common_subsequence(b, a), expected);
        }
    }
}
