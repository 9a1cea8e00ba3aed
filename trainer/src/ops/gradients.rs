//! Backward passes that leave nothing behind but what they were for, and how one goes on where another has ended.
//!
//! candle clears memory for every gradient and adds to that, which is two calls of a device and one memory for each gradient that there
//! is. Operators on kernels leave those by variables here instead, where they stay as they are.

use std::cell::RefCell;

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
    gradients_of_each(vec![scalar], by)
}

/// The gradients of a sum of scalars, each taken back by itself, so that nothing is made of the sum. Of what two of them have in common,
/// operators that keep something for one way back must be no part.
///
/// # Errors
/// Those of candle.
pub(crate) fn gradients_of_each<'a>(scalars: Vec<Tensor>, by: impl IntoIterator<Item = &'a Var>) -> Result<GradStore> {
    let by: Vec<&Var> = by.into_iter().collect();
    let before = LEFT.replace(Some(GradStore::default()));
    let of_candle = of_candle(scalars, &by);
    let mut left = LEFT.replace(before).unwrap_or_default();
    let mut all = of_candle?;
    for variable in by {
        if let Some(gradient) = left.remove(variable) {
            add_to(&mut all, variable, gradient)?;
        }
    }
    Ok(all)
}

/// What candle finds, without what operators leave.
fn of_candle(scalars: Vec<Tensor>, by: &[&Var]) -> Result<GradStore> {
    let mut all = GradStore::default();
    for scalar in scalars {
        let mut found = scalar.backward()?;
        for variable in by {
            if let Some(gradient) = found.remove(variable) {
                add_to(&mut all, variable, gradient.detach())?;
            }
        }
    }
    Ok(all)
}

/// Adds a gradient to what there is.
///
/// # Errors
/// Those of candle.
pub(crate) fn add_to(all: &mut GradStore, by: &Tensor, gradient: Tensor) -> Result<()> {
    let sum = match all.remove(by) {
        Some(so_far) => (so_far + gradient)?,
        None => gradient,
    };
    all.insert(by, sum);
    Ok(())
}

thread_local! {
    /// Gradients by variables, while [`gradients`] is at work on this thread.
    static LEFT: RefCell<Option<GradStore>> = const { RefCell::new(None) };
}

/// Takes an operator's gradient by one of its inputs, if that is a variable whose gradients are being collected; gives it back otherwise.
///
/// # Errors
/// Those of candle.
#[cfg(any(feature = "cuda", test))]
pub(super) fn leave(input: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    LEFT.with_borrow_mut(|left| {
        let Some(left) = left.as_mut().filter(|_| input.is_variable()) else { return Ok(Some(gradient)) };
        add_to(left, input, gradient).map(|()| None)
    })
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
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::cuda::emulation::emulated;

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

    /// Of a matrix that two layers and candle make use of.
    #[test]
    fn what_operators_leave_is_added_to_what_candle_found() {
        let tensor = |shape: (usize, usize), phase: f32| {
            let values = (0..shape.0 * shape.1).map(|i| (i as f32 * 0.9 + phase).sin()).collect();
            Var::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (weight, bias, x) = (tensor((3, 3), 0.0), Var::zeros(3, DType::F32, &Device::Cpu).unwrap(), tensor((5, 3), 1.0));
        let scalars = || -> Result<[Tensor; 2]> {
            let y = crate::ops::linear(&crate::ops::linear(&x, &weight, &bias)?, &weight, &bias)?;
            Ok([y.sqr()?.sum_all()?, crate::ops::linear(&x, &weight, &bias)?.mean_all()?])
        };
        let by = [&weight, &bias, &x];
        emulated(0, || {
            let sum = || {
                let [a, b] = scalars().unwrap();
                ((a + b).unwrap() + weight.as_tensor().sqr().unwrap().sum_all().unwrap()).unwrap()
            };
            let expected = sum().backward().unwrap();
            let [a, b] = scalars().unwrap();
            let each = vec![a, weight.as_tensor().sqr().unwrap().sum_all().unwrap(), b];
            for found in [gradients(sum(), by).unwrap(), gradients_of_each(each, by).unwrap()] {
                for var in by {
                    let [expected, found] = [&expected, &found].map(|of| of.get(var).unwrap().flatten_all().unwrap());
                    let off = (expected - found).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                    assert!(off < 1e-5, "off by {off}");
                }
            }
        });
        assert!(LEFT.take().is_none(), "gradients are still collected");
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
