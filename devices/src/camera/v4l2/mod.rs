//! V4L2 cameras: `v4l2:///dev/video0?size=640x480&fps=15&format=mjpeg`.
//!
//! Single-planar video capture with memory-mapped buffers, in MJPEG, YUYV or NV12: what USB cameras give. The camera modules of
//! a Raspberry Pi and a Jetson give raw sensor data here; they are read by `rpicam://` and `csi://`.

#[cfg(target_os = "linux")]
mod kernel;
mod negotiate;

use std::io;
use std::time::{Duration, SystemTime};

use self::negotiate::{FourCc, Sizes, choose};
use super::recovery::{Connect, Connected, Link, Received, Recovering, Shot};
use super::uri::CameraUri;
use super::yuv::{self, Layout, Matrix, Range, YuvEncoding};
use super::{Camera, CameraError, CameraOptions, DEFAULT_SIZE, Fault, FrameData, SETTLING, jpeg};

/// What a device says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Capability {
    driver: String,
    card: String,
    /// Video capture, one plane a picture.
    captures: bool,
    /// Video capture, several planes a picture.
    captures_planes: bool,
    streams: bool,
}

/// A picture format as the driver has set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    fourcc: FourCc,
    width: u32,
    height: u32,
    /// Bytes from one row to the next; 0 where the format has no rows.
    stride: u32,
    encoding: YuvEncoding,
}

/// A picture in the driver's memory.
#[derive(Debug, Clone, Copy)]
struct Filled<'a> {
    bytes: &'a [u8],
    sequence: u32,
    captured: SystemTime,
    /// Whether the driver marks it as damaged.
    damaged: bool,
}

/// What waiting for a device gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readiness {
    Ready,
    Nothing,
    /// The device is in error: it was unplugged, or its queue is broken.
    Failed,
}

/// What is asked of a video device: the system calls, so that everything above them is tested without one.
trait VideoDevice: Send {
    fn capability(&mut self) -> io::Result<Capability>;
    /// Its pixel formats.
    fn formats(&mut self) -> io::Result<Vec<FourCc>>;
    /// The sizes of a pixel format; none where the driver does not list them.
    fn sizes(&mut self, fourcc: FourCc) -> io::Result<Vec<Sizes>>;
    /// Sets a format, and gives what the driver made of it.
    fn set_format(&mut self, fourcc: FourCc, width: u32, height: u32) -> io::Result<Format>;
    /// Sets the rate in pictures a second, and gives what the driver made of it; `None` where it has no rate to set.
    fn set_rate(&mut self, fps: f32) -> io::Result<Option<f32>>;
    /// Hands buffers to the driver and begins to stream.
    fn start(&mut self) -> io::Result<()>;
    fn wait(&mut self, wait: Duration) -> io::Result<Readiness>;
    /// Takes a filled buffer, lends it, and gives it back to the driver.
    fn take(&mut self, lend: &mut dyn FnMut(Filled<'_>)) -> io::Result<()>;
}

/// Opens a V4L2 camera.
pub(super) fn open(mut uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let options = uri.wishes(options)?;
    let format = match uri.take("format").as_deref() {
        None => None,
        Some("mjpeg") => Some(FourCc::MJPEG),
        Some("yuyv") => Some(FourCc::YUYV),
        Some("nv12") => Some(FourCc::NV12),
        Some(other) => return Err(uri.bad(format!("format={other}: must be mjpeg, yuyv or nv12"))),
    };
    uri.finish()?;
    if !uri.place().starts_with('/') {
        return Err(uri.bad("a device is named by its whole path, as in v4l2:///dev/video0"));
    }
    let path = uri.place().to_owned();
    let wishes = Wishes { format, size: options.size, fps: options.fps };
    Ok(Box::new(Recovering::open(uri.name(), Video { open: move || open_device(&path), wishes }, &options)?))
}

#[cfg(target_os = "linux")]
fn open_device(path: &str) -> io::Result<Box<dyn VideoDevice>> {
    Ok(Box::new(kernel::Device::open(path)?))
}

#[cfg(not(target_os = "linux"))]
fn open_device(_: &str) -> io::Result<Box<dyn VideoDevice>> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "V4L2 is a part of Linux"))
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default)]
struct Wishes {
    format: Option<FourCc>,
    size: Option<(u32, u32)>,
    fps: Option<f32>,
}

