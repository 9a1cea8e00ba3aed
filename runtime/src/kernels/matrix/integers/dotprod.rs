//! ARM's dot product: `sdot` adds four products of signed bytes to each of four sums.
#![allow(unsafe_code)]

use std::arch::aarch64::{int8x16_t, int32x4_t, vdupq_n_s32, vld1q_s8, vreinterpretq_s8_s32, vst1q_s32};
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Dot, GROUP, Product, WIDEST};

/// Only [`run`] calls its functions.
pub(super) struct DotProduct;

pub(super) fn available() -> bool {
    is_aarch64_feature_detected!("dotprod")
}

/// # Panics
/// Where this processor does not have the instruction.
pub(super) fn run(product: Product<'_>) {
    assert!(available());
    product.run::<DotProduct, { DotProduct::ROWS }>();
}

/// Four sums, or the weights that add to them, in each of four registers.
impl Dot for DotProduct {
    const ROWS: usize = 6;
    const WIDTH: usize = 16;
    const LEAST: i32 = -128;
    type Sums = [int32x4_t; 4];
    type Weights = [int8x16_t; 4];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM processor that there is a program for has NEON; so below.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let quarters = weights.as_chunks::<16>().0;
        // SAFETY: as above, and 16 bytes are read where there are 16.
        [0, 1, 2, 3].map(|quarter: usize| unsafe { vld1q_s8(quarters[quarter].as_ptr()) })
    }

    #[inline(always)]
    fn add(mut sums: Self::Sums, weights: Self::Weights, x: [u8; GROUP]) -> Self::Sums {
        // SAFETY: as above.
        let x = unsafe { vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(x))) };
        for (sum, weights) in sums.iter_mut().zip(weights) {
            // SAFETY: `run` has seen that the processor has the instruction, which works on these registers alone. It has no
            // stable intrinsic yet.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {weights:v}.16b, {x:v}.16b",
                    sum = inout(vreg) *sum,
                    weights = in(vreg) weights,
                    x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        sums
    }

    #[inline(always)]
    fn store(sums: Self::Sums, to: &mut [i32; WIDEST]) {
        for (to, sums) in to.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            // SAFETY: as above, and 16 bytes are written where there are 16.
            unsafe { vst1q_s32(to.as_mut_ptr(), sums) }
        }
    }
}
