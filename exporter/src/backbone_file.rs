//! The backbone inside a bundle, as the file that the trainer reads: whoever has a bundle can train on the same features.

use anyhow::{Context, Result};
use prost::Message;
use safetensors::tensor::{Dtype, TensorView};
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{ModelProto, TensorProto};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::Manifest;
use unimo_train::backbone::layer_shapes;

/// The safetensors file of a bundle's backbone, without the classifier (bundles do not need it).
///
/// # Errors
/// A bundle that is damaged or has another backbone.
pub fn extract(bundle: &Bundle) -> Result<Vec<u8>> {
    let precision = bundle.precision(None)?;
    let model =
        ModelProto::decode(bundle.read(&Manifest::graph_file(precision, "vision"))?).context("the vision graph is not ONNX")?;
    let initializers = model.graph.map(|g| g.initializer).unwrap_or_default();
    let weights = bundle.read(&format!("{precision}/weights.bin"))?;
    let mut views = Vec::new();
    for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
        for (kind, shape) in [("bias", &shape[..1]), ("weight", &shape[..])] {
            let name = format!("{layer}.{kind}");
            let stored = format!("backbone.{name}");
            let tensor =
                initializers.iter().find(|t| t.name == stored).with_context(|| format!("the bundle has no weight `{stored}`"))?;
            views.push((name, view(tensor, shape, weights).with_context(|| format!("weight `{stored}`"))?));
        }
    }
    Ok(safetensors::serialize(views, None)?)
}

fn view<'a>(tensor: &TensorProto, shape: &[usize], weights: &'a [u8]) -> Result<TensorView<'a>> {
    let number = |key: &str| -> Result<usize> {
        let entry = tensor.external_data.iter().find(|e| e.key == key).with_context(|| format!("no {key}"))?;
        entry.value.parse().with_context(|| format!("{key} {:?}", entry.value))
    };
    let (offset, length) = (number("offset")?, number("length")?);
    let end = offset.checked_add(length).context("a range beyond memory")?;
    let bytes = weights.get(offset..end).context("lies outside the weights")?;
    let dtype = if tensor.data_type == DataType::Float16 as i32 { Dtype::F16 } else { Dtype::F32 };
    Ok(TensorView::new(dtype, shape.to_vec(), bytes)?)
}
