//! The weights of a bundle, where its graphs say that they lie.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use prost::Message;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{ModelProto, NodeProto, TensorProto};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{Manifest, Precision, WEIGHTS};

use crate::graph::{Element, Storage, StoredWeight, WeightStore};

/// A bundle's files by their paths inside.
pub(crate) type Files<'f> = dyn Fn(&str) -> Result<&'f [u8]> + 'f;

/// The weights of a precision, as the expanded forms of `graphs` name them.
pub(crate) fn weights<'g>(graphs: impl Iterator<Item = &'g str>, precision: Precision, files: &Files<'_>) -> Result<WeightStore> {
    let mut entries = BTreeMap::new();
    for graph in graphs {
        let name = Manifest::graph_file(precision, graph);
        let graph = ModelProto::decode(files(&name)?).with_context(|| format!("{name} is not ONNX"))?;
        let graph = graph.graph.unwrap_or_default();
        for tensor in graph.initializer.iter().filter(|tensor| !tensor.external_data.is_empty()) {
            let axis = axis_of_scales(&graph.node, &tensor.name);
            entries.insert(tensor.name.clone(), stored(tensor, axis).with_context(|| format!("weight `{}`", tensor.name))?);
        }
    }
    Ok(WeightStore::of_file(Storage::of(precision), entries, files(&format!("{precision}/{WEIGHTS}"))?.to_vec()))
}

/// The weights of a bundle in one of its precisions.
pub(crate) fn weights_of(bundle: &Bundle, precision: Precision) -> Result<WeightStore> {
    let graphs = bundle.manifest().graphs.iter().map(|graph| graph.name.as_str());
    weights(graphs, precision, &|name| Ok(bundle.read(name)?))
}

/// The axis along which an 8-bit weight has a scale for each index.
fn axis_of_scales(nodes: &[NodeProto], weight: &str) -> Option<usize> {
    let node = nodes.iter().find(|node| node.op_type == "DequantizeLinear" && node.input[0] == weight)?;
    let axis = node.attribute.iter().find(|attribute| attribute.name == "axis")?;
    usize::try_from(axis.i).ok()
}

fn stored(tensor: &TensorProto, axis: Option<usize>) -> Result<StoredWeight> {
    let number = |key: &str| -> Result<usize> {
        let entry = tensor.external_data.iter().find(|e| e.key == key).with_context(|| format!("no {key}"))?;
        entry.value.parse().with_context(|| format!("{key} {:?}", entry.value))
    };
    let element = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => Element::F32,
        Ok(DataType::Float16) => Element::F16,
        Ok(DataType::Int8) => Element::I8 { axis: axis.context("has no scales")? },
        Ok(DataType::Uint8) => Element::I4 { axis: 1 },
        _ => bail!("has the unsupported type {}", tensor.data_type),
    };
    let dims: Vec<usize> = tensor.dims.iter().map(|&d| usize::try_from(d).context("a negative size")).collect::<Result<_>>()?;
    let shape = match (element, dims.as_slice()) {
        (Element::I4 { .. }, &[outputs, blocks, half]) => vec![blocks * half * 2, outputs],
        (Element::I4 { .. }, other) => bail!("is no matrix of blocks: {other:?}"),
        (_, other) => other.to_vec(),
    };
    Ok(StoredWeight { shape, offset: number("offset")?, length: number("length")?, element })
}
