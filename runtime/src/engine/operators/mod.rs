//! Operators of ours: what [`fusion`](super::fusion) puts in place of parts of a graph, and our [kernels](crate::kernels) compute.
//! Each engine runs them as operators of its own kind; no file holds them.

mod attention;
mod linear;
mod normalize;
mod self_attention;

use std::fmt;
use std::sync::Arc;

use tract_onnx::pb::{AttributeProto, NodeProto, TensorProto};

pub(super) use self::attention::NAME as ATTENTION;
pub(super) use self::linear::NAME as LINEAR;
pub(super) use self::normalize::NAME as LAYER_NORM;
pub(super) use self::self_attention::NAME as SELF_ATTENTION;

/// Every operator's name.
pub(super) const NAMES: [&str; 4] = [ATTENTION, LINEAR, LAYER_NORM, SELF_ATTENTION];

/// A dense, row-major input.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub shape: &'a [usize],
    pub values: &'a [f32],
}

/// A node of a graph, with what it needs of its attributes: from floats to floats.
pub(super) trait Operator: fmt::Debug + Send + Sync {
    /// The output's shape.
    ///
    /// # Errors
    /// Where there are other inputs than the operator takes, or of other shapes.
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>, String>;

    /// Computes the output, whose shape is [`Self::shape`] of the inputs' shapes; what needs much work is shared among the threads of
    /// the pool that this is called in, if it is.
    ///
    /// # Errors
    /// Where the inputs are not of such shapes.
    fn compute(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<(), String>;
}

/// The operator that a node is; `None` where it is none of ours.
pub(super) fn operator(node: &NodeProto) -> Option<Result<Arc<dyn Operator>, String>> {
    let attributes = Attributes(node);
    Some(match node.op_type.as_str() {
        ATTENTION => attention::Attention::new(&attributes).map(|operator| Arc::new(operator) as Arc<dyn Operator>),
        LINEAR => linear::Linear::new(&attributes).map(|operator| Arc::new(operator) as Arc<dyn Operator>),
        LAYER_NORM => normalize::Normalize::new(&attributes).map(|operator| Arc::new(operator) as Arc<dyn Operator>),
        SELF_ATTENTION => self_attention::Attention::new(&attributes).map(|operator| Arc::new(operator) as Arc<dyn Operator>),
        _ => return None,
    })
}

/// A node's attributes by their names.
struct Attributes<'a>(&'a NodeProto);

impl<'a> Attributes<'a> {
    fn find(&self, name: &str) -> Option<&'a AttributeProto> {
        self.0.attribute.iter().find(|attribute| attribute.name == name)
    }

    fn get(&self, name: &str) -> Result<&'a AttributeProto, String> {
        self.find(name).ok_or_else(|| format!("{} without {name}", self.0.op_type))
    }

    fn size(&self, name: &str) -> Result<usize, String> {
        let size = self.get(name)?.i;
        usize::try_from(size).map_err(|_| format!("{} with {name} {size}", self.0.op_type))
    }

    fn flag(&self, name: &str) -> bool {
        self.find(name).is_some_and(|attribute| attribute.i == 1)
    }

    fn tensor(&self, name: &str) -> Option<&'a TensorProto> {
        self.find(name).and_then(|attribute| attribute.t.as_ref())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.tensor(name).map(floats)
    }
}

fn floats(tensor: &TensorProto) -> Vec<f32> {
    tensor.raw_data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}
