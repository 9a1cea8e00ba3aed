//! What the kernel tells about a framebuffer: the structures of `<linux/fb.h>` and the ioctls that fill them.

#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, ioctl};

use super::{Channel, Geometry, PixelFormat};

const FBIOGET_VSCREENINFO: rustix::ioctl::Opcode = 0x4600;
const FBIOGET_FSCREENINFO: rustix::ioctl::Opcode = 0x4602;
/// `FB_TYPE_PACKED_PIXELS`: all of a pixel's bits lie together.
const PACKED_PIXELS: u32 = 0;
/// `FB_VISUAL_TRUECOLOR` and `FB_VISUAL_DIRECTCOLOR`: pixels hold colours, not numbers of a table.
const COLOUR_VISUALS: [u32; 2] = [2, 4];

/// `struct fb_bitfield`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Bitfield {
    offset: u32,
    length: u32,
    msb_right: u32,
}

/// `struct fb_var_screeninfo`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct VarScreenInfo {
    xres: u32,
    yres: u32,
    xres_virtual: u32,
    yres_virtual: u32,
    xoffset: u32,
    yoffset: u32,
    bits_per_pixel: u32,
    grayscale: u32,
    red: Bitfield,
    green: Bitfield,
    blue: Bitfield,
    transp: Bitfield,
    nonstd: u32,
    activate: u32,
    height: u32,
    width: u32,
    accel_flags: u32,
    pixclock: u32,
    left_margin: u32,
    right_margin: u32,
    upper_margin: u32,
    lower_margin: u32,
    hsync_len: u32,
    vsync_len: u32,
    sync: u32,
    vmode: u32,
    rotate: u32,
    colorspace: u32,
    reserved: [u32; 4],
}

/// `struct fb_fix_screeninfo`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct FixScreenInfo {
    id: [u8; 16],
    smem_start: c_ulong,
    smem_len: u32,
    kind: u32,
    type_aux: u32,
    visual: u32,
    xpanstep: u16,
    ypanstep: u16,
    ywrapstep: u16,
    line_length: u32,
    mmio_start: c_ulong,
    mmio_len: u32,
    accel: u32,
    capabilities: u16,
    reserved: [u16; 2],
}

// What a C compiler makes of the header on machines of 64 and 32 bits.
const _: () = assert!(size_of::<VarScreenInfo>() == 160);
const _: () = assert!(size_of::<FixScreenInfo>() == if size_of::<c_ulong>() == 8 { 80 } else { 68 });

/// The geometry of an open framebuffer, or why it has none that can be drawn in.
pub(super) fn geometry(framebuffer: impl AsFd) -> Result<Geometry, String> {
    let told = |error: Errno| match error {
        Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP => "not a framebuffer; a plain file needs ?size=WxH".to_owned(),
        other => other.to_string(),
    };
    // SAFETY: these two ioctls only write, and as much as the structures have (asserted above); a driver of another kind of
    // file, which knows no ioctl of these numbers, refuses them. All bit patterns are values of the structures' fields.
    let variable: VarScreenInfo = unsafe {
        let getter = Getter::<FBIOGET_VSCREENINFO, VarScreenInfo>::new();
        ioctl(framebuffer.as_fd(), getter).map_err(told)?
    };
    // SAFETY: as above.
    let fixed: FixScreenInfo = unsafe {
        let getter = Getter::<FBIOGET_FSCREENINFO, FixScreenInfo>::new();
        ioctl(framebuffer.as_fd(), getter).map_err(told)?
    };
    described(&variable, &fixed)
}

fn described(variable: &VarScreenInfo, fixed: &FixScreenInfo) -> Result<Geometry, String> {
    if fixed.kind != PACKED_PIXELS || !COLOUR_VISUALS.contains(&fixed.visual) || variable.grayscale != 0 {
        let (kind, visual) = (fixed.kind, fixed.visual);
        return Err(format!("its pixels are not plain red, green and blue (type {kind}, visual {visual})"));
    }
    let channel = |field: Bitfield| Channel { offset: field.offset, length: field.length };
    let format = PixelFormat {
        bits: variable.bits_per_pixel,
        red: channel(variable.red),
        green: channel(variable.green),
        blue: channel(variable.blue),
        alpha: channel(variable.transp),
    };
    let rows = u64::from(variable.yoffset) * u64::from(fixed.line_length);
    let start = rows + u64::from(variable.xoffset) * u64::from(variable.bits_per_pixel / 8);
    Ok(Geometry { width: variable.xres, height: variable.yres, stride: fixed.line_length, start, format })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boards_describe_their_screens() {
        let field = |offset, length| Bitfield { offset, length, msb_right: 0 };
        // simplefb of an emulated Raspberry Pi 4, and virtio-gpu of an emulated board, panned by 8 rows and 2 pixels.
        let raspberry = VarScreenInfo {
            xres: 640,
            yres: 480,
            bits_per_pixel: 16,
            red: field(11, 5),
            green: field(5, 6),
            blue: field(0, 5),
            ..VarScreenInfo::default()
        };
        let fixed = FixScreenInfo { visual: 2, line_length: 1280, ..FixScreenInfo::default() };
        let expected = Geometry { width: 640, height: 480, stride: 1280, start: 0, format: PixelFormat::RGB565 };
        assert_eq!(described(&raspberry, &fixed), Ok(expected));

        let virtio = VarScreenInfo {
            xres: 1280,
            yres: 800,
            xoffset: 2,
            yoffset: 8,
            bits_per_pixel: 32,
            red: field(16, 8),
            green: field(8, 8),
            blue: field(0, 8),
            ..VarScreenInfo::default()
        };
        let fixed = FixScreenInfo { visual: 2, line_length: 5120, ..FixScreenInfo::default() };
        let start = 8 * 5120 + 2 * 4;
        let expected = Geometry { width: 1280, height: 800, stride: 5120, start, format: PixelFormat::XRGB8888 };
        assert_eq!(described(&virtio, &fixed), Ok(expected));

        // A table of 256 colours, planes, and shades of grey.
        let grey = VarScreenInfo { grayscale: 1, ..virtio };
        for (variable, other) in
            [(virtio, FixScreenInfo { visual: 3, ..fixed }), (virtio, FixScreenInfo { kind: 1, ..fixed }), (grey, fixed)]
        {
            assert!(described(&variable, &other).unwrap_err().contains("not plain red, green and blue"));
        }
    }
}
