//! Parts of a graph that our own kernels compute: found in the ONNX file, before an engine sees it.
//!
//! - Products of rows with a constant matrix, with the bias and the GELU that follow: one [`LINEAR`] node. Weights of 8 and of 4 bits
//!   stay so; where the graph multiplies in integers, so does the node.
//! - Rows of an 8-bit table: gathered as they are stored, and scaled then.
//! - Attention over stacked caches ([`attention`]), and of rows over each other ([`self_attention`]).
//! - LayerNorm with the sum before it ([`normalize`]).

mod attention;
mod normalize;
mod search;
mod self_attention;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, GraphProto, NodeProto, TensorProto, attribute_proto::AttributeType};

pub(super) use self::attention::fuse_attention;
pub(super) use self::normalize::fuse_norms;
pub(super) use self::self_attention::fuse_self_attention;
use super::blocks::Product;
use super::onnx::Constant;
use super::operators::LINEAR;

type Constants<'a> = BTreeMap<String, Constant<'a>>;

/// An 8-bit matrix behind a `DequantizeLinear`, and perhaps a `Transpose`.
#[derive(Clone)]
struct Levels {
    levels: String,
    scales: String,
    axis: i64,
    transposed: bool,
}

/// Fuses what stays in 8 bits; before constants are folded, which expands them.
pub(super) fn fuse_levels(graph: &mut GraphProto, constants: &mut Constants<'_>) {
    let known = levels(graph, constants);
    for at in 0..graph.node.len() {
        let node = &graph.node[at];
        match (node.op_type.as_str(), node.input.as_slice()) {
            ("MatMul", [x, w]) => {
                // A scale for each output.
                let Some(w) = known.get(w).filter(|w| w.axis == if w.transposed { 0 } else { 1 }) else { continue };
                let (Some(levels), Some(scales)) = (constants.get(&w.levels), constants.get(&w.scales)) else { continue };
                let (x, output) = (x.clone(), node.output[0].clone());
                let weight = [tensor("weight", levels), tensor("scales", scales), flag("transposed", w.transposed)];
                graph.node[at] = linear(x, output, weight.into());
            }
            ("Gather", [table, ids]) => {
                let Some(table) = known.get(table).filter(|w| w.axis == 0 && !w.transposed) else { continue };
                let (rows, ids, output) = (table.levels.clone(), ids.clone(), node.output[0].clone());
                let Some(scales) = constants.get(&table.scales) else { continue };
                let column = Constant { dims: vec![scales.dims[0], 1], dtype: scales.dtype, bytes: scales.bytes.clone() };
                let name = |part: &str| format!("{output}/{part}");
                constants.insert(name("scales"), column);
                graph.node[at] = node_of("Mul", &[&name("floats"), &name("scale")], &output, vec![]);
                let to = int("to", DataType::Float as i64);
                let gathered = [
                    node_of("Gather", &[&rows, &ids], &name("levels"), vec![]),
                    node_of("Cast", &[&name("levels")], &name("floats"), vec![to]),
                    node_of("Gather", &[&name("scales"), &ids], &name("scale"), vec![]),
                ];
                // Readers come behind what they read; places before this one stay what they are for the nodes still to come.
                graph.node.push(NodeProto::default());
                let last = graph.node.len() - 1;
                graph.node[last] = std::mem::take(&mut graph.node[at]);
                let [levels, floats, scale] = gathered;
                graph.node[at] = levels;
                graph.node.extend([floats, scale]);
            }
            _ => {}
        }
    }
    fuse_dynamic(graph, constants);
    sort(graph);
    drop_unread(graph);
}

/// Fuses products in integers: `DynamicQuantizeLinear`, `MatMulInteger`, and both scales. Our kernel rounds each row by itself,
/// where the operator rounds all rows alike; a row's range is never the wider one.
fn fuse_dynamic(graph: &mut GraphProto, constants: &Constants<'_>) {
    let readers = readers(graph);
    let maker = |name: &str, operator: &str| {
        let makes = |node: &&NodeProto| node.op_type == operator && node.output.iter().any(|output| output == name);
        graph.node.iter().find(makes)
    };
    let only = |value: &str, operator: &str| {
        only_reader(&readers, value).map(|at| (at, &graph.node[at])).filter(|(_, node)| node.op_type == operator)
    };
    let matrix = |name: &str| constants.get(name).filter(|w| w.dtype == DataType::Int8 && w.dims.len() == 2);
    let fused = |product: &NodeProto| -> Option<(usize, NodeProto)> {
        let [levels, weight, zero] = product.input.as_slice() else { return None };
        let rounded = maker(levels, "DynamicQuantizeLinear")?;
        let turned = maker(weight, "Transpose").filter(|node| swaps(node));
        let weight = matrix(turned.map_or(weight, |node| &node.input[0]))?;
        let (_, cast) = only(&product.output[0], "Cast")?;
        let (at, scaled) = only(&cast.output[0], "Mul")?;
        let both = scaled.input.iter().find_map(|input| maker(input, "Mul"))?;
        let scales = both.input.iter().find_map(|input| constants.get(input))?;
        let ([x], [_, row_scale, row_zero]) = (rounded.input.as_slice(), rounded.output.as_slice()) else { return None };
        let outputs = weight.dims[usize::from(turned.is_none())];
        let whole = rounded.output[0] == *levels && row_zero == zero && both.input.contains(row_scale);
        if !whole || scales.dtype != DataType::Float || scales.dims != [outputs] {
            return None;
        }
        let flags = [flag("transposed", turned.is_some()), flag("integers", true)];
        let attributes = [tensor("weight", weight), tensor("scales", scales)].into_iter().chain(flags);
        Some((at, linear(x.clone(), scaled.output[0].clone(), attributes.collect())))
    };
    let products = graph.node.iter().filter(|node| node.op_type == "MatMulInteger");
    for (at, node) in products.filter_map(fused).collect::<Vec<_>>() {
        graph.node[at] = node;
    }
}

