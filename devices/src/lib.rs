//! Where pictures come from: the sources that a command line names, as the runtime sees them.

#![deny(unsafe_code)]

#[cfg(feature = "display")]
pub mod display;
#[cfg(all(unix, feature = "serial"))]
pub mod serial;
pub mod source;
