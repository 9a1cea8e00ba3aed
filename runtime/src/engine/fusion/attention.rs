//! Attention over stacked caches, as the exporter writes it for `decode`: found whole, and computed by one [`ATTENTION`] node that
//! reads the caches where they lie. tract would cut each layer's part out of them, and lay it out anew, at every step.

use std::collections::BTreeMap;

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto, attribute_proto::AttributeType, type_proto};

use super::super::tract::ATTENTION;
use super::{Constants, drop_unread, node_of, readers};

/// Fuses every such attention; leaves alone what differs from it in anything.
pub(in crate::engine) fn fuse_attention(graph: &mut GraphProto, constants: &Constants<'_>) {
    let found = {
        let search = Search::new(graph, constants);
        let softmaxes = graph.node.iter().filter(|node| node.op_type == "Softmax");
        softmaxes.filter_map(|softmax| search.attention(softmax)).collect::<Vec<_>>()
    };
    for (at, node) in found {
        graph.node[at] = node;
    }
    drop_unread(graph);
}

struct Search<'a> {
    graph: &'a GraphProto,
    constants: &'a Constants<'a>,
    makers: BTreeMap<&'a str, &'a NodeProto>,
    readers: BTreeMap<String, Vec<usize>>,
}

/// Part of the stacked queries, keys and values of a layer's tokens.
struct Part<'a> {
    qkv: &'a str,
    start: i64,
    end: i64,
    /// `[heads, depth]`.
    heads: [i64; 2],
}

