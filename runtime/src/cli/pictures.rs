//! Reading the pictures named on the command line.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use unimo::image::{DecodeLimits, ImageError, decode, read, read_from};
use unimo_devices::camera::{self, CameraError, CameraEvent, CameraOptions, EventSink, FrameData};
use unimo_devices::source::place;
pub use unimo_devices::source::{Picture, pictures as find};

/// How long a camera may take for its first picture.
const FIRST_PICTURE: Duration = Duration::from_secs(15);

/// Why a picture could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Camera(#[from] CameraError),
    #[error("{0}: it ended without giving a picture")]
    NoPicture(String),
}

/// Reads and decodes a picture; of a camera, the next one.
pub fn load(picture: &Picture) -> Result<RgbImage, PictureError> {
    let limits = DecodeLimits::default();
    match picture {
        Picture::File(path) => Ok(read(path, &limits)?),
        Picture::Stdin => Ok(read_from(io::stdin().lock(), Path::new("-"), &limits)?),
        Picture::Camera(uri) => photograph(uri, &limits),
    }
}

/// Takes one picture, once the camera's exposure has settled; what goes wrong with the camera meanwhile is told on standard error.
fn photograph(uri: &str, limits: &DecodeLimits) -> Result<RgbImage, PictureError> {
    let events = EventSink::new(|camera, event| {
        if !matches!(event, CameraEvent::Opened { .. } | CameraEvent::Ended) {
            eprintln!("{camera}: {event}");
        }
    });
    let mut camera = camera::open(uri, &CameraOptions { events, ..CameraOptions::default() })?;
    let no_picture = || PictureError::NoPicture(uri.to_owned());
    let mut frame = camera.next(FIRST_PICTURE)?.ok_or_else(no_picture)?;
    let first = Instant::now();
    while first.elapsed() < camera.settling() {
        match camera.next(FIRST_PICTURE)? {
            Some(next) => frame = next,
            None => break,
        }
    }
    match frame.data {
        FrameData::Jpeg(bytes) | FrameData::Encoded(bytes) => Ok(decode(&bytes, limits)?),
        FrameData::Rgb8(pixels) => RgbImage::from_raw(frame.width, frame.height, pixels).ok_or_else(no_picture),
    }
}

/// Whether arguments name one picture and no folder, so that its name need not be said.
pub fn is_single(arguments: &[String]) -> bool {
    match arguments {
        [argument] => !matches!(place(argument), Ok(Picture::File(path)) if path.is_dir()),
        _ => false,
    }
}
