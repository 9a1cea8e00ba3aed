//! The backbone inside a bundle, as the file that the trainer reads: whoever has a bundle can train on the same features.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use half::f16;
use prost::Message;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{ModelProto, TensorProto};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{Manifest, WEIGHTS};
use unimo_train::backbone::layer_shapes;

use crate::graph::WeightStore;
use crate::quantize::{Quantized, dequantize};

/// The safetensors file of a bundle's backbone, without the classifier (bundles do not need it).
///
/// # Errors
/// A bundle that is damaged or has another backbone.
pub fn extract(bundle: &Bundle) -> Result<Vec<u8>> {
    let precision = bundle.precision(None)?;
    let model =
        ModelProto::decode(bundle.read(&Manifest::graph_file(precision, "vision"))?).context("the vision graph is not ONNX")?;
    let initializers = model.graph.map(|g| g.initializer).unwrap_or_default();
    let weights = bundle.read(&format!("{precision}/{WEIGHTS}"))?;
    let mut tensors = Vec::new();
    for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
        for (kind, shape) in [("bias", &shape[..1]), ("weight", &shape[..])] {
            let name = format!("{layer}.{kind}");
            let stored = format!("backbone.{name}");
            let find = |name: &str| initializers.iter().find(|t| t.name == name);
            let tensor = find(&stored).with_context(|| format!("the bundle has no weight `{stored}`"))?;
            let scales = find(&WeightStore::scales_of(&stored));
            let values = values(tensor, scales, shape, weights).with_context(|| format!("weight `{stored}`"))?;
            tensors.push((name, Tensor::from_vec(values, shape, &Device::Cpu)?));
        }
    }
    Ok(safetensors::serialize(tensors, None)?)
}

/// A weight's values. 8-bit kernels have a scale for each output, the first dimension.
fn values(tensor: &TensorProto, scales: Option<&TensorProto>, shape: &[usize], weights: &[u8]) -> Result<Vec<f32>> {
    let bytes = external(tensor, weights)?;
    let values = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Ok(DataType::Float16) => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Ok(DataType::Int8) => {
            let scales = external(scales.context("has no scales")?, weights)?;
            let scales: Vec<f32> = scales.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            if scales.len() != shape[0] {
                bail!("{} scales for {} outputs", scales.len(), shape[0]);
            }
            dequantize(&Quantized { levels: bytes.iter().map(|b| b.cast_signed()).collect(), scales }, shape, 0)
        }
        _ => bail!("has the unsupported type {}", tensor.data_type),
    };
    if values.len() != shape.iter().product::<usize>() {
        bail!("{} values, expected {shape:?}", values.len());
    }
    Ok(values)
}

/// The bytes of a weight that lies outside of its graph's file.
fn external<'a>(tensor: &TensorProto, weights: &'a [u8]) -> Result<&'a [u8]> {
    let number = |key: &str| -> Result<usize> {
        let entry = tensor.external_data.iter().find(|e| e.key == key).with_context(|| format!("no {key}"))?;
        entry.value.parse().with_context(|| format!("{key} {:?}", entry.value))
    };
    let (offset, length) = (number("offset")?, number("length")?);
    let end = offset.checked_add(length).context("a range beyond memory")?;
    weights.get(offset..end).context("lies outside the weights")
}
