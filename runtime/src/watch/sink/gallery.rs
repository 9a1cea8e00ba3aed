//! Captions and embeddings in a gallery.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Saver, Sink, SinkError, rfc3339};
use crate::gallery::{Entry, Gallery, Known};
use crate::watch::Captioned;

/// Stores every captioned frame. One that was saved is stored under its file's path, a picture of a folder under its own, and any
/// other under the camera's name and the time.
pub struct GallerySink {
    gallery: Gallery,
    saver: Option<Saver>,
}

impl GallerySink {
    /// Stores into a gallery; frames are saved before, where that is asked for.
    #[must_use]
    pub fn new(gallery: Gallery, saver: Option<Saver>) -> Self {
        Self { gallery, saver }
    }

    fn store(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        let saved = self.saver.as_ref().map(|saver| saver.save(captioned)).transpose();
        let saved = saved.map_err(|error| SinkError::storage(format!("cannot save a frame: {error}")))?;
        let bytes = match (&saved, &captioned.encoded) {
            (Some(saved), _) => &saved.bytes,
            (None, Some(bytes)) => bytes,
            (None, None) => captioned.image.as_raw(),
        };
        let path = saved.as_ref().map(|saved| saved.path.clone()).or_else(|| own_file(captioned));
        let source = path.as_deref().and_then(Path::to_str).map_or_else(|| name(captioned), str::to_owned);
        let hash: [u8; 32] = Sha256::digest(bytes).into();
        if let Known::Unchanged(Some(_)) = self.gallery.known(&source, &hash).map_err(SinkError::storage)? {
            return Ok(());
        }
        let entry = Entry {
            source,
            hash,
            embedding: captioned.embedding.clone(),
            caption: Some(captioned.caption.text.clone()),
            time: captioned.captured.into(),
        };
        self.gallery.put(&[entry]).map_err(SinkError::storage)
    }
}

/// The file of a picture of a folder. A frame of a recording has none of its own.
fn own_file(captioned: &Captioned) -> Option<PathBuf> {
    let bytes = captioned.encoded.as_ref().filter(|_| !captioned.live)?;
    let path = std::path::absolute(&captioned.source).ok()?;
    path.metadata().is_ok_and(|file| file.len() == bytes.len() as u64).then_some(path)
}

fn name(captioned: &Captioned) -> String {
    format!("{}#{}-{}", captioned.source, rfc3339(captioned.captured), captioned.sequence)
}

impl Sink for GallerySink {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        self.store(captioned)
    }
}
