//! Keys and values of the words of one hypothesis.

use crate::bundle::manifest::ModelSizes;
use crate::engine::Tensor;

/// Added to the attention score of an empty slot.
const EMPTY: f32 = -1e4;

/// The words' keys and values `[layers, heads, slots, head_width]`, in fixed slots, and the mask `[1, slots]` that hides the
/// empty ones. The picture's keys and values are not in here: all hypotheses share them.
#[derive(Debug, Clone)]
pub struct KvCache {
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    filled: usize,
}

impl KvCache {
    /// An empty cache for a model's text slots.
    #[must_use]
    pub fn new(model: &ModelSizes) -> Self {
        let shape = [model.layers, model.heads, model.max_text, model.hidden / model.heads.max(1)];
        let mut mask = Tensor::zeros(&[1, model.max_text]);
        mask.floats_mut().fill(EMPTY);
        Self { keys: Tensor::zeros(&shape), values: Tensor::zeros(&shape), mask, filled: 0 }
    }

    /// Number of words in it, which is the position of the next one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether no word is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Number of words it has room for.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.mask.shape()[1]
    }

    /// The inputs `past_keys`, `past_values` and `mask` of the `decode` graph.
    #[must_use]
    pub fn inputs(&self) -> [(&'static str, &Tensor); 3] {
        [("past_keys", &self.keys), ("past_values", &self.values), ("mask", &self.mask)]
    }

    /// Stores a word's `new_keys` and `new_values` `[layers, heads, 1, head_width]` in the next slot; a full cache is left as it is.
    pub fn push(&mut self, new_keys: &Tensor, new_values: &Tensor) {
        if self.filled == self.slots() {
            return;
        }
        store(&mut self.keys, new_keys, self.filled);
        store(&mut self.values, new_values, self.filled);
        self.mask.floats_mut()[self.filled] = 0.0;
        self.filled += 1;
    }
}

fn store(past: &mut Tensor, new: &Tensor, slot: usize) {
    let (slots, width) = (past.shape()[2], past.shape()[3]);
    let rows = past.floats_mut().chunks_exact_mut(slots * width);
    for (head, row) in rows.zip(new.floats().chunks_exact(width)) {
        head[slot * width..(slot + 1) * width].copy_from_slice(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_into_their_slots() {
        let model = ModelSizes { layers: 1, heads: 2, hidden: 4, max_text: 3, ..crate::bundle::manifest::tests::tiny().model };
        let mut cache = KvCache::new(&model);
        assert_eq!((cache.len(), cache.slots()), (0, 3));
        let word = |x: f32| Tensor::f32(&[1, 2, 1, 2], vec![x, x + 1.0, x + 2.0, x + 3.0]).unwrap();
        for (k, v) in [(10.0, 50.0), (20.0, 60.0)] {
            cache.push(&word(k), &word(v));
        }
        let [(_, keys), (_, values), (_, mask)] = cache.inputs();
        assert_eq!(keys.floats(), [10.0, 11.0, 20.0, 21.0, 0.0, 0.0, 12.0, 13.0, 22.0, 23.0, 0.0, 0.0]);
        assert_eq!(values.floats()[2..4], [60.0, 61.0]);
        assert_eq!(mask.floats(), [0.0, 0.0, EMPTY]);
        cache.push(&word(30.0), &word(0.0));
        cache.push(&word(40.0), &word(0.0));
        assert_eq!(cache.len(), 3);
        assert_eq!(cache.inputs()[0].1.floats()[4..6], [30.0, 31.0]);
    }
}
