//! Attention over stacked caches, as the exporter writes it for `decode`: found whole, and computed by one [`ATTENTION`] node that
//! reads the caches where they lie. tract would cut each layer's part out of them, and lay it out anew, at every step.

use tract_onnx::pb::{GraphProto, NodeProto};

use super::super::operators::ATTENTION;
use super::search::{Search, last_axis, order, other};
use super::{Constants, drop_unread, float, int, node_of};

/// Fuses every such attention; leaves alone what differs from it in anything.
pub(in crate::engine) fn fuse_attention(graph: &mut GraphProto, constants: &Constants<'_>) {
    let found = {
        let search = Search::new(graph, constants);
        let softmaxes = graph.node.iter().filter(|node| node.op_type == "Softmax");
        softmaxes.filter_map(|softmax| search.attention(softmax)).collect::<Vec<_>>()
    };
    for (at, node) in found {
        graph.node[at] = node;
    }
    drop_unread(graph);
}

impl<'a> Search<'a> {
    /// The place of the last node of the attention around a softmax, and what computes all of it.
    fn attention(&self, softmax: &NodeProto) -> Option<(usize, NodeProto)> {
        let joined = self.made(&softmax.input[0], "Concat")?;
        let [of_prefix, of_self, of_past] = joined.input.as_slice() else { return None };
        if !(last_axis(softmax) && last_axis(joined)) {
            return None;
        }
        let (query, prefix_keys, layer) = self.scores(of_prefix)?;
        let sum = self.made(of_self, "ReduceSum")?;
        if self.integers(sum.input.get(1)?)? != [-1] {
            return None;
        }
        let key = other(self.made(&sum.input[0], "Mul")?, query)?;
        let masked = self.made(of_past, "Add")?;
        let (scores, mask) = (&masked.input[0], &masked.input[1]);
        let (past_query, past_keys, past_layer) = self.scores(scores)?;
        if past_query != query || past_layer != layer {
            return None;
        }
        let scaled = self.made(query, "Mul")?;
        let (query, scale) = (&scaled.input[0], self.number(&scaled.input[1])?);

        // What the shares are multiplied with.
        let [_, _, tokens, _] = self.input_dims(prefix_keys)?;
        let (mut prefix_values, mut value, mut past_values, mut sums) = (None, None, None, Vec::new());
        for &reader in self.readers.get(&softmax.output[0])? {
            let slice = &self.graph.node[reader];
            let (_, axis, start, end) = self.slice(slice)?;
            let (_, product) = self.only_reader(&slice.output[0])?;
            sums.push(product.output[0].as_str());
            let factor = other(product, &slice.output[0])?;
            match (product.op_type.as_str(), axis, start) {
                ("MatMul", 2, 0) if end == tokens => prefix_values = Some(self.of_layer(factor)?),
                ("Mul", 2, start) if start == tokens && end == tokens + 1 => value = Some(factor),
                ("MatMul", 2, start) if start == tokens + 1 && end == i64::MAX => past_values = Some(self.of_layer(factor)?),
                _ => return None,
            }
        }
        let ((prefix_values, prefix_layer), (past_values, values_layer)) = (prefix_values?, past_values?);
        if [prefix_layer, values_layer] != [layer; 2] {
            return None;
        }
        let stacked = self.stacked([query, key, value?])?;
        for cache in [prefix_keys, prefix_values, past_keys, past_values] {
            let [_, heads, _, depth] = self.input_dims(cache)?;
            if [heads, depth] != stacked.heads {
                return None;
            }
        }
        let last = self.last(&sums, stacked.hidden())?;
        let inputs = [stacked.qkv, prefix_keys, prefix_values, past_keys, past_values, mask];
        let attributes = vec![int("layer", layer), float("scale", scale)];
        Some((last, node_of(ATTENTION, &inputs, &self.graph.node[last].output[0], attributes)))
    }

    /// `query · keysᵀ` with keys of a layer of a stacked cache: the query, the cache, the layer.
    fn scores(&self, value: &str) -> Option<(&'a str, &'a str, i64)> {
        let product = self.made(value, "MatMul")?;
        let turned = self.made(&product.input[1], "Transpose")?;
        let (cache, layer) = self.of_layer(&turned.input[0])?;
        (order(turned) == [0, 2, 1]).then_some((product.input[0].as_str(), cache, layer))
    }

