//! Rows chosen from a matrix: embeddings, and what is read off the hidden states.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};

/// Chosen rows, ordered for the backward pass: no two threads add to one row, and sums run in a fixed order.
struct SelectRows {
    ids: Arc<[u32]>,
}

/// Who chose each row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Choosers {
    /// Places in the result, by the row that they chose.
    order: Vec<u32>,
    /// Where in `order` those of each chosen row begin, and the end.
    starts: Vec<u32>,
    /// The chosen rows.
    sources: Vec<u32>,
}

impl Choosers {
    fn of(ids: &[u32]) -> Self {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&place| ids[place as usize]);
        let (mut starts, mut sources) = (Vec::new(), Vec::new());
        for (i, &place) in order.iter().enumerate() {
            let id = ids[place as usize];
            if sources.last() != Some(&id) {
                starts.push(i as u32);
                sources.push(id);
            }
        }
        starts.push(ids.len() as u32);
        Self { order, starts, sources }
    }
}

/// Rows `ids` of a table.
pub(super) fn selected<M: Machine>(machine: &M, table: &Input, ids: &[u32]) -> Result<M::Values> {
    let (rows, width) = table.matrix();
    if let Some(bad) = ids.iter().find(|&&id| id as usize >= rows) {
        candle_core::bail!("select_rows: row {bad} of {rows}");
    }
    let count = ids.len() * width;
    let (y, ids) = (machine.allocate(count)?, machine.upload(ids)?);
    let arguments = arguments![table.at, machine.words_at(&ids), machine.at(&y), count, width as u32];
    machine.launch(Kernel("rows", "select_rows"), Grid::each(count), arguments)?;
    Ok(y)
}

/// The gradient by a table `[rows, width]` of which rows `ids` were taken, of that by these.
pub(super) fn by_table<M: Machine>(
    machine: &M,
    (rows, width): (usize, usize),
    ids: &[u32],
    gradient: Address,
) -> Result<M::Values> {
    let by_table = machine.zeros(rows * width)?;
    let Choosers { order, starts, sources } = Choosers::of(ids);
    if sources.is_empty() {
        return Ok(by_table);
    }
    let grid = Grid { blocks: [sources.len(), width.div_ceil(WARP), 1], threads: 8 * WARP, shared: 8 * WARP };
    let words = machine.upload(&[&order[..], &starts, &sources].concat())?;
    let order_at = machine.words_at(&words);
    let starts_at = order_at.after(order.len());
    let (sources_at, to) = (starts_at.after(starts.len()), machine.at(&by_table));
    let arguments = arguments![gradient, order_at, starts_at, sources_at, to, width as u32];
    machine.launch(Kernel("rows", "sum_rows"), grid, arguments)?;
    Ok(by_table)
}

impl Operator for SelectRows {
    const NAME: &'static str = "select_rows";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok((selected(machine, &inputs[0], &self.ids)?, Shape::from((self.ids.len(), inputs[0].matrix().1))))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        if !pass.inputs[0].wanted {
            return Ok(vec![None]);
        }
        Ok(vec![Some(by_table(machine, pass.inputs[0].matrix(), &self.ids, pass.gradient.at)?)])
    }
}

/// See [`select_rows`](crate::ops::select_rows).
pub fn select_rows(table: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    table.contiguous()?.apply_op1(OnMachine::of(SelectRows { ids: Arc::clone(ids) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choosers_are_listed_by_what_they_chose() {
        let of = Choosers::of(&[7, 2, 7, 0, 7]);
        let expected = Choosers { order: vec![3, 1, 0, 2, 4], starts: vec![0, 1, 2, 5], sources: vec![0, 2, 7] };
        assert_eq!(of, expected);
        assert_eq!(Choosers::of(&[]), Choosers { order: vec![], starts: vec![0], sources: vec![] });
    }
}
