//! A model small enough to work out by hand, as ONNX graphs: what tests of the engine and of everything above it run.

use half::f16;
use prost::Message;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_proto::AttributeType, type_proto,
};

use crate::bundle::manifest::{Dtype, GraphSignature, ModelSizes, Size, TensorSignature};
use crate::tokenizer::SEP;

/// A graph under construction; every node's output is named by the caller.
pub(crate) struct Toy(GraphProto);

impl Toy {
    pub(crate) fn new<D: Copy + Into<Size>>(signature: &GraphSignature<D>) -> Self {
        let values = |tensors: &[TensorSignature<D>]| {
            let shape = |tensor: &TensorSignature<D>| tensor.shape.iter().map(|&size| size.into()).collect::<Vec<Size>>();
            tensors.iter().map(|tensor| value(&tensor.name, &shape(tensor), tensor.dtype)).collect()
        };
        Self(GraphProto {
            name: signature.name.clone(),
            input: values(&signature.inputs),
            output: values(&signature.outputs),
            ..GraphProto::default()
        })
    }

    pub(crate) fn node(mut self, op_type: &str, inputs: &[&str], output: &str) -> Self {
        self.0.node.push(NodeProto {
            op_type: op_type.to_owned(),
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        });
        self
    }

    /// Gives the last node more outputs.
    pub(crate) fn also(mut self, outputs: &[&str]) -> Self {
        if let Some(node) = self.0.node.last_mut() {
            node.output.extend(outputs.iter().map(|&name| name.to_owned()));
        }
        self
    }

    /// Gives the last node an attribute.
    pub(crate) fn with(mut self, name: &str, attribute: Attribute) -> Self {
        let mut proto = AttributeProto { name: name.to_owned(), ..AttributeProto::default() };
        match attribute {
            Attribute::Int(value) => (proto.r#type, proto.i) = (AttributeType::Int as i32, value),
            Attribute::Ints(values) => (proto.r#type, proto.ints) = (AttributeType::Ints as i32, values),
        }
        if let Some(node) = self.0.node.last_mut() {
            node.attribute.push(proto);
        }
        self
    }

    /// `y = x · half · (1 + erf(x/√2))` as the exporter writes it: GELU, if `half` is one.
    pub(crate) fn gelu(self, x: &str, half: f32, y: &str) -> Self {
        self.floats("root", &[1], &[std::f32::consts::FRAC_1_SQRT_2])
            .floats("one", &[1], &[1.0])
            .floats("half", &[1], &[half])
            .node("Mul", &[x, "root"], "scaled")
            .node("Erf", &["scaled"], "erf")
            .node("Add", &["erf", "one"], "more")
            .node("Mul", &[x, "more"], "twice")
            .node("Mul", &["twice", "half"], y)
    }

    pub(crate) fn floats(mut self, name: &str, dims: &[i64], values: &[f32]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Float as i32,
            raw_data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ..TensorProto::default()
        });
        self
    }

