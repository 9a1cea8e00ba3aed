//! Screens: what the layout draws on a [`Canvas`] is shown on a framebuffer, a small panel or in a PNG file.
//!
//! | URI | screen |
//! |---|---|
//! | `fb:///dev/fb0`, or `fb` | a Linux framebuffer of 16, 24 or 32 bits; the kernel tells its geometry |
//! | `fb:///path?size=640x480&depth=16&stride=1280` | a plain file as if it were one, for tests |
//! | `ssd1306:///dev/i2c-1?address=0x3c&size=128x64` | an SSD1306 panel on I²C: 128x64, 128x32, 96x16, 72x40, 64x48 or 64x32 |
//! | `st7789:///dev/spidev0.0?dc=25&reset=27&backlight=18&size=240x240` | an ST7789 panel on SPI; pins are lines of `chip=/dev/gpiochip0` |
//! | `ili9341:///dev/spidev0.0?dc=25&reset=27` | an ILI9341 panel, likewise |
//! | `png://out.png?size=320x240` | a PNG file, replaced as a whole each time; `mono=on` for black and white |
//!
//! All take `rotate=90`, `180` or `270`: the picture is turned clockwise by so many degrees. Panels on SPI also take `offset=X,Y`
//! (of the glass in the controller's memory), `invert=on|off`, `order=rgb|bgr`, `speed` in hertz and the SPI `mode`.

mod address;
mod canvas;
mod framebuffer;
pub mod layout;
mod png;
mod rotated;
#[cfg(all(feature = "panels", any(target_os = "linux", test)))]
mod ssd1306;
pub mod table;
mod text;
#[cfg(all(feature = "panels", any(target_os = "linux", test)))]
mod tft;

use std::path::PathBuf;

use self::address::Address;
pub use self::canvas::Canvas;
pub use self::framebuffer::{Framebuffer, Geometry as FramebufferGeometry, PixelFormat};
pub use self::png::PngFile;
pub use self::rotated::{Rotated, Rotation};

/// What a screen can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// Colours of a pixel.
    pub colours: Colours,
}

/// Colours of a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colours {
    /// On or off.
    Two,
    /// Red, green and blue.
    Many,
}

/// A screen.
pub trait Display: Send {
    /// What it can show; stays the same.
    fn geometry(&self) -> Geometry;

    /// Shows a canvas of its size. Where it has two colours, pixels of half the brightness of white and more are on.
    ///
    /// # Errors
    /// A device that does not answer, or a file that cannot be written.
    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError>;
}

