//! Computations of arrays that are done in every step, on memory that stays. What is put down alike for a second time is recorded, and
//! asked for as a recording from then on: on a CUDA device, a graph.

mod engine;
mod tape;
mod task;

use candle_core::{Device, Result, Tensor};

use super::attention_tables::unit;
use super::layers::{Counts, Forward, Runs};
use super::operator::on_machine;
use super::recording::{OfMachine, Records};
use crate::ops::Computation;
use engine::Engine;
use tape::Leaf;

/// In messages.
const NAME: &str = "computation";

/// The fewest that rows are filled up to a multiple of.
const LEAST: usize = 16;

/// An array that a computation is given.
pub enum Given<'a> {
    /// Rows of a pass's hidden states.
    Rows {
        /// What the pass went through.
        runs: &'a Runs,
        /// The pass.
        pass: &'a Forward,
        /// Which rows.
        ids: &'a [u32],
        /// Of rows that vary in number, the part of them that they are filled up to a multiple of (`1 / parts`, about), with one that
        /// counts nothing.
        parts: Option<usize>,
    },
    /// Matrices of one width, f32 and contiguous, each below the one before.
    Matrices {
        /// At least one.
        all: &'a [Tensor],
        /// As above, of the rows of all together.
        parts: Option<usize>,
        /// Gradients by them are asked for.
        wanted: bool,
    },
}

impl Given<'_> {
    /// Rows, those that are filled up not among them, and their width.
    fn sizes(&self) -> Result<(usize, usize)> {
        match self {
            Given::Rows { pass, ids, .. } => Ok((ids.len(), pass.width())),
            Given::Matrices { all, .. } => {
                let sizes = all.iter().map(Tensor::dims2).collect::<Result<Vec<_>>>()?;
                match sizes.first() {
                    Some(&(_, width)) if sizes.iter().all(|size| size.1 == width) => {
                        Ok((sizes.iter().map(|size| size.0).sum(), width))
                    }
                    _ => candle_core::bail!("{NAME}: matrices of {sizes:?}"),
                }
            }
        }
    }

    fn leaf(&self) -> Result<Leaf> {
        let (counted, width) = self.sizes()?;
        let (parts, wanted) = match *self {
            Given::Rows { parts, .. } => (parts, true),
            Given::Matrices { parts, wanted, .. } => (parts, wanted),
        };
        let rows = parts.map_or(counted, |parts| counted.next_multiple_of(unit(counted, parts).max(LEAST)));
        Ok(Leaf { shape: (rows, width), counted, wanted })
    }
}

/// What was computed.
#[derive(Default)]
pub struct Found {
    /// What the computation gives.
    pub outputs: Vec<Tensor>,
    /// Gradients by weights, which these are.
    pub by_weights: Vec<(Tensor, Tensor)>,
    /// Gradients by what was given, where they were asked for.
    pub by_given: Vec<Option<Tensor>>,
}

/// Computations on one machine.
#[derive(Default)]
pub struct Computations(OfMachine);

/// A computation that was done forward.
pub struct Pending {
    name: &'static str,
    number: u64,
    device: Device,
}

impl Computations {
    /// What is computed, and the gradients of the sum of the first values of all outputs, each as many times as the factors say.
    ///
    /// # Errors
    /// Another number of factors than of outputs, and those of the computation.
    pub fn at_once<C: Computation>(&self, computation: &C, given: &[Given], factors: &[f32], device: &Device) -> Result<Found> {
        on_machine!(device, NAME, |machine| self.with(&machine, |engine| engine.at_once(computation, given, factors)))
    }

    /// What is computed, and what [`Self::backward`] takes back.
    ///
    /// # Errors
    /// Those of the computation.
    pub fn forward<C: Computation>(&self, computation: &C, given: &[Given], device: &Device) -> Result<(Vec<Tensor>, Pending)> {
        on_machine!(device, NAME, |machine| self.with(&machine, |engine| {
            let (outputs, number) = engine.forward(computation, given)?;
            Ok((outputs, Pending { name: C::NAME, number, device: device.clone() }))
        }))
    }

    /// Gradients, of those by all outputs of a computation, which has to be the last one of its kind. Where there are none, they are zeros.
    ///
    /// # Errors
    /// Another number of gradients, or of other shapes; another computation of that kind in between; and those of the operators.
    pub fn backward(&self, pending: &Pending, by_outputs: &[Option<Tensor>]) -> Result<Found> {
        on_machine!(&pending.device, NAME, |machine| {
            self.with(&machine, |engine| engine.backward(pending.name, pending.number, by_outputs))
        })
    }

    /// How many there were, and how many as a recording.
    #[must_use]
    pub fn counts(&self) -> Counts {
        #[cfg(feature = "cuda")]
        if let Some(counts) = self.0.look(|engine: &Engine<super::nvidia::Nvidia>| engine.counts()) {
            return counts;
        }
        #[cfg(test)]
        if let Some(counts) = self.0.look(|engine: &Engine<super::emulation::Emulated>| engine.counts()) {
            return counts;
        }
        Counts::default()
    }

    fn with<M: Records, R>(&self, machine: &M, work: impl FnOnce(&mut Engine<M>) -> Result<R>) -> Result<R> {
        self.0.with(|| Engine::new(machine), work)
    }
}

#[cfg(test)]
mod tests;