struct Video<O> {
    open: O,
    wishes: Wishes,
}

impl<O: FnMut() -> io::Result<Box<dyn VideoDevice>> + Send> Connect for Video<O> {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let mut device = (self.open)().map_err(opening)?;
        let Started { format, what, adjusted } = start(&mut *device, &self.wishes)?;
        Ok(Connected { link: Box::new(Streaming { device, format }), what, adjusted })
    }

    fn settling(&self) -> Duration {
        SETTLING
    }
}

/// How a device was started.
struct Started {
    format: Format,
    /// In words.
    what: String,
    /// Wishes that were not met; see [`Connected`].
    adjusted: Vec<(String, String)>,
}

/// Sets a device up and starts it.
fn start(device: &mut dyn VideoDevice, wishes: &Wishes) -> Result<Started, Fault> {
    let capability = device.capability().map_err(|error| match error.raw_os_error() {
        // ENOTTY: a file or a device of another kind.
        Some(25) => Fault::Unsupported("it is no video device".to_owned()),
        _ => opening(error),
    })?;
    if !(capability.captures && capability.streams) {
        let reason = if capability.captures_planes {
            "gives its pictures in planes, which only codecs and camera modules do; try rpicam:// or csi://"
        } else {
            "is no camera: a device may have several nodes, of which one gives pictures"
        };
        return Err(Fault::Unsupported(format!("{} ({}) {reason}", capability.card, capability.driver)));
    }
    let mut offered = Vec::new();
    for fourcc in device.formats().map_err(opening)? {
        let sizes = device.sizes(fourcc).map_err(opening)?;
        offered.push((fourcc, sizes));
    }
    let size = wishes.size.unwrap_or(DEFAULT_SIZE);
    let Some((fourcc, (width, height))) = choose(&offered, wishes.format, size) else {
        let names: Vec<String> = offered.iter().map(|(fourcc, _)| fourcc.to_string()).collect();
        return Err(Fault::Unsupported(format!(
            "{} ({}) gives {}, and {} is needed",
            capability.card,
            capability.driver,
            if names.is_empty() { "no format".to_owned() } else { names.join(", ") },
            wishes.format.map_or("MJPG, YUYV or NV12".to_owned(), |format| format.to_string()),
        )));
    };
    let format = device.set_format(fourcc, width, height).map_err(opening)?;
    // A driver may answer with another format than it was asked for.
    let usable = format.fourcc.is_jpeg() || (format.width % 2 == 0 && format.height % 2 == 0);
    if !format.fourcc.is_known() || !usable || format.width == 0 || format.height == 0 {
        return Err(Fault::Unsupported(format!(
            "{} ({}) was set to {fourcc} and answered {} at {}x{}",
            capability.card, capability.driver, format.fourcc, format.width, format.height
        )));
    }
    let mut adjusted = Vec::new();
    if let Some((width, height)) = wishes.size
        && (width, height) != (format.width, format.height)
    {
        adjusted.push((format!("{width}x{height}"), format!("{}x{}", format.width, format.height)));
    }
    let mut what = format!("{}x{} {}", format.width, format.height, format.fourcc);
    if let Some(fps) = wishes.fps {
        match device.set_rate(fps).map_err(opening)? {
            Some(rate) => {
                what.push_str(&format!(", {rate:.1}/s"));
                if (rate - fps).abs() > 0.05 {
                    adjusted.push((format!("{fps}/s"), format!("{rate:.1}/s")));
                }
            }
            None => adjusted.push((format!("{fps}/s"), "its own rate".to_owned())),
        }
    }
    device.start().map_err(opening)?;
    what.push_str(&format!(", {} ({})", capability.card, capability.driver));
    Ok(Started { format, what, adjusted })
}