    /// A layer's part of a stacked cache.
    fn of_layer(&self, value: &str) -> Option<(&'a str, i64)> {
        let shaped = self.made(value, "Reshape")?;
        let (cache, axis, start, end) = self.slice(self.made(&shaped.input[0], "Slice")?)?;
        let dims: [i64; 4] = self.input_dims(cache)?;
        let target = self.integers(&shaped.input[1])?;
        let whole = target.iter().zip(&dims[1..]).all(|(target, dim)| *target == -1 || target == dim);
        (axis == 0 && end == start + 1 && target.len() == 3 && whole).then_some((cache, start))
    }

    /// The node that gives the three values' sum as `[rows, hidden]`.
    fn last(&self, parts: &[&str], hidden: i64) -> Option<usize> {
        let &[first, second, third] = parts else { return None };
        let adds = |a: &str, b: &str| self.only_reader(a).filter(|(_, node)| node.op_type == "Add" && other(node, a) == Some(b));
        let pairs = [(first, second, third), (first, third, second), (second, third, first)];
        let (_, sum) = pairs.into_iter().find_map(|(a, b, c)| {
            let (_, sum) = adds(a, b)?;
            adds(&sum.output[0], c)
        })?;
        self.side_by_side(&sum.output[0], hidden)
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

    const SIZES: Sizes = Sizes { hypotheses: 2, slots: 4 };

    fn signature() -> GraphSignature {
        let tensor =
            |name: &str, shape: &[usize]| TensorSignature { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let (prefix, past) = ([2, 2, 3, 2], [2, 2, 4, 2]);
        let inputs = vec![
            tensor("qkv", &[2, 12]),
            tensor("prefix_keys", &prefix),
            tensor("prefix_values", &prefix),
            tensor("past_keys", &past),
            tensor("past_values", &past),
            tensor("mask", &[2, 4]),
        ];
        GraphSignature { name: "toy".into(), inputs, outputs: vec![tensor("y", &[2, 4])] }
    }

    /// Layer 1 of two, two heads of depth 2, as the exporter writes it.
    fn model() -> ModelProto {
        let mut toy = Toy::new(&signature());
        for number in [0, 1, 2, 3, 4, 8, 12, -1, i64::MAX] {
            toy = toy.constant(&format!("{number}"), &[number]);
        }
        toy = toy.constant("heads", &[-1, 2, 2]).constant("prefix", &[2, 3, 2]).constant("past", &[2, -1, 2]);
        toy = toy.constant("joined", &[-1, 4]).floats("half", &[1], &[0.5]);
        let order = |of: [i64; 3]| Attribute::Ints(of.to_vec());
        for (name, start, end) in [("q", "0", "4"), ("k", "4", "8"), ("v", "8", "12")] {
            let [columns, shaped] = ["columns", "shaped"].map(|part| format!("{name}/{part}"));
            toy = toy
                .node("Slice", &["qkv", start, end, "1"], &columns)
                .node("Reshape", &[&columns, "heads"], &shaped)
                .node("Transpose", &[&shaped], name)
                .with("perm", order([1, 0, 2]));
        }
        for (name, shape) in
            [("prefix_keys", "prefix"), ("prefix_values", "prefix"), ("past_keys", "past"), ("past_values", "past")]
        {
            let [one, layer] = ["one", "layer"].map(|part| format!("{name}/{part}"));
            toy = toy.node("Slice", &[name, "1", "2", "0"], &one).node("Reshape", &[&one, shape], &layer);
        }
        let last = || Attribute::Int(-1);
        toy.node("Mul", &["q", "half"], "query")
            .node("Transpose", &["prefix_keys/layer"], "pk")
            .with("perm", order([0, 2, 1]))
            .node("MatMul", &["query", "pk"], "of_prefix")
            .node("Mul", &["query", "k"], "product")
            .node("ReduceSum", &["product", "-1"], "of_self")
            .with("keepdims", Attribute::Int(1))
            .node("Transpose", &["past_keys/layer"], "sk")
            .with("perm", order([0, 2, 1]))
            .node("MatMul", &["query", "sk"], "scores")
            .node("Add", &["scores", "mask"], "of_past")
            .node("Concat", &["of_prefix", "of_self", "of_past"], "all")
            .with("axis", Attribute::Int(2))
            .node("Softmax", &["all"], "p")
            .with("axis", last())
            .node("Slice", &["p", "0", "3", "2"], "to_prefix")
            .node("Slice", &["p", "3", "4", "2"], "to_self")
            .node("Slice", &["p", "4", "9223372036854775807", "2"], "to_past")
            .node("MatMul", &["to_prefix", "prefix_values/layer"], "from_prefix")
            .node("Mul", &["to_self", "v"], "from_self")
            .node("MatMul", &["to_past", "past_values/layer"], "from_past")
            .node("Add", &["from_prefix", "from_self"], "sum")
            .node("Add", &["sum", "from_past"], "total")
            .node("Transpose", &["total"], "turned")
            .with("perm", order([1, 0, 2]))
            .node("Reshape", &["turned", "joined"], "y")
            .model()
    }

    fn run(model: &ModelProto) -> (Vec<f32>, usize) {
        let (signature, onnx) = (signature(), model.encode_to_vec());
        let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        let fused = parsed.node.iter().filter(|node| node.op_type == ATTENTION).count();
        let numbers = |(seed, input): (usize, &TensorSignature)| {
            let count = input.shape.iter().product::<usize>();
            let number = |i: usize| ((i * 7 + seed * 3) as f32).sin();
            let hidden = |i: usize| if (i + i / 4).is_multiple_of(2) { -1e4 } else { 0.0 };
            let values = (0..count).map(|i| if input.name == "mask" { hidden(i) } else { number(i) }).collect();
            Tensor::f32(&input.shape, values).unwrap()
        };
        let tensors: Vec<Tensor> = signature.inputs.iter().enumerate().map(numbers).collect();
        let inputs: Vec<(&str, &Tensor)> = signature.inputs.iter().map(|input| input.name.as_str()).zip(&tensors).collect();
        let outputs = Tract::new(1).unwrap().load(&source).unwrap().run(&inputs).unwrap();
        (outputs[0].floats().to_vec(), fused)
    }

    fn node<'a>(model: &'a mut ModelProto, output: &str) -> &'a mut NodeProto {
        model.graph.as_mut().unwrap().node.iter_mut().find(|node| node.output[0] == output).unwrap()
    }

