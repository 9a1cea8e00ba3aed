//! The system calls of V4L2 (`linux/videodev2.h`), and the memory that a driver shares.
//!
//! Own definitions, and not the crate `v4l`'s (0.14): its bindings are generated from the system's header with libclang at every
//! build, which a cross-build would need with its board's headers; its streams wait with a time limit, but leave out what `poll`
//! tells of an unplugged device, and panic where the driver refuses to stop one; pictures of several planes it has as little as
//! this module. Layouts and request numbers are checked against the header in the tests.
#![allow(unsafe_code)]

mod abi;

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, clock_gettime};

use self::abi::*;
use super::negotiate::{FourCc, Sizes};
use super::{Capability, Filled, Format, Readiness, VideoDevice, encoding};

/// Buffers asked for: the driver fills one while others are read or wait.
const BUFFERS: u32 = 4;
/// Most items of a list that a driver is asked for.
const LONGEST_LIST: u32 = 256;

/// A video device that is open.
pub(super) struct Device {
    file: File,
    streaming: bool,
    buffers: Vec<Mapping>,
}

/// A buffer of the driver in this process's memory.
struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is owned by its device, and read only through it.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the address and length are those that mmap gave, and nothing refers to the memory any more: slices of it
        // borrow the device. That it was unplugged does not take the memory away; failing would only leak it.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.length) };
    }
}

