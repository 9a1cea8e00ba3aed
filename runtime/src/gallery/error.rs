//! Why a gallery could not be used, and what SQLite's reasons mean here.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

/// Why a gallery could not be used.
#[derive(Debug, thiserror::Error)]
pub enum GalleryError {
    /// There is no such file.
    #[error("there is no gallery {}; `unimo index add` makes one", path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// There is no such folder.
    #[error("gallery {} cannot be made: there is no folder {}", path.display(), folder.display())]
    NoFolder {
        /// The file.
        path: PathBuf,
        /// Where it would lie.
        folder: PathBuf,
    },
    /// A file of another kind.
    #[error("{} is not a gallery", path.display())]
    NotAGallery {
        /// The file.
        path: PathBuf,
    },
    /// Made by a later version.
    #[error("gallery {} has schema {found}, this version reads up to {supported}: update unimo", path.display())]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// What this version reads.
        supported: i64,
    },
    /// Made with another model.
    #[error("gallery {} was made with another model (bundle {}…, not {}…), and their embeddings cannot be compared: name that bundle with --bundle, or index the pictures again into a new gallery", path.display(), short(found), short(expected))]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// The bundle it was made with.
        found: String,
        /// The bundle in use.
        expected: String,
    },
    /// The disk is full.
    #[error("gallery {}: the disk is full; everything acknowledged before is stored", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The file is damaged.
    #[error("gallery {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An embedding that no bundle of this gallery makes.
    #[error("an embedding of {found} values does not go into a gallery of {expected}")]
    Width {
        /// Values given.
        found: usize,
        /// Values of the gallery's embeddings.
        expected: usize,
    },
    /// An embedding that is not a direction: no model of ours makes it, and nothing would be found by it.
    #[error("the embedding of {picture} has length {length}, not 1")]
    NotUnit {
        /// Its source.
        picture: String,
        /// The length found.
        length: f32,
    },
    /// The system refuses to read or write: a limit on file sizes, a card that fails.
    #[error("gallery {} cannot be read or written ({reason}); everything acknowledged before is stored", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// SQLite's reason.
        reason: String,
    },
    /// Lies where nothing can be written, with a log that has to be.
    #[error("gallery {} lies where nothing can be written, and its last changes are still in {}-wal: open it once where they can be moved into it (`unimo index stats`)", path.display(), path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
    /// Anything else that SQLite reports.
    #[error("gallery {}: {source}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// SQLite's errors in the gallery's words.
pub(super) fn fault(path: &Path, source: rusqlite::Error) -> GalleryError {
    let path = path.to_path_buf();
    match source.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => GalleryError::Full { path },
        Some(ErrorCode::SystemIoFailure) => GalleryError::Disk { path, reason: source.to_string() },
        Some(ErrorCode::NotADatabase) => GalleryError::NotAGallery { path },
        Some(ErrorCode::DatabaseCorrupt) => GalleryError::Damaged { path, reason: source.to_string() },
        _ => GalleryError::Sqlite { path, source },
    }
}
