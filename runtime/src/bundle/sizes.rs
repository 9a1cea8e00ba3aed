//! Sizes of a model, and those of its graphs' shapes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Sizes of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSizes {
    /// Name of the size, e.g. `edge-s`.
    pub name: String,
    /// Width of the Transformer.
    pub hidden: usize,
    /// Number of its layers.
    pub layers: usize,
    /// Attention heads a layer.
    pub heads: usize,
    /// Ids of the tokenizer.
    pub vocabulary: usize,
    /// Learned text positions.
    pub positions: usize,
    /// Width of the space that pictures and texts share.
    pub embedding: usize,
    /// `[IMG]` and the regions.
    pub image_tokens: usize,
    /// Text slots of the graphs, `[CLS]` and `[SEP]` included.
    pub max_text: usize,
    /// Width of a region's feature.
    pub region_feature: usize,
}

/// A size that is fixed when a graph is loaded; the ONNX file knows it by this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Symbol {
    /// Texts that `decode` continues at once: the beam.
    Hypotheses,
    /// Words that `decode` can look back on, of all hypotheses together.
    Slots,
}

impl Symbol {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Hypotheses, Self::Slots];

    /// The name in the manifest and the ONNX file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hypotheses => "hypotheses",
            Self::Slots => "slots",
        }
    }
}

/// One size of a shape in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// The same always.
    Fixed(usize),
    /// Fixed when the graph is loaded.
    Symbol(Symbol),
}

impl From<usize> for Size {
    fn from(size: usize) -> Self {
        Self::Fixed(size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Symbol(symbol) => f.write_str(symbol.name()),
        }
    }
}

/// What a graph's symbols stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// [`Symbol::Hypotheses`].
    pub hypotheses: usize,
    /// [`Symbol::Slots`].
    pub slots: usize,
}

impl Sizes {
    /// Room for so many hypotheses of up to `words` words each, `[CLS]` counted.
    #[must_use]
    pub fn of_beam(hypotheses: usize, words: usize) -> Self {
        Self { hypotheses, slots: hypotheses * words }
    }

    /// What a symbol stands for.
    #[must_use]
    pub fn of(&self, symbol: Symbol) -> usize {
        match symbol {
            Symbol::Hypotheses => self.hypotheses,
            Symbol::Slots => self.slots,
        }
    }
}
