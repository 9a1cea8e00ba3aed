//! Camera modules, read through the program that drives them: `rpicam://0` on a Raspberry Pi, `csi://0` on a Jetson.
//!
//! The program writes JPEGs to its standard output; what it says on standard error is told when it ends.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::recovery::{Connect, Connected, Link, Received, Recovering};
use super::stream::{ByteStream, JpegStream};
use super::uri::CameraUri;
use super::{Camera, CameraError, CameraOptions, DEFAULT_SIZE, Fault, SETTLING};

/// Pictures a second, unless wished otherwise: a Raspberry Pi 5 and a Jetson Orin Nano encode JPEGs on their processors.
const FPS: f32 = 10.0;
/// How long a program may take to end once it is told to.
const END: Duration = Duration::from_secs(2);

/// Opens a Raspberry Pi's camera module.
pub(super) fn open_rpicam(mut uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let options = uri.wishes(options)?;
    let call = rpicam(&mut uri, &options)?;
    open(&uri, call, &options)
}

/// Opens a Jetson's camera module.
pub(super) fn open_csi(mut uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let options = uri.wishes(options)?;
    let call = csi(&mut uri, &options)?;
    open(&uri, call, &options)
}

/// How a program is called.
struct Call {
    /// Names that it may have.
    programs: &'static [&'static str],
    /// Its arguments, with spaces between them.
    arguments: String,
    /// What it is to give, in words.
    what: String,
}

fn rpicam(uri: &mut CameraUri, options: &CameraOptions) -> Result<Call, CameraError> {
    let number = number(uri)?;
    let (width, height) = options.size.unwrap_or(DEFAULT_SIZE);
    let fps = options.fps.unwrap_or(FPS);
    let mut arguments = format!(
        "--camera {number} --codec mjpeg --quality 85 --width {width} --height {height} --framerate {fps} --nopreview --timeout 0 \
         --flush --output -"
    );
    for flip in ["hflip", "vflip"] {
        if uri.take_switch(flip)? {
            arguments.push_str(&format!(" --{flip}"));
        }
    }
    // The name of today, and that of Raspberry Pi OS 11.
    Ok(Call { programs: &["rpicam-vid", "libcamera-vid"], arguments, what: format!("{width}x{height}, {fps}/s") })
}

fn csi(uri: &mut CameraUri, options: &CameraOptions) -> Result<Call, CameraError> {
    let number = number(uri)?;
    let (width, height) = options.size.unwrap_or(DEFAULT_SIZE);
    let fps = options.fps.unwrap_or(FPS);
    // The rate as a fraction. The sensor runs in its own mode, and the converter makes the size.
    let rate = format!("{}/1000", (fps * 1000.0).round());
    let flip = if uri.take_switch("rotate")? { 2 } else { 0 };
    let arguments = format!(
        "--quiet nvarguscamerasrc sensor-id={number} ! video/x-raw(memory:NVMM),format=NV12 \
         ! nvvidconv flip-method={flip} ! video/x-raw,format=I420,width={width},height={height} \
         ! videorate drop-only=true ! video/x-raw,framerate={rate} ! jpegenc quality=85 ! fdsink fd=1 sync=false"
    );
    Ok(Call { programs: &["gst-launch-1.0"], arguments, what: format!("{width}x{height}, {fps}/s") })
}

fn number(uri: &CameraUri) -> Result<u32, CameraError> {
    let place = uri.place();
    let number = if place.is_empty() { Ok(0) } else { place.parse() };
    number.map_err(|_| uri.bad(format!("{place} is no number of a camera; the first is 0")))
}

fn open(uri: &CameraUri, call: Call, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    uri.finish()?;
    let source = Program {
        names: call.programs.iter().map(|name| (*name).to_owned()).collect(),
        folders: std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
        arguments: call.arguments.split_whitespace().map(str::to_owned).collect(),
        what: call.what,
        max_frame_bytes: options.max_frame_bytes,
    };
    Ok(Box::new(Recovering::open(uri.name(), source, options)?))
}

/// A program that writes JPEGs, by the first of its names that is installed.
struct Program {
    names: Vec<String>,
    folders: Vec<PathBuf>,
    arguments: Vec<String>,
    what: String,
    max_frame_bytes: usize,
}

impl Program {
    fn find(&self) -> Result<PathBuf, Fault> {
        let places = self.names.iter().flat_map(|name| self.folders.iter().map(move |folder| folder.join(name)));
        places.into_iter().find(|path| path.is_file()).ok_or_else(|| Fault::NoProgram(self.names.clone()))
    }
}

impl Connect for Program {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let path = self.find()?;
        let mut command = Command::new(&path);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else { return Err(Fault::Closed) };
        let mut running = Running { child, program: name_of(&path), said: Arc::default(), pictures: None };
        let said = running.said.clone();
        std::thread::Builder::new().name("camera-log".to_owned()).spawn(move || listen(stderr, &said))?;
        running.pictures = Some(JpegStream::new(ByteStream::new(stdout)?, self.max_frame_bytes));
        let what = format!("{} through {}", self.what, path.display());
        Ok(Connected { link: Box::new(running), what, adjusted: Vec::new() })
    }

    fn settling(&self) -> Duration {
        SETTLING
    }
}

