//! What one run of a graph takes at least, counted from its file.

use std::collections::BTreeSet;

use prost::Message;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, ModelProto, TensorProto};
use tract_onnx::prelude::{Framework, InferenceModelExt, TractResult};
use tract_onnx::tract_hir::internal::Cost;

use super::{EngineError, GraphSource, onnx};
use crate::bundle::manifest::{Dtype, TensorSignature};

/// What one run of a graph takes at least, on any machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphCost {
    /// Multiplications and additions of its matrix products and convolutions, two for each pair; what else it computes is little
    /// beside them.
    pub operations: u64,
    /// Bytes that must be read or written: every weight once, in the precision that it is stored in, inputs and outputs.
    pub bytes: u64,
}

/// Counts a graph's operations and bytes, as its file has them: what an engine fuses or expands changes nothing.
///
/// # Errors
/// Where the file or a weight is malformed.
pub fn graph_cost(source: &GraphSource<'_>) -> Result<GraphCost, EngineError> {
    let failed = |reason: String| EngineError::Load { graph: source.signature.name.clone(), reason };
    let file = ModelProto::decode(source.onnx).map_err(|error| failed(error.to_string()))?;
    let weights = file.graph.as_ref().map_or(0, stored_bytes);
    let signature = source.signature;
    let moved = signature.inputs.iter().chain(&signature.outputs).map(bytes_of).sum::<u64>();
    let plain = onnx::parse_plain(source)?;
    let operations = operations(&plain).map_err(|error| failed(format!("{error:#}")))?;
    Ok(GraphCost { operations, bytes: weights + moved })
}

/// Bytes of the constants that nodes read.
fn stored_bytes(graph: &GraphProto) -> u64 {
    let read: BTreeSet<&String> = graph.node.iter().flat_map(|node| &node.input).collect();
    graph.initializer.iter().filter(|tensor| read.contains(&tensor.name)).map(bytes_of_constant).sum()
}

fn bytes_of_constant(tensor: &TensorProto) -> u64 {
    let width = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Bool | DataType::Int8 | DataType::Uint8) => 1,
        Ok(DataType::Float16 | DataType::Bfloat16) => 2,
        Ok(DataType::Int64 | DataType::Double) => 8,
        _ => 4,
    };
    width * tensor.dims.iter().map(|&dim| u64::try_from(dim).unwrap_or(0)).product::<u64>()
}

fn bytes_of(tensor: &TensorSignature) -> u64 {
    let width = match tensor.dtype {
        Dtype::F32 => 4,
        Dtype::I64 => 8,
    };
    width * tensor.shape.iter().map(|&size| size as u64).product::<u64>()
}

fn operations(model: &ModelProto) -> TractResult<u64> {
    let model = tract_onnx::onnx().model_for_proto_model(model)?.into_typed()?.into_decluttered()?;
    let mut pairs = 0;
    for node in model.eval_order()? {
        let facts = model.node_input_facts(node)?;
        for (cost, count) in model.node(node).op.cost(&facts)? {
            if matches!(cost, Cost::FMA(_)) {
                pairs += u64::try_from(count.to_i64()?).unwrap_or(0);
            }
        }
    }
    Ok(2 * pairs)
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Attribute, Toy};
    use super::*;
    use crate::bundle::manifest::{GraphSignature, Sizes};

    #[test]
    fn operations_and_bytes_of_a_known_graph() {
        let tensor = |name: &str, shape: &[usize], dtype| TensorSignature { name: name.to_owned(), shape: shape.to_vec(), dtype };
        let signature = GraphSignature {
            name: "toy".to_owned(),
            inputs: vec![tensor("x", &[1, 3, 8, 8], Dtype::F32), tensor("y", &[5, 7], Dtype::F32)],
            outputs: vec![tensor("c", &[1, 4, 4, 4], Dtype::F32), tensor("s", &[5, 6], Dtype::F32)],
        };
        let model = Toy::new(&signature)
            .floats("k", &[4, 3, 3, 3], &[0.5; 108])
            .node("Conv", &["x", "k"], "c")
            .with("strides", Attribute::Ints(vec![2, 2]))
            .with("pads", Attribute::Ints(vec![0, 0, 1, 1]))
            .levels("w", &[7, 6], &[1; 42])
            .floats("w.scale", &[6], &[0.5; 6])
            .floats("unread", &[1000], &[0.5; 1000])
            .node("DequantizeLinear", &["w", "w.scale"], "wd")
            .with("axis", Attribute::Int(1))
            .node("MatMul", &["y", "wd"], "m")
            .node("Relu", &["m"], "s")
            .model();
        let sizes = Sizes { hypotheses: 1, slots: 1 };
        let onnx = model.encode_to_vec();
        let cost = graph_cost(&GraphSource { signature: &signature, sizes, onnx: &onnx, external: &|_| None }).unwrap();
        // 4 · 4 · 4 outputs of 27 pairs each, and 5 · 6 of 7.
        assert_eq!(cost.operations, 2 * (64 * 27 + 30 * 7));
        // 108 floats, 42 levels with 6 scales; 192 + 35 floats in, 64 + 30 out.
        assert_eq!(cost.bytes, 4 * 108 + 42 + 4 * 6 + 4 * (192 + 35 + 64 + 30));
    }
}
