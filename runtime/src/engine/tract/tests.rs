use prost::Message;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{GraphProto, ModelProto, type_proto};
use tract_onnx::prelude::{IntoTValue, tvec};

use super::super::cost::graph_cost;
use super::super::operators::LINEAR;
use super::super::toy::{Attribute, Toy, halves};
use super::*;
use crate::bundle::manifest::{Sizes, TensorSignature};
use crate::kernels;

const SIZES: Sizes = Sizes { hypotheses: 2, slots: 4 };

fn signature() -> GraphSignature {
    let tensor = |name: &str| TensorSignature { name: name.to_owned(), shape: vec![1, 2], dtype: Dtype::F32 };
    GraphSignature { name: "toy".to_owned(), inputs: vec![tensor("x")], outputs: vec![tensor("y")] }
}

/// `y = x · W + x · Wᵀ` for one `W` `[2, 2]`, stored in 16 bits outside of the file at byte 2.
fn model() -> ModelProto {
    Toy::new(&signature())
        .external("w16", &[2, 2], 2)
        .node("Cast", &["w16"], "w")
        .with("to", Attribute::Int(DataType::Float as i64))
        .node("Transpose", &["w"], "wt")
        .with("perm", Attribute::Ints(vec![1, 0]))
        .node("MatMul", &["x", "w"], "a")
        .node("MatMul", &["x", "wt"], "b")
        .node("Add", &["a", "b"], "y")
        .model()
}

fn load(model: &ModelProto, signature: &GraphSignature, threads: usize) -> Result<Box<dyn Graph>, EngineError> {
    let (onnx, weights) = (model.encode_to_vec(), halves(&[9.0, 1.0, 2.0, 3.0, 4.0]));
    let external = |location: &str| (location == "weights.bin").then(|| weights.clone().into());
    Tract::new(threads)?.load(&GraphSource { signature, sizes: SIZES, onnx: &onnx, external: &external })
}

#[test]
fn sixteen_bit_weights_are_folded_and_run() {
    let (onnx, weights) = (model().encode_to_vec(), halves(&[9.0, 1.0, 2.0, 3.0, 4.0]));
    let source = GraphSource { signature: &signature(), sizes: SIZES, onnx: &onnx, external: &|_| Some(weights.clone().into()) };
    let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
    let operators: Vec<&str> = parsed.node.iter().map(|node| node.op_type.as_str()).collect();
    if kernels::available() {
        assert_eq!((operators, parsed.initializer.len()), (vec![LINEAR, LINEAR, "Add"], 0));
        let weights: Vec<Vec<u8>> = parsed.node[..2].iter().map(|node| node.attribute[0].t.clone().unwrap().raw_data).collect();
        let floats = |values: [f32; 4]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(weights, [floats([1.0, 2.0, 3.0, 4.0]), floats([1.0, 3.0, 2.0, 4.0])]);
    } else {
        assert_eq!(operators, ["MatMul", "MatMul", "Add"]);
    }
    for threads in [1, 2] {
        let graph = load(&model(), &signature(), threads).unwrap();
        let x = Tensor::f32(&[1, 2], vec![1.0, 10.0]).unwrap();
        let y = graph.run(&[("x", &x)]).unwrap();
        // W = [1 2; 3 4]: (31, 42) + (21, 43), exact in binary.
        assert_eq!(y[0].floats(), [52.0, 85.0]);
    }
}