    #[test]
    fn attention_over_caches_is_one_operator_and_gives_the_same() {
        let (found, fused) = run(&model());
        // Something in between that another node reads too: left to tract.
        let mut shared = model();
        let y = node(&mut shared, "y").clone();
        let graph = shared.graph.as_mut().unwrap();
        *graph.node.last_mut().unwrap() = NodeProto { output: vec!["z".into()], ..y };
        graph.node.push(node_of("ReduceMax", &["p"], "most", vec![]));
        graph.node.push(node_of("Min", &["most", "zero"], "none", vec![]));
        graph.node.push(node_of("Add", &["z", "none"], "same", vec![]));
        graph.node.push(node_of("Reshape", &["same", "joined"], "y", vec![]));
        let mut zero = graph.initializer.iter().find(|tensor| tensor.name == "half").unwrap().clone();
        (zero.name, zero.raw_data) = ("zero".into(), vec![0; 4]);
        graph.initializer.push(zero);
        let (expected, unfused) = run(&shared);
        assert_eq!((fused, unfused), (usize::from(kernels::available()), 0));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn what_differs_in_anything_is_left_alone() {
        type Change = fn(&mut ModelProto);
        let changes: [(&str, Change); 9] = [
            ("another layer's values", |m| node(m, "past_values/one").input[1..3].clone_from_slice(&["0".into(), "1".into()])),
            ("a cache that is no input", |m| node(m, "past_values/one").input[0] = "past_values/half".into()),
            ("keys as values", |m| node(m, "from_self").input[1] = "k".into()),
            ("another query", |m| node(m, "scores").input[0] = "q".into()),
            ("queries from elsewhere", |m| node(m, "q/columns").input[1..3].clone_from_slice(&["4".into(), "8".into()])),
            ("a product more", |m| node(m, "total").input[0] = "from_prefix".into()),
            ("a difference", |m| node(m, "sum").op_type = "Sub".into()),
            ("a softmax over heads", |m| node(m, "p").attribute[0].i = 0),
            ("rows in another order", |m| node(m, "turned").attribute[0].ints = vec![1, 2, 0]),
        ];
        let usual = run(&model()).0;
        for (what, change) in changes {
            let mut model = model();
            let half = node_of("Mul", &["past_values", "half"], "past_values/half", vec![]);
            model.graph.as_mut().unwrap().node.insert(0, half);
            change(&mut model);
            let (found, fused) = run(&model);
            assert_eq!(fused, 0, "{what}");
            assert_ne!(found, usual, "{what}");
        }
    }
}
