//! Rows chosen from a matrix: embeddings, and what is read off the hidden states.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::draws;
use super::machine::{Address, Argument, Grid, Kernel, Machine, THREADS, WARP, arguments};
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

/// Rows of two arrays packed into one, each of them once, with values dropped out. Inputs: both, in f32.
pub(super) struct PackRows {
    /// For each packed row, which row of both, one behind the other, it is; then for each of these, which packed row.
    words: Vec<u32>,
    /// Rows of both arrays.
    counts: [usize; 2],
    keep: f32,
    seed: u32,
}

impl PackRows {
    /// # Errors
    /// Rows that are packed twice or not at all.
    pub(super) fn new(order: &[u32], counts: [usize; 2], (rate, seed): (f32, u32)) -> Result<Self> {
        const NOWHERE: u32 = u32::MAX;
        let [first, second] = counts;
        let mut places = vec![NOWHERE; first + second];
        for (packed, &source) in (0..).zip(order) {
            match places.get_mut(source as usize) {
                Some(place) if *place == NOWHERE => *place = packed,
                _ => candle_core::bail!("pack_rows: row {source} of {} is packed twice, or is none", first + second),
            }
        }
        if places.len() != order.len() {
            candle_core::bail!("pack_rows: {} rows are packed of {first} and {second}", order.len());
        }
        Ok(Self { words: [order, &places].concat(), counts, keep: 1.0 - rate, seed })
    }

    /// What both passes are told, where the machine has it.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Packed rows.
    fn rows(&self) -> usize {
        self.words.len() / 2
    }

    /// A thread for every eight columns of every row.
    fn launch<M: Machine>(
        &self,
        machine: &M,
        kernel: Kernel,
        (rows, width): (usize, usize),
        arguments: &[Argument],
    ) -> Result<()> {
        let (limit, scale) = draws(self.keep);
        let blocks = (rows * width.div_ceil(8)).div_ceil(THREADS).max(1);
        let last = arguments![width as u32, self.seed, limit, scale];
        machine.launch(kernel, Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: 0 }, &[arguments, last].concat())
    }

    /// Asks for the rows to be packed into `to`, whose rows behind them become zeros.
    pub(super) fn pack<M: Machine>(&self, machine: &M, [first, second]: [Address; 2], words: Address, to: &Input) -> Result<()> {
        let ((rows, width), of_first) = (to.matrix(), self.counts[0] as u32);
        let arguments = arguments![first, second, of_first, words, to.at, rows as u32, self.rows() as u32];
        self.launch(machine, Kernel::on(to.element, "rows", ["pack_rows", "pack_rows_bf16"]), (rows, width), arguments)
    }

    /// Asks for the gradients by both arrays.
    pub(super) fn unpack<M: Machine>(
        &self,
        machine: &M,
        by_packed: &Input,
        words: Address,
        [first, second]: [Address; 2],
    ) -> Result<()> {
        let (sizes, places) = ((self.rows(), by_packed.matrix().1), words.after(self.rows()));
        let arguments = arguments![by_packed.at, first, second, self.counts[0] as u32, places, sizes.0 as u32];
        let kernel = Kernel::on(by_packed.element, "rows", ["pack_rows_backward", "pack_rows_backward_bf16"]);
        self.launch(machine, kernel, sizes, arguments)
    }
}

impl Operator for PackRows {
    const NAME: &'static str = "pack_rows";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let shape = Shape::from((self.rows(), inputs[0].matrix().1));
        let (y, words) = (machine.allocate(shape.elem_count())?, machine.upload(&self.words)?);
        let to = Input { at: machine.at(&y), shape: shape.clone(), ..inputs[0].clone() };
        self.pack(machine, [inputs[0].at, inputs[1].at], machine.words_at(&words), &to)?;
        Ok((y, shape))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (first, second) = (pass.inputs[0].alike(machine)?, pass.inputs[1].alike(machine)?);
        let words = machine.upload(&self.words)?;
        self.unpack(machine, pass.gradient, machine.words_at(&words), [machine.at(&first), machine.at(&second)])?;
        Ok(vec![Some(first), Some(second)])
    }
}

/// Rows of two matrices of one width, packed: row `r` is row `order[r]` of both, one behind the other, each of which is packed once.
/// Values are dropped out as by [`dropout`](crate::ops::dropout).
pub fn pack_rows(both: [&Tensor; 2], order: &[u32], draws: (f32, u32)) -> Result<Tensor> {
    let [first, second] = both;
    let op = PackRows::new(order, [first.dim(0)?, second.dim(0)?], draws)?;
    first.contiguous()?.apply_op2(&second.contiguous()?, OnMachine::of(op))
}

/// See [`select_rows`](crate::ops::select_rows).
pub fn select_rows(table: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    table.contiguous()?.apply_op1(OnMachine::of(SelectRows { ids: Arc::clone(ids) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_packed_once() {
        let packing = |order: &[u32]| PackRows::new(order, [2, 2], (0.0, 0));
        assert_eq!(packing(&[2, 0, 3, 1]).unwrap().words(), [2, 0, 3, 1, 1, 3, 0, 2]);
        for (order, expected) in [
            (&[2, 0, 2, 1][..], "row 2 of 4 is packed twice"),
            (&[2, 0, 4, 1], "row 4 of 4 is packed twice, or is none"),
            (&[2, 0, 1], "3 rows are packed of 2 and 2"),
        ] {
            let error = packing(order).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn choosers_are_listed_by_what_they_chose() {
        let of = Choosers::of(&[7, 2, 7, 0, 7]);
        let expected = Choosers { order: vec![3, 1, 0, 2, 4], starts: vec![0, 1, 2, 5], sources: vec![0, 2, 7] };
        assert_eq!(of, expected);
        assert_eq!(Choosers::of(&[]), Choosers { order: vec![], starts: vec![0], sources: vec![] });
    }
}
