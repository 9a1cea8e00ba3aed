//! Files and folders as a camera: `photos/?every=2s&loop=1`, and recordings of JPEGs one after another.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::jpeg;
use super::recovery::{Connect, Connected, Link, Received, Recovering, Shot};
use super::stream::{ByteStream, JpegStream};
use super::uri::CameraUri;
use super::{Camera, CameraError, CameraOptions, Fault, FrameData};
use crate::source::{self, Picture};

/// File name endings of recordings, in lower case.
const RECORDINGS: [&str; 2] = ["mjpeg", "mjpg"];

/// Opens a file or a folder.
pub(super) fn open(mut uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let repeat = uri.take_switch("loop")?;
    let every = uri.take_time("every")?;
    uri.finish()?;
    let name = uri.name();
    // The argument is placed without its wishes, as every other command places it.
    let pictures = source::pictures(std::slice::from_ref(&name))?;
    let paths: Vec<PathBuf> = pictures
        .into_iter()
        .map(|picture| match picture {
            Picture::File(path) => Ok(path),
            Picture::Stdin | Picture::Camera(_) => Err(uri.bad("not a file or a folder")),
        })
        .collect::<Result<_, _>>()?;
    // A file that is named must be there; one that vanishes from a folder is passed over.
    if let [path] = paths.as_slice()
        && let Err(error) = path.metadata()
    {
        let fault = if path.exists() { Fault::Io(error) } else { Fault::Missing(error.to_string()) };
        return Err(CameraError::Fault { camera: name, fault });
    }
    // The next picture may be due in an hour: waiting for it is no stall.
    let options = CameraOptions { stall_after: Duration::MAX, ..options.clone() };
    let source = Files { paths, repeat, every, max_frame_bytes: options.max_frame_bytes };
    Ok(Box::new(Recovering::open(name, source, &options)?.not_live()))
}

struct Files {
    paths: Vec<PathBuf>,
    repeat: bool,
    every: Option<Duration>,
    max_frame_bytes: usize,
}

impl Connect for Files {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let what = match self.paths.len() {
            1 => "1 file".to_owned(),
            many => format!("{many} files"),
        };
        let link = FileLink {
            paths: self.paths.clone(),
            next: 0,
            recording: None,
            given_this_round: false,
            repeat: self.repeat,
            every: self.every,
            due: Instant::now(),
            max_frame_bytes: self.max_frame_bytes,
        };
        Ok(Connected { link: Box::new(link), what, adjusted: Vec::new() })
    }

    fn reopens(&self) -> bool {
        false
    }
}

struct FileLink {
    paths: Vec<PathBuf>,
    next: usize,
    /// The recording that is being played.
    recording: Option<(PathBuf, JpegStream<ByteStream>)>,
    given_this_round: bool,
    repeat: bool,
    every: Option<Duration>,
    /// When the next picture is due.
    due: Instant,
    max_frame_bytes: usize,
}

impl Link for FileLink {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        let until_due = self.due.saturating_duration_since(Instant::now());
        std::thread::sleep(until_due.min(wait));
        if until_due > wait {
            return Ok(Received::Nothing);
        }
        let received = self.read(wait)?;
        if let Received::Frame(_) = received {
            self.given_this_round = true;
            if let Some(every) = self.every {
                self.due = (self.due + every).max(Instant::now());
            }
        }
        Ok(received)
    }
}

impl FileLink {
    fn read(&mut self, wait: Duration) -> Result<Received, Fault> {
        loop {
            if let Some((path, stream)) = &mut self.recording {
                match stream.receive(wait)? {
                    Received::End => self.recording = None,
                    Received::Frame(shot) => {
                        return Ok(Received::Frame(Shot { source: Some(path.display().to_string()), ..shot }));
                    }
                    Received::Corrupt(reason) => return Ok(Received::Corrupt(format!("{}: {reason}", path.display()))),
                    Received::Nothing => return Ok(Received::Nothing),
                }
                continue;
            }
            let Some(path) = self.paths.get(self.next).cloned() else {
                // A round that gave nothing would be followed by another for ever.
                if !self.repeat || !self.given_this_round {
                    return Ok(Received::End);
                }
                self.next = 0;
                self.given_this_round = false;
                continue;
            };
            self.next += 1;
            let failed = |error: std::io::Error| Received::Corrupt(format!("cannot read {}: {error}", path.display()));
            if is_recording(&path) {
                match File::open(&path) {
                    Ok(file) => {
                        self.recording = Some((path, JpegStream::new(ByteStream::new(file)?, self.max_frame_bytes)));
                    }
                    Err(error) => return Ok(failed(error)),
                }
                continue;
            }
            return Ok(match contents(&path, self.max_frame_bytes) {
                Ok(bytes) if bytes.len() > self.max_frame_bytes => {
                    Received::Corrupt(format!("{}: more than {} bytes", path.display(), self.max_frame_bytes))
                }
                Ok(bytes) => Received::Frame(picture(&path, bytes)),
                Err(error) => failed(error),
            });
        }
    }
}

fn is_recording(path: &Path) -> bool {
    let ending = path.extension().map(std::ffi::OsStr::to_ascii_lowercase).unwrap_or_default();
    RECORDINGS.iter().any(|known| ending == *known)
}

