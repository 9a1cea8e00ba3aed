//! Tensors as graphs exchange them with the host.

use std::any::Any;
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
    native: OnceLock<Arc<dyn Any + Send + Sync>>,
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
    pub fn native<T: Any + Send + Sync, E>(&self, make: impl FnOnce(&Self) -> Result<T, E>) -> Result<Arc<T>, E> {
        if let Some(native) = self.native.get()
            && let Ok(native) = native.clone().downcast::<T>()
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

    #[test]
    fn the_native_form_lives_until_the_next_write() {
        let mut tensor = Tensor::zeros(&[2]);
        let sum = |t: &Tensor| Ok::<f32, ()>(t.floats().iter().sum());
        assert_eq!(*tensor.native(sum).unwrap(), 0.0);
        assert_eq!(*tensor.native(|_| Err::<f32, ()>(())).unwrap(), 0.0);
        tensor.floats_mut()[0] = 3.0;
        assert_eq!(*tensor.native(sum).unwrap(), 3.0);
    }
}
