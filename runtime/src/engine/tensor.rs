//! Tensors as graphs exchange them with the host.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::bundle::manifest::Dtype;

#[derive(Debug, Clone)]
enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// A dense, row-major tensor.
///
/// An engine that needs its own form of a tensor keeps it here ([`Self::native`]), so that what is passed to many runs, such as
/// a picture's keys and values during decoding, is converted once.
#[derive(Debug, Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
    native: OnceLock<Arc<dyn Native>>,
}

/// An engine's own form of a tensor.
pub trait Native: Any + fmt::Debug + Send + Sync {
    /// Writes to its floats in row-major order; `false`, and nothing done, where they do not lie so in the host's memory.
    fn write(&mut self, write: &dyn Fn(&mut [f32])) -> bool;
}

impl Tensor {
    /// A tensor of floats; `None` where the shape has not as many elements as the data.
    #[must_use]
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Option<Self> {
        (elements(shape) == Some(data.len())).then(|| Self::new(shape, Data::F32(data)))
    }

    /// A tensor of integers; `None` where the shape has not as many elements as the data.
    #[must_use]
    pub fn i64(shape: &[usize], data: Vec<i64>) -> Option<Self> {
        (elements(shape) == Some(data.len())).then(|| Self::new(shape, Data::I64(data)))
    }

    /// A tensor of float zeros.
    #[must_use]
    pub fn zeros(shape: &[usize]) -> Self {
        Self::new(shape, Data::F32(vec![0.0; shape.iter().product()]))
    }

    fn new(shape: &[usize], data: Data) -> Self {
        Self { shape: shape.to_vec(), data, native: OnceLock::new() }
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Type of its elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        match self.data {
            Data::F32(_) => Dtype::F32,
            Data::I64(_) => Dtype::I64,
        }
    }

    /// Its floats, row-major; empty for a tensor of integers.
    #[must_use]
    pub fn floats(&self) -> &[f32] {
        match &self.data {
            Data::F32(data) => data,
            Data::I64(_) => &[],
        }
    }

    /// Its floats to write to; what an engine had converted is forgotten.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        self.native = OnceLock::new();
        match &mut self.data {
            Data::F32(data) => data,
            Data::I64(_) => &mut [],
        }
    }

    /// Writes to its floats, and alike to what an engine keeps of them where it can, so that a small change costs little.
    pub fn update(&mut self, write: impl Fn(&mut [f32])) {
        let Data::F32(data) = &mut self.data else { return };
        write(data);
        let native = self.native.get_mut().and_then(Arc::get_mut);
        if !native.is_some_and(|native| native.write(&write)) {
            self.native = OnceLock::new();
        }
    }

    /// Its floats, without copying them; empty for a tensor of integers.
    #[must_use]
    pub fn into_floats(self) -> Vec<f32> {
        match self.data {
            Data::F32(data) => data,
            Data::I64(_) => Vec::new(),
        }
    }

    /// Its integers, row-major; empty for a tensor of floats.
    #[must_use]
    pub fn integers(&self) -> &[i64] {
        match &self.data {
            Data::I64(data) => data,
            Data::F32(_) => &[],
        }
    }

    /// The engine's own form of this tensor, made at the first call.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn native<T: Native, E>(&self, make: impl FnOnce(&Self) -> Result<T, E>) -> Result<Arc<T>, E> {
        if let Some(native) = self.native.get()
            && let Ok(native) = (native.clone() as Arc<dyn Any + Send + Sync>).downcast::<T>()
        {
            return Ok(native);
        }
        let native = Arc::new(make(self)?);
        // Another thread, or another engine, may have been first: its form serves later calls, this one serves now.
        let _ = self.native.set(native.clone());
        Ok(native)
    }
}

fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_and_data_must_agree() {
        assert!(Tensor::f32(&[2, 3], vec![0.0; 6]).is_some());
        assert!(Tensor::f32(&[2, 3], vec![0.0; 5]).is_none());
        assert!(Tensor::i64(&[], vec![7]).is_some());
        assert!(Tensor::i64(&[usize::MAX, 2], vec![]).is_none());
    }

    /// A form that is written to where it may be.
    #[derive(Debug)]
    struct Copied(Vec<f32>, bool);

    impl Native for Copied {
        fn write(&mut self, write: &dyn Fn(&mut [f32])) -> bool {
            if self.1 {
                write(&mut self.0);
            }
            self.1
        }
    }

    #[test]
    fn the_native_form_lives_until_the_next_write() {
        let mut tensor = Tensor::zeros(&[2]);
        let copy = |t: &Tensor| Ok::<_, ()>(Copied(t.floats().to_vec(), false));
        assert_eq!(tensor.native(copy).unwrap().0, [0.0, 0.0]);
        assert_eq!(tensor.native(|_| Err::<Copied, ()>(())).unwrap().0, [0.0, 0.0]);
        tensor.floats_mut()[0] = 3.0;
        assert_eq!(tensor.native(copy).unwrap().0, [3.0, 0.0]);
    }

    #[test]
    fn updates_reach_the_native_form_or_drop_it() {
        for writable in [true, false] {
            let mut tensor = Tensor::zeros(&[2]);
            let made = std::cell::Cell::new(0);
            let copy = |t: &Tensor| {
                made.set(made.get() + 1);
                Ok::<_, ()>(Copied(t.floats().to_vec(), writable))
            };
            drop(tensor.native(copy).unwrap());
            tensor.update(|floats| floats[1] = 2.0);
            assert_eq!((tensor.native(copy).unwrap().0.as_slice(), tensor.floats()), (&[0.0, 2.0][..], &[0.0, 2.0][..]));
            assert_eq!(made.get(), if writable { 1 } else { 2 });
            // One that somebody still holds is left as it is.
            let held = tensor.native(copy).unwrap();
            tensor.update(|floats| floats[0] = 7.0);
            assert_eq!((held.0[0], tensor.native(copy).unwrap().0[0]), (0.0, 7.0));
        }
    }
}
