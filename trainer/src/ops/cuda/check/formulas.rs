//! What the operators should compute, in f64 and in the plainest form.

use crate::ops::kernels::Plane;
use crate::ops::{AttentionPlan, kernels};

/// Factors of a dropout mask: 0, or 1 / keep. They are the CPU's, which a device has to draw alike.
pub fn mask(count: usize, seed: u32, keep: f32) -> Vec<f64> {
    let mut factors = vec![1f32; count];
    kernels::dropout_mask(&mut factors, seed, 0, keep);
    factors.into_iter().map(f64::from).collect()
}

/// The error function, good to 1e-12: by its power series, and where that cancels by the continued fraction of its complement
/// (Abramowitz & Stegun 7.1.5 and 7.1.14).
fn erf(x: f64) -> f64 {
    if x.abs() > 2.5 {
        let fraction = (1..80).rev().fold(x.abs(), |inner, n| x.abs() + f64::from(n) / 2.0 / inner);
        return x.signum() * (1.0 - (-x * x).exp() / std::f64::consts::PI.sqrt() / fraction);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

pub fn gelu(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))).collect()
}

pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let width = weight.len();
    let row = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
        let normal = row.iter().map(|v| (v - mean) / (variance + eps).sqrt());
        normal.zip(weight).zip(bias).map(|((v, w), b)| v * w + b).collect::<Vec<_>>()
    };
    x.chunks_exact(width).flat_map(row).collect()
}

/// `x [rows, inputs] · weight [outputs, inputs]ᵀ + bias`
pub fn linear(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let inputs = weight.len() / bias.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks_exact(inputs).flat_map(|x| weight.chunks_exact(inputs).zip(bias).map(move |(w, b)| dot(x, w) + b)).collect()
}

pub fn cross_entropy(logits: &[f64], targets: &[u32], weights: Option<&[f32]>, smoothing: f64) -> f64 {
    let classes = logits.len() / targets.len();
    let rows = logits.chunks_exact(classes).zip(targets).enumerate().map(|(i, (row, &target))| {
        let log_total = row.iter().map(|v| v.exp()).sum::<f64>().ln();
        let smooth = row.iter().map(|v| log_total - v).sum::<f64>() / classes as f64;
        let loss = (1.0 - smoothing) * (log_total - row[target as usize]) + smoothing * smooth;
        weights.map_or(1.0, |weights| f64::from(weights[i])) * loss
    });
    rows.sum::<f64>() / targets.len() as f64
}

/// Attention by its definition, with the CPU's draws if `keep` is below 1.
pub fn attention(qkv: &[f64], plan: &AttentionPlan, heads: usize, keep: f32, seed: u32) -> Vec<f64> {
    let rows = plan.rows();
    let hidden = qkv.len() / rows / 3;
    let depth = hidden / heads;
    let at = |row: usize, part: usize, head: usize| &qkv[row * 3 * hidden + part * hidden + head * depth..][..depth];
    let mut y = vec![0.0; rows * hidden];
    for group in &plan.groups {
        for block in &group.blocks {
            let seen: Vec<usize> = block.context.clone().chain(block.rows.clone()).map(|row| group.start + row).collect();
            let first = group.start + block.rows.start;
            for head in 0..heads {
                let stream = seed ^ (first as u32).wrapping_mul(0x85eb_ca6b) ^ (head as u32).wrapping_mul(0xc2b2_ae35);
                let factors = mask(block.rows.len() * seen.len(), stream, keep);
                for i in 0..block.rows.len() {
                    let visible = if block.causal { block.context.len() + i + 1 } else { seen.len() };
                    let query = at(first + i, 0, head);
                    let score = |&row: &usize| query.iter().zip(at(row, 1, head)).map(|(q, k)| q * k).sum::<f64>();
                    let exponentials: Vec<f64> =
                        seen[..visible].iter().map(|row| (score(row) / (depth as f64).sqrt()).exp()).collect();
                    let total: f64 = exponentials.iter().sum();
                    for (j, exponential) in exponentials.iter().enumerate() {
                        let weight = exponential / total * factors[i * seen.len() + j];
                        let out = &mut y[(first + i) * hidden + head * depth..][..depth];
                        out.iter_mut().zip(at(seen[j], 2, head)).for_each(|(out, v)| *out += weight * v);
                    }
                }
            }
        }
    }
    y
}

