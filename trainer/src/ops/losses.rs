//! Losses against given targets, each a kernel on CUDA devices, which makes the gradient too.

use candle_core::{D, Result, Tensor};

use super::{on_cuda, reference};

fn check(name: &str, x: &Tensor, targets: &Tensor) -> Result<()> {
    if x.shape() != targets.shape() || x.rank() != 2 || x.elem_count() == 0 {
        candle_core::bail!("{name}: {:?} and targets of {:?}", x.shape(), targets.shape());
    }
    Ok(())
}

/// Cross-entropy of the softmax of `logits` `[rows, classes]` with degrees of each class, `targets`, of that shape: summed up over the
/// classes, the mean over the rows. Targets are constants.
///
/// # Errors
/// Other shapes, no values, a dtype other than f32.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check("soft_cross_entropy", logits, targets)?;
    on_cuda!(logits.device(), super::cuda::soft_cross_entropy(logits, targets));
    (reference::log_softmax(logits)? * targets.detach())?.sum(D::Minus1)?.mean_all()?.neg()
}

/// Cross-entropies of the sigmoids of `logits` `[rows, classes]` with `targets`, of that shape: summed up over the classes, the mean over
/// the rows. Targets are constants.
///
/// # Errors
/// Other shapes, no values, a dtype other than f32.
pub fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check("binary_cross_entropy", logits, targets)?;
    on_cuda!(logits.device(), super::cuda::binary_cross_entropy(logits, targets));
    // max(z, 0) − z·y + ln(1 + e^−|z|)
    let softplus = ((logits.abs()?.neg()?.exp()? + 1.0)?).log()?;
    (logits.relu()? - (logits * targets.detach())? + softplus)?.sum(D::Minus1)?.mean_all()
}

/// Mean squared difference of `x` `[rows, width]` and `targets`, of that shape. Targets are constants.
///
/// # Errors
/// Other shapes, no values, a dtype other than f32.
pub fn squared_error(x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check("squared_error", x, targets)?;
    on_cuda!(x.device(), super::cuda::squared_error(x, targets));
    (x - targets.detach())?.sqr()?.mean_all()
}
