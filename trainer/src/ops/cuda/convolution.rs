//! Depthwise convolution with ReLU6, and what other convolutions see, forward and backward.

use candle_core::{Result, Shape, Tensor};

use super::elementwise::relu6_backward;
use super::machine::{Element, Grid, Kernel, Machine, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{column_sums, copy};
use crate::ops::kernels::Plane;

/// ReLU6 of a depthwise convolution.
pub(super) struct Depthwise {
    pub(super) plane: Plane,
}

/// What kernels take for a plane, and for how many threads there is something to do.
fn words(plane: Plane, count: usize) -> Result<([u32; 3], u32)> {
    match i32::try_from(count) {
        Ok(count) => Ok(([plane.side, plane.stride, plane.channels].map(|word| word as u32), count.unsigned_abs())),
        Err(_) => candle_core::bail!("a convolution over {count} places: more than its kernels number"),
    }
}

/// Threads that share out a pixel's channels: `Channels` of the kernels.
fn spans(plane: Plane) -> usize {
    plane.channels.div_ceil(8)
}

impl Operator for Depthwise {
    const NAME: &'static str = "depthwise_relu6";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, channels) = (&inputs[0], self.plane.channels);
        let (images, pixels) = (x.count() / self.plane.inputs(), self.plane.outputs() / channels);
        let shape = Shape::from((images, pixels, channels));
        let y = machine.allocate(x.element.words(shape.elem_count()))?;
        let ([side, stride, channels], count) = words(self.plane, images * pixels * spans(self.plane))?;
        let arguments = arguments![x.at, inputs[1].at, inputs[2].at, machine.at(&y), count, side, stride, channels];
        let kernel = Kernel::on(x.element, "convolution", ["depthwise_relu6", "depthwise_relu6_bf16"]);
        machine.launch(kernel, Grid::each(count as usize), arguments)?;
        Ok((y, shape))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        /// Pixels of a thread that adds up gradients by the weights, at least, and threads that are enough work for a large device.
        const LEAST: usize = 16;
        const ENOUGH: usize = 1 << 16;
        let (x, weight, element) = (&pass.inputs[0], &pass.inputs[1], pass.inputs[0].element);
        let (channels, count) = (self.plane.channels, pass.result.count());
        let gradient = pass.result.alike(machine)?;
        let by_result = machine.at(&gradient);
        relu6_backward(machine, pass.result, pass.gradient.at, by_result)?;
        let mut dx = None;
        if x.wanted {
            let made = x.alike(machine)?;
            let ([side, stride, channels], count) = words(self.plane, x.count() / channels * spans(self.plane))?;
            let arguments = arguments![by_result, weight.at, machine.at(&made), count, side, stride, channels];
            let names = ["depthwise_relu6_input_backward", "depthwise_relu6_input_backward_bf16"];
            machine.launch(Kernel::on(element, "convolution", names), Grid::each(count as usize), arguments)?;
            dx = Some(made);
        }
        let pixels = count / channels;
        let each = (pixels * spans(self.plane) / ENOUGH).max(LEAST);
        let (parts, values) = (pixels.div_ceil(each), 10 * channels);
        let partial = machine.allocate(parts * values)?;
        let ([side, stride, wide], threads) = words(self.plane, parts * spans(self.plane))?;
        let (at, pixels) = (machine.at(&partial), pixels as u32);
        let arguments = arguments![x.at, by_result, at, threads, pixels, each as u32, side, stride, wide];
        let names = ["depthwise_relu6_weight_backward", "depthwise_relu6_weight_backward_bf16"];
        machine.launch(Kernel::on(element, "convolution", names), Grid::each(threads as usize), arguments)?;
        let both = column_sums(machine, at, Element::F32, parts, values)?;
        let part = |first: usize, count: usize| -> Result<M::Values> {
            let values = machine.allocate(count)?;
            copy(machine, machine.at(&both).after(first), machine.at(&values), count)?;
            Ok(values)
        };
        Ok(vec![dx, Some(part(0, 9 * channels)?), Some(part(9 * channels, channels)?)])
    }
}

/// See [`depthwise_relu6`](crate::ops::depthwise_relu6), which has checked the shapes. Activations are stored as `element` within.
pub fn depthwise_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, plane: Plane, element: Element) -> Result<Tensor> {
    x.contiguous()?.apply_op3(weight, bias, OnMachine::within(Depthwise { plane }, element))
}

/// What a 3×3 convolution sees for each of its results.
pub(super) struct Patches {
    pub(super) plane: Plane,
}

impl Operator for Patches {
    const NAME: &'static str = "patches";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, channels) = (&inputs[0], self.plane.channels);
        let (images, pixels) = (x.count() / self.plane.inputs(), self.plane.outputs() / channels);
        let shape = Shape::from((images, pixels, 9 * channels));
        let y = machine.allocate(x.element.words(shape.elem_count()))?;
        let ([side, stride, channels], count) = words(self.plane, 9 * images * pixels)?;
        let arguments = arguments![x.at, machine.at(&y), count, side, stride, channels];
        let kernel = Kernel::on(x.element, "convolution", ["patches", "patches_bf16"]);
        machine.launch(kernel, Grid::each(count as usize), arguments)?;
        Ok((y, shape))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let x = &pass.inputs[0];
        let dx = x.alike(machine)?;
        let ([side, stride, channels], count) = words(self.plane, x.count() / self.plane.channels)?;
        let arguments = arguments![pass.gradient.at, machine.at(&dx), count, side, stride, channels];
        let kernel = Kernel::on(x.element, "convolution", ["patches_backward", "patches_backward_bf16"]);
        machine.launch(kernel, Grid::each(count as usize), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// What a 3×3 convolution sees for each of its results: `[images, side², channels]` → `[images, (side / stride)², 9 · channels]`.
/// Activations are stored as `element` within.
pub fn patches(x: &Tensor, plane: Plane, element: Element) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::within(Patches { plane }, element))
}
