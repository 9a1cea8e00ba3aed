//! Losses against given targets (see [`crate::ops::soft_cross_entropy`] and its like).

use candle_core::{Result, Shape, Tensor};

use super::machine::{Grid, Kernel, Machine, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};

/// Inputs: `[rows, width]`, and targets of that shape, which have no gradient.
struct Loss {
    kernel: &'static str,
    /// The mean over all values, not over the rows alone.
    of_values: bool,
    gradient: Kept,
}

impl Operator for Loss {
    const NAME: &'static str = "loss";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, (rows, width)) = (&inputs[0], inputs[0].matrix());
        let (losses, mean, gradient) = (machine.allocate(rows)?, machine.allocate(1)?, x.alike(machine)?);
        let share = 1.0 / (if self.of_values { rows * width } else { rows }) as f32;
        let (losses_at, gradient_at) = (machine.at(&losses), machine.at(&gradient));
        let arguments = arguments![x.at, inputs[1].at, losses_at, gradient_at, width as u32, share];
        machine.launch(Kernel("losses", self.kernel), Grid::reducing(rows), arguments)?;
        let arguments = arguments![machine.at(&losses), machine.at(&mean), rows as u32, share];
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

fn loss(kernel: &'static str, of_values: bool, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let op = Loss { kernel, of_values, gradient: Kept::default() };
    x.contiguous()?.apply_op2(&targets.detach().contiguous()?, OnMachine::of(op))
}

/// See [`soft_cross_entropy`](crate::ops::soft_cross_entropy).
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss("soft_cross_entropy", false, logits, targets)
}

/// See [`binary_cross_entropy`](crate::ops::binary_cross_entropy).
pub fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss("binary_cross_entropy", false, logits, targets)
}

/// See [`squared_error`](crate::ops::squared_error).
pub fn squared_error(x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    loss("squared_error", true, x, targets)
}
