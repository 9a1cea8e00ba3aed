//! ARM's dot product: `sdot` adds four products of signed bytes to each of four sums.
#![allow(unsafe_code)]

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vdupq_n_u8, vfmaq_f32,
    vld1q_f32, vld1q_s8, vld1q_s32, vld1q_u8, vmlsq_n_s32, vmulq_n_f32, vreinterpretq_s8_s32, vreinterpretq_s8_u8, vshrq_n_u8,
    vst1q_f32, vsubq_s8,
};
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Dot, GROUP, Row, WIDEST, Work, blocks};

/// Only [`run`] calls its functions.
pub(super) struct DotProduct;

pub(super) fn available() -> bool {
    is_aarch64_feature_detected!("dotprod")
}

/// # Panics
/// Where this processor does not have the instruction.
pub(super) fn run(work: impl Work) {
    assert!(available());
    work.run::<DotProduct>();
}

/// Four sums, or the weights that add to them, in each of four registers.
impl Dot for DotProduct {
    const ROWS: usize = 6;
    const WIDTH: usize = 16;
    const LEAST: i32 = -128;
    type Sums = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];
    type Weights = [int8x16_t; 4];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM processor that there is a program for has NEON; so below.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    fn zero_floats() -> Self::Floats {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let quarters = weights.as_chunks::<16>().0;
        // SAFETY: as above, and 16 bytes are read where there are 16.
        [0, 1, 2, 3].map(|quarter: usize| unsafe { vld1q_s8(quarters[quarter].as_ptr()) })
    }

    #[inline(always)]
    fn load_halves(weights: &[u8]) -> Self::Weights {
        let bytes = weights.as_chunks::<16>().0;
        // SAFETY: as above.
        unsafe {
            let (lowest, offset) = (vdupq_n_u8(0xf), vdupq_n_s8(blocks::OFFSET));
            let bytes = [vld1q_u8(bytes[0].as_ptr()), vld1q_u8(bytes[1].as_ptr())];
            let level = |half| vsubq_s8(vreinterpretq_s8_u8(half), offset);
            let lower = bytes.map(|bytes| level(vandq_u8(bytes, lowest)));
            let upper = bytes.map(|bytes| level(vshrq_n_u8::<4>(bytes)));
            [lower[0], lower[1], upper[0], upper[1]]
        }
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
    fn store_scaled(sums: Self::Sums, of: &[i32], row: Row, to: &mut [f32; WIDEST]) {
        let quarters = to.as_chunks_mut::<4>().0.iter_mut().zip(of.as_chunks::<4>().0);
        for ((to, of), sums) in quarters.zip(sums) {
            // SAFETY: as above, and 16 bytes are read and written where there are 16.
            unsafe {
                let centred = vmlsq_n_s32(sums, vld1q_s32(of.as_ptr()), row.zero);
                vst1q_f32(to.as_mut_ptr(), vmulq_n_f32(vcvtq_f32_s32(centred), row.scale));
            }
        }
    }

    #[inline(always)]
    fn add_scaled(mut floats: Self::Floats, sums: Self::Sums, scales: &[f32]) -> Self::Floats {
        for ((floats, sums), scales) in floats.iter_mut().zip(sums).zip(scales.as_chunks::<4>().0) {
            // SAFETY: as above, and 4 floats are read where there are 4.
            *floats = unsafe { vfmaq_f32(*floats, vcvtq_f32_s32(sums), vld1q_f32(scales.as_ptr())) };
        }
        floats
    }

    #[inline(always)]
    fn store_floats(floats: Self::Floats, to: &mut [f32; WIDEST]) {
        for (to, floats) in to.as_chunks_mut::<4>().0.iter_mut().zip(floats) {
            // SAFETY: as above, and 4 floats are written where there are 4.
            unsafe { vst1q_f32(to.as_mut_ptr(), floats) }
        }
    }
}
