//! Why a camera gives no picture.

use std::io;
use std::time::Duration;

use crate::source::SourceError;

/// Why a camera cannot be opened, or gave no picture.
#[derive(Debug, thiserror::Error)]
pub enum CameraError {
    /// A camera URI that asks for what its kind does not know.
    #[error("{uri}: {reason}")]
    BadUri {
        /// The URI as given.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No camera is of this kind.
    #[error("{uri}: {scheme}:// is no kind of camera; there are paths, file://, {}", super::schemes())]
    UnknownScheme {
        /// The URI as given.
        uri: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// A file or folder of pictures that cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The camera cannot be opened, or was lost before its first picture.
    #[error("{camera}: {fault}")]
    Fault {
        /// Name of the camera.
        camera: String,
        /// What happened.
        fault: Fault,
    },
    /// No picture came in time; the next may.
    #[error("{camera}: no picture within {:.1} s", waited.as_secs_f64())]
    Timeout {
        /// Name of the camera.
        camera: String,
        /// How long was waited.
        waited: Duration,
    },
}

impl CameraError {
    /// Whether asking again may give a picture.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }
}

/// What happens to cameras.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No such device, or nobody at the address.
    #[error("not there: {0}")]
    Missing(String),
    /// Another program has it.
    #[error("busy: another program is using it")]
    Busy,
    /// This user may not open it.
    #[error("not allowed to open it: {0}")]
    Forbidden(String),
    /// It was there and is gone.
    #[error("it was unplugged")]
    Unplugged,
    /// It is there and gives nothing.
    #[error("silent for {:.1} s", .0.as_secs_f64())]
    Stalled(Duration),
    /// The program that reads it is not installed.
    #[error("none of these programs is installed: {}", .0.join(", "))]
    NoProgram(Vec<String>),
    /// The program that reads it ended.
    #[error("{program} ended with {status}{}{said}", if said.is_empty() { "" } else { ": " })]
    Exited {
        /// The program.
        program: String,
        /// Its exit status in words.
        status: String,
        /// The last line it wrote to standard error.
        said: String,
    },
    /// The other side closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The other side answered, and not with pictures.
    #[error("the server answered {0}")]
    Refused(String),
    /// What came is not of the form it must have.
    #[error("{0}")]
    Protocol(String),
    /// It cannot give what is needed.
    #[error("{0}")]
    Unsupported(String),
    /// The system's reason.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Fault {
    /// Whether no amount of waiting helps.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::NoProgram(_) | Self::Unsupported(_))
    }
}
