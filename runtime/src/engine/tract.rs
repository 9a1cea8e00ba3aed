//! The pure-Rust engine, [tract](https://github.com/sonos/tract).

mod operator;

use std::sync::{Arc, Mutex, PoisonError};

use tract_linalg::multithread::{Executor, multithread_tract_scope};
use tract_onnx::pb::ValueInfoProto;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceModelExt, IntoRunnable, TValue, TVec, Tensor as TractTensor, TractResult, TypedRunnableModel,
};

use super::network::Backbone;
use super::tensor::Native;
use super::{Engine, EngineError, Graph, GraphSource, Tensor};
use super::{check_names, checked_output, onnx, ordered_inputs, shape_error};
use crate::bundle::manifest::{Dtype, GraphSignature};
use crate::kernels::Scratch;

/// tract on the processor.
pub(super) struct Tract {
    /// None for one thread: the caller's.
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Tract {
    /// An engine whose matrix products use so many threads (0 counts as 1).
    pub(super) fn new(threads: usize) -> Result<Self, EngineError> {
        Ok(Self { pool: super::pool(threads)? })
    }
}

impl Engine for Tract {
    fn load(&self, source: &GraphSource<'_>) -> Result<Box<dyn Graph>, EngineError> {
        let (proto, backbone) = onnx::parse(source)?;
        let signature = source.signature.clone();
        let graph = proto.graph.as_ref().map(|graph| (graph.input.as_slice(), graph.output.as_slice()));
        let (inputs, outputs) = graph.unwrap_or_default();
        // What the backbone gives is an input of the graph's that the caller does not know of.
        let known = inputs.len() - usize::from(backbone.is_some());
        check_names(&signature, &names(&inputs[..known]), &names(outputs))?;
        let plan =
            prepare(&proto).map_err(|error| EngineError::Load { graph: signature.name.clone(), reason: format!("{error:#}") })?;
        let graph = TractGraph { plan, signature, pool: self.pool.clone(), backbone, scratch: Mutex::default() };
        graph.check_facts()?;
        Ok(Box::new(graph))
    }
}

fn names(values: &[ValueInfoProto]) -> Vec<&str> {
    values.iter().map(|value| value.name.as_str()).collect()
}

fn prepare(proto: &tract_onnx::pb::ModelProto) -> TractResult<Arc<TypedRunnableModel>> {
    let mut onnx = tract_onnx::onnx();
    operator::register(&mut onnx);
    onnx.model_for_proto_model(proto)?.into_optimized()?.into_runnable()
}

struct TractGraph {
    plan: Arc<TypedRunnableModel>,
    signature: GraphSignature,
    pool: Option<Arc<rayon::ThreadPool>>,
    /// What is computed before the plan, and given to it as its last input.
    backbone: Option<Backbone>,
    /// Memory of runs of the backbone that have ended.
    scratch: Mutex<Vec<Scratch>>,
}

impl TractGraph {
    /// What the backbone makes of its input.
    fn features(&self, backbone: &Backbone, inputs: &[&Tensor]) -> TractResult<TractTensor> {
        let held = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = held().pop().unwrap_or_default();
        let features = backbone.network.run(inputs[backbone.input].floats(), &mut scratch);
        held().push(scratch);
        let [channels, height, width] = backbone.network.output();
        TractTensor::from_shape(&[1, channels, height, width], &features)
    }

    /// Compares what tract inferred with what the signature promises.
    fn check_facts(&self) -> Result<(), EngineError> {
        let model = self.plan.model();
        let facts = |kind: &'static str, count: usize| (0..count).map(move |index| (kind, index));
        for (kind, index) in facts("input", self.signature.inputs.len()).chain(facts("output", self.signature.outputs.len())) {
            let (fact, expected) = if kind == "input" {
                (model.input_fact(index), &self.signature.inputs[index])
            } else {
                (model.output_fact(index), &self.signature.outputs[index])
            };
            let fact = fact.map_err(|error| self.failed(&error))?;
            let shape = fact.shape.as_concrete();
            if datum_type(expected.dtype) != fact.datum_type || shape != Some(expected.shape.as_slice()) {
                let found = format!("{:?} {:?}", fact.datum_type, fact.shape);
                return Err(shape_error(&self.signature, kind, expected, found));
            }
        }
        Ok(())
    }

    fn failed(&self, error: &tract_onnx::prelude::TractError) -> EngineError {
        EngineError::Run { graph: self.signature.name.clone(), reason: format!("{error:#}") }
    }

    fn output(&self, index: usize, value: &TractTensor) -> Result<Tensor, EngineError> {
        let expected = &self.signature.outputs[index];
        let tensor = match expected.dtype {
            Dtype::F32 => floats(value).map(|data| Tensor::f32(value.shape(), data)),
            Dtype::I64 => integers(value).map(|data| Tensor::i64(value.shape(), data)),
        };
        let tensor = tensor.map_err(|error| self.failed(&error))?;
        checked_output(&self.signature, index, value.shape(), tensor)
    }

    fn run_here(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError> {
        let mut values: TVec<TValue> = TVec::new();
        let inputs = ordered_inputs(&self.signature, inputs)?;
        for tensor in &inputs {
            let native = tensor.native(to_tract).map_err(|error| self.failed(&error))?;
            values.push(TValue::from_const(native));
        }
        if let Some(backbone) = &self.backbone {
            values.push(self.features(backbone, &inputs).map_err(|error| self.failed(&error))?.into());
        }
        let executor = self.pool.clone().map_or(Executor::SingleThread, Executor::MultiThread);
        let outputs = multithread_tract_scope(executor, || self.plan.run(values));
        let outputs = outputs.map_err(|error| self.failed(&error))?;
        outputs.iter().enumerate().map(|(index, value)| self.output(index, value)).collect()
    }
}

impl Graph for TractGraph {
    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError> {
        // Our kernels share their work among the threads of the pool that they are called in.
        match &self.pool {
            Some(pool) => pool.install(|| self.run_here(inputs)),
            None => self.run_here(inputs),
        }
    }
}

fn datum_type(dtype: Dtype) -> DatumType {
    match dtype {
        Dtype::F32 => DatumType::F32,
        Dtype::I64 => DatumType::I64,
    }
}

impl Native for TractTensor {
    fn write(&mut self, write: &dyn Fn(&mut [f32])) -> bool {
        let mut view = self.as_plain_ram_mut();
        let floats = view.as_mut().and_then(|view| view.as_slice_mut().ok());
        floats.map(write).is_some()
    }
}

fn to_tract(tensor: &Tensor) -> TractResult<TractTensor> {
    match tensor.dtype() {
        Dtype::F32 => TractTensor::from_shape(tensor.shape(), tensor.floats()),
        Dtype::I64 => TractTensor::from_shape(tensor.shape(), tensor.integers()),
    }
}

fn floats(value: &TractTensor) -> TractResult<Vec<f32>> {
    Ok(value.try_as_plain_ram()?.as_slice::<f32>()?.to_vec())
}

fn integers(value: &TractTensor) -> TractResult<Vec<i64>> {
    Ok(value.try_as_plain_ram()?.as_slice::<i64>()?.to_vec())
}

#[cfg(test)]
mod tests;
