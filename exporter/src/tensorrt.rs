//! TensorRT's rules for quantized ONNX graphs, checked here because no TensorRT runs here.
//!
//! The rules are those that its documents state:
//! - which operators its ONNX parser takes, and with what restrictions: the table of onnx-tensorrt's `docs/operators.md`
//!   (<https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md>, read for TensorRT 10.15);
//! - scales are build-time constants and positive, zero points nothing but zero: `IQuantizeLayer` and `IDequantizeLayer`
//!   (<https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Quantize.html> and `Dequantize.html` beside it);
//! - where quantization belongs: activations by tensor, weights by output channel, and only at the inputs of products with weights
//!   (<https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html>).
//!
//! This project is stricter in three points: operator sets up to 20 only, because older TensorRT of boards in use stops there;
//! quantized products are `Conv` and `MatMul` with a weight, nothing else; and nothing is quantized right before or after a
//! `Softmax`.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto};

/// Operator sets that are taken.
const OPSETS: std::ops::RangeInclusive<i64> = 9..=20;

/// Operators of these graphs that TensorRT's parser takes. Others may be taken too; who needs one looks it up in the table.
const TAKEN: [&str; 23] = [
    "Add",
    "AveragePool",
    "Cast",
    "Clip",
    "Concat",
    "Conv",
    "DequantizeLinear",
    "Div",
    "Erf",
    "Gather",
    "Identity",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "QuantizeLinear",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Slice",
    "Softmax",
    "Sqrt",
    "Transpose",
];

/// A rule that a graph breaks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("node `{node}` ({operator}): {rule}")]
pub struct RuleBroken {
    /// Name of the node, or of the graph where the whole is at fault.
    pub node: String,
    /// Its operator.
    pub operator: String,
    /// What TensorRT asks for.
    pub rule: String,
}

/// Checks a graph; `weights` is the file that its external weights lie in.
///
/// # Errors
/// The first node that breaks a rule.
pub fn check(model: &ModelProto, weights: &[u8]) -> Result<(), RuleBroken> {
    let graph = model.graph.as_ref().ok_or_else(|| whole("", "the file holds no graph"))?;
    for opset in &model.opset_import {
        if !opset.domain.is_empty() && opset.domain != "ai.onnx" {
            return Err(whole(&graph.name, format!("operators of the domain {} are not taken", opset.domain)));
        }
        if !OPSETS.contains(&opset.version) {
            let (first, last) = (OPSETS.start(), OPSETS.end());
            return Err(whole(&graph.name, format!("operator set {} is outside {first} to {last}", opset.version)));
        }
    }
    graph.node.iter().try_for_each(taken)?;
    let rules = Rules::of(graph, weights);
    graph.node.iter().try_for_each(|node| rules.check(node))
}

fn taken(node: &NodeProto) -> Result<(), RuleBroken> {
    held(node, matches!(node.domain.as_str(), "" | "ai.onnx"), "operators of other domains than ONNX's own are not taken")?;
    held(node, TAKEN.contains(&node.op_type.as_str()), "TensorRT's ONNX parser does not take this operator")
}

fn held(node: &NodeProto, holds: bool, rule: &str) -> Result<(), RuleBroken> {
    match holds {
        true => Ok(()),
        false => Err(RuleBroken { node: node.name.clone(), operator: node.op_type.clone(), rule: rule.to_owned() }),
    }
}

fn whole(graph: &str, rule: impl Into<String>) -> RuleBroken {
    RuleBroken { node: graph.to_owned(), operator: "graph".to_owned(), rule: rule.into() }
}

struct Rules<'a> {
    constants: BTreeMap<&'a str, &'a TensorProto>,
    makers: BTreeMap<&'a str, &'a NodeProto>,
    readers: BTreeMap<&'a str, Vec<&'a NodeProto>>,
    outputs: BTreeSet<&'a str>,
    weights: &'a [u8],
}

