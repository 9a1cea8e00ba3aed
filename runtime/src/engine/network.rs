//! Finds the convolutional backbone in a graph: a chain of inverted residuals from the graph's input on, as MobileNetV2 has them.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{GraphProto, NodeProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto};

use super::onnx::Constant;
use super::operators;
use crate::kernels::{Bottleneck, Depthwise, Matrix, Network, Stem, Weights, round_rows};

/// A part of a graph that is computed before the rest.
pub(super) struct Backbone {
    /// The convolutions.
    pub network: Network,
    /// Number of the graph's input that they read.
    pub input: usize,
}

/// Takes the backbone out of a graph, which reads its result as one more input then, the last. `None`, and nothing changed, where
/// there is none of this form. Of a graph that multiplies in integers elsewhere, its pointwise convolutions do so too, though the file
/// has them in floats: weights are rounded here, pixels as they come.
pub(super) fn take_backbone(graph: &mut GraphProto, constants: &BTreeMap<String, Constant<'_>>) -> Option<Backbone> {
    let in_integers = graph.node.iter().any(operators::multiplies_in_integers);
    let found = graph.input.iter().enumerate().find_map(|(input, value)| {
        let size = picture(value)?;
        let search = Search { graph, constants, in_integers };
        let (network, nodes) = search.network(&value.name, size)?;
        Some((Backbone { network, input }, nodes))
    });
    let (backbone, nodes) = found?;
    let output = graph.node[*nodes.last()?].output[0].clone();
    let nodes: BTreeSet<usize> = nodes.into_iter().collect();
    // What lies inside may be read by nobody else.
    let inner: BTreeSet<&String> = nodes.iter().map(|&n| &graph.node[n].output[0]).filter(|&name| *name != output).collect();
    let others = graph.node.iter().enumerate().filter(|(n, _)| !nodes.contains(n)).flat_map(|(_, node)| &node.input);
    if others.chain(graph.output.iter().map(|output| &output.name)).any(|name| inner.contains(name)) {
        return None;
    }
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
    /// A product of each pixel's channels; in integers if it is to be and that pays.
    fn pointwise(&self, in_integers: bool) -> Option<Matrix> {
        let [outputs, inputs, 1, 1] = self.shape else { return None };
        if self.groups != 1 || self.stride != 1 || self.pads != [0; 4] {
            return None;
        }
        let matrix = |weights: Weights<'_>| Matrix::new(weights, [inputs, outputs], true, Some(&self.bias));
        if !in_integers || inputs.min(outputs) < FEWEST_CHANNELS {
            return matrix(Weights::F32(&self.weight));
        }
        let (levels, scales) = round_rows(&self.weight, inputs);
        matrix(Weights::Integers(&levels, &scales))
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

/// Fewest channels, on either side of a pointwise convolution, with which multiplying in integers saves more than rounding every pixel
/// costs: with 24 and 144 it takes 0.97 of the time (AVX-512 VNNI), with 16 and 96 1.3, with 320 and 1280 0.32.
const FEWEST_CHANNELS: usize = 24;

struct Search<'a> {
    graph: &'a GraphProto,
    constants: &'a BTreeMap<String, Constant<'a>>,
    /// Whether the graph multiplies in integers elsewhere.
    in_integers: bool,
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
                    let expand = next.relu6.and(next.pointwise(self.in_integers))?;
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
            nodes.extend(add);
            value = self.output(add.unwrap_or(project.node));
            let (inner, outer) = (depthwise.depthwise()?, project.pointwise(self.in_integers)?);
            blocks.push(Bottleneck::new(expand, inner, depthwise.stride, outer, add.is_some())?);
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

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use tract_onnx::pb::AttributeProto;

    use super::super::toy::{Attribute, Toy};
    use super::*;
    use crate::bundle::manifest::{Dtype, GraphSignature, TensorSignature};
    use crate::kernels::Scratch;

    /// A stem, a block without expansion, one with, and a last convolution, on pictures of 8 by 8.
    fn toy() -> (GraphProto, BTreeMap<String, Constant<'static>>) {
        let tensor =
            |name: &str, shape: &[usize]| TensorSignature { name: name.to_owned(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let signature = GraphSignature {
            name: "toy".to_owned(),
            inputs: vec![tensor("other", &[1]), tensor("pixels", &[1, 3, 8, 8])],
            outputs: vec![tensor("y", &[1, 32, 2, 2])],
        };
        let convolution = |toy: Toy, x: &str, name: &str, [stride, groups]: [i64; 2], pads: &[i64]| {
            toy.node("Conv", &[x, &format!("{name}.w"), &format!("{name}.b")], name)
                .with("strides", Attribute::Ints(vec![stride; 2]))
                .with("pads", Attribute::Ints(pads.to_vec()))
                .with("group", Attribute::Int(groups))
        };
        let clip = |toy: Toy, x: &str| toy.node("Clip", &[x, "low", "high"], &format!("{x}6"));
        let mut toy = Toy::new(&signature);
        toy = clip(convolution(toy, "pixels", "stem", [2, 1], &[0, 0, 1, 1]), "stem");
        toy = clip(convolution(toy, "stem6", "d0", [1, 16], &[1; 4]), "d0");
        toy = convolution(toy, "d06", "p0", [1, 1], &[0; 4]).node("Add", &["p0", "stem6"], "x1");
        toy = clip(convolution(toy, "x1", "e1", [1, 1], &[0; 4]), "e1");
        toy = clip(convolution(toy, "e16", "d1", [2, 32], &[0, 0, 1, 1]), "d1");
        toy = convolution(toy, "d16", "p1", [1, 1], &[0; 4]);
        toy = clip(convolution(toy, "p1", "head", [1, 1], &[0; 4]), "head").node("Identity", &["head6"], "y");
        let mut constants = BTreeMap::new();
        let mut add = |name: String, dims: &[i64], values: &[f32]| {
            let bytes = Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect());
            constants.insert(name, Constant { dtype: DataType::Float, dims: dims.to_vec(), bytes });
        };
        for (name, dims) in [
            ("stem", [16, 3, 3, 3]),
            ("d0", [16, 1, 3, 3]),
            ("p0", [16, 16, 1, 1]),
            ("e1", [32, 16, 1, 1]),
            ("d1", [32, 1, 3, 3]),
            ("p1", [24, 32, 1, 1]),
            ("head", [32, 24, 1, 1]),
        ] {
            let weights: Vec<f32> = (0..dims.iter().product::<i64>()).map(|i| 0.1 + 0.2 * (i as f32 * 0.7).sin()).collect();
            add(format!("{name}.w"), &dims, &weights);
            add(format!("{name}.b"), &dims[..1], &vec![0.0; dims[0] as usize]);
        }
        add("low".to_owned(), &[], &[0.0]);
        add("high".to_owned(), &[], &[6.0]);
        (toy.model().graph.unwrap(), constants)
    }

    #[test]
    fn a_chain_of_blocks_is_taken_out() {
        let (mut graph, constants) = toy();
        let backbone = take_backbone(&mut graph, &constants).unwrap();
        assert_eq!((backbone.input, backbone.network.output()), (1, [32, 2, 2]));
        assert_eq!(graph.node.len(), 1);
        assert_eq!((graph.input.len(), graph.input[2].name.as_str()), (3, "head6"));
    }

    #[test]
    fn a_graph_that_multiplies_in_integers_does_so_in_its_backbone() {
        let pixels: Vec<f32> = (0..3 * 64).map(|i| (i as f32 * 0.31).sin()).collect();
        let run = |integers: i64| {
            let (mut graph, constants) = toy();
            let flag = AttributeProto { name: "integers".to_owned(), i: integers, ..AttributeProto::default() };
            graph.node.push(NodeProto {
                op_type: operators::LINEAR.to_owned(),
                input: vec!["other".to_owned()],
                output: vec!["z".to_owned()],
                attribute: vec![flag],
                ..NodeProto::default()
            });
            take_backbone(&mut graph, &constants).unwrap().network.run(&pixels, &mut Scratch::default())
        };
        let (floats, integers) = (run(0), run(1));
        let most = floats.iter().fold(0f32, |most, value| most.max(*value));
        let error = floats.iter().zip(&integers).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / most;
        assert!(most > 1.0 && error > 1e-5 && error < 0.02, "{error} of {most}");
    }

    #[test]
    fn other_forms_are_left_alone() {
        type Break = fn(&mut GraphProto, &mut BTreeMap<String, Constant<'static>>);
        fn node<'a>(graph: &'a mut GraphProto, output: &str) -> &'a mut NodeProto {
            graph.node.iter_mut().find(|node| node.output[0] == output).unwrap()
        }
        let cases: [Break; 5] = [
            |g, _| node(g, "d0").attribute[1].ints = vec![0, 0, 1, 1],
            |g, _| node(g, "stem").attribute[0].ints = vec![2, 1],
            |g, _| node(g, "y").input[0] = "p1".to_owned(),
            |_, c| c.get_mut("high").unwrap().bytes = Cow::Owned(8f32.to_le_bytes().to_vec()),
            |_, c| drop(c.remove("p0.w")),
        ];
        for (i, break_it) in cases.into_iter().enumerate() {
            let (mut graph, mut constants) = toy();
            break_it(&mut graph, &mut constants);
            let before = graph.clone();
            // What is read from inside is no longer there once the chain is taken out: only what ends it may be.
            let taken = take_backbone(&mut graph, &constants);
            assert!(taken.is_none() && graph == before, "case {i}");
        }
    }
}
