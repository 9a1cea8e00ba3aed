//! Inputs for a graph, made from its signature alone.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use unimo::bundle::manifest::{Dtype, GraphSignature, Manifest, TensorSignature};

/// Values of an input.
#[derive(Debug, Clone)]
pub enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// An input of a graph.
#[derive(Debug, Clone)]
pub struct Input {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Values,
}

/// Random inputs of a graph: floats in −1..1, but masks of zeros (everything is attended to), positions at the last text slot,
/// other integers as ids of words.
pub fn make(signature: &GraphSignature, manifest: &Manifest) -> Vec<Input> {
    let mut rng = StdRng::seed_from_u64(1);
    let words = 8..(manifest.model.vocabulary as i64 - 1).max(9);
    let input = |tensor: &TensorSignature| {
        let count = tensor.shape.iter().product();
        let values = match tensor.dtype {
            Dtype::F32 if tensor.name.contains("mask") => Values::F32(vec![0.0; count]),
            Dtype::F32 => Values::F32((0..count).map(|_| rng.random_range(-1.0..1.0)).collect()),
            Dtype::I64 if tensor.name.contains("position") => Values::I64(vec![manifest.model.max_text as i64 - 1; count]),
            Dtype::I64 => Values::I64((0..count).map(|_| rng.random_range(words.clone())).collect()),
        };
        Input { name: tensor.name.clone(), shape: tensor.shape.clone(), values }
    };
    signature.inputs.iter().map(input).collect()
}
