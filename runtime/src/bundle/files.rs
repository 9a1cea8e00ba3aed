//! Where a bundle's bytes lie: a folder, a `.tar`, or this very program.

use std::collections::BTreeMap;
use std::io::{self, Cursor};
use std::ops::{Deref, Range};
use std::path::{Component, Path};
use std::sync::Arc;

use super::BundleFault;
use crate::map::Mapping;

/// Bytes that stay where they are: a mapped file, a part of the program, or memory of their own.
#[derive(Debug)]
pub(super) enum Backing {
    Mapped(Mapping),
    Embedded(&'static [u8]),
    Owned(Vec<u8>),
}

impl Deref for Backing {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(mapping) => mapping,
            Self::Embedded(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// The bytes of a file of a bundle. Clones are the same bytes, which stay for as long as one of them is held.
#[derive(Debug, Clone)]
pub struct SharedBytes {
    backing: Arc<Backing>,
    range: Range<usize>,
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.backing.get(self.range.clone()).unwrap_or_default()
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), backing: Arc::new(Backing::Owned(bytes)) }
    }
}

/// The files of a bundle by their path inside it.
#[derive(Debug)]
pub(super) enum Files {
    Folder(BTreeMap<String, SharedBytes>),
    Archive { bytes: Arc<Backing>, members: BTreeMap<String, Range<usize>> },
}

impl Files {
    /// An unpacked bundle; files are mapped by [`Self::require`].
    pub(super) fn folder() -> Self {
        Self::Folder(BTreeMap::new())
    }

    /// An uncompressed tar archive; members are slices of it.
    pub(super) fn archive(bytes: Backing) -> Result<Self, BundleFault> {
        let members = members(&bytes).map_err(BundleFault::Archive)?;
        Ok(Self::Archive { bytes: Arc::new(bytes), members })
    }

    /// Makes sure that a file is there, mapping it where it lies in a folder.
    pub(super) fn require(&mut self, root: &Path, file: &str) -> Result<(), BundleFault> {
        if !is_inside(file) {
            return Err(BundleFault::UnsafePath { file: file.to_owned() });
        }
        match self {
            Self::Folder(maps) => {
                let map = Mapping::open(&root.join(file)).map_err(|source| match source.kind() {
                    io::ErrorKind::NotFound => BundleFault::MissingFile { file: file.to_owned() },
                    _ => BundleFault::Unreadable { file: file.to_owned(), source },
                })?;
                let range = 0..map.len();
                maps.insert(file.to_owned(), SharedBytes { backing: Arc::new(Backing::Mapped(map)), range });
                Ok(())
            }
            Self::Archive { members, .. } if members.contains_key(file) => Ok(()),
            Self::Archive { .. } => Err(BundleFault::MissingFile { file: file.to_owned() }),
        }
    }

    /// The bytes of a file that was [required](Self::require).
    pub(super) fn get(&self, file: &str) -> Option<&[u8]> {
        match self {
            Self::Folder(maps) => maps.get(file).map(|map| &**map),
            Self::Archive { bytes, members } => bytes.get(members.get(file)?.clone()),
        }
    }

    /// The same, to be held for longer than this.
    pub(super) fn share(&self, file: &str) -> Option<SharedBytes> {
        match self {
            Self::Folder(maps) => maps.get(file).cloned(),
            Self::Archive { bytes, members } => Some(SharedBytes { backing: bytes.clone(), range: members.get(file)?.clone() }),
        }
    }
}

/// Whether a path names something below the bundle's root and nothing else.
fn is_inside(file: &str) -> bool {
    !file.is_empty() && !file.contains('\\') && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Where each regular file of a tar archive lies in it.
fn members(bytes: &[u8]) -> io::Result<BTreeMap<String, Range<usize>>> {
    let mut members = BTreeMap::new();
    let mut archive = tar::Archive::new(Cursor::new(bytes));
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if entry.header().entry_type() != tar::EntryType::Regular {
            continue;
        }
        let path = entry.path()?;
        let name = path.strip_prefix(".").unwrap_or(&path).to_string_lossy().into_owned();
        let range = usize::try_from(entry.raw_file_position())
            .ok()
            .zip(usize::try_from(entry.size()).ok())
            .and_then(|(start, size)| Some(start..start.checked_add(size)?))
            .filter(|range| range.end <= bytes.len())
            .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, format!("cut short inside {name}")))?;
        members.insert(name, range);
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        for (file, inside) in [
            ("manifest.toml", true),
            ("f16/weights.bin", true),
            ("../secret", false),
            ("f16/../../secret", false),
            ("/etc/passwd", false),
            ("..\\secret", false),
            ("", false),
        ] {
            assert_eq!(is_inside(file), inside, "{file:?}");
        }
    }

    #[test]
    fn finds_members_and_their_end() {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in [("./a.txt", b"first".as_slice()), ("d/b.txt", b"second")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, content).unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let found = members(&bytes).unwrap();
        assert_eq!(&bytes[found["a.txt"].clone()], b"first");
        assert_eq!(&bytes[found["d/b.txt"].clone()], b"second");
        let error = members(&bytes[..found["d/b.txt"].start + 2]).unwrap_err();
        assert!(error.to_string().contains("cut short inside d/b.txt"), "{error}");
    }
}
