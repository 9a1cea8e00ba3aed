//! What graphs read and give: names, types and shapes.

use serde::{Deserialize, Serialize};

use super::sizes::{ModelSizes, Size, Sizes, Symbol};
use crate::image::ImagePreparation;

/// Type of a graph's input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// 64-bit signed integers.
    I64,
}

/// One input or output of a graph: as it is run, where sizes are numbers, or as the bundle holds it (`D` is [`Size`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSignature<D = usize> {
    /// Name in the ONNX file.
    pub name: String,
    /// Shape.
    pub shape: Vec<D>,
    /// Element type.
    pub dtype: Dtype,
}

/// A graph's name, inputs and outputs, in order: as it is run, or as the bundle holds it (`D` is [`Size`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSignature<D = usize> {
    /// `vision`, `decode`, `text` or `match`.
    pub name: String,
    /// What it reads.
    pub inputs: Vec<TensorSignature<D>>,
    /// What it gives.
    pub outputs: Vec<TensorSignature<D>>,
}

impl GraphSignature<Size> {
    /// The signature with numbers in place of symbols.
    #[must_use]
    pub fn fixed(&self, sizes: Sizes) -> GraphSignature {
        let size = |size: &Size| match *size {
            Size::Fixed(size) => size,
            Size::Symbol(symbol) => sizes.of(symbol),
        };
        let fixed = |tensors: &[TensorSignature<Size>]| {
            let fixed = tensors.iter().map(|t| TensorSignature {
                name: t.name.clone(),
                shape: t.shape.iter().map(size).collect(),
                dtype: t.dtype,
            });
            fixed.collect()
        };
        GraphSignature { name: self.name.clone(), inputs: fixed(&self.inputs), outputs: fixed(&self.outputs) }
    }

    /// The four graphs that a bundle of these sizes holds: the one definition that the exporter writes and the runtime runs.
    ///
    /// With `P` image tokens, `T` text slots, `d = hidden / heads`:
    /// - `vision` encodes a picture once, giving the keys and values that every later text token attends to;
    /// - `decode` reads the next word of each of H hypotheses, all at the same `position`. What earlier words left lies in one
    ///   pool of S slots, in any order; row h of `mask` says which of them hypothesis h goes back on. The caller stores the new
    ///   words' keys and values in slots of its choice: branching and dropping hypotheses moves nothing but rows of the mask;
    /// - `text` embeds a whole text;
    /// - `match` scores a picture and a text read jointly (a logit).
    ///
    /// Masks are added to attention scores: 0 for what is seen, −10⁴ for what is not.
    #[must_use]
    pub fn contract(model: &ModelSizes, image: &ImagePreparation) -> Vec<Self> {
        let (hypotheses, slots) = (Size::Symbol(Symbol::Hypotheses), Size::Symbol(Symbol::Slots));
        let fixed = |shape: &[usize]| -> Vec<Size> { shape.iter().copied().map(Size::Fixed).collect() };
        let tensor = |dtype, name: &str, shape: Vec<Size>| TensorSignature { name: name.to_owned(), shape, dtype };
        let f32 = |name: &str, shape: &[usize]| tensor(Dtype::F32, name, fixed(shape));
        let i64 = |name: &str, shape: &[usize]| tensor(Dtype::I64, name, fixed(shape));
        let head_width = model.hidden / model.heads.max(1);
        let cache = |name: &str, rows| {
            let (layers, heads) = (Size::Fixed(model.layers), Size::Fixed(model.heads));
            tensor(Dtype::F32, name, vec![layers, heads, rows, Size::Fixed(head_width)])
        };
        let prefix = Size::Fixed(model.image_tokens);
        let text = model.max_text;
        let regions = [1, model.image_tokens.saturating_sub(1), model.region_feature];
        let pixels = [1, 3, image.height as usize, image.width as usize];
        let embedding = || f32("embedding", &[1, model.embedding]);
        let ids = || i64("ids", &[1, text]);
        let mask = || f32("mask", &[1, text]);
        let graph = |name: &str, inputs, outputs| Self { name: name.to_owned(), inputs, outputs };
        vec![
            graph(
                "vision",
                vec![f32("pixels", &pixels)],
                vec![embedding(), cache("prefix_keys", prefix), cache("prefix_values", prefix), f32("regions", &regions)],
            ),
            graph(
                "decode",
                vec![
                    tensor(Dtype::I64, "tokens", vec![hypotheses]),
                    i64("position", &[1]),
                    cache("prefix_keys", prefix),
                    cache("prefix_values", prefix),
                    cache("past_keys", slots),
                    cache("past_values", slots),
                    tensor(Dtype::F32, "mask", vec![hypotheses, slots]),
                ],
                vec![
                    tensor(Dtype::F32, "logits", vec![hypotheses, Size::Fixed(model.vocabulary)]),
                    cache("new_keys", hypotheses),
                    cache("new_values", hypotheses),
                ],
            ),
            graph("text", vec![ids(), mask()], vec![embedding()]),
            graph("match", vec![f32("regions", &regions), ids(), mask()], vec![f32("score", &[1])]),
        ]
    }
}

/// What is different between two signatures of a graph, in words.
pub(super) fn difference(expected: &GraphSignature<Size>, found: &GraphSignature<Size>) -> String {
    let shape = |t: &TensorSignature<Size>| {
        let sizes: Vec<String> = t.shape.iter().map(ToString::to_string).collect();
        format!("{} {:?} [{}]", t.name, t.dtype, sizes.join(", "))
    };
    let both = |kind: &str, expected: &[TensorSignature<Size>], found: &[TensorSignature<Size>]| {
        if expected.len() != found.len() {
            return Some(format!("{} {kind}s instead of {}", found.len(), expected.len()));
        }
        let (e, f) = expected.iter().zip(found).find(|(e, f)| e != f)?;
        Some(format!("{kind} {} instead of {}", shape(f), shape(e)))
    };
    both("input", &expected.inputs, &found.inputs)
        .or_else(|| both("output", &expected.outputs, &found.outputs))
        .unwrap_or_default()
}