pub fn relu6(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.clamp(0.0, 6.0)).collect()
}

pub fn unit_rows(x: &[f64], width: usize) -> Vec<f64> {
    let of_row = |row: &[f64]| {
        let length = (row.iter().map(|v| v * v).sum::<f64>() + 1e-12).sqrt();
        row.iter().map(|v| v / length).collect::<Vec<f64>>()
    };
    x.chunks_exact(width).flat_map(of_row).collect()
}

pub fn log_softmax(x: &[f64], width: usize) -> Vec<f64> {
    let of_row = |row: &[f64]| {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let all = most + row.iter().map(|v| (v - most).exp()).sum::<f64>().ln();
        row.iter().map(|v| v - all).collect::<Vec<f64>>()
    };
    x.chunks_exact(width).flat_map(of_row).collect()
}

/// See [`log_shares`](crate::ops::log_shares).
pub fn log_shares(scores: &[f64], temperature: f64, numbers: [&[u32]; 2], [least, factor]: [f64; 2]) -> Vec<f64> {
    let of_row = |(row, number): (&[f64], &u32)| {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = |own: bool| -> f64 {
            let counted = row.iter().zip(numbers[1]).filter(|(_, column)| !own || *column == number);
            counted.map(|(v, _)| ((v - most) / temperature).exp()).sum()
        };
        if numbers[1].contains(number) { (sum(true) / sum(false) + least).ln() } else { 0.0 }
    };
    vec![factor * scores.chunks_exact(numbers[1].len()).zip(numbers[0]).map(of_row).sum::<f64>()]
}

/// Of every result's pixel nine pixels, all channels of each.
pub fn patches(x: &[f64], plane: Plane) -> Vec<f64> {
    let Plane { side, stride, channels } = plane;
    let (out, before) = (side / stride, if stride == 1 { 1 } else { 0 });
    let mut y = Vec::new();
    for image in x.chunks_exact(plane.inputs()) {
        for pixel in 0..out * out {
            for k in 0..9 {
                let row = (pixel / out * stride + k / 3).wrapping_sub(before);
                let column = (pixel % out * stride + k % 3).wrapping_sub(before);
                let seen = row < side && column < side;
                y.extend((0..channels).map(|channel| if seen { image[(row * side + column) * channels + channel] } else { 0.0 }));
            }
        }
    }
    y
}

pub fn convolution_relu6(x: &[f64], weight: &[f64], bias: &[f64], plane: Plane) -> Vec<f64> {
    let width = 9 * plane.channels;
    let of_patch = |patch: &[f64]| {
        let sum = |(weight, bias): (&[f64], &f64)| bias + patch.iter().zip(weight).map(|(x, w)| x * w).sum::<f64>();
        weight.chunks_exact(width).zip(bias).map(sum).collect::<Vec<f64>>()
    };
    relu6(&patches(x, plane).chunks_exact(width).flat_map(of_patch).collect::<Vec<f64>>())
}

pub fn depthwise_relu6(x: &[f64], weight: &[f64], bias: &[f64], plane: Plane) -> Vec<f64> {
    let Plane { side, stride, channels } = plane;
    let (out, before) = (side / stride, if stride == 1 { 1 } else { 0 });
    let mut y = Vec::new();
    for image in x.chunks_exact(plane.inputs()) {
        for pixel in 0..out * out {
            for channel in 0..channels {
                let mut sum = bias[channel];
                for k in 0..9 {
                    let row = (pixel / out * stride + k / 3).wrapping_sub(before);
                    let column = (pixel % out * stride + k % 3).wrapping_sub(before);
                    if row < side && column < side {
                        sum += image[(row * side + column) * channels + channel] * weight[k * channels + channel];
                    }
                }
                y.push(sum);
            }
        }
    }
    relu6(&y)
}
