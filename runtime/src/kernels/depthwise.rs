//! 3×3 depthwise convolution.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use super::{LANES, multiply_add};

/// A 3×3 kernel for each channel, and a bias.
#[derive(Debug)]
pub(crate) struct Depthwise {
    channels: usize,
    /// `[channels / LANES]` of nine taps, row by row.
    taps: Vec<[[f32; LANES]; 9]>,
    bias: Vec<[f32; LANES]>,
}

impl Depthwise {
    /// Lays out weights `[channels, 9]`; `None` where sizes do not fit, or channels are no multiple of [`LANES`].
    pub fn new(weights: &[f32], bias: &[f32]) -> Option<Self> {
        let channels = bias.len();
        if weights.len() != 9 * channels || !channels.is_multiple_of(LANES) || channels == 0 {
            return None;
        }
        let of_lanes = |first: usize| -> [[f32; LANES]; 9] {
            std::array::from_fn(|tap| std::array::from_fn(|lane| weights[(first + lane) * 9 + tap]))
        };
        let taps = (0..channels).step_by(LANES).map(of_lanes).collect();
        Some(Self { channels, taps, bias: bias.as_chunks().0.to_vec() })
    }

    /// Channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Convolves `rows` rows of `width` pixels, then ReLU6. `x` has `line` pixels a row, padding included, its first row and
    /// pixel being those that the first tap of the first result sees; `y` is dense.
    ///
    /// # Panics
    /// Where `x` or `y` is too short.
    pub fn relu6(&self, x: &[f32], line: usize, stride: usize, [rows, width]: [usize; 2], y: &mut [f32]) {
        convolve(self, x, line, stride, [rows, width], y);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn convolve(kernel: &Depthwise, x: &[f32], line: usize, stride: usize, size: [usize; 2], y: &mut [f32]) {
    if target_cfg_f!(any(target_feature = "fma", target_arch = "aarch64")) {
        all::<true>(kernel, x, line, stride, size, y);
    } else {
        all::<false>(kernel, x, line, stride, size, y);
    }
}

/// Lanes outermost: nine taps stay in registers, and a lane's part of three rows in the first cache.
#[inline(always)]
fn all<const FUSED: bool>(kernel: &Depthwise, x: &[f32], line: usize, stride: usize, [rows, width]: [usize; 2], y: &mut [f32]) {
    let channels = kernel.channels;
    for row in 0..rows {
        let y = &mut y[row * width * channels..][..width * channels];
        for (block, (taps, bias)) in kernel.taps.iter().zip(&kernel.bias).enumerate() {
            let first = block * LANES;
            let lines: [&[f32]; 3] = std::array::from_fn(|dy| &x[(row * stride + dy) * line * channels + first..]);
            for column in 0..width {
                let mut sums = *bias;
                for (dy, from) in lines.iter().enumerate() {
                    for dx in 0..3 {
                        let from = &from[(column * stride + dx) * channels..][..LANES];
                        let tap = &taps[3 * dy + dx];
                        for lane in 0..LANES {
                            sums[lane] = multiply_add::<FUSED>(from[lane], tap[lane], sums[lane]);
                        }
                    }
                }
                let to = &mut y[column * channels + first..][..LANES];
                for lane in 0..LANES {
                    to[lane] = sums[lane].clamp(0.0, 6.0);
                }
            }
        }
    }
}
