//! Pictures on standard input: JPEGs one after another, or raw ones of a size that is told.

use std::time::{Duration, Instant, SystemTime};

use super::recovery::{Connect, Connected, Link, Received, Recovering, Shot};
use super::stream::{ByteSource, ByteStream, Bytes, JpegStream};
use super::uri::CameraUri;
use super::yuv::{self, Layout, YuvEncoding};
use super::{Camera, CameraError, CameraOptions, Fault, FrameData};

/// Opens standard input.
pub(super) fn open(uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    open_reader(uri, options, std::io::stdin())
}

/// The same of any reader.
fn open_reader(
    mut uri: CameraUri,
    options: &CameraOptions,
    reader: impl std::io::Read + Send + 'static,
) -> Result<Box<dyn Camera>, CameraError> {
    if uri.place() != "-" {
        return Err(uri.bad("the only pipe is standard input, pipe://-"));
    }
    let raw = match uri.take("format").as_deref() {
        None | Some("mjpeg") => None,
        Some("rgb") => Some(Pixels::Rgb),
        Some("yuyv") => Some(Pixels::Yuyv),
        Some("nv12") => Some(Pixels::Nv12),
        Some(other) => return Err(uri.bad(format!("format={other}: must be mjpeg, rgb, yuyv or nv12"))),
    };
    let size = uri.take_size()?;
    let form = match (raw, size) {
        (None, None) => Form::Jpegs,
        (None, Some(_)) => return Err(uri.bad("JPEGs tell their size themselves")),
        (Some(_), None) => return Err(uri.bad("raw pictures need their size, as in pipe://-?format=rgb&size=640x480")),
        (Some(pixels), Some((width, height))) => {
            if !pixels.fits(width, height) {
                return Err(uri.bad(format!("{width}x{height}: these pixels come in pairs, the size must be even")));
            }
            Form::Raw { pixels, width, height }
        }
    };
    uri.finish()?;
    let source = Pipe { reader: Some(reader), form, max_frame_bytes: options.max_frame_bytes };
    Ok(Box::new(Recovering::open(uri.name(), source, options)?))
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Jpegs,
    Raw { pixels: Pixels, width: u32, height: u32 },
}

#[derive(Debug, Clone, Copy)]
enum Pixels {
    Rgb,
    Yuyv,
    Nv12,
}

impl Pixels {
    fn fits(self, width: u32, height: u32) -> bool {
        match self {
            Self::Rgb => true,
            Self::Yuyv => width.is_multiple_of(2),
            Self::Nv12 => width.is_multiple_of(2) && height.is_multiple_of(2),
        }
    }

    fn frame_bytes(self, width: u32, height: u32) -> usize {
        let pixels = width as usize * height as usize;
        match self {
            Self::Rgb => pixels * 3,
            Self::Yuyv => pixels * 2,
            Self::Nv12 => pixels * 3 / 2,
        }
    }

    fn to_rgb(self, bytes: Vec<u8>, width: u32, height: u32) -> Result<Vec<u8>, Fault> {
        let rgb = match self {
            Self::Rgb => Ok(bytes),
            Self::Yuyv => yuv::yuyv_to_rgb(&bytes, Layout::packed(width, height, 2), YuvEncoding::default()),
            Self::Nv12 => yuv::nv12_to_rgb(&bytes, Layout::packed(width, height, 1), YuvEncoding::default()),
        };
        rgb.map_err(|short| Fault::Protocol(short.to_string()))
    }
}

struct Pipe<R> {
    reader: Option<R>,
    form: Form,
    max_frame_bytes: usize,
}

impl<R: std::io::Read + Send + 'static> Connect for Pipe<R> {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let reader = self.reader.take().ok_or(Fault::Closed)?;
        let bytes = ByteStream::new(reader)?;
        let (link, what): (Box<dyn Link>, _) = match self.form {
            Form::Jpegs => (Box::new(JpegStream::new(bytes, self.max_frame_bytes)), "JPEGs one after another".to_owned()),
            Form::Raw { pixels, width, height } => {
                let link = RawStream { bytes, pixels, width, height, gathered: Vec::new(), ended: false };
                (Box::new(link), format!("raw pictures, {width}x{height}"))
            }
        };
        Ok(Connected { link, what, adjusted: Vec::new() })
    }

    fn reopens(&self) -> bool {
        false
    }
}

/// Raw pictures one after another.
struct RawStream {
    bytes: ByteStream,
    pixels: Pixels,
    width: u32,
    height: u32,
    gathered: Vec<u8>,
    ended: bool,
}

