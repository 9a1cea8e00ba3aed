//! Keys and values that stay in a provider's memory. The graph is lengthened by nodes that write what it gives into what it reads,
//! and ONNX Runtime's I/O binding gives it one buffer for both.

use std::sync::{Arc, Mutex, PoisonError};

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::Tensor as OrtTensor;
use prost::Message;

use super::{OnDevice, Program, floats, output};
use crate::bundle::manifest::{Dtype, GraphSignature, TensorSignature};
use crate::engine::{CachedGraph, EngineError, Tensor, ordered_inputs};

/// The input that tells where each new row goes, as `ScatterND` takes it.
const ROWS: &str = "new_rows";

/// How a graph is lengthened so that it writes its outputs `new_x` into its inputs `past_x`.
#[derive(Debug, Clone)]
pub(super) struct Caching {
    /// Signature of the longer graph: one more input, [`ROWS`], and an output `kept_x` for each `past_x`.
    pub extended: GraphSignature,
    /// What is given at each run, and what comes back.
    exchanged: GraphSignature,
    /// The `x`.
    kept: Vec<String>,
    /// Shape of every `past_x`; that of `new_x` differs in the axis before the last.
    past: Vec<usize>,
    new: Vec<usize>,
}

impl Caching {
    /// `None` for a graph without a past.
    pub fn of(signature: &GraphSignature) -> Option<Self> {
        let named = |kind: &str, tensor: &TensorSignature| tensor.name.strip_prefix(kind).map(str::to_owned);
        let pasts: Vec<&TensorSignature> = signature.inputs.iter().filter(|input| named("past_", input).is_some()).collect();
        let news: Vec<&TensorSignature> = signature.outputs.iter().filter(|output| named("new_", output).is_some()).collect();
        let (past, new) = (pasts.first()?.shape.clone(), news.first()?.shape.clone());
        let kept: Vec<String> = pasts.iter().filter_map(|tensor| named("past_", tensor)).collect();
        let alike = kept.iter().eq(news.iter().filter_map(|tensor| named("new_", tensor)).collect::<Vec<_>>().iter())
            && pasts.iter().all(|tensor| tensor.shape == past && tensor.dtype == Dtype::F32)
            && news.iter().all(|tensor| tensor.shape == new && tensor.dtype == Dtype::F32);
        let axis = past.len().checked_sub(2)?;
        let fits = past.len() == new.len() && (0..past.len()).all(|i| past[i] == new[i] || i == axis && past[i] >= new[i]);
        if !alike || !fits {
            return None;
        }
        let rows = [&new[..=axis], &[axis + 1]].concat();
        let outputs = kept.iter().map(|x| TensorSignature { name: kept_name(x), shape: past.clone(), dtype: Dtype::F32 });
        let mut extended = signature.clone();
        extended.inputs.push(TensorSignature { name: ROWS.to_owned(), shape: rows, dtype: Dtype::I64 });
        extended.outputs.extend(outputs);
        let mut exchanged = signature.clone();
        exchanged.inputs.retain(|input| named("past_", input).is_none());
        exchanged.outputs.retain(|output| named("new_", output).is_none());
        Some(Self { extended, exchanged, kept, past, new })
    }

