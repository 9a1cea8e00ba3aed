//! Ways through a graph, and the parts that all attention is made of as the exporter writes it.

use std::collections::BTreeMap;

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{GraphProto, NodeProto, type_proto};

use super::{Constants, readers};

/// A graph that is looked through.
pub(super) struct Search<'a> {
    pub graph: &'a GraphProto,
    pub constants: &'a Constants<'a>,
    makers: BTreeMap<&'a str, &'a NodeProto>,
    pub readers: BTreeMap<String, Vec<usize>>,
}

/// Queries, keys and values of a layer's tokens, side by side in one value.
pub(super) struct Stacked<'a> {
    pub qkv: &'a str,
    /// `[heads, depth]`.
    pub heads: [i64; 2],
}

impl Stacked<'_> {
    pub fn hidden(&self) -> i64 {
        self.heads[0] * self.heads[1]
    }
}

/// A part of them.
struct Part<'a> {
    qkv: &'a str,
    start: i64,
    end: i64,
    /// `[heads, depth]`.
    heads: [i64; 2],
}

impl<'a> Search<'a> {
    pub fn new(graph: &'a GraphProto, constants: &'a Constants<'a>) -> Self {
        let makers = graph.node.iter().flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node))).collect();
        Self { graph, constants, makers, readers: readers(graph) }
    }

    /// Queries, keys and values, each `[heads, rows, depth]`, as thirds of one value in this order.
    pub fn stacked(&self, values: [&str; 3]) -> Option<Stacked<'a>> {
        let [query, key, value] = values.map(|value| self.part(value));
        let (query, key, value) = (query?, key?, value?);
        let stacked = Stacked { qkv: query.qkv, heads: query.heads };
        let hidden = stacked.hidden();
        let third = |(part, number): (&Part<'_>, i64)| {
            part.qkv == query.qkv && (part.start, part.end, part.heads) == (number * hidden, (number + 1) * hidden, query.heads)
        };
        [(&query, 0), (&key, 1), (&value, 2)].into_iter().all(third).then_some(stacked)
    }

    /// Columns of the stacked queries, keys and values, as `[heads, rows, depth]`.
    fn part(&self, value: &str) -> Option<Part<'a>> {
        let turned = self.made(value, "Transpose").filter(|node| order(node) == [1, 0, 2])?;
        let shaped = self.made(&turned.input[0], "Reshape")?;
        let &[_, heads, depth] = self.integers(&shaped.input[1])?.as_slice() else { return None };
        let (qkv, axis, start, end) = self.slice(self.made(&shaped.input[0], "Slice")?)?;
        (axis == 1).then_some(Part { qkv, start, end, heads: [heads, depth] })
    }

    /// The node that gives a value `[heads, rows, depth]` as `[rows, hidden]`, if it alone reads it.
    pub fn side_by_side(&self, value: &str, hidden: i64) -> Option<usize> {
        let (_, turned) = self.only_reader(value)?;
        let (at, shaped) = self.only_reader(&turned.output[0])?;
        let target = (shaped.op_type == "Reshape").then(|| self.integers(&shaped.input[1])).flatten()?;
        (turned.op_type == "Transpose" && order(turned) == [1, 0, 2] && matches!(target[..], [_, width] if width == hidden))
            .then_some(at)
    }

    /// The node that makes a value, if it is of this operator.
    pub fn made(&self, value: &str, operator: &str) -> Option<&'a NodeProto> {
        self.makers.get(value).copied().filter(|node| node.op_type == operator)
    }

    /// The place of the one node that reads a value, and the node.
    pub fn only_reader(&self, value: &str) -> Option<(usize, &'a NodeProto)> {
        super::only_reader(&self.readers, value).map(|at| (at, &self.graph.node[at]))
    }

    /// A slice along one axis in steps of 1: what of, the axis, from where, to where.
    pub fn slice(&self, node: &'a NodeProto) -> Option<(&'a str, i64, i64, i64)> {
        let [x, starts, ends, axes] = node.input.as_slice() else { return None };
        let one = |name: &str| match self.integers(name)?.as_slice() {
            &[number] => Some(number),
            _ => None,
        };
        (node.op_type == "Slice").then_some((x.as_str(), one(axes)?, one(starts)?, one(ends)?))
    }

    /// A constant of integers.
    pub fn integers(&self, name: &str) -> Option<Vec<i64>> {
        let constant = self.constants.get(name).filter(|constant| constant.dtype == DataType::Int64)?;
        Some(constant.bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect())
    }

    /// A constant of one float.
    pub fn number(&self, name: &str) -> Option<f32> {
        super::number(self.constants, name)
    }

    /// Sizes of an input of the graph with so many axes.
    pub fn input_dims<const AXES: usize>(&self, name: &str) -> Option<[i64; AXES]> {
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
pub(super) fn other<'a>(node: &'a NodeProto, one: &str) -> Option<&'a str> {
    match node.input.as_slice() {
        [a, b] if a == one => Some(b),
        [a, b] if b == one => Some(a),
        _ => None,
    }
}

/// The order of axes that a `Transpose` names.
pub(super) fn order(node: &NodeProto) -> &[i64] {
    node.attribute.iter().find(|attribute| attribute.name == "perm").map_or(&[], |perm| &perm.ints)
}

/// Whether a node works along the last of three axes.
pub(super) fn last_axis(node: &NodeProto) -> bool {
    node.attribute.iter().any(|attribute| attribute.name == "axis" && matches!(attribute.i, -1 | 2))
}
