//! V4L2 on a device that follows a script: formats, buffers and errors as drivers give them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::super::CameraStats;
use super::super::samples::{self, Record};
use super::*;

const SOON: Duration = Duration::from_secs(20);
const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const EACCES: i32 = 13;
const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const ENOTTY: i32 = 25;

/// What a device does next, once it streams.
#[derive(Clone)]
enum Act {
    /// A buffer: contents, sequence number, whether it is marked as damaged.
    Fill(Vec<u8>, u32, bool),
    /// A device that is ready, and a system call that fails.
    Fail(i32),
    /// A device in error, and a system call that fails.
    Break(i32),
    /// A wait that ends without anything.
    Nothing,
}

#[derive(Clone)]
struct Fake {
    capability: Capability,
    formats: Vec<(FourCc, Vec<Sizes>)>,
    /// What the driver makes of a format: its stride, its colours, and another format than asked for.
    stride: u32,
    encoding: YuvEncoding,
    other: Option<FourCc>,
    rate: Option<f32>,
    /// Errors of the calls by their names.
    errors: Vec<(&'static str, i32)>,
    acts: VecDeque<Act>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn webcam(acts: Vec<Act>) -> Self {
        let sizes = vec![Sizes::One(8, 6), Sizes::One(4, 2)];
        Self {
            capability: Capability {
                driver: "uvcvideo".to_owned(),
                card: "HD Webcam".to_owned(),
                captures: true,
                captures_planes: false,
                streams: true,
            },
            formats: vec![(FourCc::YUYV, sizes.clone()), (FourCc::MJPEG, sizes), (FourCc::NV12, vec![Sizes::One(4, 2)])],
            stride: 0,
            encoding: YuvEncoding::default(),
            other: None,
            rate: Some(30.0),
            errors: Vec::new(),
            acts: acts.into(),
            log: Arc::default(),
        }
    }

    fn call<T>(&self, name: &'static str, what: String, value: T) -> io::Result<T> {
        self.log.lock().unwrap().push(what);
        match self.errors.iter().find(|(failing, _)| *failing == name) {
            Some((_, code)) => Err(io::Error::from_raw_os_error(*code)),
            None => Ok(value),
        }
    }
}

impl VideoDevice for Fake {
    fn capability(&mut self) -> io::Result<Capability> {
        self.call("capability", "capability".to_owned(), self.capability.clone())
    }

    fn formats(&mut self) -> io::Result<Vec<FourCc>> {
        let formats = self.formats.iter().map(|(fourcc, _)| *fourcc).collect();
        self.call("formats", "formats".to_owned(), formats)
    }

    fn sizes(&mut self, fourcc: FourCc) -> io::Result<Vec<Sizes>> {
        Ok(self.formats.iter().find(|(known, _)| *known == fourcc).unwrap().1.clone())
    }

    fn set_format(&mut self, fourcc: FourCc, width: u32, height: u32) -> io::Result<Format> {
        let (stride, encoding) = (self.stride, self.encoding);
        let format = Format { fourcc: self.other.unwrap_or(fourcc), width, height, stride, encoding };
        self.call("set_format", format!("format {fourcc} {width}x{height}"), format)
    }

    fn set_rate(&mut self, fps: f32) -> io::Result<Option<f32>> {
        self.call("set_rate", format!("rate {fps}"), self.rate)
    }

    fn start(&mut self) -> io::Result<()> {
        self.call("start", "start".to_owned(), ())
    }

    fn wait(&mut self, wait: Duration) -> io::Result<Readiness> {
        match self.acts.front() {
            Some(Act::Fill(..) | Act::Fail(_)) => Ok(Readiness::Ready),
            Some(Act::Break(_)) => Ok(Readiness::Failed),
            Some(Act::Nothing) => {
                self.acts.pop_front();
                Ok(Readiness::Nothing)
            }
            None => {
                std::thread::sleep(wait);
                Ok(Readiness::Nothing)
            }
        }
    }

