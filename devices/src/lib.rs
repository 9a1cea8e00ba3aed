//! What the runtime sees of the machine it runs on: which board it is and how it is doing, and where pictures come from: the
//! sources that a command line names, and the cameras among them.

#![deny(unsafe_code)]

pub mod board;
pub mod camera;
pub mod source;
pub mod telemetry;
