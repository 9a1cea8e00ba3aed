//! Arithmetic of our own where the built-in engine is slow: products with weights that stay in 8 or 4 bits in memory, attention,
//! LayerNorm, and the convolutional backbone. Written once, compiled for several instruction sets and chosen at run time: products of
//! floats through `pulp` (AVX-512, AVX2, NEON), those of integers with AVX-512 VNNI or ARM's dot product, the rest as plain loops over
//! [`LANES`] floats through `multiversion`.

mod attention;
mod bottleneck;
mod depthwise;
mod matrix;
mod normalize;
mod self_attention;

pub(crate) use self::attention::{Cache, CachedAttention};
pub(crate) use self::bottleneck::{Bottleneck, Network, Scratch, Stem};
pub(crate) use self::depthwise::Depthwise;
pub(crate) use self::matrix::{Activation, BLOCK, Layout, Matrix, Weights, multiplies_bytes, round_rows};
pub(crate) use self::normalize::LayerNorm;
pub(crate) use self::self_attention::SelfAttention;
use crate::lanes::LANES;

/// Whether this processor has vector instructions that the kernels know; tract's own know more, such as 32-bit ARM's.
pub(crate) fn available() -> bool {
    matrix::lanes() > 1
}

/// `a · b + c`, in one rounding where the instruction set has an instruction for it.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}
