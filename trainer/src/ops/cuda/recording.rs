//! Work that is asked for once and then done again and again: on a CUDA device, a graph. A host asks for such a graph in one call, where
//! it would ask for hundreds of kernels, and the device need not wait for it between these.
//!
//! What is recorded are kernels and products with all their arguments, so every run reads and writes the same places. That is what
//! [`Reserved`] is for.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// What is made for a machine when it is first needed, whatever kind of machine that is.
#[derive(Default)]
pub struct OfMachine(Mutex<Option<Box<dyn Any + Send>>>);

impl OfMachine {
    fn locked(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on it; another kind than before is made anew.
    ///
    /// # Errors
    /// Those of `make` and `work`.
    pub fn with<E: Send + 'static, R>(
        &self,
        make: impl FnOnce() -> Result<E>,
        work: impl FnOnce(&mut E) -> Result<R>,
    ) -> Result<R> {
        let mut made = self.locked();
        if made.as_ref().is_none_or(|made| !made.is::<E>()) {
            *made = Some(Box::new(make()?));
        }
        match made.as_mut().and_then(|made| made.downcast_mut()) {
            Some(made) => work(made),
            None => candle_core::bail!("nothing was made for this machine"),
        }
    }

    /// Looks at it, if there is one of this kind.
    pub fn look<E: 'static, R>(&self, at: impl FnOnce(&E) -> R) -> Option<R> {
        self.locked().as_ref()?.downcast_ref().map(at)
    }
}

/// A machine that keeps its memory: what is given back is lent again to whoever asks for that much or less, and given to nobody else.
pub struct Reserved<M: Machine> {
    machine: M,
    store: Arc<Mutex<Store<M>>>,
}

impl<M: Machine> Clone for Reserved<M> {
    fn clone(&self) -> Self {
        Self { machine: self.machine.clone(), store: Arc::clone(&self.store) }
    }
}

/// 32-bit values that are lent together, 256 bytes: what any kernel or library may want an array to begin at.
const UNIT: usize = 64;

/// Memory that was allocated once, in pieces.
struct Store<M: Machine>(Vec<Piece<M>>);

struct Piece<M: Machine> {
    values: M::Values,
    /// What is not lent: where each range of units begins, and how many they are. No two touch each other.
    left: BTreeMap<usize, usize>,
}

impl<M: Machine> Store<M> {
    /// The smallest range of so many units that is left: its piece, its first unit and how long it is.
    fn find(&self, units: usize) -> Option<(usize, usize, usize)> {
        let ranges = self
            .0
            .iter()
            .enumerate()
            .flat_map(|(piece, Piece { left, .. })| left.iter().map(move |(&first, &count)| (piece, first, count)));
        ranges.filter(|&(_, _, count)| count >= units).min_by_key(|&(_, _, count)| count)
    }

    /// Lends so many units, of a new piece if they fit nowhere.
    fn lend(&mut self, machine: &M, units: usize) -> Result<(usize, usize)> {
        let (piece, first, count) = match self.find(units) {
            Some(found) => found,
            None => {
                self.0.push(Piece { values: machine.allocate(units * UNIT)?, left: BTreeMap::from([(0, units)]) });
                (self.0.len() - 1, 0, units)
            }
        };
        let left = &mut self.0[piece].left;
        left.remove(&first);
        if count > units {
            left.insert(first + units, count - units);
        }
        Ok((piece, first))
    }

    fn take_back(&mut self, piece: usize, mut first: usize, mut units: usize) {
        let left = &mut self.0[piece].left;
        if let Some(behind) = left.remove(&(first + units)) {
            units += behind;
        }
        if let Some((&before, &count)) = left.range(..first).next_back()
            && before + count == first
        {
            (first, units) = (before, count + units);
        }
        left.insert(first, units);
    }
}

/// Memory of a [`Reserved`] machine.
pub struct Lent<M: Machine> {
    at: Address,
    piece: usize,
    first: usize,
    units: usize,
    store: Arc<Mutex<Store<M>>>,
}

