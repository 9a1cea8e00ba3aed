//! Work that is asked for once and then done again and again: on a CUDA device, a graph. A host asks for such a graph in one call, where
//! it would ask for hundreds of kernels, and the device need not wait for it between these.
//!
//! What is recorded are kernels and products with all their arguments, so every run reads and writes the same places. That is what
//! [`Reserved`] is for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Argument, Element, Grid, Kernel, Machine, Product};
use super::operator::Input;

/// A machine on which work can be recorded.
pub trait Records: Machine + Send {
    /// Work that was recorded.
    type Recording: Send + 'static;

    /// The same machine, for work that is to be recorded.
    fn apart(&self) -> Result<Self>;

    /// Records what `work` asks of this machine, which [`Self::apart`] gave, and of clones of it. None of it is done. Nothing may be
    /// uploaded, and memory has to live as long as the recording.
    fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Self::Recording)>;

    /// Asks for all of it, in its order.
    fn replay(&self, recording: &Self::Recording) -> Result<()>;
}

/// A machine that keeps its memory: what is given back is lent again to the next who asks for as much, and to nobody else.
pub struct Reserved<M: Machine> {
    machine: M,
    store: Arc<Mutex<Store<M>>>,
}

impl<M: Machine> Clone for Reserved<M> {
    fn clone(&self) -> Self {
        Self { machine: self.machine.clone(), store: Arc::clone(&self.store) }
    }
}

/// Memory that was allocated once.
struct Store<M: Machine> {
    all: Vec<M::Values>,
    /// Numbers of those that are not lent, by their size.
    left: BTreeMap<usize, Vec<usize>>,
}

/// Memory of a [`Reserved`] machine.
pub struct Lent<M: Machine> {
    at: Address,
    number: usize,
    count: usize,
    store: Arc<Mutex<Store<M>>>,
}

fn locked<M: Machine>(store: &Mutex<Store<M>>) -> MutexGuard<'_, Store<M>> {
    store.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<M: Machine> Drop for Lent<M> {
    fn drop(&mut self) {
        locked(&self.store).left.entry(self.count).or_default().push(self.number);
    }
}

impl<M: Machine> Reserved<M> {
    /// Without memory yet.
    pub fn of(machine: &M) -> Self {
        let store = Store { all: Vec::new(), left: BTreeMap::new() };
        Self { machine: machine.clone(), store: Arc::new(Mutex::new(store)) }
    }

    fn unlike<T>(what: &str) -> Result<T> {
        candle_core::bail!("work that is done again and again cannot {what}")
    }
}

impl<M: Machine> Machine for Reserved<M> {
    type Values = Lent<M>;
    type Words = M::Words;

    fn place(&self, operator: &'static str, tensor: &Tensor) -> Result<Input> {
        self.machine.place(operator, tensor)
    }

    fn tensor(&self, _values: Lent<M>, _shape: &Shape) -> Result<Tensor> {
        Self::unlike("give its memory away")
    }

    fn allocate(&self, count: usize) -> Result<Lent<M>> {
        let mut store = locked(&self.store);
        let number = match store.left.get_mut(&count).and_then(Vec::pop) {
            Some(number) => number,
            None => {
                let values = self.machine.allocate(count)?;
                store.all.push(values);
                store.all.len() - 1
            }
        };
        Ok(Lent { at: self.machine.at(&store.all[number]), number, count, store: Arc::clone(&self.store) })
    }

    fn zeros(&self, count: usize) -> Result<Lent<M>> {
        let values = self.allocate(count)?;
        super::fill_rows(self, Address::NULL, self.at(&values), Element::F32, 1, count)?;
        Ok(values)
    }

    fn upload(&self, _words: &[u32]) -> Result<M::Words> {
        Self::unlike("take tables from the host: a recording has those of the first time")
    }

    fn at(&self, values: &Lent<M>) -> Address {
        values.at
    }

    fn words_at(&self, words: &M::Words) -> Address {
        self.machine.words_at(words)
    }

    fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument]) -> Result<()> {
        self.machine.launch(kernel, grid, arguments)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.machine.multiply(product)
    }
}
