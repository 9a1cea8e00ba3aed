//! LayerNorm.

use multiversion::multiversion;

use crate::lanes::{LANES, sum_of_lanes};

/// LayerNorm over rows: `(x − mean) / √(variance + eps) · weight + bias` (Ba et al., "Layer Normalization", arXiv 1607.06450).
#[derive(Debug, PartialEq)]
pub(crate) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    /// Over rows as long as both vectors; `None` where they differ in length or are empty.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>, eps: f32) -> Option<Self> {
        (weight.len() == bias.len() && !weight.is_empty()).then_some(Self { weight, bias, eps })
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// Normalizes rows `[n, width]` where they lie; before, adds others `[m, width]` where there are such, over and over where n is
    /// more than m.
    pub fn normalize(&self, rows: &mut [f32], add: Option<&[f32]>) {
        normalize(self, rows, add);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn normalize(norm: &LayerNorm, rows: &mut [f32], add: Option<&[f32]>) {
    let width = norm.width();
    // Loops and not closures, which would be compiled for any processor.
    for (at, row) in rows.chunks_exact_mut(width).enumerate() {
        if let Some(add) = add.filter(|add| add.len() >= width) {
            let add = &add[at % (add.len() / width) * width..][..width];
            for (value, add) in row.iter_mut().zip(add) {
                *value += add;
            }
        }
        let mean = sum(row, 0.0, false) / width as f32;
        let variance = sum(row, mean, true) / width as f32;
        let scale = (variance + norm.eps).sqrt().recip();
        for ((value, weight), bias) in row.iter_mut().zip(&norm.weight).zip(&norm.bias) {
            *value = (*value - mean) * scale * weight + bias;
        }
    }
}

/// Sum of values less `mean`, or of the squares of these.
#[inline(always)]
fn sum(values: &[f32], mean: f32, squares: bool) -> f32 {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for values in whole {
        for lane in 0..LANES {
            let value = values[lane] - mean;
            sums[lane] += if squares { value * value } else { value };
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        let value = value - mean;
        *sum += if squares { value * value } else { value };
    }
    sum_of_lanes(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 0.731).sin() * 3.0 + 0.5).collect()
    }

    #[test]
    fn rows_are_normalized_as_the_formula_says() {
        for (rows, width, added) in [(1, 1, 0), (3, 5, 3), (4, 16, 1), (6, 37, 2), (50, 256, 50), (3, 256, 1), (2, 768, 0)] {
            let (x, add) = (numbers(rows * width, 1.0), numbers(added * width, 2.0));
            let (weight, bias, eps) = (numbers(width, 3.0), numbers(width, 4.0), 1e-5);
            let norm = LayerNorm::new(weight.clone(), bias.clone(), eps).unwrap();
            let mut found = x.clone();
            norm.normalize(&mut found, (added > 0).then_some(&add));
            for row in 0..rows {
                let added = |i: usize| if added > 0 { f64::from(add[row % added * width + i]) } else { 0.0 };
                let sums: Vec<f64> = (0..width).map(|i| f64::from(x[row * width + i]) + added(i)).collect();
                let mean = sums.iter().sum::<f64>() / width as f64;
                let variance = sums.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let expected =
                        (sums[i] - mean) / (variance + f64::from(eps)).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                    let found = f64::from(found[row * width + i]);
                    assert!((found - expected).abs() < 3e-6 * (1.0 + expected.abs()), "{rows} {width}: {found} {expected}");
                }
            }
        }
        assert!(LayerNorm::new(vec![1.0], vec![], 0.0).is_none() && LayerNorm::new(vec![], vec![], 0.0).is_none());
    }

    #[test]
    fn rows_far_from_zero_keep_their_variance() {
        let norm = LayerNorm::new(vec![1.0; 64], vec![0.0; 64], 0.0).unwrap();
        let mut row: Vec<f32> = (0..64).map(|i| 4096.0 + [0.5, -0.5][i % 2]).collect();
        norm.normalize(&mut row, None);
        assert!(row.iter().enumerate().all(|(i, value)| (value - [1.0, -1.0][i % 2]).abs() < 1e-6), "{row:?}");
    }
}
