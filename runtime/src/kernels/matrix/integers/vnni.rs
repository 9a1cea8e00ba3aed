//! AVX-512 VNNI: `vpdpbusd` adds four products of an unsigned and a signed byte to each of 16 sums.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_si512, _mm512_storeu_si512,
};

use super::{Dot, GROUP, Product, WIDEST};

/// Only [`run`] calls its functions.
pub(super) struct Vnni;

pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// # Panics
/// Where this processor does not have the instructions.
pub(super) fn run(product: Product<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn run(product: Product<'_>) {
        product.run::<Vnni, { Vnni::ROWS }>();
    }
    assert!(available());
    // SAFETY: the processor has the instructions.
    unsafe { run(product) }
}

/// Sixteen sums, or the weights that add to them, in each of two registers.
impl Dot for Vnni {
    const ROWS: usize = 12;
    const WIDTH: usize = 32;
    const LEAST: i32 = 0;
    type Sums = [__m512i; 2];
    type Weights = [__m512i; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: `run` has seen that the processor has the instruction; so below.
        unsafe { [_mm512_setzero_si512(); 2] }
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let halves = weights.as_chunks::<64>().0;
        // SAFETY: as above, and 64 bytes are read where there are 64.
        [&halves[0], &halves[1]].map(|half| unsafe { _mm512_loadu_si512(half.as_ptr().cast()) })
    }

    #[inline(always)]
    fn add(sums: Self::Sums, weights: Self::Weights, x: [u8; GROUP]) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let x = _mm512_set1_epi32(i32::from_le_bytes(x));
            [_mm512_dpbusd_epi32(sums[0], x, weights[0]), _mm512_dpbusd_epi32(sums[1], x, weights[1])]
        }
    }

    #[inline(always)]
    fn store(sums: Self::Sums, to: &mut [i32; WIDEST]) {
        for (to, sums) in to.as_chunks_mut::<16>().0.iter_mut().zip(sums) {
            // SAFETY: as above, and 64 bytes are written where there are 64.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), sums) }
        }
    }
}
