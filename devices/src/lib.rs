//! Where pictures come from and captions go: the sources that a command line names, the cameras among them, displays and serial
//! lines, as the runtime sees them.

#![deny(unsafe_code)]

pub mod camera;
#[cfg(feature = "display")]
pub mod display;
#[cfg(all(unix, feature = "serial"))]
pub mod serial;
pub mod source;
