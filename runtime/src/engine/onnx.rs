//! ONNX files as bundles hold them: weights lie outside the file and may be stored in 16 or 8 bits.
//!
//! Every constant is brought into memory here, checked against the file it comes from, and in the form that is run: a 16-bit
//! weight behind a `Cast` becomes a 32-bit one, an 8-bit one behind a `DequantizeLinear` too unless a kernel of ours takes it as it
//! is ([`fusion`]), a matrix behind a `Transpose` a transposed one. A 4-bit one stays so with tract, too. tract would repeat the casts of large constants at every run; and
//! a token table that serves both the embedding and the output layer becomes two constants, each in the order its use wants, though
//! it is stored once.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use half::f16;
use prost::Message;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};

use super::network::{self, Backbone};
use super::{EngineError, GraphSource, blocks, fusion};
use crate::bundle::SharedBytes;
use crate::bundle::manifest::{Sizes, Symbol};
use crate::kernels;

/// A constant whose bytes are known to be as many as its shape needs.
pub(super) struct Constant<'a> {
    pub dtype: DataType,
    pub dims: Vec<i64>,
    pub bytes: Cow<'a, [u8]>,
}

/// What our own kernels compute of a graph, on a processor that they know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ours {
    Nothing,
    /// [Operators](super::operators).
    #[cfg(feature = "ort")]
    Operators,
    /// Operators and the convolutional backbone.
    OperatorsAndBackbone,
}

/// Parses a graph, fetches its weights, folds the operators that only prepare them, and takes out or fuses what our own kernels
/// compute. The backbone, where there is one, is not in the graph any more.
pub(super) fn parse(source: &GraphSource<'_>) -> Result<(ModelProto, Option<Backbone>), EngineError> {
    parsed(source, Ours::OperatorsAndBackbone)
}

/// Like [`parse`], but leaves convolutions to the engine.
#[cfg(feature = "ort")]
pub(super) fn parse_operators(source: &GraphSource<'_>) -> Result<ModelProto, EngineError> {
    Ok(parsed(source, Ours::Operators)?.0)
}

/// Like [`parse`], but leaves to the engine what our kernels could compute.
pub(super) fn parse_plain(source: &GraphSource<'_>) -> Result<ModelProto, EngineError> {
    Ok(parsed(source, Ours::Nothing)?.0)
}

fn parsed(source: &GraphSource<'_>, ours: Ours) -> Result<(ModelProto, Option<Backbone>), EngineError> {
    let load = |reason: String| EngineError::Load { graph: source.signature.name.clone(), reason };
    let mut model = ModelProto::decode(source.onnx).map_err(|error| load(error.to_string()))?;
    let graph = model.graph.as_mut().ok_or_else(|| load("the file holds no graph".to_owned()))?;
    fix_sizes(graph, source.sizes).map_err(load)?;
    let files = external_files(graph, source.external);
    let find = |location: &str| files.get(location).map(|bytes| &**bytes);
    let mut constants = BTreeMap::new();
    let mut inline = Vec::new();
    for mut tensor in std::mem::take(&mut graph.initializer) {
        let weight = |reason| EngineError::Weight { graph: source.signature.name.clone(), tensor: tensor.name.clone(), reason };
        let external = tensor.data_location == Some(DataLocation::External as i32);
        if external || !tensor.raw_data.is_empty() {
            let raw = std::mem::take(&mut tensor.raw_data);
            let constant = constant(&tensor, external, raw, &find).map_err(weight)?;
            constants.insert(tensor.name, constant);
        } else {
            inline.push(tensor);
        }
    }
    let mut backbone = None;
    if kernels::available() && ours != Ours::Nothing {
        fusion::fuse_levels(graph, &mut constants);
        fold(graph, &mut constants);
        blocks::check(graph, &constants).map_err(load)?;
        fusion::fuse_blocks(graph, &constants);
        if ours == Ours::OperatorsAndBackbone {
            backbone = network::take_backbone(graph, &constants);
        }
        fusion::fuse_linears(graph, &constants);
        fusion::fuse_attention(graph, &constants);
        fusion::fuse_self_attention(graph, &constants);
        fusion::fuse_norms(graph, &constants);
    } else {
        fold(graph, &mut constants);
        blocks::check(graph, &constants).map_err(load)?;
    }
    forget_unread(graph, &mut constants);
    graph.initializer = inline;
    graph.initializer.extend(constants.into_iter().map(|(name, constant)| TensorProto {
        name,
        dims: constant.dims,
        data_type: constant.dtype as i32,
        raw_data: constant.bytes.into_owned(),
        ..TensorProto::default()
    }));
    Ok((model, backbone))
}

