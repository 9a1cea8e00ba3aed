//! GELU, ReLU6 and residual dropout.

use candle_core::{Result, Shape, Tensor};

use super::dropout;
use super::machine::{Address, Grid, Kernel, Machine, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};

struct Gelu;

impl Operator for Gelu {
    const NAME: &'static str = "gelu_erf";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, count) = (&inputs[0], inputs[0].count());
        let y = machine.allocate(count)?;
        let arguments = arguments![x.at, Address::NULL, machine.at(&y), count, 1u32];
        machine.launch(Kernel("elementwise", "gelu"), Grid::each(count), arguments)?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, count) = (&pass.inputs[0], pass.inputs[0].count());
        let dx = machine.allocate(count)?;
        let arguments = arguments![x.at, Address::NULL, pass.gradient.at, machine.at(&dx), count, 1u32];
        machine.launch(Kernel("elementwise", "gelu_backward"), Grid::each(count), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`gelu`](crate::ops::gelu).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine(Gelu))
}

struct Relu6;

impl Operator for Relu6 {
    const NAME: &'static str = "relu6";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, count) = (&inputs[0], inputs[0].count());
        let y = machine.allocate(count)?;
        machine.launch(Kernel("elementwise", "relu6"), Grid::each(count), arguments![x.at, machine.at(&y), count])?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, count) = (&pass.inputs[0], pass.inputs[0].count());
        let dx = machine.allocate(count)?;
        let arguments = arguments![x.at, pass.gradient.at, machine.at(&dx), count];
        machine.launch(Kernel("elementwise", "relu6_backward"), Grid::each(count), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`relu6`](crate::ops::relu6).
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine(Relu6))
}

struct DropoutAdd {
    seed: u32,
    keep: f32,
}

impl DropoutAdd {
    fn run<M: Machine>(&self, machine: &M, residual: Address, x: Address, count: usize) -> Result<M::Values> {
        let (y, (limit, scale)) = (machine.allocate(count)?, dropout(self.keep));
        let arguments = arguments![residual, x, machine.at(&y), count, self.seed, limit, scale];
        machine.launch(Kernel("elementwise", "dropout_add"), Grid::each(count), arguments)?;
        Ok(y)
    }
}

impl Operator for DropoutAdd {
    const NAME: &'static str = "dropout_add";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok((self.run(machine, inputs[0].at, inputs[1].at, inputs[1].count())?, inputs[1].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let count = pass.gradient.count();
        let by_residual = match pass.inputs[0].wanted {
            true => Some(DropoutAdd { seed: 0, keep: 1.0 }.run(machine, Address::NULL, pass.gradient.at, count)?),
            false => None,
        };
        Ok(vec![by_residual, Some(self.run(machine, Address::NULL, pass.gradient.at, count)?)])
    }
}

/// See [`dropout_add`](crate::ops::dropout_add).
pub fn dropout_add(residual: &Tensor, x: &Tensor, rate: f32, seed: u32) -> Result<Tensor> {
    residual.contiguous()?.apply_op2(&x.contiguous()?, OnMachine(DropoutAdd { seed, keep: 1.0 - rate }))
}