fn name_of(path: &std::path::Path) -> String {
    path.file_name().map(OsStr::to_string_lossy).unwrap_or_default().into_owned()
}

/// Reads what a program says, and keeps the last line that says something.
fn listen(stderr: impl std::io::Read, said: &Mutex<String>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    // Line by line, and not beyond a length: a program may say anything.
    while matches!(std::io::Read::take(&mut reader, 4096).read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        if !text.is_empty() {
            *said.lock().unwrap_or_else(PoisonError::into_inner) = text.chars().take(200).collect();
        }
        line.clear();
    }
}

/// The program while it runs; it is ended with its camera.
struct Running {
    child: Child,
    program: String,
    said: Arc<Mutex<String>>,
    pictures: Option<JpegStream<ByteStream>>,
}

impl Link for Running {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        let Some(pictures) = &mut self.pictures else { return Err(Fault::Closed) };
        match pictures.receive(wait)? {
            Received::End => Err(self.ended()),
            received => Ok(received),
        }
    }
}

impl Running {
    /// Why there are no more pictures.
    fn ended(&mut self) -> Fault {
        let status = match self.end(Duration::from_millis(500)) {
            Some(status) => status.to_string(),
            None => "no exit status".to_owned(),
        };
        // The thread that listens has the last words when the program is gone, or a moment later.
        let deadline = Instant::now() + Duration::from_millis(200);
        while Arc::strong_count(&self.said) > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Fault::Exited { program: self.program.clone(), status, said }
    }

    /// Waits for the program; tells it to end where it does not, and in the end does not ask.
    fn end(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        if let Some(status) = self.wait(patience) {
            return Some(status);
        }
        // A camera service left behind by a killed client may be stuck: ask first.
        #[cfg(unix)]
        if let Some(id) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        if let Some(status) = self.wait(END) {
            return Some(status);
        }
        let _ = self.child.kill();
        self.child.wait().ok()
    }

    fn wait(&mut self, time: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + time;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                _ => return None,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::FrameData;
    use super::super::samples::{self, Record};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// A folder with a script called `rpicam-vid`.
    fn folder(script: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("one.jpg"), samples::jpeg(8, 6, 1)).unwrap();
        std::fs::write(folder.path().join("two.jpg"), samples::jpeg(8, 6, 2)).unwrap();
        let path = folder.path().join("rpicam-vid");
        let script = format!("#!/bin/sh\ncd {}\n{script}\n", folder.path().display());
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }

    fn camera(folder: &tempfile::TempDir, arguments: &str, options: &CameraOptions) -> Recovering<Program> {
        let source = Program {
            names: vec!["libcamera-none".to_owned(), "rpicam-vid".to_owned()],
            folders: vec!["/nowhere".into(), folder.path().to_owned()],
            arguments: arguments.split_whitespace().map(str::to_owned).collect(),
            what: "8x6".to_owned(),
            max_frame_bytes: 1000,
        };
        Recovering::open("rpicam://0".to_owned(), source, options).unwrap()
    }

    fn quick(record: &Record) -> CameraOptions {
        CameraOptions { first_retry: Duration::from_millis(1), ..record.options() }
    }

    #[test]
    fn a_program_that_dies_is_started_again() {
        // It counts its lives in a file, and gives one picture in each.
        let folder = folder("echo x >> lives; cat one.jpg; head -c 30 two.jpg; echo camera fell off >&2; exit 7");
        let record = Record::default();
        let mut camera = camera(&folder, "--codec mjpeg", &quick(&record));
        for sequence in 0..3 {
            let frame = camera.next(SOON).unwrap().unwrap();
            assert_eq!((frame.sequence, frame.data), (sequence, FrameData::Jpeg(samples::jpeg(8, 6, 1))));
        }
        let stats = camera.stats();
        assert_eq!((stats.frames, stats.reconnects, stats.stalls), (3, 2, 0));
        assert!(stats.corrupt >= 2, "{stats:?}");
        assert!(record.count("rpicam-vid ended with exit status: 7: camera fell off; next attempt in") >= 2);
        assert_eq!(std::fs::read_to_string(folder.path().join("lives")).unwrap().lines().count(), 3);
    }

    #[test]
    fn a_program_that_falls_silent_is_ended_and_started_again() {
        let folder = folder("echo $$ >> lives; cat one.jpg; exec sleep 1000");
        let record = Record::default();
        let options = CameraOptions { stall_after: Duration::from_millis(50), ..quick(&record) };
        let mut camera = camera(&folder, "", &options);
        assert!(camera.next(SOON).unwrap().is_some() && camera.next(SOON).unwrap().is_some());
        assert_eq!((camera.stats().stalls, camera.stats().reconnects), (1, 1));
        assert_eq!(record.count("silent for 0.1 s; next attempt"), 1, "{:?}", record.lines());
        drop(camera);
        for id in std::fs::read_to_string(folder.path().join("lives")).unwrap().lines() {
            assert!(!std::path::Path::new("/proc").join(id).exists(), "{id} still runs");
        }
    }

