//! [Operators of ours](crate::engine::operators) as custom operators of ONNX Runtime's.

use std::sync::Arc;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator as CustomOperator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{Shape, SymbolicDimensions, TensorElementType, ValueType};
use prost::Message;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, OperatorSetIdProto};

use crate::engine::operators::{NAMES, Operator, View, operator};
use crate::engine::{EngineError, GraphSource, onnx};

/// The domain of the operators.
const DOMAIN: &str = "unimo";
/// The attribute that tells which of a graph's operators a node is, from 1 on: a zero is not written into a file, and ONNX Runtime
/// then finds none. Weights are laid out once, and all sessions share them.
const NUMBER: &str = "number";
/// Of this, ONNX Runtime computes what the file says, 8-bit convolutions and all.
const STATIC: &str = "QuantizeLinear";

/// A graph in which operators of ours take the place of what they compute.
pub(super) struct Rewritten {
    /// The file; it holds its weights.
    pub onnx: Vec<u8>,
    pub operators: Operators,
}

/// The operators of a graph, for any number of sessions.
#[derive(Clone, Default)]
pub(super) struct Operators(Arc<[Arc<dyn Operator>]>);

impl Rewritten {
    /// `None` where there is nothing that our kernels compute.
    ///
    /// # Errors
    /// Where the file or a weight is malformed.
    pub fn of(source: &GraphSource<'_>) -> Result<Option<Self>, EngineError> {
        let mut model = onnx::parse_operators(source)?;
        let Some(graph) = model.graph.as_mut() else { return Ok(None) };
        if graph.node.iter().any(|node| node.op_type == STATIC) {
            return Ok(None);
        }
        let refused = |reason| EngineError::Load { graph: source.signature.name.clone(), reason };
        let all = take(graph).map_err(refused)?;
        if all.is_empty() {
            return Ok(None);
        }
        model.opset_import.push(OperatorSetIdProto { domain: DOMAIN.to_owned(), version: 1 });
        Ok(Some(Self { onnx: model.encode_to_vec(), operators: Operators(all.into()) }))
    }
}

/// Takes the operators out of a graph, whose nodes have their numbers then.
fn take(graph: &mut GraphProto) -> Result<Vec<Arc<dyn Operator>>, String> {
    let mut all = Vec::new();
    for node in &mut graph.node {
        let Some(operator) = operator(node) else { continue };
        all.push(operator?);
        let (name, i) = (NUMBER.to_owned(), all.len() as i64);
        node.domain = DOMAIN.to_owned();
        node.attribute = vec![AttributeProto { name, i, r#type: AttributeType::Int as i32, ..AttributeProto::default() }];
    }
    Ok(all)
}

impl Operators {
    /// What a session is to know them by.
    pub fn domain(&self) -> ort::Result<OperatorDomain> {
        let add = |domain: OperatorDomain, name| domain.add(Custom { name, operators: self.clone() });
        NAMES.into_iter().try_fold(OperatorDomain::new(DOMAIN)?, add)
    }

    fn find(&self, number: Option<i64>) -> ort::Result<Arc<dyn Operator>> {
        let found = number.and_then(|number| self.0.get(usize::try_from(number).ok()?.checked_sub(1)?));
        found.cloned().ok_or_else(|| ort::Error::new(format!("{NUMBER} {number:?} of {} operators", self.0.len())))
    }
}

/// All operators of a name.
struct Custom {
    name: &'static str,
    operators: Operators,
}

impl CustomOperator for Custom {
    type Kernel<'attr> = Running;

    fn name(&self) -> &str {
        self.name
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::variadic(1).homogenous(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Running> {
        Ok(Running { operator: self.operators.find(context.get(NUMBER))?, inputs: Vec::new(), output: Vec::new() })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let operator = self.operators.find(context.attr(NUMBER).ok())?;
        let shapes = context.inputs().iter().map(known).collect::<Option<Vec<_>>>();
        // Where ONNX Runtime does not know them, it will at the run.
        let Some(shapes) = shapes else { return Ok(()) };
        let shape = operator.shape(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>()).map_err(ort::Error::new)?;
        let dimension_symbols = SymbolicDimensions::empty(shape.len());
        context.set_output(0, &ValueType::Tensor { ty: TensorElementType::Float32, shape: shape.into(), dimension_symbols })
    }
}

/// The sizes of a tensor, if all are known. One of which nothing is known looks like a scalar, which none of our operators reads.
fn known(value: &ValueType) -> Option<Vec<usize>> {
    let shape = value.tensor_shape().filter(|shape| !shape.is_empty())?;
    shape.iter().map(|&size| usize::try_from(size).ok()).collect()
}

/// An operator in a session.
struct Running {
    operator: Arc<dyn Operator>,
    /// The shapes of its last run, which are hardly ever others.
    inputs: Vec<Vec<usize>>,
    output: Vec<usize>,
}

impl Kernel for Running {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let input = |i| context.input(i)?.ok_or_else(|| ort::Error::new(format!("input {i} is missing")));
        let inputs = (0..context.num_inputs()?).map(input).collect::<ort::Result<Vec<_>>>()?;
        let tensors = inputs.iter().map(|input| input.try_extract_tensor::<f32>()).collect::<ort::Result<Vec<_>>>()?;
        let same =
            |(before, (now, _)): (&Vec<usize>, &(&Shape, _))| now.iter().map(|&size| size as usize).eq(before.iter().copied());
        if self.inputs.len() != tensors.len() || !self.inputs.iter().zip(&tensors).all(same) {
            self.inputs = tensors.iter().map(|(shape, _)| shape.iter().map(|&size| size as usize).collect()).collect();
            let shapes: Vec<&[usize]> = self.inputs.iter().map(Vec::as_slice).collect();
            self.output = self.operator.shape(&shapes).map_err(ort::Error::new)?;
        }
        let views = self.inputs.iter().zip(&tensors).map(|(shape, (_, values))| View { shape, values });
        let output = context.output(0, self.output.clone())?;
        let mut output = output.ok_or_else(|| ort::Error::new("the output is missing"))?;
        let (_, values) = output.try_extract_tensor_mut::<f32>()?;
        self.operator.compute(&views.collect::<Vec<_>>(), values).map_err(ort::Error::new)
    }
}
