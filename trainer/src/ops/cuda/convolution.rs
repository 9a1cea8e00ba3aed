//! Depthwise convolution with ReLU6, and what other convolutions see, forward and backward.

use candle_core::{Result, Shape, Tensor};

use super::machine::{Element, Grid, Kernel, Machine, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{column_sums, copy};
use crate::ops::kernels::Plane;

/// Images whose gradients by the weights a thread adds up.
const IMAGES_EACH: usize = 4;

/// ReLU6 of a depthwise convolution.
pub(super) struct Depthwise {
    pub(super) plane: Plane,
}

fn words(plane: Plane) -> (u32, u32, u32) {
    (plane.side as u32, plane.stride as u32, plane.channels as u32)
}

impl Operator for Depthwise {
    const NAME: &'static str = "depthwise_relu6";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let images = inputs[0].count() / self.plane.inputs();
        let count = images * self.plane.outputs();
        let (y, (side, stride, channels)) = (machine.allocate(count)?, words(self.plane));
        let arguments = arguments![inputs[0].at, inputs[1].at, inputs[2].at, machine.at(&y), count, side, stride, channels];
        machine.launch(Kernel("convolution", "depthwise_relu6"), Grid::each(count), arguments)?;
        Ok((y, Shape::from((images, self.plane.outputs() / self.plane.channels, self.plane.channels))))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let ((x, weight), (side, stride, channels)) = ((&pass.inputs[0], &pass.inputs[1]), words(self.plane));
        let (images, count) = (x.count() / self.plane.inputs(), pass.result.count());
        let gradient = machine.allocate(count)?;
        let by_result = machine.at(&gradient);
        let arguments = arguments![pass.result.at, pass.gradient.at, by_result, count];
        machine.launch(Kernel("elementwise", "relu6_backward"), Grid::each(count), arguments)?;
        let mut dx = None;
        if x.wanted {
            let made = machine.allocate(x.count())?;
            let arguments = arguments![by_result, weight.at, machine.at(&made), x.count(), side, stride, channels];
            machine.launch(Kernel("convolution", "depthwise_relu6_input_backward"), Grid::each(x.count()), arguments)?;
            dx = Some(made);
        }
        let (blocks, values) = (images.div_ceil(IMAGES_EACH).max(1), 10 * self.plane.channels);
        let partial = machine.allocate(blocks * values)?;
        let grid = Grid { blocks: [values.div_ceil(128), blocks, 1], threads: 128, shared: 0 };
        let (all, each) = (images as u32, IMAGES_EACH as u32);
        let arguments = arguments![x.at, by_result, machine.at(&partial), all, each, side, stride, channels];
        machine.launch(Kernel("convolution", "depthwise_relu6_weight_backward"), grid, arguments)?;
        let both = column_sums(machine, machine.at(&partial), Element::F32, blocks, values)?;
        let part = |first: usize, count: usize| -> Result<M::Values> {
            let values = machine.allocate(count)?;
            copy(machine, machine.at(&both).after(first), machine.at(&values), count)?;
            Ok(values)
        };
        let split = 9 * self.plane.channels;
        Ok(vec![dx, Some(part(0, split)?), Some(part(split, self.plane.channels)?)])
    }
}

/// See [`depthwise_relu6`](crate::ops::depthwise_relu6), which has checked the shapes.
pub fn depthwise_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, plane: Plane) -> Result<Tensor> {
    x.contiguous()?.apply_op3(weight, bias, OnMachine::of(Depthwise { plane }))
}

/// What a 3×3 convolution sees for each of its results.
pub(super) struct Patches {
    pub(super) plane: Plane,
}

impl Operator for Patches {
    const NAME: &'static str = "patches";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let images = inputs[0].count() / self.plane.inputs();
        let count = images * 9 * self.plane.outputs();
        let (y, (side, stride, channels)) = (machine.allocate(count)?, words(self.plane));
        let arguments = arguments![inputs[0].at, machine.at(&y), count, side, stride, channels];
        machine.launch(Kernel("convolution", "patches"), Grid::each(count), arguments)?;
        Ok((y, Shape::from((images, self.plane.outputs() / self.plane.channels, 9 * self.plane.channels))))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let x = &pass.inputs[0];
        let (dx, (side, stride, channels)) = (x.alike(machine)?, words(self.plane));
        let arguments = arguments![pass.gradient.at, machine.at(&dx), x.count(), side, stride, channels];
        machine.launch(Kernel("convolution", "patches_backward"), Grid::each(x.count()), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// What a 3×3 convolution sees for each of its results: `[images, side², channels]` → `[images, (side / stride)², 9 · channels]`.
pub fn patches(x: &Tensor, plane: Plane) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(Patches { plane }))
}
