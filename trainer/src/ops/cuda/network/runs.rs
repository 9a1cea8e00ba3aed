//! Passes through a network. Its shapes repeat from step to step, and so do all the places of its memory: from the second pass on, the
//! host asks for a recording of it, which on a CUDA device is one graph each way.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Shape, Tensor};

use super::super::gathering::Gathering;
use super::super::machine::{Element, Machine};
use super::super::operator::{Input, on_machine};
use super::super::recording::{Lent, Records, Reserved};
use super::super::{Precision, copy, round_to, widen_to};
use super::{Gradients, Made, NAME, OnMachine, array};
use crate::ops::network::Network;
use crate::ops::precision;

/// A pass through a network, to be taken back.
#[derive(Debug)]
pub struct Forward {
    number: u64,
}

/// What may differ from one use of a network to another.
#[derive(Clone, PartialEq)]
struct Use {
    shape: Shape,
    precision: Precision,
    /// Where the weights lie.
    weights: Vec<u64>,
}

/// Passes through one network in one way.
trait Passes: Send {
    fn used_as(&self) -> &Use;
    /// The last pass whose results are still there.
    fn last(&self) -> Option<u64>;
    fn is_recorded(&self) -> bool;
    fn forward(&mut self, network: &Network, x: &Tensor) -> Result<(Tensor, u64)>;
    fn backward(&mut self, network: &Network, by_result: &Tensor) -> Result<Vec<Tensor>>;
}

enum Stage<M: Records> {
    /// What is done for the first time is not recorded: it may never be done again, and a device loads kernels when they are first used.
    First,
    /// It was done both ways.
    Done,
    Recorded(Box<Recorded<M>>),
    /// The machine could not record.
    Unrecorded,
}

struct Recorded<M: Records> {
    forward: M::Recording,
    backward: M::Recording,
    result: Input,
    gathering: Gathering<M>,
    /// Hold what the recordings work on.
    _gradients: Gradients<Reserved<M>>,
}

struct OneUse<M: Records> {
    machine: M,
    reserved: Reserved<M>,
    used_as: Use,
    input: Lent<M>,
    by_result: Option<Lent<M>>,
    made: Vec<Made<Reserved<M>>>,
    stage: Stage<M>,
    last: Option<u64>,
}

impl<M: Records> OneUse<M> {
    /// On a machine for work that is recorded.
    fn new(machine: M, used_as: Use) -> Result<Self> {
        let reserved = Reserved::of(&machine);
        let input = reserved.allocate(Element::of(used_as.precision).words(used_as.shape.elem_count()))?;
        Ok(Self { machine, reserved, used_as, input, by_result: None, made: Vec::new(), stage: Stage::First, last: None })
    }

    fn on<'a>(&'a self, network: &'a Network) -> OnMachine<'a, Reserved<M>> {
        OnMachine { machine: &self.reserved, network, precision: self.used_as.precision }
    }

    /// What activations are stored as.
    fn element(&self) -> Element {
        Element::of(self.used_as.precision)
    }

    fn input(&self) -> Input {
        array(&self.reserved, &self.input, self.used_as.shape.clone(), self.element())
    }

    /// Asks for an f32 tensor to be stored as an activation.
    fn store(&self, tensor: &Tensor, to: &Input) -> Result<()> {
        let tensor = tensor.contiguous()?;
        let from = self.machine.place(NAME, &tensor)?;
        match to.element {
            Element::F32 => copy(&self.machine, from.at, to.at, from.count()),
            Element::Bf16 => round_to(&self.machine, from.at, to.at, from.count()),
        }
    }

    fn by_result(&mut self, result: &Input) -> Result<Input> {
        let memory = match self.by_result.take() {
            Some(memory) => memory,
            None => result.alike(&self.reserved)?,
        };
        let by_result = array(&self.reserved, &memory, result.shape.clone(), result.element);
        self.by_result = Some(memory);
        Ok(by_result)
    }

    fn gathering(&self, gradients: &Gradients<Reserved<M>>) -> Result<Gathering<M>> {
        let places: Vec<_> = gradients.iter().map(|(values, count)| (self.reserved.at(values), *count)).collect();
        Gathering::of(&self.machine, &places)
    }

    /// Records both passes.
    fn record(&mut self, network: &Network) -> Result<Recorded<M>> {
        self.made.clear();
        let (made, forward) = self.machine.record(|| self.on(network).forward(&self.input()))?;
        let Some(result) = made.last().map(|made| made.result.clone()) else { candle_core::bail!("{NAME}: no layers") };
        let by_result = self.by_result(&result)?;
        let (gradients, backward) = self.machine.record(|| self.on(network).backward(made, &by_result))?;
        Ok(Recorded { forward, backward, result, gathering: self.gathering(&gradients)?, _gradients: gradients })
    }

    fn result(&self) -> Result<Input> {
        match (&self.stage, self.made.last()) {
            (Stage::Recorded(recorded), _) => Ok(recorded.result.clone()),
            (_, Some(made)) => Ok(made.result.clone()),
            _ => candle_core::bail!("{NAME}: nothing was passed through it"),
        }
    }
}

impl<M: Records> Passes for OneUse<M> {
    fn used_as(&self) -> &Use {
        &self.used_as
    }

    fn last(&self) -> Option<u64> {
        self.last
    }

