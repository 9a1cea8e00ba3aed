//! Reading the pictures named on the command line.

use std::io;
use std::path::Path;

use image::RgbImage;
use unimo::image::{DecodeLimits, ImageError, read, read_from};
use unimo_devices::source::place;
pub use unimo_devices::source::{Picture, pictures as find};

/// Reads and decodes a picture.
pub fn load(picture: &Picture) -> Result<RgbImage, ImageError> {
    let limits = DecodeLimits::default();
    match picture {
        Picture::File(path) => read(path, &limits),
        Picture::Stdin => read_from(io::stdin().lock(), Path::new("-"), &limits),
    }
}

/// Whether arguments name one picture and no folder, so that its name need not be said.
pub fn is_single(arguments: &[String]) -> bool {
    match arguments {
        [argument] => !matches!(place(argument), Ok(Picture::File(path)) if path.is_dir()),
        _ => false,
    }
}
