//! Computations on one machine, on memory that stays, and their recordings.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::super::copy;
use super::super::layers::Counts;
use super::super::machine::Address;
use super::super::operator::{Array, Input};
use super::super::recording::{Records, Reserved};
use super::tape::Computed;
use super::task::{Arrays, Task, Told};
use super::{Found, Given, NAME};
use crate::ops::Computation;

/// Recordings, on memory that is theirs while they are done.
struct Recorded<M: Records> {
    given: Vec<Input>,
    forward: M::Recording,
    /// Outputs, and gradients if it is done at once.
    told: Told<M>,
    backward: Option<RecordedBackward<M>>,
}

struct RecordedBackward<M: Records> {
    /// Where gradients by the outputs are read.
    seeds: Vec<Input>,
    recording: M::Recording,
    told: Told<M>,
}

/// What has been done of a use.
enum Stage<M: Records> {
    /// What is done for the first time is not recorded: it may never be done again, and a device loads kernels when they are first used.
    First,
    /// It was done both ways.
    Done,
    Recorded(Box<Recorded<M>>),
}

struct OneUse<M: Records> {
    /// Of the tape.
    description: String,
    /// Those of the last time.
    words: M::Words,
    stage: Stage<M>,
}

/// The computation that was done last and may be taken back.
struct Last<M: Records> {
    number: u64,
    task: Task<M>,
    /// What it has left, where it was no recording.
    asked: Option<(Arrays<M>, Computed<Reserved<M>>)>,
}

/// Computations of one kind, which take turns on the same memory.
struct Kind<M: Records> {
    memory: Reserved<M>,
    /// The largest size that it was for.
    most: usize,
    /// The one that was used last is the last.
    uses: Vec<OneUse<M>>,
    last: Option<Last<M>>,
}

/// What all kinds share.
struct Shared<M: Records> {
    /// For work that is recorded.
    machine: M,
    counts: Counts,
    /// The machine does not record.
    refuses: bool,
}

pub(super) struct Engine<M: Records> {
    shared: Shared<M>,
    kinds: BTreeMap<&'static str, Kind<M>>,
}

fn inputs<M: Records>(arrays: &Arrays<M>) -> Vec<Input> {
    arrays.iter().map(Array::input).collect()
}

impl<M: Records> Shared<M> {
    /// Makes a recording of what was done before, if that can be done.
    fn record(&mut self, one: &mut OneUse<M>, record: impl FnOnce(&M) -> Result<Recorded<M>>) {
        if !matches!(one.stage, Stage::Done) || self.refuses {
            return;
        }
        match record(&self.machine) {
            Ok(recorded) => {
                one.stage = Stage::Recorded(Box::new(recorded));
                self.counts.recordings += 1;
            }
            Err(error) => {
                eprintln!("the objectives' work could not be recorded as a graph, and is asked for anew each time: {error}");
                self.refuses = true;
            }
        }
    }

    /// Brings a gradient, or zeros, to where it is read.
    fn seed(&self, by: Option<&Tensor>, to: &Input) -> Result<()> {
        let from = match by {
            Some(by) if by.shape() == &to.shape => self.machine.place(NAME, by)?.at,
            Some(by) => candle_core::bail!("{NAME}: a gradient of {:?} by {:?}", by.shape(), to.shape),
            None => Address::NULL,
        };
        copy(&self.machine, from, to.at, to.count())
    }
}

impl<M: Records> Kind<M> {
    fn new(machine: &M) -> Self {
        Self { memory: Reserved::of(machine), most: 0, uses: Vec::new(), last: None }
    }

    /// The use that a task is, or a new one, with the words where they are read. What is larger than any before begins with new memory, on
    /// which what was recorded is recorded again: pieces for less are of no use to it, and those for it are large enough for all others.
    fn take_out(&mut self, machine: &M, task: &Task<M>) -> Result<OneUse<M>> {
        /// Shapes are few, filled up as they are.
        const KEPT: usize = 32;
        self.last = None;
        if task.size() > self.most {
            self.most = task.size();
            self.memory = Reserved::of(machine);
            for one in self.uses.iter_mut().filter(|one| matches!(one.stage, Stage::Recorded(_))) {
                one.stage = Stage::Done;
            }
        }
        let (description, words) = (task.tape.description(&self.memory)?, task.tape.words());
        if let Some(place) = self.uses.iter().position(|one| one.description == description) {
            let mut one = self.uses.remove(place);
            machine.overwrite(&mut one.words, &words)?;
            return Ok(one);
        }
        if self.uses.len() == KEPT {
            self.uses.remove(0);
        }
        Ok(OneUse { description, words: machine.upload(&words)?, stage: Stage::First })
    }
}

impl<M: Records> Engine<M> {
    pub(super) fn new(machine: &M) -> Result<Self> {
        let shared = Shared { machine: machine.apart()?, counts: Counts::default(), refuses: false };
        Ok(Self { shared, kinds: BTreeMap::new() })
    }

    pub(super) fn counts(&self) -> Counts {
        self.shared.counts
    }

    /// Works on a kind; after a mistake it begins anew.
    fn of_kind<R>(&mut self, name: &'static str, work: impl FnOnce(&mut Shared<M>, &mut Kind<M>) -> Result<R>) -> Result<R> {
        let mut kind = self.kinds.remove(name).unwrap_or_else(|| Kind::new(&self.shared.machine));
        let result = work(&mut self.shared, &mut kind)?;
        self.kinds.insert(name, kind);
        Ok(result)
    }

