//! The index's file: what is in it, and how it is written so that nobody ever reads half of it.
//!
//! ```text
//! header   64 bytes: "unimo-ix", version u32, width u32, random number u64, CRC-32 of all before u32, zeros
//! segment  64 bytes: "segm", flags u32 (1: complete), rows u64, dead u64, bytes of sources u64, first row u64,
//!                    revision i64, token i64, CRC-32 of all before and of the columns u32, zeros
//!          codes [rows, stride] i8 · ids [rows] i64 · times [rows] i64 (ms) · scales [rows] f32 · errors [rows] f32 ·
//!          ends of sources [rows] u32 · numbers of the rows that are dead from here on [dead] u64 · sources, UTF-8
//! …        further segments, each at a multiple of 64
//! ```
//!
//! Little-endian. The content is that of all segments up to the last one marked complete, as of its revision; what follows, and
//! a segment with a wrong checksum and all behind it, does not count.
//!
//! A file is made under another name and renamed; it grows at its end only, by whoever holds its lock, and only where all of it
//! is valid; no byte changes and none is cut off. So whatever a process has mapped and checked stays as it is. Nothing here is
//! synced to the disk: what a power cut loses fails its checksum and is made again from the gallery.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::super::quantize::stride;
use super::rows::{Columns, ROW_BYTES, Rows};
use super::{Revision, Unavailable};
use crate::map::Mapping;

const MAGIC: &[u8; 8] = b"unimo-ix";
const VERSION: u32 = 1;
const SEGMENT_MAGIC: &[u8; 4] = b"segm";
/// Size of the headers, and what segments begin at multiples of.
const BLOCK: usize = 64;
/// The file is what its store was at the revision of this segment.
const COMPLETE: u32 = 1;

/// Where the parts of a segment lie in the file.
#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Of the columns.
    start: usize,
    rows: usize,
    dead: usize,
    sources: usize,
    first_id: i64,
    last_id: i64,
}

/// A mapped, checked index file.
#[derive(Debug)]
pub(super) struct IndexFile {
    map: Mapping,
    width: usize,
    segments: Vec<Segment>,
    /// Where the last complete segment ends.
    end: usize,
    rows: usize,
    revision: Revision,
}

/// What became of an attempt to append.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Appended {
    /// The segment is in the file.
    Yes,
    /// The file is not the one that was read: another process has replaced it or appended to it.
    Elsewhere,
    /// The file ends in something that is not valid, and must be made anew.
    Torn,
}

impl IndexFile {
    /// Maps and checks a file; nothing where it is none, or holds no complete content for embeddings of this width.
    pub fn open(path: &Path, width: usize) -> io::Result<Option<Self>> {
        let map = Mapping::open(path)?;
        let Some(header) = map.get(..BLOCK) else { return Ok(None) };
        let sound = header[..8] == *MAGIC
            && u32_at(header, 8) == VERSION
            && u32_at(header, 12) as usize == width
            && u32_at(header, 24) == crc32fast::hash(&header[..24]);
        if !sound {
            return Ok(None);
        }
        let mut file = Self { map, width, segments: Vec::new(), end: BLOCK, rows: 0, revision: Revision::default() };
        let found = file.read_segments();
        Ok(found.then_some(file))
    }

    /// Takes in the segments up to the last complete one; gives whether there is one.
    fn read_segments(&mut self) -> bool {
        let (mut at, mut rows, mut complete) = (self.end, self.rows, 0);
        let mut segments = Vec::new();
        while let Some((segment, revision)) = self.segment_at(at, rows) {
            at = (segment.start + segment.length(self.width)).next_multiple_of(BLOCK);
            rows += segment.rows;
            segments.push(segment);
            if let Some(revision) = revision {
                complete = segments.len();
                (self.end, self.rows, self.revision) = (at, rows, revision);
            }
        }
        segments.truncate(complete);
        self.segments = segments;
        complete > 0
    }

