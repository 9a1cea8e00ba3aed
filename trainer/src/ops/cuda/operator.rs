//! Differentiable operators whose passes are kernels, and how they become candle's.

use std::any::Any;
use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor};

#[cfg(test)]
use super::emulation::Emulated;
use super::machine::{Address, Machine};
#[cfg(feature = "cuda")]
use super::nvidia::Nvidia;

/// A contiguous f32 tensor where the machine has it.
pub struct Input {
    /// First value.
    pub at: Address,
    /// Shape.
    pub shape: Shape,
    /// Whether a gradient by it leads anywhere.
    pub wanted: bool,
}

impl Input {
    /// Number of values.
    pub fn count(&self) -> usize {
        self.shape.elem_count()
    }

    /// Rows and columns, where the last dimension is a row.
    pub fn matrix(&self) -> (usize, usize) {
        let width = self.shape.dims().last().copied().unwrap_or(1);
        (self.count() / width.max(1), width)
    }
}

/// What a backward pass starts from.
pub struct Pass<'a> {
    /// Inputs of the forward pass.
    pub inputs: &'a [Input],
    /// Its result.
    pub result: &'a Input,
    /// The gradient by the result.
    pub gradient: &'a Input,
}

/// An operator of one to three f32 tensors.
pub trait Operator: Send + Sync + 'static {
    /// In messages.
    const NAME: &'static str;

    /// The result and its shape.
    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)>;

    /// A gradient by each input, in its shape.
    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>>;
}

/// What a forward pass leaves to the backward pass of the same operator.
#[derive(Default)]
pub struct Kept(Mutex<Option<Box<dyn Any + Send>>>);

impl Kept {
    /// Leaves something.
    pub fn put<T: Send + 'static>(&self, value: T) {
        *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Box::new(value));
    }

    /// Takes it, once.
    pub fn take<T: 'static>(&self, operator: &str) -> Result<T> {
        let taken = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        match taken.map(|any| any.downcast::<T>()) {
            Some(Ok(value)) => Ok(*value),
            _ => candle_core::bail!("{operator}: a second backward pass through one forward pass"),
        }
    }
}

/// An operator as candle takes it.
pub struct OnMachine<O>(pub O);

impl<O: Operator> OnMachine<O> {
    #[cfg(test)]
    fn cpu(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let inputs = inputs.iter().map(|(s, l)| Emulated::input(O::NAME, s, l)).collect::<Result<Vec<_>>>()?;
        let (values, shape) = self.0.forward(&Emulated::on_this_thread(), &inputs)?;
        Ok((CpuStorage::F32(values.to_vec(shape.elem_count())), shape))
    }

    #[cfg(not(test))]
    fn cpu(&self, _inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        Err(Error::Msg(format!("{}: this form of it is for CUDA devices", O::NAME)))
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        let machine = Nvidia::new(&inputs[0].0.device);
        let inputs = inputs.iter().map(|(s, l)| machine.input(O::NAME, s, l)).collect::<Result<Vec<_>>>()?;
        let (values, shape) = self.0.forward(&machine, &inputs)?;
        Ok((machine.storage(values), shape))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(&self, _inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    fn gradients<const N: usize>(&self, inputs: [&Tensor; N], result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; N]> {
        let gradient = gradient.contiguous()?;
        let made = match result.device() {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                let machine = Nvidia::new(device);
                let place = |tensor: &Tensor| machine.place(O::NAME, tensor);
                let (all, result, gradient) = (inputs.map(place), place(result)?, place(&gradient)?);
                let all = all.into_iter().collect::<Result<Vec<_>>>()?;
                let made = self.0.backward(&machine, &Pass { inputs: &all, result: &result, gradient: &gradient })?;
                made.into_iter().zip(&all).map(|(v, input)| v.map(|v| machine.tensor(v, &input.shape))).collect::<Vec<_>>()
            }
            #[cfg(test)]
            candle_core::Device::Cpu => {
                let machine = Emulated::on_this_thread();
                let place = |tensor: &Tensor| Emulated::place(O::NAME, tensor);
                let (all, result, gradient) = (inputs.map(place), place(result)?, place(&gradient)?);
                let all = all.into_iter().collect::<Result<Vec<_>>>()?;
                let made = self.0.backward(&machine, &Pass { inputs: &all, result: &result, gradient: &gradient })?;
                let tensor = |(values, input): (Option<super::emulation::Values>, &Input)| {
                    values.map(|v| Tensor::from_vec(v.to_vec(input.count()), &input.shape, &candle_core::Device::Cpu)).transpose()
                };
                made.into_iter().zip(&all).map(tensor).collect::<Result<Vec<_>>>()?
            }
            other => candle_core::bail!("{}: no kernels for {other:?}", O::NAME),
        };
        made.try_into().map_err(|_| Error::Msg(format!("{}: another number of gradients than of inputs", O::NAME)))
    }
}

impl<O: Operator> CustomOp1 for OnMachine<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu(&[(s1, l1)])
    }

    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda(&[(s1, l1)])
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = self.gradients([x], result, gradient)?;
        Ok(dx)
    }
}

impl<O: Operator> CustomOp2 for OnMachine<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu(&[(s1, l1), (s2, l2)])
    }

    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda(&[(s1, l1), (s2, l2)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], result, gradient)?;
        Ok((da, db))
    }
}

impl<O: Operator> CustomOp3 for OnMachine<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], result, gradient)?;
        Ok((da, db, dc))
    }
}
