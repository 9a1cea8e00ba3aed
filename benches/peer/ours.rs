//! This project's engines.

use std::path::PathBuf;

use anyhow::Context;
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{GraphSignature, Manifest, Precision, Sizes};
use unimo::engine::{EngineKind, EngineOptions, Graph, GraphSource, Tensor, open};

use super::Peer;
use super::inputs::{Input, Values};

struct Ours {
    graph: Box<dyn Graph>,
    inputs: Vec<(String, Tensor)>,
}

pub fn load(
    engine: EngineKind,
    library: Option<&PathBuf>,
    bundle: &Bundle,
    precision: Precision,
    (signature, sizes): (&GraphSignature, Sizes),
    inputs: &[Input],
) -> anyhow::Result<Box<dyn Peer>> {
    let engine = open(&EngineOptions { engine, library: library.cloned(), ..EngineOptions::default() })?;
    let onnx = bundle.read(&Manifest::graph_file(precision, &signature.name))?;
    let external = |location: &str| bundle.share(&format!("{precision}/{location}")).ok();
    let graph = engine.load(&GraphSource { signature, sizes, onnx, external: &external })?;
    let tensor = |input: &Input| {
        let tensor = match &input.values {
            Values::F32(values) => Tensor::f32(&input.shape, values.clone()),
            Values::I64(values) => Tensor::i64(&input.shape, values.clone()),
        };
        Ok((input.name.clone(), tensor.with_context(|| format!("the values of {} do not fill it", input.name))?))
    };
    Ok(Box::new(Ours { graph, inputs: inputs.iter().map(tensor).collect::<anyhow::Result<_>>()? }))
}

impl Peer for Ours {
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>> {
        let inputs: Vec<(&str, &Tensor)> = self.inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        Ok(self.graph.run(&inputs)?.into_iter().map(Tensor::into_floats).collect())
    }
}
