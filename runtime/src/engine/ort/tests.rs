use prost::Message;

use super::super::toy::Toy;
use super::*;
use crate::bundle::manifest::TensorSignature;

const SIZES: Sizes = Sizes { hypotheses: 1, slots: 1 };

fn signature() -> GraphSignature {
    let tensor = |name: &str| TensorSignature { name: name.to_owned(), shape: vec![1, 3], dtype: Dtype::F32 };
    GraphSignature { name: "toy".to_owned(), inputs: vec![tensor("regions"), tensor("x")], outputs: vec![tensor("y")] }
}

/// None, said so, where no library lies and none must.
fn engine() -> Option<Ort> {
    match Ort::new(&EngineOptions { engine: EngineKind::Ort, ..EngineOptions::default() }) {
        Ok(engine) => Some(engine),
        Err(error) if std::env::var_os("UNIMO_REQUIRE_ORT").is_some() => panic!("{error}"),
        Err(error) => {
            println!("not tested: {error}");
            None
        }
    }
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
        sessions: Mutex::default(),
        environment: engine.environment.clone(),
        options: engine.options.clone(),
        signature: signature.clone(),
        sizes: SIZES,
        onnx: onnx.clone().into(),
        weights: None,
        device,
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