impl<'a> Search<'a> {
    fn new(graph: &'a GraphProto, constants: &'a Constants<'a>) -> Self {
        let makers = graph.node.iter().flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node))).collect();
        Self { graph, constants, makers, readers: readers(graph) }
    }

    /// The place of the last node of the attention around a softmax, and what computes all of it.
    fn attention(&self, softmax: &NodeProto) -> Option<(usize, NodeProto)> {
        let joined = self.made(&softmax.input[0], "Concat")?;
        let [of_prefix, of_self, of_past] = joined.input.as_slice() else { return None };
        if !(last_axis(softmax) && last_axis(joined)) {
            return None;
        }
        let (query, prefix_keys, layer) = self.scores(of_prefix)?;
        let sum = self.made(of_self, "ReduceSum")?;
        if self.integers(sum.input.get(1)?)? != [-1] {
            return None;
        }
        let key = other(self.made(&sum.input[0], "Mul")?, query)?;
        let masked = self.made(of_past, "Add")?;
        let (scores, mask) = (&masked.input[0], &masked.input[1]);
        let (past_query, past_keys, past_layer) = self.scores(scores)?;
        if past_query != query || past_layer != layer {
            return None;
        }
        let scaled = self.made(query, "Mul")?;
        let (query, scale) = (&scaled.input[0], self.number(&scaled.input[1])?);

        // What the shares are multiplied with.
        let tokens = self.input_dims(prefix_keys)?[2];
        let (mut prefix_values, mut value, mut past_values, mut sums) = (None, None, None, Vec::new());
        for &reader in self.readers.get(&softmax.output[0])? {
            let slice = &self.graph.node[reader];
            let (_, axis, start, end) = self.slice(slice)?;
            let (_, product) = self.only_reader(&slice.output[0])?;
            sums.push(product.output[0].as_str());
            let factor = other(product, &slice.output[0])?;
            match (product.op_type.as_str(), axis, start) {
                ("MatMul", 2, 0) if end == tokens => prefix_values = Some(self.of_layer(factor)?),
                ("Mul", 2, start) if start == tokens && end == tokens + 1 => value = Some(factor),
                ("MatMul", 2, start) if start == tokens + 1 && end == i64::MAX => past_values = Some(self.of_layer(factor)?),
                _ => return None,
            }
        }
        let ((prefix_values, prefix_layer), (past_values, values_layer)) = (prefix_values?, past_values?);
        if [prefix_layer, values_layer] != [layer; 2] {
            return None;
        }
        let [query, key, value] = [query, key, value?].map(|value| self.part(value));
        let (query, key, value) = (query?, key?, value?);
        let hidden = query.heads[0] * query.heads[1];
        for (part, start) in [(&query, 0), (&key, hidden), (&value, 2 * hidden)] {
            if part.qkv != query.qkv || (part.start, part.end, part.heads) != (start, start + hidden, query.heads) {
                return None;
            }
        }
        for cache in [prefix_keys, prefix_values, past_keys, past_values] {
            let dims = self.input_dims(cache)?;
            if [dims[1], dims[3]] != query.heads {
                return None;
            }
        }
        let last = self.last(&sums, hidden)?;
        let inputs = [query.qkv, prefix_keys, prefix_values, past_keys, past_values, mask];
        let attributes = vec![
            AttributeProto { name: "layer".into(), i: layer, r#type: AttributeType::Int as i32, ..AttributeProto::default() },
            AttributeProto { name: "scale".into(), f: scale, r#type: AttributeType::Float as i32, ..AttributeProto::default() },
        ];
        Some((last, node_of(ATTENTION, &inputs, &self.graph.node[last].output[0], attributes)))
    }

    /// `query · keysᵀ` with keys of a layer of a stacked cache: the query, the cache, the layer.
    fn scores(&self, value: &str) -> Option<(&'a str, &'a str, i64)> {
        let product = self.made(value, "MatMul")?;
        let turned = self.made(&product.input[1], "Transpose")?;
        let (cache, layer) = self.of_layer(&turned.input[0])?;
        (order(turned) == [0, 2, 1]).then_some((product.input[0].as_str(), cache, layer))
    }

    /// A layer's part of a stacked cache.
    fn of_layer(&self, value: &str) -> Option<(&'a str, i64)> {
        let shaped = self.made(value, "Reshape")?;
        let (cache, axis, start, end) = self.slice(self.made(&shaped.input[0], "Slice")?)?;
        let dims = self.input_dims(cache)?;
        let target = self.integers(&shaped.input[1])?;
        let whole = target.iter().zip(&dims[1..]).all(|(target, dim)| *target == -1 || target == dim);
        (axis == 0 && end == start + 1 && target.len() == 3 && whole).then_some((cache, start))
    }

    /// Columns of the stacked queries, keys and values, as `[heads, rows, depth]`.
    fn part(&self, value: &str) -> Option<Part<'a>> {
        let turned = self.made(value, "Transpose").filter(|node| order(node) == [1, 0, 2])?;
        let shaped = self.made(&turned.input[0], "Reshape")?;
        let &[_, heads, depth] = self.integers(&shaped.input[1])?.as_slice() else { return None };
        let (qkv, axis, start, end) = self.slice(self.made(&shaped.input[0], "Slice")?)?;
        (axis == 1).then_some(Part { qkv, start, end, heads: [heads, depth] })
    }

    /// The node that gives the three values' sum as `[rows, hidden]`.
    fn last(&self, parts: &[&str], hidden: i64) -> Option<usize> {
        let &[first, second, third] = parts else { return None };
        let adds = |a: &str, b: &str| self.only_reader(a).filter(|(_, node)| node.op_type == "Add" && other(node, a) == Some(b));
        let pairs = [(first, second, third), (first, third, second), (second, third, first)];
        let (_, sum) = pairs.into_iter().find_map(|(a, b, c)| {
            let (_, sum) = adds(a, b)?;
            adds(&sum.output[0], c)
        })?;
        let (_, turned) = self.only_reader(&sum.output[0])?;
        let (at, shaped) = self.only_reader(&turned.output[0])?;
        let target = (shaped.op_type == "Reshape").then(|| self.integers(&shaped.input[1])).flatten()?;
        (turned.op_type == "Transpose" && order(turned) == [1, 0, 2] && matches!(target[..], [_, width] if width == hidden))
            .then_some(at)
    }

    fn made(&self, value: &str, operator: &str) -> Option<&'a NodeProto> {
        self.makers.get(value).copied().filter(|node| node.op_type == operator)
    }

    fn only_reader(&self, value: &str) -> Option<(usize, &'a NodeProto)> {
        super::only_reader(&self.readers, value).map(|at| (at, &self.graph.node[at]))
    }

    /// A slice along one axis in steps of 1: what of, the axis, from where, to where.
    fn slice(&self, node: &'a NodeProto) -> Option<(&'a str, i64, i64, i64)> {
        let [x, starts, ends, axes] = node.input.as_slice() else { return None };
        let one = |name: &str| match self.integers(name)?.as_slice() {
            &[number] => Some(number),
            _ => None,
        };
        (node.op_type == "Slice").then_some((x.as_str(), one(axes)?, one(starts)?, one(ends)?))
    }

    fn integers(&self, name: &str) -> Option<Vec<i64>> {
        let constant = self.constants.get(name).filter(|constant| constant.dtype == DataType::Int64)?;
        Some(constant.bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect())
    }

    fn number(&self, name: &str) -> Option<f32> {
        super::number(self.constants, name)
    }

    /// Sizes of an input of the graph with four axes.
    fn input_dims(&self, name: &str) -> Option<[i64; 4]> {
        let input = self.graph.input.iter().find(|input| input.name == name)?;
        let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_ref()?.value.as_ref() else { return None };
        let dims = tensor.shape.as_ref()?.dim.iter().map(|dim| match dim.value {
            Some(dimension::Value::DimValue(size)) => Some(size),
            _ => None,
        });
        dims.collect::<Option<Vec<_>>>()?.try_into().ok()
    }
}

