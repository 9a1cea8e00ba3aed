//! Attention of rows over each other, as the exporter writes it: found whole, and computed by one [`SELF_ATTENTION`] node.

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto};

use super::super::operators::SELF_ATTENTION;
use super::search::{Search, last_axis, order};
use super::{Constants, drop_unread, float, int, node_of};

/// Fuses every such attention; leaves alone what differs from it in anything.
pub(in crate::engine) fn fuse_self_attention(graph: &mut GraphProto, constants: &Constants<'_>) {
    let found = {
        let search = Search::new(graph, constants);
        let softmaxes = graph.node.iter().filter(|node| node.op_type == "Softmax");
        softmaxes.filter_map(|softmax| search.self_attention(softmax)).collect::<Vec<_>>()
    };
    for (at, node) in found {
        graph.node[at] = node;
    }
    drop_unread(graph);
}

impl Search<'_> {
    /// The place of the last node of the attention around a softmax, and what computes all of it.
    fn self_attention(&self, softmax: &NodeProto) -> Option<(usize, NodeProto)> {
        if !last_axis(softmax) {
            return None;
        }
        let scores = &softmax.input[0];
        let (scores, mask) = match self.made(scores, "Add") {
            Some(masked) => (&masked.input[0], Some(masked.input[1].as_str())),
            None => (scores, None),
        };
        if mask.is_some_and(|mask| !self.is_row(mask)) {
            return None;
        }
        let product = self.made(scores, "MatMul")?;
        let turned = self.made(&product.input[1], "Transpose").filter(|turned| order(turned) == [0, 2, 1])?;
        let scaled = self.made(&product.input[0], "Mul")?;
        let (query, scale) = (&scaled.input[0], self.number(&scaled.input[1])?);
        let (_, sum) = self.only_reader(&softmax.output[0])?;
        let [shares, value] = sum.input.as_slice() else { return None };
        if sum.op_type != "MatMul" || *shares != softmax.output[0] {
            return None;
        }
        let stacked = self.stacked([query, &turned.input[0], value])?;
        let last = self.side_by_side(&sum.output[0], stacked.hidden())?;
        let [heads, depth] = stacked.heads;
        let attributes = vec![int("heads", heads), int("depth", depth), float("scale", scale)];
        let inputs: Vec<&str> = std::iter::once(stacked.qkv).chain(mask).collect();
        Some((last, node_of(SELF_ATTENTION, &inputs, &self.graph.node[last].output[0], attributes)))
    }

    /// Whether a value is known to be of shape `[1, n]`: it is the same for all heads and queries then.
    fn is_row(&self, value: &str) -> bool {
        if let Some(constant) = self.constants.get(value) {
            return constant.dtype == DataType::Float && matches!(constant.dims[..], [1, _]);
        }
        match self.made(value, "Concat") {
            Some(joined) => {
                let along_it = joined.attribute.iter().any(|a| a.name == "axis" && matches!(a.i, -1 | 1));
                along_it && joined.input.iter().all(|part| self.is_row(part))
            }
            None => matches!(self.input_dims(value), Some([1, _])),
        }
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
        let inputs = vec![tensor("qkv", &[3, 12]), tensor("mask", &[1, 2]), tensor("square", &[3, 3])];
        // The layer's keys are read elsewhere too, as in `vision`.
        GraphSignature { name: "toy".into(), inputs, outputs: vec![tensor("y", &[3, 4]), tensor("k", &[2, 3, 2])] }
    }

    /// Two heads of depth 2 over three rows, as the exporter writes it.
    fn model(mask: Option<&str>) -> ModelProto {
        let mut toy = Toy::new(&signature());
        for number in [0, 1, 4, 8, 12] {
            toy = toy.constant(&format!("{number}"), &[number]);
        }
        toy = toy.constant("heads", &[3, 2, 2]).constant("joined", &[3, 4]);
        toy = toy.floats("half", &[1], &[0.5]).floats("visible", &[1, 1], &[0.0]).floats("column", &[3, 1], &[0.0, 1.0, 2.0]);
        let order = |of: [i64; 3]| Attribute::Ints(of.to_vec());
        for (name, start, end) in [("q", "0", "4"), ("k", "4", "8"), ("v", "8", "12")] {
            let [columns, shaped] = ["columns", "shaped"].map(|part| format!("{name}/{part}"));
            toy = toy
                .node("Slice", &["qkv", start, end, "1"], &columns)
                .node("Reshape", &[&columns, "heads"], &shaped)
                .node("Transpose", &[&shaped], name)
                .with("perm", order([1, 0, 2]));
        }
        toy = toy
            .node("Concat", &["visible", "mask"], "row")
            .with("axis", Attribute::Int(1))
            .node("Mul", &["q", "half"], "query")
            .node("Transpose", &["k"], "turned keys")
            .with("perm", order([0, 2, 1]))
            .node("MatMul", &["query", "turned keys"], "scores");
        if let Some(mask) = mask {
            toy = toy.node("Add", &["scores", mask], "masked");
        }
        toy.node("Softmax", &[if mask.is_some() { "masked" } else { "scores" }], "p")
            .with("axis", Attribute::Int(-1))
            .node("MatMul", &["p", "v"], "sum")
            .node("Transpose", &["sum"], "turned")
            .with("perm", order([1, 0, 2]))
            .node("Reshape", &["turned", "joined"], "y")
            .model()
    }

    fn run(model: &ModelProto) -> (Vec<f32>, usize) {
        let (signature, onnx) = (signature(), model.encode_to_vec());
        let source =
            GraphSource { signature: &signature, sizes: Sizes { hypotheses: 1, slots: 1 }, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        let fused = parsed.node.iter().filter(|node| node.op_type == SELF_ATTENTION).count();
        let numbers = |(seed, input): (usize, &TensorSignature)| {
            let number = |i: usize| ((i * 7 + seed * 3) as f32).sin();
            let values = (0..input.shape.iter().product()).map(number).collect();
            Tensor::f32(&input.shape, values).unwrap()
        };
        let tensors: Vec<Tensor> = signature.inputs.iter().enumerate().map(numbers).collect();
        let inputs: Vec<(&str, &Tensor)> = signature.inputs.iter().map(|input| input.name.as_str()).zip(&tensors).collect();
        let outputs = Tract::new(1).unwrap().load(&source).unwrap().run(&inputs).unwrap();
        (outputs.iter().flat_map(|output| output.floats().to_vec()).collect(), fused)
    }

    fn node<'a>(model: &'a mut ModelProto, output: &str) -> &'a mut NodeProto {
        model.graph.as_mut().unwrap().node.iter_mut().find(|node| node.output[0] == output).unwrap()
    }

    /// The same with the softmax read once more, to no effect: left to tract.
    fn shared(mut model: ModelProto) -> ModelProto {
        let y = node(&mut model, "y");
        y.output[0] = "z".into();
        let graph = model.graph.as_mut().unwrap();
        graph.node.push(node_of("ReduceMax", &["p"], "most", vec![]));
        graph.node.push(node_of("Sub", &["most", "most"], "none", vec![]));
        graph.node.push(node_of("Add", &["z", "none"], "same", vec![]));
        graph.node.push(node_of("Reshape", &["same", "joined"], "y", vec![]));
        model
    }

    #[test]
    fn attention_is_one_operator_and_gives_the_same() {
        let mut all = Vec::new();
        for mask in [None, Some("row")] {
            let (found, fused) = run(&model(mask));
            let (expected, unfused) = run(&shared(model(mask)));
            assert_eq!((fused, unfused), (usize::from(kernels::available()), 0));
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
            all.push(found);
        }
        assert_ne!(all[0], all[1]);
    }

    #[test]
    fn what_differs_in_anything_is_left_alone() {
        type Change = fn(&mut ModelProto);
        let changes: [(&str, Change); 8] = [
            ("a mask for each query", |m| node(m, "masked").input[1] = "square".into()),
            ("a mask of queries", |m| node(m, "masked").input[1] = "column".into()),
            ("values as keys", |m| node(m, "turned keys").input[0] = "v".into()),
            ("values that are turned", |m| node(m, "turned keys").attribute[0].ints = vec![1, 2, 0]),
            ("keys as values", |m| node(m, "sum").input[1] = "k".into()),
            ("queries from elsewhere", |m| node(m, "q/columns").input[1..3].clone_from_slice(&["4".into(), "8".into()])),
            ("a softmax over heads", |m| node(m, "p").attribute[0].i = 0),
            ("rows in another order", |m| node(m, "turned").attribute[0].ints = vec![1, 2, 0]),
        ];
        for (what, change) in changes {
            let mut model = model(Some("row"));
            change(&mut model);
            let onnx = model.encode_to_vec();
            let signature = signature();
            let sizes = Sizes { hypotheses: 1, slots: 1 };
            let source = GraphSource { signature: &signature, sizes, onnx: &onnx, external: &|_| None };
            let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
            assert!(parsed.node.iter().all(|node| node.op_type != SELF_ATTENTION), "{what}");
        }
    }
}
