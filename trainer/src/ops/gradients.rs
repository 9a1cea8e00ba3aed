//! Backward passes that leave nothing behind but what they were for, and how one goes on where another has ended.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};

/// The gradients of a scalar by variables; those that it does not depend on have none.
///
/// What [`Tensor::backward`] gives holds more: gradients by constants that something of the variables was multiplied with. Each of
/// those was computed of tensors that are tracked, and so keeps alive all that the scalar was computed of, as long as it is kept
/// itself. Here nothing of that is left, `scalar` included.
///
/// # Errors
/// Those of candle.
pub fn gradients<'a>(scalar: Tensor, by: impl IntoIterator<Item = &'a Var>) -> Result<GradStore> {
    let mut found = scalar.backward()?;
    let mut all = GradStore::default();
    for variable in by {
        if let Some(gradient) = found.remove(variable) {
            all.insert(variable, gradient.detach());
        }
    }
    Ok(all)
}

/// Adds a gradient to what there is.
///
/// # Errors
/// Those of candle.
pub(crate) fn add_gradient(all: &mut GradStore, by: &Tensor, gradient: Tensor) -> Result<()> {
    let sum = match all.remove(by) {
        Some(so_far) => (so_far + gradient)?,
        None => gradient,
    };
    all.insert(by, sum);
    Ok(())
}

/// A scalar, zero, whose gradient by `x` is `gradient`, of its shape: what a backward pass that has come to `x` goes on with. It may be
/// added to other scalars and do nothing else: the gradient is taken as it is.
///
/// The sum of the product has that gradient too, and would read `x`; on a CUDA device one block of candle's would add up all of it.
///
/// # Errors
/// Other shapes, and those of candle.
pub(crate) fn carrying(x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if x.shape() != gradient.shape() {
        candle_core::bail!("a gradient of {:?} by {:?}", gradient.shape(), x.shape());
    }
    x.apply_op1(Carrying { gradient: gradient.detach() })
}

struct Carrying {
    gradient: Tensor,
}

impl CustomOp1 for Carrying {
    fn name(&self) -> &'static str {
        "carrying"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((super::cuda::zero(&x.device)?, Shape::from(())))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }

    fn bwd(&self, _x: &Tensor, _result: &Tensor, _gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// d/dx of Σ (2x)² from x = (3, 5), cut in two at 2x, and of another summand beside it.
    #[test]
    fn a_gradient_is_carried_on_from_where_it_was_cut() {
        let x = Var::new(&[3f32, 5.0], &Device::Cpu).unwrap();
        let doubled = x.affine(2.0, 0.0).unwrap();
        let upper = Var::from_tensor(&doubled.detach()).unwrap();
        let mut by_upper = gradients(upper.sqr().unwrap().sum_all().unwrap(), [&upper]).unwrap();
        let scalar = carrying(&doubled, &by_upper.remove(&upper).unwrap()).unwrap();
        assert_eq!(scalar.to_scalar::<f32>().unwrap(), 0.0);
        let found = gradients((scalar + x.sum_all().unwrap().affine(0.5, 0.0).unwrap()).unwrap(), [&x]).unwrap();
        assert_eq!(found.get(&x).unwrap().to_vec1::<f32>().unwrap(), [24.5, 40.5]);
        assert!(carrying(&doubled, &Tensor::new(&[1f32], &Device::Cpu).unwrap()).is_err());
    }

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
