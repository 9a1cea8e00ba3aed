//! The gallery: pictures' embeddings, captions, times and sources in one SQLite file, bound to the bundle that made them.
//!
//! Writes are transactions with `synchronous = FULL`: what [`Gallery::put`] has returned from survives a power cut, and what it
//! has not leaves no trace. Search is exact: it finds what the dot product with every embedding finds, with the help of an index of
//! all embeddings in 8 bits in a file beside the gallery, which is a copy and can be deleted.

mod changes;
mod embedding;
mod error;
mod index;
mod indexing;
pub mod quantize;
mod search;
mod time;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, params};

use self::embedding::{is_unit, length, values};
pub use self::error::GalleryError;
use self::error::fault;
use self::index::Index;
pub use self::index::Unavailable;
pub use self::search::{Filter, Found, Hit, Method};
pub use self::time::{Time, TimeError};

/// `PRAGMA application_id` of a gallery: "UNIM".
const APPLICATION_ID: i64 = 0x554e_494d;
/// `PRAGMA user_version` that this version writes.
const SCHEMA: i64 = 1;
const BUSY: Duration = Duration::from_secs(10);

/// A picture to store.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Path or URI; one picture a source.
    pub source: String,
    /// SHA-256 of the encoded picture.
    pub hash: [u8; 32],
    /// Unit vector.
    pub embedding: Vec<f32>,
    /// Caption, where one was made.
    pub caption: Option<String>,
    /// When the picture was taken or last changed.
    pub time: Time,
}

/// What a gallery knows of a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing.
    New,
    /// The source, with other content.
    Changed,
    /// The source with this content, and its caption where one was made.
    Unchanged(Option<String>),
}

/// Figures of a gallery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Pictures.
    pub images: u64,
    /// Those with a caption.
    pub captions: u64,
    /// Bundle id.
    pub bundle: String,
    /// Values of an embedding.
    pub width: usize,
    /// Size of the file, with its journal.
    pub bytes: u64,
    /// Size of the search index's file; 0 where there is none.
    pub index_bytes: u64,
}

/// An open gallery.
pub struct Gallery {
    path: PathBuf,
    connection: Connection,
    bundle: String,
    width: usize,
    /// A copy of some state of the pictures, for searching.
    index: RefCell<Option<Index>>,
}

