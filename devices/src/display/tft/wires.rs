//! What goes to a panel's controller, over an SPI bus and the pin that tells commands from data.

use embedded_hal::digital::OutputPin;
use embedded_hal::spi::SpiDevice;
use mipidsi::interface::{Interface, InterfaceKind};

/// Bytes sent in one go: what the kernel's SPI driver takes by default.
pub(super) const CHUNK: usize = 4096;

/// An SPI bus and the pin that tells commands from data.
pub(super) struct Wires<SPI, DC> {
    spi: SPI,
    dc: DC,
    chunk: Vec<u8>,
}

/// Which of the wires failed, and what it said.
#[derive(Debug)]
pub(super) enum WireError {
    Spi(String),
    Pin(String),
}

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spi(reason) => write!(f, "the SPI bus fails: {reason}"),
            Self::Pin(reason) => write!(f, "the data/command pin fails: {reason}"),
        }
    }
}

impl<SPI: SpiDevice, DC: OutputPin> Wires<SPI, DC> {
    pub(super) fn new(spi: SPI, dc: DC) -> Self {
        Self { spi, dc, chunk: Vec::with_capacity(CHUNK) }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.spi.write(bytes).map_err(|error| WireError::Spi(format!("{error:?}")))
    }

    fn send_chunk(&mut self) -> Result<(), WireError> {
        let result = self.spi.write(&self.chunk).map_err(|error| WireError::Spi(format!("{error:?}")));
        self.chunk.clear();
        result
    }
}

impl<SPI: SpiDevice, DC: OutputPin> Interface for Wires<SPI, DC> {
    type Word = u8;
    type Error = WireError;
    const KIND: InterfaceKind = InterfaceKind::Serial4Line;

    fn send_command(&mut self, command: u8, arguments: &[u8]) -> Result<(), WireError> {
        let pin = |error: DC::Error| WireError::Pin(format!("{error:?}"));
        self.dc.set_low().map_err(pin)?;
        self.write(&[command])?;
        self.dc.set_high().map_err(pin)?;
        if arguments.is_empty() { Ok(()) } else { self.write(arguments) }
    }

    fn send_pixels<const N: usize>(&mut self, pixels: impl IntoIterator<Item = [u8; N]>) -> Result<(), WireError> {
        for pixel in pixels {
            if self.chunk.len() + N > CHUNK {
                self.send_chunk()?;
            }
            self.chunk.extend(pixel);
        }
        self.send_chunk()
    }

    fn send_repeated_pixel<const N: usize>(&mut self, pixel: [u8; N], count: u32) -> Result<(), WireError> {
        self.send_pixels(std::iter::repeat_n(pixel, count as usize))
    }
}
