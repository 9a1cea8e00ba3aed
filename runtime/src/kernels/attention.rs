//! Attention over a cache, read where it lies.

use multiversion::multiversion;

use crate::lanes::{LANES, exp, sum_of_lanes};

/// Keys and values of one layer, `[heads, rows, depth]` each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cache<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
}

impl<'a> Cache<'a> {
    /// One head's, of `size` values each.
    #[inline(always)]
    fn of_head(&self, head: usize, size: usize) -> Cache<'a> {
        Cache { keys: &self.keys[head * size..][..size], values: &self.values[head * size..][..size] }
    }
}

/// The newest token of each of some hypotheses: it attends to a prefix that all see, to itself, and to those of the others' slots
/// that a mask does not hide.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CachedAttention<'a> {
    pub heads: usize,
    pub depth: usize,
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// Queries, keys and values of the tokens, `[rows, 3 · heads · depth]`.
    pub qkv: &'a [f32],
    /// Seen by all.
    pub prefix: Cache<'a>,
    /// Seen by some.
    pub past: Cache<'a>,
    /// What is added to the scores of `past`, `[rows, slots]`. [`HIDDEN`] or less hides a slot.
    pub mask: &'a [f32],
}

/// e⁻¹⁰⁰⁰ is 0 beside a token's score of itself, which nothing hides.
pub(crate) const HIDDEN: f32 = -1e3;

impl CachedAttention<'_> {
    /// What the tokens read: `[rows, heads · depth]`.
    ///
    /// # Panics
    /// Where a slice is too short.
    pub fn read(&self, output: &mut [f32]) {
        read(self, output);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn read<'a>(attention: &CachedAttention<'a>, output: &mut [f32]) {
    let CachedAttention { heads, depth, scale, qkv, prefix, past, mask } = *attention;
    let hidden = heads * depth;
    let rows = qkv.len() / (3 * hidden);
    let (before, slots) = (prefix.keys.len() / hidden, mask.len() / rows.max(1));
    let (mut scores, mut seen) = (Vec::with_capacity(before + 1 + slots), Vec::with_capacity(slots));
    for (row, output) in output.chunks_exact_mut(hidden).enumerate().take(rows) {
        let mask = &mask[row * slots..][..slots];
        seen.clear();
        seen.extend((0..slots).filter(|&slot| mask[slot] > HIDDEN));
        for (head, output) in output.chunks_exact_mut(depth).enumerate() {
            let [query, key, value] = [0, 1, 2].map(|part| &qkv[(3 * row + part) * hidden + head * depth..][..depth]);
            let (prefix, past) = (prefix.of_head(head, before * depth), past.of_head(head, slots * depth));
            scores.clear();
            // Loops and not closures, which would be compiled for any processor.
            for key in prefix.keys.chunks_exact(depth) {
                scores.push(scale * dot(query, key));
            }
            scores.push(scale * dot(query, key));
            for &slot in &seen {
                scores.push(scale * dot(query, &past.keys[slot * depth..][..depth]) + mask[slot]);
            }
            let largest = scores.iter().fold(f32::NEG_INFINITY, |largest, &score| largest.max(score));
            for score in &mut scores {
                *score = exp(*score - largest);
            }
            let share = scores.iter().sum::<f32>().recip();
            scores.iter_mut().for_each(|score| *score *= share);
            let (of_prefix, others) = scores.split_at(before);
            output.fill(0.0);
            for (values, share) in prefix.values.chunks_exact(depth).zip(of_prefix) {
                add(output, values, *share);
            }
            add(output, value, others[0]);
            for (slot, share) in seen.iter().zip(&others[1..]) {
                add(output, &past.values[slot * depth..][..depth], *share);
            }
        }
    }
}

/// `output += share · values`
#[inline(always)]
fn add(output: &mut [f32], values: &[f32], share: f32) {
    for (output, value) in output.iter_mut().zip(values) {
        *output += share * value;
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sum_of_lanes(sums) + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 0.731).sin() * 2.0).collect()
    }

    /// The formula in 64 bits, masked slots included.
    fn expected(attention: &CachedAttention<'_>, rows: usize) -> Vec<f64> {
        let CachedAttention { heads, depth, scale, qkv, prefix, past, mask } = *attention;
        let hidden = heads * depth;
        let (before, slots) = (prefix.keys.len() / hidden, mask.len() / rows);
        let mut output = Vec::new();
        for row in 0..rows {
            for head in 0..heads {
                let part = |part: usize| &qkv[row * 3 * hidden + part * hidden + head * depth..][..depth];
                let of = |cache: &[f32], count: usize, at: usize| cache[(head * count + at) * depth..][..depth].to_vec();
                let mut all: Vec<(Vec<f32>, Vec<f32>, f32)> = Vec::new();
                all.extend((0..before).map(|at| (of(prefix.keys, before, at), of(prefix.values, before, at), 0.0)));
                all.push((part(1).to_vec(), part(2).to_vec(), 0.0));
                all.extend((0..slots).map(|at| (of(past.keys, slots, at), of(past.values, slots, at), mask[row * slots + at])));
                let weights: Vec<f64> = all
                    .iter()
                    .map(|(key, _, mask)| {
                        let dot: f64 = part(0).iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        (dot * f64::from(scale) + f64::from(*mask)).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..depth {
                    output.push(all.iter().zip(&weights).map(|((_, v, _), w)| w / sum * f64::from(v[d])).sum());
                }
            }
        }
        output
    }

    #[test]
    fn tokens_read_what_the_formula_says() {
        for (rows, heads, depth, before, slots) in [(1, 1, 1, 1, 1), (3, 4, 16, 5, 9), (2, 3, 21, 0, 4), (3, 2, 64, 50, 90)] {
            let hidden = heads * depth;
            let qkv = numbers(rows * 3 * hidden, 1.0);
            let [keys, values] = [2.0, 3.0].map(|seed| numbers(before * hidden, seed));
            let [past_keys, past_values] = [4.0, 5.0].map(|seed| numbers(slots * hidden, seed));
            // A third is hidden, a third seen as it is, a third less than that.
            let mask: Vec<f32> = (0..rows * slots).map(|i| [-1e4, 0.0, -0.7][(i + i / slots) % 3]).collect();
            let attention = CachedAttention {
                heads,
                depth,
                scale: 0.3,
                qkv: &qkv,
                prefix: Cache { keys: &keys, values: &values },
                past: Cache { keys: &past_keys, values: &past_values },
                mask: &mask,
            };
            let mut found = vec![9.0; rows * hidden];
            attention.read(&mut found);
            for (found, expected) in found.iter().zip(expected(&attention, rows)) {
                assert!((f64::from(*found) - expected).abs() < 2e-6, "{rows} {heads} {depth}: {found} {expected}");
            }
        }
    }
}