/// The files that weights lie in, by the locations that the graph gives.
fn external_files(graph: &GraphProto, find: &dyn Fn(&str) -> Option<SharedBytes>) -> BTreeMap<String, SharedBytes> {
    let entries = graph.initializer.iter().flat_map(|tensor| &tensor.external_data).filter(|entry| entry.key == "location");
    let locations: BTreeSet<&String> = entries.map(|entry| &entry.value).collect();
    locations.into_iter().filter_map(|location| Some((location.clone(), find(location)?))).collect()
}

fn constant<'a>(
    tensor: &TensorProto,
    external: bool,
    raw: Vec<u8>,
    find: &dyn Fn(&str) -> Option<&'a [u8]>,
) -> Result<Constant<'a>, String> {
    let dtype = DataType::try_from(tensor.data_type).unwrap_or(DataType::Undefined);
    let width = match dtype {
        DataType::Bool | DataType::Int8 | DataType::Uint8 => 1,
        DataType::Float16 => 2,
        DataType::Float | DataType::Int32 => 4,
        DataType::Int64 => 8,
        _ => return Err(format!("has the unsupported type {}", tensor.data_type)),
    };
    let expected = tensor
        .dims
        .iter()
        .try_fold(width, |size: usize, &dim| size.checked_mul(usize::try_from(dim).ok()?))
        .ok_or_else(|| format!("has the impossible shape {:?}", tensor.dims))?;
    let bytes: Cow<'a, [u8]> = if external { Cow::Borrowed(external_bytes(tensor, find)?) } else { Cow::Owned(raw) };
    if bytes.len() != expected {
        return Err(format!("has {} bytes, its shape {:?} needs {expected}", bytes.len(), tensor.dims));
    }
    Ok(Constant { dtype, dims: tensor.dims.clone(), bytes })
}

fn external_bytes<'a>(tensor: &TensorProto, find: &dyn Fn(&str) -> Option<&'a [u8]>) -> Result<&'a [u8], String> {
    let entry = |key: &str| {
        let entry = tensor.external_data.iter().find(|entry| entry.key == key);
        entry.map(|entry| entry.value.as_str()).ok_or_else(|| format!("is external but has no {key}"))
    };
    let number = |key: &str| {
        let value = entry(key)?;
        // More than this machine can address is out of range, not no number.
        let number = value.parse::<u64>().map(|number| usize::try_from(number).unwrap_or(usize::MAX));
        number.map_err(|_| format!("has the {key} {value:?}, which is no number"))
    };
    let (location, offset, length) = (entry("location")?, number("offset")?, number("length")?);
    let file = find(location).ok_or_else(|| format!("lies in {location:?}, which the bundle does not hold"))?;
    offset
        .checked_add(length)
        .and_then(|end| file.get(offset..end))
        .ok_or_else(|| format!("is out of range: {length} bytes at {offset} of {location}, which has {}", file.len()))
}

/// Puts numbers in place of the symbols in the shapes of inputs and outputs.
fn fix_sizes(graph: &mut GraphProto, sizes: Sizes) -> Result<(), String> {
    let shape = |value: &mut ValueInfoProto| match value.r#type.as_mut()?.value.as_mut()? {
        type_proto::Value::TensorType(tensor) => tensor.shape.take(),
    };
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        let Some(mut fixed) = shape(value) else { continue };
        for dim in &mut fixed.dim {
            if let Some(dimension::Value::DimParam(name)) = &dim.value {
                let symbol = Symbol::ALL.into_iter().find(|symbol| symbol.name() == name);
                let symbol = symbol.ok_or_else(|| format!("{:?} has a size {name:?} that nothing fixes", value.name))?;
                dim.value = Some(dimension::Value::DimValue(sizes.of(symbol) as i64));
            }
        }
        if let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_mut().and_then(|t| t.value.as_mut()) {
            tensor.shape = Some(fixed);
        }
    }
    Ok(())
}