    fn is_recorded(&self) -> bool {
        matches!(self.stage, Stage::Recorded(_))
    }

    fn forward(&mut self, network: &Network, x: &Tensor) -> Result<(Tensor, u64)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        self.last = None;
        if matches!(self.stage, Stage::Done) {
            self.stage = match self.record(network) {
                Ok(recorded) => Stage::Recorded(Box::new(recorded)),
                Err(error) => {
                    eprintln!("the backbone's work could not be recorded as a graph, and is asked for anew each time: {error}");
                    Stage::Unrecorded
                }
            };
        }
        self.store(x, &self.input())?;
        match &self.stage {
            Stage::Recorded(recorded) => self.machine.replay(&recorded.forward)?,
            _ => {
                self.made.clear();
                self.made = self.on(network).forward(&self.input())?;
            }
        }
        let result = self.result()?;
        let values = self.machine.allocate(result.count())?;
        let to = self.machine.at(&values);
        match result.element {
            Element::F32 => copy(&self.machine, result.at, to, result.count())?,
            Element::Bf16 => widen_to(&self.machine, result.at, to, result.count())?,
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        self.last = Some(number);
        Ok((self.machine.tensor(values, &result.shape)?, number))
    }

    fn backward(&mut self, network: &Network, by_result: &Tensor) -> Result<Vec<Tensor>> {
        // Memory of results is written to.
        self.last = None;
        let result = self.result()?;
        let gradient = self.by_result(&result)?;
        if by_result.shape() != &result.shape {
            candle_core::bail!("{NAME}: a gradient of {:?} by {:?}", by_result.shape(), result.shape);
        }
        self.store(by_result, &gradient)?;
        if let Stage::Recorded(recorded) = &self.stage {
            self.machine.replay(&recorded.backward)?;
            return recorded.gathering.gathered(&self.machine, network.weights().map(Tensor::shape));
        }
        let made = std::mem::take(&mut self.made);
        let gradients = self.on(network).backward(made, &gradient)?;
        if matches!(self.stage, Stage::First) {
            self.stage = Stage::Done;
        }
        self.gathering(&gradients)?.gathered(&self.machine, network.weights().map(Tensor::shape))
    }
}

/// Passes through a network, of pictures of several numbers perhaps.
#[derive(Default)]
pub struct Runs(Mutex<All>);

#[derive(Default)]
struct All {
    uses: Vec<Box<dyn Passes>>,
    /// The machine for work that is recorded, the same one for all of them.
    apart: Option<Box<dyn Any + Send>>,
}

impl All {
    /// The one that is used so, the last of them from now on.
    fn find(&mut self, network: &Network, x: &Tensor) -> Result<&mut Box<dyn Passes>> {
        /// A step's passes have pictures of two numbers at most, as even as they can be; each holds what its pictures take.
        const KEPT: usize = 2;
        let used_as = used_as(network, x)?;
        let found = match self.uses.iter().position(|one| *one.used_as() == used_as) {
            Some(place) => self.uses.remove(place),
            None => {
                if self.uses.len() == KEPT {
                    self.uses.remove(0);
                }
                on_machine!(x.device(), NAME, |machine| self.new_use(&machine, used_as))?
            }
        };
        self.uses.push(found);
        self.uses.last_mut().ok_or_else(|| candle_core::Error::Msg(format!("{NAME}: nothing to pass through")))
    }

    fn new_use<M: Records>(&mut self, machine: &M, used_as: Use) -> Result<Box<dyn Passes>> {
        let apart = match self.apart.as_ref().and_then(|apart| apart.downcast_ref::<M>()) {
            Some(apart) => apart.clone(),
            None => {
                let apart = machine.apart()?;
                self.apart = Some(Box::new(apart.clone()));
                apart
            }
        };
        Ok(Box::new(OneUse::new(apart, used_as)?))
    }
}

impl Runs {
    fn locked(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the network makes of `x`, `[images, side², channels]`: a constant to candle.
    ///
    /// # Errors
    /// Shapes that do not fit, a device without kernels, and those of candle.
    pub fn forward(&self, network: &Network, x: &Tensor) -> Result<(Tensor, Forward)> {
        let mut all = self.locked();
        let (y, number) = all.find(network, x)?.forward(network, x)?;
        Ok((y, Forward { number }))
    }

    /// Gradients by weight and bias of every layer, first to last, of the gradient by what a forward pass made of `x`. If another pass
    /// came after that, it is done again.
    ///
    /// # Errors
    /// As [`Self::forward`]; a gradient of another shape than the result's.
    pub fn backward(&self, network: &Network, x: &Tensor, forward: &Forward, by_result: &Tensor) -> Result<Vec<Tensor>> {
        let mut all = self.locked();
        let one = all.find(network, x)?;
        if one.last() != Some(forward.number) {
            one.forward(network, x)?;
        }
        one.backward(network, by_result)
    }

    /// How many of the uses that are kept were recorded.
    #[must_use]
    pub fn recorded(&self) -> usize {
        self.locked().uses.iter().filter(|one| one.is_recorded()).count()
    }
}

fn used_as(network: &Network, x: &Tensor) -> Result<Use> {
    let weights =
        on_machine!(x.device(), NAME, |machine| network.weights().map(|tensor| Ok(machine.place(NAME, tensor)?.at.0)).collect())?;
    Ok(Use { shape: x.shape().clone(), precision: precision(), weights })
}
