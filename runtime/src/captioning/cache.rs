//! Keys and values of the words of all hypotheses.

use std::ops::Range;

use crate::bundle::manifest::{ModelSizes, Sizes};
use crate::engine::Tensor;

/// Added to the attention score of a slot that a hypothesis does not see.
const UNSEEN: f32 = -1e4;

/// Which slots of a pool of keys and values each hypothesis goes back on, as the mask `[hypotheses, slots]` of the `decode` graph.
/// Hypotheses that share a beginning share its slots: branching and dropping them changes the mask and moves no key.
#[derive(Debug, Clone)]
pub struct Slots {
    mask: Tensor,
    /// The slot of each hypothesis' last word.
    last: Vec<usize>,
    filled: usize,
    words: usize,
}

impl Slots {
    /// Slots of an empty pool.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        let mut mask = Tensor::zeros(&[sizes.hypotheses, sizes.slots]);
        mask.floats_mut().fill(UNSEEN);
        Self { mask, last: Vec::new(), filled: 0, words: 0 }
    }

    /// Number of words of every hypothesis, which is the position of the next one.
    #[must_use]
    pub fn words(&self) -> usize {
        self.words
    }

    /// The slot of the first hypothesis' next word; the others' are those after it. None of them is seen yet.
    #[must_use]
    pub fn next(&self) -> usize {
        self.filled
    }

    /// The input `mask` of the `decode` graph.
    #[must_use]
    pub fn mask(&self) -> &Tensor {
        &self.mask
    }

    /// Makes hypothesis i one that goes on from what was hypothesis `parents[i]`; rows beyond them see nothing. Does nothing
    /// before the first words are stored.
    pub fn branch(&mut self, parents: impl ExactSizeIterator<Item = usize>) {
        if self.words == 0 {
            return;
        }
        let slots = self.mask.shape()[1];
        let before = self.mask.floats().to_vec();
        let mask = self.mask.floats_mut();
        mask.fill(UNSEEN);
        for (row, parent) in mask.chunks_exact_mut(slots).zip(parents) {
            row.copy_from_slice(&before[parent * slots..][..slots]);
            row[self.last[parent]] = 0.0;
        }
    }

    /// Takes slots for one word of each of the first `count` hypotheses; `None`, and nothing taken, where there are no more.
    pub fn take(&mut self, count: usize) -> Option<Range<usize>> {
        let taken = self.filled..self.filled + count;
        if taken.end > self.mask.shape()[1] {
            return None;
        }
        self.last = taken.clone().collect();
        self.filled = taken.end;
        self.words += 1;
        Some(taken)
    }
}

/// One pool of the words' keys and values `[layers, heads, slots, head_width]` in the host's memory, and its [`Slots`]. The
/// picture's keys and values are not in here: all hypotheses see all of them.
#[derive(Debug, Clone)]
pub struct KvPool {
    keys: Tensor,
    values: Tensor,
    slots: Slots,
}

impl KvPool {
    /// An empty pool.
    #[must_use]
    pub fn new(model: &ModelSizes, sizes: Sizes) -> Self {
        let shape = [model.layers, model.heads, sizes.slots, model.hidden / model.heads.max(1)];
        Self { keys: Tensor::zeros(&shape), values: Tensor::zeros(&shape), slots: Slots::new(sizes) }
    }

    /// Its slots.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The inputs `past_keys`, `past_values` and `mask` of the `decode` graph.
    #[must_use]
    pub fn inputs(&self) -> [(&'static str, &Tensor); 3] {
        [("past_keys", &self.keys), ("past_values", &self.values), ("mask", self.slots.mask())]
    }

    /// [`Slots::branch`].
    pub fn branch(&mut self, parents: impl ExactSizeIterator<Item = usize>) {
        self.slots.branch(parents);
    }

    /// Stores the words just read: the first `count` rows of `new_keys` and `new_values` `[layers, heads, hypotheses, head_width]`.
    /// Nothing is stored where the pool has no room for them.
    pub fn store(&mut self, new_keys: &Tensor, new_values: &Tensor, count: usize) {
        if let Some(taken) = self.slots.take(count) {
            store(&mut self.keys, new_keys, taken.start, count);
            store(&mut self.values, new_values, taken.start, count);
        }
    }
}

fn store(pool: &mut Tensor, new: &Tensor, slot: usize, count: usize) {
    let (slots, width, hypotheses) = (pool.shape()[2], pool.shape()[3], new.shape()[2]);
    pool.update(|pool| {
        for (head, rows) in pool.chunks_exact_mut(slots * width).zip(new.floats().chunks_exact(hypotheses * width)) {
            head[slot * width..][..count * width].copy_from_slice(&rows[..count * width]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypotheses_see_their_own_past() {
        let model = ModelSizes { layers: 1, heads: 2, hidden: 4, ..crate::bundle::manifest::tests::tiny().model };
        let mut pool = KvPool::new(&model, Sizes::of_beam(2, 3));
        let word = |x: f32| Tensor::f32(&[1, 2, 2, 2], (0..8).map(|i| x + i as f32).collect()).unwrap();
        let seen = |pool: &KvPool| -> Vec<Vec<usize>> {
            let mask = pool.inputs()[2].1.floats();
            mask.chunks(6).map(|row| (0..6).filter(|&slot| row[slot] == 0.0).collect()).collect()
        };
        pool.branch([0].into_iter());
        assert_eq!((pool.slots().words(), seen(&pool)), (0, vec![vec![], vec![]]));
        // `[CLS]`, the same for all: one slot.
        pool.store(&word(10.0), &word(50.0), 1);
        pool.branch([0, 0].into_iter());
        assert_eq!((pool.slots().words(), seen(&pool)), (1, vec![vec![0], vec![0]]));
        pool.store(&word(20.0), &word(60.0), 2);
        // Both go on from the second.
        pool.branch([1, 1].into_iter());
        assert_eq!(seen(&pool), [vec![0, 2], vec![0, 2]]);
        pool.store(&word(30.0), &word(70.0), 2);
        // They change places, and then one is left.
        pool.branch([1, 0].into_iter());
        assert_eq!(seen(&pool), [vec![0, 2, 4], vec![0, 2, 3]]);
        pool.store(&word(40.0), &word(80.0), 1);
        pool.branch([0].into_iter());
        assert_eq!((pool.slots().words(), seen(&pool)), (4, vec![vec![0, 2, 4, 5], vec![]]));
        let [(_, keys), (_, values), _] = pool.inputs();
        let first_head = [10.0, 11.0, 20.0, 21.0, 22.0, 23.0, 30.0, 31.0, 32.0, 33.0, 40.0, 41.0];
        assert_eq!(keys.floats()[..12], first_head);
        assert_eq!(values.floats()[12..16], [54.0, 55.0, 64.0, 65.0]);
        // There is no room for two more.
        pool.store(&word(90.0), &word(90.0), 2);
        assert_eq!((pool.slots().words(), &pool.inputs()[0].1.floats()[..12]), (4, &first_head[..]));
    }
}
