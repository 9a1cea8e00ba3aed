//! Inputs for a graph, made from its signature alone.

use std::collections::HashMap;

use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use unimo::bundle::manifest::{Dtype, GraphSignature, Manifest};

/// Sizes of dimensions that have a name in the manifest.
#[derive(Debug, Default)]
pub struct Dimensions(HashMap<String, usize>);

impl Dimensions {
    /// Reads `name=size` each.
    pub fn parse(given: &[String]) -> anyhow::Result<Self> {
        let parse = |text: &String| {
            let (name, size) = text.split_once('=').with_context(|| format!("{text:?} is no NAME=N"))?;
            Ok((name.to_owned(), size.parse().with_context(|| format!("{size:?} is no number"))?))
        };
        given.iter().map(parse).collect::<anyhow::Result<_>>().map(Self)
    }

    /// A shape as the manifest has it: numbers, and names of dimensions where it leaves them open.
    fn fix(&self, shape: &serde_json::Value) -> anyhow::Result<Vec<usize>> {
        let size = |dimension: &serde_json::Value| match (dimension.as_u64(), dimension.as_str()) {
            (Some(size), _) => Ok(size as usize),
            (_, Some(name)) => self.0.get(name).copied().with_context(|| format!("give a size with --dimension {name}=N")),
            _ => bail!("{dimension} is no dimension"),
        };
        shape.as_array().with_context(|| format!("{shape} is no shape"))?.iter().map(size).collect()
    }
}

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
pub fn make(signature: &GraphSignature, manifest: &Manifest, dimensions: &Dimensions) -> anyhow::Result<Vec<Input>> {
    let mut rng = StdRng::seed_from_u64(1);
    let words = 8..(manifest.model.vocabulary as i64 - 1).max(9);
    let input = |tensor: &unimo::bundle::manifest::TensorSignature| {
        let shape = dimensions.fix(&serde_json::to_value(&tensor.shape)?).with_context(|| format!("input {}", tensor.name))?;
        let count = shape.iter().product();
        let values = match tensor.dtype {
            Dtype::F32 if tensor.name.contains("mask") => Values::F32(vec![0.0; count]),
            Dtype::F32 => Values::F32((0..count).map(|_| rng.random_range(-1.0..1.0)).collect()),
            Dtype::I64 if tensor.name.contains("position") => Values::I64(vec![manifest.model.max_text as i64 - 1; count]),
            Dtype::I64 => Values::I64((0..count).map(|_| rng.random_range(words.clone())).collect()),
        };
        Ok(Input { name: tensor.name.clone(), shape, values })
    };
    signature.inputs.iter().map(input).collect()
}
