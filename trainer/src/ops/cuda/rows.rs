//! Rows chosen from a matrix: embeddings, and what is read off the hidden states.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Argument, Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{copy, draws};

/// Chosen rows, ordered for the backward pass: no two threads add to one row, and sums run in a fixed order.
struct SelectRows {
    ids: Arc<[u32]>,
}

/// In tables of rows, for one that is none.
const NO_ROW: u32 = u32::MAX;

/// Who chose each row of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Choosers {
    /// Places in the result, by the row that they chose.
    order: Vec<u32>,
    /// Where in `order` those of each chosen row begin, and the end.
    starts: Vec<u32>,
    /// The chosen rows.
    sources: Vec<u32>,
}

impl Choosers {
    /// Of rows that were chosen of a table of `rows`.
    pub(super) fn of(ids: &[u32], rows: usize) -> Self {
        let mut next = vec![0; rows];
        ids.iter().for_each(|&id| next[id as usize] += 1);
        let (mut starts, mut sources, mut start) = (Vec::new(), Vec::new(), 0);
        for (row, next) in (0..).zip(&mut next) {
            let count = std::mem::replace(next, start);
            if count > 0 {
                starts.push(start);
                sources.push(row);
                start += count;
            }
        }
        starts.push(start);
        let mut order = vec![0; ids.len()];
        for (place, &id) in (0..).zip(ids) {
            let next = &mut next[id as usize];
            order[*next as usize] = place;
            *next += 1;
        }
        Self { order, starts, sources }
    }

    /// Number of chosen rows.
    pub(super) fn chosen(&self) -> usize {
        self.sources.len()
    }

    /// With room for more: as many places and chosen rows as that, of which those behind are none.
    pub(super) fn filled(mut self, places: usize, chosen: usize) -> Self {
        self.starts.resize(chosen + 1, self.order.len() as u32);
        self.sources.resize(chosen, NO_ROW);
        self.order.resize(places, 0);
        self
    }

    /// As [`sum_chosen`] is told them.
    pub(super) fn words(&self) -> Vec<u32> {
        [&self.starts[..], &self.sources, &self.order].concat()
    }
}

/// That there are such rows of a table.
pub(super) fn check_ids(ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(bad) => candle_core::bail!("select_rows: row {bad} of {rows}"),
        None => Ok(()),
    }
}

/// Rows `ids` of a table, in f32.
pub(super) fn selected<M: Machine>(machine: &M, table: &Input, ids: &[u32]) -> Result<M::Values> {
    let (rows, width) = table.matrix();
    check_ids(ids, rows)?;
    let (y, words) = (machine.allocate(ids.len() * width)?, machine.upload(ids)?);
    select(machine, table, machine.words_at(&words), &Input::at(machine.at(&y), (ids.len(), width)))?;
    Ok(y)
}

/// Asks for as many rows of a table as `to` has, f32, whose ids lie at `ids`.
pub(super) fn select<M: Machine>(machine: &M, table: &Input, ids: Address, to: &Input) -> Result<()> {
    let (rows, width) = to.matrix();
    let arguments = arguments![table.at, ids, to.at, rows as u32, width as u32];
    let kernel = Kernel::on(table.element, "rows", ["select_rows", "select_rows_bf16"]);
    machine.launch(kernel, Grid::each_few(rows, width), arguments)
}

/// Asks for the gradient by a table, all of it, of those by rows that were chosen of it, f32: which rows they are, and where the gradients
/// by them lie.
///
/// # Errors
/// Rows that the table does not have.
pub(super) fn spread<M: Machine>(machine: &M, chosen: &[(&[u32], Address)], to: &Input) -> Result<()> {
    let (rows, width) = to.matrix();
    chosen.iter().try_for_each(|(ids, _)| check_ids(ids, rows))?;
    let words = machine.upload(&listed(chosen, rows, width))?;
    let starts = machine.words_at(&words);
    let arguments = arguments![starts, starts.after((rows + 1).next_multiple_of(2)), to.at, rows as u32, width as u32];
    machine.launch(Kernel::on(to.element, "rows", ["spread_rows", "spread_rows_bf16"]), Grid::each_few(rows, width), arguments)
}

/// Where in a list those of each row begin, and the end; then, in a place of eight bytes, the list: where every row's gradients lie.
fn listed(chosen: &[(&[u32], Address)], rows: usize, width: usize) -> Vec<u32> {
    let places = || chosen.iter().flat_map(|&(ids, at)| ids.iter().enumerate().map(move |(i, &id)| (id, at.after(i * width))));
    let mut starts = vec![0; rows + 1];
    places().for_each(|(id, _)| starts[id as usize + 1] += 1);
    for row in 0..rows {
        starts[row + 1] += starts[row];
    }
    let first = starts.len().next_multiple_of(2);
    let mut words = [&starts[..], &vec![0; first - starts.len() + 2 * starts[rows] as usize]].concat();
    let mut next = starts;
    for (id, Address(at)) in places() {
        let place = first + 2 * next[id as usize] as usize;
        (words[place], words[place + 1]) = (at as u32, (at >> 32) as u32);
        next[id as usize] += 1;
    }
    words
}

