//! The one module that maps files into memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, read-only, paged in as they are touched.
#[derive(Debug)]
pub(crate) struct Mapping(Option<memmap2::Mmap>);

impl Mapping {
    /// Maps a regular file.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the mapping is private and read-only, and is handed out as `&[u8]` only, for which any byte is valid. What
        // the compiler must be able to assume is that nobody changes the mapped bytes meanwhile. Bundles are written under
        // another name and renamed (`pack`, the exporter), never changed in place, so the mapped inode stays as it is even when
        // the bundle is replaced. A gallery's search index is made and replaced in the same way; besides, it is appended to, and
        // never shortened (`gallery::index::file`): bytes that hold a whole segment, which its checksum tells, do not change
        // again, and others are not used. Whoever overwrites a file in place while a program uses it can at worst make that
        // program read other numbers or be killed by SIGBUS: every offset into these bytes is checked against the mapping's
        // fixed length.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
