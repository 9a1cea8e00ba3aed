//! Rounding to 4 bits with what follows in mind: each input's error is made good by the inputs still to come, as far as they occur
//! together (Frantar et al., "GPTQ", arXiv 2210.17323).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::Precision;

use crate::calibrate::observe;
use crate::graphs::Graphs;
use crate::parity::Sample;
use crate::quantize::{BLOCK, Blocks, OFFSET, block_level, block_scale, pack_levels};

/// Added to the diagonal of a matrix of moments, as a share of its mean; GPTQ's.
const DAMPING: f64 = 0.01;

/// For each weight the sums of products `Σ x xᵀ` of what it is multiplied with, `[inputs, inputs]`, by its name.
pub type Moments = BTreeMap<String, Vec<f64>>;

/// Sums the moments over samples, in all graphs of a bundle whose weights have 8 bits (what others would be multiplied with is not told).
///
/// # Errors
/// No samples, or graphs that cannot be run.
pub fn moments(bundle: &Bundle, graphs: &Graphs, samples: &[Sample]) -> Result<Moments> {
    let mut gathered: BTreeMap<String, Gathered> = BTreeMap::new();
    observe(bundle, graphs, Precision::I8, samples, &mut |observed| {
        let of_weight = gathered.entry(observed.weight.to_owned()).or_default();
        for row in observed.rows() {
            of_weight.width = row.len();
            of_weight.rows.extend_from_slice(row);
        }
        if of_weight.rows.len() >= ROWS * of_weight.width { of_weight.add() } else { Ok(()) }
    })?;
    gathered.into_iter().map(|(name, of_weight)| Ok((name, of_weight.finish()?))).collect()
}

/// Rows that are multiplied at once: the decoder gives few at a time.
const ROWS: usize = 1024;

/// What came of one weight.
#[derive(Default)]
struct Gathered {
    width: usize,
    /// Rows not in the sum yet.
    rows: Vec<f32>,
    sum: Option<Tensor>,
}

impl Gathered {
    fn add(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        let x = Tensor::from_vec(rows, ((), self.width), &Device::Cpu)?;
        let product = x.t()?.matmul(&x)?;
        self.sum = Some(match self.sum.take() {
            Some(sum) => (sum + product)?,
            None => product,
        });
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<f64>> {
        if !self.rows.is_empty() {
            self.add()?;
        }
        let sum = self.sum.context("nothing occurred")?;
        Ok(sum.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
    }
}

/// Quantizes rows `[outputs, inputs]` so that their products with what occurred change least, one input after the other: the scale of a
/// block is the one of least error when its first input's turn comes.
///
/// # Errors
/// Moments of another width, or that are no numbers; inputs that are no whole blocks.
pub fn quantize(rows: &[f32], moments: &[f64]) -> Result<Blocks> {
    let inputs = moments.len().isqrt();
    if inputs == 0 || inputs * inputs != moments.len() || !inputs.is_multiple_of(BLOCK) || !rows.len().is_multiple_of(inputs) {
        bail!("{} values do not go with {} moments", rows.len(), moments.len());
    }
    let compensation = compensation(moments, inputs).context("moments that are no numbers")?;
    let mut levels = Vec::with_capacity(rows.len());
    let mut scales = Vec::with_capacity(rows.len() / BLOCK);
    for row in rows.chunks_exact(inputs) {
        let mut left: Vec<f64> = row.iter().map(|&value| f64::from(value)).collect();
        for input in 0..inputs {
            if input.is_multiple_of(BLOCK) {
                let block: Vec<f32> = left[input..input + BLOCK].iter().map(|&value| value as f32).collect();
                scales.push(block_scale(&block));
            }
            let scale = scales[scales.len() - 1].to_f32();
            let level = block_level(left[input] as f32, scale);
            levels.push((level + OFFSET) as u8);
            let later = &compensation[input * inputs..][input..inputs];
            let error = (left[input] - f64::from(level * scale)) / later[0];
            left[input..].iter_mut().zip(later).for_each(|(value, share)| *value -= error * share);
        }
    }
    Ok(Blocks { levels: pack_levels(&levels), scales })
}

/// The upper triangle U of `H⁻¹ = Uᵀ U`, row-major, H the damped moments. Row i, divided by its first number, is what an error of input i
/// takes from the inputs after it. `None` where H has no root.
fn compensation(moments: &[f64], n: usize) -> Option<Vec<f64>> {
    let mean = (0..n).map(|i| moments[i * n + i]).sum::<f64>() / n as f64;
    let damped = |i: usize, j: usize| {
        // Inputs that never occur would make a root impossible, whatever the others are.
        moments[i * n + j] + if i == j { (DAMPING * mean).max(1e-12) } else { 0.0 }
    };
    // H = R Rᵀ with R upper: the usual root, from the last input to the first. Then U is R's inverse.
    let mut root = vec![0f64; n * n];
    for j in (0..n).rev() {
        for i in (0..=j).rev() {
            let known: f64 = (j + 1..n).map(|k| root[i * n + k] * root[j * n + k]).sum();
            let rest = damped(i, j) - known;
            root[i * n + j] = if i == j { rest.sqrt() } else { rest / root[j * n + j] };
        }
        if !(root[j * n + j] > 0.0 && root[j * n + j].is_finite()) {
            return None;
        }
    }
    let mut inverse = vec![0f64; n * n];
    for row in (0..n).rev() {
        let (above, below) = inverse.split_at_mut((row + 1) * n);
        let own = &mut above[row * n..];
        for (k, known) in (row + 1..n).zip(below.chunks_exact(n)) {
            let factor = root[row * n + k];
            own[k..].iter_mut().zip(&known[k..]).for_each(|(own, known)| *own -= factor * known);
        }
        own[row] = 1.0;
        own[row..].iter_mut().for_each(|value| *value /= root[row * n + row]);
    }
    Some(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{dequantize_blocks, quantize_blocks};

    /// Rows of inputs that occur together, `[count, inputs]`, and their moments.
    fn occurred(count: usize, inputs: usize) -> (Vec<f64>, Vec<f64>) {
        let noise = |i: usize| ((i * i + 3 * i) as f64 * 0.731).sin();
        let x: Vec<f64> = (0..count * inputs).map(|i| noise(i) + 2.0 * noise(i / inputs * 7 + i % 5)).collect();
        let moment = |i: usize, j: usize| (0..count).map(|row| x[row * inputs + i] * x[row * inputs + j]).sum::<f64>();
        let moments = (0..inputs * inputs).map(|at| moment(at / inputs, at % inputs)).collect();
        (x, moments)
    }

    fn weights(outputs: usize, inputs: usize) -> Vec<f32> {
        (0..outputs * inputs).map(|i| ((i * i) as f32 * 0.37).sin() + ((7 * i) as f32 * 0.11).cos()).collect()
    }

    /// Solves `A x = b` by elimination.
    fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
        let n = b.len();
        for i in 0..n {
            let pivot = (i..n).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs())).unwrap();
            a.swap(i, pivot);
            b.swap(i, pivot);
            for row in i + 1..n {
                let factor = a[row][i] / a[i][i];
                (i..n).for_each(|k| a[row][k] -= factor * a[i][k]);
                b[row] -= factor * b[i];
            }
        }
        for i in (0..n).rev() {
            b[i] = (b[i] - (i + 1..n).map(|k| a[i][k] * b[k]).sum::<f64>()) / a[i][i];
        }
        b
    }

