//! A computation that was put down, with what it is given.

use candle_core::{Result, Tensor};

use super::super::gathering::Gathering;
use super::super::machine::{Address, Element};
use super::super::operator::{Array, Input};
use super::super::recording::{Records, Reserved};
use super::super::rows::check_ids;
use super::super::{copy, fill_rows};
use super::tape::{Computed, Gradients, Leaf, Place, Tape};
use super::{Found, Given, NAME};
use crate::ops::{self, Computation};

/// Arrays in memory that stays.
pub(super) type Arrays<M> = Vec<Array<Reserved<M>>>;

pub(super) struct Task<M: Records> {
    pub(super) tape: Tape<Reserved<M>>,
    pub(super) leaves: Vec<Leaf>,
    /// Where ids of given rows lie among the words.
    ids: Vec<Option<usize>>,
    pub(super) outputs: Vec<Place>,
    /// Where gradients by the outputs lie among the words, if it is done at once.
    seeds: Option<usize>,
}

impl<M: Records> Task<M> {
    /// Puts down a computation, with factors of its outputs if it is done at once.
    ///
    /// # Errors
    /// Another number of factors than of outputs, rows that there are none of, and those of the computation.
    pub(super) fn of<C: Computation>(computation: &C, given: &[Given], factors: Option<&[f32]>) -> Result<Self> {
        let tape = Tape::new(ops::precision());
        let (mut leaves, mut places, mut all_ids) = (Vec::new(), Vec::new(), Vec::new());
        for (number, given) in given.iter().enumerate() {
            let leaf = given.leaf()?;
            all_ids.push(match given {
                Given::Rows { pass, ids, .. } => {
                    check_ids(ids, pass.rows())?;
                    // What fills up is the first of the rows once more.
                    let mut told = ids.to_vec();
                    told.resize(leaf.shape.0, ids.first().copied().unwrap_or_default());
                    Some(tape.tell(&told))
                }
                Given::Matrices { .. } => None,
            });
            places.push(tape.given(number, &leaf));
            leaves.push(leaf);
        }
        let outputs = computation.compute(&tape, &places)?;
        if factors.is_some_and(|factors| factors.len() != outputs.len()) {
            candle_core::bail!("{}: {} outputs and {:?} factors", C::NAME, outputs.len(), factors.map(<[f32]>::len));
        }
        if !outputs.iter().all(|&output| tape.is_whole(output)) {
            candle_core::bail!("{}: an output has rows that only fill up", C::NAME);
        }
        let seeds = factors.map(|factors| tape.tell(&factors.iter().copied().map(f32::to_bits).collect::<Vec<_>>()));
        Ok(Self { tape, leaves, ids: all_ids, outputs, seeds })
    }

    /// Values that it is given.
    pub(super) fn size(&self) -> usize {
        self.leaves.iter().map(|leaf| leaf.shape.0 * leaf.shape.1).sum()
    }

    /// Memory for what it is given.
    pub(super) fn laid(&self, memory: &Reserved<M>) -> Result<Arrays<M>> {
        self.leaves.iter().map(|leaf| Array::empty(memory, leaf.shape, Element::F32)).collect()
    }