/// Contents of a file, and one byte more than allowed of one that is too large.
fn contents(path: &Path, max_bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_bytes as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A picture file as it is: one that is damaged is the decoder's to refuse, which can say more about it.
fn picture(path: &Path, bytes: Vec<u8>) -> Shot {
    let is_jpeg = bytes.starts_with(&[0xFF, 0xD8, 0xFF]);
    let (width, height) = jpeg::size(&bytes).unwrap_or_default();
    Shot {
        data: if is_jpeg { FrameData::Jpeg(bytes) } else { FrameData::Encoded(bytes) },
        width,
        height,
        captured: SystemTime::now(),
        number: None,
        source: Some(path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, Record};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn camera(uri: &str, options: &CameraOptions) -> Box<dyn Camera> {
        super::super::open(uri, options).unwrap()
    }

    #[test]
    fn a_folder_once_through() {
        let jpeg = samples::jpeg(8, 6, 1);
        let folder = folder(&[("a.jpg", jpeg.clone()), ("b.png", b"no matter".to_vec()), ("c.jpg", vec![0; 101])]);
        std::fs::write(folder.path().join("notes.txt"), b"").unwrap();
        let record = Record::default();
        let path = folder.path().to_str().unwrap();
        let mut camera = camera(path, &CameraOptions { max_frame_bytes: 100, ..record.options() });
        assert!(!camera.is_live() && camera.name() == path);
        let first = camera.next(SOON).unwrap().unwrap();
        assert_eq!((first.data, first.width, first.height), (FrameData::Jpeg(jpeg), 8, 6));
        assert_eq!(first.source, format!("{path}/a.jpg"));
        let second = camera.next(SOON).unwrap().unwrap();
        assert_eq!((second.data, second.sequence), (FrameData::Encoded(b"no matter".to_vec()), 1));
        assert!(camera.next(SOON).unwrap().is_none());
        assert_eq!(record.count("c.jpg: more than 100 bytes"), 1);
        assert_eq!((camera.stats().frames, camera.stats().corrupt), (2, 1));
    }

    #[test]
    fn again_and_again() {
        let folder = folder(&[("a.jpg", samples::jpeg(8, 6, 1)), ("b.jpg", samples::jpeg(8, 6, 2))]);
        let path = folder.path().to_str().unwrap();
        let mut camera = camera(&format!("{path}?loop=1"), &CameraOptions::default());
        let names: Vec<String> = (0..5).map(|_| camera.next(SOON).unwrap().unwrap().source).collect();
        let expected = ["a", "b", "a", "b", "a"].map(|name| format!("{path}/{name}.jpg"));
        assert_eq!(names, expected);
        // Once all are gone, a round gives nothing and is the last.
        std::fs::remove_file(folder.path().join("a.jpg")).unwrap();
        std::fs::remove_file(folder.path().join("b.jpg")).unwrap();
        assert!(camera.next(SOON).unwrap().is_none());
        assert_eq!(camera.stats().corrupt, 3);
    }

    #[test]
    fn pictures_come_when_they_are_due() {
        let folder = folder(&[("a.jpg", samples::jpeg(8, 6, 1)), ("b.jpg", samples::jpeg(8, 6, 2))]);
        let uri = format!("file://{}?every=60m", folder.path().display());
        let options = CameraOptions { stall_after: Duration::from_millis(1), ..CameraOptions::default() };
        let mut camera = camera(&uri, &options);
        assert!(camera.next(SOON).unwrap().is_some());
        assert!(camera.next(Duration::from_millis(20)).unwrap_err().is_timeout());
        assert_eq!(camera.stats().stalls, 0);

        let every = Duration::from_millis(30);
        let uri = format!("{}?every=30ms&loop=1", folder.path().display());
        let mut camera = super::super::open(&uri, &CameraOptions::default()).unwrap();
        let begun = Instant::now();
        for _ in 0..4 {
            assert!(camera.next(SOON).unwrap().is_some());
        }
        assert!(begun.elapsed() >= every * 3, "{:?}", begun.elapsed());
    }

    #[test]
    fn recordings() {
        let stream = [samples::jpeg(8, 6, 1), samples::jpeg(8, 6, 2)[..30].to_vec(), samples::jpeg(8, 6, 3)].concat();
        let folder = folder(&[("walk.MJPEG", stream)]);
        let record = Record::default();
        let path = folder.path().join("walk.MJPEG");
        let mut camera = camera(path.to_str().unwrap(), &record.options());
        for tag in [1, 3] {
            let frame = camera.next(SOON).unwrap().unwrap();
            assert_eq!((frame.data, frame.source), (FrameData::Jpeg(samples::jpeg(8, 6, tag)), path.display().to_string()));
        }
        assert!(camera.next(SOON).unwrap().is_none());
        assert!(camera.stats().corrupt == 2 && record.count("walk.MJPEG: cut short") == 1, "{:?}", record.lines());
    }

    #[test]
    fn what_cannot_be_opened() {
        let folder = folder(&[("notes.txt", Vec::new())]);
        let path = folder.path().display();
        let cases = [
            (format!("{path}/none.jpg"), "not there"),
            (format!("{path}"), "holds no pictures"),
            (format!("{path}?speed=9"), "does not know the wish speed"),
            (format!("{path}?loop=yes"), "must be 1 or 0"),
            ("file://elsewhere/a.jpg".to_owned(), "the machine elsewhere"),
        ];
        for (uri, part) in cases {
            let error = super::super::open(&uri, &CameraOptions::default()).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
