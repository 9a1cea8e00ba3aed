//! Colour panels on SPI with a controller of the MIPI command set: ST7789 and ILI9341.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use embedded_graphics::pixelcolor::Rgb565;
use embedded_hal::delay::DelayNs;
use embedded_hal::digital::OutputPin;
use embedded_hal::spi::SpiDevice;
use mipidsi::interface::{Interface, InterfaceKind, InterfacePixelFormat};
use mipidsi::models::{ILI9341Rgb565, Model, ST7789};
use mipidsi::options::{ColorInversion, ColorOrder};
use mipidsi::{Builder, ConfigurationError, InitError};

use super::{Canvas, Colours, Display, DisplayError, Geometry, check_size};

/// Bytes sent in one go: what the kernel's SPI driver takes by default.
const CHUNK: usize = 4096;

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

/// An SPI bus and the pin that tells commands from data.
struct Wires<SPI, DC> {
    spi: SPI,
    dc: DC,
    chunk: Vec<u8>,
}

/// Which of the wires failed, and what it said.
#[derive(Debug)]
enum WireError {
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
    fn new(spi: SPI, dc: DC) -> Self {
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

#[cfg(target_os = "linux")]
pub(super) use self::linux::open;

#[cfg(target_os = "linux")]
mod linux {
    use linux_embedded_hal::gpio_cdev::{Chip, LineRequestFlags};
    use linux_embedded_hal::spidev::{SpiModeFlags, SpidevOptions};
    use linux_embedded_hal::{CdevPin, Delay, SpidevDevice};

    use super::super::address::{Address, pair};
    use super::*;

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
        let [dc, reset, backlight] =
            ["dc", "reset", "backlight"].map(|pin| address.number::<u32>(pin, "a line of the GPIO chip"));
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
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use embedded_hal::spi::{ErrorKind, Operation};

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
                assert_eq!(
                    (has(&glass, 0x01, &[]), glass.resets.as_slice()),
                    (!reset, if reset { &[false, true] } else { &[][..] })
                );
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
        let mut glass = glass.lock().unwrap();
        glass.finish();
        assert_eq!((glass.columns, glass.rows), ((200, 210), (10, 300)));
        for y in 0..320 {
            for x in 0..240 {
                assert_eq!(glass.memory[y][x], rgb565(canvas.row(y as u32)[x]), "({x}, {y})");
            }
        }
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

        let (_, display) = panel(Setup { size: (240, 240), offset: (0, 81), ..Setup::usual(Controller::St7789) }, false);
        let said = display.err().unwrap().to_string();
        assert!(said.contains("outside the controller's memory"), "{said}");
    }
}