impl Device {
    /// Opens a device node, without waiting for it.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { file: file.into(), streaming: false, buffers: Vec::new() })
    }

    /// Makes a request that reads and writes its argument.
    fn request<const OPCODE: Opcode, T: KernelStruct>(&self, argument: &mut T) -> rustix::io::Result<()> {
        loop {
            // SAFETY: every request's number is made from the very structure it is used with, whose size it encodes, so the
            // kernel reads and writes no more than the argument; `KernelStruct` says that any bytes are a value.
            match unsafe { ioctl(&self.file, Updater::<OPCODE, T>::new(argument)) } {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Switches streaming on or off.
    fn switch<const OPCODE: Opcode>(&self) -> rustix::io::Result<()> {
        // SAFETY: both requests read one C int, the buffer type.
        unsafe { ioctl(&self.file, Setter::<OPCODE, c_int>::new(VIDEO_CAPTURE as c_int)) }
    }

    fn buffer(index: u32) -> RawBuffer {
        RawBuffer { index, kind: VIDEO_CAPTURE, memory: MEMORY_MMAP, ..RawBuffer::zeroed() }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.streaming {
            // A device that is gone cannot be told.
            let _ = self.switch::<STREAM_OFF>();
        }
    }
}

impl VideoDevice for Device {
    fn capability(&mut self) -> io::Result<Capability> {
        let mut raw = RawCapability::zeroed();
        self.request::<QUERY_CAPABILITY, _>(&mut raw)?;
        // V4L2_CAP_DEVICE_CAPS: what this node can do, as opposed to the whole device.
        let can = if raw.capabilities & 0x8000_0000 != 0 { raw.device_caps } else { raw.capabilities };
        Ok(Capability {
            driver: text(&raw.driver),
            card: text(&raw.card),
            captures: can & 0x1 != 0,
            captures_planes: can & 0x1000 != 0,
            streams: can & 0x0400_0000 != 0,
        })
    }

    fn formats(&mut self) -> io::Result<Vec<FourCc>> {
        let mut formats = Vec::new();
        for index in 0..LONGEST_LIST {
            let mut raw = RawFormatDescription { index, kind: VIDEO_CAPTURE, ..RawFormatDescription::zeroed() };
            match self.request::<ENUMERATE_FORMATS, _>(&mut raw) {
                Ok(()) => formats.push(FourCc(raw.pixel_format)),
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(formats)
    }

    fn sizes(&mut self, fourcc: FourCc) -> io::Result<Vec<Sizes>> {
        let mut sizes = Vec::new();
        for index in 0..LONGEST_LIST {
            let mut raw = RawFrameSizes { index, pixel_format: fourcc.0, ..RawFrameSizes::zeroed() };
            match self.request::<ENUMERATE_SIZES, _>(&mut raw) {
                Ok(()) => {}
                // The end of the list, or a driver without one.
                Err(Errno::INVAL | Errno::NOTTY) => break,
                Err(error) => return Err(error.into()),
            }
            let [a, b, c, d, e, f] = raw.sizes;
            if raw.kind == 1 {
                sizes.push(Sizes::One(a, b));
            } else {
                sizes.push(Sizes::Range { smallest: (a, d), largest: (b, e), step: (c, f) });
                break;
            }
        }
        Ok(sizes)
    }

    fn set_format(&mut self, fourcc: FourCc, width: u32, height: u32) -> io::Result<Format> {
        let mut raw = RawFormat { kind: VIDEO_CAPTURE, ..RawFormat::zeroed() };
        let mut pixels = RawPixelFormat {
            width,
            height,
            pixel_format: fourcc.0,
            field: 0,
            bytes_per_line: 0,
            size_image: 0,
            colorspace: 0,
            private: PRIVATE_MAGIC,
            flags: 0,
            ycbcr_encoding: 0,
            quantization: 0,
            transfer_function: 0,
        };
        raw.format.pixels = pixels;
        self.request::<SET_FORMAT, _>(&mut raw)?;
        // SAFETY: integers all, of which any bytes are a value.
        pixels = unsafe { raw.format.pixels };
        let told = pixels.private == PRIVATE_MAGIC;
        let (ycbcr, quantization) = if told { (pixels.ycbcr_encoding, pixels.quantization) } else { (0, 0) };
        Ok(Format {
            fourcc: FourCc(pixels.pixel_format),
            width: pixels.width,
            height: pixels.height,
            stride: pixels.bytes_per_line,
            encoding: encoding(pixels.colorspace, ycbcr, quantization),
        })
    }

    fn set_rate(&mut self, fps: f32) -> io::Result<Option<f32>> {
        let mut raw = RawStreamParameters { kind: VIDEO_CAPTURE, ..RawStreamParameters::zeroed() };
        (raw.numerator, raw.denominator) = (1000, (fps * 1000.0) as u32);
        match self.request::<SET_PARAMETERS, _>(&mut raw) {
            // V4L2_CAP_TIMEPERFRAME
            Ok(()) if raw.capability & 0x1000 != 0 && raw.numerator > 0 => {
                Ok(Some(raw.denominator as f32 / raw.numerator as f32))
            }
            Ok(()) | Err(Errno::NOTTY | Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let mut request =
            RawRequestBuffers { count: BUFFERS, kind: VIDEO_CAPTURE, memory: MEMORY_MMAP, ..RawRequestBuffers::zeroed() };
        self.request::<REQUEST_BUFFERS, _>(&mut request)?;
        for index in 0..request.count {
            let mut buffer = Self::buffer(index);
            self.request::<QUERY_BUFFER, _>(&mut buffer)?;
            // SAFETY: any bytes are a value.
            let offset = unsafe { buffer.place.offset };
            let length = buffer.length as usize;
            // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
            let address =
                unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, &self.file, offset.into()) }?;
            let address = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
            self.buffers.push(Mapping { address, length });
            self.request::<QUEUE_BUFFER, _>(&mut buffer)?;
        }
        self.switch::<STREAM_ON>()?;
        self.streaming = true;
        Ok(())
    }

    fn wait(&mut self, wait: Duration) -> io::Result<Readiness> {
        let timeout = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        let mut polled = [PollFd::new(&self.file, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(Readiness::Nothing),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let failed = polled[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        Ok(if failed { Readiness::Failed } else { Readiness::Ready })
    }

    fn take(&mut self, lend: &mut dyn FnMut(Filled<'_>)) -> io::Result<()> {
        let mut buffer = Self::buffer(0);
        self.request::<DEQUEUE_BUFFER, _>(&mut buffer)?;
        let mapping = self.buffers.get(buffer.index as usize).ok_or(Errno::INVAL)?;
        let length = mapping.length.min(buffer.bytes_used as usize);
        // SAFETY: the mapping has at least `length` bytes, and the driver does not write to a buffer that was taken from its
        // queue until it is put back below, after the slice's last use.
        let bytes = unsafe { std::slice::from_raw_parts(mapping.address.as_ptr(), length) };
        lend(Filled {
            bytes,
            sequence: buffer.sequence,
            captured: captured(&buffer),
            // V4L2_BUF_FLAG_ERROR
            damaged: buffer.flags & 0x40 != 0,
        });
        let mut back = Self::buffer(buffer.index);
        Ok(self.request::<QUEUE_BUFFER, _>(&mut back)?)
    }
}

/// When a picture was taken: its time on the monotonic clock, where the driver gives that, told by the clock on the wall.
#[allow(clippy::useless_conversion, reason = "C `long`s have 32 bits on some boards")]
fn captured(buffer: &RawBuffer) -> SystemTime {
    let now = SystemTime::now();
    // V4L2_BUF_FLAG_TIMESTAMP_MASK and _MONOTONIC
    if buffer.flags & 0xE000 != 0x2000 {
        return now;
    }
    let clock = clock_gettime(ClockId::Monotonic);
    let (seconds, microseconds) = (i64::from(buffer.seconds), i64::from(buffer.microseconds));
    let age_ns = (clock.tv_sec - seconds) * 1_000_000_000 + (i64::from(clock.tv_nsec) - microseconds * 1000);
    // A clock that was misread by more than a minute is worse than none.
    match u64::try_from(age_ns) {
        Ok(age_ns) if age_ns < 60_000_000_000 => now - Duration::from_nanos(age_ns),
        _ => now,
    }
}

/// Text up to its first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use std::ffi::c_long;

    use super::*;

    #[test]
    fn the_kernel_refuses_what_is_no_video_device() {
        let mut device = Device::open("/dev/null").unwrap();
        // ENOTTY
        assert_eq!(device.capability().unwrap_err().raw_os_error(), Some(25));
        assert_eq!(device.start().unwrap_err().raw_os_error(), Some(25));
        assert!(device.take(&mut |_| panic!("a picture from nowhere")).is_err());
        let missing = Device::open("/dev/video-of-nobody").err().unwrap();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    #[allow(clippy::unnecessary_cast, reason = "C `long`s have 32 bits on some boards")]
    fn times_of_pictures() {
        let clock = clock_gettime(ClockId::Monotonic);
        let mut buffer = Device::buffer(0);
        (buffer.seconds, buffer.microseconds) = (clock.tv_sec as c_long - 2, clock.tv_nsec as c_long / 1000);
        let age = |buffer: &RawBuffer| {
            let at = captured(buffer);
            SystemTime::now().duration_since(at).unwrap().as_secs_f64()
        };
        assert!(age(&buffer) < 1.0);
        buffer.flags = 0x2000;
        assert!((2.0..3.0).contains(&age(&buffer)));
        // From the future, or from long ago.
        buffer.seconds += 3600;
        assert!(age(&buffer) < 1.0);
        buffer.seconds = 0;
        assert!(age(&buffer) < 1.0 || clock.tv_sec < 61);
    }

    #[test]
    fn texts_end_at_their_zero() {
        assert_eq!((text(b"uvc\0\0\0"), text(b"full"), text(b"\xFF\0")), ("uvc".into(), "full".into(), "\u{FFFD}".into()));
    }
}
