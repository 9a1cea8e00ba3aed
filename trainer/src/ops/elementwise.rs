//! LayerNorm, GELU and residual dropout.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{TASK_VALUES, f32_slice, kernels, on_cuda, rows_per_task, with_values};

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
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
        let chunk = rows_per_task(weight.len()) * weight.len();
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| kernels::layer_norm(x, weight, bias, self.eps, y));
        Ok((CpuStorage::F32(y), l1.shape().clone()))
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
        let (dx, dw, db) = with_values(name, [x, weight, gradient], |[x, weight, dy]| {
            let h = weight.len();
            let chunk = rows_per_task(h) * h;
            let mut dx = vec![0f32; x.len()];
            let partial: Vec<(Vec<f32>, Vec<f32>)> = dx
                .par_chunks_mut(chunk)
                .zip(x.par_chunks(chunk))
                .zip(dy.par_chunks(chunk))
                .map(|((dx, x), dy)| {
                    let (mut dw, mut db) = (vec![0f32; h], vec![0f32; h]);
                    kernels::layer_norm_backward(x, weight, self.eps, dy, dx, &mut dw, &mut db);
                    (dw, db)
                })
                .collect();
            // Summed in order, so that a run does not depend on the threads' timing.
            let (mut dw, mut db) = (vec![0f32; h], vec![0f32; h]);
            for (w, b) in &partial {
                kernels::add_assign(&mut dw, w);
                kernels::add_assign(&mut db, b);
            }
            (dx, dw, db)
        })?;
        let (device, h) = (x.device(), weight.elem_count());
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, h, device)?),
            Some(Tensor::from_vec(db, h, device)?),
        ))
    }
}

/// LayerNorm over the last dimension: `x` is `[…, hidden]`, `weight` and `bias` are `[hidden]`.
///
/// # Errors
/// Shapes that do not fit, or a dtype other than f32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::layer_norm(x, weight, bias, eps));
    x.contiguous()?.apply_op3(weight, bias, LayerNorm { eps })
}

/// An operator on each value alone.
struct Elementwise {
    name: &'static str,
    /// Values to results.
    forward: fn(&[f32], &mut [f32]),
    /// Values and the gradient by the results to the gradient by the values.
    backward: fn(&[f32], &[f32], &mut [f32]),
}

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(self.name, storage, layout)?;
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(TASK_VALUES).zip(x.par_chunks(TASK_VALUES)).for_each(|(y, x)| (self.forward)(x, y));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(self.name, [x, gradient], |[x, dy]| {
            let mut dx = vec![0f32; x.len()];
            dx.par_chunks_mut(TASK_VALUES)
                .zip(x.par_chunks(TASK_VALUES))
                .zip(dy.par_chunks(TASK_VALUES))
                .for_each(|((dx, x), dy)| (self.backward)(x, dy, dx));
            dx
        })?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// GELU with the exact normal distribution function (error function, not the tanh approximation).
///
/// # Errors
/// A dtype other than f32.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::gelu(x));
    let gelu = Elementwise { name: "gelu_erf", forward: kernels::gelu, backward: kernels::gelu_backward };
    x.contiguous()?.apply_op1(gelu)
}

/// `min(max(x, 0), 6)`; the gradient is 0 at both ends.
///
/// # Errors
/// A dtype other than f32.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::relu6(x, super::cuda::Element::F32));
    let relu6 = Elementwise { name: "relu6", forward: kernels::relu6, backward: kernels::relu6_backward };
    x.contiguous()?.apply_op1(relu6)
}

struct DropoutAdd {
    seed: u32,
    keep: f32,
}

impl CustomOp2 for DropoutAdd {
    fn name(&self) -> &'static str {
        "dropout_add"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (residual, x) = (f32_slice(self.name(), s1, l1)?, f32_slice(self.name(), s2, l2)?);
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(TASK_VALUES)
            .zip(residual.par_chunks(TASK_VALUES))
            .zip(x.par_chunks(TASK_VALUES))
            .enumerate()
            .for_each(|(i, ((y, r), x))| kernels::dropout_add(r, x, self.seed, (i * TASK_VALUES) as u32, self.keep, y));
        Ok((CpuStorage::F32(y), l2.shape().clone()))
    }

    fn bwd(
        &self,
        _residual: &Tensor,
        x: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = with_values(self.name(), [gradient], |[dy]| {
            let mut dx = dy.to_vec();
            dx.par_chunks_mut(TASK_VALUES)
                .enumerate()
                .for_each(|(i, dx)| kernels::dropout_mask(dx, self.seed, (i * TASK_VALUES) as u32, self.keep));
            dx
        })?;
        Ok((Some(gradient.clone()), Some(Tensor::from_vec(dx, x.shape(), x.device())?)))
    }
}

/// Values that are dropped with probability `rate`, and the others over `1 - rate`. The mask is a function of `seed` and position: that of
/// [`dropout_add`].
///
/// # Errors
/// A dtype other than f32.
pub fn dropout(x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
    if rate == 0.0 {
        return Ok(x.clone());
    }
    on_cuda!(x.device(), super::cuda::dropout(x, rate, seed));
    dropout_add(&x.zeros_like()?, x, rate, seed)
}

/// `residual + dropout(x)`, both `[…]` of one shape; `rate` 0 adds only. The mask is a function of `seed` and position.
///
/// # Errors
/// Shapes that differ, or a dtype other than f32.
pub fn dropout_add(residual: &Tensor, x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
    if rate == 0.0 {
        return residual + x;
    }
    if residual.shape() != x.shape() {
        candle_core::bail!("dropout_add: {:?} against {:?}", residual.shape(), x.shape());
    }
    on_cuda!(x.device(), super::cuda::dropout_add(residual, x, rate, seed));
    residual.contiguous()?.apply_op2(&x.contiguous()?, DropoutAdd { seed, keep: 1.0 - rate })
}

/// [`layer_norm`] of [`dropout_add`]: what follows every sublayer.
///
/// # Errors
/// As those two.
pub fn dropout_add_layer_norm(
    (residual, x): (&Tensor, &Tensor),
    (rate, seed): (f32, u32),
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<Tensor> {
    on_cuda!(
        x.device(),
        super::cuda::dropout_add_layer_norm((residual, x), (rate, seed), &[weight, bias], eps, super::cuda::Element::F32)
    );
    layer_norm(&dropout_add(residual, x, rate, seed)?, weight, bias, eps)
}
