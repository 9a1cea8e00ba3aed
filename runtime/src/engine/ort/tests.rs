use prost::Message;
use tract_onnx::pb::{ModelProto, NodeProto};

use super::super::tests::with_library;
use super::super::toy::{Attribute, Toy};
use super::*;
use crate::bundle::manifest::TensorSignature;

const SIZES: Sizes = Sizes { hypotheses: 1, slots: 1 };

fn signature() -> GraphSignature {
    let tensor = |name: &str| TensorSignature { name: name.to_owned(), shape: vec![1, 3], dtype: Dtype::F32 };
    GraphSignature { name: "toy".to_owned(), inputs: vec![tensor("regions"), tensor("x")], outputs: vec![tensor("y")] }
}

fn engine() -> Option<Ort> {
    with_library(Ort::new(&EngineOptions { engine: EngineKind::Ort, ..EngineOptions::default() }))
}

pub(crate) fn with_device(options: &EngineOptions) -> Result<Ort, EngineError> {
    Ok(Ort { device: Some(AllocationDevice::CPU), ..Ort::new(options)? })
}

fn program(engine: &Ort, signature: GraphSignature, onnx: Vec<u8>) -> Program {
    let (environment, options) = (engine.environment.clone(), engine.options.clone());
    Program { environment, options, signature, sizes: SIZES, file: File { onnx, weights: None, operators: None } }
}

#[test]
fn a_process_has_one_library_and_what_is_named_must_be_there() {
    let Some(_loaded) = engine() else { return };
    let library = ort_library(None).unwrap().path;
    assert_eq!(ort_library(library.parent()).unwrap().path, library, "named by its folder");
    let gone = ort_library(Some(&library.with_file_name("libgone.so"))).unwrap_err().to_string();
    assert!(gone.contains("--ort-lib names") && gone.contains("where there is none"), "{gone}");
}

/// The processor's memory stands for a device's: the copies are made, kept and forgotten alike.
#[test]
fn what_is_given_again_is_copied_to_the_device_once() {
    let Some(engine) = engine() else { return };
    let (signature, onnx) = (signature(), Toy::new(&signature()).node("Sub", &["x", "regions"], "y").model().encode_to_vec());
    let graph = |device| OrtGraph {
        plain: program(&engine, signature.clone(), onnx.clone()),
        sessions: Mutex::default(),
        device,
        cached: None,
        pool: None,
    };
    let (plain, graph) = (graph(None), graph(Some(AllocationDevice::CPU)));
    let tensor = |values: [f32; 3]| Tensor::f32(&[1, 3], values.to_vec()).unwrap();
    let (mut regions, x) = (tensor([1.0, 2.0, 3.0]), tensor([9.0, 7.0, 5.0]));
    let run = |graph: &OrtGraph, regions: &Tensor| graph.run(&[("x", &x), ("regions", regions)]).unwrap()[0].floats().to_vec();
    let kept = |tensor: &Tensor| tensor.native(|_| Err::<OnDevice, ()>(())).ok();

    assert_eq!((run(&plain, &regions), kept(&regions).is_some()), (vec![8.0, 5.0, 2.0], false));
    assert_eq!(run(&graph, &regions), [8.0, 5.0, 2.0]);
    let first = kept(&regions).unwrap();
    assert_eq!(run(&graph, &regions), [8.0, 5.0, 2.0]);
    assert!(Arc::ptr_eq(&first, &kept(&regions).unwrap()) && kept(&x).is_none());
    regions.update(|values| values[0] = 4.0);
    assert_eq!((kept(&regions).is_none(), run(&graph, &regions)), (true, vec![5.0, 5.0, 2.0]));
}