/// Fuses products with 4-bit matrices; once their scales, stored in 16 bits, are folded.
pub(super) fn fuse_blocks(graph: &mut GraphProto, constants: &Constants<'_>) {
    for node in &mut graph.node {
        let Some(product) = Product::of(node, constants) else { continue };
        let dims = vec![product.outputs as i64, product.inputs as i64 / 2];
        let levels = Constant { dtype: product.levels.dtype, dims, bytes: Cow::Borrowed(&*product.levels.bytes) };
        let weight = [tensor("weight", &levels), tensor("scales", product.scales), flag("integers", product.integers)];
        *node = linear(node.input[0].clone(), node.output[0].clone(), weight.into());
    }
}

/// Whether a `Transpose` is that of a matrix.
fn swaps(node: &NodeProto) -> bool {
    node.attribute.iter().find(|attribute| attribute.name == "perm").is_none_or(|perm| perm.ints == [1, 0])
}

/// Fuses products with 32-bit matrices, and with every product its bias and GELU; after constants are folded.
pub(super) fn fuse_linears(graph: &mut GraphProto, constants: &Constants<'_>) {
    for node in &mut graph.node {
        let [x, w] = node.input.as_slice() else { continue };
        let constant = constants.get(w).filter(|w| w.dtype == DataType::Float && w.dims.len() == 2);
        if let ("MatMul", Some(weight), false) = (node.op_type.as_str(), constant, constants.contains_key(x)) {
            *node = linear(x.clone(), node.output[0].clone(), vec![tensor("weight", weight)]);
        }
    }
    fuse_biases(graph, constants);
    fuse_gelus(graph, constants);
    drop_unread(graph);
}

fn fuse_biases(graph: &mut GraphProto, constants: &Constants<'_>) {
    let readers = readers(graph);
    for at in 0..graph.node.len() {
        if graph.node[at].op_type != LINEAR {
            continue;
        }
        let Some(add) = only_reader(&readers, &graph.node[at].output[0]).filter(|&n| graph.node[n].op_type == "Add") else {
            continue;
        };
        let bias = graph.node[add].input.iter().find_map(|input| constants.get(input));
        if let Some(bias) = bias.filter(|bias| bias.dims.len() == 1 && bias.dims[0] > 1 && bias.dtype == DataType::Float) {
            let bias = tensor("bias", bias);
            take_over(graph, at, add, bias);
        }
    }
}

/// `x · ½ · (1 + erf(x/√2))` as the exporter writes it.
fn fuse_gelus(graph: &mut GraphProto, constants: &Constants<'_>) {
    let readers = readers(graph);
    let reads = |node: usize, operator: &str, constant: f32, graph: &GraphProto| {
        let node = &graph.node[node];
        node.op_type == operator
            && node.input.iter().filter_map(|input| number(constants, input)).any(|c| (c - constant).abs() < 1e-6)
    };
    for at in 0..graph.node.len() {
        if graph.node[at].op_type != LINEAR {
            continue;
        }
        let chain = || -> Option<usize> {
            let [a, b] = readers.get(&graph.node[at].output[0])?.as_slice() else { return None };
            let scaled = [*a, *b].into_iter().find(|&n| reads(n, "Mul", std::f32::consts::FRAC_1_SQRT_2, graph))?;
            let product = if scaled == *a { *b } else { *a };
            let erf = only_reader(&readers, &graph.node[scaled].output[0]).filter(|&n| graph.node[n].op_type == "Erf")?;
            let sum = only_reader(&readers, &graph.node[erf].output[0]).filter(|&n| reads(n, "Add", 1.0, graph))?;
            let joined = only_reader(&readers, &graph.node[sum].output[0])?;
            let last = only_reader(&readers, &graph.node[product].output[0])?;
            let whole = joined == product && graph.node[product].op_type == "Mul" && reads(last, "Mul", 0.5, graph);
            whole.then_some(last)
        };
        if let Some(last) = chain() {
            take_over(graph, at, last, flag("gelu", true));
        }
    }
}

