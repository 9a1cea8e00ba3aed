//! Where captions go.

mod display;
#[cfg(feature = "gallery")]
mod gallery;
mod json_lines;
mod saved;
mod serial;
mod terminal;

use std::fmt;
use std::io;

pub use self::display::DisplaySink;
#[cfg(feature = "gallery")]
pub use self::gallery::GallerySink;
pub use self::json_lines::{JsonLines, ModelNames};
pub use self::saved::{SavedFrame, Saver};
pub use self::serial::SerialSink;
pub use self::terminal::Terminal;
use super::{Captioned, Counts, Say};

/// A file that could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// The file.
    pub source: String,
    /// Its number, counted by the camera.
    pub sequence: u64,
    /// What is wrong with it.
    pub error: String,
}

/// Somewhere that captions go. All sinks of a watch are called one after another on one thread: whoever needs long has a thread
/// of its own.
pub trait Sink: Send {
    /// A frame was captioned.
    ///
    /// # Errors
    /// Where it could not be put out.
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError>;

    /// A frame was looked at and had nothing new.
    ///
    /// # Errors
    /// Where that could not be put out.
    fn unchanged(&mut self, _counts: &Counts, _temperature_c: Option<f32>) -> Result<(), SinkError> {
        Ok(())
    }

    /// A file could not be decoded.
    ///
    /// # Errors
    /// Where that could not be put out.
    fn bad(&mut self, _bad: &Bad) -> Result<(), SinkError> {
        Ok(())
    }

    /// The camera gives no frames, and why, or gives frames again.
    ///
    /// # Errors
    /// Where that could not be put out.
    fn camera_fault(&mut self, _fault: Option<&str>) -> Result<(), SinkError> {
        Ok(())
    }

    /// The watch is over: what is still to be put out is put out now.
    ///
    /// # Errors
    /// Where something could not be put out.
    fn finish(&mut self, _counts: &Counts) -> Result<(), SinkError> {
        Ok(())
    }
}

/// Why a sink did not put something out.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The output of the whole command cannot be written: the watch ends.
    #[error(transparent)]
    Output(#[from] io::Error),
    /// It is told and counted, and the watch goes on.
    #[error("{sentence}")]
    Failed {
        /// What it is.
        kind: FailureKind,
        /// What happened.
        sentence: String,
    },
}

impl SinkError {
    fn storage(error: impl fmt::Display) -> Self {
        Self::Failed { kind: FailureKind::Storage, sentence: error.to_string() }
    }

    fn device(error: impl fmt::Display) -> Self {
        Self::Failed { kind: FailureKind::Device, sentence: error.to_string() }
    }
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A display or a serial line.
    Device,
    /// A gallery or a folder.
    Storage,
}

/// How often sinks failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failures {
    /// Displays and serial lines.
    pub device: u64,
    /// Galleries and folders.
    pub storage: u64,
    last: String,
}

impl Failures {
    /// Counts a failure, and tells of it unless it is the same as the one before.
    pub(super) fn note(&mut self, kind: FailureKind, sentence: &str, say: &Say) {
        match kind {
            FailureKind::Device => self.device += 1,
            FailureKind::Storage => self.storage += 1,
        }
        if self.last != sentence {
            sentence.clone_into(&mut self.last);
            say(sentence);
        }
    }
}

/// A time as output writes it: RFC 3339 in UTC, to the millisecond.
fn rfc3339(time: std::time::SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}
