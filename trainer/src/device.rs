//! Which device trains.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use candle_core::Device;
use thiserror::Error;

/// What was asked for with `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first CUDA device, if this build can use one and there is one; else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device: by its number, or one for each rank of this host.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
                Some(number) => Ok(Self::Cuda(Some(number))),
                None => Err("expected auto, cpu, cuda or cuda:N".to_owned()),
            },
        }
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

/// Why a device cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// The program was built for the CPU alone.
    #[error("this build trains on the CPU only; build unimo-train with `--features cuda`, or leave --device cuda out")]
    NotBuilt,
    /// A library of CUDA is missing.
    #[error("CUDA cannot be used: {0} was not found; install NVIDIA's driver and CUDA's libraries, or use --device cpu")]
    NoLibrary(String),
    /// The driver does not know the kernels' code, which a newer CUDA has made.
    #[error(
        "CUDA cannot be used: the driver does not take this build's kernels ({0}); install a newer one, build with an older CUDA, or use --device cpu"
    )]
    OldDriver(String),
    /// The driver is there and does not work.
    #[error("CUDA cannot be used: the driver says {0}; --device cpu trains on the CPU")]
    Driver(String),
    /// There is no device of that number.
    #[error("there is no CUDA device {asked}: {found} found; --device cpu trains on the CPU")]
    NoDevice {
        /// Its number.
        asked: usize,
        /// How many there are.
        found: usize,
    },
    /// The device is too old for the kernels.
    #[error("CUDA device {number} has compute capability {major}.{minor}, and 8.0 is needed; --device cpu trains on the CPU")]
    TooOld {
        /// Its number.
        number: usize,
        /// What it can do.
        major: i32,
        /// And within that.
        minor: i32,
    },
}

impl DeviceError {
    /// 5 where what is needed to run on a device is missing, 4 where the device is.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotBuilt | Self::NoLibrary(_) => 5,
            Self::OldDriver(_) | Self::Driver(_) | Self::NoDevice { .. } | Self::TooOld { .. } => 4,
        }
    }
}

impl DeviceChoice {
    /// Opens the device, for the rank that has the number `local_rank` among those of this host: without a number of its own, ranks
    /// have the host's devices in turn.
    ///
    /// # Errors
    /// A CUDA device was asked for by name and cannot be had.
    pub fn open(self, local_rank: usize) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(open_cuda(|found| local_rank % found).unwrap_or_else(|error| {
                // Where there is a device, that it is not used is worth knowing.
                if matches!(error, DeviceError::OldDriver(_) | DeviceError::TooOld { .. }) {
                    eprintln!("{error}");
                }
                Device::Cpu
            })),
            Self::Cuda(None) => open_cuda(|found| local_rank % found),
            Self::Cuda(Some(number)) => open_cuda(|_| number),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_choose: impl FnOnce(usize) -> usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt)
}

#[cfg(feature = "cuda")]
/// Opens one of the devices, of which there are at least as many as `choose` is told.
fn open_cuda(choose: impl FnOnce(usize) -> usize) -> Result<Device, DeviceError> {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, sys::CUdevice_attribute_enum as Attribute};

    if let Some(missing) = crate::ops::cuda::libraries::missing() {
        return Err(DeviceError::NoLibrary(missing));
    }
    let driver = |error: DriverError| DeviceError::Driver(error.to_string());
    let found = match CudaContext::device_count() {
        Ok(count) => count as usize,
        // What the driver says where there is a driver and no device.
        Err(DriverError(candle_core::cuda_backend::cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        Err(error) => return Err(driver(error)),
    };
    let number = choose(found.max(1));
    if number >= found {
        return Err(DeviceError::NoDevice { asked: number, found });
    }
    let context = CudaContext::new(number).map_err(driver)?;
    let attribute = |attribute| context.attribute(attribute).map_err(driver);
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(DeviceError::TooOld { number, major, minor });
    }
    // One stream for all threads: batches are uploaded by another thread than the one that learns from them.
    let device = Device::new_cuda_with_stream(number).map_err(|error| DeviceError::Driver(error.to_string()))?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: tensors are used on this one stream alone.
        unsafe { cuda.disable_event_tracking() };
        crate::ops::cuda::load_kernels(cuda).map_err(|error| DeviceError::OldDriver(error.to_string()))?;
        keep_freed_memory(&context);
        OCCUPIED_BEFORE.store(occupied(cuda).unwrap_or(0), std::sync::atomic::Ordering::Relaxed);
    }
    Ok(device)
}

/// Lets the driver's memory pool keep what is freed: by default it gives all of that back whenever the host waits for the device,
/// at least once a step. Where this fails, steps only take longer.
#[cfg(feature = "cuda")]
fn keep_freed_memory(context: &candle_core::cuda_backend::cudarc::driver::CudaContext) {
    use candle_core::cuda_backend::cudarc::driver::sys;

    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is the context's; the driver writes the pool's handle, and reads eight bytes of this attribute.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()).result().is_ok() {
            let _ = sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast());
        }
    }
}

/// Bytes of a CUDA device that are in use, by this process and others, beyond those that were when it was opened; nothing for the
/// CPU.
#[must_use]
pub fn memory_in_use(device: &Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Some(occupied(cuda)?.saturating_sub(OCCUPIED_BEFORE.load(std::sync::atomic::Ordering::Relaxed))),
        _ => None,
    }
}

#[cfg(feature = "cuda")]
static OCCUPIED_BEFORE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

#[cfg(feature = "cuda")]
fn occupied(device: &candle_core::CudaDevice) -> Option<u64> {
    let (free, total) = device.cuda_stream().context().mem_get_info().ok()?;
    Some((total - free) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        for (text, expected) in [
            ("auto", Ok(DeviceChoice::Auto)),
            ("cpu", Ok(DeviceChoice::Cpu)),
            ("cuda", Ok(DeviceChoice::Cuda(None))),
            ("cuda:0", Ok(DeviceChoice::Cuda(Some(0)))),
            ("cuda:3", Ok(DeviceChoice::Cuda(Some(3)))),
            ("cuda:", Err(())),
            ("cuda:x", Err(())),
            ("gpu", Err(())),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().map_err(|_| ()), expected, "{text}");
            if let Ok(choice) = expected {
                assert_eq!(choice.to_string().parse(), Ok(choice));
            }
        }
    }

    #[test]
    fn errors_are_one_sentence_each_with_its_exit_code() {
        for (error, code) in [
            (DeviceError::NotBuilt, 5),
            (DeviceError::NoLibrary("libcuda.so.1".to_owned()), 5),
            (DeviceError::Driver("initialisation failed".to_owned()), 4),
            (DeviceError::NoDevice { asked: 1, found: 0 }, 4),
            (DeviceError::TooOld { number: 0, major: 7, minor: 5 }, 4),
        ] {
            assert_eq!(error.exit_code(), code);
            assert!(!error.to_string().contains('\n'));
        }
    }
}
