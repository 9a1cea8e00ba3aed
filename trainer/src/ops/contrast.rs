//! What contrasts are made of: rows of unit length, logarithms of softmax, and the temperature. Each is one kernel each way on CUDA
//! devices, where these arrays are small and every kernel that is asked for counts.

use candle_core::{D, Result, Tensor};

use super::{on_cuda, reference};

/// Added to the square of a row's length, so that a row of zeros has a gradient.
pub(super) const LEAST_SQUARE: f64 = 1e-12;

/// Rows divided by their lengths, `[n, width]`.
///
/// # Errors
/// A dtype other than f32.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::unit_rows(x));
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + LEAST_SQUARE)?.sqrt()?)
}

/// Logarithm of the softmax over the last dimension.
///
/// # Errors
/// A dtype other than f32.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::log_softmax(x));
    reference::log_softmax(x)
}

/// `exp(x)`, but no less than `least` and no more than `most`, where the gradient is 0.
///
/// # Errors
/// A dtype other than f32.
pub fn bounded_exp(x: &Tensor, [least, most]: [f32; 2]) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::bounded_exp(x, [least, most]));
    x.exp()?.clamp(least, most)
}
