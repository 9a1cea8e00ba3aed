//! Finds the convolutional backbone in a graph: a chain of inverted residuals from the graph's input on, as MobileNetV2 has them.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{GraphProto, NodeProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto};

use super::onnx::Constant;
use crate::kernels::{Bottleneck, Depthwise, Matrix, Network, Stem, Weights};

/// A part of a graph that is computed before the rest.
pub(super) struct Backbone {
    /// The convolutions.
    pub network: Network,
    /// Number of the graph's input that they read.
    pub input: usize,
}

/// Takes the backbone out of a graph, which reads its result as one more input then, the last. `None`, and nothing changed, where
/// there is none of this form.
pub(super) fn take_backbone(graph: &mut GraphProto, constants: &BTreeMap<String, Constant<'_>>) -> Option<Backbone> {
    let found = graph.input.iter().enumerate().find_map(|(input, value)| {
        let size = picture(value)?;
        let search = Search { graph, constants };
        let (network, nodes) = search.network(&value.name, size)?;
        Some((Backbone { network, input }, nodes))
    });
    let (backbone, nodes) = found?;
    let output = graph.node[*nodes.last()?].output[0].clone();
    let nodes: BTreeSet<usize> = nodes.into_iter().collect();
    let mut at = 0;
    graph.node.retain(|_| {
        at += 1;
        !nodes.contains(&(at - 1))
    });
    let [channels, height, width] = backbone.network.output();
    graph.input.push(floats(&output, &[1, channels, height, width]));
    Some(backbone)
}

/// Height and width of an input `[1, 3, height, width]`.
fn picture(value: &ValueInfoProto) -> Option<[usize; 2]> {
    let type_proto::Value::TensorType(tensor) = value.r#type.as_ref()?.value.as_ref()?;
    let size = |dim: &Dimension| match dim.value {
        Some(dimension::Value::DimValue(size)) => usize::try_from(size).ok(),
        _ => None,
    };
    let sizes: Vec<usize> = tensor.shape.as_ref()?.dim.iter().map(size).collect::<Option<_>>()?;
    match sizes.as_slice() {
        &[1, 3, height, width] => Some([height, width]),
        _ => None,
    }
}

fn floats(name: &str, shape: &[usize]) -> ValueInfoProto {
    let dim =
        shape.iter().map(|&size| Dimension { value: Some(dimension::Value::DimValue(size as i64)), ..Dimension::default() });
    let tensor = type_proto::Tensor { elem_type: DataType::Float as i32, shape: Some(TensorShapeProto { dim: dim.collect() }) };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}

/// A convolution of the graph.
struct Convolution {
    node: usize,
    /// The `Clip` to 0 … 6 that alone reads it, if there is one.
    relu6: Option<usize>,
    weight: Vec<f32>,
    /// `[outputs, inputs of a group, height, width]`.
    shape: [usize; 4],
    bias: Vec<f32>,
    stride: usize,
    pads: [i64; 4],
    groups: usize,
}

impl Convolution {
    fn pointwise(&self) -> Option<Matrix> {
        let [outputs, inputs, 1, 1] = self.shape else { return None };
        let plain = self.groups == 1 && self.stride == 1 && self.pads == [0; 4];
        plain.then(|| Matrix::new(Weights::F32(&self.weight), [inputs, outputs], true, Some(&self.bias))).flatten()
    }

    fn depthwise(&self) -> Option<Depthwise> {
        let pads = if self.stride == 1 { [1; 4] } else { [0, 0, 1, 1] };
        let plain = self.shape[1..] == [1, 3, 3] && self.groups == self.shape[0] && self.pads == pads;
        plain.then(|| Depthwise::new(&self.weight, &self.bias)).flatten()
    }

    fn stem(&self) -> Option<Stem> {
        let [outputs, channels, 3, 3] = self.shape else { return None };
        let plain = self.groups == 1 && self.stride == 2 && self.pads == [0, 0, 1, 1];
        let kernel = Matrix::new(Weights::F32(&self.weight), [9 * channels, outputs], true, Some(&self.bias))?;
        plain.then(|| Stem::new(channels, kernel)).flatten()
    }

    /// The node whose output goes on.
    fn last(&self) -> usize {
        self.relu6.unwrap_or(self.node)
    }

    fn nodes(&self) -> impl Iterator<Item = usize> {
        [self.node].into_iter().chain(self.relu6)
    }
}

