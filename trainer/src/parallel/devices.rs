//! Which device a rank computes on, and how sums go from device to device.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::{Collective, CollectiveError};

/// Sums over the ranks that do not leave the devices.
pub trait DeviceSums: Send + Sync {
    /// Starts to replace values by their sums over all ranks, once they are computed, and returns. Every rank brings tensors of the
    /// same sizes in the same order. They are contiguous f32, nothing else holds their memory, and they are kept until
    /// [`DeviceSums::join`].
    ///
    /// # Errors
    /// What the devices' library says.
    fn start(&self, values: &[Tensor]) -> Result<()>;

    /// Has what the device is asked for from now on wait for all that was started. The host does not.
    ///
    /// # Errors
    /// What the devices' library says.
    fn join(&self) -> Result<()>;

    /// Returns when all that was started is done. `ranks` are those of these devices.
    ///
    /// # Errors
    /// A rank that is gone; what the devices' library says.
    fn wait(&self, ranks: &dyn Collective) -> Result<()>;

    /// Ends what was started and will not be done, because a rank has failed: nothing waits for a device any more. There are no sums
    /// afterwards.
    fn give_up(&self);
}

/// The ranks of a job, with a way between their devices where there is one.
pub struct Connected<'a> {
    ranks: &'a dyn Collective,
    devices: Option<Box<dyn DeviceSums>>,
}

impl<'a> Connected<'a> {
    /// Finds the way between the ranks' devices. All ranks call this, each with its own.
    ///
    /// There is one where all compute on CUDA devices, no two on the same one, this build has the feature `nccl`, and NCCL is found.
    /// Where not, rank 0 says why, and sums go through the hosts.
    ///
    /// # Errors
    /// A rank that is gone; what NCCL says.
    pub fn new(ranks: &'a dyn Collective, device: &Device) -> Result<Self> {
        let devices = if ranks.ranks() > 1 { between(ranks, device)? } else { None };
        Ok(Self { ranks, devices })
    }

    #[cfg(test)]
    pub(crate) fn by(ranks: &'a dyn Collective, devices: Box<dyn DeviceSums>) -> Self {
        Self { ranks, devices: Some(devices) }
    }
}

impl Collective for Connected<'_> {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn ranks(&self) -> usize {
        self.ranks.ranks()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.ranks.all_reduce(values)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.ranks.all_gather(own)
    }

    fn broadcast(&self, from: usize, own: &[u8]) -> Result<Vec<u8>, CollectiveError> {
        self.ranks.broadcast(from, own)
    }

    fn trouble(&self) -> Option<CollectiveError> {
        self.ranks.trouble()
    }

    fn leave(&self, trouble: Option<&str>) {
        self.ranks.leave(trouble);
    }

    fn devices(&self) -> Option<&dyn DeviceSums> {
        self.devices.as_deref()
    }
}

/// This rank's number among those on its host. The first device is for the host's first rank, and so on.
///
/// # Errors
/// A rank that is gone.
pub fn local_rank(ranks: &dyn Collective) -> Result<usize, CollectiveError> {
    let all = ranks.all_gather(host().as_bytes())?;
    Ok(all[..ranks.rank()].iter().filter(|other| **other == all[ranks.rank()]).count())
}

/// What tells this host (or container) from others, where `/proc` does.
fn host() -> String {
    let read = |file| std::fs::read_to_string(file).unwrap_or_default();
    read("/proc/sys/kernel/random/boot_id") + &read("/proc/sys/kernel/hostname")
}

