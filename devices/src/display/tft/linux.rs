//! Panels on a Linux board's SPI bus and GPIO lines.

use std::path::{Path, PathBuf};

use linux_embedded_hal::gpio_cdev::{Chip, LineRequestFlags};
use linux_embedded_hal::spidev::{SpiModeFlags, SpidevOptions};
use linux_embedded_hal::{CdevPin, Delay, SpidevDevice};

use super::super::address::{Address, pair};
use super::super::{Canvas, Display, DisplayError, Geometry};
use super::{Controller, Setup, on_wires};

pub(in super::super) fn open(address: &mut Address<'_>, controller: Controller) -> Result<Box<dyn Display>, DisplayError> {
    let path = address.path_or("/dev/spidev0.0");
    let mut setup = Setup::usual(controller);
    if let Some((width, height)) = address.size()? {
        // At most 8192 each.
        setup.size = (width as u16, height as u16);
    }
    let offset = address.option("offset", "columns and rows, as in 52,40", |text| {
        let (x, y) = pair(text, ',')?;
        Some((u16::try_from(x).ok()?, u16::try_from(y).ok()?))
    })?;
    setup.offset = offset.unwrap_or(setup.offset);
    setup.inverted = address.switch("invert")?.unwrap_or(setup.inverted);
    let order = |text: &str| ["rgb", "bgr"].iter().position(|known| *known == text).map(|at| at == 1);
    setup.bgr = address.option("order", "rgb or bgr", order)?.unwrap_or(setup.bgr);
    let speed = address.number("speed", "the clock in hertz, as in 32000000")?.unwrap_or(32_000_000);
    let mode = match address.number::<u8>("mode", "0, 1, 2 or 3")?.unwrap_or(0) {
        0 => SpiModeFlags::SPI_MODE_0,
        1 => SpiModeFlags::SPI_MODE_1,
        2 => SpiModeFlags::SPI_MODE_2,
        3 => SpiModeFlags::SPI_MODE_3,
        other => return Err(address.fault(format!("mode={other}: say 0, 1, 2 or 3"))),
    };
    let chip = address.option("chip", "a GPIO chip", |text| Some(PathBuf::from(text)))?;
    let chip = chip.unwrap_or_else(|| "/dev/gpiochip0".into());
    let [dc, reset, backlight] = ["dc", "reset", "backlight"].map(|pin| address.number::<u32>(pin, "a line of the GPIO chip"));
    let (dc, reset, backlight) = (dc?, reset?, backlight?);
    address.finish()?;
    let dc = dc.ok_or_else(|| address.fault("say which line is the data/command pin, as in dc=25".to_owned()))?;

    let unavailable = |error: std::io::Error| DisplayError::unavailable(&path, error);
    let mut spi = SpidevDevice::open(&path).map_err(|error| DisplayError::unavailable(&path, error))?;
    let options = SpidevOptions::new().bits_per_word(8).max_speed_hz(speed).mode(mode).build();
    spi.configure(&options).map_err(unavailable)?;
    let dc = output(&chip, dc, 0)?;
    let reset = reset.map(|line| output(&chip, line, 1)).transpose()?;
    let display = on_wires(&path, setup, (spi, dc), reset, &mut Delay)?;
    Ok(match backlight.map(|line| output(&chip, line, 1)).transpose()? {
        Some(light) => Box::new(Lit { display, _light: light }),
        None => display,
    })
}

fn output(chip: &Path, line: u32, value: u8) -> Result<CdevPin, DisplayError> {
    let request = || CdevPin::new(Chip::new(chip)?.get_line(line)?.request(LineRequestFlags::OUTPUT, value, "unimo")?);
    request().map_err(|error| DisplayError::unavailable(chip, format!("line {line}: {error}")))
}

/// A panel whose backlight shines as long as it is open: the kernel takes the pin back when it is closed.
struct Lit {
    display: Box<dyn Display>,
    _light: CdevPin,
}

impl Display for Lit {
    fn geometry(&self) -> Geometry {
        self.display.geometry()
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        self.display.present(canvas)
    }
}
