//! What matrix products are computed in: any of these on CUDA devices; on the CPU f32 or, where it has AMX, bf16.

use std::sync::atomic::{AtomicU8, Ordering};

/// What the factors of matrix products are rounded to. Sums, weights and their gradients are f32 whatever it is; so are activations,
/// but on a CUDA device with bf16, where the layers store theirs in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// 24 bits of mantissa: nothing is rounded.
    #[default]
    F32,
    /// 11 bits.
    Tf32,
    /// 8 bits.
    Bf16,
}

static PRECISION: AtomicU8 = AtomicU8::new(0);

/// What products are computed in from now on, in the whole process.
pub fn set_precision(precision: Precision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
    // candle's own products, the few that are none of ours, have no other choice than this one.
    #[cfg(feature = "cuda")]
    candle_core::cuda_backend::set_gemm_reduced_precision_f32(precision != Precision::F32);
}

/// What products are computed in.
#[must_use]
pub fn precision() -> Precision {
    #[cfg(test)]
    if let Some(precision) = super::cuda::emulation::precision() {
        return precision;
    }
    match PRECISION.load(Ordering::Relaxed) {
        0 => Precision::F32,
        1 => Precision::Tf32,
        _ => Precision::Bf16,
    }
}