    /// Brings what it is given to where it is read.
    pub(super) fn feed(&self, machine: &M, given: &[Given], to: &[Input], words: Address) -> Result<()> {
        for (((given, ids), leaf), to) in given.iter().zip(&self.ids).zip(&self.leaves).zip(to) {
            match (given, ids) {
                (Given::Rows { runs, pass, .. }, Some(ids)) => runs.rows_to(pass, words.after(*ids), to)?,
                (Given::Rows { .. }, None) => candle_core::bail!("{NAME}: nobody was told which rows"),
                (Given::Matrices { all, .. }, _) => {
                    let mut at = to.at;
                    for matrix in *all {
                        let from = machine.place(NAME, matrix)?;
                        copy(machine, from.at, at, from.count())?;
                        at = at.after(from.count());
                    }
                    let ((rows, width), counted) = (leaf.shape, leaf.counted);
                    if rows > counted {
                        fill_rows(machine, Address::NULL, at, Element::F32, rows - counted, width)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks for all of it at once, with gradients of the outputs' sum.
    pub(super) fn both_ways(&self, memory: &Reserved<M>, given: &[Input], words: Address) -> Result<Done<M>> {
        let mut computed = self.tape.forward(memory, given, words)?;
        let first = self.seeds.unwrap_or_default();
        let seeds: Vec<_> = (0..).zip(&self.outputs).map(|(number, &output)| (output, words.after(first + number))).collect();
        let gradients = self.tape.backward(memory, &mut computed, &seeds, words, &self.outputs)?;
        Ok(Done { computed, gradients })
    }

    /// Memory for gradients by the outputs.
    pub(super) fn seeds(&self, memory: &Reserved<M>, computed: &Computed<Reserved<M>>) -> Result<Arrays<M>> {
        self.outputs.iter().map(|&output| Array::empty(memory, computed.input(output).shape.clone(), Element::F32)).collect()
    }

    /// Asks for gradients, of those by the outputs.
    pub(super) fn backward(
        &self,
        memory: &Reserved<M>,
        mut computed: Computed<Reserved<M>>,
        seeds: &[Input],
        words: Address,
    ) -> Result<Gradients<Reserved<M>>> {
        let seeds: Vec<_> = self.outputs.iter().zip(seeds).map(|(&output, seed)| (output, seed.at)).collect();
        self.tape.backward(memory, &mut computed, &seeds, words, &[])
    }
}

/// What a task left that was done at once.
pub(super) struct Done<M: Records> {
    computed: Computed<Reserved<M>>,
    gradients: Gradients<Reserved<M>>,
}

/// What an array is to whoever asked.
enum What {
    Output,
    ByWeight(Tensor),
    ByGiven(usize),
}

/// How arrays become tensors.
pub(super) struct Told<M: Records> {
    arrays: Vec<(What, Input)>,
    gathering: Gathering<M>,
}

impl<M: Records> Told<M> {
    pub(super) fn outputs(machine: &M, task: &Task<M>, computed: &Computed<Reserved<M>>) -> Result<Self> {
        Self::of(machine, outputs(task, computed).collect())
    }

    pub(super) fn gradients(machine: &M, of: &Gradients<Reserved<M>>) -> Result<Self> {
        Self::of(machine, gradients(of).collect())
    }

    pub(super) fn both(machine: &M, task: &Task<M>, Done { computed, gradients: of }: &Done<M>) -> Result<Self> {
        Self::of(machine, outputs(task, computed).chain(gradients(of)).collect())
    }

    fn of(machine: &M, arrays: Vec<(What, Input)>) -> Result<Self> {
        let places: Vec<_> = arrays.iter().map(|(_, input)| (input.at, input.count())).collect();
        Ok(Self { arrays, gathering: Gathering::of(machine, &places)? })
    }

    /// Copies of what lies there now.
    pub(super) fn found(&self, machine: &M, task: &Task<M>) -> Result<Found> {
        let mut found = Found { by_given: vec![None; task.leaves.len()], ..Found::default() };
        let tensors = self.gathering.gathered(machine, self.arrays.iter().map(|(_, input)| &input.shape))?;
        for ((what, _), tensor) in self.arrays.iter().zip(tensors) {
            match what {
                What::Output => found.outputs.push(tensor),
                What::ByWeight(weight) => found.by_weights.push((weight.clone(), tensor)),
                What::ByGiven(number) => {
                    found.by_given[*number] = Some(tensor.narrow(0, 0, task.leaves[*number].counted)?);
                }
            }
        }
        Ok(found)
    }
}

fn outputs<M: Records>(task: &Task<M>, computed: &Computed<Reserved<M>>) -> impl Iterator<Item = (What, Input)> {
    task.outputs.iter().map(|&output| (What::Output, computed.input(output).clone()))
}

fn gradients<M: Records>(of: &Gradients<Reserved<M>>) -> impl Iterator<Item = (What, Input)> {
    let by_weights = of.by_weights.iter().map(|(weight, by)| (What::ByWeight(weight.clone()), by.input()));
    by_weights.chain(of.by_given.iter().map(|(number, by)| (What::ByGiven(*number), by.input())))
}
