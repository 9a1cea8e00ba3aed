//! What the runtime sees of the machine it runs on: which board it is and how it is doing, where pictures come from, cameras among
//! them, and where captions go: displays and serial lines.

#![deny(unsafe_code)]

pub mod board;
pub mod camera;
#[cfg(feature = "display")]
pub mod display;
#[cfg(all(unix, feature = "serial"))]
pub mod serial;
pub mod source;
pub mod telemetry;
