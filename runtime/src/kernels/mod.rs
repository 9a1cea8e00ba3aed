//! Arithmetic of our own where the built-in engine is slow: products with weights that stay in 8 bits in memory, and the
//! convolutional backbone. Plain loops over arrays of [`LANES`] floats, compiled for several instruction sets and chosen at run time.

mod bottleneck;
mod depthwise;
mod matrix;

pub(crate) use self::bottleneck::{Bottleneck, Network, Scratch, Stem};
pub(crate) use self::depthwise::Depthwise;
pub(crate) use self::matrix::{Activation, Layout, Matrix, Weights};

/// Columns that are worked on together: one register of AVX-512, four of NEON.
pub(crate) const LANES: usize = 16;

/// `a · b + c`, in one rounding where the instruction set has an instruction for it.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}
