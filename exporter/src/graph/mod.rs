//! A small typed builder of ONNX graphs: values know their shape and type, operators check them, weights are shared.

mod operators;
mod products;
mod weights;

use std::fmt;

use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_proto::AttributeType, type_proto,
};
use unimo::bundle::manifest::{Dtype, GraphSignature, Size, Symbol, TensorSignature, WEIGHTS};

use crate::quantize::BLOCK;

pub use operators::Convolution;
pub use products::{OBSERVED, Products, Scales};
pub(crate) use weights::transposed;
pub use weights::{Element, Storage, StoredWeight, WeightStore};

/// Operator set that the graphs are written in.
pub const OPSET: i64 = 17;
/// ONNX Runtime's own operators, where a graph has any, and their set's version.
const CONTRIB: (&str, i64) = ("com.microsoft", 1);
/// ONNX file format that goes with [`OPSET`].
const IR_VERSION: i64 = 8;

/// Why a graph cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GraphError {
    /// Operands do not fit.
    #[error("{operator}: {reason}")]
    Shape {
        /// ONNX operator.
        operator: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// A weight is not in the store.
    #[error("there is no weight `{0}`")]
    MissingWeight(String),
    /// An output is not what the contract promises.
    #[error("output `{name}` is {found}, the contract says {expected}")]
    Output {
        /// Output.
        name: String,
        /// What was built.
        found: String,
        /// What was promised.
        expected: String,
    },
}

/// One size of a shape: a number, or a number more than a symbol.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Dim {
    number: usize,
    symbol: Option<Symbol>,
}

impl Dim {
    /// The number, where there is no symbol.
    #[must_use]
    pub fn fixed(self) -> Option<usize> {
        self.symbol.is_none().then_some(self.number)
    }
}

impl From<usize> for Dim {
    fn from(number: usize) -> Self {
        Self { number, symbol: None }
    }
}

impl From<Size> for Dim {
    fn from(size: Size) -> Self {
        match size {
            Size::Fixed(number) => number.into(),
            Size::Symbol(symbol) => Self { number: 0, symbol: Some(symbol) },
        }
    }
}

impl PartialEq<usize> for Dim {
    fn eq(&self, number: &usize) -> bool {
        self.fixed() == Some(*number)
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.symbol, self.number) {
            (None, number) => write!(f, "{number}"),
            (Some(symbol), 0) => f.write_str(symbol.name()),
            (Some(symbol), number) => write!(f, "{number}+{}", symbol.name()),
        }
    }
}

/// A tensor inside a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    name: String,
    shape: Vec<Dim>,
    dtype: Dtype,
}

impl Value {
    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &[Dim] {
        &self.shape
    }
}

/// Numbers as a shape.
fn shape(numbers: &[usize]) -> Vec<Dim> {
    numbers.iter().copied().map(Dim::from).collect()
}

fn dims_of(tensor: &TensorSignature<Size>) -> Vec<Dim> {
    tensor.shape.iter().copied().map(Dim::from).collect()
}

/// Attribute values that the operators need.
enum Attribute {
    Int(i64),
    Ints(Vec<i64>),
    Float(f32),
}

/// Builds one graph over a store of weights.
pub struct GraphBuilder<'w> {
    signature: GraphSignature<Size>,
    weights: &'w WeightStore,
    products: Products<'w>,
    observed: Vec<TensorSignature<Size>>,
    graph: GraphProto,
    values: usize,
    used: std::collections::BTreeMap<String, Value>,
}

impl<'w> GraphBuilder<'w> {
    /// A graph with the inputs of `signature`, whose products with 8-bit weights are written as `products` says.
    #[must_use]
    pub fn new(signature: &GraphSignature<Size>, weights: &'w WeightStore, products: Products<'w>) -> Self {
        let mut graph = GraphProto { name: signature.name.clone(), ..GraphProto::default() };
        graph.input = signature.inputs.iter().map(|t| value_info(&t.name, &dims_of(t), t.dtype)).collect();
        let (signature, used) = (signature.clone(), std::collections::BTreeMap::new());
        Self { signature, weights, products, observed: Vec::new(), graph, values: 0, used }
    }

