//! Any processor's instructions.

use multiversion::multiversion;

use super::{Dot, GROUP, Row, WIDEST, Work, blocks};

pub(super) struct Plain;

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn run<W: Work>(work: W) {
    work.run::<Plain>();
}

impl Dot for Plain {
    const ROWS: usize = 4;
    const WIDTH: usize = 16;
    const LEAST: i32 = 0;
    type Sums = [i32; 16];
    type Floats = [f32; 16];
    type Weights = [[i8; GROUP]; 16];

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0; 16]
    }

    #[inline(always)]
    fn zero_floats() -> Self::Floats {
        [0.0; 16]
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let mut loaded = [[0; GROUP]; 16];
        loaded.as_flattened_mut().copy_from_slice(weights);
        loaded
    }

    #[inline(always)]
    fn load_halves(weights: &[u8]) -> Self::Weights {
        let mut loaded = [[0; GROUP]; 16];
        let (lower, upper) = loaded.as_flattened_mut().split_at_mut(32);
        for ((lower, upper), byte) in lower.iter_mut().zip(upper).zip(weights) {
            *lower = (byte & 0xf).cast_signed() - blocks::OFFSET;
            *upper = (byte >> 4).cast_signed() - blocks::OFFSET;
        }
        loaded
    }

    #[inline(always)]
    fn add(mut sums: Self::Sums, weights: Self::Weights, x: [u8; GROUP]) -> Self::Sums {
        for (sum, weights) in sums.iter_mut().zip(&weights) {
            for (weight, x) in weights.iter().zip(x) {
                *sum += i32::from(*weight) * i32::from(x);
            }
        }
        sums
    }

    #[inline(always)]
    fn store_scaled(sums: Self::Sums, of: &[i32], row: Row, to: &mut [f32; WIDEST]) {
        for ((to, sum), of) in to.iter_mut().zip(sums).zip(of) {
            *to = sum.wrapping_sub(row.zero.wrapping_mul(*of)) as f32 * row.scale;
        }
    }

    #[inline(always)]
    fn add_scaled(mut floats: Self::Floats, sums: Self::Sums, scales: &[f32]) -> Self::Floats {
        for ((float, sum), scale) in floats.iter_mut().zip(sums).zip(scales) {
            *float += sum as f32 * scale;
        }
        floats
    }

    #[inline(always)]
    fn store_floats(floats: Self::Floats, to: &mut [f32; WIDEST]) {
        to[..16].copy_from_slice(&floats);
    }
}