#[test]
fn eight_bit_weights_have_the_scales_of_their_axis() {
    // W = [1 −2; 3 −4] by row: [0.5 −1; 30 −40]; by column: [0.5 −20; 1.5 −40].
    for (axis, first) in [(0, [300.5, -401.0]), (1, [15.5, -420.0]), (-1, [15.5, -420.0])] {
        let model = Toy::new(&signature())
            .levels("w8", &[2, 2], &[1, -2, 3, -4])
            .floats("scales", &[2], &[0.5, 10.0])
            .node("DequantizeLinear", &["w8", "scales"], "w")
            .with("axis", Attribute::Int(axis))
            .node("Transpose", &["w"], "wt")
            .with("perm", Attribute::Ints(vec![1, 0]))
            .node("MatMul", &["x", "wt"], "a")
            .node("MatMul", &["x", "w"], "b")
            .node("Sub", &["b", "a"], "c")
            .node("Add", &["a", "c"], "y")
            .model();
        let onnx = model.encode_to_vec();
        let source = GraphSource { signature: &signature(), sizes: SIZES, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        assert!(parsed.node.iter().all(|node| node.op_type != "DequantizeLinear" && node.op_type != "Transpose"));
        // One of the two products has a scale for each output, and stays in 8 bits.
        let types: Vec<i32> =
            parsed.node.iter().filter(|node| node.op_type == LINEAR).map(|node| weight(node).data_type).collect();
        let eight = if axis == 0 { DataType::Int8 } else { DataType::Float } as i32;
        let other = if axis == 0 { DataType::Float } else { DataType::Int8 } as i32;
        let expected = if kernels::available() { vec![eight, other] } else { Vec::new() };
        assert_eq!(types, expected, "axis {axis}");
        let x = Tensor::f32(&[1, 2], vec![1.0, 10.0]).unwrap();
        let y = load(&model, &signature(), 1).unwrap().run(&[("x", &x)]).unwrap();
        assert_eq!(y[0].floats(), first, "axis {axis}");
    }
}

#[test]
fn products_in_integers_are_one_operator() {
    // Rows [1 10] and [0 0.5]: levels of 10/255 and 0.5/255, zero at 0. W = [1 −2; 3 −4], scales by column (0.5, 10).
    let signature = {
        let tensor = |name: &str| TensorSignature { name: name.to_owned(), shape: vec![2, 2], dtype: Dtype::F32 };
        GraphSignature { name: "toy".to_owned(), inputs: vec![tensor("x")], outputs: vec![tensor("y")] }
    };
    let toy = |transposed: bool| {
        let levels = if transposed { [1, 3, -2, -4] } else { [1, -2, 3, -4] };
        let mut toy = Toy::new(&signature).levels("w8", &[2, 2], &levels).floats("scales", &[2], &[0.5, 10.0]);
        toy = toy.floats("bias", &[2], &[0.25, -0.5]);
        if transposed {
            toy = toy.node("Transpose", &["w8"], "w").with("perm", Attribute::Ints(vec![1, 0]));
        }
        toy.node("DynamicQuantizeLinear", &["x"], "levels")
            .also(&["scale", "zero"])
            .node("MatMulInteger", &["levels", if transposed { "w" } else { "w8" }, "zero"], "sums")
            .node("Cast", &["sums"], "floats")
            .with("to", Attribute::Int(DataType::Float as i64))
            .node("Mul", &["scales", "scale"], "both")
            .node("Mul", &["floats", "both"], "product")
            .node("Add", &["product", "bias"], "y")
    };
    let x = Tensor::f32(&[2, 2], vec![1.0, 10.0, 0.0, 0.5]).unwrap();
    for transposed in [false, true] {
        let model = toy(transposed).model();
        let onnx = model.encode_to_vec();
        let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        let y = load(&model, &signature, 1).unwrap().run(&[("x", &x)]).unwrap();
        let found = y[0].floats();
        if kernels::available() {
            let operators: Vec<&str> = parsed.node.iter().map(|node| node.op_type.as_str()).collect();
            assert_eq!((operators, parsed.initializer.len()), (vec![LINEAR], 0));
            assert_eq!(weight(&parsed.node[0]).data_type, DataType::Int8 as i32);
            // A row's levels: 1 is 25.5 of 10/255, rounded to even; 0.5 is all of its own row's.
            let one = 26.0 / 255.0 * 10.0;
            let expected = [0.5 * (one + 30.0) + 0.25, 10.0 * (-2.0 * one - 40.0) - 0.5, 0.75 + 0.25, -20.0 - 0.5];
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
        for (found, float) in found.iter().zip([15.75, -420.5, 1.0, -20.5]) {
            assert!((found - float).abs() < 0.02 * 40.0, "{found} {float}");
        }
    }
    // Scales of another count are not this pattern; tract has its say.
    let mut model = toy(false).model();
    let scales = &mut model.graph.as_mut().unwrap().initializer[1];
    scales.dims = vec![1];
    scales.raw_data.truncate(4);
    let onnx = model.encode_to_vec();
    let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
    let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
    assert!(parsed.node.iter().all(|node| node.op_type != LINEAR));
}

#[test]
fn four_bit_products_are_one_operator_or_tracts_own() {
    let tensor = |name: &str, width| TensorSignature { name: name.to_owned(), shape: vec![2, width], dtype: Dtype::F32 };
    let signature = GraphSignature { name: "toy".to_owned(), inputs: vec![tensor("x", 64)], outputs: vec![tensor("y", 3)] };
    let levels: Vec<u8> = (0..96).map(|i| (i * 37) as u8).collect();
    let scales: Vec<f32> = (0..6).map(|i| 0.25 - 0.125 * i as f32).collect();
    let toy = |accuracy, block| {
        Toy::new(&signature)
            .nibbles("w4", &[3, 2, 16], &levels)
            .halves("scales16", &[6], &scales)
            .floats("bias", &[3], &[1.0, 2.0, 3.0])
            .node("Cast", &["scales16"], "scales")
            .with("to", Attribute::Int(DataType::Float as i64))
            .node("MatMulNBits", &["x", "w4", "scales"], "product")
            .with("K", Attribute::Int(64))
            .with("N", Attribute::Int(3))
            .with("bits", Attribute::Int(4))
            .with("block_size", Attribute::Int(block))
            .with("accuracy_level", Attribute::Int(accuracy))
            .node("Add", &["product", "bias"], "y")
            .model()
    };
    let x: Vec<f32> = (0..128).map(|i| ((i * 29 % 64) as f32 - 20.0) / 16.0).collect();
    let expected = |row: usize, n: usize| -> f32 {
        let term = |k: usize| {
            let byte = levels[n * 32 + k / 2];
            let level = if k.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
            (f32::from(level) - 8.0) * scales[n * 2 + k / 32] * x[row * 64 + k]
        };
        (0..64).map(term).sum::<f32>() + [1.0, 2.0, 3.0][n]
    };
    let input = Tensor::f32(&[2, 64], x.clone()).unwrap();
    for (accuracy, tolerance) in [(1, 1e-3), (4, 1.0)] {
        let model = toy(accuracy, 32);
        let onnx = model.encode_to_vec();
        let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
        let operators = |graph: &GraphProto| graph.node.iter().map(|node| node.op_type.clone()).collect::<Vec<_>>();
        let plain = onnx::parse_plain(&source).unwrap();
        assert_eq!(operators(plain.graph.as_ref().unwrap()), ["MatMulNBits", "Add"]);
        let runnable =
            tract_onnx::onnx().model_for_proto_model(&plain).unwrap().into_optimized().unwrap().into_runnable().unwrap();
        let y = runnable.run(tvec!(to_tract(&input).unwrap().into_tvalue())).unwrap();
        for (at, found) in floats(&y[0]).unwrap().iter().enumerate() {
            assert!((found - expected(at / 3, at % 3)).abs() < 1e-3, "tract's own: {found}");
        }
        assert_eq!(graph_cost(&source).unwrap().operations, 2 * 2 * 64 * 3);
        if kernels::available() {
            let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
            assert_eq!((operators(&parsed), parsed.initializer.len()), (vec![LINEAR.to_owned()], 0));
            assert_eq!(weight(&parsed.node[0]).raw_data, levels, "weights stay in 4 bits");
        }
        let y = load(&model, &signature, 1).unwrap().run(&[("x", &input)]).unwrap();
        let mut furthest = 0f32;
        for (at, found) in y[0].floats().iter().enumerate() {
            furthest = furthest.max((found - expected(at / 3, at % 3)).abs());
        }
        assert!(furthest < tolerance, "{accuracy}: {furthest}");
        // What is rounded to 8 bits is not what is not.
        assert!(accuracy == 1 || !kernels::available() || furthest > 1e-3, "{furthest}");
    }
    // Blocks of another size are none that bundles hold.
    let error = load(&toy(1, 16), &signature, 1).err().unwrap().to_string();
    assert!(error.contains("MatMulNBits of [\"product\"] is none of 4 bits in whole blocks of 32"), "{error}");
}

fn weight(node: &tract_onnx::pb::NodeProto) -> tract_onnx::pb::TensorProto {
    node.attribute.iter().find(|attribute| attribute.name == "weight").and_then(|attribute| attribute.t.clone()).unwrap()
}

#[test]
fn bias_and_gelu_belong_to_their_product_where_nobody_else_reads_it() {
    let toy = || {
        Toy::new(&signature())
            .levels("w8", &[2, 2], &[1, -2, 3, -4])
            .floats("scales", &[2], &[0.5, 0.1])
            .floats("bias", &[2], &[0.25, -0.5])
            .node("DequantizeLinear", &["w8", "scales"], "w")
            .with("axis", Attribute::Int(1))
            .node("MatMul", &["x", "w"], "product")
            .node("Add", &["product", "bias"], "sum")
    };
    let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()));
    // x = (1, −0.5): sums (1 − 3/2)·0.5 + 0.25 = 0 and (−2 + 2)·0.1 − 0.5 = −0.5.
    let x = Tensor::f32(&[1, 2], vec![1.0, -0.5]).unwrap();
    let alone = toy().gelu("sum", 0.5, "y").model();
    let shared = toy().gelu("sum", 0.5, "gelu").node("Add", &["gelu", "erf"], "y").model();
    let other = toy().gelu("sum", 0.4, "y").model();
    for (model, operators) in [(alone, 1), (other, 6), (shared, 7)] {
        let onnx = model.encode_to_vec();
        let source = GraphSource { signature: &signature(), sizes: SIZES, onnx: &onnx, external: &|_| None };
        let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
        if kernels::available() {
            let found: Vec<_> = parsed.node.iter().map(|node| &node.op_type).collect();
            assert_eq!((parsed.node.len(), parsed.node[0].op_type.as_str()), (operators, LINEAR), "{found:?}");
        }
        let y = load(&model, &signature(), 1).unwrap().run(&[("x", &x)]).unwrap();
        for (found, sum) in y[0].floats().iter().zip([0.0, -0.5]) {
            let expected = match operators {
                1 => gelu(sum),
                6 => 0.8 * gelu(sum),
                _ => gelu(sum) + erf(sum / 2f64.sqrt()),
            };
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}

/// The error function by its series, for small arguments.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..30 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn rows_of_a_table_in_eight_bits_are_scaled_as_they_are_read() {
    let tensor = |name: &str, shape: &[usize], dtype| TensorSignature { name: name.to_owned(), shape: shape.to_vec(), dtype };
    let signature = GraphSignature {
        name: "toy".to_owned(),
        inputs: vec![tensor("ids", &[3], Dtype::I64)],
        outputs: vec![tensor("y", &[3, 2], Dtype::F32)],
    };
    let model = Toy::new(&signature)
        .levels("table8", &[3, 2], &[1, -2, 3, -4, 5, -6])
        .floats("scales", &[3], &[0.5, 2.0, 10.0])
        .node("DequantizeLinear", &["table8", "scales"], "table")
        .with("axis", Attribute::Int(0))
        .node("Gather", &["table", "ids"], "y")
        .model();
    let onnx = model.encode_to_vec();
    let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
    let parsed = onnx::parse(&source).unwrap().0.graph.unwrap();
    let kept = parsed.initializer.iter().find(|tensor| tensor.dims == [3, 2]).unwrap();
    let expected = if kernels::available() { DataType::Int8 } else { DataType::Float };
    assert_eq!(kept.data_type, expected as i32);
    let ids = Tensor::i64(&[3], vec![2, 0, 2]).unwrap();
    let y = load(&model, &signature, 1).unwrap().run(&[("ids", &ids)]).unwrap();
    assert_eq!(y[0].floats(), [50.0, -60.0, 0.5, -1.0, 50.0, -60.0]);
}

#[test]
fn sizes_that_nothing_fixes_are_refused() {
    let named = |name: &str| {
        let mut model = model();
        let input = model.graph.as_mut().and_then(|graph| graph.input[0].r#type.as_mut()).and_then(|t| t.value.as_mut());
        let Some(type_proto::Value::TensorType(tensor)) = input else { panic!("an input is a tensor") };
        tensor.shape.as_mut().unwrap().dim[1].value = Some(dimension::Value::DimParam(name.to_owned()));
        load(&model, &signature(), 1)
    };
    assert!(named("hypotheses").is_ok());
    let error = named("batch").err().unwrap().to_string();
    assert!(error.contains("\"x\" has a size \"batch\" that nothing fixes"), "{error}");
}

#[test]
fn bad_inputs_are_refused() {
    let graph = load(&model(), &signature(), 1).unwrap();
    let (flat, nan) = (Tensor::zeros(&[2]), Tensor::f32(&[1, 2], vec![f32::NAN, 0.0]).unwrap());
    let error = |inputs: &[(&str, &Tensor)]| graph.run(inputs).unwrap_err().to_string();
    assert_eq!(error(&[("z", &flat)]), "graph \"toy\": input \"x\" is missing, expected F32 [1, 2]");
    assert_eq!(error(&[("x", &flat)]), "graph \"toy\": input \"x\" is F32 [2], expected F32 [1, 2]");
    assert_eq!(error(&[("x", &nan)]), "graph \"toy\" gave a value that is no number in \"y\"");
}

#[test]
fn malformed_graphs_have_their_sentences() {
    type Break = fn(&mut GraphProto);
    fn entry(graph: &mut GraphProto, key: usize, value: &str) {
        graph.initializer[0].external_data[key].value = value.to_owned();
    }
    let cases: [(Break, &str); 11] = [
        (|g| entry(g, 1, "4"), "tensor \"w16\" is out of range: 8 bytes at 4 of weights.bin, which has 10"),
        (|g| entry(g, 1, "18446744073709551615"), "is out of range"),
        (|g| entry(g, 1, "-1"), "has the offset \"-1\", which is no number"),
        (|g| entry(g, 2, "6"), "has 6 bytes, its shape [2, 2] needs 8"),
        (|g| entry(g, 0, "../secret"), "lies in \"../secret\", which the bundle does not hold"),
        (|g| drop(g.initializer[0].external_data.pop()), "is external but has no length"),
        (|g| g.initializer[0].dims = vec![i64::MAX, 4], "has the impossible shape"),
        (|g| g.initializer[0].dims = vec![-2, -2], "has the impossible shape"),
        (|g| g.initializer[0].data_type = 77, "has the unsupported type 77"),
        (|g| g.output[0].name = "z".to_owned(), "its outputs are [\"z\"], expected [\"y\"]"),
        (|g| g.node[2].op_type = "Teleport".to_owned(), "Teleport"),
    ];
    for (break_it, message) in cases {
        let mut model = model();
        break_it(model.graph.as_mut().unwrap());
        let error = load(&model, &signature(), 1).err().unwrap().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    let mut wide = signature();
    wide.outputs[0].shape = vec![1, 3];
    let error = load(&model(), &wide, 1).err().unwrap().to_string();
    assert!(error.contains("output \"y\" is F32") && error.ends_with("expected F32 [1, 3]"), "{error}");
    let garbage = GraphSource { signature: &signature(), sizes: SIZES, onnx: b"\xff\xff", external: &|_| None };
    assert!(Tract::new(1).unwrap().load(&garbage).is_err());
}
