//! Where pictures come from: the sources that a command line names, and the cameras among them, as the runtime sees them.

#![deny(unsafe_code)]

pub mod camera;
pub mod source;