    /// The longer graph. Messages of protocol buffers that follow each other are one: fields that may be repeated add up.
    pub fn extend(&self, onnx: &[u8]) -> Vec<u8> {
        let node = |x: &String| pb::Node {
            input: vec![past_name(x), ROWS.to_owned(), format!("new_{x}")],
            output: vec![kept_name(x)],
            name: kept_name(x),
            op_type: "ScatterND".to_owned(),
        };
        let value = |tensor: &TensorSignature| {
            let dim = tensor.shape.iter().map(|&size| pb::Dimension { dim_value: size as i64 }).collect();
            let elem_type = if tensor.dtype == Dtype::F32 { pb::FLOAT } else { pb::INT64 };
            let tensor_type = Some(pb::TensorType { elem_type, shape: Some(pb::Shape { dim }) });
            pb::ValueInfo { name: tensor.name.clone(), r#type: Some(pb::Type { tensor_type }) }
        };
        let added = |tensors: &[TensorSignature], count: usize| tensors[tensors.len() - count..].iter().map(value).collect();
        let graph = pb::Graph {
            node: self.kept.iter().map(node).collect(),
            input: added(&self.extended.inputs, 1),
            output: added(&self.extended.outputs, self.kept.len()),
        };
        [onnx, &pb::Model { graph: Some(graph) }.encode_to_vec()].concat()
    }

    /// [`ROWS`] of a run whose first row goes to `slot`: the place of each row, row-major.
    fn rows(&self, slot: usize) -> Result<Vec<i64>, EngineError> {
        let (axis, sizes) = (self.new.len() - 2, &self.new[..self.new.len() - 1]);
        if slot + sizes[axis] > self.past[axis] {
            return Err(EngineError::Shape {
                graph: self.exchanged.name.clone(),
                tensor: "slot".to_owned(),
                found: slot.to_string(),
                expected: format!("at most {}", self.past[axis] - sizes[axis]),
            });
        }
        // What one step along an axis is in a row's number.
        let step = |i: usize| sizes[i + 1..].iter().product::<usize>();
        let place = |row: usize, i: usize| row / step(i) % sizes[i] + if i == axis { slot } else { 0 };
        let rows = 0..sizes.iter().product();
        Ok(rows.flat_map(|row| (0..=axis).map(move |i| (row, i))).map(|(row, i)| place(row, i) as i64).collect())
    }
}

fn past_name(x: &str) -> String {
    format!("past_{x}")
}

fn kept_name(x: &str) -> String {
    format!("kept_{x}")
}

/// The part of ONNX's messages that a graph is lengthened with, numbered as in [`onnx.proto`].
///
/// [`onnx.proto`]: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
mod pb {
    pub const FLOAT: i32 = 1;
    pub const INT64: i32 = 7;

    #[derive(prost::Message)]
    pub struct Model {
        #[prost(message, optional, tag = "7")]
        pub graph: Option<Graph>,
    }

    #[derive(prost::Message)]
    pub struct Graph {
        #[prost(message, repeated, tag = "1")]
        pub node: Vec<Node>,
        #[prost(message, repeated, tag = "11")]
        pub input: Vec<ValueInfo>,
        #[prost(message, repeated, tag = "12")]
        pub output: Vec<ValueInfo>,
    }

    #[derive(prost::Message)]
    pub struct Node {
        #[prost(string, repeated, tag = "1")]
        pub input: Vec<String>,
        #[prost(string, repeated, tag = "2")]
        pub output: Vec<String>,
        #[prost(string, tag = "3")]
        pub name: String,
        #[prost(string, tag = "4")]
        pub op_type: String,
    }

    #[derive(prost::Message)]
    pub struct ValueInfo {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, optional, tag = "2")]
        pub r#type: Option<Type>,
    }

    #[derive(prost::Message)]
    pub struct Type {
        #[prost(message, optional, tag = "1")]
        pub tensor_type: Option<TensorType>,
    }

    #[derive(prost::Message)]
    pub struct TensorType {
        #[prost(int32, tag = "1")]
        pub elem_type: i32,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
    }

    #[derive(prost::Message)]
    pub struct Shape {
        #[prost(message, repeated, tag = "1")]
        pub dim: Vec<Dimension>,
    }

    #[derive(prost::Message)]
    pub struct Dimension {
        #[prost(int64, tag = "1")]
        pub dim_value: i64,
    }
}

/// A graph with its past on a device.
pub(super) struct Cached {
    pub program: Program,
    pub caching: Caching,
    pub device: AllocationDevice<'static>,
    /// Whether the past is written into the very buffer that is read; otherwise into a second one, and they change places.
    pub in_place: bool,
    /// Those that no run needs now.
    pub idle: Mutex<Vec<Bound>>,
}

/// A session with its buffers.
pub(super) struct Bound {
    session: Session,
    binding: IoBinding,
    /// Every `past_x`: one buffer, or two that change places.
    buffers: Vec<Vec<OrtTensor<f32>>>,
}

