//! Where pictures come from: the sources that a command line names, as the runtime sees them.

#![deny(unsafe_code)]

pub mod source;