    /// Every step against the problem that it solves: with inputs 0..=i rounded, the inputs after them are those that change the products
    /// least, `H_after,after · δ = H_after,i · error`, solved anew each time.
    #[test]
    fn each_error_is_made_good_by_least_squares() {
        let (outputs, inputs) = (3, 64);
        let (_, moments) = occurred(200, inputs);
        let rows = weights(outputs, inputs);
        let found = dequantize_blocks(&quantize(&rows, &moments).unwrap());
        let mean = (0..inputs).map(|i| moments[i * inputs + i]).sum::<f64>() / inputs as f64;
        let h = |i: usize, j: usize| moments[i * inputs + j] + if i == j { 0.01 * mean } else { 0.0 };
        for (row, found) in rows.chunks(inputs).zip(found.chunks(inputs)) {
            let mut left: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let mut scale = 0.0;
            for i in 0..inputs {
                if i % 32 == 0 {
                    let block: Vec<f32> = left[i..i + 32].iter().map(|&v| v as f32).collect();
                    scale = quantize_blocks(&block).scales[0].to_f32();
                }
                let rounded = f64::from((left[i] as f32 / scale).round_ties_even().clamp(-8.0, 7.0) * scale);
                assert!((rounded - f64::from(found[i])).abs() < 1e-6, "input {i}: {rounded} {}", found[i]);
                let after: Vec<usize> = (i + 1..inputs).collect();
                let a = after.iter().map(|&r| after.iter().map(|&c| h(r, c)).collect()).collect();
                let b = after.iter().map(|&r| h(r, i) * (left[i] - rounded)).collect();
                for (at, change) in after.into_iter().zip(solve(a, b)) {
                    left[at] += change;
                }
            }
        }
    }

    #[test]
    fn products_change_less_than_by_rounding_alone() {
        let (outputs, inputs) = (8, 96);
        let (x, moments) = occurred(300, inputs);
        let rows = weights(outputs, inputs);
        let error = |other: &[f32]| -> f64 {
            let row = |x: &[f64], n: usize| {
                (0..inputs).map(|k| x[k] * f64::from(other[n * inputs + k] - rows[n * inputs + k])).sum::<f64>()
            };
            x.chunks(inputs).flat_map(|x| (0..outputs).map(move |n| row(x, n).powi(2))).sum()
        };
        let alone = error(&dequantize_blocks(&quantize_blocks(&rows)));
        let together = error(&dequantize_blocks(&quantize(&rows, &moments).unwrap()));
        assert!(together < 0.5 * alone, "{together} {alone}");
        // Inputs that never occur together have nothing to make good.
        let apart: Vec<f64> = (0..inputs * inputs).map(|at| f64::from(at / inputs == at % inputs)).collect();
        assert_eq!(quantize(&rows, &apart).unwrap(), quantize_blocks(&rows));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (_, mut moments) = occurred(50, 32);
        for (values, moments) in [(33, &moments[..]), (32, &moments[..1023]), (32, &[])] {
            let error = quantize(&vec![0.5; values], moments).unwrap_err().to_string();
            assert!(error.contains("do not go with"), "{error}");
        }
        moments[33] = f64::NAN;
        assert!(quantize(&[0.5; 32], &moments).unwrap_err().to_string().contains("no numbers"));
        // Nothing occurred: as without.
        assert_eq!(quantize(&weights(2, 32), &[0.0; 1024]).unwrap(), quantize_blocks(&weights(2, 32)));
    }
}
