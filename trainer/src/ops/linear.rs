//! Fully connected layer: `y = x · weightᵀ + bias`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernels::{Matrix, Product, add_assign, matmul};
use super::{f32_slice, on_cuda, rows_per_task, with_values};

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(self.name(), s1, l1)?;
        let (weight, bias) = (f32_slice(self.name(), s2, l2)?, f32_slice(self.name(), s3, l3)?);
        let (outputs, inputs) = l2.shape().dims2()?;
        let mut dims = l1.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == inputs && bias.len() == outputs => *last = outputs,
            _ => candle_core::bail!("linear: {:?} · {:?}ᵀ + [{}]", l1.dims(), l2.dims(), bias.len()),
        }
        let rows = x.len() / inputs;
        let mut y = Vec::with_capacity(rows * outputs);
        for _ in 0..rows {
            y.extend_from_slice(bias);
        }
        let size = Product { m: rows, n: outputs, k: inputs, accumulate: true, parallel: true };
        matmul(size, Matrix::rows(x, inputs), Matrix::rows(weight, inputs).transposed(), &mut y, outputs);
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let name = self.name();
        let (outputs, inputs) = weight.dims2()?;
        let rows = x.elem_count() / inputs;
        // Inputs that lead to no parameter (region features) need no gradient.
        let wants_dx = x.track_op();
        let (dx, dw, db) = with_values(name, [x, weight, gradient], |[x, weight, dy]| {
            let mut dx = Vec::new();
            if wants_dx {
                dx = vec![0f32; rows * inputs];
                let size = Product { m: rows, n: inputs, k: outputs, accumulate: false, parallel: true };
                matmul(size, Matrix::rows(dy, outputs), Matrix::rows(weight, inputs), &mut dx, inputs);
            }
            let mut dw = vec![0f32; outputs * inputs];
            let size = Product { m: outputs, n: inputs, k: rows, accumulate: false, parallel: true };
            matmul(size, Matrix::rows(dy, outputs).transposed(), Matrix::rows(x, inputs), &mut dw, inputs);
            (dx, dw, column_sums(dy, outputs))
        })?;
        let device = x.device();
        let dx = if wants_dx { Some(Tensor::from_vec(dx, x.shape(), device)?) } else { None };
        Ok((dx, Some(Tensor::from_vec(dw, (outputs, inputs), device)?), Some(Tensor::from_vec(db, outputs, device)?)))
    }
}

/// Sum over the rows of a row-major matrix with `width` columns, in a fixed order.
pub(super) fn column_sums(values: &[f32], width: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = values
        .par_chunks(rows_per_task(width) * width)
        .map(|rows| {
            let mut sums = vec![0f32; width];
            for row in rows.chunks_exact(width) {
                add_assign(&mut sums, row);
            }
            sums
        })
        .collect();
    let mut total = vec![0f32; width];
    for sums in &partial {
        add_assign(&mut total, sums);
    }
    total
}

/// `x · weightᵀ + bias`: `x` is `[…, inputs]`, `weight` `[outputs, inputs]`, `bias` `[outputs]`; the result `[…, outputs]`.
///
/// # Errors
/// Shapes that do not fit, or a dtype other than f32.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::linear(x, weight, bias, super::precision(), super::cuda::Element::F32));
    x.contiguous()?.apply_op3(weight, bias, Linear)
}

/// Scalar products of the rows of `a` `[n, width]` with those of `b` `[m, width]`, in f32 whatever other products are computed in: `[n, m]`.
///
/// # Errors
/// Shapes that do not fit, or a dtype other than f32.
pub fn scalar_products(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    on_cuda!(a.device(), super::cuda::scalar_products(a, b));
    a.matmul(&b.t()?)
}

/// [`gelu`](super::gelu) of [`linear`].
///
/// # Errors
/// As [`linear`].
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::linear_gelu(x, weight, bias, super::precision(), super::cuda::Element::F32));
    super::gelu(&linear(x, weight, bias)?)
}
