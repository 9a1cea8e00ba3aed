//! Captioning: one word after the other, each seeing the picture and the words before it, several hypotheses at once.

mod beam;
mod cache;
mod likelihood;

pub use self::beam::{Branch, Hypothesis, LanguageModel, beam_search};
pub use self::cache::{KvPool, Slots};
pub use self::likelihood::log_likelihood;

use crate::bundle::manifest::DecodingDefaults;

/// How captions are decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeOptions {
    /// Hypotheses kept at every step; 1 is greedy.
    pub beam: usize,
    /// Most ids of a caption, `[CLS]` and `[SEP]` not counted.
    pub max_words: usize,
    /// A hypothesis of n ids is ranked by its log-probability divided by n to this power: 0 prefers short captions, 1 compares
    /// the mean over ids, more prefers long ones.
    pub length_penalty: f32,
    /// No run of so many ids occurs twice in a caption; 0 allows repetition.
    pub no_repeat: usize,
}

impl From<&DecodingDefaults> for DecodeOptions {
    fn from(defaults: &DecodingDefaults) -> Self {
        Self {
            beam: defaults.beam,
            max_words: defaults.max_words,
            length_penalty: defaults.length_penalty,
            no_repeat: defaults.no_repeat,
        }
    }
}

/// A caption and how sure the model is of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Caption {
    /// The text.
    pub text: String,
    /// Its ids, `[CLS]` and `[SEP]` not counted.
    pub tokens: Vec<u32>,
    /// Natural logarithm of its probability given the picture, divided by the number of ids (with `[SEP]`) to the length penalty.
    pub score: f32,
    /// How often the `decode` graph was run for it: at least once for each id and `[SEP]`.
    pub steps: usize,
}