/// Sums of rows of two tables of one width: so many, by lists of them that lie there.
pub(super) fn select_sums<M: Machine>(machine: &M, [first, second]: [(&Input, Address); 2], rows: usize) -> Result<M::Values> {
    let width = first.0.matrix().1;
    let y = machine.allocate(rows * width)?;
    let arguments = arguments![first.0.at, first.1, second.0.at, second.1, machine.at(&y), rows as u32, width as u32];
    machine.launch(Kernel("rows", "select_sums"), Grid::each_few(rows, width), arguments)?;
    Ok(y)
}

/// The gradient by a table `[rows, width]`, of that by what so many rows of it were chosen for; [`Choosers::words`] lie there.
pub(super) fn sum_chosen<M: Machine>(
    machine: &M,
    (rows, width): (usize, usize),
    (choosers, chosen): (Address, usize),
    gradient: Address,
) -> Result<M::Values> {
    let by_table = machine.zeros(rows * width)?;
    if chosen == 0 {
        return Ok(by_table);
    }
    let grid = Grid { blocks: [chosen, width.div_ceil(WARP), 1], threads: 8 * WARP, shared: 8 * WARP };
    let sources = choosers.after(chosen + 1);
    let (order, to) = (sources.after(chosen), machine.at(&by_table));
    let arguments = arguments![gradient, order, choosers, sources, to, width as u32];
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
        let choosers = Choosers::of(&self.ids, pass.inputs[0].matrix().0);
        let words = machine.upload(&choosers.words())?;
        let told = (machine.words_at(&words), choosers.chosen());
        Ok(vec![Some(sum_chosen(machine, pass.inputs[0].matrix(), told, pass.gradient.at)?)])
    }
}

/// Rows of two arrays packed into one, each of them once, with values dropped out. Inputs: both, in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Packing {
    /// Rows of both arrays, of which those behind the ones that are packed need not be anything.
    pub(super) rows: [usize; 2],
    /// Share of values kept.
    pub(super) keep: f32,
}

impl Packing {
    /// What both passes are told: for each packed row, which row of both, one behind the other, it is; then for each of these, which
    /// packed row; then the seed. `order` does not count rows that are not packed, of which there are `counts` in each array.
    ///
    /// # Errors
    /// Rows that are packed twice or not at all.
    pub(super) fn words(&self, order: &[u32], counts: [usize; 2], seed: u32) -> Result<Vec<u32>> {
        let ([first, second], [of_first, of_second]) = (counts, self.rows);
        let all = of_first + of_second;
        let mut words = vec![NO_ROW; 2 * all + 1];
        let (sources, places) = words.split_at_mut(all);
        for (packed, &source) in order.iter().enumerate() {
            let number = source as usize;
            let row = if number < first { number } else { number - first + of_first };
            match places.get_mut(row) {
                Some(place) if *place == NO_ROW && number < first + second && packed < all => *place = packed as u32,
                _ => candle_core::bail!("pack_rows: row {source} of {} is packed twice, or is none", first + second),
            }
            sources[packed] = row as u32;
        }
        if order.len() != first + second {
            candle_core::bail!("pack_rows: {} rows are packed of {first} and {second}", order.len());
        }
        words[2 * all] = seed;
        Ok(words)
    }

    /// Number of [`Self::words`].
    pub(super) fn words_count(&self) -> usize {
        2 * self.all() + 1
    }

    /// Packed rows, those that are none included.
    fn all(&self) -> usize {
        self.rows.iter().sum()
    }

    /// What both kernels end with.
    fn last(&self, width: usize, words: Address) -> Vec<Argument> {
        let (limit, scale) = draws(self.keep);
        arguments![self.all() as u32, width as u32, words.after(2 * self.all()), limit, scale].to_vec()
    }

    /// Asks for the rows to be packed into `to`, whose rows that are none become zeros.
    pub(super) fn pack<M: Machine>(&self, machine: &M, both: [Address; 2], words: Address, to: &Input) -> Result<()> {
        let ((rows, width), [first, second]) = (to.matrix(), both);
        let arguments = [arguments![first, second, self.rows[0] as u32, words, to.at], &self.last(width, words)[..]].concat();
        let kernel = Kernel::on(to.element, "rows", ["pack_rows", "pack_rows_bf16"]);
        machine.launch(kernel, Grid::each_few(rows, width), &arguments)
    }

    /// Asks for the gradients by both arrays, zeros by rows that are not packed.
    pub(super) fn unpack<M: Machine>(&self, machine: &M, by_packed: &Input, words: Address, both: [Address; 2]) -> Result<()> {
        let ((rows, width), [first, second]) = (by_packed.matrix(), both);
        let arguments = arguments![by_packed.at, first, second, self.rows[0] as u32, words.after(self.all())];
        let arguments = [arguments, &self.last(width, words)[..]].concat();
        let kernel = Kernel::on(by_packed.element, "rows", ["pack_rows_backward", "pack_rows_backward_bf16"]);
        machine.launch(kernel, Grid::each_few(rows, width), &arguments)
    }
}

