//! AVX-512 VNNI: `vpdpbusd` adds four products of an unsigned and a signed byte to each of 16 sums.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512i, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_mullo_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16, _mm512_storeu_ps, _mm512_sub_epi8, _mm512_sub_epi32,
};

use super::{Dot, GROUP, Row, WIDEST, Work, blocks};

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
pub(super) fn run(work: impl Work) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn run(work: impl Work) {
        work.run::<Vnni>();
    }
    assert!(available());
    // SAFETY: the processor has the instructions.
    unsafe { run(work) }
}

/// Sixteen sums, or the weights that add to them, in each of two registers.
impl Dot for Vnni {
    const ROWS: usize = 12;
    const WIDTH: usize = 32;
    const LEAST: i32 = 0;
    type Sums = [__m512i; 2];
    type Floats = [__m512; 2];
    type Weights = [__m512i; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: `run` has seen that the processor has the instruction; so below.
        unsafe { [_mm512_setzero_si512(); 2] }
    }

    #[inline(always)]
    fn zero_floats() -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm512_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn load(weights: &[i8]) -> Self::Weights {
        let halves = weights.as_chunks::<64>().0;
        // SAFETY: as above, and 64 bytes are read where there are 64.
        [&halves[0], &halves[1]].map(|half| unsafe { _mm512_loadu_si512(half.as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_halves(weights: &[u8]) -> Self::Weights {
        let bytes = &weights.as_chunks::<64>().0[0];
        // SAFETY: as above.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            let (lowest, offset) = (_mm512_set1_epi8(0xf), _mm512_set1_epi8(blocks::OFFSET));
            [bytes, _mm512_srli_epi16::<4>(bytes)].map(|half| _mm512_sub_epi8(_mm512_and_si512(half, lowest), offset))
        }
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
    fn store_scaled(sums: Self::Sums, of: &[i32], row: Row, to: &mut [f32; WIDEST]) {
        let halves = to.as_chunks_mut::<16>().0.iter_mut().zip(of.as_chunks::<16>().0);
        for ((to, of), sums) in halves.zip(sums) {
            // SAFETY: as above, and 64 bytes are read and written where there are 64.
            unsafe {
                let of = _mm512_loadu_si512(of.as_ptr().cast());
                let centred = _mm512_sub_epi32(sums, _mm512_mullo_epi32(of, _mm512_set1_epi32(row.zero)));
                _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_set1_ps(row.scale)));
            }
        }
    }

    #[inline(always)]
    fn add_scaled(floats: Self::Floats, sums: Self::Sums, scales: &[f32]) -> Self::Floats {
        let scales = scales.as_chunks::<16>().0;
        // SAFETY: as above, and 16 floats are read where there are 16.
        unsafe {
            let scales = [_mm512_loadu_ps(scales[0].as_ptr()), _mm512_loadu_ps(scales[1].as_ptr())];
            [
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), scales[0], floats[0]),
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), scales[1], floats[1]),
            ]
        }
    }

    #[inline(always)]
    fn store_floats(floats: Self::Floats, to: &mut [f32; WIDEST]) {
        for (to, floats) in to.as_chunks_mut::<16>().0.iter_mut().zip(floats) {
            // SAFETY: as above, and 16 floats are written where there are 16.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), floats) }
        }
    }
}