fn between(ranks: &dyn Collective, device: &Device) -> Result<Option<Box<dyn DeviceSums>>> {
    let own = way(device);
    let said = match &own {
        Ok(way) => format!("+{}", way.place()),
        Err(why) => format!("-{why}"),
    };
    let said = ranks.all_gather(said.as_bytes())?;
    let why_not = why_not(&said);
    match (own, why_not) {
        (Ok(way), None) => way.open(ranks).map(Some),
        (_, Some(why)) if !why.is_empty() && ranks.rank() == 0 => {
            eprintln!("the ranks' gradients are summed through their hosts: {why}");
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// What stands against a way between devices, by what every rank has said: `+` and its device's place, or `-` and a reason.
/// Empty, where nobody need be told: all compute on the CPU.
fn why_not(said: &[Vec<u8>]) -> Option<String> {
    let said: Vec<_> = said.iter().map(|said| String::from_utf8_lossy(said)).collect();
    if let Some((rank, why)) = said.iter().enumerate().find_map(|(rank, said)| Some((rank, said.strip_prefix('-')?))) {
        let everybody = said.iter().all(|said| *said == format!("-{why}"));
        return Some(if everybody { why.to_owned() } else { format!("rank {rank}: {why}") });
    }
    let twice = |(rank, place)| said[..rank].iter().position(|other| *other == place);
    let (first, second) = said.iter().cloned().enumerate().find_map(|(rank, place)| Some((twice((rank, place))?, rank)))?;
    Some(format!("ranks {first} and {second} compute on the same device"))
}

#[cfg(not(feature = "nccl"))]
mod found {
    use anyhow::Result;
    use candle_core::Device;

    use super::{Collective, DeviceSums};

    /// A way between devices that this build has: none.
    pub enum Way {}

    impl Way {
        pub fn place(&self) -> String {
            match *self {}
        }

        pub fn open(self, _: &dyn Collective) -> Result<Box<dyn DeviceSums>> {
            match self {}
        }
    }

    /// Why there is none; empty where none is looked for.
    pub fn way(device: &Device) -> Result<Way, String> {
        Err(if device.is_cpu() { String::new() } else { "this build lacks the feature `nccl`".to_owned() })
    }
}

#[cfg(feature = "nccl")]
mod found {
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use anyhow::{Result, bail};
    use candle_core::cuda_backend::CudaDType;
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DriverError, result, sys};
    use candle_core::{CudaDevice, Device, Storage, Tensor};

    use super::super::nccl::{self, Communicator, Nccl};
    use super::{Collective, DeviceSums, host};

    const WAIT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

    /// How often a host asks whether its device has done what it was given.
    const LOOK: Duration = Duration::from_micros(50);

    /// A way between devices by NCCL.
    pub struct Way {
        device: CudaDevice,
        nccl: Arc<Nccl>,
    }

    /// Why there is none; empty where none is looked for.
    pub fn way(device: &Device) -> Result<Way, String> {
        let Device::Cuda(device) = device else { return Err(String::new()) };
        let nccl = nccl::find().map_err(|error| format!("{error:#}"))?;
        // NCCL works on the thread's current device. One that cannot be it is told before anybody waits for this rank in NCCL.
        let current = device.cuda_stream().context().bind_to_thread();
        current.map_err(|error| format!("this rank's device cannot be used: {error}"))?;
        Ok(Way { device: device.clone(), nccl })
    }

    impl Way {
        /// What no other device has.
        pub fn place(&self) -> String {
            let context = self.device.cuda_stream().context().clone();
            let device = context.uuid().map_or_else(|_| context.ordinal().to_string(), |uuid| format!("{:?}", uuid.bytes));
            host() + &device
        }

        pub fn open(self, ranks: &dyn Collective) -> Result<Box<dyn DeviceSums>> {
            let Self { device, nccl } = self;
            let (patience, context) = (super::super::patience()?, device.cuda_stream().context().clone());
            let communicator = Communicator::join(nccl, ranks, patience, move || Ok(context.bind_to_thread()?))?;
            Ok(Box::new(OnCuda { communicator, stream: Stream::new(&device)?, device, patience }))
        }
    }

    struct OnCuda {
        communicator: Communicator,
        /// Where sums are made. What is computed meanwhile does not wait for them.
        stream: Stream,
        device: CudaDevice,
        patience: Duration,
    }

    impl DeviceSums for OnCuda {
        fn start(&self, values: &[Tensor]) -> Result<()> {
            let computing = self.device.cuda_stream();
            computing.context().bind_to_thread()?;
            let computed = computing.record_event(None)?;
            // SAFETY: a stream and an event of this device's context.
            unsafe { result::stream::wait_event(self.stream.0, computed.cu_event(), WAIT) }?;
            for tensor in values {
                let (storage, layout) = tensor.storage_and_layout();
                let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
                    bail!("values that do not lie on the CUDA device in one piece");
                };
                let (pointer, _order) = f32::as_cuda_slice(storage)?.device_ptr(&computing);
                // SAFETY: values of the tensor, which nothing else holds. They are computed when the stream comes to this, and the
                // caller keeps them until what gives them back comes behind it on the stream that computes.
                unsafe { self.communicator.sum(pointer + 4 * start as u64, end - start, self.stream.0.cast()) }?;
            }
            Ok(())
        }

        fn join(&self) -> Result<()> {
            let computing = self.device.cuda_stream();
            computing.context().bind_to_thread()?;
            let summed = self.stream.record()?;
            // SAFETY: a stream and an event of this device's context.
            unsafe { result::stream::wait_event(computing.cu_stream(), summed.0, WAIT) }?;
            Ok(())
        }

        fn wait(&self, ranks: &dyn Collective) -> Result<()> {
            self.device.cuda_stream().context().bind_to_thread()?;
            let done = self.stream.record()?;
            let started = Instant::now();
            // A rank that is gone would be waited for without end.
            while !done.is_complete()? {
                if let Some(trouble) = ranks.trouble() {
                    return Err(trouble.into());
                }
                if started.elapsed() > self.patience {
                    bail!("the ranks' devices have been silent for {} s: one of them is gone", self.patience.as_secs());
                }
                thread::sleep(LOOK);
            }
            Ok(())
        }

        fn give_up(&self) {
            self.communicator.give_up();
        }
    }

    /// A stream beside the one that candle computes on. cudarc's own would have it follow the use of every tensor by events.
    struct Stream(sys::CUstream);

    // SAFETY: the driver's streams belong to a context, not to a thread.
    unsafe impl Send for Stream {}
    // SAFETY: as above; the driver's calls may be made by any thread at any time.
    unsafe impl Sync for Stream {}

    impl Stream {
        fn new(device: &CudaDevice) -> Result<Self> {
            device.cuda_stream().context().bind_to_thread()?;
            Ok(Self(result::stream::create(result::stream::StreamKind::NonBlocking)?))
        }

        /// What has happened when this stream has done all that it was given.
        fn record(&self) -> Result<Event> {
            let event = Event(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?);
            // SAFETY: both are of the context that is this thread's.
            unsafe { result::event::record(event.0, self.0) }?;
            Ok(event)
        }
    }

    impl Drop for Stream {
        fn drop(&mut self) {
            // SAFETY: a stream that is not used again. An error would be one of what it was given, which was told there.
            let _ = unsafe { result::stream::destroy(self.0) };
        }
    }

    struct Event(sys::CUevent);

    impl Event {
        fn is_complete(&self) -> Result<bool> {
            // SAFETY: an event that was recorded.
            match unsafe { result::event::query(self.0) } {
                Ok(()) => Ok(true),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
                Err(error) => Err(error.into()),
            }
        }
    }

    impl Drop for Event {
        fn drop(&mut self) {
            // SAFETY: an event that is not used again; the driver keeps what is still waited for.
            let _ = unsafe { result::event::destroy(self.0) };
        }
    }
}

use found::way;

#[cfg(test)]
mod tests {
    use super::super::testing::among;
    use super::*;

    #[test]
    fn ranks_of_one_host_are_numbered() {
        assert_eq!(among(3, |ranks| local_rank(ranks).unwrap()), [0, 1, 2]);
    }

    #[test]
    fn what_stands_against_a_way_between_devices_is_told() {
        let say = |said: &[&str]| why_not(&said.iter().map(|said| said.as_bytes().to_vec()).collect::<Vec<_>>());
        assert_eq!(say(&["+host a", "+host b", "+other a"]), None);
        assert_eq!(say(&["+host a", "+host b", "+host a"]).unwrap(), "ranks 0 and 2 compute on the same device");
        assert_eq!(say(&["-no library", "-no library"]).unwrap(), "no library");
        assert_eq!(say(&["+host a", "-no library"]).unwrap(), "rank 1: no library");
        assert_eq!(say(&["-", "-"]).unwrap(), "");
        // Ranks on the CPU have none, and say nothing of it.
        let connected = among(2, |ranks| Connected::new(ranks, &Device::Cpu).unwrap().devices().is_some());
        assert_eq!(connected, [false; 2]);
    }
}
