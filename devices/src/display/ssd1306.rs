//! SSD1306 panels on I²C: white, yellow or blue pixels that are on or off.

use std::path::{Path, PathBuf};

use embedded_hal::i2c::I2c;
use ssd1306::mode::{BufferedGraphicsMode, DisplayConfig};
use ssd1306::prelude::{
    DisplayRotation, DisplaySize, DisplaySize64x32, DisplaySize64x48, DisplaySize72x40, DisplaySize96x16, DisplaySize128x32,
    DisplaySize128x64, I2CInterface,
};
use ssd1306::{I2CDisplayInterface, Ssd1306};

use super::{Canvas, Colours, Display, DisplayError, Geometry, check_size, is_bright};

/// A panel of a size that the type says.
struct Panel<I2C, SIZE: DisplaySize> {
    path: PathBuf,
    address: u8,
    driver: Ssd1306<I2CInterface<I2C>, SIZE, BufferedGraphicsMode<SIZE>>,
    /// What the panel shows, row by row.
    shown: Vec<bool>,
    /// Whether it does: after a fault nobody knows.
    known: bool,
}

impl<I2C: I2c, SIZE: DisplaySize> Panel<I2C, SIZE> {
    fn new(path: &Path, address: u8, bus: I2C, size: SIZE) -> Result<Self, DisplayError> {
        let interface = I2CDisplayInterface::new_custom_address(bus, address);
        let mut driver = Ssd1306::new(interface, size, DisplayRotation::Rotate0).into_buffered_graphics_mode();
        // What the panel's memory holds after power-up is noise.
        driver.init().and_then(|()| driver.flush()).map_err(|_| {
            let reason = format!("no panel answers at address {address:#04x}; is it connected, and I2C switched on?");
            DisplayError::unavailable(path, reason)
        })?;
        let shown = vec![false; usize::from(SIZE::WIDTH) * usize::from(SIZE::HEIGHT)];
        Ok(Self { path: path.to_path_buf(), address, driver, shown, known: true })
    }
}

impl<I2C: I2c + Send, SIZE: DisplaySize + Send> Display for Panel<I2C, SIZE>
where
    SIZE::Buffer: Send,
{
    fn geometry(&self) -> Geometry {
        Geometry { width: SIZE::WIDTH.into(), height: SIZE::HEIGHT.into(), colours: Colours::Two }
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        check_size(canvas, self.geometry())?;
        let places = (0..canvas.height()).flat_map(|y| (0..canvas.width()).map(move |x| (x, y)));
        // The bus is slow: the driver sends the smallest rectangle with all that it was told, so it is told what has changed.
        for ((colour, (x, y)), shown) in canvas.colours().zip(places).zip(&mut self.shown) {
            let on = is_bright(colour);
            if on != *shown || !self.known {
                self.driver.set_pixel(x, y, on);
                *shown = on;
            }
        }
        self.known = self.driver.flush().is_ok();
        if self.known {
            return Ok(());
        }
        Err(DisplayError::write(&self.path, format!("the panel at address {:#04x} answers no more", self.address)))
    }
}

const SIZES: &str = "panels have 128x64, 128x32, 96x16, 72x40, 64x48 or 64x32 pixels";

fn on_bus<I2C: I2c + Send + 'static>(
    path: &Path,
    address: u8,
    size: (u32, u32),
    bus: I2C,
) -> Result<Box<dyn Display>, DisplayError> {
    Ok(match size {
        (128, 64) => Box::new(Panel::new(path, address, bus, DisplaySize128x64)?),
        (128, 32) => Box::new(Panel::new(path, address, bus, DisplaySize128x32)?),
        (96, 16) => Box::new(Panel::new(path, address, bus, DisplaySize96x16)?),
        (72, 40) => Box::new(Panel::new(path, address, bus, DisplaySize72x40)?),
        (64, 48) => Box::new(Panel::new(path, address, bus, DisplaySize64x48)?),
        (64, 32) => Box::new(Panel::new(path, address, bus, DisplaySize64x32)?),
        _ => return Err(DisplayError::unavailable(path, SIZES)),
    })
}