impl Cached {
    /// A session that was given back, or a new one.
    pub fn take(&self) -> Result<Bound, EngineError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(|| self.bind(self.program.session()?).map_err(|error| self.program.failed(&error)), Ok)
    }

    pub fn give_back(&self, bound: Bound) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(bound);
    }

    fn bind(&self, session: Session) -> ort::Result<Bound> {
        let mut binding = session.create_binding()?;
        let here = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput)?;
        for output in &self.caching.exchanged.outputs {
            binding.bind_output_to_device(&output.name, &here)?;
        }
        // Whatever lay there might be no number, which no mask hides.
        let zeros = floats(&Tensor::zeros(&self.caching.past))?;
        let buffer = || zeros.to(self.device.clone(), 0);
        let buffers = |_: &String| (0..if self.in_place { 1 } else { 2 }).map(|_| buffer()).collect();
        let buffers = self.caching.kept.iter().map(buffers).collect::<ort::Result<_>>()?;
        let mut bound = Bound { session, binding, buffers };
        bound.bind_past(&self.caching)?;
        Ok(bound)
    }

    fn run(&self, bound: &mut Bound, inputs: &[(&str, &Tensor)], slot: usize) -> Result<Vec<Tensor>, EngineError> {
        let (exchanged, failed) = (&self.caching.exchanged, |error: ort::Error| self.program.failed(&error));
        let tensors = ordered_inputs(exchanged, inputs)?;
        let rows = &self.caching.extended.inputs[self.caching.extended.inputs.len() - 1].shape;
        let rows = (rows.as_slice(), self.caching.rows(slot)?);
        let binding = &mut bound.binding;
        let bind = || -> ort::Result<()> {
            for (tensor, input) in tensors.into_iter().zip(&exchanged.inputs) {
                match OnDevice::of(&self.device, &input.name, tensor)? {
                    Some(copy) => binding.bind_input(&input.name, &copy.0)?,
                    None if input.dtype == Dtype::F32 => binding.bind_input(&input.name, &floats(tensor)?)?,
                    None => {
                        let integers = OrtTensor::from_array((tensor.shape(), tensor.integers().to_vec()))?;
                        binding.bind_input(&input.name, &integers)?;
                    }
                }
            }
            binding.bind_input(ROWS, &OrtTensor::from_array(rows)?)?;
            binding.synchronize_inputs()
        };
        bind().map_err(failed)?;
        let outputs = {
            let outputs = bound.session.run_binding(&bound.binding).map_err(failed)?;
            let expected = exchanged.outputs.iter().enumerate();
            expected.map(|(index, expected)| output(&outputs, exchanged, index, expected)).collect()
        };
        if !self.in_place {
            bound.buffers.iter_mut().for_each(|pair| pair.swap(0, 1));
            bound.bind_past(&self.caching).map_err(failed)?;
        }
        outputs
    }
}

impl Bound {
    /// Has the session read the first buffer of each pair, and write into the other; one alone is both.
    fn bind_past(&mut self, caching: &Caching) -> ort::Result<()> {
        for (x, buffers) in caching.kept.iter().zip(&mut self.buffers) {
            self.binding.bind_input(past_name(x), &buffers[0])?;
            if let Some(last) = buffers.last_mut() {
                self.binding.bind_output(kept_name(x), last)?;
            }
        }
        Ok(())
    }
}

/// A graph with its past on a device, for one who runs it again and again.
pub(super) struct Running {
    cached: Arc<Cached>,
    /// Taken when this is dropped.
    bound: Option<Bound>,
    failed: bool,
}

impl Running {
    pub fn new(cached: Arc<Cached>) -> Result<Self, EngineError> {
        let bound = Some(cached.take()?);
        Ok(Self { cached, bound, failed: false })
    }
}

impl CachedGraph for Running {
    fn run(&mut self, inputs: &[(&str, &Tensor)], slot: usize) -> Result<Vec<Tensor>, EngineError> {
        let outputs = self.bound.as_mut().map_or_else(|| Ok(Vec::new()), |bound| self.cached.run(bound, inputs, slot));
        self.failed |= outputs.is_err();
        outputs
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // What a failed run left may be no numbers, which no mask hides from the next one.
        self.bound.take().into_iter().filter(|_| !self.failed).for_each(|bound| self.cached.give_back(bound));
    }
}
