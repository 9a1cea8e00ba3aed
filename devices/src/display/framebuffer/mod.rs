//! Linux framebuffers of 16, 24 and 32 bits a pixel.

#[cfg(target_os = "linux")]
mod kernel;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::address::Address;
use super::{Canvas, Colours, Display, DisplayError, Geometry as Screen, check_size};

/// Where the bits of a colour lie in a pixel: the place of the lowest, and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channel {
    /// Bits below it.
    pub offset: u32,
    /// Its bits, at most 8.
    pub length: u32,
}

/// What a pixel is in memory, in the processor's byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelFormat {
    /// 16, 24 or 32.
    pub bits: u32,
    /// Red.
    pub red: Channel,
    /// Green.
    pub green: Channel,
    /// Blue.
    pub blue: Channel,
    /// Opacity, which is set to its highest; of length 0 where there is none.
    pub alpha: Channel,
}

const NO_CHANNEL: Channel = Channel { offset: 0, length: 0 };

impl PixelFormat {
    /// 16 bits: 5 of red on top, 6 of green, 5 of blue.
    pub const RGB565: Self = Self {
        bits: 16,
        red: Channel { offset: 11, length: 5 },
        green: Channel { offset: 5, length: 6 },
        blue: Channel { offset: 0, length: 5 },
        alpha: NO_CHANNEL,
    };
    /// 32 bits, of which the top 8 mean nothing.
    pub const XRGB8888: Self = Self {
        bits: 32,
        red: Channel { offset: 16, length: 8 },
        green: Channel { offset: 8, length: 8 },
        blue: Channel { offset: 0, length: 8 },
        alpha: NO_CHANNEL,
    };

    fn bytes(&self) -> usize {
        self.bits as usize / 8
    }

    fn encode(&self, [red, green, blue]: [u8; 3]) -> u32 {
        let place = |value: u8, channel: Channel| (u32::from(value) >> (8 - channel.length)) << channel.offset;
        place(red, self.red) | place(green, self.green) | place(blue, self.blue) | place(255, self.alpha)
    }

    /// Why it cannot be drawn in.
    fn fault(&self) -> Option<String> {
        let inside = |channel: &Channel| channel.length <= 8 && channel.offset + channel.length <= self.bits;
        let coloured = [self.red, self.green, self.blue].iter().all(|channel| channel.length > 0 && inside(channel));
        if matches!(self.bits, 16 | 24 | 32) && coloured && inside(&self.alpha) {
            return None;
        }
        Some(format!("its pixels of {} bits are not red, green and blue in 16, 24 or 32 bits", self.bits))
    }
}

/// Where the picture lies in a framebuffer's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Visible pixels from left to right.
    pub width: u32,
    /// Visible rows.
    pub height: u32,
    /// Bytes from a row to the next.
    pub stride: u32,
    /// Bytes before the first visible pixel.
    pub start: u64,
    /// What a pixel is.
    pub format: PixelFormat,
}

impl Geometry {
    fn fault(&self) -> Option<String> {
        if self.width == 0 || self.height == 0 {
            return Some("it has no pixels".to_owned());
        }
        let row = u64::from(self.width) * self.format.bytes() as u64;
        if u64::from(self.stride) < row {
            return Some(format!("a row of {row} bytes has no room in {}", self.stride));
        }
        self.format.fault()
    }
}

/// A framebuffer, written through its file: no memory is mapped, so that it may go away at any time.
pub struct Framebuffer {
    path: PathBuf,
    file: File,
    geometry: Geometry,
    /// Rows as they lie in memory, from the first visible pixel to the last.
    memory: Vec<u8>,
}

impl Framebuffer {
    /// A framebuffer, or a file that is treated as one, whose geometry is known.
    ///
    /// # Errors
    /// A geometry that cannot be, or whose pixels are not 16, 24 or 32 bits of red, green and blue; a file that cannot be written.
    pub fn with_geometry(path: &Path, geometry: Geometry) -> Result<Self, DisplayError> {
        let file = open_for_writing(path)?;
        Self::checked(path, file, geometry)
    }

    fn checked(path: &Path, file: File, geometry: Geometry) -> Result<Self, DisplayError> {
        if let Some(fault) = geometry.fault() {
            return Err(DisplayError::unavailable(path, fault));
        }
        let row = geometry.width as usize * geometry.format.bytes();
        let memory = vec![0; (geometry.height as usize - 1) * geometry.stride as usize + row];
        Ok(Self { path: path.to_path_buf(), file, geometry, memory })
    }

