//! What heads and objectives are composed of, on whatever it works: on tensors, at once ([`AtOnce`]), or put down first and then done as a
//! whole by kernels for CUDA devices, again and again (`cuda::computations`).

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::{Relations, Scores, Targets};

/// This module's operators by their names, on arrays of f32 values. Weights are tensors whatever the arrays are.
///
/// All of them fail as the functions do, if not before it is done what was put down.
pub trait Operators {
    /// An array.
    type Array: Clone;

    /// A weight.
    fn weight(&self, weight: &Tensor) -> Self::Array;
    /// Constants, `[rows, width]`.
    fn constants(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Self::Array>;
    /// Rows of a matrix that follow upon each other.
    fn some_rows(&self, x: &Self::Array, rows: Range<usize>) -> Result<Self::Array>;
    /// An array, so many times.
    fn scaled(&self, x: &Self::Array, factor: f64) -> Result<Self::Array>;
    /// See [`linear`](super::linear).
    fn linear(&self, x: &Self::Array, weight: &Tensor, bias: &Tensor) -> Result<Self::Array>;
    /// See [`linear_gelu`](super::linear_gelu).
    fn linear_gelu(&self, x: &Self::Array, weight: &Tensor, bias: &Tensor) -> Result<Self::Array>;
    /// See [`layer_norm`](super::layer_norm).
    fn layer_norm(&self, x: &Self::Array, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Self::Array>;
    /// See [`dropout`](super::dropout).
    fn dropout(&self, x: &Self::Array, rate: f32, seed: u32) -> Result<Self::Array>;
    /// See [`relu`](super::relu).
    fn relu(&self, x: &Self::Array) -> Result<Self::Array>;
    /// See [`relu_product`](super::relu_product).
    fn relu_product(&self, a: &Self::Array, b: &Self::Array) -> Result<Self::Array>;
    /// See [`first_and_mean`](super::first_and_mean).
    fn first_and_mean(&self, x: &Self::Array, counts: &[usize]) -> Result<Self::Array>;
    /// See [`unit_rows`](super::unit_rows).
    fn unit_rows(&self, x: &Self::Array) -> Result<Self::Array>;
    /// See [`scalar_products`](super::scalar_products).
    fn scalar_products(&self, a: &Self::Array, b: &Self::Array) -> Result<Self::Array>;
    /// See [`bounded_exp`](super::bounded_exp).
    fn bounded_exp(&self, x: &Tensor, bounds: [f32; 2]) -> Result<Self::Array>;
    /// See [`log_shares`](super::log_shares).
    fn log_shares(
        &self,
        scores: &Self::Array,
        temperature: &Self::Array,
        numbers: [&[u32]; 2],
        least_and_factor: [f64; 2],
    ) -> Result<Self::Array>;
    /// See [`cross_modal`](super::cross_modal).
    fn cross_modal(
        &self,
        scores: &Scores<Self::Array>,
        temperature: &Self::Array,
        relations: &Relations,
        factor: f64,
    ) -> Result<Self::Array>;
    /// See [`soft_cross_entropy`](super::soft_cross_entropy).
    fn soft_cross_entropy(&self, logits: &Self::Array, targets: &Self::Array) -> Result<Self::Array>;
    /// See [`binary_cross_entropy`](super::binary_cross_entropy).
    fn binary_cross_entropy(&self, logits: &Self::Array, targets: &Self::Array) -> Result<Self::Array>;
    /// See [`squared_error`](super::squared_error).
    fn squared_error(&self, x: &Self::Array, targets: &Self::Array) -> Result<Self::Array>;
    /// See [`tied_cross_entropy`](super::tied_cross_entropy).
    fn tied_cross_entropy(
        &self,
        hidden: &Self::Array,
        weight: &Tensor,
        bias: &Self::Array,
        targets: &Targets,
    ) -> Result<Self::Array>;
}

/// Something that is computed of arrays.
pub trait Computation {
    /// What it is called: those of one name are of one kind, and take turns where memory is kept for them.
    const NAME: &'static str;

    /// What is computed of `given`.
    ///
    /// # Errors
    /// Another number of arrays, and those of the operators.
    fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> Result<Vec<O::Array>>;
}

/// Operators as functions of tensors; constants go to this device.
pub struct AtOnce<'a>(pub &'a Device);

impl Operators for AtOnce<'_> {
    type Array = Tensor;

    fn weight(&self, weight: &Tensor) -> Tensor {
        weight.clone()
    }

    fn scaled(&self, x: &Tensor, factor: f64) -> Result<Tensor> {
        x.affine(factor, 0.0)
    }

    fn constants(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
        super::from_host(values, shape, self.0)
    }

    fn some_rows(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor> {
        x.narrow(0, rows.start, rows.len())
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        super::linear(x, weight, bias)
    }

    fn linear_gelu(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        super::linear_gelu(x, weight, bias)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        super::layer_norm(x, weight, bias, eps)
    }

    fn dropout(&self, x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
        super::dropout(x, rate, seed)
    }

    fn relu(&self, x: &Tensor) -> Result<Tensor> {
        super::relu(x)
    }

    fn relu_product(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        super::relu_product(a, b)
    }

    fn first_and_mean(&self, x: &Tensor, counts: &[usize]) -> Result<Tensor> {
        super::first_and_mean(x, counts)
    }

    fn unit_rows(&self, x: &Tensor) -> Result<Tensor> {
        super::unit_rows(x)
    }

    fn scalar_products(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        super::scalar_products(a, b)
    }

    fn bounded_exp(&self, x: &Tensor, bounds: [f32; 2]) -> Result<Tensor> {
        super::bounded_exp(x, bounds)
    }

    fn log_shares(
        &self,
        scores: &Tensor,
        temperature: &Tensor,
        numbers: [&[u32]; 2],
        least_and_factor: [f64; 2],
    ) -> Result<Tensor> {
        super::log_shares(scores, temperature, numbers, least_and_factor)
    }

    fn cross_modal(&self, scores: &Scores<Tensor>, temperature: &Tensor, relations: &Relations, factor: f64) -> Result<Tensor> {
        super::cross_modal(scores, temperature, relations, factor)
    }

    fn soft_cross_entropy(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        super::soft_cross_entropy(logits, targets)
    }

    fn binary_cross_entropy(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        super::binary_cross_entropy(logits, targets)
    }

    fn squared_error(&self, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        super::squared_error(x, targets)
    }

    fn tied_cross_entropy(&self, hidden: &Tensor, weight: &Tensor, bias: &Tensor, targets: &Targets) -> Result<Tensor> {
        super::tied_cross_entropy(hidden, weight, bias, targets)
    }
}
