//! ONNX Runtime's `MatMulNBits`: products with 4-bit matrices that have a scale for each 32 inputs of an output
//! (<https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits>).

use std::collections::BTreeMap;

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto};

use super::onnx::Constant;
use crate::kernels::BLOCK;

/// The operator.
const OPERATOR: &str = "MatMulNBits";
/// `accuracy_level` of products of 8-bit numbers.
const INTEGERS: i64 = 4;

/// One such product, of the kind that bundles hold: no zero points, whole blocks.
pub(super) struct Product<'c, 'a> {
    pub inputs: usize,
    pub outputs: usize,
    /// `[outputs, inputs / BLOCK, BLOCK / 2]`, the lower half of a byte first, each level 8 too large.
    pub levels: &'c Constant<'a>,
    /// `[outputs · inputs / BLOCK]` floats.
    pub scales: &'c Constant<'a>,
    /// What it is multiplied with is rounded to 8 bits.
    pub integers: bool,
}

impl<'c, 'a> Product<'c, 'a> {
    /// A node as such a product, if it is one.
    pub fn of(node: &NodeProto, constants: &'c BTreeMap<String, Constant<'a>>) -> Option<Self> {
        let ([_, levels, scales], OPERATOR) = (node.input.as_slice(), node.op_type.as_str()) else { return None };
        let number = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name).map(|attribute| attribute.i);
        let size = |name: &str| usize::try_from(number(name)?).ok();
        let (inputs, outputs) = (size("K")?, size("N")?);
        let (levels, scales) = (constants.get(levels)?, constants.get(scales)?);
        let whole = inputs.is_multiple_of(BLOCK) && size("block_size") == Some(BLOCK) && number("bits").unwrap_or(4) == 4;
        let count = inputs.checked_mul(outputs)?;
        let stored = levels.dtype == DataType::Uint8 && levels.bytes.len() == count / 2;
        let scaled = scales.dtype == DataType::Float && scales.bytes.len() == 4 * (count / BLOCK);
        let integers = number("accuracy_level") == Some(INTEGERS);
        (whole && stored && scaled).then_some(Self { inputs, outputs, levels, scales, integers })
    }
}

/// Refuses such products of another kind. tract would take some of them, and break off on others.
///
/// # Errors
/// The first of them.
pub(super) fn check(graph: &GraphProto, constants: &BTreeMap<String, Constant<'_>>) -> Result<(), String> {
    let other = |node: &&NodeProto| node.op_type == OPERATOR && Product::of(node, constants).is_none();
    match graph.node.iter().find(other) {
        Some(node) => {
            Err(format!("{OPERATOR} of {:?} is none of 4 bits in whole blocks of {BLOCK} without zero points", node.output))
        }
        None => Ok(()),
    }
}
