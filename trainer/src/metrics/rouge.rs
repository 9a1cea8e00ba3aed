//! ROUGE-L (Lin, ACL workshop 2004): F-score of the longest common subsequence.

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
    use super::common_subsequence;

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