fn locked<M: Machine>(store: &Mutex<Store<M>>) -> MutexGuard<'_, Store<M>> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: Machine> Drop for Lent<M> {
    fn drop(&mut self) {
        locked(&self.store).take_back(self.piece, self.first, self.units);
    }
}

impl<M: Machine> Reserved<M> {
    /// Without memory yet.
    pub fn of(machine: &M) -> Self {
        Self { machine: machine.clone(), store: Arc::new(Mutex::new(Store(Vec::new()))) }
    }

    /// 32-bit values that it keeps.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        let units = |piece: &Piece<M>| piece.left.values().sum::<usize>();
        locked(&self.store).0.iter().map(units).sum::<usize>() * UNIT
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
        let units = count.div_ceil(UNIT).max(1);
        let mut store = locked(&self.store);
        let (piece, first) = store.lend(&self.machine, units)?;
        let at = self.machine.at(&store.0[piece].values).after(first * UNIT);
        self.machine.forget(at, units * UNIT)?;
        Ok(Lent { at, piece, first, units, store: Arc::clone(&self.store) })
    }

    fn zeros(&self, count: usize) -> Result<Lent<M>> {
        let values = self.allocate(count)?;
        super::fill_rows(self, Address::NULL, self.at(&values), Element::F32, 1, count)?;
        Ok(values)
    }

    fn upload(&self, _words: &[u32]) -> Result<M::Words> {
        Self::unlike("take tables from the host: a recording has those of the first time")
    }

    fn overwrite(&self, _words: &mut M::Words, _with: &[u32]) -> Result<()> {
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

    fn forget(&self, at: Address, count: usize) -> Result<()> {
        self.machine.forget(at, count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::emulation::Emulated;
    use super::*;

    fn read<M: Machine>(machine: &Reserved<M>, lent: &Lent<M>, count: usize) -> Vec<f32> {
        // SAFETY: so many values of the host's memory, which is held.
        unsafe { std::slice::from_raw_parts(machine.at(lent).0 as *const f32, count) }.to_vec()
    }

    /// What is lent goes back, and two who have some at one time do not share it.
    #[test]
    fn reserved_memory_is_lent_to_one_at_a_time() {
        let machine = Reserved::of(&Emulated::on_this_thread());
        let mut lent: Vec<_> =
            [5, 700, 64, 65, 3_000].into_iter().map(|count| (machine.allocate(count).unwrap(), count)).collect();
        for _ in 0..4 {
            let mut ranges: Vec<_> = lent.iter().map(|(lent, count)| (machine.at(lent).0, 4 * *count as u64)).collect();
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:?}");
            assert!(ranges.iter().all(|(at, _)| at % 16 == 0));
            let count = lent.remove(1).1;
            lent.push((machine.allocate(count / 2 + 1).unwrap(), count / 2 + 1));
        }
        let [(_, two), (_, one)] = [lent.remove(0), lent.remove(0)];
        let zeros = machine.zeros(one.max(two)).unwrap();
        assert!(read(&machine, &zeros, one.max(two)).iter().all(|&value| value == 0.0));
        assert!(read(&machine, &machine.allocate(9).unwrap(), 9).iter().all(|value| value.is_nan()), "what was there shows");
    }

    /// Ranges that touch become one again, whatever the order in which they come back.
    #[test]
    fn reserved_memory_that_came_back_is_enough_for_the_next() {
        let machine = Reserved::of(&Emulated::on_this_thread());
        drop(machine.allocate(6 * UNIT).unwrap());
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut parts: Vec<_> = (0..3).map(|_| Some(machine.allocate(2 * UNIT).unwrap())).collect();
            order.into_iter().for_each(|part| parts[part] = None);
            drop(machine.allocate(6 * UNIT).unwrap());
        }
        assert_eq!(machine.kept(), 6 * UNIT);
        // The smallest that is large enough is lent.
        drop(machine.allocate(9 * UNIT).unwrap());
        let six = machine.allocate(5 * UNIT).unwrap();
        drop(machine.allocate(9 * UNIT).unwrap());
        drop(six);
        assert_eq!(machine.kept(), 15 * UNIT);
    }
}