/// A constant of one float.
fn number(constants: &Constants<'_>, name: &str) -> Option<f32> {
    let constant = constants.get(name).filter(|c| c.dtype == DataType::Float && c.bytes.len() == 4)?;
    Some(f32::from_le_bytes(constant.bytes.as_chunks().0[0]))
}

/// Lets a linear node compute what a later node gives.
fn take_over(graph: &mut GraphProto, linear: usize, later: usize, attribute: AttributeProto) {
    let unread = format!("{}/fused", graph.node[linear].output[0]);
    let output = std::mem::replace(&mut graph.node[later].output[0], unread);
    graph.node[linear].output[0] = output;
    graph.node[linear].attribute.push(attribute);
}

/// 8-bit matrices by the name of what is read in their place.
fn levels(graph: &GraphProto, constants: &Constants<'_>) -> BTreeMap<String, Levels> {
    let mut known: BTreeMap<String, Levels> = BTreeMap::new();
    for node in &graph.node {
        let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
        let found = match (node.op_type.as_str(), node.input.as_slice()) {
            ("DequantizeLinear", [levels, scales]) => {
                let of =
                    |name: &String, dtype, rank| constants.get(name).is_some_and(|c| c.dtype == dtype && c.dims.len() == rank);
                let axis = attribute("axis").map_or(1, |axis| axis.i);
                let axis = if axis < 0 { axis + 2 } else { axis };
                (of(levels, DataType::Int8, 2) && of(scales, DataType::Float, 1)).then(|| Levels {
                    levels: levels.clone(),
                    scales: scales.clone(),
                    axis,
                    transposed: false,
                })
            }
            ("Transpose", [matrix]) if swaps(node) => {
                known.get(matrix).filter(|w| !w.transposed).map(|w| Levels { transposed: true, ..w.clone() })
            }
            _ => None,
        };
        if let (Some(found), [output]) = (found, node.output.as_slice()) {
            known.insert(output.clone(), found);
        }
    }
    known
}

/// Nodes that read a value, by its name; twice where they read it twice. Outputs of the graph count as read by none.
fn readers(graph: &GraphProto) -> BTreeMap<String, Vec<usize>> {
    let mut readers: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (at, node) in graph.node.iter().enumerate() {
        for input in &node.input {
            readers.entry(input.clone()).or_default().push(at);
        }
    }
    readers
}

fn only_reader(readers: &BTreeMap<String, Vec<usize>>, value: &str) -> Option<usize> {
    match readers.get(value)?.as_slice() {
        [reader] => Some(*reader),
        _ => None,
    }
}

/// Brings nodes into an order in which none comes before what it reads.
fn sort(graph: &mut GraphProto) {
    let made: BTreeSet<String> = graph.node.iter().flat_map(|node| node.output.iter().cloned()).collect();
    let (mut sorted, mut waiting) = (Vec::with_capacity(graph.node.len()), std::mem::take(&mut graph.node));
    let mut ready: BTreeSet<String> = BTreeSet::new();
    while !waiting.is_empty() {
        let before = waiting.len();
        let mut later = Vec::new();
        for node in waiting {
            if node.input.iter().all(|input| ready.contains(input) || !made.contains(input)) {
                ready.extend(node.output.iter().cloned());
                sorted.push(node);
            } else {
                later.push(node);
            }
        }
        waiting = later;
        if waiting.len() == before {
            // A circle: tract says so better than we could.
            sorted.append(&mut waiting);
        }
    }
    graph.node = sorted;
}

/// Forgets nodes that nothing reads.
fn drop_unread(graph: &mut GraphProto) {
    let mut read: BTreeSet<String> = graph.output.iter().map(|output| output.name.clone()).collect();
    let mut kept = Vec::with_capacity(graph.node.len());
    while let Some(node) = graph.node.pop() {
        if node.output.iter().any(|output| read.contains(output)) {
            read.extend(node.input.iter().cloned());
            kept.push(node);
        }
    }
    kept.reverse();
    graph.node = kept;
}

fn linear(x: String, output: String, attribute: Vec<AttributeProto>) -> NodeProto {
    node_of(LINEAR, &[&x], &output, attribute)
}

fn node_of(op_type: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        name: output.to_owned(),
        op_type: op_type.to_owned(),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute,
        ..NodeProto::default()
    }
}

fn tensor(name: &str, constant: &Constant<'_>) -> AttributeProto {
    let tensor = TensorProto {
        dims: constant.dims.clone(),
        data_type: constant.dtype as i32,
        raw_data: Cow::into_owned(constant.bytes.clone()),
        ..TensorProto::default()
    };
    AttributeProto { name: name.to_owned(), t: Some(tensor), r#type: AttributeType::Tensor as i32, ..AttributeProto::default() }
}

fn flag(name: &str, set: bool) -> AttributeProto {
    int(name, i64::from(set))
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.to_owned(), i, r#type: AttributeType::Int as i32, ..AttributeProto::default() }
}

fn float(name: &str, f: f32) -> AttributeProto {
    AttributeProto { name: name.to_owned(), f, r#type: AttributeType::Float as i32, ..AttributeProto::default() }
}