impl Link for RawStream {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        let begun = Instant::now();
        let whole = self.pixels.frame_bytes(self.width, self.height);
        while self.gathered.len() < whole {
            if self.ended {
                return Ok(Received::End);
            }
            match self.bytes.receive(wait.saturating_sub(begun.elapsed()))? {
                Bytes::Some(bytes) => self.gathered.extend_from_slice(&bytes),
                Bytes::Nothing => return Ok(Received::Nothing),
                Bytes::End => {
                    self.ended = true;
                    if !self.gathered.is_empty() {
                        let reason = format!("cut short: {} of {whole} bytes", self.gathered.len());
                        return Ok(Received::Corrupt(reason));
                    }
                }
            }
        }
        let rest = self.gathered.split_off(whole);
        let frame = std::mem::replace(&mut self.gathered, rest);
        Ok(Received::Frame(Shot {
            data: FrameData::Rgb8(self.pixels.to_rgb(frame, self.width, self.height)?),
            width: self.width,
            height: self.height,
            captured: SystemTime::now(),
            number: None,
            source: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read, Write};

    use super::super::samples::{self, Record};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn pipe(uri: &str, reader: impl Read + Send + 'static, record: &Record) -> Result<Box<dyn Camera>, CameraError> {
        open_reader(CameraUri::parse(uri)?, &record.options(), reader)
    }

    #[test]
    fn jpegs_one_after_another() {
        let stream = [samples::jpeg(8, 6, 1), samples::jpeg(4, 2, 2), samples::jpeg(4, 2, 3)[..40].to_vec()].concat();
        let record = Record::default();
        let mut camera = pipe("pipe://-", Cursor::new(stream), &record).unwrap();
        for (sequence, width, height, tag) in [(0, 8, 6, 1), (1, 4, 2, 2)] {
            let frame = camera.next(SOON).unwrap().unwrap();
            assert_eq!((frame.sequence, frame.width, frame.height), (sequence, width, height));
            assert_eq!(frame.data, FrameData::Jpeg(samples::jpeg(width as u16, height as u16, tag)));
            assert_eq!(frame.source, "pipe://-");
        }
        assert!(camera.next(SOON).unwrap().is_none() && camera.next(SOON).unwrap().is_none());
        assert_eq!((camera.stats().frames, camera.stats().corrupt), (2, 2));
        let expected = [
            "pipe://-: open, JPEGs one after another",
            "pipe://-: picture thrown away: cut short: the stream ends in it (1 so far)",
            "pipe://-: picture thrown away: of another size, behind a damaged picture: a thumbnail in it (2 so far)",
            "pipe://-: no more pictures",
        ];
        assert_eq!(record.lines(), expected);
    }

    #[test]
    fn a_silent_pipe_times_out_and_goes_on() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let record = Record::default();
        let options = CameraOptions { stall_after: Duration::from_millis(30), ..record.options() };
        let mut camera = open_reader(CameraUri::parse("-").unwrap(), &options, reader).unwrap();
        let jpeg = samples::jpeg(8, 6, 1);
        writer.write_all(&jpeg[..20]).unwrap();
        let error = camera.next(Duration::from_millis(100)).unwrap_err();
        assert!(error.is_timeout() && error.to_string().starts_with("-: no picture within "), "{error}");
        writer.write_all(&jpeg[20..]).unwrap();
        assert_eq!(camera.next(SOON).unwrap().unwrap().data, FrameData::Jpeg(jpeg));
        assert!(camera.stats().stalls >= 1 && record.count("silent for 0.0 s") >= 1, "{:?}", record.lines());
        drop(writer);
        assert!(camera.next(SOON).unwrap().is_none());
    }

    /// Gives a picture after a call that a signal interrupted, and then fails.
    struct Failing(Vec<Result<Vec<u8>, std::io::ErrorKind>>);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.pop() {
                Some(Ok(bytes)) => {
                    buffer[..bytes.len()].copy_from_slice(&bytes);
                    Ok(bytes.len())
                }
                Some(Err(kind)) => Err(kind.into()),
                None => Ok(0),
            }
        }
    }

    #[test]
    fn a_pipe_that_fails_is_an_error_and_is_not_opened_again() {
        use std::io::ErrorKind::{Interrupted, PermissionDenied};
        let jpeg = samples::jpeg(8, 6, 1);
        let record = Record::default();
        let reader = Failing(vec![Err(PermissionDenied), Ok(jpeg.clone()), Err(Interrupted)]);
        let mut camera = pipe("pipe://-", reader, &record).unwrap();
        assert_eq!(camera.next(SOON).unwrap().unwrap().data, FrameData::Jpeg(jpeg));
        let error = camera.next(SOON).unwrap_err();
        assert!(matches!(error, CameraError::Fault { fault: Fault::Io(_), .. }), "{error}");
        assert!(camera.next(SOON).unwrap().is_none());
        assert_eq!(record.lines().len(), 1, "{:?}", record.lines());
    }

    #[test]
    fn raw_pictures() {
        let record = Record::default();
        let rgb: Vec<u8> = (0..30).collect();
        let mut camera = pipe("pipe://-?format=rgb&size=2x2", Cursor::new(rgb.clone()), &record).unwrap();
        for (sequence, pixels) in rgb.chunks_exact(12).enumerate() {
            let frame = camera.next(SOON).unwrap().unwrap();
            assert_eq!((frame.sequence, frame.width, frame.height), (sequence as u64, 2, 2));
            assert_eq!(frame.data, FrameData::Rgb8(pixels.to_vec()));
        }
        assert!(camera.next(SOON).unwrap().is_none());
        assert_eq!(record.count("cut short: 6 of 12 bytes"), 1);

        for (uri, bytes) in [
            ("pipe://-?format=yuyv&size=2x2", vec![126, 128, 126, 128, 235, 128, 235, 128]),
            ("pipe://-?format=nv12&size=2x2", vec![126, 126, 235, 235, 128, 128]),
        ] {
            let frame = pipe(uri, Cursor::new(bytes), &record).unwrap().next(SOON).unwrap().unwrap();
            assert_eq!(frame.data, FrameData::Rgb8([[128; 6], [255; 6]].concat()), "{uri}");
        }
    }

    #[test]
    fn wishes_that_cannot_be_met() {
        let cases = [
            ("pipe:///dev/stdin", "the only pipe"),
            ("pipe://-?format=rgb", "need their size"),
            ("pipe://-?size=2x2", "tell their size"),
            ("pipe://-?format=yuyv&size=3x2", "must be even"),
            ("pipe://-?format=nv12&size=2x3", "must be even"),
            ("pipe://-?format=h264", "format=h264"),
            ("pipe://-?loop=1", "does not know the wish loop"),
        ];
        for (uri, part) in cases {
            let error = pipe(uri, std::io::empty(), &Record::default()).err().unwrap().to_string();
            assert!(error.contains(part) && error.starts_with(uri), "{error}");
        }
    }
}
