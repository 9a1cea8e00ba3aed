//! GELU, ReLU6 and residual dropout.

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Element, Grid, Kernel, Machine, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{all_column_sums, draws};

/// `GELU(x + bias)`, or without a second input `GELU(x)`.
#[derive(Debug)]
pub(super) struct Gelu;

impl Operator for Gelu {
    const NAME: &'static str = "gelu_erf";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, (rows, width)) = (&inputs[0], inputs[0].matrix());
        let bias = inputs.get(1).map_or(Address::NULL, |bias| bias.at);
        let y = x.alike(machine)?;
        let (grid, each) = Grid::columns(rows, width);
        let arguments = arguments![x.at, bias, machine.at(&y), rows as u32, width as u32, each as u32];
        machine.launch(Kernel::on(x.element, "elementwise", ["gelu", "gelu_bf16"]), grid, arguments)?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, (rows, width)) = (&pass.inputs[0], pass.inputs[0].matrix());
        let bias = pass.inputs.get(1).map_or(Address::NULL, |bias| bias.at);
        let (grid, each) = Grid::columns(rows, width);
        let blocks = grid.blocks[1];
        let sums = pass.inputs.get(1).map(|_| machine.allocate(blocks * width)).transpose()?;
        let by_bias = sums.as_ref().map_or(Address::NULL, |sums| machine.at(sums));
        let dx = x.alike(machine)?;
        let (count, wide) = (rows as u32, width as u32);
        let arguments = arguments![x.at, bias, pass.gradient.at, machine.at(&dx), by_bias, count, wide, each as u32];
        machine.launch(Kernel::on(x.element, "elementwise", ["gelu_backward", "gelu_backward_bf16"]), grid, arguments)?;
        let by_bias = sums.map(|sums| all_column_sums(machine, sums, blocks, width)).transpose()?;
        Ok([Some(Some(dx)), by_bias.map(Some)].into_iter().flatten().collect())
    }
}

/// See [`gelu`](crate::ops::gelu).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(Gelu))
}

#[derive(Debug)]
struct Relu6;

/// Asks for ReLU6 of `x`; that may be where the result goes.
pub(super) fn relu6_to<M: Machine>(machine: &M, x: &Input, to: Address) -> Result<()> {
    let kernel = Kernel::on(x.element, "elementwise", ["relu6", "relu6_bf16"]);
    machine.launch(kernel, Grid::each(x.count().div_ceil(8)), arguments![x.at, to, x.count()])
}

/// Asks for the gradient by what ReLU6 was given, which, or its result, `x` is; that may be where the one by its result is.
pub(super) fn relu6_backward<M: Machine>(machine: &M, x: &Input, by_result: Address, to: Address) -> Result<()> {
    let kernel = Kernel::on(x.element, "elementwise", ["relu6_backward", "relu6_backward_bf16"]);
    machine.launch(kernel, Grid::each(x.count().div_ceil(8)), arguments![x.at, by_result, to, x.count()])
}

/// Asks for `to`, an array like `x`, to become the sum of both.
pub(super) fn add_to<M: Machine>(machine: &M, x: &Input, to: Address) -> Result<()> {
    let kernel = Kernel::on(x.element, "elementwise", ["sum_of_two", "sum_of_two_bf16"]);
    machine.launch(kernel, Grid::each(x.count().div_ceil(8)), arguments![x.at, to, to, x.count()])
}

impl Operator for Relu6 {
    const NAME: &'static str = "relu6";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let y = inputs[0].alike(machine)?;
        relu6_to(machine, &inputs[0], machine.at(&y))?;
        Ok((y, inputs[0].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let dx = pass.inputs[0].alike(machine)?;
        relu6_backward(machine, &pass.inputs[0], pass.gradient.at, machine.at(&dx))?;
        Ok(vec![Some(dx)])
    }
}

/// See [`relu6`](crate::ops::relu6). Activations are stored as `element` within.
pub fn relu6(x: &Tensor, element: Element) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::within(Relu6, element))
}

/// `factor · x`
#[derive(Debug)]
pub(super) struct Scaled {
    pub(super) factor: f32,
}

impl Scaled {
    fn of<M: Machine>(&self, machine: &M, x: &Input) -> Result<M::Values> {
        let y = x.alike(machine)?;
        let arguments = arguments![x.at, machine.at(&y), x.count(), self.factor];
        machine.launch(Kernel("elementwise", "scaled"), Grid::each(x.count()), arguments)?;
        Ok(y)
    }
}

impl Operator for Scaled {
    const NAME: &'static str = "scaled";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok((self.of(machine, &inputs[0])?, inputs[0].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        Ok(vec![Some(self.of(machine, pass.gradient)?)])
    }
}

/// `max(x, 0)`
#[derive(Debug)]
pub(super) struct Relu;

impl Operator for Relu {
    const NAME: &'static str = "relu";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, y) = (&inputs[0], inputs[0].alike(machine)?);
        machine.launch(Kernel("elementwise", "relu"), Grid::each(x.count()), arguments![x.at, machine.at(&y), x.count()])?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, dx) = (&pass.inputs[0], pass.inputs[0].alike(machine)?);
        let arguments = arguments![x.at, pass.gradient.at, machine.at(&dx), x.count()];
        machine.launch(Kernel("elementwise", "relu_backward"), Grid::each(x.count()), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`relu`](crate::ops::relu).
pub fn relu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(Relu))
}

/// `residual + dropout(x)`. It is told the seed.
#[derive(Debug)]
struct DropoutAdd {
    keep: f32,
}

/// Asks for the sum of a residual, or nothing, and of `x`, dropped out by the seed at `seed`.
fn dropout_sum<M: Machine>(machine: &M, residual: Address, x: &Input, seed: Address, keep: f32) -> Result<M::Values> {
    let (y, (limit, scale)) = (machine.allocate(x.count())?, draws(keep));
    let arguments = arguments![residual, x.at, machine.at(&y), x.count(), seed, limit, scale];
    machine.launch(Kernel("elementwise", "dropout_add"), Grid::each(x.count()), arguments)?;
    Ok(y)
}

impl Operator for DropoutAdd {
    const NAME: &'static str = "dropout_add";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok((dropout_sum(machine, inputs[0].at, &inputs[1], inputs[2].at, self.keep)?, inputs[1].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let by = |keep| dropout_sum(machine, Address::NULL, pass.gradient, pass.inputs[2].at, keep);
        Ok(vec![pass.inputs[0].wanted.then(|| by(1.0)).transpose()?, Some(by(self.keep)?)])
    }
}

/// `dropout(x)`. It is told the seed.
#[derive(Debug)]
pub(super) struct Dropout {
    pub(super) keep: f32,
}

impl Operator for Dropout {
    const NAME: &'static str = "dropout";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok((dropout_sum(machine, Address::NULL, &inputs[0], inputs[1].at, self.keep)?, inputs[0].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        Ok(vec![Some(dropout_sum(machine, Address::NULL, pass.gradient, pass.inputs[1].at, self.keep)?)])
    }
}

/// See [`dropout`](crate::ops::dropout).
pub fn dropout(x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(Dropout { keep: 1.0 - rate }).told(vec![seed]))
}

/// See [`dropout_add`](crate::ops::dropout_add).
pub fn dropout_add(residual: &Tensor, x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
    let op = DropoutAdd { keep: 1.0 - rate };
    residual.contiguous()?.apply_op2(&x.contiguous()?, OnMachine::of(op).told(vec![seed]))
}
