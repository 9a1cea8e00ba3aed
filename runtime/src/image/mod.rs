//! Pictures: decoding within limits, and preparation of the tensor that the model reads.

mod decode;
mod prepare;

pub use self::decode::{DecodeLimits, ImageError, decode, read, read_from};
pub use self::prepare::{ImagePreparation, ResizeFilter};
