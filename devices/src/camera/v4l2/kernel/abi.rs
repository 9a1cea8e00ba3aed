//! The structures and requests of V4L2, as `linux/videodev2.h` lays them out.
//!
//! Layouts and request numbers are checked against the header in the tests.
#![allow(dead_code, reason = "the kernel's structures are declared whole")]

use std::ffi::{c_int, c_long, c_ulong};

use rustix::ioctl::{Opcode, opcode};

/// `V4L2_BUF_TYPE_VIDEO_CAPTURE`
pub const VIDEO_CAPTURE: u32 = 1;
/// `V4L2_MEMORY_MMAP`
pub const MEMORY_MMAP: u32 = 1;
/// `V4L2_PIX_FMT_PRIV_MAGIC`: the fields behind `private` are filled.
pub const PRIVATE_MAGIC: u32 = 0xFEED_CAFE;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawCapability {
    pub driver: [u8; 16],
    pub card: [u8; 32],
    pub bus_info: [u8; 32],
    pub version: u32,
    pub capabilities: u32,
    pub device_caps: u32,
    pub reserved: [u32; 3],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawFormatDescription {
    pub index: u32,
    pub kind: u32,
    pub flags: u32,
    pub description: [u8; 32],
    pub pixel_format: u32,
    pub mbus_code: u32,
    pub reserved: [u32; 3],
}

/// `sizes` holds a discrete size in its first two numbers, or minimum, maximum and step of the width, then of the height.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawFrameSizes {
    pub index: u32,
    pub pixel_format: u32,
    pub kind: u32,
    pub sizes: [u32; 6],
    pub reserved: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawPixelFormat {
    pub width: u32,
    pub height: u32,
    pub pixel_format: u32,
    pub field: u32,
    pub bytes_per_line: u32,
    pub size_image: u32,
    pub colorspace: u32,
    pub private: u32,
    pub flags: u32,
    pub ycbcr_encoding: u32,
    pub quantization: u32,
    pub transfer_function: u32,
}

/// A member of the union holds pointers, which sets its alignment.
#[repr(C)]
#[derive(Clone, Copy)]
pub union FormatUnion {
    pub pixels: RawPixelFormat,
    pub bytes: [u8; 200],
    pub alignment: [c_ulong; 0],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawFormat {
    pub kind: u32,
    pub format: FormatUnion,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawStreamParameters {
    pub kind: u32,
    pub capability: u32,
    pub capture_mode: u32,
    pub numerator: u32,
    pub denominator: u32,
    pub rest: [u8; 184],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawRequestBuffers {
    pub count: u32,
    pub kind: u32,
    pub memory: u32,
    pub capabilities: u32,
    pub flags: u32,
}

/// The time is a pair of C `long`s, also with 32 bits: kernels understand this form with old and new C libraries.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawBuffer {
    pub index: u32,
    pub kind: u32,
    pub bytes_used: u32,
    pub flags: u32,
    pub field: u32,
    pub seconds: c_long,
    pub microseconds: c_long,
    pub timecode: [u32; 4],
    pub sequence: u32,
    pub memory: u32,
    /// The offset, in the first four bytes of a union of pointers.
    pub place: BufferPlace,
    pub length: u32,
    pub reserved: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub union BufferPlace {
    pub offset: u32,
    pub pointer: c_ulong,
}

pub const QUERY_CAPABILITY: Opcode = opcode::read::<RawCapability>(b'V', 0);
pub const ENUMERATE_FORMATS: Opcode = opcode::read_write::<RawFormatDescription>(b'V', 2);
pub const SET_FORMAT: Opcode = opcode::read_write::<RawFormat>(b'V', 5);
pub const REQUEST_BUFFERS: Opcode = opcode::read_write::<RawRequestBuffers>(b'V', 8);
pub const QUERY_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 9);
pub const QUEUE_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 15);
pub const DEQUEUE_BUFFER: Opcode = opcode::read_write::<RawBuffer>(b'V', 17);
pub const STREAM_ON: Opcode = opcode::write::<c_int>(b'V', 18);
pub const STREAM_OFF: Opcode = opcode::write::<c_int>(b'V', 19);
pub const SET_PARAMETERS: Opcode = opcode::read_write::<RawStreamParameters>(b'V', 22);
pub const ENUMERATE_SIZES: Opcode = opcode::read_write::<RawFrameSizes>(b'V', 74);

/// Plain numbers, for which all bytes zero is a value and any bytes the kernel writes are one.
///
/// # Safety
/// The type must be `repr(C)`, of integers alone, and laid out as the kernel's structure for the requests it is used with.
pub unsafe trait KernelStruct: Copy {
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
}
