//! The Transformer, from tokens and regions to its last hidden states, forward and backward, without candle between its operators:
//! activations stay in the machine's memory, in bf16 where products are computed in it, and a gradient that comes from two sides is added
//! up where it is made. candle clears memory for every gradient and adds to that, which would move more bytes than some of the operators
//! do.
//!
//! Rows and tiles of attention are filled up so that shapes repeat. From the second pass of a shape on, the host asks for a recording:
//! on a CUDA device, one graph forward and one for each layer on the way back.

mod embedding;
mod recorded;
mod runs;
mod stack;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use candle_core::{Device, Result, Tensor};

use super::Precision;
use super::machine::Address;
use super::operator::{Input, on_machine};
use super::recording::{OfMachine, Records};
use crate::ops::{AttentionPlan, ByRows};
pub use embedding::{ByEmbedding, EMBEDDING_WEIGHTS, Embedding};
pub use runs::Counts;
use runs::Engine;

/// In messages.
const NAME: &str = "layers";

/// Weights of a layer, in this order.
pub const WEIGHTS: [&str; 12] = [
    "attention.qkv.weight",
    "attention.qkv.bias",
    "attention.output.weight",
    "attention.output.bias",
    "attention.norm.weight",
    "attention.norm.bias",
    "ffn.up.weight",
    "ffn.up.bias",
    "ffn.down.weight",
    "ffn.down.bias",
    "ffn.norm.weight",
    "ffn.norm.bias",
];

/// Seeds of a layer.
const SEEDS: usize = 3;

/// What all layers of a pass have in common.
pub struct Common {
    /// Which rows see each other.
    pub plan: Arc<AttentionPlan>,
    /// Heads of attention.
    pub heads: usize,
    /// LayerNorm's addition to the variance.
    pub eps: f32,
    /// Share of values dropped.
    pub rate: f32,
    /// What products are computed in, and with it what activations are stored as.
    pub precision: Precision,
    /// The first layer that the backward pass goes through; there is none beyond the last.
    pub first_kept: usize,
    /// Keeps of each layer its input alone, and computes the rest again in the backward pass.
    pub checkpointing: bool,
}

/// What a layer is given beside its input.
pub struct Given {
    /// Those of [`WEIGHTS`], f32. Of one that is not tracked no gradient is told.
    pub weights: [Tensor; WEIGHTS.len()],
    /// Seeds of the dropout in attention and at both sums.
    pub seeds: [u32; SEEDS],
}

/// Gradients by a layer's weights.
pub type Gradients = [Option<Tensor>; WEIGHTS.len()];

/// A forward pass, whose hidden states can be read and which can be taken back.
pub struct Forward {
    /// Of the time that it was done last.
    number: AtomicU64,
    /// All that it takes to be done again.
    embedding: Embedding,
    layers: Vec<Given>,
    common: Common,
}

impl Forward {
    /// Number of hidden states.
    pub fn rows(&self) -> usize {
        self.embedding.rows()
    }

    /// Their width.
    pub fn width(&self) -> usize {
        self.embedding.hidden()
    }

    /// Whether a gradient by the hidden states leads anywhere.
    pub fn leads_back(&self) -> bool {
        self.common.first_kept < self.layers.len()
    }

    fn device(&self) -> &Device {
        self.embedding.weights[0].device()
    }

    /// Whether a gradient by the embedded rows leads anywhere.
    fn input_wanted(&self) -> bool {
        self.common.first_kept == 0 && self.embedding.is_tracked()
    }
}

/// Passes through layers, of which the last forward pass can be taken back without being done again: its activations are there.
#[derive(Default)]
pub struct Runs(OfMachine);

impl Runs {
    /// Embeds rows and runs `layers` over them.
    ///
    /// # Errors
    /// Shapes that do not fit each other or the plan, a device without kernels, and those of candle.
    pub fn forward(&self, embedding: Embedding, layers: Vec<Given>, common: Common) -> Result<Forward> {
        common.plan.check(embedding.rows(), embedding.hidden(), common.heads)?;
        let pass = Forward { number: AtomicU64::new(0), embedding, layers, common };
        on_machine!(pass.device(), NAME, |machine| self.with(&machine, |engine| engine.forward(&pass)))?;
        Ok(pass)
    }

    /// Rows of a pass's hidden states: `[ids, hidden]`, in f32, which is a constant to candle. If another pass came after that one, it is
    /// done again.
    ///
    /// # Errors
    /// A row that there is none of, and those of candle.
    pub fn rows(&self, pass: &Forward, ids: &[u32]) -> Result<Tensor> {
        on_machine!(pass.device(), NAME, |machine| self.with(&machine, |engine| engine.rows(pass, ids)))
    }

    /// Brings as many rows of them as `to` has, f32, there; ids at `ids`, words that name rows that there are.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn rows_to(&self, pass: &Forward, ids: Address, to: &Input) -> Result<()> {
        on_machine!(pass.device(), NAME, |machine| self.with(&machine, |engine| engine.rows_to(pass, ids, to)))
    }

    /// All of them.
    ///
    /// # Errors
    /// Those of candle.
    pub fn all_rows(&self, pass: &Forward) -> Result<Tensor> {
        on_machine!(pass.device(), NAME, |machine| self.with(&machine, |engine| engine.all_rows(pass)))
    }

    /// From gradients by rows of the hidden states to those by what embeds the rows, if anything of that is tracked. `complete` is told
    /// the number of each layer, the last first, with the gradients by its weights. If another pass came after that one, it is done
    /// again.
    ///
    /// # Errors
    /// Those of candle and of `complete`.
    pub fn backward(
        &self,
        pass: &Forward,
        by_rows: &[ByRows],
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        for (ids, gradient) in by_rows {
            if gradient.dims2()? != (ids.len(), pass.embedding.hidden()) || !gradient.is_contiguous() {
                candle_core::bail!("{NAME}: a gradient of {:?} by {} rows", gradient.shape(), ids.len());
            }
        }
        on_machine!(pass.device(), NAME, |machine| self.with(&machine, |engine| engine.backward(pass, by_rows, complete)))
    }

    /// How many passes there were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        #[cfg(feature = "cuda")]
        if let Some(counts) = self.0.look(Engine::<super::nvidia::Nvidia>::counts) {
            return counts;
        }
        #[cfg(test)]
        if let Some(counts) = self.0.look(Engine::<super::emulation::Emulated>::counts) {
            return counts;
        }
        Counts::default()
    }

    fn with<M: Records, R>(&self, machine: &M, work: impl FnOnce(&mut Engine<M>) -> Result<R>) -> Result<R> {
        self.0.with(|| Ok(Engine::new(machine.apart()?)), work)
    }
}