    /// The segment at an offset, checked, and the revision that it completes.
    fn segment_at(&self, at: usize, first_row: usize) -> Option<(Segment, Option<Revision>)> {
        let header = self.map.get(at..at.checked_add(BLOCK)?)?;
        if header[..4] != *SEGMENT_MAGIC || u64_at(header, 32) != first_row as u64 {
            return None;
        }
        let count = |at: usize| usize::try_from(u64_at(header, at)).ok();
        let (rows, dead, sources) = (count(8)?, count(16)?, count(24)?);
        let fixed = rows.checked_mul(stride(self.width) + ROW_BYTES)?;
        let length = fixed.checked_add(dead.checked_mul(8)?)?.checked_add(sources)?;
        let start = at + BLOCK;
        let body = self.map.get(start..start.checked_add(length)?)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..56]);
        crc.update(body);
        if crc.finalize() != u32_at(header, 56) {
            return None;
        }
        let mut segment = Segment { start, rows, dead, sources, first_id: i64::MAX, last_id: i64::MIN };
        let columns = self.columns_of(&segment);
        if rows > 0 {
            (segment.first_id, segment.last_id) = (columns.id(0), columns.id(rows - 1));
        }
        let revision = Revision { number: i64_at(header, 40), token: i64_at(header, 48) };
        Some((segment, (u32_at(header, 4) & COMPLETE != 0).then_some(revision)))
    }

    fn columns_of(&self, segment: &Segment) -> Columns<'_> {
        let Segment { start, rows, dead, sources, .. } = *segment;
        let (codes, rest) = self.map[start..].split_at(rows * stride(self.width));
        let (ids, rest) = rest.split_at(8 * rows);
        let (times, rest) = rest.split_at(8 * rows);
        let (scales, rest) = rest.split_at(4 * rows);
        let (errors, rest) = rest.split_at(4 * rows);
        let (ends, rest) = rest.split_at(4 * rows);
        let sources = &rest[8 * dead..][..sources];
        Columns {
            codes,
            ids: ids.as_chunks().0,
            times: times.as_chunks().0,
            scales: scales.as_chunks().0,
            errors: errors.as_chunks().0,
            ends: ends.as_chunks().0,
            sources,
        }
    }

    /// What the content is as of.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Rows, dead ones too.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Each segment's number of its first row, and its columns.
    pub fn segments(&self) -> impl Iterator<Item = (usize, Columns<'_>)> {
        let mut first = 0;
        self.segments.iter().map(move |segment| {
            first += segment.rows;
            (first - segment.rows, self.columns_of(segment))
        })
    }

    /// Numbers of the dead rows.
    pub fn dead(&self) -> impl Iterator<Item = u64> {
        self.segments.iter().flat_map(|segment| {
            let start = segment.start + segment.rows * (stride(self.width) + ROW_BYTES);
            let numbers: &[[u8; 8]] = self.map[start..][..8 * segment.dead].as_chunks().0;
            numbers.iter().map(|&number| u64::from_le_bytes(number))
        })
    }

    /// Numbers of the rows that ever held an id, the latest first.
    pub fn rows_of(&self, id: i64) -> impl Iterator<Item = usize> {
        let mut first = self.rows;
        self.segments.iter().rev().filter_map(move |segment| {
            first -= segment.rows;
            if !(segment.first_id..=segment.last_id).contains(&id) {
                return None;
            }
            let ids = self.columns_of(segment).ids;
            ids.binary_search_by_key(&id, |&id| i64::from_le_bytes(id)).ok().map(|row| first + row)
        })
    }

    /// Appends a segment that brings the content to a revision.
    pub fn append(&self, path: &Path, rows: &Rows, dead: &[u64], revision: Revision) -> Result<Appended, Unavailable> {
        if self.end != self.map.len() {
            return Ok(Appended::Torn);
        }
        let fault = |source| Unavailable::Unwritable { path: path.to_path_buf(), source };
        let mut file = OpenOptions::new().read(true).append(true).open(path).map_err(fault)?;
        lock(&file, path)?;
        let mut header = [0; BLOCK];
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut header)).map_err(fault)?;
        if header != self.map[..BLOCK] || file.metadata().map_err(fault)?.len() != self.end as u64 {
            return Ok(Appended::Elsewhere);
        }
        file.write_all(&segment(rows, dead, self.rows, Some(revision))).map_err(fault)?;
        Ok(Appended::Yes)
    }
}

