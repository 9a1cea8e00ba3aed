//! Differentiable operators whose passes are kernels, and how they become candle's.

use std::any::Any;
use std::fmt::{self, Debug, Formatter};
use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor};

#[cfg(test)]
use super::emulation::Emulated;
use super::machine::{Address, Element, Machine};
#[cfg(feature = "cuda")]
use super::nvidia::Nvidia;
use super::{rounded, widened};

/// A contiguous array where the machine has it.
#[derive(Clone)]
pub struct Input {
    /// First value.
    pub at: Address,
    /// Shape.
    pub shape: Shape,
    /// What its values are stored as.
    pub element: Element,
    /// Whether a gradient by it leads anywhere.
    pub wanted: bool,
}

impl Input {
    /// f32 values of a shape.
    pub fn at(at: Address, shape: impl Into<Shape>) -> Self {
        Self { at, shape: shape.into(), element: Element::F32, wanted: false }
    }

    /// So many words that an operator is told.
    pub fn told(at: Address, count: usize) -> Self {
        Self::at(at, count)
    }

    /// Memory for an array like it, with nothing in particular in it.
    pub fn alike<M: Machine>(&self, machine: &M) -> Result<M::Values> {
        machine.allocate(self.element.words(self.count()))
    }

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

/// An array in a machine's memory, and what holds that.
pub struct Array<M: Machine> {
    /// First value.
    pub at: Address,
    /// Shape.
    pub shape: Shape,
    /// What its values are stored as.
    pub element: Element,
    _memory: M::Values,
}

impl<M: Machine> Array<M> {
    pub fn new(machine: &M, (values, shape): (M::Values, Shape), element: Element) -> Self {
        Self { at: machine.at(&values), shape, element, _memory: values }
    }

    /// With nothing in particular in it.
    pub fn empty(machine: &M, shape: impl Into<Shape>, element: Element) -> Result<Self> {
        let shape = shape.into();
        let values = machine.allocate(element.words(shape.elem_count()))?;
        Ok(Self::new(machine, (values, shape), element))
    }

    /// As an operator takes it, with a gradient to be made by it.
    pub fn input(&self) -> Input {
        Input { at: self.at, shape: self.shape.clone(), element: self.element, wanted: true }
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

/// An operator. Its result is stored as its first input is, and a gradient as what it is a gradient by. One that is told numbers has
/// them as its last input, words that no gradient is taken by; what varies from step to step while shapes do not is told so.
pub trait Operator: Send + Sync + 'static {
    /// In messages.
    const NAME: &'static str;

    /// How many of the inputs, the first ones, are activations: they may be stored as anything, all alike. The others are f32.
    fn activations(&self) -> usize {
        0
    }

    /// The result and its shape.
    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)>;

    /// A gradient by each input, in its shape.
    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>>;
}

/// What a forward pass leaves to the backward pass of the same operator.
#[derive(Default)]
pub struct Kept(Mutex<Option<Box<dyn Any + Send>>>);

impl Debug for Kept {
    /// The same whatever is there, which is of one pass.
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.write_str("Kept")
    }
}

impl Kept {
    /// Leaves something.
    pub fn put<T: Send + 'static>(&self, value: T) {
        *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Box::new(value));
    }

    /// Takes it, once.
    pub fn take<T: 'static>(&self, operator: &str) -> Result<T> {
        match self.try_take() {
            Some(value) => Ok(value),
            None => candle_core::bail!("{operator}: a second backward pass through one forward pass"),
        }
    }

    /// Takes it, if it is still there.
    pub fn try_take<T: 'static>(&self) -> Option<T> {
        let taken = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        Some(*taken?.downcast::<T>().ok()?)
    }
}

/// Runs something on the machine that a device is.
macro_rules! on_machine {
    ($device:expr, $name:expr, |$machine:ident| $made:expr) => {
        match $device {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                let $machine = $crate::ops::cuda::nvidia::Nvidia::new(device);
                $made
            }
            #[cfg(test)]
            candle_core::Device::Cpu => {
                let $machine = $crate::ops::cuda::emulation::Emulated::on_this_thread();
                $made
            }
            other => Err(candle_core::Error::Msg(format!("{}: no kernels for {other:?}", $name))),
        }
    };
}
pub(super) use on_machine;

/// An operator as candle takes it, of one to three f32 tensors.
pub struct OnMachine<O> {
    operator: O,
    /// What activations are stored as inside it.
    element: Element,
    /// What the operator is told.
    words: Vec<u32>,
    /// These on the machine, from the forward pass on.
    uploaded: Kept,
}

