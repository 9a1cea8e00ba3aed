//! The one quantizer of weights: 8 bits, symmetric, a scale for each output channel; or 4 bits with a scale for each block of inputs of
//! an output.

use half::f16;

/// Clipping that is tried for each channel, as shares of its largest magnitude: a few outliers may be cut where that makes the
/// rest finer. The share with the smallest squared error wins; on a tie the larger one.
const CLIPPING: [f32; 9] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6];
/// Levels on either side of zero. −128 is left out, so that the range is symmetric.
const LEVELS: f32 = 127.0;

/// A weight in 8 bits: `value ≈ level · scale[channel]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// Levels, laid out as the values were.
    pub levels: Vec<i8>,
    /// One for each channel.
    pub scales: Vec<f32>,
}

/// The channel of every element of a tensor whose channels lie along `axis`.
fn channel(shape: &[usize], axis: usize) -> impl Fn(usize) -> usize {
    let (count, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
    move |i| i / inner % count
}

/// Quantizes row-major `values` of a shape with one scale for each index of `axis`.
///
/// # Panics
/// If the shape has no such axis.
#[must_use]
pub fn quantize(values: &[f32], shape: &[usize], axis: usize) -> Quantized {
    let of = channel(shape, axis);
    let mut channels = vec![Vec::with_capacity(values.len() / shape[axis].max(1)); shape[axis]];
    values.iter().enumerate().for_each(|(i, &value)| channels[of(i)].push(value));
    let scales: Vec<f32> = channels.iter().map(|channel| scale(channel)).collect();
    Quantized { levels: values.iter().enumerate().map(|(i, &value)| level(value, scales[of(i)])).collect(), scales }
}

/// The values that quantized ones stand for.
///
/// # Panics
/// If the shape has no such axis, or not so many scales along it.
#[must_use]
pub fn dequantize(quantized: &Quantized, shape: &[usize], axis: usize) -> Vec<f32> {
    let of = channel(shape, axis);
    quantized.levels.iter().enumerate().map(|(i, &level)| f32::from(level) * quantized.scales[of(i)]).collect()
}

fn level(value: f32, scale: f32) -> i8 {
    (value / scale).round_ties_even().clamp(-LEVELS, LEVELS) as i8
}

/// The scale of one channel; 1 where all of it is zero.
fn scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let error = |scale: f32| values.iter().map(|&v| f64::from(f32::from(level(v, scale)) * scale - v).powi(2)).sum::<f64>();
    let tried = CLIPPING.map(|share| (largest / LEVELS * share).max(f32::MIN_POSITIVE)).map(|scale| (scale, error(scale)));
    tried.into_iter().reduce(|best, other| if other.1 < best.1 { other } else { best }).map_or(1.0, |(scale, _)| scale)
}

/// Inputs of an output that share a scale where weights have 4 bits.
pub const BLOCK: usize = 32;
/// What a 4-bit level is stored too large by.
pub(crate) const OFFSET: f32 = 8.0;
/// Scales that are tried for each block, from the largest on, as shares of what would make its largest magnitude the last level. Of
/// normal values the best errs by 0.7 % more (squares) than the best of all scales.
fn block_shares() -> impl Iterator<Item = f32> {
    (0..=24).map(|step| 1.1 - 0.025 * step as f32)
}

/// A matrix in 4 bits, as ONNX Runtime's `MatMulNBits` reads it: `value ≈ (level − 8) · scale[block]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// Levels `[outputs, inputs]`, two a byte, the lower half first.
    pub levels: Vec<u8>,
    /// Scales `[outputs, inputs / BLOCK]`; they may be negative.
    pub scales: Vec<f16>,
}

/// Quantizes rows `[outputs, inputs]`, each block of [`BLOCK`] values with the scale that errs least.
///
/// # Panics
/// Where the values are no whole blocks.
#[must_use]
pub fn quantize_blocks(rows: &[f32]) -> Blocks {
    let (blocks, rest) = rows.as_chunks::<BLOCK>();
    assert!(rest.is_empty(), "inputs are no whole blocks");
    let scales: Vec<f16> = blocks.iter().map(|block| block_scale(block)).collect();
    let level = |(block, scale): (&[f32; BLOCK], &f16)| block.map(|value| (block_level(value, scale.to_f32()) + OFFSET) as u8);
    let levels: Vec<[u8; BLOCK]> = blocks.iter().zip(&scales).map(level).collect();
    Blocks { levels: pack_levels(levels.as_flattened()), scales }
}

/// Levels two a byte, the lower half first.
pub(crate) fn pack_levels(levels: &[u8]) -> Vec<u8> {
    levels.as_chunks::<2>().0.iter().map(|&[first, second]| first | second << 4).collect()
}

/// The values `[outputs, inputs]` that quantized ones stand for.
///
/// # Panics
/// Where there are not as many scales as blocks.
#[must_use]
pub fn dequantize_blocks(blocks: &Blocks) -> Vec<f32> {
    let (levels, rest) = blocks.levels.as_chunks::<{ BLOCK / 2 }>();
    assert!(rest.is_empty() && levels.len() == blocks.scales.len(), "a scale for each block");
    let values = |(levels, scale): (&[u8; BLOCK / 2], &f16)| {
        let scale = scale.to_f32();
        let both = |byte: u8| [byte & 0xf, byte >> 4].map(|level| (f32::from(level) - OFFSET) * scale);
        levels.map(both).as_flattened().to_vec()
    };
    levels.iter().zip(&blocks.scales).flat_map(values).collect()
}

