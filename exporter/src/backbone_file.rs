//! The backbone inside a bundle, as the file that the trainer reads: whoever has a bundle can train on the same features.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use unimo::bundle::Bundle;
use unimo_train::backbone::layer_shapes;

use crate::graph::WeightStore;
use crate::stored;

/// The safetensors file of a bundle's backbone, without the classifier (bundles do not need it).
///
/// # Errors
/// A bundle that is damaged or has another backbone.
pub fn extract(bundle: &Bundle) -> Result<Vec<u8>> {
    of_weights(&stored::weights_of(bundle, bundle.precision(None)?)?)
}

/// The same of weights that were read.
pub(crate) fn of_weights(weights: &WeightStore) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
        for (kind, shape) in [("bias", &shape[..1]), ("weight", &shape[..])] {
            let name = format!("{layer}.{kind}");
            let stored = format!("backbone.{name}");
            let found = weights.get(&stored).with_context(|| format!("the bundle has no weight `{stored}`"))?;
            if found.shape != shape {
                bail!("weight `{stored}`: {:?}, expected {shape:?}", found.shape);
            }
            tensors.push((name, Tensor::from_vec(weights.values(&stored)?, shape, &Device::Cpu)?));
        }
    }
    Ok(safetensors::serialize(tensors, None)?)
}