    /// An input by its name.
    ///
    /// # Errors
    /// The signature has no such input.
    pub fn input(&self, name: &str) -> Result<Value, GraphError> {
        match self.signature.inputs.iter().find(|t| t.name == name) {
            Some(t) => Ok(Value { name: name.to_owned(), shape: dims_of(t), dtype: t.dtype }),
            None => Err(GraphError::Shape {
                operator: "Input",
                reason: format!("`{name}` is not an input of {}", self.signature.name),
            }),
        }
    }

    /// A weight of the store as f32: 16-bit ones pass a `Cast`, 8-bit ones a `DequantizeLinear`.
    ///
    /// # Errors
    /// No such weight, or one in 4 bits, which only products read.
    pub fn weight(&mut self, name: &str) -> Result<Value, GraphError> {
        if let Some(value) = self.used.get(name) {
            return Ok(value.clone());
        }
        let (mut value, element) = self.stored(name)?;
        match element {
            Element::F32 => {}
            Element::F16 => {
                let to = Attribute::Int(DataType::Float as i64);
                value = self.node("Cast", &[&value], &[("to", to)], value.shape.clone(), Dtype::F32);
            }
            Element::I8 { axis } => {
                let (scales, _) = self.stored(&WeightStore::scales_of(name))?;
                let axis = Attribute::Int(axis as i64);
                value = self.node("DequantizeLinear", &[&value, &scales], &[("axis", axis)], value.shape.clone(), Dtype::F32);
            }
            Element::I4 { .. } => {
                return Err(GraphError::Shape { operator: "DequantizeLinear", reason: format!("`{name}` has 4 bits") });
            }
        }
        self.used.insert(name.to_owned(), value.clone());
        Ok(value)
    }

    /// A weight's shape.
    ///
    /// # Errors
    /// No such weight.
    pub fn shape_of(&self, name: &str) -> Result<&[usize], GraphError> {
        Ok(&self.weights.get(name).ok_or_else(|| GraphError::MissingWeight(name.to_owned()))?.shape)
    }