struct Streaming {
    device: Box<dyn VideoDevice>,
    format: Format,
}

impl Link for Streaming {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        let readiness = self.device.wait(wait).map_err(streaming)?;
        if readiness == Readiness::Nothing {
            return Ok(Received::Nothing);
        }
        let (format, mut received) = (self.format, Received::Nothing);
        match self.device.take(&mut |filled| received = picture(&format, filled)) {
            Ok(()) => Ok(received),
            // EAGAIN: it was ready and is not any more.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && readiness == Readiness::Ready => Ok(Received::Nothing),
            // EIO: the driver lost this picture, for instance because the signal was bad.
            Err(error) if error.raw_os_error() == Some(5) && readiness == Readiness::Ready => {
                Ok(Received::Corrupt("the driver could not read it".to_owned()))
            }
            Err(error) => Err(streaming(error)),
        }
    }
}

fn picture(format: &Format, filled: Filled<'_>) -> Received {
    if filled.damaged {
        return Received::Corrupt("the driver marks it as damaged".to_owned());
    }
    let shot = |data, width, height| {
        let number = Some(filled.sequence.into());
        Received::Frame(Shot { data, width, height, captured: filled.captured, number, source: None })
    };
    if format.fourcc.is_jpeg() {
        return match jpeg::single(filled.bytes.to_vec()) {
            Ok(jpeg) => shot(FrameData::Jpeg(jpeg.bytes), jpeg.width, jpeg.height),
            Err(damage) => Received::Corrupt(damage.to_string()),
        };
    }
    let (width, height) = (format.width, format.height);
    let is_packed = format.fourcc == FourCc::YUYV;
    let packed = Layout::packed(width, height, if is_packed { 2 } else { 1 });
    // Drivers that do not say how long a row is pad none.
    let layout = Layout { stride: packed.stride.max(format.stride as usize), ..packed };
    let convert = if is_packed { yuv::yuyv_to_rgb } else { yuv::nv12_to_rgb };
    match convert(filled.bytes, layout, format.encoding) {
        Ok(rgb) => shot(FrameData::Rgb8(rgb), width, height),
        Err(short) => Received::Corrupt(short.to_string()),
    }
}

/// The fault of a device that is being opened.
fn opening(error: io::Error) -> Fault {
    match error.raw_os_error() {
        // ENOENT, ENXIO, ENODEV
        Some(2 | 6 | 19) => Fault::Missing(error.to_string()),
        // EBUSY
        Some(16) => Fault::Busy,
        // EPERM, EACCES
        Some(1 | 13) => Fault::Forbidden(format!("{error}; is this user in the group \"video\"?")),
        _ => Fault::Io(error),
    }
}

/// The fault of a device that was streaming.
fn streaming(error: io::Error) -> Fault {
    match error.raw_os_error() {
        // ENXIO, ENODEV; EAGAIN and EIO get here only from a device in error.
        Some(5 | 6 | 11 | 19) => Fault::Unplugged,
        _ => Fault::Io(error),
    }
}

/// Which luma and chroma the numbers of a format stand for (`linux/v4l2-common`'s `V4L2_MAP_*_DEFAULT`).
fn encoding(colorspace: u32, ycbcr: u32, quantization: u32) -> YuvEncoding {
    // REC709 and DCI-P3, or XV709 by name; BT.2020 and SMPTE 240M are nearer to it than to BT.601.
    let matrix = match (ycbcr, colorspace) {
        (2 | 4 | 6 | 7 | 8, _) | (0, 2 | 3 | 10 | 12) => Matrix::Bt709,
        _ => Matrix::Bt601,
    };
    let range = match (quantization, colorspace) {
        (1, _) | (0, 7) => Range::Full,
        _ => Range::Limited,
    };
    YuvEncoding { matrix, range }
}

#[cfg(test)]
mod tests;
