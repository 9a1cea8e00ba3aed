//! Attention of rows over each other.

use multiversion::multiversion;
use rayon::prelude::*;

use super::matrix::{Activation, Layout, Matrix, WORTH_SHARING, Weights, threads};
use crate::lanes::{LANES, exp, sum_of_lanes};

/// Tokens that attend to each other, themselves among them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SelfAttention<'a> {
    pub heads: usize,
    pub depth: usize,
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// Queries, keys and values of the tokens, `[rows, 3 · heads · depth]`.
    pub qkv: &'a [f32],
    /// What is added to everybody's score of a token, `[rows]`.
    pub mask: Option<&'a [f32]>,
}

impl SelfAttention<'_> {
    /// What the tokens read, `[rows, heads · depth]`; heads are shared among the threads of the pool that it is called in, if it is.
    /// `None`, and nothing written, where sizes do not fit.
    pub fn read(&self, output: &mut [f32]) -> Option<()> {
        let hidden = self.heads * self.depth;
        let rows = self.qkv.len().checked_div(3 * hidden)?;
        let fits = rows * 3 * hidden == self.qkv.len() && rows * hidden == output.len();
        if !fits || self.mask.is_some_and(|mask| mask.len() != rows) {
            return None;
        }
        let worth = rows * rows * self.depth * self.heads >= WORTH_SHARING;
        let parts: Vec<Vec<f32>> = if worth && threads() > 1 {
            (0..self.heads).into_par_iter().map(|head| self.read_head(head, rows)).collect::<Option<_>>()?
        } else {
            (0..self.heads).map(|head| self.read_head(head, rows)).collect::<Option<_>>()?
        };
        for (row, output) in output.chunks_exact_mut(hidden).enumerate() {
            for (part, output) in parts.iter().zip(output.chunks_exact_mut(self.depth)) {
                output.copy_from_slice(&part[row * self.depth..][..self.depth]);
            }
        }
        Some(())
    }

    /// What the tokens read through one head, `[rows, depth]`.
    fn read_head(&self, head: usize, rows: usize) -> Option<Vec<f32>> {
        let (depth, width) = (self.depth, 3 * self.heads * self.depth);
        let start = |part: usize| (part * self.heads + head) * depth;
        let part = |number: usize| self.qkv.chunks_exact(width).flat_map(move |row| &row[start(number)..][..depth]);
        let keys: Vec<f32> = part(1).map(|key| key * self.scale).collect();
        let values: Vec<f32> = part(2).copied().collect();
        // Of a product with the keys, a token is an output: its part of the mask is a bias.
        let keys = Matrix::new(Weights::F32(&keys), [depth, rows], true, self.mask)?;
        let values = Matrix::new(Weights::F32(&values), [rows, depth], false, None)?;
        let queries = Layout { start: start(0), ..Layout::dense(width) };
        let mut shares = vec![0.0; rows * rows];
        keys.multiply(rows, (self.qkv, queries), None, Activation::None, (&mut shares, Layout::dense(rows)));
        softmax(&mut shares, rows);
        let mut output = vec![0.0; rows * depth];
        values.multiply(rows, (&shares, Layout::dense(rows)), None, Activation::None, (&mut output, Layout::dense(depth)));
        Some(output)
    }
}

/// Softmax over each row of so many values.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn softmax(scores: &mut [f32], width: usize) {
    for row in scores.chunks_exact_mut(width) {
        let mut largest = f32::NEG_INFINITY;
        for score in &*row {
            largest = largest.max(*score);
        }
        let mut sums = [0f32; LANES];
        let (whole, rest) = row.as_chunks_mut::<LANES>();
        for scores in whole {
            for lane in 0..LANES {
                scores[lane] = exp(scores[lane] - largest);
                sums[lane] += scores[lane];
            }
        }
        for (score, sum) in rest.iter_mut().zip(&mut sums) {
            *score = exp(*score - largest);
            *sum += *score;
        }
        let share = sum_of_lanes(sums).recip();
        for score in row {
            *score *= share;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 0.731).sin() * 2.0).collect()
    }

    /// The formula in 64 bits.
    fn expected(attention: &SelfAttention<'_>, rows: usize) -> Vec<f64> {
        let SelfAttention { heads, depth, scale, qkv, mask } = *attention;
        let hidden = heads * depth;
        let at = |row: usize, part: usize, head: usize, d: usize| f64::from(qkv[(row * 3 + part) * hidden + head * depth + d]);
        let mut output = Vec::new();
        for row in 0..rows {
            for head in 0..heads {
                let weight = |other: usize| {
                    let dot: f64 = (0..depth).map(|d| at(row, 0, head, d) * at(other, 1, head, d)).sum();
                    (dot * f64::from(scale) + mask.map_or(0.0, |mask| f64::from(mask[other]))).exp()
                };
                let weights: Vec<f64> = (0..rows).map(weight).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..depth {
                    output.push((0..rows).map(|other| weights[other] / sum * at(other, 2, head, d)).sum());
                }
            }
        }
        output
    }

    fn read(attention: &SelfAttention<'_>) -> Option<Vec<f32>> {
        let mut output = vec![0.0; attention.qkv.len() / 3];
        attention.read(&mut output).map(|()| output)
    }

    #[test]
    fn tokens_read_what_the_formula_says() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for (rows, heads, depth) in [(1, 1, 1), (3, 4, 16), (17, 3, 21), (50, 4, 64), (110, 2, 64)] {
            let qkv = numbers(rows * 3 * heads * depth, 1.0);
            // A third is hidden, a third seen as it is, a third less than that.
            let mask: Vec<f32> = (0..rows).map(|i| [0.0, -1e4, -0.7][i % 3]).collect();
            for mask in [None, Some(mask.as_slice())] {
                let attention = SelfAttention { heads, depth, scale: 0.3, qkv: &qkv, mask };
                let found = read(&attention).unwrap();
                for (found, expected) in found.iter().zip(expected(&attention, rows)) {
                    assert!((f64::from(*found) - expected).abs() < 3e-6, "{rows} {heads} {depth}: {found} {expected}");
                }
                assert_eq!((found.len(), pool.install(|| read(&attention))), (rows * heads * depth, Some(found)));
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let qkv = [0.0; 24];
        let attention = SelfAttention { heads: 2, depth: 2, scale: 1.0, qkv: &qkv, mask: None };
        let read = |attention: SelfAttention<'_>, size| attention.read(&mut vec![0.0; size]).is_some();
        assert!(read(attention, 8));
        assert!(!read(attention, 7));
        assert!(!read(SelfAttention { qkv: &qkv[1..], ..attention }, 8));
        assert!(!read(SelfAttention { mask: Some(&[0.0]), ..attention }, 8));
        assert!(!read(SelfAttention { heads: 0, ..attention }, 8));
    }
}
