//! Values that are read when the device that makes them has been given more to do.

use candle_core::{Result, Tensor};

/// Values of arrays as they are once the device has done what it was asked for when this was made. To read them does not wait for what
/// it is asked for afterwards.
pub struct Readings(Held);

enum Held {
    Read(Vec<Vec<f32>>),
    #[cfg(feature = "cuda")]
    Computed(super::cuda::downloads::Computed),
}

impl Readings {
    /// Those of f32 arrays of one device, none of which is a variable.
    ///
    /// # Errors
    /// Those of candle, and what the driver says.
    pub fn of(arrays: Vec<Tensor>) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(candle_core::Device::Cuda(device)) = arrays.first().map(Tensor::device) {
            let device = device.clone();
            return super::cuda::downloads::Computed::of(arrays, &device).map(Held::Computed).map(Self);
        }
        let read = arrays.iter().map(|array| array.flatten_all()?.to_vec1());
        read.collect::<Result<_>>().map(Held::Read).map(Self)
    }

    /// The values of each.
    ///
    /// # Errors
    /// Those of candle, and what the driver says.
    pub fn read(self) -> Result<Vec<Vec<f32>>> {
        match self.0 {
            Held::Read(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Held::Computed(computed) => computed.read(),
        }
    }
}
