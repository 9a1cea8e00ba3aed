//! Downloads of what was computed, beside what is computed now: on a stream of their own. On the stream that computes, a host that reads
//! would wait for all that it has asked for.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DevicePtr, result};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, Result, Storage, Tensor};

/// Arrays, and when they are computed.
pub struct Computed {
    arrays: Vec<Tensor>,
    done: CudaEvent,
    downloads: Arc<CudaStream>,
}

/// The stream for a device's downloads, the same one every time.
fn stream(device: &CudaDevice) -> Result<Arc<CudaStream>> {
    static ALL: Mutex<Vec<(CudaDevice, Arc<CudaStream>)>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, found)) = all.iter().find(|(of, _)| of.cuda_stream() == device.cuda_stream()) {
        return Ok(Arc::clone(found));
    }
    let made = device.cuda_stream().context().new_stream().w()?;
    all.push((device.clone(), Arc::clone(&made)));
    Ok(made)
}

impl Computed {
    /// See [`Readings::of`](crate::ops::Readings::of).
    pub fn of(arrays: Vec<Tensor>, device: &CudaDevice) -> Result<Self> {
        let arrays = arrays.iter().map(|array| array.detach().contiguous()).collect::<Result<_>>()?;
        Ok(Self { arrays, done: device.cuda_stream().record_event(None).w()?, downloads: stream(device)? })
    }

    /// See [`Readings::read`](crate::ops::Readings::read).
    pub fn read(self) -> Result<Vec<Vec<f32>>> {
        self.downloads.context().bind_to_thread().w()?;
        self.downloads.wait(&self.done).w()?;
        let read = |array: &Tensor| {
            let (storage, layout) = array.storage_and_layout();
            let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
                candle_core::bail!("values that do not lie on the CUDA device in one piece");
            };
            let (at, _order) = f32::as_cuda_slice(storage)?.device_ptr(&self.downloads);
            let mut values = vec![0f32; end - start];
            // SAFETY: as many values, computed when the stream comes to this, of an array that is kept until then. The host's memory may
            // be moved, and so the driver returns when the copy is done ("API synchronization behavior" of its documents).
            unsafe { result::memcpy_dtoh_async(&mut values, at + 4 * start as u64, self.downloads.cu_stream()) }.w()?;
            Ok(values)
        };
        self.arrays.iter().map(read).collect()
    }
}
