//! Poolings (see [`crate::ops::first_and_mean`] and its like).

use candle_core::{Result, Shape, Tensor};

use super::machine::{Grid, Kernel, Machine, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};

/// It is told where each text begins, and the end; then the text of each row.
#[derive(Debug)]
pub(super) struct FirstAndMean {
    pub(super) texts: usize,
}

impl FirstAndMean {
    /// What is told of texts in `rows` rows, of which the last may belong to none. Gradients by these mean nothing.
    pub(super) fn words(counts: &[usize], rows: usize) -> Vec<u32> {
        let mut starts = vec![0];
        let mut of_rows = Vec::new();
        for (text, count) in counts.iter().enumerate() {
            of_rows.resize(of_rows.len() + 1 + count, text as u32);
            starts.push(of_rows.len() as u32);
        }
        of_rows.resize(rows, 0);
        [starts, of_rows].concat()
    }
}

impl Operator for FirstAndMean {
    const NAME: &'static str = "first_and_mean";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let width = inputs[0].matrix().1;
        let shape = Shape::from((self.texts, 2 * width));
        let y = machine.allocate(shape.elem_count())?;
        let arguments = arguments![inputs[0].at, inputs[1].at, machine.at(&y), self.texts as u32, width as u32];
        machine.launch(Kernel("rows", "first_and_mean"), Grid::each_few(self.texts, width), arguments)?;
        Ok((y, shape))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (rows, width) = pass.inputs[0].matrix();
        let (dx, starts) = (pass.inputs[0].alike(machine)?, pass.inputs[1].at);
        let of_rows = starts.after(self.texts + 1);
        let arguments = arguments![pass.gradient.at, starts, of_rows, machine.at(&dx), rows as u32, width as u32];
        machine.launch(Kernel("rows", "first_and_mean_backward"), Grid::each_few(rows, width), arguments)?;
        Ok(vec![Some(dx)])
    }
}

/// See [`first_and_mean`](crate::ops::first_and_mean), which has checked the counts.
pub fn first_and_mean(x: &Tensor, counts: &[usize]) -> Result<Tensor> {
    let op = FirstAndMean { texts: counts.len() };
    x.contiguous()?.apply_op1(OnMachine::of(op).told(FirstAndMean::words(counts, x.dim(0)?)))
}

#[derive(Debug)]
pub(super) struct ReluProduct;

impl Operator for ReluProduct {
    const NAME: &'static str = "relu_product";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (count, y) = (inputs[0].count(), inputs[0].alike(machine)?);
        let arguments = arguments![inputs[0].at, inputs[1].at, machine.at(&y), count];
        machine.launch(Kernel("elementwise", "relu_product"), Grid::each(count), arguments)?;
        Ok((y, inputs[0].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (a, b) = (&pass.inputs[0], &pass.inputs[1]);
        let (da, db) = (a.alike(machine)?, b.alike(machine)?);
        let arguments = arguments![a.at, b.at, pass.gradient.at, machine.at(&da), machine.at(&db), a.count()];
        machine.launch(Kernel("elementwise", "relu_product_backward"), Grid::each(a.count()), arguments)?;
        Ok(vec![Some(da), Some(db)])
    }
}

/// See [`relu_product`](crate::ops::relu_product).
pub fn relu_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, OnMachine::of(ReluProduct))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_told_by_where_they_begin_and_by_their_rows() {
        assert_eq!(FirstAndMean::words(&[2, 1], 5), [0, 3, 5, 0, 0, 0, 1, 1]);
        assert_eq!(FirstAndMean::words(&[2, 1], 7), [0, 3, 5, 0, 0, 0, 1, 1, 0, 0]);
    }
}