/// The processor's memory stands for a device's.
#[test]
fn what_is_written_on_a_device_is_read_there_by_later_runs() {
    let Some(engine) = engine() else { return };
    let tensor = |name: &str, rows| TensorSignature { name: name.to_owned(), shape: vec![3, rows, 2], dtype: Dtype::F32 };
    let signature = GraphSignature {
        name: "toy".to_owned(),
        inputs: vec![tensor("x", 2), tensor("past_keys", 5), tensor("past_values", 5)],
        outputs: vec![tensor("new_keys", 2), tensor("y", 5), tensor("new_values", 2)],
    };
    let onnx = Toy::new(&signature)
        .node("Neg", &["x"], "new_keys")
        .node("Add", &["x", "x"], "new_values")
        .node("Mul", &["past_keys", "past_values"], "y")
        .model()
        .encode_to_vec();
    let caching = Caching::of(&signature).unwrap();
    for in_place in [true, false] {
        let program = program(&engine, caching.extended.clone(), caching.extend(&onnx));
        let (caching, device, idle) = (caching.clone(), AllocationDevice::CPU, Mutex::default());
        let cached = Arc::new(Cached { program, caching, device, in_place, idle });
        // Two pasts that know nothing of each other, as floats `[3, 5, 2]`.
        let mut pasts = [0, 1].map(|_| (Running::new(cached.clone()).unwrap(), vec![0.0; 30]));
        for (run, slot) in [3, 0, 1, 2, 0].into_iter().enumerate() {
            for (which, (running, keys)) in pasts.iter_mut().enumerate() {
                let x: Vec<f32> = (0..12).map(|i| (100 * run + 50 * which + i) as f32).collect();
                let given = Tensor::f32(&[3, 2, 2], x.clone()).unwrap();
                let outputs = running.run(&[("x", &given)], slot).unwrap();
                assert_eq!((outputs.len(), outputs[0].shape()), (1, &[3, 5, 2][..]));
                let written = |i: usize| (slot..slot + 2).contains(&(i / 2 % 5));
                for (i, (&y, &key)) in outputs[0].floats().iter().zip(&*keys).enumerate() {
                    // Keys are -x where values are 2 x.
                    assert!(written(i) || y == -2.0 * key * key, "{in_place} run {run} of {which}: {i}");
                }
                for (i, x) in x.into_iter().enumerate() {
                    keys[10 * (i / 4) + 2 * slot + i % 4] = x;
                }
            }
        }
        let x = Tensor::zeros(&[3, 2, 2]);
        let error =
            |inputs: &[(&str, &Tensor)], slot| Running::new(cached.clone()).unwrap().run(inputs, slot).unwrap_err().to_string();
        assert_eq!(error(&[("x", &x)], 4), "graph \"toy\": slot is 4, expected at most 3");
        assert!(error(&[("past_keys", &x)], 0).contains("input \"x\" is missing"));
        // Those two are there for others, and what errors were made with is not.
        drop(pasts);
        assert_eq!(cached.idle.lock().unwrap().len(), 2);
    }
}

#[test]
fn a_graph_without_a_past_is_left_alone() {
    let tensor =
        |name: &str, shape: &[usize]| TensorSignature { name: name.to_owned(), shape: shape.to_vec(), dtype: Dtype::F32 };
    let caching = |inputs: &[&TensorSignature], outputs: &[&TensorSignature]| {
        let [inputs, outputs] = [inputs, outputs].map(|tensors| tensors.iter().copied().cloned().collect());
        Caching::of(&GraphSignature { name: "toy".to_owned(), inputs, outputs }).is_some()
    };
    let (past, new) = (tensor("past_a", &[2, 5, 3]), tensor("new_a", &[2, 1, 3]));
    assert!(caching(&[&past], &[&new]));
    assert!(!caching(&[&tensor("a", &[2, 5, 3])], &[&new]));
    assert!(!caching(&[&past], &[&tensor("new_b", &[2, 1, 3])]));
    assert!(!caching(&[&past], &[&tensor("new_a", &[2, 6, 3])]));
    assert!(!caching(&[&past], &[&tensor("new_a", &[2, 1, 4])]));
    assert!(!caching(&[&past, &tensor("past_b", &[2, 5, 3])], &[&new]));
}

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 3) as f32).sin()).collect()
}