impl Segment {
    /// Bytes of the columns.
    fn length(&self, width: usize) -> usize {
        self.rows * (stride(width) + ROW_BYTES) + 8 * self.dead + self.sources
    }
}

/// A file that is being made, under another name.
#[derive(Debug)]
pub(super) struct Draft {
    path: PathBuf,
    name: PathBuf,
    file: File,
    rows: usize,
}

impl Draft {
    /// Begins the file that is to replace `path`.
    pub fn begin(path: &Path, width: usize) -> Result<Self, Unavailable> {
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let name = PathBuf::from(name);
        let fault = |source| Unavailable::Unwritable { path: path.to_path_buf(), source };
        // One that nobody holds was left by a process that was killed.
        if let Ok(left) = File::open(&name) {
            lock(&left, path)?;
            fs::remove_file(&name).or_else(missing_is_fine).map_err(fault)?;
        }
        let mut file = match OpenOptions::new().write(true).create_new(true).open(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Unavailable::Busy { path: path.to_path_buf() });
            }
            result => result.map_err(fault)?,
        };
        lock(&file, path)?;
        let mut header = Vec::with_capacity(BLOCK);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(width as u32).to_le_bytes());
        // Random: `RandomState` is seeded by the system.
        header.extend_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        header.resize(BLOCK, 0);
        let draft = |file| Self { path: path.to_path_buf(), name: name.clone(), file, rows: 0 };
        match file.write_all(&header) {
            Ok(()) => Ok(draft(file)),
            Err(error) => {
                draft(file).give_up();
                Err(fault(error))
            }
        }
    }

    /// Writes a segment; with a revision, the last one.
    pub fn write(&mut self, rows: &Rows, revision: Option<Revision>) -> Result<(), Unavailable> {
        let bytes = segment(rows, &[], self.rows, revision);
        self.rows += rows.len();
        self.file.write_all(&bytes).map_err(|source| Unavailable::Unwritable { path: self.path.clone(), source })
    }

    /// Puts the file where it belongs.
    pub fn finish(self) -> Result<(), Unavailable> {
        // Renamed while the lock is held, so that nobody takes it for one that was left behind.
        fs::rename(&self.name, &self.path).map_err(|source| {
            self.give_up();
            Unavailable::Unwritable { path: self.path.clone(), source }
        })
    }

    /// Removes what was written; whoever makes the next draft does it where this fails.
    pub fn give_up(&self) {
        drop(fs::remove_file(&self.name));
    }
}

fn missing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Takes a file's lock, which ends with the process at the latest.
fn lock(file: &File, path: &Path) -> Result<(), Unavailable> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Unavailable::Busy { path: path.to_path_buf() },
        TryLockError::Error(source) => Unavailable::Unwritable { path: path.to_path_buf(), source },
    })
}

/// The bytes of a segment, padded.
fn segment(rows: &Rows, dead: &[u64], first_row: usize, revision: Option<Revision>) -> Vec<u8> {
    let columns = rows.columns();
    let mut bytes = Vec::with_capacity(2 * BLOCK + columns.codes.len() + ROW_BYTES * rows.len() + columns.sources.len());
    bytes.extend_from_slice(SEGMENT_MAGIC);
    bytes.extend_from_slice(&if revision.is_some() { COMPLETE } else { 0 }.to_le_bytes());
    for count in [rows.len(), dead.len(), columns.sources.len(), first_row] {
        bytes.extend_from_slice(&(count as u64).to_le_bytes());
    }
    let Revision { number, token } = revision.unwrap_or_default();
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&token.to_le_bytes());
    let checksum_at = bytes.len();
    bytes.resize(BLOCK, 0);
    for column in [columns.codes, columns.ids.as_flattened(), columns.times.as_flattened(), columns.scales.as_flattened()] {
        bytes.extend_from_slice(column);
    }
    bytes.extend_from_slice(columns.errors.as_flattened());
    bytes.extend_from_slice(columns.ends.as_flattened());
    bytes.extend(dead.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend_from_slice(columns.sources);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..checksum_at]);
    crc.update(&bytes[BLOCK..]);
    bytes[checksum_at..checksum_at + 4].copy_from_slice(&crc.finalize().to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn i64_at(bytes: &[u8], at: usize) -> i64 {
    i64::from_le_bytes(array(bytes, at))
}