impl Gallery {
    /// Opens a gallery for a bundle, making it where there is none.
    ///
    /// # Errors
    /// A gallery of another model, a newer one, or a file that is none.
    pub fn open_or_create(path: &Path, bundle: &str, width: usize) -> Result<Self, GalleryError> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            return Err(GalleryError::NoFolder { path: path.to_path_buf(), folder: folder.to_path_buf() });
        }
        if path.is_dir() {
            return Err(GalleryError::NotAGallery { path: path.to_path_buf() });
        }
        let mut connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        create(&mut connection, bundle, width).map_err(|source| fault(path, source))?;
        let gallery = Self::checked(path, connection)?;
        gallery.require_bundle(bundle)?;
        Ok(gallery)
    }

    /// Opens a gallery that is there. One on a medium or in a folder that cannot be written is opened for reading.
    ///
    /// # Errors
    /// No such gallery, a newer one, or a file that is none.
    pub fn open(path: &Path) -> Result<Self, GalleryError> {
        if path.is_dir() {
            return Err(GalleryError::NotAGallery { path: path.to_path_buf() });
        }
        if !path.exists() {
            return Err(GalleryError::NotFound { path: path.to_path_buf() });
        }
        match Self::checked(path, connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?) {
            Err(GalleryError::Sqlite { source, .. }) if asks_to_write(&source) => Self::open_immutable(path),
            result => result,
        }
    }

    /// Without a log or locks beside the file, which SQLite would have to make: nobody else can write there either.
    fn open_immutable(path: &Path) -> Result<Self, GalleryError> {
        if std::fs::metadata(beside(path, "-wal")).is_ok_and(|log| log.len() > 0) {
            return Err(GalleryError::ReadOnly { path: path.to_path_buf() });
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
        let uri = PathBuf::from(format!("file:{}?immutable=1", percent_encoded(path)));
        let connection = connect(&uri, flags).map_err(|error| match error {
            GalleryError::Sqlite { source, .. } => fault(path, source),
            other => other,
        })?;
        Self::identified(path, connection)
    }

    fn checked(path: &Path, connection: Connection) -> Result<Self, GalleryError> {
        let gallery = Self::identified(path, connection)?;
        // Only now that the file is known to be ours: the mode is written into it.
        write_ahead(&gallery.connection)
            .and_then(|()| gallery.connection.pragma_update(None, "synchronous", "FULL"))
            .map_err(|source| fault(path, source))?;
        Ok(gallery)
    }

    fn identified(path: &Path, connection: Connection) -> Result<Self, GalleryError> {
        let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let application = pragma("application_id").map_err(|source| fault(path, source))?;
        let schema = pragma("user_version").map_err(|source| fault(path, source))?;
        if application != APPLICATION_ID {
            return Err(GalleryError::NotAGallery { path: path.to_path_buf() });
        }
        if schema > SCHEMA {
            return Err(GalleryError::NewerSchema { path: path.to_path_buf(), found: schema, supported: SCHEMA });
        }
        let (bundle, width) = connection
            .query_row("SELECT bundle, width FROM gallery", [], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)))
            .map_err(|source| fault(path, source))?;
        let width = usize::try_from(width).unwrap_or_default();
        Ok(Self { path: path.to_path_buf(), connection, bundle, width, index: RefCell::default() })
    }

    /// Refuses a gallery of another bundle.
    ///
    /// # Errors
    /// [`GalleryError::OtherModel`].
    pub fn require_bundle(&self, bundle: &str) -> Result<(), GalleryError> {
        if self.bundle == bundle {
            return Ok(());
        }
        Err(GalleryError::OtherModel { path: self.path.clone(), found: self.bundle.clone(), expected: bundle.to_owned() })
    }

    fn fault(&self, source: rusqlite::Error) -> GalleryError {
        fault(&self.path, source)
    }

    /// What is known of a source with this content.
    ///
    /// # Errors
    /// A damaged file.
    pub fn known(&self, source: &str, hash: &[u8; 32]) -> Result<Known, GalleryError> {
        let stored: Option<(Vec<u8>, Option<String>)> = self
            .connection
            .prepare_cached("SELECT hash, caption FROM pictures WHERE source = ?1")
            .and_then(|mut statement| statement.query_row([source], |row| Ok((row.get(0)?, row.get(1)?))).optional())
            .map_err(|e| self.fault(e))?;
        Ok(match stored {
            None => Known::New,
            Some((stored, caption)) if stored == hash => Known::Unchanged(caption),
            Some(_) => Known::Changed,
        })
    }

    /// Stores pictures, all or none; those whose source is there replace it. On return they are on the disk.
    ///
    /// # Errors
    /// A full disk, a damaged file, an embedding of another width.
    pub fn put(&mut self, entries: &[Entry]) -> Result<(), GalleryError> {
        if let Some(entry) = entries.iter().find(|e| e.embedding.len() != self.width) {
            return Err(GalleryError::Width { found: entry.embedding.len(), expected: self.width });
        }
        for entry in entries {
            let length = length(entry.embedding.iter().copied());
            if !is_unit(length) {
                return Err(GalleryError::NotUnit { picture: entry.source.clone(), length });
            }
        }
        let now = Time::now().milliseconds();
        let write = |connection: &mut Connection| -> rusqlite::Result<()> {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            changes::keep(&transaction)?;
            {
                let mut statement = transaction.prepare_cached(
                    "INSERT INTO pictures (source, hash, embedding, caption, time, added) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                     ON CONFLICT (source) DO UPDATE SET hash = excluded.hash, embedding = excluded.embedding,
                     caption = excluded.caption, time = excluded.time, added = excluded.added",
                )?;
                for e in entries {
                    let bytes: Vec<u8> = e.embedding.iter().flat_map(|v| v.to_le_bytes()).collect();
                    statement.execute(params![e.source, &e.hash[..], bytes, e.caption, e.time.milliseconds(), now])?;
                }
            }
            changes::cut(&transaction)?;
            transaction.commit()
        };
        write(&mut self.connection).map_err(|source| fault(&self.path, source))
    }

    /// Forgets sources; gives the number of those that were there.
    ///
    /// # Errors
    /// A full disk or a damaged file.
    pub fn remove(&mut self, sources: &[String]) -> Result<u64, GalleryError> {
        let remove = |connection: &mut Connection| -> rusqlite::Result<u64> {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            changes::keep(&transaction)?;
            let mut removed = 0;
            for source in sources {
                removed += transaction.execute("DELETE FROM pictures WHERE source = ?1", [source])? as u64;
            }
            changes::cut(&transaction)?;
            transaction.commit()?;
            Ok(removed)
        };
        remove(&mut self.connection).map_err(|source| fault(&self.path, source))
    }

    /// Figures.
    ///
    /// # Errors
    /// A damaged file.
    pub fn stats(&self) -> Result<Stats, GalleryError> {
        let (images, captions) = self
            .connection
            .query_row("SELECT count(*), count(caption) FROM pictures", [], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
            })
            .map_err(|e| self.fault(e))?;
        let size = |suffix: &str| std::fs::metadata(beside(&self.path, suffix)).map_or(0, |m| m.len());
        Ok(Stats {
            images: images.unsigned_abs(),
            captions: captions.unsigned_abs(),
            bundle: self.bundle.clone(),
            width: self.width,
            bytes: size("") + size("-wal"),
            index_bytes: size("-index"),
        })
    }

    /// Checks the file's structure and every embedding; gives the number of pictures.
    ///
    /// # Errors
    /// The first damage found.
    pub fn verify(&self) -> Result<u64, GalleryError> {
        let damaged = |reason: String| GalleryError::Damaged { path: self.path.clone(), reason };
        let report: String =
            self.connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(|e| self.fault(e))?;
        if report != "ok" {
            return Err(damaged(report));
        }
        let mut pictures = 0;
        self.each_embedding(&Filter::default(), |row, embedding| {
            pictures += 1;
            let length = length(values(embedding));
            if is_unit(length) {
                return Ok(());
            }
            let source = row.get::<_, String>(1).unwrap_or_default();
            Err(damaged(format!("the embedding of {source} has length {length}, not 1")))
        })?;
        Ok(pictures)
    }
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, GalleryError> {
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(BUSY)?;
        Ok(connection)
    };
    open().map_err(|source| fault(path, source))
}

