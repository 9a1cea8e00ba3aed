//! Frames as files in a folder.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use image::ImageFormat;
use image::codecs::jpeg::JpegEncoder;

use super::{Sink, SinkError};
use crate::watch::Captioned;

/// Quality of frames that came as pixels.
const QUALITY: u8 = 90;

/// A frame on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedFrame {
    /// Its file.
    pub path: PathBuf,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// Saves every captioned frame as a file that is named by its time and number.
#[derive(Debug)]
pub struct Saver {
    folder: PathBuf,
}

impl Saver {
    /// Saves into a folder, which is made where it is not there.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn new(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        // Names in a gallery must hold wherever it is opened from.
        Ok(Self { folder: std::path::absolute(folder)? })
    }

    /// Saves a frame as it came, or as JPEG where it came as pixels. On return it is on the disk.
    ///
    /// # Errors
    /// A full disk, or one that fails; the file is then not there.
    pub fn save(&self, captioned: &Captioned) -> io::Result<SavedFrame> {
        let bytes = match &captioned.encoded {
            Some(bytes) => bytes.clone(),
            None => jpeg(captioned)?,
        };
        let ending = match image::guess_format(&bytes) {
            Ok(ImageFormat::Png) => "png",
            Ok(ImageFormat::WebP) => "webp",
            _ => "jpg",
        };
        let time = super::rfc3339(captioned.captured).replace([':', '-'], "");
        let path = self.folder.join(format!("{time}-{}.{ending}", captioned.sequence));
        let beside = path.with_extension("part");
        let write = || -> io::Result<()> {
            let mut file = File::create(&beside)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&beside, &path)
        };
        write().inspect_err(|_| drop(fs::remove_file(&beside)))?;
        Ok(SavedFrame { path, bytes })
    }
}

impl Sink for Saver {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        match self.save(captioned) {
            Ok(_) => Ok(()),
            Err(error) => Err(SinkError::storage(format!("cannot save a frame into {}: {error}", self.folder.display()))),
        }
    }
}

fn jpeg(captioned: &Captioned) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    captioned.image.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY)).map_err(io::Error::other)?;
    Ok(bytes)
}
