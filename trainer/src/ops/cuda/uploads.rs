//! Uploads from memory of the host's that the device reads by itself, so that no host waits for them. Those of what steps to come are made of
//! go beside the step that is computed, on a stream of their own: on the stream that computes, every upload would stand between two kernels.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DeviceRepr, DriverError, result, sys,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Result, Shape, Storage, Tensor};

/// Values of the smallest piece of the host's memory: 64 KB.
const LEAST: usize = 1 << 14;
/// Values that pieces have together before one that is still read is waited for instead of making another: 1 GiB.
const MOST: usize = 1 << 28;

/// Memory of the host's that is not moved, so that the device can read it.
struct Piece {
    at: *mut f32,
    count: usize,
    /// When it is read no more.
    read: Option<CudaEvent>,
    context: Arc<CudaContext>,
}

// SAFETY: memory that belongs to the piece alone, and an event that any thread may ask.
unsafe impl Send for Piece {}

impl Piece {
    fn new(context: &Arc<CudaContext>, count: usize) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: written by the host before anything reads it. It is never read back, which such memory is slow at.
        let at = unsafe { result::malloc_host(4 * count, sys::CU_MEMHOSTALLOC_WRITECOMBINED) }?;
        Ok(Self { at: at.cast(), count, read: None, context: Arc::clone(context) })
    }

    fn is_left(&self) -> bool {
        self.read.as_ref().is_none_or(CudaEvent::is_complete)
    }

    fn fits(&self, count: usize) -> bool {
        (count..=4 * count.max(LEAST)).contains(&self.count)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(read) = &self.read {
            let _ = read.synchronize();
        }
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated so, and read no more.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

/// A device's uploads.
struct Uploads {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Those used longest ago come first.
    pieces: Mutex<VecDeque<Piece>>,
}

impl Uploads {
    /// Those of a device, the same ones for every thread.
    fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        static ALL: Mutex<Vec<Arc<Uploads>>> = Mutex::new(Vec::new());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.iter().find(|uploads| uploads.device.cuda_stream() == device.cuda_stream()) {
            return Ok(Arc::clone(found));
        }
        let stream = device.cuda_stream().context().new_stream().w()?;
        let made = Arc::new(Self { device: device.clone(), stream, pieces: Mutex::new(VecDeque::new()) });
        all.push(Arc::clone(&made));
        Ok(made)
    }

    fn pieces(&self) -> MutexGuard<'_, VecDeque<Piece>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece that nothing reads, of so many values at least.
    fn piece(&self, count: usize) -> std::result::Result<Piece, DriverError> {
        self.stream.context().bind_to_thread()?;
        let mut pieces = self.pieces();
        let all: usize = pieces.iter().map(|piece| piece.count).sum();
        let left = pieces.iter().position(|piece| piece.fits(count) && piece.is_left());
        let awaited = || pieces.iter().position(|piece| piece.fits(count)).filter(|_| all > MOST);
        if let Some(piece) = left.or_else(awaited).and_then(|place| pieces.remove(place)) {
            drop(pieces);
            if let Some(read) = &piece.read {
                read.synchronize()?;
            }
            return Ok(piece);
        }
        drop(pieces);
        Piece::new(self.stream.context(), count.next_power_of_two().max(LEAST))
    }

    /// New memory of the device with these values, in the order of the uploads.
    fn copied(&self, values: &[f32], piece: Piece) -> std::result::Result<CudaSlice<f32>, DriverError> {
        // SAFETY: any bits are f32 values, and all are written before a stream that was joined comes to them.
        let mut memory = unsafe { self.stream.alloc::<f32>(values.len().max(1)) }?;
        self.copy(values, piece, &mut memory, &self.stream)?;
        Ok(memory)
    }

    /// Copies values to where a stream finds them when it comes to that.
    fn copy<T: DeviceRepr>(
        &self,
        values: &[T],
        mut piece: Piece,
        memory: &mut CudaSlice<T>,
        stream: &Arc<CudaStream>,
    ) -> std::result::Result<(), DriverError> {
        const { assert!(size_of::<T>() == size_of::<f32>() && align_of::<T>() <= align_of::<f32>(), "pieces have room for f32") };
        // SAFETY: room for as many, which nobody else has.
        let own = unsafe {
            let at = piece.at.cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), at, values.len());
            std::slice::from_raw_parts(at, values.len())
        };
        let (to, _order) = memory.device_ptr_mut(stream);
        // SAFETY: as many values either way; the piece is not touched before the event below.
        unsafe { result::memcpy_htod_async(to, own, stream.cu_stream()) }?;
        drop(_order);
        piece.read = Some(stream.record_event(None)?);
        self.pieces().push_back(piece);
        Ok(())
    }
}

/// Copies values to memory of a device, in the order of what it computes. Whether the host had memory for that; where not, nothing is done.
pub fn in_order<T: DeviceRepr>(device: &CudaDevice, values: &[T], memory: &mut CudaSlice<T>) -> Result<bool> {
    debug_assert!(values.len() <= memory.len());
    let uploads = Uploads::of(device)?;
    let Ok(piece) = uploads.piece(values.len()) else { return Ok(false) };
    uploads.copy(values, piece, memory, &device.cuda_stream()).w()?;
    Ok(true)
}

thread_local! {
    /// Where this thread's uploads go, if not on the stream that computes.
    static AHEAD: RefCell<Option<Arc<Uploads>>> = const { RefCell::new(None) };
}

/// As [`from_host`](crate::ops::from_host), where [`ahead`] has asked for that and the host has memory for it.
pub fn from_host(values: &[f32], shape: &Shape) -> Option<Result<Tensor>> {
    let uploads = AHEAD.with_borrow(Clone::clone)?;
    let piece = uploads.piece(values.len()).ok()?;
    let tensor = |values| {
        let storage = f32::wrap_cuda_slice(values, uploads.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    };
    Some(uploads.copied(values, piece).w().map(tensor))
}

/// Uploads that were asked for beside what is computed.
pub struct Ahead {
    uploads: Arc<Uploads>,
    done: CudaEvent,
}

/// Runs `work`, whose uploads go beside what is computed.
pub fn ahead<T, E: From<candle_core::Error>>(
    device: &CudaDevice,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Ahead), E> {
    let uploads = Uploads::of(device)?;
    let before = AHEAD.replace(Some(Arc::clone(&uploads)));
    let made = work();
    AHEAD.set(before);
    let made = made?;
    let done = uploads.stream.record_event(None).w()?;
    Ok((made, Ahead { uploads, done }))
}

impl Ahead {
    /// Has what is computed from now on wait for them. The host does not.
    pub fn join(&self) -> Result<()> {
        self.uploads.device.cuda_stream().wait(&self.done).w()?;
        Ok(())
    }
}

impl Drop for Ahead {
    /// What is uploaded into the same memory later comes behind what was computed of it until now.
    fn drop(&mut self) {
        // Where this fails, so does what was computed, which is told there.
        if let Ok(computed) = self.uploads.device.cuda_stream().record_event(None) {
            let _ = self.uploads.stream.wait(&computed);
        }
    }
}