impl<'a> Rules<'a> {
    fn of(graph: &'a GraphProto, weights: &'a [u8]) -> Self {
        let mut readers: BTreeMap<&str, Vec<&NodeProto>> = BTreeMap::new();
        for node in &graph.node {
            node.input.iter().for_each(|input| readers.entry(input).or_default().push(node));
        }
        Self {
            constants: graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect(),
            makers: graph.node.iter().flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node))).collect(),
            readers,
            outputs: graph.output.iter().map(|output| output.name.as_str()).collect(),
            weights,
        }
    }

    fn check(&self, node: &NodeProto) -> Result<(), RuleBroken> {
        let held = |holds: bool, rule: &str| held(node, holds, rule);
        match node.op_type.as_str() {
            "QuantizeLinear" => self.quantize(node, &held),
            "DequantizeLinear" => self.dequantize(node, &held),
            _ => {
                let eight = |input: &String| self.is_eight_bit(input);
                held(!node.input.iter().any(eight), "8-bit values are read by DequantizeLinear and nothing else")?;
                self.others(node, &held)
            }
        }
    }

    fn others(&self, node: &NodeProto, held: &dyn Fn(bool, &str) -> Result<(), RuleBroken>) -> Result<(), RuleBroken> {
        let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
        match node.op_type.as_str() {
            "Conv" => {
                let weight = node.input.get(1).is_some_and(|weight| self.is_prepared_constant(weight));
                held(weight, "its kernel must be a constant, or one behind a DequantizeLinear or Cast")?;
                held(node.input.len() < 3 || self.constants.contains_key(node.input[2].as_str()), "its bias must be a constant")
            }
            "AveragePool" => {
                let kernel = attribute("kernel_shape").map_or(0, |kernel| kernel.ints.len());
                held((2..=3).contains(&kernel), "only pooling over two or three dimensions is taken")?;
                let dilations = attribute("dilations").is_none_or(|dilations| dilations.ints.iter().all(|&d| d == 1));
                held(dilations, "dilations must be ones")
            }
            "LayerNormalization" => held(node.output.len() == 1, "only its first output is taken"),
            "ReduceSum" | "ReduceMean" => {
                let axes = node.input.get(1).is_none_or(|axes| self.constants.contains_key(axes.as_str()));
                held(axes, "its axes must be a constant")
            }
            "Cast" => {
                let to = attribute("to").and_then(|to| DataType::try_from(to.i as i32).ok());
                let taken = [DataType::Float, DataType::Float16, DataType::Int32, DataType::Int64, DataType::Bool];
                held(
                    to.is_some_and(|to| taken.contains(&to)),
                    "casts give 16- or 32-bit floats, 32- or 64-bit integers or booleans",
                )
            }
            "Softmax" => {
                let quantizes = |node: &NodeProto| matches!(node.op_type.as_str(), "QuantizeLinear" | "DequantizeLinear");
                let before = node.input.iter().filter_map(|input| self.makers.get(input.as_str())).any(|maker| quantizes(maker));
                let readers = node.output.iter().filter_map(|output| self.readers.get(output.as_str())).flatten();
                let after = readers.into_iter().any(|reader| quantizes(reader));
                held(!before && !after, "nothing is quantized right before or after a Softmax")
            }
            _ => Ok(()),
        }
    }

    fn quantize(&self, node: &NodeProto, held: &dyn Fn(bool, &str) -> Result<(), RuleBroken>) -> Result<(), RuleBroken> {
        let [_, scale, zero] = node.input.as_slice() else {
            return held(false, "without a zero point of type int8 it gives unsigned levels, which are not taken");
        };
        self.scales(scale, held)?;
        held(
            self.constants.get(scale.as_str()).is_some_and(|s| count(s) == 1),
            "what is no weight has one scale, not one a channel",
        )?;
        self.zero_point(zero, scale, held)?;
        let output = node.output.first().map_or("", String::as_str);
        held(!self.outputs.contains(output), "8-bit values are no outputs of a graph")?;
        let readers = self.readers.get(output).map(Vec::as_slice).unwrap_or_default();
        held(
            readers.iter().all(|reader| reader.op_type == "DequantizeLinear"),
            "its levels are read by DequantizeLinear and nothing else",
        )
    }

    fn dequantize(&self, node: &NodeProto, held: &dyn Fn(bool, &str) -> Result<(), RuleBroken>) -> Result<(), RuleBroken> {
        let (Some(levels), Some(scale)) = (node.input.first(), node.input.get(1)) else {
            return held(false, "it needs levels and a scale");
        };
        self.scales(scale, held)?;
        if let Some(zero) = node.input.get(2) {
            self.zero_point(zero, scale, held)?;
        }
        let output = node.output.first().map_or("", String::as_str);
        let readers = self.readers.get(output).map(Vec::as_slice).unwrap_or_default();
        let axis = node.attribute.iter().find(|attribute| attribute.name == "axis").map_or(1, |axis| axis.i);
        let scales = self.constants.get(scale.as_str()).map_or(0, |scale| count(scale));
        let Some(weight) = self.constants.get(levels.as_str()) else {
            let quantized = self.makers.get(levels.as_str()).is_some_and(|maker| maker.op_type == "QuantizeLinear");
            held(quantized, "its levels must come from a QuantizeLinear or be a constant")?;
            let product = |reader: &&NodeProto| {
                let product = matches!(reader.op_type.as_str(), "Conv" | "MatMul");
                let other = reader.input.get(1).is_some_and(|weight| self.is_eight_bit_weight(weight));
                product && reader.input.first().is_some_and(|input| input == output) && other
            };
            return held(readers.iter().all(product), "quantized values enter only Conv and MatMul, whose weight is in 8 bits");
        };
        held(weight.data_type == DataType::Int8 as i32, "levels are signed 8-bit integers")?;
        if scales > 1 {
            let channels = usize::try_from(axis).ok().and_then(|axis| weight.dims.get(axis)).copied();
            held(channels == Some(scales as i64), "a weight has one scale, or one for each index of its axis")?;
        }
        let by_output = |reader: &&NodeProto| match reader.op_type.as_str() {
            "Conv" => reader.input[1] != output || scales == 1 || axis == 0,
            "MatMul" => reader.input[1] != output || scales == 1 || axis == 1,
            _ => true,
        };
        held(readers.iter().all(by_output), "a weight's scales belong to output channels: axis 0 of a Conv's, 1 of a MatMul's")
    }

    /// A scale is a constant of positive numbers.
    fn scales(&self, scale: &str, held: &dyn Fn(bool, &str) -> Result<(), RuleBroken>) -> Result<(), RuleBroken> {
        held(self.constants.contains_key(scale), "its scale must be a constant")?;
        let positive = self.floats(scale).is_some_and(|s| !s.is_empty() && s.iter().all(|s| s.is_finite() && *s > 0.0));
        held(positive, "its scales must be positive 32-bit floats")
    }

    fn zero_point(&self, zero: &str, scale: &str, held: &dyn Fn(bool, &str) -> Result<(), RuleBroken>) -> Result<(), RuleBroken> {
        let constant = self.constants.get(zero);
        held(constant.is_some(), "its zero point must be a constant")?;
        held(
            constant.is_some_and(|zero| zero.data_type == DataType::Int8 as i32),
            "its zero point must be a signed 8-bit integer",
        )?;
        held(self.bytes(zero).is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0)), "its zero point must be zero")?;
        let as_many = constant.map(|zero| count(zero)) == self.constants.get(scale).map(|scale| count(scale));
        held(as_many, "it must have as many zero points as scales")
    }

    fn is_eight_bit(&self, name: &str) -> bool {
        let constant = self.constants.get(name).map(|tensor| tensor.data_type);
        let levels = [DataType::Int8 as i32, DataType::Uint8 as i32];
        constant.is_some_and(|dtype| levels.contains(&dtype))
            || self.makers.get(name).is_some_and(|node| node.op_type == "QuantizeLinear")
    }

    /// Whether a value is a constant in 8 bits behind a `DequantizeLinear`.
    fn is_eight_bit_weight(&self, name: &str) -> bool {
        let maker = self.makers.get(name).filter(|maker| maker.op_type == "DequantizeLinear");
        maker.and_then(|maker| maker.input.first()).is_some_and(|levels| self.constants.contains_key(levels.as_str()))
    }

    fn is_prepared_constant(&self, name: &str) -> bool {
        let maker = self.makers.get(name).filter(|maker| matches!(maker.op_type.as_str(), "DequantizeLinear" | "Cast"));
        let behind = maker.and_then(|maker| maker.input.first());
        self.constants.contains_key(name) || behind.is_some_and(|input| self.constants.contains_key(input.as_str()))
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let float = self.constants.get(name)?.data_type == DataType::Float as i32;
        float.then(|| Some(self.bytes(name)?.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()))?
    }

    fn bytes(&self, name: &str) -> Option<&'a [u8]> {
        let tensor = *self.constants.get(name)?;
        if tensor.data_location != Some(DataLocation::External as i32) {
            return Some(&tensor.raw_data);
        }
        let number = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key)?.value.parse::<usize>().ok();
        let offset = number("offset")?;
        self.weights.get(offset..offset.checked_add(number("length")?)?)
    }
}

