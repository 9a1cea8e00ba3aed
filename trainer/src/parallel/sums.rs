//! Sums of tensors over the ranks.

use anyhow::Result;
use candle_core::Tensor;

use super::Collective;

/// Replaces tensors by their sums over all ranks, which all bring as many of the same sizes. Contiguous f32, whose memory nothing else
/// holds.
///
/// Where the ranks have a way between their devices, these sum, and no host waits for them.
///
/// # Errors
/// Those of candle; a rank that is gone.
pub fn of_tensors(ranks: &dyn Collective, tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
    if let Some(devices) = ranks.devices() {
        devices.start(&tensors)?;
        devices.join()?;
        return Ok(tensors);
    }
    let sum = |tensor: Tensor| {
        let mut values = tensor.flatten_all()?.to_vec1::<f32>()?;
        ranks.all_reduce(&mut values)?;
        Ok(Tensor::from_vec(values, tensor.shape(), tensor.device())?)
    };
    tensors.into_iter().map(sum).collect()
}