    /// A weight as it is stored.
    fn stored(&mut self, name: &str) -> Result<(Value, Element), GraphError> {
        let stored = self.weights.get(name).ok_or_else(|| GraphError::MissingWeight(name.to_owned()))?;
        let value = Value { name: name.to_owned(), shape: shape(&stored.shape), dtype: Dtype::F32 };
        if self.graph.initializer.iter().any(|tensor| tensor.name == name) {
            return Ok((value, stored.element));
        }
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.to_owned(), value };
        let data_type = match stored.element {
            Element::F32 => DataType::Float,
            Element::F16 => DataType::Float16,
            Element::I8 { .. } => DataType::Int8,
            Element::I4 { .. } => DataType::Uint8,
        };
        let sizes = match (stored.element, stored.shape.as_slice()) {
            (Element::I4 { axis }, shape) => vec![shape[axis], shape[1 - axis] / BLOCK, BLOCK / 2],
            (_, shape) => shape.to_vec(),
        };
        self.graph.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims(&sizes),
            data_type: data_type as i32,
            data_location: Some(DataLocation::External as i32),
            external_data: vec![
                entry("location", WEIGHTS.to_owned()),
                entry("offset", stored.offset.to_string()),
                entry("length", stored.length.to_string()),
            ],
            ..TensorProto::default()
        });
        Ok((value, stored.element))
    }

    /// A small f32 constant kept inside the graph file.
    pub fn constant(&mut self, shape: &[usize], values: &[f32]) -> Value {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.inline(shape, Dtype::F32, bytes)
    }

    /// A small i64 constant kept inside the graph file.
    fn integers(&mut self, values: &[i64]) -> Value {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.inline(&[values.len()], Dtype::I64, bytes)
    }

    fn inline(&mut self, sizes: &[usize], dtype: Dtype, raw_data: Vec<u8>) -> Value {
        let name = self.initializer(sizes, data_type(dtype), raw_data);
        Value { name, shape: shape(sizes), dtype }
    }

    fn initializer(&mut self, sizes: &[usize], data_type: DataType, raw_data: Vec<u8>) -> String {
        let name = self.fresh("constant");
        let dims = dims(sizes);
        self.graph.initializer.push(TensorProto {
            name: name.clone(),
            dims,
            data_type: data_type as i32,
            raw_data,
            ..TensorProto::default()
        });
        name
    }

    fn fresh(&mut self, what: &str) -> String {
        self.values += 1;
        format!("{}_{}", what.to_lowercase(), self.values)
    }

    fn node(
        &mut self,
        operator: &'static str,
        inputs: &[&Value],
        attributes: &[(&str, Attribute)],
        shape: Vec<Dim>,
        dtype: Dtype,
    ) -> Value {
        let name = self.fresh(operator);
        let inputs: Vec<&str> = inputs.iter().map(|v| v.name.as_str()).collect();
        self.push(operator, &inputs, &[&name], attributes);
        Value { name, shape, dtype }
    }

    /// Adds a node that is called as its first output.
    fn push(&mut self, operator: &'static str, inputs: &[&str], outputs: &[&str], attributes: &[(&str, Attribute)]) {
        let attribute = attributes
            .iter()
            .map(|(name, attribute)| {
                let mut proto = AttributeProto { name: (*name).to_owned(), ..AttributeProto::default() };
                match attribute {
                    Attribute::Int(i) => (proto.i, proto.r#type) = (*i, AttributeType::Int as i32),
                    Attribute::Ints(ints) => (proto.ints, proto.r#type) = (ints.clone(), AttributeType::Ints as i32),
                    Attribute::Float(f) => (proto.f, proto.r#type) = (*f, AttributeType::Float as i32),
                }
                proto
            })
            .collect();
        self.graph.node.push(NodeProto {
            name: outputs.first().copied().unwrap_or_default().to_owned(),
            op_type: operator.to_owned(),
            domain: if operator == products::BLOCKS { CONTRIB.0.to_owned() } else { String::new() },
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: outputs.iter().map(|&output| output.to_owned()).collect(),
            attribute,
            ..NodeProto::default()
        });
    }

    /// Closes the graph with its outputs in the signature's order, and after them what is observed.
    ///
    /// # Errors
    /// Outputs that are not what the signature promises.
    pub fn finish(mut self, outputs: &[Value]) -> Result<ModelProto, GraphError> {
        let promised = std::mem::take(&mut self.signature.outputs);
        if promised.len() != outputs.len() {
            let reason = format!("{} outputs, the contract says {}", outputs.len(), promised.len());
            return Err(GraphError::Shape { operator: "Output", reason });
        }
        for (output, promised) in outputs.iter().zip(&promised) {
            let shape = dims_of(promised);
            if output.shape != shape || output.dtype != promised.dtype {
                return Err(GraphError::Output {
                    name: promised.name.clone(),
                    found: format!("{:?} {:?}", output.dtype, output.shape),
                    expected: format!("{:?} {shape:?}", promised.dtype),
                });
            }
            self.graph.node.push(NodeProto {
                name: format!("output_{}", promised.name),
                op_type: "Identity".to_owned(),
                input: vec![output.name.clone()],
                output: vec![promised.name.clone()],
                ..NodeProto::default()
            });
            self.graph.output.push(value_info(&promised.name, &shape, promised.dtype));
        }
        self.graph.output.extend(self.observed.iter().map(|tensor| value_info(&tensor.name, &dims_of(tensor), tensor.dtype)));
        let contrib = self.graph.node.iter().any(|node| node.domain == CONTRIB.0);
        let sets = [("", OPSET)].into_iter().chain(contrib.then_some(CONTRIB));
        Ok(ModelProto {
            ir_version: IR_VERSION,
            opset_import: sets.map(|(domain, version)| OperatorSetIdProto { domain: domain.to_owned(), version }).collect(),
            producer_name: "unimo-export".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.graph),
            ..ModelProto::default()
        })
    }
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&d| d as i64).collect()
}

fn data_type(dtype: Dtype) -> DataType {
    match dtype {
        Dtype::F32 => DataType::Float,
        Dtype::I64 => DataType::Int64,
    }
}

fn value_info(name: &str, shape: &[Dim], dtype: Dtype) -> ValueInfoProto {
    let value = |d: &Dim| match d.symbol {
        None => dimension::Value::DimValue(d.number as i64),
        Some(symbol) => dimension::Value::DimParam(symbol.name().to_owned()),
    };
    let dim = shape.iter().map(|d| Dimension { value: Some(value(d)), ..Dimension::default() }).collect();
    let tensor = type_proto::Tensor { elem_type: data_type(dtype) as i32, shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}