/// The other of a node's two inputs.
fn other<'a>(node: &'a NodeProto, one: &str) -> Option<&'a str> {
    match node.input.as_slice() {
        [a, b] if a == one => Some(b),
        [a, b] if b == one => Some(a),
        _ => None,
    }
}

fn order(node: &NodeProto) -> &[i64] {
    node.attribute.iter().find(|attribute| attribute.name == "perm").map_or(&[], |perm| &perm.ints)
}

/// Whether a node works along the last of three axes.
fn last_axis(node: &NodeProto) -> bool {
    node.attribute.iter().any(|attribute| attribute.name == "axis" && matches!(attribute.i, -1 | 2))
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tract_onnx::pb::ModelProto;

    use super::super::super::toy::{Attribute, Toy};
    use super::super::super::tract::Tract;
    use super::super::super::{Engine, GraphSource, Tensor, onnx};
    use super::*;
    use crate::bundle::manifest::{Dtype, GraphSignature, Sizes, TensorSignature};
    use crate::kernels;

    const SIZES: Sizes = Sizes { hypotheses: 2, slots: 4 };

    fn signature() -> GraphSignature {
        let tensor =
            |name: &str, shape: &[usize]| TensorSignature { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let (prefix, past) = ([2, 2, 3, 2], [2, 2, 4, 2]);
        let inputs = vec![
            tensor("qkv", &[2, 12]),
            tensor("prefix_keys", &prefix),
            tensor("prefix_values", &prefix),
            tensor("past_keys", &past),
            tensor("past_values", &past),
            tensor("mask", &[2, 4]),
        ];
        GraphSignature { name: "toy".into(), inputs, outputs: vec![tensor("y", &[2, 4])] }
    }

    /// Layer 1 of two, two heads of depth 2, as the exporter writes it.
    fn model() -> ModelProto {
        let mut toy = Toy::new(&signature());
        for number in [0, 1, 2, 3, 4, 8, 12, -1, i64::MAX] {
            toy = toy.constant(&format!("{number}"), &[number]);
        }
        toy = toy.constant("heads", &[-1, 2, 2]).constant("prefix", &[2, 3, 2]).constant("past", &[2, -1, 2]);
        toy = toy.constant("joined", &[-1, 4]).floats("half", &[1], &[0.5]);
        let order = |of: [i64; 3]| Attribute::Ints(of.to_vec());
        for (name, start, end) in [("q", "0", "4"), ("k", "4", "8"), ("v", "8", "12")] {
            let [columns, shaped] = ["columns", "shaped"].map(|part| format!("{name}/{part}"));
            toy = toy
                .node("Slice", &["qkv", start, end, "1"], &columns)
                .node("Reshape", &[&columns, "heads"], &shaped)
                .node("Transpose", &[&shaped], name)
                .with("perm", order([1, 0, 2]));
        }
        for (name, shape) in
            [("prefix_keys", "prefix"), ("prefix_values", "prefix"), ("past_keys", "past"), ("past_values", "past")]
        {
            let [one, layer] = ["one", "layer"].map(|part| format!("{name}/{part}"));
            toy = toy.node("Slice", &[name, "1", "2", "0"], &one).node("Reshape", &[&one, shape], &layer);
        }
        let last = || Attribute::Int(-1);
        toy.node("Mul", &["q", "half"], "query")
            .node("Transpose", &["prefix_keys/layer"], "pk")
            .with("perm", order([0, 2, 1]))
            .node("MatMul", &["query", "pk"], "of_prefix")
            .node("Mul", &["query", "k"], "product")
            .node("ReduceSum", &["product", "-1"], "of_self")
            .with("keepdims", Attribute::Int(1))
            .node("Transpose", &["past_keys/layer"], "sk")
            .with("perm", order([0, 2, 1]))
            .node("MatMul", &["query", "sk"], "scores")
            .node("Add", &["scores", "mask"], "of_past")
            .node("Concat", &["of_prefix", "of_self", "of_past"], "all")
            .with("axis", Attribute::Int(2))
            .node("Softmax", &["all"], "p")
            .with("axis", last())
            .node("Slice", &["p", "0", "3", "2"], "to_prefix")
            .node("Slice", &["p", "3", "4", "2"], "to_self")
            .node("Slice", &["p", "4", "9223372036854775807", "2"], "to_past")
            .node("MatMul", &["to_prefix", "prefix_values/layer"], "from_prefix")
            .node("Mul", &["to_self", "v"], "from_self")
            .node("MatMul", &["to_past", "past_values/layer"], "from_past")
            .node("Add", &["from_prefix", "from_self"], "sum")
            .node("Add", &["sum", "from_past"], "total")
            .node("Transpose", &["total"], "turned")
            .with("perm", order([1, 0, 2]))
            .node("Reshape", &["turned", "joined"], "y")
            .model()
    }

    fn run(model: &ModelProto) -> (Vec<f32>, usize) {
        let (signature, onnx) = (signature(), model.encode_to_vec());
        let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        let fused = parsed.node.iter().filter(|node| node.op_type == ATTENTION).count();
        let numbers = |(seed, input): (usize, &TensorSignature)| {
            let count = input.shape.iter().product::<usize>();
            let number = |i: usize| ((i * 7 + seed * 3) as f32).sin();
            let hidden = |i: usize| if (i + i / 4).is_multiple_of(2) { -1e4 } else { 0.0 };
            let values = (0..count).map(|i| if input.name == "mask" { hidden(i) } else { number(i) }).collect();
            Tensor::f32(&input.shape, values).unwrap()
        };
        let tensors: Vec<Tensor> = signature.inputs.iter().enumerate().map(numbers).collect();
        let inputs: Vec<(&str, &Tensor)> = signature.inputs.iter().map(|input| input.name.as_str()).zip(&tensors).collect();
        let outputs = Tract::new(1).unwrap().load(&source).unwrap().run(&inputs).unwrap();
        (outputs[0].floats().to_vec(), fused)
    }

    fn node<'a>(model: &'a mut ModelProto, output: &str) -> &'a mut NodeProto {
        model.graph.as_mut().unwrap().node.iter_mut().find(|node| node.output[0] == output).unwrap()
    }

    #[test]
    fn attention_over_caches_is_one_operator_and_gives_the_same() {
        let (found, fused) = run(&model());
        // Something in between that another node reads too: left to tract.
        let mut shared = model();
        let y = node(&mut shared, "y").clone();
        let graph = shared.graph.as_mut().unwrap();
        *graph.node.last_mut().unwrap() = NodeProto { output: vec!["z".into()], ..y };
        graph.node.push(node_of("ReduceMax", &["p"], "most", vec![]));
        graph.node.push(node_of("Min", &["most", "zero"], "none", vec![]));
        graph.node.push(node_of("Add", &["z", "none"], "same", vec![]));
        graph.node.push(node_of("Reshape", &["same", "joined"], "y", vec![]));
        let mut zero = graph.initializer.iter().find(|tensor| tensor.name == "half").unwrap().clone();
        (zero.name, zero.raw_data) = ("zero".into(), vec![0; 4]);
        graph.initializer.push(zero);
        let (expected, unfused) = run(&shared);
        assert_eq!((fused, unfused), (usize::from(kernels::available()), 0));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn what_differs_in_anything_is_left_alone() {
        type Change = fn(&mut ModelProto);
        let changes: [(&str, Change); 9] = [
            ("another layer's values", |m| node(m, "past_values/one").input[1..3].clone_from_slice(&["0".into(), "1".into()])),
            ("a cache that is no input", |m| node(m, "past_values/one").input[0] = "past_values/half".into()),
            ("keys as values", |m| node(m, "from_self").input[1] = "k".into()),
            ("another query", |m| node(m, "scores").input[0] = "q".into()),
            ("queries from elsewhere", |m| node(m, "q/columns").input[1..3].clone_from_slice(&["4".into(), "8".into()])),
            ("a product more", |m| node(m, "total").input[0] = "from_prefix".into()),
            ("a difference", |m| node(m, "sum").op_type = "Sub".into()),
            ("a softmax over heads", |m| node(m, "p").attribute[0].i = 0),
            ("rows in another order", |m| node(m, "turned").attribute[0].ints = vec![1, 2, 0]),
        ];
        let usual = run(&model()).0;
        for (what, change) in changes {
            let mut model = model();
            let half = node_of("Mul", &["past_values", "half"], "past_values/half", vec![]);
            model.graph.as_mut().unwrap().node.insert(0, half);
            change(&mut model);
            let (found, fused) = run(&model);
            assert_eq!(fused, 0, "{what}");
            assert_ne!(found, usual, "{what}");
        }
    }
}
