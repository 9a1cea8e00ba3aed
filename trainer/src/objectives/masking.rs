//! What is hidden from the model: spans of text, blocks of neighbouring regions.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use unimo::tokenizer::UNK;

/// Success rate of the geometric span lengths, and their maximum (SpanBERT; arXiv 2012.15409, section 2.3).
const SPAN: (f64, usize) = (0.2, 10);
/// Share of a text that is masked.
const MASKED_TEXT: f64 = 0.15;

/// A text with hidden tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedText {
    /// Ids with masks in place.
    pub ids: Vec<u32>,
    /// `(position, id that was there)`.
    pub targets: Vec<(usize, u32)>,
}

/// Hides spans of `ids` (`[CLS] … [SEP]`, whose ends stay) until 15 % are hidden, at least one. A span becomes `[MASK]` in
/// 80 % of cases, random tokens in 10 %, and stays in 10 %.
#[must_use]
pub fn mask_text(ids: &[u32], mask_token: u32, rng: &mut ChaCha8Rng) -> MaskedText {
    let words = ids.len().saturating_sub(2);
    let mut masked = MaskedText { ids: ids.to_vec(), targets: Vec::new() };
    if words == 0 {
        return masked;
    }
    let budget = ((words as f64 * MASKED_TEXT).round() as usize).max(1);
    let mut hidden = vec![false; ids.len()];
    while masked.targets.len() < budget {
        let mut length = 1;
        while length < SPAN.1 && !rng.random_bool(SPAN.0) {
            length += 1;
        }
        let length = length.min(budget - masked.targets.len()).min(words);
        let start = rng.random_range(1..=1 + words - length);
        let kind: f64 = rng.random();
        for position in start..start + length {
            if !hidden[position] {
                hidden[position] = true;
                masked.targets.push((position, ids[position]));
                if kind < 0.8 {
                    masked.ids[position] = mask_token;
                } else if kind < 0.9 {
                    masked.ids[position] = rng.random_range(UNK + 1..mask_token);
                }
            }
        }
    }
    masked.targets.sort_unstable();
    masked
}

/// Hides blocks of neighbouring cells (2×2, or what of it lies inside) until `share` of the grid is hidden. Returns sorted
/// cell numbers.
#[must_use]
pub fn mask_regions(grid: usize, share: f64, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let budget = ((grid * grid) as f64 * share).round().max(1.0) as usize;
    let mut hidden = vec![false; grid * grid];
    let mut count = 0;
    while count < budget {
        let (row, column) = (rng.random_range(0..grid), rng.random_range(0..grid));
        for (r, c) in [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)] {
            if r < grid && c < grid && !hidden[r * grid + c] && count < budget {
                hidden[r * grid + c] = true;
                count += 1;
            }
        }
    }
    (0..hidden.len()).filter(|&i| hidden[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_masking_hides_the_asked_share_and_keeps_the_ends() {
        let mut rng = crate::seed::rng(3);
        let ids: Vec<u32> = std::iter::once(0).chain(10..110).chain([2]).collect();
        let (mut masked, mut random, mut kept) = (0, 0, 0);
        for _ in 0..400 {
            let m = mask_text(&ids, 500, &mut rng);
            assert_eq!(m.targets.len(), 15);
            assert_eq!((m.ids[0], m.ids[101]), (0, 2));
            for &(position, target) in &m.targets {
                assert_eq!(ids[position], target);
                match m.ids[position] {
                    500 => masked += 1,
                    id if id == target => kept += 1,
                    _ => random += 1,
                }
            }
            let changed = m.ids.iter().zip(&ids).filter(|(a, b)| a != b).count();
            assert!(changed <= 15);
        }
        let share = |n: i32| f64::from(n) / 6000.0;
        assert!((share(masked) - 0.8).abs() < 0.05 && (share(random) - 0.1).abs() < 0.04 && (share(kept) - 0.1).abs() < 0.04);
        assert_eq!(mask_text(&[0, 2], 500, &mut rng).targets, []);
    }

    #[test]
    fn region_masking_hides_the_asked_share_in_blocks() {
        let mut rng = crate::seed::rng(4);
        let mut alone = 0;
        for _ in 0..200 {
            let cells = mask_regions(7, 0.15, &mut rng);
            assert_eq!(cells.len(), 7);
            let near = |a: usize, b: usize| (a / 7).abs_diff(b / 7) + (a % 7).abs_diff(b % 7) == 1;
            alone += cells.iter().filter(|&&a| !cells.iter().any(|&b| near(a, b))).count();
        }
        assert!(alone < 200, "{alone} of 1400 cells without a masked neighbour");
    }
}
