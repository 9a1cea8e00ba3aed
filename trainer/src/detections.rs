//! Detected regions, as in the paper: a detector's features, boxes and class probabilities of every picture, computed elsewhere and
//! read from the tables of the released UNIMO.
//!
//! A table has one picture a line and seven columns, separated by tabs: the picture's name, its width and height in pixels, the
//! number n of regions, and three arrays of little-endian f32 values in base64: boxes `[n, 4]` (x1, y1, x2, y2 in pixels), features
//! `[n, 2048]` and class probabilities `[n, 1601]`. Of the readers that were released, one takes width before height and one height
//! before width; here width comes first, and a line whose boxes lie outside the picture is refused.
//!
//! Tables are read once: what a run needs goes into a cache of half the bits ([`DetectionCache`]).

mod cache;
mod line;

pub(crate) use cache::expand;
pub use cache::{DetectionCache, DetectionFile};
pub use line::{LineError, RegionShapes, parse_line, write_line};
