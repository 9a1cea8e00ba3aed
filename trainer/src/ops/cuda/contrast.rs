//! What contrasts are made of (see [`crate::ops::unit_rows`] and its like).

use candle_core::{Result, Shape, Tensor};

use super::machine::{Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};

#[derive(Debug)]
pub(super) struct UnitRows;

impl UnitRows {
    /// A warp for each row.
    fn grid(rows: usize) -> Grid {
        const WARPS: usize = 4;
        Grid { blocks: [rows.div_ceil(WARPS).max(1), 1, 1], threads: WARPS * WARP, shared: 0 }
    }
}

impl Operator for UnitRows {
    const NAME: &'static str = "unit_rows";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, (rows, width)) = (&inputs[0], inputs[0].matrix());
        let y = x.alike(machine)?;
        let arguments = arguments![x.at, machine.at(&y), rows as u32, width as u32];
        machine.launch(Kernel("rows", "unit_rows"), Self::grid(rows), arguments)?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, (rows, width)) = (&pass.inputs[0], pass.inputs[0].matrix());
        let dx = x.alike(machine)?;
        let arguments = arguments![x.at, pass.result.at, pass.gradient.at, machine.at(&dx), rows as u32, width as u32];
        machine.launch(Kernel("rows", "unit_rows_backward"), Self::grid(rows), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`unit_rows`](crate::ops::unit_rows).
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(UnitRows))
}

#[derive(Debug)]
pub(super) struct BoundedExp {
    pub(super) bounds: [f32; 2],
}

impl Operator for BoundedExp {
    const NAME: &'static str = "bounded_exp";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let ([least, most], x) = (self.bounds, &inputs[0]);
        let y = x.alike(machine)?;
        let arguments = arguments![x.at, machine.at(&y), x.count(), least, most];
        machine.launch(Kernel("elementwise", "bounded_exp"), Grid::each(x.count()), arguments)?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let ([least, most], y) = (self.bounds, pass.result);
        let dx = y.alike(machine)?;
        let arguments = arguments![y.at, pass.gradient.at, machine.at(&dx), y.count(), least, most];
        machine.launch(Kernel("elementwise", "bounded_exp_backward"), Grid::each(y.count()), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`bounded_exp`](crate::ops::bounded_exp).
pub fn bounded_exp(x: &Tensor, bounds: [f32; 2]) -> Result<Tensor> {
    x.contiguous()?.apply_op1(OnMachine::of(BoundedExp { bounds }))
}

/// Inputs: scores and the temperature. It is told the numbers of the rows, then of the columns.
#[derive(Debug)]
pub(super) struct LogShares {
    pub(super) least: f32,
    pub(super) factor: f32,
}

impl Operator for LogShares {
    const NAME: &'static str = "log_shares";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (rows, width) = inputs[0].matrix();
        let (values, total) = (machine.allocate(rows)?, machine.allocate(1)?);
        let (scores, temperature, numbers) = (inputs[0].at, inputs[1].at, inputs[2].at);
        let arguments = arguments![scores, temperature, numbers, machine.at(&values), width as u32, self.least];
        machine.launch(Kernel("rows", "log_shares"), Grid::reducing(rows), arguments)?;
        let arguments = arguments![machine.at(&values), machine.at(&total), rows as u32, self.factor];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), arguments)?;
        Ok((total, Shape::from(())))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (rows, width) = pass.inputs[0].matrix();
        let by_scores = pass.inputs[0].alike(machine)?;
        let (of_rows, by_temperature) = (machine.allocate(rows)?, machine.allocate(1)?);
        let first = arguments![pass.inputs[0].at, pass.inputs[1].at, pass.inputs[2].at, pass.gradient.at];
        let last = arguments![machine.at(&by_scores), machine.at(&of_rows), width as u32, self.least, self.factor];
        machine.launch(Kernel("rows", "log_shares_backward"), Grid::reducing(rows), &[&first[..], last].concat())?;
        let arguments = arguments![machine.at(&of_rows), machine.at(&by_temperature), rows as u32, 1f32];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), arguments)?;
        Ok(vec![Some(by_scores), Some(by_temperature)])
    }
}

/// See [`log_shares`](crate::ops::log_shares), which has checked the numbers.
pub fn log_shares(scores: &Tensor, temperature: &Tensor, numbers: [&[u32]; 2], [least, factor]: [f64; 2]) -> Result<Tensor> {
    let op = LogShares { least: least as f32, factor: factor as f32 };
    scores.contiguous()?.apply_op2(&temperature.contiguous()?, OnMachine::of(op).told(numbers.concat()))
}
