//! Cameras, behind one trait: whatever gives pictures one after another.
//!
//! | URI | what gives the pictures |
//! |---|---|
//! | a path, `file://…` | a file, a folder, or a `.mjpeg` recording, once through; `?loop=1`, `?every=2s` |
//! | `v4l2:///dev/video0` | a USB camera; `?size=640x480`, `?fps=15`, `?format=mjpeg\|yuyv\|nv12` |
//! | `rpicam://0` | a Raspberry Pi's camera module, through `rpicam-vid`; `?hflip=1`, `?vflip=1` |
//! | `csi://0` | a Jetson's camera module, through GStreamer; `?rotate=1` |
//! | `mjpeg://host:8080/stream` | MJPEG over HTTP |
//! | `test://scenes` | drawn shapes that move; `?seed=7`, `?count=100`, `?change=30` pictures a scene |
//! | `pipe://-` | JPEGs one after another on standard input; `?format=rgb\|yuyv\|nv12&size=640x480` for raw pictures |
//!
//! Pictures are passed on as they came: decoding them, with its limits, is the runtime's.

mod child;
mod error;
mod event;
mod files;
mod http;
mod jpeg;
mod pipe;
mod recovery;
#[cfg(test)]
mod samples;
mod scenes;
mod stream;
mod uri;
mod v4l2;
mod yuv;

use std::time::{Duration, SystemTime};

pub use self::error::{CameraError, Fault};
pub use self::event::{CameraEvent, EventSink};
use self::uri::CameraUri;

/// One picture as it came: encoded, or raw pixels.
#[derive(Clone, PartialEq, Eq)]
pub enum FrameData {
    /// A JPEG, from its start-of-image to its end-of-image marker.
    Jpeg(Vec<u8>),
    /// The contents of a file that is no JPEG: PNG, WebP, or what a decoder will refuse.
    Encoded(Vec<u8>),
    /// Red, green and blue bytes, `[height, width, 3]`.
    Rgb8(Vec<u8>),
}

impl FrameData {
    /// The bytes, whatever they are.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Jpeg(bytes) | Self::Encoded(bytes) | Self::Rgb8(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for FrameData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self {
            Self::Jpeg(_) => "Jpeg",
            Self::Encoded(_) => "Encoded",
            Self::Rgb8(_) => "Rgb8",
        };
        write!(f, "{kind}({} bytes)", self.bytes().len())
    }
}

/// A picture of a camera.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The picture.
    pub data: FrameData,
    /// Pixels in a row; 0 where unknown until decoded.
    pub width: u32,
    /// Rows; 0 where unknown until decoded.
    pub height: u32,
    /// Number among the pictures of this camera, from 0; pictures that the device says it skipped leave a gap.
    pub sequence: u64,
    /// When it was taken, or where the source does not tell, when it had arrived.
    pub captured: SystemTime,
    /// What output calls its source: the file, or the camera's name.
    pub source: String,
}

/// What a camera has been through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CameraStats {
    /// Pictures given.
    pub frames: u64,
    /// Pictures thrown away because they were damaged or cut short.
    pub corrupt: u64,
    /// Times that the source was lost and found again.
    pub reconnects: u64,
    /// Times that the source was silent for longer than allowed.
    pub stalls: u64,
    /// Pictures missing by the device's own sequence numbers.
    pub skipped: u64,
}

/// Whatever gives pictures one after another.
pub trait Camera: Send {
    /// The next picture; `None` once the source has ended, which a live camera never does.
    ///
    /// Faults of a camera that has given pictures are recovered inside, with back-off, counted in [`stats`](Self::stats) and
    /// told to [`CameraOptions::events`]; meanwhile this times out. It may take longer than `timeout` by one attempt to connect.
    ///
    /// # Errors
    /// [`CameraError::Timeout`] where none came in time: ask again. Any other error is final.
    fn next(&mut self, timeout: Duration) -> Result<Option<Frame>, CameraError>;

    /// What this camera has been through so far.
    fn stats(&self) -> CameraStats;

    /// What output calls this camera.
    fn name(&self) -> &str;

    /// Whether pictures are lost when nobody asks for them in time, as of a camera; those of a folder wait.
    fn is_live(&self) -> bool {
        true
    }

    /// For how long its pictures are poor after it was opened, while exposure and white balance find their values.
    fn settling(&self) -> Duration {
        Duration::ZERO
    }
}

/// How long a camera's exposure and white balance take to settle.
const SETTLING: Duration = Duration::from_secs(1);

/// Size asked of a camera unless another is wished: the model looks at fewer pixels still.
const DEFAULT_SIZE: (u32, u32) = (640, 480);

/// Wishes and limits; see [`open`]. A wish written into the URI (`?size=640x480&fps=10`) goes before one given here.
#[derive(Debug, Clone)]
pub struct CameraOptions {
    /// Wished width and height, in pixels; the camera gives the nearest it has.
    pub size: Option<(u32, u32)>,
    /// Wished pictures a second; the camera gives the nearest it has.
    pub fps: Option<f32>,
    /// Silence after which a source counts as stalled and is opened anew.
    pub stall_after: Duration,
    /// Longest wait for a connection, and for its first answer.
    pub connect_timeout: Duration,
    /// Wait before the first new attempt after a fault; doubled with each that fails.
    pub first_retry: Duration,
    /// Longest wait between attempts.
    pub longest_retry: Duration,
    /// Largest picture, in bytes as it comes.
    pub max_frame_bytes: usize,
    /// Whether a camera that is not there, or busy, when it is opened is waited for as one that was lost later.
    pub wait_for_camera: bool,
    /// Who is told what happens to the camera.
    pub events: EventSink,
}

impl Default for CameraOptions {
    /// 640x480 or the next larger that the camera has, at its own rate; 5 s of silence are a stall; retries after 0.25 s to 15 s; pictures up to 32 MiB.
    fn default() -> Self {
        Self {
            size: None,
            fps: None,
            stall_after: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            first_retry: Duration::from_millis(250),
            longest_retry: Duration::from_secs(15),
            max_frame_bytes: 32 << 20,
            wait_for_camera: false,
            events: EventSink::default(),
        }
    }
}

/// Opens what a URI names; the table of kinds is the module's.
///
/// # Errors
/// A URI of no known kind or with a wish that cannot be met; a camera that is not there, is busy, or cannot give pictures, unless
/// [`CameraOptions::wait_for_camera`] is set.
pub fn open(uri: &str, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let uri = CameraUri::parse(uri)?;
    match uri.scheme() {
        "file" => files::open(uri, options),
        "v4l2" => v4l2::open(uri, options),
        "rpicam" => child::open_rpicam(uri, options),
        "csi" => child::open_csi(uri, options),
        "mjpeg" => http::open(&uri, options),
        "pipe" => pipe::open(uri, options),
        "test" => scenes::open(uri, options),
        scheme => Err(CameraError::UnknownScheme { uri: uri.given().to_owned(), scheme: scheme.to_owned() }),
    }
}

/// Schemes of cameras; paths and `file://` are not among them.
pub(crate) const SCHEMES: [&str; 6] = ["v4l2", "rpicam", "csi", "mjpeg", "pipe", "test"];

/// Whether a URI's scheme is a camera's.
pub(crate) fn is_scheme(scheme: &str) -> bool {
    SCHEMES.iter().any(|known| scheme.eq_ignore_ascii_case(known))
}

/// The schemes in words.
pub(crate) fn schemes() -> String {
    SCHEMES.map(|scheme| format!("{scheme}://")).join(", ")
}
