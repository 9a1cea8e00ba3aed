//! Panels on a controller that does what its data sheet says.

use std::sync::{Arc, Mutex};

use embedded_hal::spi::{ErrorKind, Operation};

use super::wires::CHUNK;
use super::*;

/// The controller as its data sheet describes it, behind its wires.
#[derive(Default)]
struct Glass {
    data: bool,
    command: u8,
    arguments: Vec<u8>,
    columns: (u16, u16),
    rows: (u16, u16),
    memory: Vec<Vec<u16>>,
    /// Bytes of pixels in the last memory write.
    pixels: Vec<u8>,
    commands: Vec<(u8, Vec<u8>)>,
    writes: Vec<usize>,
    resets: Vec<bool>,
    broken: bool,
}

impl Glass {
    fn byte(&mut self, byte: u8) {
        if !self.data {
            self.finish();
            (self.command, self.arguments) = (byte, Vec::new());
        } else if self.command == 0x2C {
            self.pixels.push(byte);
        } else {
            self.arguments.push(byte);
        }
    }

    /// The last command is whole when the next one begins.
    fn finish(&mut self) {
        let pair = |bytes: &[u8]| (u16::from_be_bytes([bytes[0], bytes[1]]), u16::from_be_bytes([bytes[2], bytes[3]]));
        match self.command {
            0x2A => self.columns = pair(&self.arguments),
            0x2B => self.rows = pair(&self.arguments),
            0x2C => {
                let (left, top) = (usize::from(self.columns.0), usize::from(self.rows.0));
                let width = usize::from(self.columns.1) - left + 1;
                assert_eq!(self.pixels.len(), width * (usize::from(self.rows.1) - top + 1) * 2);
                for (i, pixel) in std::mem::take(&mut self.pixels).as_chunks::<2>().0.iter().enumerate() {
                    self.memory[top + i / width][left + i % width] = u16::from_be_bytes(*pixel);
                }
            }
            _ => {}
        }
        self.commands.push((self.command, std::mem::take(&mut self.arguments)));
        self.command = 0;
    }
}

#[derive(Clone)]
struct Spi(Arc<Mutex<Glass>>);

impl embedded_hal::spi::ErrorType for Spi {
    type Error = ErrorKind;
}