    pub(crate) fn integers(mut self, name: &str, dims: &[i64], values: &[i64]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Int64 as i32,
            int64_data: values.to_vec(),
            ..TensorProto::default()
        });
        self
    }

    /// Integers as bytes, as the exporter writes them.
    pub(crate) fn constant(mut self, name: &str, values: &[i64]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: vec![values.len() as i64],
            data_type: DataType::Int64 as i32,
            raw_data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ..TensorProto::default()
        });
        self
    }

    /// An 8-bit weight inside the file.
    pub(crate) fn levels(mut self, name: &str, dims: &[i64], values: &[i8]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Int8 as i32,
            raw_data: values.iter().map(|value| value.cast_unsigned()).collect(),
            ..TensorProto::default()
        });
        self
    }

    /// A 4-bit weight inside the file, two levels a byte.
    pub(crate) fn nibbles(mut self, name: &str, dims: &[i64], bytes: &[u8]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Uint8 as i32,
            raw_data: bytes.to_vec(),
            ..TensorProto::default()
        });
        self
    }

    /// A 16-bit weight inside the file.
    pub(crate) fn halves(mut self, name: &str, dims: &[i64], values: &[f32]) -> Self {
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Float16 as i32,
            raw_data: halves(values),
            ..TensorProto::default()
        });
        self
    }

    /// A 16-bit weight at a byte of `weights.bin`.
    pub(crate) fn external(mut self, name: &str, dims: &[i64], offset: usize) -> Self {
        let length = 2 * dims.iter().product::<i64>();
        let entries = [("location", "weights.bin".to_owned()), ("offset", offset.to_string()), ("length", length.to_string())];
        self.0.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: dims.to_vec(),
            data_type: DataType::Float16 as i32,
            data_location: Some(DataLocation::External as i32),
            external_data: entries.map(|(key, value)| StringStringEntryProto { key: key.to_owned(), value }).to_vec(),
            ..TensorProto::default()
        });
        self
    }

    pub(crate) fn model(self) -> ModelProto {
        let opset = OperatorSetIdProto { version: 17, ..OperatorSetIdProto::default() };
        ModelProto { ir_version: 8, opset_import: vec![opset], graph: Some(self.0), ..ModelProto::default() }
    }

    fn bytes(self) -> Vec<u8> {
        self.model().encode_to_vec()
    }

    /// `output = input / |input|` along the last of two axes.
    fn unit_length(self, input: &str, output: &str) -> Self {
        self.integers("last", &[1], &[1])
            .node("Mul", &[input, input], "squares")
            .node("ReduceSum", &["squares", "last"], "square")
            .node("Sqrt", &["square"], "length")
            .node("Div", &[input, "length"], output)
    }
}

pub(crate) enum Attribute {
    Int(i64),
    Ints(Vec<i64>),
}

fn value(name: &str, shape: &[Size], dtype: Dtype) -> ValueInfoProto {
    let value = |size: &Size| match size {
        Size::Fixed(size) => dimension::Value::DimValue(*size as i64),
        Size::Symbol(symbol) => dimension::Value::DimParam(symbol.name().to_owned()),
    };
    let dims = shape.iter().map(|size| Dimension { value: Some(value(size)), ..Dimension::default() });
    let tensor = type_proto::Tensor {
        elem_type: match dtype {
            Dtype::F32 => DataType::Float as i32,
            Dtype::I64 => DataType::Int64 as i32,
        },
        shape: Some(TensorShapeProto { dim: dims.collect() }),
    };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}

pub(crate) fn halves(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
}