    fn encode(&mut self, canvas: &Canvas) {
        let bytes = self.geometry.format.bytes();
        for (y, row) in (0..).zip(self.memory.chunks_mut(self.geometry.stride as usize)) {
            for (colour, pixel) in canvas.row(y).iter().zip(row.chunks_exact_mut(bytes)) {
                let value = self.geometry.format.encode(*colour);
                if cfg!(target_endian = "little") {
                    pixel.copy_from_slice(&value.to_le_bytes()[..bytes]);
                } else {
                    pixel.copy_from_slice(&value.to_be_bytes()[4 - bytes..]);
                }
            }
        }
    }

    /// In one piece where nothing lies between the rows, else row by row: what lies between may be visible one day.
    fn write(&self) -> std::io::Result<()> {
        let Geometry { width, stride, start, format, .. } = self.geometry;
        let row = width as usize * format.bytes();
        if row == stride as usize {
            return self.file.write_all_at(&self.memory, start);
        }
        for (y, line) in (0..).zip(self.memory.chunks(stride as usize)) {
            self.file.write_all_at(&line[..row], start + y * u64::from(stride))?;
        }
        Ok(())
    }
}

impl Display for Framebuffer {
    fn geometry(&self) -> Screen {
        Screen { width: self.geometry.width, height: self.geometry.height, colours: Colours::Many }
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        check_size(canvas, Display::geometry(self))?;
        self.encode(canvas);
        self.write().map_err(|error| DisplayError::write(&self.path, error))
    }
}

fn open_for_writing(path: &Path) -> Result<File, DisplayError> {
    // The ioctls ask for no right to write, but a picture does.
    File::options().read(true).write(true).open(path).map_err(|error| DisplayError::unavailable(path, error))
}

pub(super) fn open(address: &mut Address<'_>) -> Result<Framebuffer, DisplayError> {
    let path = address.path_or("/dev/fb0");
    let size = address.size()?;
    let depth = address.option("depth", "16 or 32", |text| match text {
        "16" => Some(PixelFormat::RGB565),
        "32" => Some(PixelFormat::XRGB8888),
        _ => None,
    })?;
    let stride = address.number("stride", "the bytes of a row")?;
    address.finish()?;
    let Some((width, height)) = size else {
        if depth.is_some() || stride.is_some() {
            return Err(address.fault("depth and stride are said of a plain file, together with its size".to_owned()));
        }
        return device(&path);
    };
    let format = depth.unwrap_or(PixelFormat::XRGB8888);
    let stride = stride.unwrap_or(width * format.bits / 8);
    Framebuffer::with_geometry(&path, Geometry { width, height, stride, start: 0, format })
}

#[cfg(target_os = "linux")]
fn device(path: &Path) -> Result<Framebuffer, DisplayError> {
    let file = open_for_writing(path)?;
    let geometry = kernel::geometry(&file).map_err(|reason| DisplayError::unavailable(path, reason))?;
    Framebuffer::checked(path, file, geometry)
}