/// The level of a value, from −8 to 7.
pub(crate) fn block_level(value: f32, scale: f32) -> f32 {
    (value / scale).round_ties_even().clamp(-OFFSET, OFFSET - 1.0)
}

/// The scale of one block, 1 where all of it is zero. There is one level more below zero than above: the largest magnitude may be given
/// it, by a negative scale where it is positive.
pub(crate) fn block_scale(values: &[f32]) -> f16 {
    let extreme = values.iter().fold(0f32, |extreme, &value| if value.abs() > extreme.abs() { value } else { extreme });
    let error = |scale: f16| {
        let scale = scale.to_f32();
        values.iter().map(|&v| f64::from(block_level(v, scale) * scale - v).powi(2)).sum::<f64>()
    };
    let ends = [-extreme / OFFSET, extreme / (OFFSET - 1.0)];
    let scales = ends.into_iter().flat_map(|end| block_shares().map(move |share| f16::from_f32(end * share)));
    let tried = scales.filter(|scale| scale.to_f32() != 0.0);
    let tried = tried.map(|scale| (scale, error(scale)));
    tried.reduce(|best, other| if other.1 < best.1 { other } else { best }).map_or(f16::ONE, |(scale, _)| scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_the_scale_that_errs_least() {
        // Exact in one block with its largest value below zero, in one with it above; and nothing.
        let below: Vec<f32> = (0..32).map(|i| (i % 16 - 8) as f32 * 0.25).collect();
        let above: Vec<f32> = below.iter().map(|v| -v).collect();
        let rows = [below.clone(), above, vec![0.0; 32]].concat();
        let blocks = quantize_blocks(&rows);
        assert_eq!(blocks.scales.iter().map(|s| s.to_f32()).collect::<Vec<_>>(), [0.25, -0.25, 1.0]);
        assert_eq!(blocks.levels[..2], [0x10, 0x32], "the lower half is the first of two");
        assert_eq!(dequantize_blocks(&blocks), rows);
        // An independent search over a fine grid finds scales that are little better.
        let wild: Vec<f32> = (0..2048).map(|i| (0..4).map(|k| ((i * i + 7 * k) as f32 * 0.37).sin()).sum()).collect();
        let found = dequantize_blocks(&quantize_blocks(&wild));
        let error = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let finest = |block: &[f32]| {
            let with = |scale: f32| block.iter().map(|v| (v / scale).round().clamp(-8.0, 7.0) * scale).collect::<Vec<_>>();
            let scales = (50..2000).flat_map(|i| [1.0, -1.0].map(|sign| sign * i as f32 * 5e-4));
            scales.map(|scale| error(&with(scale), block)).fold(f64::MAX, f64::min)
        };
        let (ours, finest) = (error(&found, &wild), wild.chunks(32).map(finest).sum::<f64>());
        assert!(ours < 1.05 * finest, "{ours} {finest}");
        // Scales below what 16 bits can hold.
        assert_eq!(dequantize_blocks(&quantize_blocks(&[1e-9; 32])), [0.0; 32]);
    }

    #[test]
    fn every_channel_has_the_scale_that_errs_least() {
        // Channel 0: exact at 1/127 of its largest value. Channel 1: a hundred small values and an outlier, that is cut
        // off. Channel 2: nothing.
        let exact: Vec<f32> = (-50..51).map(|v| v as f32 * 2.0 / 127.0).chain([2.0]).collect();
        let outlier: Vec<f32> = (0..101).map(|i| (i as f32 * 0.7).sin() * 0.01).chain([0.05]).collect();
        let rows = [exact.clone(), outlier.clone(), vec![0.0; 102]].concat();
        let by_row = quantize(&rows, &[3, 102], 0);
        assert_eq!(by_row.scales[0], 2.0 / 127.0);
        assert_eq!(by_row.scales[2], 1.0);
        let restored = dequantize(&by_row, &[3, 102], 0);
        assert!(restored.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-6));
        // An independent search over a fine grid finds no scale that is better by more than the coarse grid explains.
        let error = |scale: f32| -> f64 {
            outlier.iter().map(|v| f64::from((v / scale).round().clamp(-127.0, 127.0) * scale - v).powi(2)).sum()
        };
        let finest = (600..=1000).map(|i| error(0.05 / 127.0 * i as f32 / 1000.0)).fold(f64::INFINITY, f64::min);
        assert!(error(by_row.scales[1]) <= 1.25 * finest, "{} {finest}", error(by_row.scales[1]));

        // The same matrix transposed, by column.
        let columns: Vec<f32> = (0..102).flat_map(|c| (0..3).map(move |r| (r, c))).map(|(r, c)| rows[r * 102 + c]).collect();
        let by_column = quantize(&columns, &[102, 3], 1);
        assert_eq!(by_column.scales, by_row.scales);
        assert!((0..3).all(|r| (0..102).all(|c| by_column.levels[c * 3 + r] == by_row.levels[r * 102 + c])));
        assert_eq!(dequantize(&by_column, &[102, 3], 1)[3], restored[1]);
    }

    #[test]
    fn kernels_have_a_scale_for_each_output() {
        let kernel: Vec<f32> = (0..2 * 3 * 2 * 2).map(|i| if i < 12 { 1.0 } else { i as f32 }).collect();
        let quantized = quantize(&kernel, &[2, 3, 2, 2], 0);
        assert_eq!(quantized.levels[..12], [127; 12]);
        let restored = dequantize(&quantized, &[2, 3, 2, 2], 0);
        assert!(restored.iter().zip(&kernel).all(|(a, b)| (a - b).abs() <= 0.5 * 23.0 / 127.0));
    }
}