/// `y = LayerNorm(row + gelu(x · W + b))` with W `[64, 48]` in 8 bits, for x `[5, 64]`.
fn network() -> (GraphSignature, Toy) {
    let tensor =
        |name: &str, shape: &[usize]| TensorSignature { name: name.to_owned(), shape: shape.to_vec(), dtype: Dtype::F32 };
    let signature = GraphSignature {
        name: "toy".to_owned(),
        inputs: vec![tensor("x", &[5, 64]), tensor("row", &[1, 48])],
        outputs: vec![tensor("y", &[5, 48])],
    };
    let levels: Vec<i8> = (0..64 * 48).map(|i| (i * 37) as i8).collect();
    let toy = Toy::new(&signature)
        .levels("w8", &[64, 48], &levels)
        .floats("scales", &[48], &[0.01; 48])
        .floats("bias", &[48], &numbers(48, 1))
        .floats("weight", &[48], &numbers(48, 2))
        .node("DequantizeLinear", &["w8", "scales"], "w")
        .with("axis", Attribute::Int(1))
        .node("MatMul", &["x", "w"], "product")
        .node("Add", &["product", "bias"], "sum")
        .gelu("sum", 0.5, "gelu")
        .node("Add", &["row", "gelu"], "all")
        .node("LayerNormalization", &["all", "weight", "bias"], "y")
        .with("axis", Attribute::Int(-1));
    (signature, toy)
}

#[test]
fn kernels_of_ours_give_what_the_file_says() {
    let (signature, toy) = network();
    let onnx = toy.model().encode_to_vec();
    let source = GraphSource { signature: &signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
    let (x, row) = (Tensor::f32(&[5, 64], numbers(320, 3)).unwrap(), Tensor::f32(&[1, 48], numbers(48, 4)).unwrap());
    let run = |rewriting, threads| -> Option<Vec<f32>> {
        let options = EngineOptions { engine: EngineKind::Ort, rewriting, threads, ..EngineOptions::default() };
        let graph = with_library(Ort::new(&options))?.load(&source).unwrap();
        // Again, with the shapes that the kernels know by then.
        graph.run(&[("row", &row), ("x", &x)]).unwrap();
        Some(graph.run(&[("row", &row), ("x", &x)]).unwrap()[0].floats().to_vec())
    };
    let Some(expected) = run(false, 1) else { return };
    let rewritten = Rewritten::of(&source).unwrap();
    assert_eq!(rewritten.is_some(), crate::kernels::available());
    // They take part on the processor, where rewriting is wanted, and nowhere else.
    for (provider, rewriting, expected) in [
        (Provider::Cpu, true, crate::kernels::available()),
        (Provider::Cpu, false, false),
        (Provider::Xnnpack, true, false),
        (Provider::Cuda, true, false),
    ] {
        let mut engine = engine().unwrap();
        (engine.options.provider, engine.options.rewriting) = (provider, rewriting);
        assert_eq!(engine.file(&source).unwrap().operators.is_some(), expected, "{provider} {rewriting}");
    }
    for threads in [1, 3] {
        for (found, expected) in run(true, threads).unwrap().iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-5, "{found} {expected}");
        }
    }
    // A node with a number that there is no operator of.
    let Some(rewritten) = rewritten else { return };
    let engine = engine().unwrap();
    let mut program = program(&engine, signature.clone(), rewritten.onnx);
    program.file.operators = Some(Operators::default());
    let error = program.session().err().unwrap();
    assert!(error.to_string().contains("number Some(1) of 0 operators"), "{error}");
}

#[test]
fn graphs_for_tensorrt_and_those_without_work_for_our_kernels_are_left_alone() {
    let rewritten = |signature: &GraphSignature, model: &ModelProto| {
        let onnx = model.encode_to_vec();
        let source = GraphSource { signature, sizes: SIZES, onnx: &onnx, external: &|_| None };
        Rewritten::of(&source).unwrap().is_some()
    };
    let plain = Toy::new(&signature()).node("Sub", &["x", "regions"], "y");
    assert!(!rewritten(&signature(), &plain.model()));
    let quantized = |levels: bool| {
        let (signature, toy) = network();
        let mut model = toy.floats("scale", &[], &[0.1]).model();
        let graph = model.graph.as_mut().unwrap();
        if levels {
            let last = graph.node.last_mut().unwrap();
            last.output[0] = "exact".to_owned();
            let node = |op_type: &str, input: &str, output: &str| NodeProto {
                op_type: op_type.to_owned(),
                input: vec![input.to_owned(), "scale".to_owned()],
                output: vec![output.to_owned()],
                ..NodeProto::default()
            };
            graph.node.extend([node("QuantizeLinear", "exact", "levels"), node("DequantizeLinear", "levels", "y")]);
        }
        rewritten(&signature, &model)
    };
    assert_eq!([false, true].map(quantized), [crate::kernels::available(), false]);
}