    /// See [`super::Computations::at_once`].
    pub(super) fn at_once<C: Computation>(&mut self, computation: &C, given: &[Given], factors: &[f32]) -> Result<Found> {
        let task = Task::of(computation, given, Some(factors))?;
        self.of_kind(C::NAME, |shared, kind| {
            let mut one = kind.take_out(&shared.machine, &task)?;
            let (memory, words) = (&kind.memory, shared.machine.words_at(&one.words));
            shared.record(&mut one, |machine| {
                let laid = task.laid(memory)?;
                let (done, forward) = machine.record(|| task.both_ways(memory, &inputs(&laid), words))?;
                let told = Told::both(machine, &task, &done)?;
                Ok(Recorded { given: inputs(&laid), forward, told, backward: None })
            });
            let machine = &shared.machine;
            shared.counts.passes += 1;
            let found = match &one.stage {
                Stage::Recorded(recorded) => {
                    task.feed(machine, given, &recorded.given, words)?;
                    machine.replay(&recorded.forward)?;
                    shared.counts.replayed += 1;
                    recorded.told.found(machine, &task)?
                }
                _ => {
                    let laid = task.laid(memory)?;
                    task.feed(machine, given, &inputs(&laid), words)?;
                    let done = task.both_ways(memory, &inputs(&laid), words)?;
                    one.stage = Stage::Done;
                    Told::both(machine, &task, &done)?.found(machine, &task)?
                }
            };
            kind.uses.push(one);
            Ok(found)
        })
    }

    /// See [`super::Computations::forward`]. The computation is told its number.
    pub(super) fn forward<C: Computation>(&mut self, computation: &C, given: &[Given]) -> Result<(Vec<Tensor>, u64)> {
        let task = Task::of(computation, given, None)?;
        self.of_kind(C::NAME, |shared, kind| {
            let mut one = kind.take_out(&shared.machine, &task)?;
            let (memory, words) = (&kind.memory, shared.machine.words_at(&one.words));
            shared.record(&mut one, |machine| recorded_both_ways(machine, memory, &task, words));
            let machine = &shared.machine;
            let number = shared.counts.passes;
            shared.counts.passes += 1;
            let (found, asked) = match &one.stage {
                Stage::Recorded(recorded) => {
                    task.feed(machine, given, &recorded.given, words)?;
                    machine.replay(&recorded.forward)?;
                    shared.counts.replayed += 1;
                    (recorded.told.found(machine, &task)?, None)
                }
                _ => {
                    let laid = task.laid(memory)?;
                    task.feed(machine, given, &inputs(&laid), words)?;
                    let computed = task.tape.forward(memory, &inputs(&laid), words)?;
                    (Told::outputs(machine, &task, &computed)?.found(machine, &task)?, Some((laid, computed)))
                }
            };
            kind.uses.push(one);
            kind.last = Some(Last { number, task, asked });
            Ok((found.outputs, number))
        })
    }

    /// See [`super::Computations::backward`].
    pub(super) fn backward(&mut self, name: &'static str, number: u64, by_outputs: &[Option<Tensor>]) -> Result<Found> {
        self.of_kind(name, |shared, kind| {
            let last = kind.last.take().filter(|last| last.number == number);
            let (Some(Last { task, asked, .. }), Some(mut one)) = (last, kind.uses.pop()) else {
                candle_core::bail!("{name}: another {NAME} came in between")
            };
            if by_outputs.len() != task.outputs.len() {
                candle_core::bail!("{name}: {} gradients by {} outputs", by_outputs.len(), task.outputs.len());
            }
            let feed = |seeds: &[Input]| by_outputs.iter().zip(seeds).try_for_each(|(by, to)| shared.seed(by.as_ref(), to));
            let (machine, memory, words) = (&shared.machine, &kind.memory, shared.machine.words_at(&one.words));
            let found = match (&one.stage, asked) {
                (Stage::Recorded(recorded), None) => {
                    let Some(RecordedBackward { seeds, recording, told }) = &recorded.backward else {
                        candle_core::bail!("{name}: no way back was recorded")
                    };
                    feed(seeds)?;
                    machine.replay(recording)?;
                    told.found(machine, &task)?
                }
                (_, Some((_laid, computed))) => {
                    let seeds = task.seeds(memory, &computed)?;
                    feed(&inputs(&seeds))?;
                    let gradients = task.backward(memory, computed, &inputs(&seeds), words)?;
                    if matches!(one.stage, Stage::First) {
                        one.stage = Stage::Done;
                    }
                    Told::gradients(machine, &gradients)?.found(machine, &task)?
                }
                _ => candle_core::bail!("{name}: nothing was left"),
            };
            kind.uses.push(one);
            Ok(found)
        })
    }
}

/// Both ways as recordings. All memory is given back then: nobody else writes to it while they are done.
fn recorded_both_ways<M: Records>(machine: &M, memory: &Reserved<M>, task: &Task<M>, words: Address) -> Result<Recorded<M>> {
    let laid = task.laid(memory)?;
    let (computed, forward) = machine.record(|| task.tape.forward(memory, &inputs(&laid), words))?;
    let told = Told::outputs(machine, task, &computed)?;
    let seeds = task.seeds(memory, &computed)?;
    let (gradients, recording) = machine.record(|| task.backward(memory, computed, &inputs(&seeds), words))?;
    let backward = RecordedBackward { seeds: inputs(&seeds), recording, told: Told::gradients(machine, &gradients)? };
    Ok(Recorded { given: inputs(&laid), forward, told, backward: Some(backward) })
}
