//! The `decode` graph as a language model.

use std::sync::Arc;

use super::{GraphName, Model, ModelError, Vision, outputs, tensor};
use crate::bundle::manifest::Sizes;
use crate::captioning::{Branch, KvPool, LanguageModel, Slots};
use crate::engine::{CachedGraph, EngineError, Graph, Tensor};
use crate::tokenizer::PAD;

/// The `decode` graph as a language model over one picture, whose keys and values all hypotheses share.
pub(super) struct Writer<'a> {
    model: &'a Model,
    vision: &'a Vision,
    past: Past,
    hypotheses: usize,
    steps: usize,
}

/// Where keys and values of the words before lie.
enum Past {
    /// In the host's memory.
    Here { graph: Arc<dyn Graph>, pool: KvPool },
    /// With the engine.
    There { graph: Box<dyn CachedGraph>, slots: Slots },
}

impl<'a> Writer<'a> {
    pub(super) fn new(model: &'a Model, vision: &'a Vision, graph: Arc<dyn Graph>, sizes: Sizes) -> Result<Self, EngineError> {
        let past = match graph.cached()? {
            Some(graph) => Past::There { graph, slots: Slots::new(sizes) },
            None => Past::Here { graph, pool: KvPool::new(&model.manifest().model, sizes) },
        };
        Ok(Self { model, vision, past, hypotheses: sizes.hypotheses, steps: 0 })
    }

    /// How often the graph was run.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }
}

impl Past {
    fn branch(&mut self, parents: impl ExactSizeIterator<Item = usize>) {
        match self {
            Self::Here { pool, .. } => pool.branch(parents),
            Self::There { slots, .. } => slots.branch(parents),
        }
    }

    fn words(&self) -> usize {
        match self {
            Self::Here { pool, .. } => pool.slots().words(),
            Self::There { slots, .. } => slots.words(),
        }
    }

    /// Runs the graph, and keeps of the words that it reads the first `count`; the logits `[hypotheses, vocabulary]`.
    fn run(&mut self, words: &[(&str, &Tensor)], count: usize) -> Result<Tensor, EngineError> {
        match self {
            Self::Here { graph, pool } => {
                let inputs = [words, &pool.inputs()].concat();
                let [logits, new_keys, new_values] = outputs(GraphName::Decode, graph.run(&inputs)?)?;
                pool.store(&new_keys, &new_values, count);
                Ok(logits)
            }
            Self::There { graph, slots } => {
                let inputs = [words, &[("mask", slots.mask())]].concat();
                let [logits] = outputs(GraphName::Decode, graph.run(&inputs, slots.next())?)?;
                slots.take(count);
                Ok(logits)
            }
        }
    }
}

impl LanguageModel for Writer<'_> {
    type Error = ModelError;

    fn read(&mut self, branches: &[Branch]) -> Result<Vec<f32>, ModelError> {
        self.steps += 1;
        self.past.branch(branches.iter().map(|branch| branch.parent));
        // The graph reads as many hypotheses as the beam is wide, also where fewer are open; what it makes of the rest is left.
        let ids = branches.iter().map(|branch| i64::from(branch.id)).chain(std::iter::repeat(i64::from(PAD)));
        let tokens = Tensor::i64(&[self.hypotheses], ids.take(self.hypotheses).collect());
        let tokens = tensor(GraphName::Decode, "tokens", tokens)?;
        let position = tensor(GraphName::Decode, "position", Tensor::i64(&[1], vec![self.past.words() as i64]))?;
        let words = [
            ("tokens", &tokens),
            ("position", &position),
            ("prefix_keys", &self.vision.prefix_keys),
            ("prefix_values", &self.vision.prefix_values),
        ];
        let mut logits = self.past.run(&words, branches.len())?.into_floats();
        logits.truncate(branches.len() * self.model.manifest().model.vocabulary);
        Ok(logits)
    }

    fn is_forbidden(&self, id: u32) -> bool {
        self.model.tokenizer.is_special(id)
    }
}