#[cfg(target_os = "linux")]
pub(super) fn open(address: &mut super::address::Address<'_>) -> Result<Box<dyn Display>, DisplayError> {
    let path = address.path_or("/dev/i2c-1");
    let place = address.number("address", "the panel's address on the bus, 0x3c or 0x3d")?.unwrap_or(0x3C_u8);
    let size = address.size()?.unwrap_or((128, 64));
    address.finish()?;
    if ![(128, 64), (128, 32), (96, 16), (72, 40), (64, 48), (64, 32)].contains(&size) {
        return Err(address.fault(format!("size={}x{}: {SIZES}", size.0, size.1)));
    }
    let bus = linux_embedded_hal::I2cdev::new(&path).map_err(|error| DisplayError::unavailable(&path, error))?;
    on_bus(&path, place, size, bus)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use embedded_hal::i2c::{ErrorKind, ErrorType, NoAcknowledgeSource, Operation};

    use super::super::canvas::art;
    use super::*;

    /// The controller as its data sheet describes it: commands and memory behind an I²C address.
    struct Controller {
        memory: [[u8; 128]; 8],
        /// Arguments still to come, and the command they belong to.
        command: Vec<u8>,
        columns: (u8, u8),
        pages: (u8, u8),
        at: (u8, u8),
        horizontal: bool,
        on: bool,
        multiplex: u8,
        written: usize,
        answers: bool,
    }

    #[derive(Clone)]
    struct Bus(Arc<Mutex<Controller>>);

    impl Bus {
        fn new() -> Self {
            Self(Arc::new(Mutex::new(Controller {
                memory: [[0x5A; 128]; 8],
                command: Vec::new(),
                columns: (0, 127),
                pages: (0, 7),
                at: (0, 0),
                horizontal: false,
                on: false,
                multiplex: 63,
                written: 0,
                answers: true,
            })))
        }

        /// Pixels from a column of the memory on, as [`art`] shows them.
        fn art(&self, first: usize, width: usize, height: usize) -> String {
            let controller = self.0.lock().unwrap();
            let dot = |x: usize, y: usize| if controller.memory[y / 8][first + x] >> (y % 8) & 1 == 1 { '#' } else { '.' };
            (0..height).map(|y| (0..width).map(|x| dot(x, y)).chain(['\n']).collect::<String>()).collect()
        }

        fn written(&self) -> usize {
            std::mem::take(&mut self.0.lock().unwrap().written)
        }
    }

    impl Controller {
        fn command(&mut self, byte: u8) {
            self.command.push(byte);
            let length = match self.command[0] {
                0x20 | 0x81 | 0x8D | 0xA8 | 0xAD | 0xD3 | 0xD5 | 0xD9 | 0xDA | 0xDB => 2,
                0x21 | 0x22 => 3,
                _ => 1,
            };
            if self.command.len() < length {
                return;
            }
            match *self.command {
                [0x20, mode] => self.horizontal = mode == 0,
                [0x21, from, to] => (self.columns, self.at.0) = ((from, to), from),
                [0x22, from, to] => (self.pages, self.at.1) = ((from, to), from),
                [0xA8, ratio] => self.multiplex = ratio,
                [0xAE] => self.on = false,
                [0xAF] => self.on = true,
                _ => {}
            }
            self.command.clear();
        }

        fn data(&mut self, byte: u8) {
            assert!(self.horizontal, "data in another addressing mode than the driver set");
            self.memory[usize::from(self.at.1)][usize::from(self.at.0)] = byte;
            self.written += 1;
            if self.at.0 < self.columns.1 {
                self.at.0 += 1;
                return;
            }
            self.at.0 = self.columns.0;
            self.at.1 = if self.at.1 < self.pages.1 { self.at.1 + 1 } else { self.pages.0 };
        }
    }

    impl ErrorType for Bus {
        type Error = ErrorKind;
    }

    impl I2c for Bus {
        fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), ErrorKind> {
            let mut controller = self.0.lock().unwrap();
            if address != 0x3D || !controller.answers {
                return Err(ErrorKind::NoAcknowledge(NoAcknowledgeSource::Address));
            }
            for operation in operations {
                match operation {
                    Operation::Write([0x00, commands @ ..]) => commands.iter().for_each(|&byte| controller.command(byte)),
                    Operation::Write([0x40, data @ ..]) => data.iter().for_each(|&byte| controller.data(byte)),
                    other => panic!("{other:?}"),
                }
            }
            Ok(())
        }
    }

    /// Dots that differ by row, column and `seed`.
    fn dots(width: u32, height: u32, seed: u32) -> Canvas {
        let mut canvas = Canvas::new(width, height);
        for y in 0..height {
            for (x, colour) in (0..).zip(canvas.row_mut(y)) {
                let hash = (x * 31 + y * 17 + seed).wrapping_mul(0x9E37_79B9) >> 24;
                *colour = [hash as u8; 3];
            }
        }
        canvas
    }

    #[test]
    fn every_size_shows_the_canvas() {
        // Where the glass of each size begins in the controller's 128 columns.
        for (size, first) in [((128, 64), 0), ((128, 32), 0), ((96, 16), 0), ((72, 40), 28), ((64, 48), 32), ((64, 32), 32)] {
            let bus = Bus::new();
            let mut display = on_bus(Path::new("/dev/i2c-1"), 0x3D, size, bus.clone()).unwrap();
            let (width, height) = (size.0 as usize, size.1 as usize);
            {
                let controller = bus.0.lock().unwrap();
                assert!(controller.on && usize::from(controller.multiplex) == height - 1, "{size:?}");
            }
            assert!(!bus.art(first, width, height).contains('#'), "{size:?}: the noise of power-up stays");
            for seed in [1, 2] {
                let canvas = dots(size.0, size.1, seed);
                display.present(&canvas).unwrap();
                assert_eq!(bus.art(first, width, height), art(&canvas), "{size:?}");
            }
        }
    }

    #[test]
    fn only_what_has_changed_is_sent() {
        let bus = Bus::new();
        let mut display = on_bus(Path::new("/dev/i2c-1"), 0x3D, (128, 64), bus.clone()).unwrap();
        assert_eq!(bus.written(), 1024);
        let mut canvas = dots(128, 64, 5);
        display.present(&canvas).unwrap();
        bus.written();
        display.present(&canvas).unwrap();
        assert_eq!(bus.written(), 0);
        // A pixel and another one three columns and a page away: two pages of four columns.
        for (x, y) in [(40, 9), (43, 17)] {
            let colour = &mut canvas.row_mut(y)[x];
            *colour = if is_bright(*colour) { [0; 3] } else { [255; 3] };
        }
        display.present(&canvas).unwrap();
        assert_eq!((bus.written(), bus.art(0, 128, 64)), (8, art(&canvas)));
    }

    #[test]
    fn a_panel_that_does_not_answer() {
        let bus = Bus::new();
        let said = on_bus(Path::new("/dev/i2c-1"), 0x3C, (128, 64), bus.clone()).err().unwrap().to_string();
        assert!(said.contains("/dev/i2c-1 is not available: no panel answers at address 0x3c"), "{said}");
        let mut display = on_bus(Path::new("/dev/i2c-1"), 0x3D, (128, 64), bus.clone()).unwrap();
        bus.0.lock().unwrap().answers = false;
        let said = display.present(&dots(128, 64, 3)).unwrap_err().to_string();
        assert!(said.contains("the panel at address 0x3d answers no more"), "{said}");
        // All is sent once it answers again, though nothing has changed since the last try.
        bus.0.lock().unwrap().answers = true;
        display.present(&dots(128, 64, 3)).unwrap();
        assert_eq!(bus.art(0, 128, 64), art(&dots(128, 64, 3)));
    }
}