    #[test]
    fn a_program_that_never_gives_a_picture_is_an_error() {
        let folder = folder("echo '*** no cameras available ***' >&2; exit 255");
        let record = Record::default();
        let mut camera = camera(&folder, "", &quick(&record));
        let error = camera.next(SOON).unwrap_err();
        assert!(!error.is_timeout());
        assert_eq!(error.to_string(), "rpicam://0: rpicam-vid ended with exit status: 255: *** no cameras available ***");
        assert!(camera.next(SOON).unwrap().is_none());
    }

    #[test]
    fn the_arguments_reach_the_program() {
        let folder = folder("echo \"$@\" > arguments; cat one.jpg; cat");
        let mut camera = camera(&folder, "--camera 0  --output -", &CameraOptions::default());
        assert!(camera.next(SOON).unwrap().is_some());
        let arguments = std::fs::read_to_string(folder.path().join("arguments")).unwrap();
        assert_eq!(arguments, "--camera 0 --output -\n");
    }

    #[test]
    fn a_program_is_asked_to_end() {
        // What ends it is in a file; a blank line says nothing.
        let folder = folder(
            "trap 'echo asked > end; exit 0' TERM; cat one.jpg; echo first >&2; echo >&2; \
             while :; do sleep 0.02; [ ! -e fall ] || exit 3; done",
        );
        let record = Record::default();
        let mut camera = camera(&folder, "", &quick(&record));
        assert!(camera.next(SOON).unwrap().is_some());
        std::fs::write(folder.path().join("fall"), b"").unwrap();
        assert!(camera.next(SOON).unwrap().is_some());
        assert_eq!(record.count("ended with exit status: 3: first; next attempt"), 1, "{:?}", record.lines());
        std::fs::remove_file(folder.path().join("fall")).unwrap();
        let asked = || std::fs::read_to_string(folder.path().join("end")).unwrap_or_default();
        assert_eq!(asked(), "");
        let mut other = self::camera(&folder, "", &quick(&record));
        assert!(other.next(SOON).unwrap().is_some());
        drop(other);
        assert_eq!(asked(), "asked\n");
    }

    #[test]
    fn wishes_become_arguments() {
        let call = |uri: &str| {
            let mut uri = CameraUri::parse(uri).unwrap();
            let options = uri.wishes(&CameraOptions::default()).unwrap();
            let call = if uri.scheme() == "csi" { csi } else { rpicam }(&mut uri, &options).unwrap();
            uri.finish().unwrap();
            (call.arguments, call.what)
        };
        let has = |uri: &str, parts: &[&str], lacks: &[&str], what: &str| {
            let (arguments, found) = call(uri);
            assert!(parts.iter().all(|part| arguments.contains(part)), "{uri}: {arguments}");
            assert!(!lacks.iter().any(|part| arguments.contains(part)), "{uri}: {arguments}");
            assert_eq!(found, what);
        };
        let usual = ["--camera 0 --codec mjpeg", "--width 640 --height 480 --framerate 10 --nopreview --timeout 0", "--output -"];
        has("rpicam://", &usual, &["flip"], "640x480, 10/s");
        let wished = ["--camera 1 ", "--width 320 --height 240 --framerate 2.5 ", "--output - --hflip --vflip"];
        has("rpicam://1?size=320x240&fps=2.5&hflip=1&vflip=1", &wished, &[], "320x240, 2.5/s");
        has("rpicam://0?vflip=1&hflip=0", &["--output - --vflip"], &["hflip"], "640x480, 10/s");

        let usual =
            ["sensor-id=0 !", "flip-method=0 !", "width=640,height=480 !", "framerate=10000/1000 ! jpegenc", "fdsink fd=1"];
        has("csi://0", &usual, &[], "640x480, 10/s");
        let wished = ["sensor-id=1 !", "flip-method=2 !", "width=1280,height=720 !", "framerate=2500/1000 ! jpegenc"];
        has("csi://1?size=1280x720&fps=2.5&rotate=1", &wished, &[], "1280x720, 2.5/s");
    }

    #[test]
    fn what_cannot_be_opened() {
        let error = |uri: &str| super::super::open(uri, &CameraOptions::default()).err().unwrap().to_string();
        assert!(error("rpicam://front").contains("front is no number of a camera"));
        assert!(error("csi://0?zoom=2").contains("does not know the wish zoom"));
        let source = Program {
            names: vec!["a".to_owned(), "b".to_owned()],
            folders: Vec::new(),
            arguments: Vec::new(),
            what: String::new(),
            max_frame_bytes: 1,
        };
        let options = CameraOptions { wait_for_camera: true, ..CameraOptions::default() };
        let error = Recovering::open("rpicam://0".to_owned(), source, &options).err().unwrap().to_string();
        assert_eq!(error, "rpicam://0: none of these programs is installed: a, b");
    }
}