    fn take(&mut self, lend: &mut dyn FnMut(Filled<'_>)) -> io::Result<()> {
        match self.acts.pop_front().unwrap() {
            Act::Fill(bytes, sequence, damaged) => {
                lend(Filled { bytes: &bytes, sequence, captured: SystemTime::UNIX_EPOCH, damaged });
                Ok(())
            }
            Act::Fail(code) | Act::Break(code) => Err(io::Error::from_raw_os_error(code)),
            Act::Nothing => unreachable!("waiting gave nothing"),
        }
    }
}

/// Opens a camera whose device is, attempt by attempt, one of these, or an error.
fn open_fakes(
    mut devices: VecDeque<Result<Fake, i32>>,
    wishes: Wishes,
    options: &CameraOptions,
) -> Result<Box<dyn Camera>, CameraError> {
    let open = move || match devices.pop_front() {
        Some(Ok(fake)) => Ok(Box::new(fake) as Box<dyn VideoDevice>),
        Some(Err(code)) => Err(io::Error::from_raw_os_error(code)),
        None => Err(io::Error::from_raw_os_error(ENOENT)),
    };
    Ok(Box::new(Recovering::open("v4l2:///dev/video0".to_owned(), Video { open, wishes }, options)?))
}

fn open_fake(fake: Fake, wishes: Wishes, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    open_fakes(VecDeque::from([Ok(fake)]), wishes, options)
}

fn quick(record: &Record) -> CameraOptions {
    CameraOptions { first_retry: Duration::from_millis(1), ..record.options() }
}

fn mjpeg(sequence: u32) -> Act {
    Act::Fill(samples::jpeg(8, 6, sequence as u8), sequence, false)
}

#[test]
fn a_camera_is_set_up_as_wished() {
    let record = Record::default();
    let wishes = Wishes { format: None, size: Some((8, 6)), fps: Some(15.0) };
    let fake = Fake::webcam(vec![mjpeg(0)]);
    let log = fake.log.clone();
    let mut camera = open_fake(fake, wishes, &record.options()).unwrap();
    assert_eq!(*log.lock().unwrap(), ["capability", "formats", "format MJPG 8x6", "rate 15", "start"]);
    let frame = camera.next(SOON).unwrap().unwrap();
    assert_eq!((frame.width, frame.height, frame.captured), (8, 6, SystemTime::UNIX_EPOCH));
    assert_eq!(frame.data, FrameData::Jpeg(samples::jpeg(8, 6, 0)));
    let expected =
        ["v4l2:///dev/video0: asked for 15/s, gives 30.0/s", "v4l2:///dev/video0: open, 8x6 MJPG, 30.0/s, HD Webcam (uvcvideo)"];
    assert_eq!(record.lines(), expected);
}

#[test]
fn wishes_that_are_not_met_are_told() {
    let record = Record::default();
    let wishes = Wishes { format: Some(FourCc::NV12), size: Some((1920, 1080)), fps: Some(5.0) };
    let fake = Fake { rate: None, ..Fake::webcam(Vec::new()) };
    open_fake(fake, wishes, &record.options()).unwrap();
    for part in ["asked for 1920x1080, gives 4x2", "asked for 5/s, gives its own rate", "open, 4x2 NV12, HD"] {
        assert_eq!(record.count(part), 1, "{part}: {:?}", record.lines());
    }
}

#[test]
fn raw_pictures_are_converted_by_their_rows() {
    let (grey, white) = ([126, 128, 126, 128], [235, 128, 235, 128]);
    let yuyv = [grey, grey, white, white].concat();
    let padded = [grey, grey, [9; 4], white, white].concat();
    let nv12 = [[126; 4], [235; 4], [128; 4]].concat();
    let expected = FrameData::Rgb8([[128; 12], [255; 12]].concat());
    for (format, stride, bytes) in
        [(FourCc::YUYV, 0, yuyv.clone()), (FourCc::YUYV, 8, yuyv), (FourCc::YUYV, 12, padded), (FourCc::NV12, 4, nv12)]
    {
        let fake = Fake { stride, ..Fake::webcam(vec![Act::Fill(bytes.clone(), 7, false)]) };
        let wishes = Wishes { format: Some(format), size: Some((4, 2)), fps: None };
        let frame = open_fake(fake, wishes, &CameraOptions::default()).unwrap().next(SOON).unwrap().unwrap();
        assert_eq!((frame.data, frame.width, frame.height), (expected.clone(), 4, 2), "{format} {stride}");

        let record = Record::default();
        let fake = Fake { stride, ..Fake::webcam(vec![Act::Fill(bytes[..7].to_vec(), 7, false)]) };
        let mut camera = open_fake(fake, wishes, &record.options()).unwrap();
        assert!(camera.next(Duration::from_millis(10)).unwrap_err().is_timeout());
        assert_eq!(record.count("cut short: 7 of "), 1, "{:?}", record.lines());
    }
}

#[test]
fn colours_are_those_that_the_driver_says() {
    let encoding = YuvEncoding { range: Range::Full, ..YuvEncoding::default() };
    let wishes = Wishes { format: Some(FourCc::YUYV), size: Some((4, 2)), fps: None };
    for (encoding, grey) in [(YuvEncoding::default(), 128), (encoding, 126)] {
        let fake = Fake { encoding, ..Fake::webcam(vec![Act::Fill([126, 128].repeat(8), 0, false)]) };
        let frame = open_fake(fake, wishes, &CameraOptions::default()).unwrap().next(SOON).unwrap().unwrap();
        assert_eq!(frame.data, FrameData::Rgb8(vec![grey; 24]), "{encoding:?}");
    }
}

#[test]
fn damaged_pictures_are_counted_and_passed_over() {
    let record = Record::default();
    let acts = vec![
        mjpeg(0),
        Act::Nothing,
        Act::Fill(samples::jpeg(8, 6, 1), 1, true),
        Act::Fill(samples::jpeg(8, 6, 2)[..40].to_vec(), 2, false),
        Act::Fill(Vec::new(), 3, false),
        Act::Fail(EAGAIN),
        Act::Fail(EIO),
        // Four were skipped: those damaged are among them, by the numbers.
        mjpeg(8),
        mjpeg(9),
    ];
    let mut camera = open_fake(Fake::webcam(acts), Wishes::default(), &record.options()).unwrap();
    let sequences: Vec<u64> = (0..3).map(|_| camera.next(SOON).unwrap().unwrap().sequence).collect();
    assert_eq!(sequences, [0, 8, 9]);
    let expected = CameraStats { frames: 3, corrupt: 4, reconnects: 0, stalls: 0, skipped: 7 };
    assert_eq!(camera.stats(), expected);
    for part in
        ["marks it as damaged", "cut short: the stream", "a marker is missing", "could not read it", "skipped 7 (7 so far)"]
    {
        assert_eq!(record.count(part), 1, "{part}: {:?}", record.lines());
    }
}

#[test]
fn a_camera_that_is_unplugged_is_waited_for() {
    let devices = VecDeque::from([
        Ok(Fake::webcam(vec![mjpeg(5), mjpeg(6), Act::Break(ENODEV)])),
        Err(ENOENT),
        Err(EACCES),
        // Back, and another program was faster.
        Ok(Fake { errors: vec![("set_format", EBUSY)], ..Fake::webcam(Vec::new()) }),
        Ok(Fake::webcam(vec![mjpeg(0), Act::Fail(ENODEV)])),
        Ok(Fake::webcam(vec![mjpeg(0), Act::Break(EIO)])),
        Ok(Fake::webcam(vec![mjpeg(0), Act::Break(EAGAIN)])),
        Ok(Fake::webcam(vec![mjpeg(0), mjpeg(1)])),
    ]);
    let record = Record::default();
    let mut camera = open_fakes(devices, Wishes::default(), &quick(&record)).unwrap();
    let sequences: Vec<u64> = (0..7).map(|_| camera.next(SOON).unwrap().unwrap().sequence).collect();
    assert_eq!(sequences, [0, 1, 2, 3, 4, 5, 6]);
    let expected = CameraStats { frames: 7, corrupt: 0, reconnects: 4, stalls: 0, skipped: 0 };
    assert_eq!(camera.stats(), expected);
    assert_eq!(record.count("it was unplugged; next attempt"), 4);
    for part in ["not there: No such file", "not allowed to open it", "busy: another program is using it; next attempt"] {
        assert_eq!(record.count(part), 1, "{part}: {:?}", record.lines());
    }
    assert_eq!(record.count("open again, 8x6 MJPG"), 4);
}

#[test]
fn a_camera_that_freezes_is_opened_again() {
    let devices = VecDeque::from([Ok(Fake::webcam(vec![mjpeg(0)])), Ok(Fake::webcam(vec![mjpeg(0)]))]);
    let record = Record::default();
    let options = CameraOptions { stall_after: Duration::from_millis(40), ..quick(&record) };
    let mut camera = open_fakes(devices, Wishes::default(), &options).unwrap();
    assert!(camera.next(SOON).unwrap().is_some());
    // It is what was listened for that counts, not the time in which nobody asked.
    std::thread::sleep(Duration::from_millis(60));
    assert!(camera.next(Duration::from_millis(1)).unwrap_err().is_timeout());
    assert_eq!(camera.stats().stalls, 0);
    assert!(camera.next(SOON).unwrap().is_some());
    assert_eq!((camera.stats().stalls, camera.stats().reconnects), (1, 1), "{:?}", record.lines());
}

#[test]
fn cameras_that_cannot_be_opened() {
    let webcam = || Fake::webcam(Vec::new());
    let no_camera =
        |planes| Fake { capability: Capability { captures: false, captures_planes: planes, ..webcam().capability }, ..webcam() };
    let no_stream = Fake { capability: Capability { streams: false, ..webcam().capability }, ..webcam() };
    let raw = Fake { formats: vec![(FourCc::new(*b"pRAA"), Vec::new()), (FourCc::new(*b"RG10"), Vec::new())], ..webcam() };
    let failing = |call, code| Ok(Fake { errors: vec![(call, code)], ..webcam() });
    let cases = [
        (Err(ENOENT), "not there: No such file or directory"),
        (Err(EBUSY), "busy: another program is using it"),
        (Err(EACCES), "is this user in the group \"video\"?"),
        (failing("capability", ENOTTY), "it is no video device"),
        (failing("start", EBUSY), "busy: another program is using it"),
        (failing("formats", ENODEV), "not there: No such device"),
        (Ok(no_camera(false)), "HD Webcam (uvcvideo) is no camera: a device may have several nodes"),
        (Ok(no_stream), "HD Webcam (uvcvideo) is no camera"),
        (Ok(no_camera(true)), "gives its pictures in planes"),
        (Ok(raw), "gives pRAA, RG10, and MJPG, YUYV or NV12 is needed"),
    ];
    for (device, part) in cases {
        let error = open_fakes(VecDeque::from([device]), Wishes::default(), &CameraOptions::default()).err().unwrap();
        let said = error.to_string();
        assert!(said.starts_with("v4l2:///dev/video0: ") && said.contains(part), "{said}");
    }
    let odd = Fake { formats: vec![(FourCc::YUYV, vec![Sizes::One(5, 3)])], ..webcam() };
    let error = open_fake(odd, Wishes::default(), &CameraOptions::default()).err().unwrap().to_string();
    assert!(error.contains("answered YUYV at 5x3"), "{error}");
    let stubborn = Fake { other: Some(FourCc::new(*b"H264")), ..webcam() };
    let error = open_fake(stubborn, Wishes::default(), &CameraOptions::default()).err().unwrap().to_string();
    assert!(error.contains("was set to MJPG and answered H264 at 8x6"), "{error}");

    // Waiting helps where a device is missing, and not where it is the wrong one.
    let record = Record::default();
    let waiting = CameraOptions { wait_for_camera: true, ..quick(&record) };
    let devices = VecDeque::from([Err(ENOENT), Err(EBUSY), Ok(Fake::webcam(vec![mjpeg(0)]))]);
    let mut camera = open_fakes(devices, Wishes::default(), &waiting).unwrap();
    assert!(camera.next(SOON).unwrap().is_some());
    assert_eq!(camera.stats().reconnects, 0);
    assert!(open_fake(no_camera(false), Wishes::default(), &waiting).is_err());
}

#[test]
fn colours_of_formats() {
    let bt601 = YuvEncoding { matrix: Matrix::Bt601, range: Range::Limited };
    let cases = [
        // sRGB, as webcams say; SMPTE 170M.
        ((8, 0, 0), bt601),
        ((1, 0, 2), bt601),
        ((3, 0, 0), YuvEncoding { matrix: Matrix::Bt709, ..bt601 }),
        ((3, 1, 0), bt601),
        ((8, 2, 1), YuvEncoding { matrix: Matrix::Bt709, range: Range::Full }),
        ((7, 0, 0), YuvEncoding { range: Range::Full, ..bt601 }),
        ((7, 0, 2), bt601),
    ];
    for ((colorspace, ycbcr, quantization), expected) in cases {
        assert_eq!(encoding(colorspace, ycbcr, quantization), expected, "{colorspace} {ycbcr} {quantization}");
    }
}

#[test]
fn uris() {
    for (uri, part) in [
        ("v4l2://video0", "by its whole path"),
        ("v4l2:///dev/video0?format=h264", "must be mjpeg, yuyv or nv12"),
        ("v4l2:///dev/video0?zoom=2", "does not know the wish zoom"),
        ("v4l2:///dev/video-of-nobody?size=64x48&fps=5&format=yuyv", "v4l2:///dev/video-of-nobody: not there"),
    ] {
        let error = super::super::open(uri, &CameraOptions::default()).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
}
