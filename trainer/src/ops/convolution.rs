//! The convolutional backbone's operators on `[pixels, channels]`: 3×3, 3×3 depthwise and pointwise convolution, each with ReLU6
//! (a pointwise one is [`linear`](super::linear), and a 3×3 one is that of what it sees).

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernels::{self, DepthwiseGradient, Plane, add_assign};
use super::{f32_slice, on_cuda, with_values};

struct Depthwise {
    plane: Plane,
}

impl CustomOp3 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise_relu6"
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
        let images = x.len() / self.plane.inputs();
        let mut y = vec![0f32; images * self.plane.outputs()];
        y.par_chunks_exact_mut(self.plane.outputs())
            .zip(x.par_chunks_exact(self.plane.inputs()))
            .for_each(|(y, x)| kernels::depthwise_relu6(x, weight, bias, self.plane, y));
        let pixels = self.plane.outputs() / self.plane.channels;
        Ok((CpuStorage::F32(y), Shape::from((images, pixels, self.plane.channels))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (name, plane) = (self.name(), self.plane);
        let (dx, dw, db) = with_values(name, [x, weight, result, gradient], |[x, weight, y, dy]| {
            let mut dx = vec![0f32; x.len()];
            let partial: Vec<(Vec<f32>, Vec<f32>)> = dx
                .par_chunks_exact_mut(plane.inputs())
                .zip(x.par_chunks_exact(plane.inputs()))
                .zip(y.par_chunks_exact(plane.outputs()).zip(dy.par_chunks_exact(plane.outputs())))
                .map(|((dx, x), (y, dy))| {
                    let (mut dw, mut db) = (vec![0f32; weight.len()], vec![0f32; plane.channels]);
                    let of = DepthwiseGradient { x, weight, y, dy };
                    kernels::depthwise_relu6_backward(of, plane, dx, &mut dw, &mut db);
                    (dw, db)
                })
                .collect();
            // Summed in order, so that a run does not depend on the threads' timing.
            let (mut dw, mut db) = (vec![0f32; weight.len()], vec![0f32; plane.channels]);
            for (w, b) in &partial {
                add_assign(&mut dw, w);
                add_assign(&mut db, b);
            }
            (dx, dw, db)
        })?;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, weight.shape(), device)?),
            Some(Tensor::from_vec(db, plane.channels, device)?),
        ))
    }
}

/// ReLU6 of a 3×3 depthwise convolution over square images: `x` is `[images, side², channels]`, `weight` `[9, channels]` (kernel
/// position first), `bias` `[channels]`; the result `[images, (side / stride)², channels]`. Stride 1 pads one pixel all round,
/// stride 2 one at bottom and right.
///
/// # Errors
/// Shapes that do not fit, or a dtype other than f32.
pub fn depthwise_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let (plane, fits) = plane(x, stride)?;
    let channels = plane.channels;
    if !fits || weight.dims() != [9, channels] || bias.dims() != [channels] {
        candle_core::bail!("depthwise_relu6: {:?} by {:?} + {:?}, stride {stride}", x.dims(), weight.dims(), bias.dims());
    }
    on_cuda!(x.device(), super::cuda::depthwise_relu6(x, weight, bias, plane, super::cuda::Element::F32));
    x.contiguous()?.apply_op3(weight, bias, Depthwise { plane })
}

/// Images of `x` `[images, side², channels]`, and whether a 3×3 convolution fits them.
fn plane(x: &Tensor, stride: usize) -> Result<(Plane, bool)> {
    let (_, pixels, channels) = x.dims3()?;
    let plane = Plane { side: pixels.isqrt(), stride, channels };
    let fits = plane.side * plane.side == pixels && (stride == 1 || (stride == 2 && plane.side.is_multiple_of(2)));
    Ok((plane, fits))
}

struct Patches {
    plane: Plane,
}

impl Patches {
    /// Values that all results of an image see.
    fn outputs(&self) -> usize {
        9 * self.plane.outputs()
    }
}

impl CustomOp1 for Patches {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(self.name(), storage, layout)?;
        let images = x.len() / self.plane.inputs();
        let mut y = vec![0f32; images * self.outputs()];
        y.par_chunks_exact_mut(self.outputs())
            .zip(x.par_chunks_exact(self.plane.inputs()))
            .for_each(|(y, x)| kernels::patches(x, self.plane, y));
        let width = 9 * self.plane.channels;
        Ok((CpuStorage::F32(y), Shape::from((images, self.outputs() / width, width))))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(self.name(), [gradient], |[dy]| {
            let mut dx = vec![0f32; x.elem_count()];
            dx.par_chunks_exact_mut(self.plane.inputs())
                .zip(dy.par_chunks_exact(self.outputs()))
                .for_each(|(dx, dy)| kernels::patches_backward(dy, self.plane, dx));
            dx
        })?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// ReLU6 of a 3×3 convolution over square images: `x` is `[images, side², channels]`, `weight` `[out, 9 · channels]` (kernel position,
/// then channel), `bias` `[out]`; the result `[images, (side / stride)², out]`. Padding is that of [`depthwise_relu6`].
///
/// # Errors
/// Shapes that do not fit, or a dtype other than f32.
pub fn convolution_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let (plane, fits) = plane(x, stride)?;
    if !fits || weight.dim(1)? != 9 * plane.channels {
        candle_core::bail!("convolution_relu6: {:?} by {:?}, stride {stride}", x.dims(), weight.dims());
    }
    pointwise_relu6(&patches(x, plane)?, weight, bias)
}

fn patches(x: &Tensor, plane: Plane) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::patches(x, plane, super::cuda::Element::F32));
    x.contiguous()?.apply_op1(Patches { plane })
}

/// ReLU6 of a pointwise convolution: [`linear`](super::linear), then [`relu6`](super::relu6).
///
/// # Errors
/// As [`linear`](super::linear).
pub fn pointwise_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    super::relu6(&super::linear(x, weight, bias)?)
}