/// Why a screen cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DisplayError {
    /// The URI is no screen's.
    #[error("{uri}: {reason}")]
    Address {
        /// The URI as given.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The device or file cannot be opened or set up.
    #[error("the display {} is not available: {reason}", path.display())]
    Unavailable {
        /// The device or file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The device or file was there, and cannot be written.
    #[error("cannot show a picture on {}: {reason}", path.display())]
    Write {
        /// The device or file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The canvas has another size than the screen.
    #[error("a canvas of {found:?} pixels does not go on a display of {expected:?}")]
    Size {
        /// The canvas's width and height.
        found: (u32, u32),
        /// The screen's.
        expected: (u32, u32),
    },
}

impl DisplayError {
    fn unavailable(path: &std::path::Path, reason: impl ToString) -> Self {
        Self::Unavailable { path: path.to_path_buf(), reason: reason.to_string() }
    }

    fn write(path: &std::path::Path, reason: impl ToString) -> Self {
        Self::Write { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

/// Opens the screen that a URI names; see the [module](self).
///
/// # Errors
/// A URI of no screen, or a device that is not there or does not answer.
pub fn open(uri: &str) -> Result<Box<dyn Display>, DisplayError> {
    let mut address = Address::parse(uri)?;
    let rotation = match address.option("rotate", "0, 90, 180 or 270", |text| text.parse().ok())?.unwrap_or(0) {
        0 => None,
        90 => Some(Rotation::Quarter),
        180 => Some(Rotation::Half),
        270 => Some(Rotation::ThreeQuarters),
        other => return Err(address.fault(format!("rotate={other}: say 0, 90, 180 or 270"))),
    };
    let display: Box<dyn Display> = match address.scheme() {
        "fb" => Box::new(framebuffer::open(&mut address)?),
        "png" => Box::new(png::open(&mut address)?),
        #[cfg(all(feature = "panels", target_os = "linux"))]
        "ssd1306" => ssd1306::open(&mut address)?,
        #[cfg(all(feature = "panels", target_os = "linux"))]
        "st7789" => tft::open(&mut address, tft::Controller::St7789)?,
        #[cfg(all(feature = "panels", target_os = "linux"))]
        "ili9341" => tft::open(&mut address, tft::Controller::Ili9341)?,
        #[cfg(not(all(feature = "panels", target_os = "linux")))]
        "ssd1306" | "st7789" | "ili9341" => return Err(address.fault("this build drives no panels".to_owned())),
        _ => return Err(address.fault("no display; there are fb://, ssd1306://, st7789://, ili9341:// and png://".to_owned())),
    };
    Ok(match rotation {
        Some(rotation) => Box::new(Rotated::new(display, rotation)),
        None => display,
    })
}

fn check_size(canvas: &Canvas, geometry: Geometry) -> Result<(), DisplayError> {
    let (found, expected) = ((canvas.width(), canvas.height()), (geometry.width, geometry.height));
    if found == expected { Ok(()) } else { Err(DisplayError::Size { found, expected }) }
}

/// Whether a pixel of two colours is on: at least half as bright as white, by the weights of ITU-R BT.601.
fn is_bright([red, green, blue]: [u8; 3]) -> bool {
    luma(red, green, blue) >= 128
}

fn luma(red: u8, green: u8, blue: u8) -> u8 {
    ((u32::from(red) * 299 + u32::from(green) * 587 + u32::from(blue) * 114 + 500) / 1000) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(uri: &str) -> String {
        match open(uri) {
            Ok(_) => panic!("{uri} opened"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn addresses_that_are_none() {
        let cases = [
            ("hdmi://0", "hdmi://0: no display; there are fb://"),
            ("out.png", "out.png: no display; there are fb://"),
            ("png://a.png?size=0x9", "size=0x9: say width and height"),
            ("png://a.png?size=9", "size=9: say width and height"),
            ("png://a.png?size=8193x9", "size=8193x9: say width and height"),
            ("png://a.png?size=9x8193", "size=9x8193: say width and height"),
            ("PNG://", "no file is named"),
            ("png://a.png?rotate=45", "rotate=45: say 0, 90, 180 or 270"),
            ("png://a.png?rotate=x", "rotate=x: say 0, 90, 180 or 270"),
            ("png://a.png?colour=on", "colour is no option of png://"),
            ("png://a.png?mono", "mono: options are written key=value"),
            ("png://a.png?mono=on&mono=on", "mono is said twice"),
            ("png://", "no file is named"),
        ];
        for (uri, part) in cases {
            let said = fault(uri);
            assert!(said.contains(part) && said.starts_with(uri), "{said}");
        }
    }

    #[cfg(all(feature = "panels", target_os = "linux"))]
    #[test]
    fn devices_that_are_not_there() {
        let cases = [
            ("fb:///nowhere/fb9", "/nowhere/fb9 is not available: No such file"),
            ("fb:///dev/null", "/dev/null is not available: not a framebuffer"),
            ("ssd1306:///nowhere/i2c-9", "/nowhere/i2c-9 is not available: No such file"),
            ("st7789:///nowhere/spidev0.0?dc=25", "/nowhere/spidev0.0 is not available: No such file"),
            ("ili9341:///nowhere/spidev0.0", "say which line is the data/command pin"),
            ("ssd1306:///dev/null", "/dev/null is not available: "),
            ("ssd1306:///dev/i2c-1?size=128x128", "panels have 128x64, 128x32"),
            ("ssd1306:///dev/i2c-1?address=0x100", "address=0x100: say"),
            ("png:///nowhere/out.png", "/nowhere/out.png is not available: there is no folder /nowhere"),
        ];
        for (uri, part) in cases {
            let said = fault(uri);
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn brightness_has_a_middle() {
        assert!(is_bright([128, 128, 128]) && is_bright([0, 255, 0]));
        assert!(!is_bright([127, 127, 127]) && !is_bright([255, 0, 0]) && !is_bright([0, 0, 255]));
    }
}