/// A packing by itself.
struct PackRows {
    packing: Packing,
    words: Vec<u32>,
}

impl Operator for PackRows {
    const NAME: &'static str = "pack_rows";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let shape = Shape::from((self.packing.all(), inputs[0].matrix().1));
        let (y, words) = (machine.allocate(shape.elem_count())?, machine.upload(&self.words)?);
        let to = Input { at: machine.at(&y), shape: shape.clone(), ..inputs[0].clone() };
        self.packing.pack(machine, [inputs[0].at, inputs[1].at], machine.words_at(&words), &to)?;
        Ok((y, shape))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (first, second) = (pass.inputs[0].alike(machine)?, pass.inputs[1].alike(machine)?);
        let words = machine.upload(&self.words)?;
        let both = [machine.at(&first), machine.at(&second)];
        self.packing.unpack(machine, pass.gradient, machine.words_at(&words), both)?;
        Ok(vec![Some(first), Some(second)])
    }
}

/// Rows of two matrices of one width, packed: row `r` is row `order[r]` of both, one behind the other, each of which is packed once.
/// Values are dropped out as by [`dropout`](crate::ops::dropout).
pub fn pack_rows(both: [&Tensor; 2], order: &[u32], (rate, seed): (f32, u32)) -> Result<Tensor> {
    let [first, second] = both;
    let counts = [first.dim(0)?, second.dim(0)?];
    let packing = Packing { rows: counts, keep: 1.0 - rate };
    let op = PackRows { packing, words: packing.words(order, counts, seed)? };
    first.contiguous()?.apply_op2(&second.contiguous()?, OnMachine::of(op))
}

/// Rows of a matrix that follow upon each other.
#[derive(Debug)]
pub(super) struct SomeRows {
    pub(super) first: usize,
    pub(super) rows: usize,
}

impl Operator for SomeRows {
    const NAME: &'static str = "some_rows";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let width = inputs[0].matrix().1;
        let y = machine.allocate(self.rows * width)?;
        copy(machine, inputs[0].at.after(self.first * width), machine.at(&y), self.rows * width)?;
        Ok((y, Shape::from((self.rows, width))))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (width, dx) = (pass.inputs[0].matrix().1, machine.zeros(pass.inputs[0].count())?);
        copy(machine, pass.gradient.at, machine.at(&dx).after(self.first * width), self.rows * width)?;
        Ok(vec![Some(dx)])
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
    fn every_row_is_packed_once() {
        let words = |order: &[u32], rows| Packing { rows, keep: 1.0 }.words(order, [2, 2], 9);
        assert_eq!(words(&[2, 0, 3, 1], [2, 2]).unwrap(), [2, 0, 3, 1, 1, 3, 0, 2, 9]);
        for (order, expected) in [
            (&[2, 0, 2, 1][..], "row 2 of 4 is packed twice"),
            (&[2, 0, 4, 1], "row 4 of 4 is packed twice, or is none"),
            (&[2, 0, 1], "3 rows are packed of 2 and 2"),
        ] {
            for rows in [[2, 2], [3, 4]] {
                let error = words(order, rows).unwrap_err();
                assert!(error.to_string().contains(expected), "{error}");
            }
        }
    }

    /// A row more of the first array and two of the second: the last of each three.
    #[test]
    fn rows_that_are_filled_up_are_not_packed() {
        let packing = Packing { rows: [3, 4], keep: 1.0 };
        let words = packing.words(&[2, 0, 3, 1], [2, 2], 9).unwrap();
        let (order, places) = ([3, 0, 4, 1, NO_ROW, NO_ROW, NO_ROW], [1, 3, NO_ROW, 0, 2, NO_ROW, NO_ROW]);
        assert_eq!(words, [&order[..], &places, &[9]].concat());
        assert_eq!(words.len(), packing.words_count());
    }

    #[test]
    fn gradients_are_listed_by_what_they_are_spread_over() {
        let (first, second) = (Address(0x7_0000_0100), Address(0x200));
        let words = listed(&[(&[3, 1], first), (&[1, 1], second)], 4, 2);
        let starts = [0, 0, 3, 3, 4, 0];
        let list = [0x108, 7, 0x200, 0, 0x208, 0, 0x100, 7];
        assert_eq!(words, [&starts[..], &list].concat());
    }

    #[test]
    fn choosers_are_listed_by_what_they_chose() {
        let of = Choosers::of(&[7, 2, 7, 0, 7], 9);
        let expected = Choosers { order: vec![3, 1, 0, 2, 4], starts: vec![0, 1, 2, 5], sources: vec![0, 2, 7] };
        assert_eq!(of, expected);
        assert_eq!(of.words(), [0, 1, 2, 5, 0, 2, 7, 3, 1, 0, 2, 4]);
        let filled = of.filled(6, 4);
        assert_eq!(filled.words(), [0, 1, 2, 5, 5, 0, 2, 7, NO_ROW, 3, 1, 0, 2, 4, 0]);
        assert_eq!(Choosers::of(&[], 9), Choosers { order: vec![], starts: vec![0], sources: vec![] });
    }
}