/// The four graphs of a toy model and their `weights.bin`.
///
/// With `m` the mean of a picture's tensor (−1 black, 1 white):
/// - `vision`: the embedding is the mean colour times a `[3, embedding]` weight, of unit length; keys and regions are `m`
///   everywhere, values `2 m`;
/// - `decode`: the likeliest ids are `64 + 16 m + n` with n the number of words before, and `[SEP]` from the fourth place on;
/// - `text`: the embedding is the mean over its ids of `[1, id, 0, …]`, of unit length;
/// - `match`: the logit is `m` times the number of ids.
pub(crate) fn graphs(model: &ModelSizes, signatures: &[GraphSignature<Size>]) -> (Vec<(String, Vec<u8>)>, Vec<u8>) {
    let shape = |signature: usize, output: usize| -> Vec<i64> {
        // -1 where a symbol stands, which `decode` fills with the sizes of its tokens.
        let size = |size: &Size| if let Size::Fixed(size) = size { *size as i64 } else { -1 };
        signatures[signature].outputs[output].shape.iter().map(size).collect()
    };
    let (vocabulary, width) = (model.vocabulary, model.embedding);
    let colours: Vec<f32> = (0..3 * width).map(|i| if i % width == i / width { 1.0 } else { 0.25 }).collect();

    let (keys, regions) = (shape(0, 1), shape(0, 3));
    let vision = Toy::new(&signatures[0])
        .external("w16", &[3, width as i64], 0)
        .node("Cast", &["w16"], "w")
        .with("to", Attribute::Int(DataType::Float as i64))
        .node("ReduceMean", &["pixels"], "colour")
        .with("axes", Attribute::Ints(vec![2, 3]))
        .with("keepdims", Attribute::Int(0))
        .node("MatMul", &["colour", "w"], "raw")
        .unit_length("raw", "embedding")
        .node("ReduceMean", &["pixels"], "mean4")
        .integers("keys_shape", &[4], &keys)
        .node("Expand", &["mean4", "keys_shape"], "prefix_keys")
        .node("Add", &["prefix_keys", "prefix_keys"], "prefix_values")
        .integers("three", &[3], &[1, 1, 1])
        .node("Reshape", &["mean4", "three"], "mean3")
        .integers("regions_shape", &[3], &regions)
        .node("Expand", &["mean3", "regions_shape"], "regions");

    let [layers, heads, _, head_width] = shape(1, 1)[..] else { unreachable!("caches have four sizes") };
    let ids: Vec<f32> = (0..vocabulary).map(|id| id as f32).collect();
    let ends: Vec<f32> = (0..vocabulary).map(|id| if id == SEP as usize { 1e5 } else { 0.0 }).collect();
    let decode = Toy::new(&signatures[1])
        .node("ReduceMean", &["prefix_keys"], "key4")
        .integers("one", &[1], &[1])
        .node("Reshape", &["key4", "one"], "m")
        .floats("sixteen", &[1], &[16.0])
        .floats("first", &[1], &[64.0])
        .node("Mul", &["m", "sixteen"], "shade")
        .node("Add", &["shade", "first"], "start")
        // Words before, counted by the slots that each hypothesis sees, `[hypotheses, 1]`.
        .floats("scale", &[1], &[1e-4])
        .floats("whole", &[1], &[1.0])
        .node("Mul", &["mask", "scale"], "minus")
        .node("Add", &["minus", "whole"], "seen")
        .integers("last", &[1], &[1])
        .node("ReduceSum", &["seen", "last"], "filled")
        .node("Add", &["start", "filled"], "target")
        .floats("ids", &[1, vocabulary as i64], &ids)
        .node("Sub", &["ids", "target"], "distance")
        .node("Mul", &["distance", "distance"], "square")
        .node("Neg", &["square"], "nearness")
        // `[SEP]` where position > 2.5.
        .node("Cast", &["position"], "place")
        .with("to", Attribute::Int(DataType::Float as i64))
        .floats("limit", &[1], &[-2.5])
        .node("Add", &["place", "limit"], "over")
        .floats("ends", &[1, vocabulary as i64], &ends)
        .node("Mul", &["ends", "over"], "end")
        .node("Add", &["nearness", "end"], "logits")
        .node("Cast", &["tokens"], "words")
        .with("to", Attribute::Int(DataType::Float as i64))
        .integers("rows", &[4], &[1, 1, -1, 1])
        .node("Reshape", &["words", "rows"], "word4")
        .floats("ones", &[layers, heads, 1, head_width], &vec![1.0; (layers * heads * head_width) as usize])
        .node("Mul", &["word4", "ones"], "new_keys")
        .node("Mul", &["new_keys", "place"], "new_values");

    let table: Vec<f32> = (0..vocabulary * width)
        .map(|i| match i % width {
            0 => 1.0,
            1 => (i / width) as f32,
            _ => 0.0,
        })
        .collect();
    let weights_of_places = |toy: Toy| {
        toy.floats("scale", &[1], &[1e-4]).floats("whole", &[1], &[1.0]).node("Mul", &["mask", "scale"], "minus").node(
            "Add",
            &["minus", "whole"],
            "real",
        )
    };
    let text = weights_of_places(Toy::new(&signatures[2]))
        .floats("table", &[vocabulary as i64, width as i64], &table)
        .integers("flat", &[1], &[model.max_text as i64])
        .node("Reshape", &["ids", "flat"], "list")
        .node("Gather", &["table", "list"], "words")
        .node("MatMul", &["real", "words"], "raw")
        .unit_length("raw", "embedding");

    let match_ = weights_of_places(Toy::new(&signatures[3]))
        .integers("one", &[1], &[1])
        .node("ReduceMean", &["regions"], "m3")
        .node("Reshape", &["m3", "one"], "m")
        .integers("last", &[1], &[1])
        .node("ReduceSum", &["real", "last"], "count2")
        .node("Reshape", &["count2", "one"], "count")
        .node("Mul", &["m", "count"], "score");

    let graphs = [vision, decode, text, match_].into_iter().zip(signatures);
    (graphs.map(|(toy, signature)| (signature.name.clone(), toy.bytes())).collect(), halves(&colours))
}
