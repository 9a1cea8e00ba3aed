//! What is told about a camera while it is used.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Something that happened to a camera. Its text is a sentence without the camera's name.
#[derive(Debug, Clone, PartialEq)]
pub enum CameraEvent {
    /// It is open; `what` says how: size, format, rate.
    Opened {
        /// How it was opened.
        what: String,
        /// Whether it was lost before.
        again: bool,
    },
    /// It cannot give quite what was wished.
    Adjusted {
        /// The wish.
        wished: String,
        /// What it gives.
        given: String,
    },
    /// It was lost, or could not be opened, and will be tried again.
    Lost {
        /// What happened.
        reason: String,
        /// When the next attempt is.
        retry_in: Duration,
    },
    /// A source that cannot be opened anew is silent.
    Silent {
        /// For how long.
        silent: Duration,
    },
    /// A picture was thrown away.
    Corrupt {
        /// What is wrong with it.
        reason: String,
        /// How many there have been.
        total: u64,
    },
    /// The device dropped pictures by its own count.
    Skipped {
        /// How many since the last picture.
        frames: u64,
        /// How many there have been.
        total: u64,
    },
    /// There are no more pictures.
    Ended,
}

impl fmt::Display for CameraEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opened { what, again: false } => write!(f, "open, {what}"),
            Self::Opened { what, again: true } => write!(f, "open again, {what}"),
            Self::Adjusted { wished, given } => write!(f, "asked for {wished}, gives {given}"),
            Self::Lost { reason, retry_in } => write!(f, "{reason}; next attempt in {:.1} s", retry_in.as_secs_f64()),
            Self::Silent { silent } => write!(f, "silent for {:.1} s", silent.as_secs_f64()),
            Self::Corrupt { reason, total } => write!(f, "picture thrown away: {reason} ({total} so far)"),
            Self::Skipped { frames, total } => write!(f, "the device skipped {frames} ({total} so far)"),
            Self::Ended => write!(f, "no more pictures"),
        }
    }
}

/// Who is told about a camera's events, with the camera's name; nobody by default.
#[derive(Clone, Default)]
pub struct EventSink(Option<Arc<Tell>>);

type Tell = dyn Fn(&str, &CameraEvent) + Send + Sync;

impl EventSink {
    /// Tells `tell`, on the thread that asks the camera for pictures.
    #[must_use]
    pub fn new(tell: impl Fn(&str, &CameraEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    pub(super) fn tell(&self, camera: &str, event: &CameraEvent) {
        if let Some(tell) = &self.0 {
            tell(camera, event);
        }
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "EventSink(set)" } else { "EventSink(nobody)" })
    }
}
