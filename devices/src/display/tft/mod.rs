//! Colour panels on SPI with a controller of the MIPI command set: ST7789 and ILI9341.

#[cfg(target_os = "linux")]
mod linux;
mod wires;

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use embedded_graphics::pixelcolor::Rgb565;
use embedded_hal::delay::DelayNs;
use embedded_hal::digital::OutputPin;
use embedded_hal::spi::SpiDevice;
use mipidsi::interface::InterfacePixelFormat;
use mipidsi::models::{ILI9341Rgb565, Model, ST7789};
use mipidsi::options::{ColorInversion, ColorOrder};
use mipidsi::{Builder, ConfigurationError, InitError};

#[cfg(target_os = "linux")]
pub(super) use self::linux::open;
use self::wires::{WireError, Wires};
use super::{Canvas, Colours, Display, DisplayError, Geometry, check_size};

/// The controllers that panels have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    /// Sitronix ST7789.
    St7789,
    /// Ilitek ILI9341.
    Ili9341,
}

/// How a panel is built.
#[derive(Debug, Clone, Copy)]
struct Setup {
    controller: Controller,
    size: (u16, u16),
    offset: (u16, u16),
    inverted: bool,
    bgr: bool,
}

impl Setup {
    /// What most modules with a controller need: those with an ST7789 have glass that shows colours inverted.
    fn usual(controller: Controller) -> Self {
        let (inverted, bgr) = match controller {
            Controller::St7789 => (true, false),
            Controller::Ili9341 => (false, true),
        };
        Self { controller, size: (240, 320), offset: (0, 0), inverted, bgr }
    }
}

/// A panel, and what it shows.
struct Panel<SPI: SpiDevice, DC: OutputPin, RST: OutputPin, M: Model>
where
    M::ColorFormat: InterfacePixelFormat<u8>,
{
    path: PathBuf,
    driver: mipidsi::Display<Wires<SPI, DC>, M, RST>,
    size: (u16, u16),
    /// Colours of the pixels as they were sent; none where the panel's memory is not known.
    shown: Vec<[u8; 3]>,
}

impl<SPI, DC, RST, M> Display for Panel<SPI, DC, RST, M>
where
    SPI: SpiDevice + Send,
    DC: OutputPin + Send,
    RST: OutputPin + Send,
    M: Model<ColorFormat = Rgb565> + Send,
{
    fn geometry(&self) -> Geometry {
        Geometry { width: self.size.0.into(), height: self.size.1.into(), colours: Colours::Many }
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        check_size(canvas, self.geometry())?;
        let Some((left, top, right, bottom)) = self.changed(canvas) else { return Ok(()) };
        let colours = (top..=bottom)
            .flat_map(|y| &canvas.row(y.into())[usize::from(left)..=usize::from(right)])
            .map(|&[red, green, blue]| Rgb565::new(red >> 3, green >> 2, blue >> 3));
        // If this fails, nobody knows what was shown.
        self.shown.clear();
        self.driver.set_pixels(left, top, right, bottom, colours).map_err(|error| DisplayError::write(&self.path, error))?;
        self.shown.extend(canvas.colours());
        Ok(())
    }
}

impl<SPI, DC, RST, M> Panel<SPI, DC, RST, M>
where
    SPI: SpiDevice,
    DC: OutputPin,
    RST: OutputPin,
    M: Model<ColorFormat = Rgb565>,
{
    /// The smallest rectangle with all pixels that are not shown yet: left, top, right and bottom, inclusive.
    fn changed(&self, canvas: &Canvas) -> Option<(u16, u16, u16, u16)> {
        let (width, height) = self.size;
        if self.shown.is_empty() {
            return Some((0, 0, width - 1, height - 1));
        }
        let rows = self.shown.chunks(usize::from(width));
        let (mut left, mut right, mut top, mut bottom) = (width, 0, height, 0);
        for (y, shown) in (0..height).zip(rows) {
            let row = canvas.row(y.into());
            let mut differing = (0..width).filter(|&x| shown[usize::from(x)] != row[usize::from(x)]);
            let Some(first) = differing.next() else { continue };
            let last = differing.next_back().unwrap_or(first);
            (left, right) = (left.min(first), right.max(last));
            (top, bottom) = (top.min(y), y);
        }
        (left <= right).then_some((left, top, right, bottom))
    }
}

/// Sets a panel up.
fn on_wires<SPI, DC, RST>(
    path: &Path,
    setup: Setup,
    wires: (SPI, DC),
    reset: Option<RST>,
    delay: &mut impl DelayNs,
) -> Result<Box<dyn Display>, DisplayError>
where
    SPI: SpiDevice + Send + 'static,
    DC: OutputPin + Send + 'static,
    RST: OutputPin + Send + 'static,
{
    match setup.controller {
        Controller::St7789 => with_model(path, ST7789, setup, wires, reset, delay),
        Controller::Ili9341 => with_model(path, ILI9341Rgb565, setup, wires, reset, delay),
    }
}

fn with_model<SPI, DC, RST, M>(
    path: &Path,
    model: M,
    setup: Setup,
    (spi, dc): (SPI, DC),
    reset: Option<RST>,
    delay: &mut impl DelayNs,
) -> Result<Box<dyn Display>, DisplayError>
where
    SPI: SpiDevice + Send + 'static,
    DC: OutputPin + Send + 'static,
    RST: OutputPin + Send + 'static,
    M: Model<ColorFormat = Rgb565> + Send + 'static,
{
    let builder = Builder::new(model, Wires::new(spi, dc))
        .display_size(setup.size.0, setup.size.1)
        .display_offset(setup.offset.0, setup.offset.1)
        .invert_colors(if setup.inverted { ColorInversion::Inverted } else { ColorInversion::Normal })
        .color_order(if setup.bgr { ColorOrder::Bgr } else { ColorOrder::Rgb });
    let (path, size) = (path.to_path_buf(), setup.size);
    // With a reset pin the driver pulls it, without one it sends the command.
    Ok(match reset {
        Some(pin) => {
            let driver = builder.reset_pin(pin).init(delay).map_err(|error| refused(&path, error))?;
            Box::new(Panel { path, driver, size, shown: Vec::new() })
        }
        None => {
            let driver = builder.init(delay).map_err(|error| refused(&path, error))?;
            Box::new(Panel { path, driver, size, shown: Vec::new() })
        }
    })
}

fn refused<P: Debug>(path: &Path, error: InitError<WireError, P>) -> DisplayError {
    let reason = match error {
        InitError::Interface(error) => error.to_string(),
        InitError::ResetPin(error) => format!("the reset pin fails: {error:?}"),
        InitError::InvalidConfiguration(ConfigurationError::InvalidDisplayOffset | ConfigurationError::InvalidDisplaySize) => {
            "size and offset lie outside the controller's memory of 240x320 pixels".to_owned()
        }
        InitError::InvalidConfiguration(other) => format!("{other:?}"),
    };
    DisplayError::unavailable(path, reason)
}

#[cfg(test)]
mod tests;
