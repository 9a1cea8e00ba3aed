//! LayerNorm with constant weights, and the sum that it alone reads: one [`LAYER_NORM`] node.

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto};

use super::super::operators::LAYER_NORM;
use super::search::Search;
use super::{Constants, drop_unread, float, node_of, tensor};

/// The default of `LayerNormalization`.
const EPSILON: f32 = 1e-5;

/// Fuses every such LayerNorm over the last axis; after biases are fused, which are sums too.
pub(in crate::engine) fn fuse_norms(graph: &mut GraphProto, constants: &Constants<'_>) {
    let found = {
        let search = Search::new(graph, constants);
        let norms = graph.node.iter().enumerate().filter(|(_, node)| node.op_type == "LayerNormalization");
        norms.filter_map(|(at, norm)| Some((at, search.norm(norm)?))).collect::<Vec<_>>()
    };
    for (at, node) in found {
        graph.node[at] = node;
    }
    drop_unread(graph);
}

impl Search<'_> {
    fn norm(&self, norm: &NodeProto) -> Option<NodeProto> {
        let ([x, weight, bias], [output]) = (norm.input.as_slice(), norm.output.as_slice()) else { return None };
        let attribute = |name: &str| norm.attribute.iter().find(|attribute| attribute.name == name);
        let vector =
            |name: &String| self.constants.get(name).filter(|vector| vector.dtype == DataType::Float && vector.dims.len() == 1);
        let (weight, bias) = (vector(weight)?, vector(bias)?);
        // Over another axis than the last, or in other floats on the way.
        if weight.dims != bias.dims || attribute("axis").is_some_and(|axis| axis.i != -1) || attribute("stash_type").is_some() {
            return None;
        }
        let sum = self.made(x, "Add").filter(|_| self.only_reader(x).is_some());
        let inputs: Vec<&str> = sum.map_or(vec![x], |sum| sum.input.iter().map(String::as_str).collect());
        let epsilon = attribute("epsilon").map_or(EPSILON, |epsilon| epsilon.f);
        let attributes = vec![tensor("weight", weight), tensor("bias", bias), float("epsilon", epsilon)];
        Some(node_of(LAYER_NORM, &inputs, output, attributes))
    }
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

    fn signature() -> GraphSignature {
        let tensor =
            |name: &str, shape: &[usize]| TensorSignature { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let inputs = vec![tensor("a", &[3, 5]), tensor("b", &[3, 5]), tensor("row", &[1, 5]), tensor("column", &[3, 1])];
        GraphSignature { name: "toy".into(), inputs, outputs: vec![tensor("y", &[3, 5])] }
    }

    /// LayerNorm of the sum of two values.
    fn model(first: &str, second: &str) -> ModelProto {
        Toy::new(&signature())
            .floats("weight", &[5], &[0.5, -1.0, 2.0, 1.0, 0.25])
            .floats("bias", &[5], &[0.0, 0.5, -0.5, 1.0, 2.0])
            .floats("constant", &[3, 5], &[0.3; 15])
            .floats("short", &[1], &[0.75])
            .node("Add", &[first, second], "sum")
            .node("LayerNormalization", &["sum", "weight", "bias"], "y")
            .with("axis", Attribute::Int(-1))
            .model()
    }

    /// What a model gives, and how many of its LayerNorms are fused, with how many inputs in all.
    fn run(model: &ModelProto) -> (Vec<f32>, [usize; 2]) {
        let (signature, onnx) = (signature(), model.encode_to_vec());
        let source =
            GraphSource { signature: &signature, sizes: Sizes { hypotheses: 1, slots: 1 }, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        let fused: Vec<&NodeProto> = parsed.node.iter().filter(|node| node.op_type == LAYER_NORM).collect();
        let count = [fused.len(), fused.iter().map(|node| node.input.len()).sum()];
        let tensors: Vec<Tensor> = signature
            .inputs
            .iter()
            .enumerate()
            .map(|(seed, input)| {
                let values = (0..input.shape.iter().product()).map(|i: usize| ((i * 7 + seed * 3) as f32).sin()).collect();
                Tensor::f32(&input.shape, values).unwrap()
            })
            .collect();
        let inputs: Vec<(&str, &Tensor)> = signature.inputs.iter().map(|input| input.name.as_str()).zip(&tensors).collect();
        let outputs = Tract::new(1).unwrap().load(&source).unwrap().run(&inputs).unwrap();
        (outputs[0].floats().to_vec(), count)
    }

    /// tract's own: something else reads the result of the weights, so that they are no constants.
    fn plain(model: &ModelProto) -> Vec<f32> {
        let mut plain = model.clone();
        let graph = plain.graph.as_mut().unwrap();
        graph.node.insert(0, node_of("Add", &["row", "weight"], "sum of weights", vec![]));
        graph.node.insert(1, node_of("Sub", &["sum of weights", "row"], "the weights", vec![]));
        graph.node.insert(2, node_of("Reshape", &["the weights", "five"], "weights", vec![]));
        let five = Toy::new(&signature()).constant("five", &[5]).model().graph.unwrap().initializer;
        graph.initializer.extend(five);
        graph.node.last_mut().unwrap().input[1] = "weights".into();
        let (found, fused) = run(&plain);
        assert_eq!(fused, [0, 0]);
        found
    }

    #[test]
    fn sums_of_all_shapes_are_normalized_as_tract_does_it() {
        let here = usize::from(kernels::available());
        for (first, second) in [
            ("a", "b"),
            ("a", "row"),
            ("row", "a"),
            ("b", "column"),
            ("column", "a"),
            ("row", "column"),
            ("constant", "b"),
            ("a", "constant"),
            ("short", "a"),
        ] {
            let model = model(first, second);
            let (found, fused) = run(&model);
            assert_eq!(fused, [here, 2 * here], "{first} {second}");
            for (found, expected) in found.iter().zip(plain(&model)) {
                assert!((found - expected).abs() < 5e-6, "{first} {second}: {found} {expected}");
            }
        }
    }

    #[test]
    fn a_sum_that_others_read_stays_one() {
        let mut twice = model("a", "b");
        let graph = twice.graph.as_mut().unwrap();
        graph.node[1].output[0] = "normalized".into();
        graph.node.push(node_of("Add", &["normalized", "sum"], "y", vec![]));
        let (found, fused) = run(&twice);
        assert_eq!(fused, [usize::from(kernels::available()); 2]);
        let (normalized, _) = run(&model("a", "b"));
        for (i, (found, normalized)) in found.iter().zip(normalized).enumerate() {
            let sum = ((i * 7) as f32).sin() + ((i * 7 + 3) as f32).sin();
            assert!((found - sum - normalized).abs() < 1e-6);
        }
    }

    #[test]
    fn other_norms_are_left_alone() {
        type Change = fn(&mut ModelProto);
        let norm = |m: &mut ModelProto| m.graph.as_mut().unwrap().node.pop().unwrap();
        let changes: [(&str, Change); 3] = [
            ("another axis", |m| m.graph.as_mut().unwrap().node[1].attribute[0].i = 0),
            ("no bias", |m| drop(m.graph.as_mut().unwrap().node[1].input.pop())),
            ("weights of each row", |m| m.graph.as_mut().unwrap().node[1].input[1] = "constant".into()),
        ];
        for (what, change) in changes {
            let mut model = model("a", "b");
            change(&mut model);
            let search = |model: &ModelProto| {
                let (signature, onnx) = (signature(), model.encode_to_vec());
                let sizes = Sizes { hypotheses: 1, slots: 1 };
                let source = GraphSource { signature: &signature, sizes, onnx: &onnx, external: &|_| None };
                norm(&mut onnx::parse(&source).unwrap().0).op_type
            };
            assert_eq!(search(&model), "LayerNormalization", "{what}");
        }
    }
}