impl<O: Operator> OnMachine<O> {
    /// In f32 throughout.
    pub fn of(operator: O) -> Self {
        Self::within(operator, Element::F32)
    }

    /// With activations stored as that inside, as where operators follow upon each other.
    pub fn within(operator: O, element: Element) -> Self {
        Self { operator, element, words: Vec::new(), uploaded: Kept::default() }
    }

    /// Told this.
    pub fn told(self, words: Vec<u32>) -> Self {
        Self { words, ..self }
    }

    /// Adds what the operator is told to its inputs. It lies in the memory that comes with them.
    fn tell<M: Machine>(&self, machine: &M, inputs: &mut Vec<Input>, there: Option<M::Words>) -> Result<Option<M::Words>> {
        if self.words.is_empty() {
            return Ok(None);
        }
        let words = there.map_or_else(|| machine.upload(&self.words), Ok)?;
        inputs.push(Input::told(machine.words_at(&words), self.words.len()));
        Ok(Some(words))
    }

    /// Stores the first inputs, f32, as the operator is to have them, and gives the memory that they are in from now on.
    fn store<'a, M: Machine>(&self, machine: &M, inputs: impl IntoIterator<Item = &'a mut Input>) -> Result<Vec<M::Values>> {
        let mut held = Vec::new();
        if self.element == Element::Bf16 {
            for input in inputs {
                let values = rounded(machine, input.at, input.count())?;
                (input.at, input.element) = (machine.at(&values), Element::Bf16);
                held.push(values);
            }
        }
        Ok(held)
    }

    /// The other way round, for one of the activations or the result.
    fn in_f32<M: Machine>(&self, machine: &M, values: M::Values, count: usize) -> Result<M::Values> {
        match self.element {
            Element::Bf16 if self.operator.activations() > 0 => widened(machine, machine.at(&values), count),
            _ => Ok(values),
        }
    }

    fn forward_on<M: Machine>(&self, machine: &M, mut inputs: Vec<Input>) -> Result<(M::Values, Shape)> {
        let _held = self.store(machine, inputs.iter_mut().take(self.operator.activations()))?;
        let words = self.tell(machine, &mut inputs, None)?;
        let (values, shape) = self.operator.forward(machine, &inputs)?;
        words.into_iter().for_each(|words| self.uploaded.put(words));
        Ok((self.in_f32(machine, values, shape.elem_count())?, shape))
    }

    fn gradients_on<M: Machine>(
        &self,
        machine: &M,
        inputs: &[&Tensor],
        [result, gradient]: [&Tensor; 2],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut inputs = inputs.iter().map(|tensor| machine.place(O::NAME, tensor)).collect::<Result<Vec<_>>>()?;
        let (mut result, mut gradient) = (machine.place(O::NAME, result)?, machine.place(O::NAME, gradient)?);
        let activations = self.operator.activations();
        let others = [&mut result, &mut gradient].into_iter().take(if activations > 0 { 2 } else { 0 });
        let _held = self.store(machine, inputs.iter_mut().take(activations).chain(others))?;
        let _words = self.tell(machine, &mut inputs, self.uploaded.try_take())?;
        let made = self.operator.backward(machine, &Pass { inputs: &inputs, result: &result, gradient: &gradient })?;
        let tensor = |(number, (values, input)): (usize, (Option<M::Values>, &Input))| {
            let in_f32 = |values| if number < activations { self.in_f32(machine, values, input.count()) } else { Ok(values) };
            values.map(|values| machine.tensor(in_f32(values)?, &input.shape)).transpose()
        };
        made.into_iter().zip(&inputs).enumerate().map(tensor).collect()
    }

    #[cfg(test)]
    fn cpu(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let inputs = inputs.iter().map(|(s, l)| Emulated::input(O::NAME, s, l)).collect::<Result<Vec<_>>>()?;
        let (values, shape) = self.forward_on(&Emulated::on_this_thread(), inputs)?;
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
        let (values, shape) = self.forward_on(&machine, inputs)?;
        Ok((machine.storage(values), shape))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(&self, _inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    fn gradients<const N: usize>(&self, inputs: [&Tensor; N], result: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; N]> {
        let gradient = gradient.contiguous()?;
        let made = on_machine!(result.device(), O::NAME, |machine| self.gradients_on(&machine, &inputs, [result, &gradient]))?;
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
