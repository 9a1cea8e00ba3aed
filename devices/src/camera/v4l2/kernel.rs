//! The system calls of V4L2 (`linux/videodev2.h`), and the memory that a driver shares.
//!
//! Own definitions, and not the crate `v4l`'s (0.14): its bindings are generated from the system's header with libclang at every
//! build, which a cross-build would need with its board's headers; its streams wait with a time limit, but leave out what `poll`
//! tells of an unplugged device, and panic where the driver refuses to stop one; pictures of several planes it has as little as
//! this module. Layouts and request numbers are checked against the header in the tests.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the kernel's structures are declared whole")]

use std::ffi::{c_int, c_long, c_ulong};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, clock_gettime};

use super::negotiate::{FourCc, Sizes};
use super::{Capability, Filled, Format, Readiness, VideoDevice, encoding};

/// `V4L2_BUF_TYPE_VIDEO_CAPTURE`
const VIDEO_CAPTURE: u32 = 1;
/// `V4L2_MEMORY_MMAP`
const MEMORY_MMAP: u32 = 1;
/// `V4L2_PIX_FMT_PRIV_MAGIC`: the fields behind `private` are filled.
const PRIVATE_MAGIC: u32 = 0xFEED_CAFE;
/// Buffers asked for: the driver fills one while others are read or wait.
const BUFFERS: u32 = 4;
/// Most items of a list that a driver is asked for.
const LONGEST_LIST: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct RawCapability {
    driver: [u8; 16],
    card: [u8; 32],
    bus_info: [u8; 32],
    version: u32,
    capabilities: u32,
    device_caps: u32,
    reserved: [u32; 3],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawFormatDescription {
    index: u32,
    kind: u32,
    flags: u32,
    description: [u8; 32],
    pixel_format: u32,
    mbus_code: u32,
    reserved: [u32; 3],
}

/// `sizes` holds a discrete size in its first two numbers, or minimum, maximum and step of the width, then of the height.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawFrameSizes {
    index: u32,
    pixel_format: u32,
    kind: u32,
    sizes: [u32; 6],
    reserved: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawPixelFormat {
    width: u32,
    height: u32,
    pixel_format: u32,
    field: u32,
    bytes_per_line: u32,
    size_image: u32,
    colorspace: u32,
    private: u32,
    flags: u32,
    ycbcr_encoding: u32,
    quantization: u32,
    transfer_function: u32,
}

/// A member of the union holds pointers, which sets its alignment.
#[repr(C)]
#[derive(Clone, Copy)]
union FormatUnion {
    pixels: RawPixelFormat,
    bytes: [u8; 200],
    alignment: [c_ulong; 0],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawFormat {
    kind: u32,
    format: FormatUnion,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawStreamParameters {
    kind: u32,
    capability: u32,
    capture_mode: u32,
    numerator: u32,
    denominator: u32,
    rest: [u8; 184],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawRequestBuffers {
    count: u32,
    kind: u32,
    memory: u32,
    capabilities: u32,
    flags: u32,
}

/// The time is a pair of C `long`s, also with 32 bits: kernels understand this form with old and new C libraries.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawBuffer {
    index: u32,
    kind: u32,
    bytes_used: u32,
    flags: u32,
    field: u32,
    seconds: c_long,
    microseconds: c_long,
    timecode: [u32; 4],
    sequence: u32,
    memory: u32,
    /// The offset, in the first four bytes of a union of pointers.
    place: BufferPlace,
    length: u32,
    reserved: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
union BufferPlace {
    offset: u32,
    pointer: c_ulong,
}

const QUERY_CAPABILITY: Opcode = opcode::read::<RawCapability>(b'V', 0);
const ENUMERATE_FORMATS: Opcode = opcode::read_write::<RawFormatDescription>(b'V', 2);
const SET_FORMAT: Opcode = opcode::read_write::<RawFormat>(b'V', 5);
const REQUEST_BUFFERS: Opcode = opcode::read_write::<RawRequestBuffers>(b'V', 8);
const QUERY_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 9);
const QUEUE_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 15);
const DEQUEUE_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 17);
const STREAM_ON: Opcode = opcode::write::<c_int>(b'V', 18);
const STREAM_OFF: Opcode = opcode::write::<c_int>(b'V', 19);
const SET_PARAMETERS: Opcode = opcode::read_write::<RawStreamParameters>(b'V', 22);
const ENUMERATE_SIZES: Opcode = opcode::read_write::<RawFrameSizes>(b'V', 74);

/// Plain numbers, for which all bytes zero is a value and any bytes the kernel writes are one.
///
/// # Safety
/// The type must be `repr(C)`, of integers alone, and laid out as the kernel's structure for the requests it is used with.
unsafe trait KernelStruct: Copy {
    fn zeroed() -> Self {
        // SAFETY: integers may be zero.
        unsafe { std::mem::zeroed() }
    }
}

// SAFETY: all are integers, or unions of integers; the tests compare their layouts with the kernel's header.
unsafe impl KernelStruct for RawCapability {}
// SAFETY: as above.
unsafe impl KernelStruct for RawFormatDescription {}
// SAFETY: as above.
unsafe impl KernelStruct for RawFrameSizes {}
// SAFETY: as above.
unsafe impl KernelStruct for RawFormat {}
// SAFETY: as above.
unsafe impl KernelStruct for RawStreamParameters {}
// SAFETY: as above.
unsafe impl KernelStruct for RawRequestBuffers {}
// SAFETY: as above.
unsafe impl KernelStruct for RawBuffer {}

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
            // SAFETY: every constant above is made from the very structure it is used with, whose size it encodes, so the
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
    use std::mem::{offset_of, size_of};

    use super::*;

    /// Values that `reference/layout.c` prints on x86-64 and for 32 bits; ARM's are the same.
    #[test]
    fn layouts_and_requests_are_those_of_the_kernels_header() {
        let word = |wide: usize, narrow: usize| if cfg!(target_pointer_width = "64") { wide } else { narrow };
        let layouts = [
            ("v4l2_capability", size_of::<RawCapability>(), 104),
            ("v4l2_capability.capabilities", offset_of!(RawCapability, capabilities), 84),
            ("v4l2_capability.device_caps", offset_of!(RawCapability, device_caps), 88),
            ("v4l2_fmtdesc", size_of::<RawFormatDescription>(), 64),
            ("v4l2_fmtdesc.pixelformat", offset_of!(RawFormatDescription, pixel_format), 44),
            ("v4l2_frmsizeenum", size_of::<RawFrameSizes>(), 44),
            ("v4l2_frmsizeenum.discrete", offset_of!(RawFrameSizes, sizes), 12),
            ("v4l2_format", size_of::<RawFormat>(), word(208, 204)),
            ("v4l2_format.fmt.pix", offset_of!(RawFormat, format), word(8, 4)),
            ("v4l2_pix_format.priv", offset_of!(RawPixelFormat, private), 28),
            ("v4l2_pix_format.quantization", offset_of!(RawPixelFormat, quantization), 40),
            ("v4l2_streamparm", size_of::<RawStreamParameters>(), 204),
            ("v4l2_streamparm.parm.capture.timeperframe", offset_of!(RawStreamParameters, numerator), 12),
            ("v4l2_requestbuffers", size_of::<RawRequestBuffers>(), 20),
            ("v4l2_buffer", size_of::<RawBuffer>(), word(88, 68)),
            ("v4l2_buffer.timestamp", offset_of!(RawBuffer, seconds), word(24, 20)),
            ("v4l2_buffer.sequence", offset_of!(RawBuffer, sequence), word(56, 44)),
            ("v4l2_buffer.m", offset_of!(RawBuffer, place), word(64, 52)),
            ("v4l2_buffer.length", offset_of!(RawBuffer, length), word(72, 56)),
            ("VIDIOC_QUERYCAP", QUERY_CAPABILITY as usize, 0x8068_5600),
            ("VIDIOC_ENUM_FMT", ENUMERATE_FORMATS as usize, 0xC040_5602),
            ("VIDIOC_S_FMT", SET_FORMAT as usize, word(0xC0D0_5605, 0xC0CC_5605)),
            ("VIDIOC_REQBUFS", REQUEST_BUFFERS as usize, 0xC014_5608),
            ("VIDIOC_QUERYBUF", QUERY_BUFFER as usize, word(0xC058_5609, 0xC044_5609)),
            ("VIDIOC_QBUF", QUEUE_BUFFER as usize, word(0xC058_560F, 0xC044_560F)),
            ("VIDIOC_DQBUF", DEQUEUE_BUFFER as usize, word(0xC058_5611, 0xC044_5611)),
            ("VIDIOC_STREAMON", STREAM_ON as usize, 0x4004_5612),
            ("VIDIOC_STREAMOFF", STREAM_OFF as usize, 0x4004_5613),
            ("VIDIOC_S_PARM", SET_PARAMETERS as usize, 0xC0CC_5616),
            ("VIDIOC_ENUM_FRAMESIZES", ENUMERATE_SIZES as usize, 0xC02C_564A),
        ];
        for (name, found, expected) in layouts {
            assert_eq!(found, expected, "{name}");
        }
    }

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