/// Replaces operators over constants by constants.
fn fold(graph: &mut GraphProto, constants: &mut BTreeMap<String, Constant<'_>>) {
    // Nodes come in topological order, so one pass sees through chains.
    graph.node.retain(|node| match folded(node, constants) {
        Some(constant) => {
            constants.insert(node.output[0].clone(), constant);
            false
        }
        None => true,
    });
}

fn forget_unread(graph: &GraphProto, constants: &mut BTreeMap<String, Constant<'_>>) {
    let read: BTreeSet<&String> =
        graph.node.iter().flat_map(|node| &node.input).chain(graph.output.iter().map(|output| &output.name)).collect();
    constants.retain(|name, _| read.contains(name));
}

fn folded<'a>(node: &NodeProto, constants: &BTreeMap<String, Constant<'a>>) -> Option<Constant<'a>> {
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let input = match (node.input.as_slice(), node.output.as_slice()) {
        ([input], [_]) => input,
        ([levels, scales], [_]) if node.op_type == "DequantizeLinear" => {
            let axis = attribute("axis").map_or(1, |axis| axis.i);
            return dequantize(constants.get(levels)?, constants.get(scales)?, axis);
        }
        _ => return None,
    };
    let constant = constants.get(input)?;
    match node.op_type.as_str() {
        "Cast" if attribute("to")?.i == DataType::Float as i64 && constant.dtype == DataType::Float16 => {
            Some(Constant { dtype: DataType::Float, dims: constant.dims.clone(), bytes: Cow::Owned(expand(&constant.bytes)) })
        }
        "Transpose" if constant.dtype == DataType::Float && attribute("perm").is_none_or(|perm| perm.ints == [1, 0]) => {
            let &[rows, columns] = constant.dims.as_slice() else {
                return None;
            };
            Some(Constant {
                dtype: DataType::Float,
                dims: vec![columns, rows],
                bytes: Cow::Owned(transpose(&constant.bytes, rows as usize, columns as usize)),
            })
        }
        _ => None,
    }
}

/// Signed 8-bit levels times the scale of their index along `axis`; nothing where types or shapes are others.
fn dequantize<'a>(levels: &Constant<'a>, scales: &Constant<'a>, axis: i64) -> Option<Constant<'a>> {
    let axis = usize::try_from(if axis < 0 { axis + levels.dims.len() as i64 } else { axis }).ok()?;
    let count = *levels.dims.get(axis)?;
    if levels.dtype != DataType::Int8 || scales.dtype != DataType::Float || scales.dims != [count] {
        return None;
    }
    let scales: Vec<f32> = scales.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let inner = levels.dims[axis + 1..].iter().product::<i64>().max(1) as usize;
    let mut bytes = Vec::with_capacity(4 * levels.bytes.len());
    for (run, scale) in levels.bytes.chunks(inner).zip(scales.iter().cycle()) {
        bytes.extend(run.iter().flat_map(|level| (f32::from(level.cast_signed()) * scale).to_le_bytes()));
    }
    Some(Constant { dtype: DataType::Float, dims: levels.dims.clone(), bytes: Cow::Owned(bytes) })
}

/// Little-endian 16-bit floats as 32-bit ones.
fn expand(halves: &[u8]) -> Vec<u8> {
    halves.as_chunks::<2>().0.iter().flat_map(|&half| f16::from_le_bytes(half).to_f32().to_le_bytes()).collect()
}

/// A `[rows, columns]` matrix of 4-byte elements as `[columns, rows]`.
fn transpose(matrix: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let elements = matrix.as_chunks::<4>().0;
    let mut transposed = Vec::with_capacity(matrix.len());
    for column in 0..columns {
        for row in 0..rows {
            transposed.extend_from_slice(&elements[row * columns + column]);
        }
    }
    transposed
}
