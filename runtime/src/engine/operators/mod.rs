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

/// Whether a node is a product that is computed in integers.
pub(super) fn multiplies_in_integers(node: &NodeProto) -> bool {
    node.op_type == LINEAR && Attributes(node).flag(linear::INTEGERS)
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

#[cfg(test)]
mod tests {
    use tract_onnx::pb::attribute_proto::AttributeType;
    use tract_onnx::pb::tensor_proto::DataType;

    use super::*;

    fn named(name: &str, attribute: AttributeProto) -> AttributeProto {
        AttributeProto { name: name.to_owned(), ..attribute }
    }

    fn int(name: &str, i: i64) -> AttributeProto {
        named(name, AttributeProto { i, r#type: AttributeType::Int as i32, ..AttributeProto::default() })
    }

    fn float(name: &str, f: f32) -> AttributeProto {
        named(name, AttributeProto { f, r#type: AttributeType::Float as i32, ..AttributeProto::default() })
    }

    fn ones(name: &str, dims: &[i64]) -> AttributeProto {
        let count = dims.iter().product::<i64>() as usize;
        let raw_data = 1f32.to_le_bytes().repeat(count);
        let t = TensorProto { dims: dims.to_vec(), data_type: DataType::Float as i32, raw_data, ..TensorProto::default() };
        named(name, AttributeProto { t: Some(t), r#type: AttributeType::Tensor as i32, ..AttributeProto::default() })
    }

    /// A node of every operator.
    fn nodes() -> [NodeProto; 4] {
        [
            (LINEAR, vec![ones("weight", &[4, 3])]),
            (LAYER_NORM, vec![ones("weight", &[4]), ones("bias", &[4]), float("epsilon", 1e-5)]),
            (SELF_ATTENTION, vec![int("heads", 2), int("depth", 2), float("scale", 0.5)]),
            (ATTENTION, vec![int("layer", 1), float("scale", 0.5)]),
        ]
        .map(|(op_type, attribute)| NodeProto { op_type: op_type.to_owned(), attribute, ..NodeProto::default() })
    }

    #[test]
    fn inputs_of_other_shapes_are_refused() {
        let [linear, norm, own, cached] = nodes().map(|node| operator(&node).unwrap().unwrap());
        assert_eq!(linear.shape(&[&[5, 2, 4]]), Ok(vec![5, 2, 3]));
        assert_eq!(norm.shape(&[&[1, 4], &[3, 1]]), Ok(vec![3, 4]));
        assert_eq!(own.shape(&[&[3, 12], &[1, 3]]), Ok(vec![3, 4]));
        let caches = |past: &'static [usize], mask: &'static [usize]| {
            let prefix: &[usize] = &[2, 2, 3, 2];
            cached.shape(&[&[5, 12], prefix, prefix, past, past, mask])
        };
        assert_eq!(caches(&[2, 2, 4, 2], &[5, 4]), Ok(vec![5, 4]));
        let refused = [
            linear.shape(&[&[5, 3]]),
            linear.shape(&[&[]]),
            linear.shape(&[&[5, 4], &[5, 4]]),
            norm.shape(&[&[3, 5]]),
            norm.shape(&[&[2, 4], &[3, 4]]),
            own.shape(&[&[3, 11]]),
            own.shape(&[&[3, 12], &[1, 2]]),
            own.shape(&[&[3, 12], &[3, 3]]),
            cached.shape(&[&[5, 12]]),
            // Other heads, another depth, another mask, and fewer layers than the one that is read.
            caches(&[2, 3, 4, 2], &[5, 4]),
            caches(&[2, 2, 4, 3], &[5, 4]),
            caches(&[2, 2, 4, 2], &[5, 3]),
            caches(&[1, 2, 4, 2], &[5, 4]),
        ];
        for (at, refused) in refused.iter().enumerate() {
            assert!(refused.is_err(), "{at}: {refused:?}");
        }
    }

    #[test]
    fn nodes_without_what_they_need_are_refused() {
        for node in nodes() {
            for missing in 0..node.attribute.len() {
                let mut node = node.clone();
                let name = node.attribute.remove(missing).name;
                let refused = operator(&node).unwrap().unwrap_err();
                assert!(refused.contains(&format!(" {name}")) || refused.contains("weight"), "{refused}");
            }
        }
        assert!(operator(&NodeProto { op_type: "MatMul".to_owned(), ..NodeProto::default() }).is_none());
    }
}
