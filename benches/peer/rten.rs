//! rten on the bundle's own ONNX files.

use std::sync::Arc;

use anyhow::anyhow;
use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value, ValueView};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{GraphSignature, Manifest, Precision};

use super::Peer;
use super::inputs::{Input, Values};
use super::unpacked::{WEIGHTS, unpacked};

struct Rten {
    model: Model,
    inputs: Vec<(NodeId, Value)>,
    outputs: Vec<NodeId>,
    options: RunOptions,
}

pub fn load(
    bundle: &Bundle,
    precision: Precision,
    signature: &GraphSignature,
    inputs: &[Input],
) -> anyhow::Result<Box<dyn Peer>> {
    let onnx = bundle.read(&Manifest::graph_file(precision, &signature.name))?;
    let mut options = ModelOptions::with_all_ops();
    options.prepack_weights(true);
    let [stored, taken] = WEIGHTS;
    if let Ok(weights) = bundle.read(&format!("{precision}/{stored}")) {
        options.external_data(taken, weights.to_vec());
    }
    let model = options.load(unpacked(onnx)?)?;
    let value = |input: &Input| -> anyhow::Result<(NodeId, Value)> {
        let value = match &input.values {
            Values::F32(values) => Value::from_shape(&input.shape, values.clone()).map_err(|error| anyhow!("{error}"))?,
            // It has no 64-bit integers.
            Values::I64(values) => Value::from_shape(&input.shape, values.iter().map(|&v| v as i32).collect::<Vec<_>>())
                .map_err(|error| anyhow!("{error}"))?,
        };
        Ok((model.node_id(&input.name)?, value))
    };
    let inputs = inputs.iter().map(value).collect::<anyhow::Result<_>>()?;
    let outputs = signature.outputs.iter().map(|output| Ok(model.node_id(&output.name)?)).collect::<anyhow::Result<_>>()?;
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    Ok(Box::new(Rten { model, inputs, outputs, options: RunOptions::default().with_thread_pool(Some(pool)) }))
}

impl Peer for Rten {
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>> {
        let inputs = self.inputs.iter().map(|(id, value)| (*id, ValueView::from(value).into())).collect();
        let outputs = self.model.run(inputs, &self.outputs, Some(self.options.clone()))?;
        let floats = |value: Value| Ok(value.into_tensor::<f32>().ok_or_else(|| anyhow!("an output is not f32"))?.into_data());
        outputs.into_iter().map(floats).collect()
    }
}