struct Search<'a> {
    graph: &'a GraphProto,
    constants: &'a BTreeMap<String, Constant<'a>>,
}

impl Search<'_> {
    /// The network that reads a value, and its nodes in order.
    fn network(&self, input: &str, size: [usize; 2]) -> Option<(Network, Vec<usize>)> {
        let first = self.convolution_of(input)?;
        first.relu6?;
        let stem = first.stem()?;
        let mut nodes: Vec<usize> = first.nodes().collect();
        let mut blocks = Vec::new();
        let mut value = self.output(first.last());
        loop {
            let next = self.convolution_of(value)?;
            let (expand, depthwise) = match next.depthwise() {
                Some(_) => (None, next),
                None => {
                    let expand = next.relu6.and(next.pointwise())?;
                    nodes.extend(next.nodes());
                    let value = self.output(next.last());
                    match self.convolution_of(value).filter(|inner| inner.depthwise().is_some()) {
                        Some(depthwise) => (Some(expand), depthwise),
                        // Nothing convolves what the last one gives.
                        None => return Some((Network::new(size, stem, blocks, expand)?, nodes)),
                    }
                }
            };
            depthwise.relu6?;
            let project = self.convolution_of(self.output(depthwise.last()))?;
            if project.relu6.is_some() {
                return None;
            }
            nodes.extend(depthwise.nodes().chain(project.nodes()));
            let projected = self.output(project.node);
            let add = self.readers(projected).find(|&n| {
                let node = &self.graph.node[n];
                node.op_type == "Add" && node.input.iter().any(|input| input == value)
            });
            // What a block holds inside may be read by nobody else.
            let alone = self.readers(projected).count() == 1;
            nodes.extend(add);
            let residual = add.is_some() && alone;
            value = self.output(add.unwrap_or(project.node));
            blocks.push(Bottleneck::new(expand, depthwise.depthwise()?, depthwise.stride, project.pointwise()?, residual)?);
            if add.is_some() && !alone {
                return None;
            }
        }
    }

    fn output(&self, node: usize) -> &str {
        &self.graph.node[node].output[0]
    }

    fn readers<'s>(&'s self, value: &'s str) -> impl Iterator<Item = usize> + 's {
        let reads = move |node: &NodeProto| node.input.iter().any(|input| input == value);
        self.graph.node.iter().enumerate().filter(move |(_, node)| reads(node)).map(|(n, _)| n)
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let constant = self.constants.get(name).filter(|constant| constant.dtype == DataType::Float)?;
        Some(constant.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    /// The one convolution that reads a value.
    fn convolution_of(&self, value: &str) -> Option<Convolution> {
        let mut readers = self.readers(value).filter(|&n| self.graph.node[n].op_type == "Conv");
        let (at, None) = (readers.next()?, readers.next()) else { return None };
        let node = &self.graph.node[at];
        let [_, weight, bias] = node.input.as_slice() else { return None };
        let ints = |name: &str| node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.as_slice());
        let shape: Vec<usize> =
            self.constants.get(weight)?.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        let stride = match ints("strides") {
            None => 1,
            Some(&[a, b]) if a == b => usize::try_from(a).ok()?,
            Some(_) => return None,
        };
        if ints("dilations").is_some_and(|d| d != [1, 1]) || node.attribute.iter().any(|a| a.name == "auto_pad") {
            return None;
        }
        let relu6 = {
            let mut readers = self.readers(&node.output[0]);
            let (first, second) = (readers.next(), readers.next());
            first.filter(|&n| second.is_none() && self.is_relu6(&self.graph.node[n]))
        };
        Some(Convolution {
            node: at,
            relu6,
            weight: self.floats(weight)?,
            shape: shape.try_into().ok()?,
            bias: self.floats(bias)?,
            stride,
            pads: ints("pads").unwrap_or(&[0; 4]).try_into().ok()?,
            groups: node.attribute.iter().find(|a| a.name == "group").map_or(Some(1), |a| usize::try_from(a.i).ok())?,
        })
    }

    fn is_relu6(&self, node: &NodeProto) -> bool {
        let [_, low, high] = node.input.as_slice() else { return false };
        node.op_type == "Clip" && self.floats(low).as_deref() == Some(&[0.0]) && self.floats(high).as_deref() == Some(&[6.0])
    }
}
