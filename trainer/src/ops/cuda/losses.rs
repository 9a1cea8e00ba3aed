//! Losses against given targets (see [`crate::ops::soft_cross_entropy`] and its like).

use candle_core::{Result, Shape, Tensor};

use super::machine::{Grid, Kernel, Machine, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};

/// Inputs: `[rows, width]`, and targets of that shape, which have no gradient. It is told how many of the rows count, the first ones, and
/// the share of each in the mean.
#[derive(Debug)]
pub(super) struct Loss {
    kernel: &'static str,
    gradient: Kept,
}

impl Loss {
    /// Over the rows, of degrees of classes.
    pub(super) const SOFT: &'static str = "soft_cross_entropy";
    /// Over the rows, of classes each by itself.
    pub(super) const BINARY: &'static str = "binary_cross_entropy";
    /// Over all values.
    pub(super) const SQUARED: &'static str = "squared_error";

    pub(super) fn of(kernel: &'static str) -> Self {
        Self { kernel, gradient: Kept::default() }
    }

    /// What it is told of so many rows that count.
    pub(super) fn words(&self, rows: usize, width: usize) -> Vec<u32> {
        let summands = if self.kernel == Self::SQUARED { rows * width } else { rows };
        vec![rows as u32, (1.0 / summands as f32).to_bits()]
    }
}

impl Operator for Loss {
    const NAME: &'static str = "loss";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, (rows, width)) = (&inputs[0], inputs[0].matrix());
        let (losses, mean, gradient) = (machine.allocate(rows)?, machine.allocate(1)?, x.alike(machine)?);
        let (losses_at, gradient_at) = (machine.at(&losses), machine.at(&gradient));
        let arguments = arguments![x.at, inputs[1].at, losses_at, gradient_at, width as u32, inputs[2].at];
        machine.launch(Kernel("losses", self.kernel), Grid::reducing(rows), arguments)?;
        let arguments = arguments![machine.at(&losses), machine.at(&mean), rows as u32, 1f32];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), arguments)?;
        self.gradient.put(gradient);
        Ok((mean, Shape::from(())))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (gradient, count) = (self.gradient.take::<M::Values>(self.kernel)?, pass.inputs[0].count());
        let arguments = arguments![machine.at(&gradient), pass.gradient.at, count];
        machine.launch(Kernel("elementwise", "scale_by"), Grid::each(count), arguments)?;
        Ok(vec![Some(gradient), None])
    }
}

fn loss(kernel: &'static str, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (op, (rows, width)) = (Loss::of(kernel), x.dims2()?);
    let words = op.words(rows, width);
    x.contiguous()?.apply_op2(&targets.detach().contiguous()?, OnMachine::of(op).told(words))
}

/// See [`soft_cross_entropy`](crate::ops::soft_cross_entropy).
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss(Loss::SOFT, logits, targets)
}

/// See [`binary_cross_entropy`](crate::ops::binary_cross_entropy).
pub fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss(Loss::BINARY, logits, targets)
}

/// See [`squared_error`](crate::ops::squared_error).
pub fn squared_error(x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss(Loss::SQUARED, x, targets)
}