#[cfg(not(target_os = "linux"))]
fn device(path: &Path) -> Result<Framebuffer, DisplayError> {
    Err(DisplayError::unavailable(path, "framebuffers are a thing of Linux; a plain file needs ?size=WxH"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canvas() -> Canvas {
        let mut canvas = Canvas::new(3, 2);
        canvas.row_mut(0).copy_from_slice(&[[255, 0, 0], [0, 255, 0], [0, 0, 255]]);
        canvas.row_mut(1).copy_from_slice(&[[255, 255, 255], [8, 4, 8], [0x12, 0x34, 0x56]]);
        canvas
    }

    /// A file of 0xAA, and what it is after the picture was shown.
    fn shown(options: &str, length: usize) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0xAA; length]).unwrap();
        let mut display = super::super::open(&format!("fb://{}?size=3x2{options}", file.path().display())).unwrap();
        display.present(&Canvas::new(3, 2)).unwrap();
        display.present(&canvas()).unwrap();
        std::fs::read(file.path()).unwrap()
    }

    #[test]
    fn sixteen_bits() {
        // Red 0xF800, green 0x07E0, blue 0x001F, white 0xFFFF, the least of each 0x0821, and 0x12, 0x34, 0x56 cut to 5, 6, 5 bits.
        let rows = [[0x00, 0xF8, 0xE0, 0x07, 0x1F, 0x00], [0xFF, 0xFF, 0x21, 0x08, 0xAA, 0x11]];
        assert_eq!(shown("&depth=16", 12), rows.concat());
        // Two bytes more to a row are not ours.
        let padded = [&rows[0][..], &[0xAA, 0xAA], &rows[1][..], &[0xAA; 4]].concat();
        assert_eq!(shown("&depth=16&stride=8", 18), padded);
    }

    #[test]
    fn thirty_two_bits() {
        let first = [[0, 0, 255, 0], [0, 255, 0, 0], [255, 0, 0, 0]];
        let second = [[255, 255, 255, 0], [8, 4, 8, 0], [0x56, 0x34, 0x12, 0]];
        assert_eq!(shown("", 24), [first.concat(), second.concat()].concat());
        let padded = [first.concat(), vec![0xAA; 4], second.concat(), vec![0xAA; 4]].concat();
        assert_eq!(shown("&depth=32&stride=16", 32), padded);
    }

    #[test]
    fn other_orders_of_colours_and_a_start() {
        // Blue on top, opacity above it, as some Qualcomm and Amlogic boards have it.
        let channel = |offset| Channel { offset, length: 8 };
        let format = PixelFormat { bits: 32, red: channel(0), green: channel(8), blue: channel(16), alpha: channel(24) };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0xAA; 8]).unwrap();
        let geometry = Geometry { width: 3, height: 2, stride: 12, start: 8, format };
        Framebuffer::with_geometry(file.path(), geometry).unwrap().present(&canvas()).unwrap();
        let written = std::fs::read(file.path()).unwrap();
        assert_eq!(written[..12], [0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 255, 0, 0, 255]);
        assert_eq!(written[28..], [0x12, 0x34, 0x56, 255]);

        // A start, and bytes between the rows.
        std::fs::write(file.path(), [0xAA; 8]).unwrap();
        let geometry = Geometry { stride: 13, start: 3, ..geometry };
        Framebuffer::with_geometry(file.path(), geometry).unwrap().present(&canvas()).unwrap();
        let written = std::fs::read(file.path()).unwrap();
        assert_eq!((written.len(), &written[..7]), (3 + 13 + 12, &[0xAA, 0xAA, 0xAA, 255, 0, 0, 255][..]));
        assert_eq!(written[24..], [0x12, 0x34, 0x56, 255]);

        let format = PixelFormat { bits: 24, alpha: NO_CHANNEL, ..PixelFormat::XRGB8888 };
        let geometry = Geometry { width: 3, height: 2, stride: 9, start: 0, format };
        Framebuffer::with_geometry(file.path(), geometry).unwrap().present(&canvas()).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[..9], [0, 0, 255, 0, 255, 0, 255, 0, 0]);
    }

    #[test]
    fn geometries_that_cannot_be() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let good = Geometry { width: 3, height: 2, stride: 12, start: 0, format: PixelFormat::XRGB8888 };
        let with = |format| Geometry { format, ..good };
        let long = Channel { offset: 0, length: 10 };
        let cases = [
            (Geometry { width: 0, ..good }, "it has no pixels"),
            (Geometry { height: 0, ..good }, "it has no pixels"),
            (Geometry { stride: 11, ..good }, "a row of 12 bytes has no room in 11"),
            (with(PixelFormat { bits: 8, ..PixelFormat::XRGB8888 }), "its pixels of 8 bits are not"),
            (with(PixelFormat { red: NO_CHANNEL, ..PixelFormat::XRGB8888 }), "are not red, green and blue"),
            (with(PixelFormat { blue: long, ..PixelFormat::XRGB8888 }), "are not red, green and blue"),
            (with(PixelFormat { bits: 16, ..PixelFormat::XRGB8888 }), "are not red, green and blue"),
        ];
        for (geometry, part) in cases {
            let said = Framebuffer::with_geometry(file.path(), geometry).err().unwrap().to_string();
            assert!(said.contains(part), "{said}");
        }
        let mut display = Framebuffer::with_geometry(file.path(), good).unwrap();
        assert!(matches!(display.present(&Canvas::new(2, 3)), Err(DisplayError::Size { found: (2, 3), expected: (3, 2) })));
        let said = super::super::open(&format!("fb://{}?depth=16", file.path().display())).err().unwrap().to_string();
        assert!(said.contains("together with its size"), "{said}");
    }
}
