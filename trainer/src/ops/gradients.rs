//! Backward passes that leave nothing behind but what they were for.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

/// The gradients of a scalar by variables; those that it does not depend on have none.
///
/// What [`Tensor::backward`] gives holds more: gradients by constants that something of the variables was multiplied with. Each of
/// those was computed of tensors that are tracked, and so keeps alive all that the scalar was computed of, as long as it is kept
/// itself. Here nothing of that is left, `scalar` included.
///
/// # Errors
/// Those of candle.
pub fn gradients<'a>(scalar: Tensor, by: impl IntoIterator<Item = &'a Var>) -> Result<GradStore> {
    let mut all = scalar.backward()?;
    let mut gradients = GradStore::default();
    for variable in by {
        if let Some(gradient) = all.remove(variable) {
            gradients.insert(variable, gradient.detach());
        }
    }
    Ok(gradients)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn nothing_is_kept_but_the_gradients_asked_for() {
        let [x, y, unused] = [3f32, 5.0, 7.0].map(|value| Var::new(value, &Device::Cpu).unwrap());
        let constant = Tensor::new(2f32, &Device::Cpu).unwrap();
        // x · 2 · x + y: the gradient by the constant is computed of x.
        let scalar = || x.mul(&constant).unwrap().mul(&x).unwrap().add(&y).unwrap();
        let all = scalar().backward().unwrap();
        assert!(all.get(&constant).unwrap().track_op(), "candle keeps no graph any more: this module is not needed");
        let found = gradients(scalar(), [&x, &unused]).unwrap();
        assert_eq!(found.get_ids().count(), 1);
        let gradient = found.get(&x).unwrap();
        assert_eq!((gradient.to_scalar::<f32>().unwrap(), gradient.track_op()), (12.0, false));
    }
}