fn count(tensor: &TensorProto) -> usize {
    tensor.dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).product()
}

#[cfg(test)]
mod tests {
    use tract_onnx::pb::attribute_proto::AttributeType;
    use tract_onnx::pb::{AttributeProto, OperatorSetIdProto, StringStringEntryProto, ValueInfoProto};

    use super::*;

    fn node(op_type: &str, input: &[&str], output: &str) -> NodeProto {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        NodeProto {
            op_type: op_type.to_owned(),
            name: output.to_owned(),
            input: names(input),
            output: names(&[output]),
            ..NodeProto::default()
        }
    }

    fn with(mut node: NodeProto, name: &str, ints: &[i64]) -> NodeProto {
        let (i, r#type) = (ints.first().copied().unwrap_or_default(), AttributeType::Int as i32);
        node.attribute.push(AttributeProto {
            name: name.to_owned(),
            i,
            ints: ints.to_vec(),
            r#type,
            ..AttributeProto::default()
        });
        node
    }

    fn tensor(name: &str, data_type: DataType, dims: &[i64], raw_data: Vec<u8>) -> TensorProto {
        TensorProto {
            name: name.to_owned(),
            data_type: data_type as i32,
            dims: dims.to_vec(),
            raw_data,
            ..TensorProto::default()
        }
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// A quantized convolution, a quantized product, a Softmax, and an operator of each kind that has rules. The product's scales
    /// lie in the weights' file.
    fn graph() -> ModelProto {
        let mut scales = tensor("w.scale", DataType::Float, &[2], Vec::new());
        scales.data_location = Some(DataLocation::External as i32);
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.to_owned(), value: value.to_owned() };
        scales.external_data = vec![entry("location", "weights.bin"), entry("offset", "4"), entry("length", "8")];
        let graph = GraphProto {
            name: "toy".to_owned(),
            initializer: vec![
                tensor("s", DataType::Float, &[], floats(&[0.5])),
                tensor("z", DataType::Int8, &[], vec![0]),
                tensor("k", DataType::Int8, &[2, 3, 1, 1], vec![1; 6]),
                tensor("k.scale", DataType::Float, &[2], floats(&[0.1, 0.2])),
                tensor("k.bias", DataType::Float, &[2], floats(&[0.0; 2])),
                tensor("w", DataType::Int8, &[4, 2], vec![1; 8]),
                scales,
                tensor("axes", DataType::Int64, &[1], vec![0; 8]),
            ],
            node: vec![
                node("QuantizeLinear", &["x", "s", "z"], "xq"),
                node("DequantizeLinear", &["xq", "s", "z"], "xd"),
                with(node("DequantizeLinear", &["k", "k.scale"], "kd"), "axis", &[0]),
                node("Conv", &["xd", "kd", "k.bias"], "c"),
                with(node("AveragePool", &["c"], "p"), "kernel_shape", &[2, 2]),
                node("QuantizeLinear", &["p", "s", "z"], "pq"),
                node("DequantizeLinear", &["pq", "s", "z"], "pd"),
                with(node("DequantizeLinear", &["w", "w.scale"], "wd"), "axis", &[1]),
                node("MatMul", &["pd", "wd"], "m"),
                node("LayerNormalization", &["m", "k.bias", "k.bias"], "n"),
                node("ReduceSum", &["n", "axes"], "r"),
                with(node("Cast", &["r"], "f"), "to", &[DataType::Float as i64]),
                node("Softmax", &["f"], "y"),
            ],
            output: vec![ValueInfoProto { name: "y".to_owned(), ..ValueInfoProto::default() }],
            ..GraphProto::default()
        };
        let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 17 }];
        ModelProto { graph: Some(graph), opset_import, ..ModelProto::default() }
    }

    fn weights() -> Vec<u8> {
        floats(&[-9.0, 0.25, 0.5])
    }

    #[test]
    fn a_graph_by_the_rules_is_taken() {
        assert_eq!(check(&graph(), &weights()), Ok(()));
    }

    #[test]
    fn each_rule_refuses_what_breaks_it() {
        type Break = fn(&mut GraphProto);
        fn at<'g>(graph: &'g mut GraphProto, name: &str) -> &'g mut NodeProto {
            graph.node.iter_mut().find(|node| node.name == name).unwrap()
        }
        fn constant<'g>(graph: &'g mut GraphProto, name: &str) -> &'g mut TensorProto {
            graph.initializer.iter_mut().find(|tensor| tensor.name == name).unwrap()
        }
        let cases: [(Break, &str); 32] = [
            (|g| at(g, "n").domain = "com.microsoft".into(), "node `n` (LayerNormalization): operators of other domains"),
            (|g| at(g, "m").op_type = "MatMulInteger".into(), "node `m` (MatMulInteger): TensorRT's ONNX parser does not take"),
            (
                |g| at(g, "xq").op_type = "DynamicQuantizeLinear".into(),
                "node `xq` (DynamicQuantizeLinear): TensorRT's ONNX parser",
            ),
            (|g| at(g, "c").op_type = "QLinearConv".into(), "node `c` (QLinearConv): TensorRT's ONNX parser does not take"),
            (|g| drop(at(g, "xq").input.pop()), "node `xq` (QuantizeLinear): without a zero point of type int8"),
            (|g| constant(g, "z").raw_data = vec![3], "node `xq` (QuantizeLinear): its zero point must be zero"),
            (|g| constant(g, "z").data_type = DataType::Uint8 as i32, "its zero point must be a signed 8-bit integer"),
            (|g| at(g, "xq").input[2] = "y".into(), "node `xq` (QuantizeLinear): its zero point must be a constant"),
            (|g| at(g, "xd").input[1] = "c".into(), "node `xd` (DequantizeLinear): its scale must be a constant"),
            (|g| constant(g, "s").raw_data = floats(&[0.0]), "node `xq` (QuantizeLinear): its scales must be positive"),
            (|g| constant(g, "s").raw_data = floats(&[f32::NAN]), "node `xq` (QuantizeLinear): its scales must be positive"),
            (|g| constant(g, "k.scale").data_type = DataType::Float16 as i32, "node `kd` (DequantizeLinear): its scales must be"),
            (|g| constant(g, "w.scale").external_data[1].value = "0".into(), "node `wd` (DequantizeLinear): its scales must be"),
            (|g| at(g, "xq").input[1] = "k.scale".into(), "node `xq` (QuantizeLinear): what is no weight has one scale"),
            (|g| at(g, "kd").input.push("z".into()), "node `kd` (DequantizeLinear): it must have as many zero points as scales"),
            (|g| g.output[0].name = "pq".into(), "node `pq` (QuantizeLinear): 8-bit values are no outputs"),
            (|g| at(g, "p").input[0] = "xq".into(), "node `xq` (QuantizeLinear): its levels are read by DequantizeLinear"),
            (|g| at(g, "r").input[0] = "w".into(), "node `r` (ReduceSum): 8-bit values are read by DequantizeLinear"),
            (|g| at(g, "m").input[1] = "c".into(), "node `pd` (DequantizeLinear): quantized values enter only Conv and MatMul"),
            (|g| at(g, "p").input[0] = "xd".into(), "node `xd` (DequantizeLinear): quantized values enter only Conv and MatMul"),
            (|g| at(g, "pd").input[0] = "c".into(), "node `pd` (DequantizeLinear): its levels must come from a QuantizeLinear"),
            (|g| constant(g, "w").data_type = DataType::Uint8 as i32, "node `wd` (DequantizeLinear): levels are signed"),
            (|g| at(g, "wd").attribute[0].i = 0, "node `wd` (DequantizeLinear): a weight has one scale, or one for each index"),
            (
                |g| {
                    constant(g, "k").dims = vec![2, 2, 1, 1];
                    at(g, "kd").attribute[0].i = 1;
                },
                "node `kd` (DequantizeLinear): a weight's scales belong to output channels",
            ),
            (
                |g| at(g, "c").input = vec!["x".into(), "p".into(), "k.bias".into()],
                "node `c` (Conv): its kernel must be a constant",
            ),
            (|g| at(g, "c").input[2] = "p".into(), "node `c` (Conv): its bias must be a constant"),
            (|g| at(g, "p").attribute[0].ints = vec![2], "node `p` (AveragePool): only pooling over two or three dimensions"),
            (
                |g| {
                    let pool = std::mem::take(at(g, "p"));
                    *at(g, "") = with(pool, "dilations", &[2, 2]);
                },
                "node `p` (AveragePool): dilations must be ones",
            ),
            (|g| at(g, "xd").input.truncate(1), "node `xd` (DequantizeLinear): it needs levels and a scale"),
            (|g| at(g, "n").output.push("mean".into()), "node `n` (LayerNormalization): only its first output"),
            (|g| at(g, "r").input[1] = "x".into(), "node `r` (ReduceSum): its axes must be a constant"),
            (|g| at(g, "f").attribute[0].i = DataType::Int8 as i64, "node `f` (Cast): casts give"),
        ];
        for (break_it, message) in cases {
            let mut model = graph();
            break_it(model.graph.as_mut().unwrap());
            let error = check(&model, &weights()).expect_err(message).to_string();
            assert!(error.contains(message), "{error:?} lacks {message:?}");
        }
    }

    #[test]
    fn nothing_is_quantized_beside_a_softmax() {
        let rule = "node `y` (Softmax): nothing is quantized right before or after a Softmax";
        let mut before = graph();
        let nodes = &mut before.graph.as_mut().unwrap().node;
        nodes.last_mut().unwrap().input[0] = "wd".into();
        assert_eq!(check(&before, &weights()).unwrap_err().to_string(), rule);
        let mut after = graph();
        let nodes = &mut after.graph.as_mut().unwrap().node;
        nodes.push(node("QuantizeLinear", &["y", "s", "z"], "yq"));
        assert_eq!(check(&after, &weights()).unwrap_err().to_string(), rule);
    }

    #[test]
    fn operator_sets_have_bounds() {
        for (domain, version, expected) in [
            ("", 21, Some("operator set 21 is outside 9 to 20")),
            ("", 8, Some("operator set 8 is outside 9 to 20")),
            ("com.microsoft", 1, Some("operators of the domain com.microsoft are not taken")),
            ("", 20, None),
        ] {
            let mut model = graph();
            model.opset_import.push(OperatorSetIdProto { domain: domain.to_owned(), version });
            let error = check(&model, &weights()).err().map(|error| error.to_string());
            assert_eq!(error, expected.map(|rule| format!("node `toy` (graph): {rule}")));
        }
    }
}
