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