impl SpiDevice for Spi {
    fn transaction(&mut self, operations: &mut [Operation<'_, u8>]) -> Result<(), ErrorKind> {
        let mut glass = self.0.lock().unwrap();
        if glass.broken {
            return Err(ErrorKind::Other);
        }
        for operation in operations {
            let Operation::Write(bytes) = operation else { panic!("{operation:?}") };
            glass.writes.push(bytes.len());
            bytes.iter().for_each(|&byte| glass.byte(byte));
        }
        Ok(())
    }
}

struct Pin(Arc<Mutex<Glass>>, &'static str);

impl embedded_hal::digital::ErrorType for Pin {
    type Error = std::convert::Infallible;
}

impl OutputPin for Pin {
    fn set_low(&mut self) -> Result<(), Self::Error> {
        self.set(false)
    }

    fn set_high(&mut self) -> Result<(), Self::Error> {
        self.set(true)
    }
}

impl Pin {
    fn set(&mut self, high: bool) -> Result<(), std::convert::Infallible> {
        let mut glass = self.0.lock().unwrap();
        match self.1 {
            "dc" => glass.data = high,
            _ => glass.resets.push(high),
        }
        Ok(())
    }
}

struct NoDelay;

impl DelayNs for NoDelay {
    fn delay_ns(&mut self, _: u32) {}
}

type Opened = Result<Box<dyn Display>, DisplayError>;

fn panel(setup: Setup, reset: bool) -> (Arc<Mutex<Glass>>, Opened) {
    let glass = Arc::new(Mutex::new(Glass { memory: vec![vec![0xDEAD; 240]; 320], ..Glass::default() }));
    let wires = (Spi(glass.clone()), Pin(glass.clone(), "dc"));
    let reset = reset.then(|| Pin(glass.clone(), "reset"));
    let display = on_wires(Path::new("/dev/spidev0.0"), setup, wires, reset, &mut NoDelay);
    (glass, display)
}

fn picture(width: u32, height: u32) -> Canvas {
    let mut canvas = Canvas::new(width, height);
    for y in 0..height {
        for (x, colour) in (0..).zip(canvas.row_mut(y)) {
            *colour = [x as u8, y as u8, (x + y) as u8];
        }
    }
    canvas
}

fn rgb565([red, green, blue]: [u8; 3]) -> u16 {
    (u16::from(red) >> 3) << 11 | (u16::from(green) >> 2) << 5 | u16::from(blue) >> 3
}

fn has(glass: &Glass, command: u8, arguments: &[u8]) -> bool {
    glass.commands.iter().any(|(known, with)| *known == command && with == arguments)
}

#[test]
fn controllers_are_set_up() {
    // Sleep out, 16 bits a pixel and display on; the ST7789 inverted with red first, the ILI9341 not and with blue first.
    let cases = [(Controller::St7789, 0x21, 0x00), (Controller::Ili9341, 0x20, 0x08)];
    for (controller, inversion, order) in cases {
        for reset in [true, false] {
            let (glass, display) = panel(Setup::usual(controller), reset);
            let geometry = display.unwrap().geometry();
            assert_eq!(geometry, Geometry { width: 240, height: 320, colours: Colours::Many });
            let mut glass = glass.lock().unwrap();
            glass.finish();
            assert!(has(&glass, 0x11, &[]) && has(&glass, 0x29, &[]) && has(&glass, 0x3A, &[0x55]), "{controller:?}");
            assert!(has(&glass, inversion, &[]) && has(&glass, 0x36, &[order]), "{controller:?}: {:x?}", glass.commands);
            // A reset pin goes low and high; without one the command is sent.
            assert_eq!((has(&glass, 0x01, &[]), glass.resets.as_slice()), (!reset, if reset { &[false, true] } else { &[][..] }));
        }
    }
}

#[test]
fn the_canvas_lies_where_the_glass_is() {
    let setup = Setup { size: (135, 240), offset: (52, 40), ..Setup::usual(Controller::St7789) };
    let (glass, display) = panel(setup, true);
    let canvas = picture(135, 240);
    display.unwrap().present(&canvas).unwrap();
    let mut glass = glass.lock().unwrap();
    glass.finish();
    for (y, row) in (0..).zip(&glass.memory) {
        for (x, &pixel) in (0..).zip(row) {
            let inside = (52..52 + 135).contains(&x) && (40..40 + 240).contains(&y);
            let expected = if inside { rgb565(canvas.row(y - 40)[x as usize - 52]) } else { 0xDEAD };
            assert_eq!(pixel, expected, "({x}, {y})");
        }
    }
    assert!(glass.writes.iter().all(|&bytes| (1..=CHUNK).contains(&bytes)), "the kernel takes no longer writes");
}

#[test]
fn only_what_has_changed_is_sent() {
    let (glass, display) = panel(Setup::usual(Controller::Ili9341), false);
    let mut display = display.unwrap();
    let mut canvas = picture(240, 320);
    display.present(&canvas).unwrap();
    glass.lock().unwrap().writes.clear();
    display.present(&canvas).unwrap();
    assert!(glass.lock().unwrap().writes.is_empty());

    for (x, y) in [(200, 10), (210, 12), (205, 300)] {
        canvas.row_mut(y)[x] = [255, 255, 255];
    }
    display.present(&canvas).unwrap();
    let shared = glass;
    let mut glass = shared.lock().unwrap();
    glass.finish();
    assert_eq!((glass.columns, glass.rows), ((200, 210), (10, 300)));
    for y in 0..320 {
        for x in 0..240 {
            assert_eq!(glass.memory[y][x], rgb565(canvas.row(y as u32)[x]), "({x}, {y})");
        }
    }
    // That is what is shown now.
    glass.writes.clear();
    drop(glass);
    display.present(&canvas).unwrap();
    assert!(shared.lock().unwrap().writes.is_empty());
}

#[test]
fn faults_are_told_and_recovered_from() {
    let (glass, display) = panel(Setup::usual(Controller::St7789), false);
    let (mut display, canvas) = (display.unwrap(), picture(240, 320));
    display.present(&canvas).unwrap();
    let other = Canvas::new(240, 320);
    glass.lock().unwrap().broken = true;
    let said = display.present(&other).unwrap_err().to_string();
    assert!(said.contains("/dev/spidev0.0: the SPI bus fails"), "{said}");
    // All of the picture is sent again, though only some of it may be missing.
    glass.lock().unwrap().broken = false;
    display.present(&other).unwrap();
    glass.lock().unwrap().finish();
    assert!(glass.lock().unwrap().memory.iter().flatten().all(|&pixel| pixel == 0));
    // So is the picture that was shown before the fault.
    glass.lock().unwrap().broken = true;
    assert!(display.present(&canvas).is_err());
    glass.lock().unwrap().broken = false;
    glass.lock().unwrap().rows = (7, 7);
    display.present(&other).unwrap();
    glass.lock().unwrap().finish();
    assert_eq!(glass.lock().unwrap().rows, (0, 319));

    let (_, display) = panel(Setup { size: (240, 240), offset: (0, 81), ..Setup::usual(Controller::St7789) }, false);
    let said = display.err().unwrap().to_string();
    assert!(said.contains("outside the controller's memory"), "{said}");
}