/// The file that SQLite keeps beside a gallery's.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Whether SQLite failed because it could not write where it had to, if only to read.
fn asks_to_write(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied))
}

/// A path as it stands in a URI.
fn percent_encoded(path: &Path) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.iter().map(|&byte| if keep(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Switches to a write-ahead log, where readers and a writer do not wait for each other.
fn write_ahead(connection: &Connection) -> rusqlite::Result<()> {
    let begun = Instant::now();
    loop {
        let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
        if mode == "wal" {
            return Ok(());
        }
        // While another process creates the gallery, SQLite refuses this at once instead of waiting.
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && begun.elapsed() < BUSY => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Makes a gallery of a file that is empty, as SQLite sees it. All or nothing, so that a creation cut short is begun again, and
/// of two processes one creates; whatever else the file may hold is left as it is.
fn create(connection: &mut Connection, bundle: &str, width: usize) -> rusqlite::Result<()> {
    let objects = |connection: &Connection| -> rusqlite::Result<i64> {
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
    };
    if objects(connection)? > 0 {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if objects(&transaction)? > 0 {
        return Ok(());
    }
    transaction.execute_batch(&format!(
        "CREATE TABLE gallery (bundle TEXT NOT NULL, width INTEGER NOT NULL);
         CREATE TABLE pictures (
             id INTEGER PRIMARY KEY,
             source TEXT NOT NULL UNIQUE,
             hash BLOB NOT NULL,
             embedding BLOB NOT NULL,
             caption TEXT,
             time INTEGER NOT NULL,
             added INTEGER NOT NULL
         );
         PRAGMA application_id = {APPLICATION_ID};
         PRAGMA user_version = {SCHEMA};"
    ))?;
    changes::begin(&transaction)?;
    transaction.execute("INSERT INTO gallery VALUES (?1, ?2)", params![bundle, width as i64])?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_called_so_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("g");
        let entry = |i: u8| Entry {
            source: i.to_string(),
            hash: [i; 32],
            embedding: [1.0].into_iter().chain([0.0; 255]).collect(),
            caption: None,
            time: Time::now(),
        };
        let mut gallery = Gallery::open_or_create(&path, "b", 256).unwrap();
        gallery.connection.pragma_update(None, "max_page_count", 12).unwrap();
        let mut stored = 0;
        let error = loop {
            match gallery.put(&[entry(stored)]) {
                Ok(()) => stored += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, GalleryError::Full { .. }), "{error}");
        assert!(error.to_string().contains("the disk is full"), "{error}");
        assert!(stored > 3);
        drop(gallery);
        assert_eq!(Gallery::open(&path).unwrap().verify().unwrap(), u64::from(stored));
    }
}
