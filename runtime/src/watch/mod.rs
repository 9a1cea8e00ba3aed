//! Watching a camera: capture, inference and output at the same time, for as long as it takes.
//!
//! Three threads work side by side. One takes frames from the camera into a [`slot`] with room for one, where the newest wins;
//! one shows them to the model, behind a [`gate`] that keeps back scenes that have not changed; one hands captions to the
//! [`sink`]s. Between the second and the third there is room for two captions, so that memory stays flat whatever is slow:
//! frames are then dropped, and counted. Pictures of a folder are not dropped but wait.

pub mod gate;
mod pipeline;
pub mod seldom;
pub mod sink;
pub mod slot;

use std::fmt;
use std::time::{Duration, SystemTime};

use image::RgbImage;
use unimo_devices::camera::{CameraError, CameraStats};

pub use self::pipeline::Watch;
use crate::captioning::{Caption, DecodeOptions};
use crate::image::ImageError;
use crate::model::{Model, ModelError, Vision};

/// What looks at frames and captions them.
pub trait Captioner: Sync {
    /// What one look gives.
    type Seen;

    /// Looks at a frame.
    ///
    /// # Errors
    /// Where the model cannot be run; the watch ends then.
    fn see(&self, image: &RgbImage) -> Result<Self::Seen, ModelError>;

    /// The embedding of what was seen, of unit length.
    fn embedding<'a>(&self, seen: &'a Self::Seen) -> &'a [f32];

    /// Captions what was seen.
    ///
    /// # Errors
    /// Those of [`Self::see`].
    fn caption(&self, seen: &Self::Seen) -> Result<Caption, ModelError>;
}

/// A model, and how it is to caption.
pub struct ModelCaptioner<'a> {
    /// The model.
    pub model: &'a Model,
    /// How captions are decoded.
    pub options: DecodeOptions,
}

impl Captioner for ModelCaptioner<'_> {
    type Seen = Vision;

    fn see(&self, image: &RgbImage) -> Result<Vision, ModelError> {
        self.model.see(image)
    }

    fn embedding<'a>(&self, seen: &'a Vision) -> &'a [f32] {
        &seen.embedding
    }

    fn caption(&self, seen: &Vision) -> Result<Caption, ModelError> {
        self.model.caption(seen, &self.options)
    }
}

/// How to watch.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Least time from one look to the next.
    pub every: Option<Duration>,
    /// Ends after so many looks at frames that could be decoded.
    pub frames: Option<u64>,
    /// Ends after so long.
    pub duration: Option<Duration>,
    /// Cosine distance to the last captioned frame under which a frame is not captioned.
    pub gate: Option<f32>,
    /// Every frame of a live camera waits for its turn, as pictures of a folder do.
    pub in_turn: bool,
}

/// A captioned frame.
#[derive(Debug, Clone)]
pub struct Captioned {
    /// What output calls its source.
    pub source: String,
    /// Whether it is one of a camera, and not a file.
    pub live: bool,
    /// Its number, counted by the camera.
    pub sequence: u64,
    /// When it was captured.
    pub captured: SystemTime,
    /// The file it came as; none where the camera gave pixels.
    pub encoded: Option<Vec<u8>>,
    /// Its pixels.
    pub image: RgbImage,
    /// Its embedding, of unit length.
    pub embedding: Vec<f32>,
    /// Its caption.
    pub caption: Caption,
    /// What it took.
    pub times: Times,
    /// What there was until now.
    pub counts: Counts,
    /// The board's temperature, where it can be read.
    pub temperature_c: Option<f32>,
}

/// How long the parts of the work on a frame took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// Decoding the picture, and comparing its pixels.
    pub decode_image: Duration,
    /// Looking at it.
    pub vision: Duration,
    /// Writing the caption.
    pub text: Duration,
}

impl Times {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.decode_image + self.vision + self.text
    }
}

/// What became of the frames so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// What the camera has been through.
    pub camera: CameraStats,
    /// Frames that were captioned.
    pub captioned: u64,
    /// Frames not shown to the model, because their pixels had not changed.
    pub same_pixels: u64,
    /// Frames shown to the model and not captioned, because the scene had not changed.
    pub same_scene: u64,
    /// Frames dropped because the model or the output was at work.
    pub dropped: u64,
    /// Frames passed over between two looks, as asked for.
    pub between: u64,
    /// Frames that could not be decoded.
    pub undecodable: u64,
}

impl Counts {
    /// Frames that were decoded and looked at, if only at their pixels.
    #[must_use]
    pub fn looks(&self) -> u64 {
        self.captioned + self.unchanged()
    }

    /// Frames that were not captioned because nothing had changed.
    #[must_use]
    pub fn unchanged(&self) -> u64 {
        self.same_pixels + self.same_scene
    }

    /// Frames that were damaged, found out by the camera or the decoder.
    #[must_use]
    pub fn corrupt(&self) -> u64 {
        self.camera.corrupt + self.undecodable
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} frames: {} captioned, {} unchanged ({} by their pixels, {} by their embedding), {} dropped, {} between looks, {} corrupt",
            self.camera.frames,
            self.captioned,
            self.unchanged(),
            self.same_pixels,
            self.same_scene,
            self.dropped,
            self.between,
            self.corrupt(),
        )?;
        let CameraStats { reconnects, stalls, skipped, .. } = self.camera;
        write!(f, "; {reconnects} reconnects, {stalls} stalls, {skipped} skipped by the camera")
    }
}

/// Why a watch came to its end without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The source has no more pictures.
    Source,
    /// As many frames were looked at as asked for.
    Frames,
    /// The time is over.
    Duration,
    /// [`Watch::interrupt`] was called.
    Interrupted,
    /// Whoever reads the output has seen enough.
    Output,
}

/// Why a watch could not go on.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The camera is at fault.
    #[error(transparent)]
    Camera(#[from] CameraError),
    /// The model is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[source] std::io::Error),
}

/// A frame that could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Its file is damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It came as pixels, and their number is another than its size says.
    #[error("{bytes} bytes are no picture of {width}x{height} pixels")]
    Size {
        /// Bytes that came.
        bytes: usize,
        /// Pixels in a row, as the camera says.
        width: u32,
        /// Rows, as the camera says.
        height: u32,
    },
}

/// How a watch went.
#[derive(Debug)]
pub struct Summary {
    /// What became of the frames.
    pub counts: Counts,
    /// From its beginning to its end.
    pub elapsed: Duration,
    /// Times that sinks failed.
    pub failures: sink::Failures,
    /// Why it ended.
    pub ended: Result<Ended, WatchError>,
}

/// Who is told what goes wrong, a sentence at a time.
pub type Say = dyn Fn(&str) + Send + Sync;
