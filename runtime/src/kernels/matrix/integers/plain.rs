//! Any processor's instructions.

use multiversion::multiversion;

use super::{Dot, GROUP, Product, WIDEST};

pub(super) struct Plain;

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn run<'a>(product: Product<'a>) {
    product.run::<Plain, { Plain::ROWS }>();
}

impl Dot for Plain {
    const ROWS: usize = 4;
    const WIDTH: usize = 16;
    const LEAST: i32 = 0;
    type Sums = [i32; 16];
    type Weights = [[i8; GROUP]; 16];

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0; 16]
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let mut loaded = [[0; GROUP]; 16];
        loaded.as_flattened_mut().copy_from_slice(weights);
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
    fn store(sums: Self::Sums, to: &mut [i32; WIDEST]) {
        to[..16].copy_from_slice(&sums);
    }
}
