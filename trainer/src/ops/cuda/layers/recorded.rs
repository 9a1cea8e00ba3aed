//! Passes as recordings.

use candle_core::{Result, Tensor};

use super::super::gathering::Gathering;
use super::super::operator::Input;
use super::super::recording::{Records, Reserved};
use super::stack::ByWeights;

/// A use of the layers as recordings, on memory that is theirs while they are done.
pub(super) struct Recorded<M: Records> {
    pub(super) images: Option<[Input; 2]>,
    pub(super) result: Input,
    pub(super) by_result: Input,
    pub(super) forward: M::Recording,
    /// Layers on the way back, the last one first.
    pub(super) backward: Vec<RecordedLayer<M>>,
    pub(super) by_embedding: Option<RecordedEmbedding<M>>,
    /// What the matrices are rounded by, while the recordings read it.
    pub(super) _pieces: Option<M::Words>,
}

pub(super) struct RecordedLayer<M: Records> {
    pub(super) number: usize,
    pub(super) backward: M::Recording,
    pub(super) gathered: Gathered<M>,
}

pub(super) struct RecordedEmbedding<M: Records> {
    pub(super) backward: M::Recording,
    pub(super) gathered: Gathered<M>,
    pub(super) features: Option<Input>,
}

/// How gradients by weights are copied to tensors, and by which of them they are.
pub(super) struct Gathered<M: Records> {
    numbers: Vec<usize>,
    gathering: Gathering<M>,
}

impl<M: Records> Gathered<M> {
    pub(super) fn of(machine: &M, by_weights: &ByWeights<Reserved<M>>) -> Result<Self> {
        let numbers = by_weights.places.iter().map(|&(number, ..)| number).collect();
        let places: Vec<_> = by_weights.places.iter().map(|&(_, at, count)| (at, count)).collect();
        Ok(Self { numbers, gathering: Gathering::of(machine, &places)? })
    }

    /// A copy of what lies there now.
    pub(super) fn copied<const N: usize>(&self, machine: &M, weights: &[Tensor; N]) -> Result<[Option<Tensor>; N]> {
        let found = self.gathering.gathered(machine, self.numbers.iter().map(|&number| weights[number].shape()))?;
        let mut all = [const { None }; N];
        for (&number, gradient) in self.numbers.iter().zip(found) {
            all[number] = Some(gradient);
        }
        Ok(all)
    }
}
