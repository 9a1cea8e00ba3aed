//! The search index: every embedding in 8 bits, in a file beside the gallery that is mapped, not read, and a few in memory.
//!
//! It is a copy of what the store holds, made to be scanned, and can be deleted at any time. It names the store's revision that
//! it is a copy of; what has changed since is taken in before a search, and written behind the rest once it is worth it. A copy
//! of another store, of another course of the same store's history, or a damaged one is never searched, but made anew.
//!
//! Nothing here knows how the store stores.

mod file;
mod rows;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

pub use self::rows::{Row, Rows};

use self::file::{Appended, Draft, IndexFile};
use self::rows::Columns;
use super::Filter;
use super::quantize::{Block, MAX_WIDTH, Query, below};

/// Changes that are kept in memory before they are written to the file: writing each would make many small segments, and
/// reading so many again in each process takes a millisecond.
pub const FLUSH: usize = 256;
/// Changes that are held in memory where the file cannot be written: 20 MB at a width of 256.
pub const MOST_IN_MEMORY: usize = 1 << 16;
/// Rows of a segment of a new file: as much as is held in memory while it is written.
const SEGMENT_ROWS: usize = 1 << 14;
/// Rows that are bounded at once: their codes stay in the nearest cache.
const BLOCK_ROWS: usize = 256;

/// A state of the store: the number of its last change, and a random number drawn at that change, so that two histories that
/// part and count on are told apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Revision {
    /// Ascending.
    pub number: i64,
    /// Random.
    pub token: i64,
}

/// Why there is no index to search with.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The file cannot be written or read.
    #[error("the search index {} cannot be made: {source}", path.display())]
    Unwritable {
        /// The index's file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Somebody else makes it at this moment.
    #[error("another program is making the search index {}", path.display())]
    Busy {
        /// The index's file.
        path: PathBuf,
    },
    /// Embeddings wider than the arithmetic allows.
    #[error("embeddings of {width} values are too wide for a search index, which takes up to {MAX_WIDTH}")]
    Width {
        /// The width.
        width: usize,
    },
    /// An embedding that cannot be quantized.
    #[error("the embedding of {source_name} cannot be indexed")]
    Row {
        /// Its source.
        source_name: String,
    },
    /// The store numbers no changes.
    #[error("the gallery keeps no list of its changes, and cannot be given one")]
    NoChanges,
}

/// A picture that may be among the best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// At least its product with the query.
    pub upper: f32,
    /// Its number in the store.
    pub id: i64,
}

/// What became of an attempt to write changes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// They are in the file.
    Yes,
    /// Another process has replaced the file or gone on with it, or it has been cut short.
    FileChanged,
}

/// An index in use.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    width: usize,
    file: IndexFile,
    /// Pictures changed since the file's revision.
    tail: Rows,
    /// Where in the tail a picture's latest row lies.
    in_tail: HashMap<i64, usize>,
    /// Rows that are no picture's latest any more, of the file and then of the tail.
    dead: Bits,
    /// Those of the file's that are dead since its revision.
    newly_dead: Vec<u64>,
    /// Changes taken in since the file's revision.
    unwritten: usize,
    revision: Revision,
}

/// A set of row numbers.
#[derive(Debug, Default)]
struct Bits {
    words: Vec<u64>,
    count: usize,
}

impl Bits {
    fn insert(&mut self, row: usize) {
        if self.words.len() <= row / 64 {
            self.words.resize(row / 64 + 1, 0);
        }
        self.count += usize::from(!self.contains(row));
        self.words[row / 64] |= 1 << (row % 64);
    }

    fn contains(&self, row: usize) -> bool {
        self.words.get(row / 64).is_some_and(|word| word >> (row % 64) & 1 == 1)
    }
}

impl Index {
    /// Opens the index in a file; nothing where there is none that can be used.
    #[must_use]
    pub fn open(path: &Path, width: usize) -> Option<Self> {
        let file = IndexFile::open(path, width).ok()??;
        Some(Self::of(file, path, width))
    }

    fn of(file: IndexFile, path: &Path, width: usize) -> Self {
        let mut dead = Bits::default();
        for number in file.dead() {
            if let Ok(row) = usize::try_from(number)
                && row < file.rows()
            {
                dead.insert(row);
            }
        }
        Self {
            path: path.to_path_buf(),
            width,
            revision: file.revision(),
            file,
            tail: Rows::default(),
            in_tail: HashMap::new(),
            dead,
            newly_dead: Vec::new(),
            unwritten: 0,
        }
    }

    /// Makes the file anew from all pictures of a store, which `each` calls its argument with, ids ascending.
    ///
    /// # Errors
    /// A file that cannot be written, a picture that cannot be indexed, or what `each` returns.
    pub fn build<E: From<Unavailable>>(
        path: &Path,
        width: usize,
        revision: Revision,
        each: impl FnOnce(&mut dyn FnMut(&Row<'_>) -> Result<(), E>) -> Result<(), E>,
    ) -> Result<Self, E> {
        if width > MAX_WIDTH {
            return Err(Unavailable::Width { width }.into());
        }
        let mut draft = Draft::begin(path, width)?;
        let mut rows = Rows::default();
        let filled = each(&mut |row| {
            if rows.len() == SEGMENT_ROWS {
                draft.write(&rows, None)?;
                rows.clear();
            }
            Ok(push(&mut rows, row)?)
        });
        let written = filled.and_then(|()| Ok(draft.write(&rows, Some(revision))?));
        if let Err(error) = written {
            draft.give_up();
            return Err(error);
        }
        draft.finish()?;
        let unreadable = || Unavailable::Unwritable { path: path.to_path_buf(), source: io::ErrorKind::InvalidData.into() };
        Ok(Self::open(path, width).ok_or_else(unreadable)?)
    }

    /// The revision whose content this is.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Pictures.
    #[must_use]
    pub fn pictures(&self) -> usize {
        self.file.rows() + self.tail.len() - self.dead.count
    }

    /// Changes that are only in memory.
    #[must_use]
    pub fn unwritten(&self) -> usize {
        self.unwritten
    }

    /// Whether so much of the file is dead that it should be made anew.
    #[must_use]
    pub fn is_worn(&self) -> bool {
        self.dead.count > FLUSH && self.dead.count > self.pictures() / 4
    }

    /// Takes in what a changed picture is now; nothing where it is gone.
    ///
    /// # Errors
    /// A picture that cannot be indexed; the index is of no use any more then.
    pub fn change(&mut self, id: i64, now: Option<&Row<'_>>) -> Result<(), Unavailable> {
        self.unwritten += 1;
        if let Some(row) = self.in_tail.remove(&id) {
            self.dead.insert(self.file.rows() + row);
        } else if let Some(row) = self.file.rows_of(id).find(|&row| !self.dead.contains(row)) {
            self.dead.insert(row);
            self.newly_dead.push(row as u64);
        }
        if let Some(row) = now {
            push(&mut self.tail, row)?;
            self.in_tail.insert(id, self.tail.len() - 1);
        }
        Ok(())
    }

    /// All changes up to this revision have been taken in.
    pub fn reached(&mut self, revision: Revision) {
        self.revision = revision;
    }

    /// Writes the changes in memory behind the rest of the file, where it still is the file that was opened; else all is as it was.
    ///
    /// # Errors
    /// A file that cannot be written, or that somebody else writes.
    pub fn flush(&mut self) -> Result<Flushed, Unavailable> {
        // By id, as in every segment.
        let mut latest: Vec<(i64, usize)> = self.in_tail.iter().map(|(&id, &row)| (id, row)).collect();
        latest.sort_unstable();
        let rows: Vec<usize> = latest.into_iter().map(|(_, row)| row).collect();
        let rows = self.tail.picked(&rows, self.width);
        if self.file.append(&self.path, &rows, &self.newly_dead, self.revision)? != Appended::Yes {
            return Ok(Flushed::FileChanged);
        }
        match Self::open(&self.path, self.width) {
            // Not where another process has gone on already.
            Some(grown) if grown.revision == self.revision => {
                *self = grown;
                Ok(Flushed::Yes)
            }
            _ => Ok(Flushed::FileChanged),
        }
    }

    /// The pictures that may be among the `count` best of those that pass the filter, the likeliest first: all whose product
    /// may be as large as the `count`-th largest lower bound.
    #[must_use]
    pub fn candidates(&self, query: &Query, filter: &Filter, count: usize) -> Vec<Candidate> {
        let mut best = Best { count, lowest: BinaryHeap::new(), candidates: Vec::new(), threshold: f32::NEG_INFINITY };
        let mut block = Block::default();
        for (first, columns) in self.file.segments().chain([(self.file.rows(), self.tail.columns())]) {
            self.scan(first, columns, query, filter, &mut best, &mut block);
        }
        best.finish()
    }

    fn scan(&self, first: usize, columns: Columns<'_>, query: &Query, filter: &Filter, best: &mut Best, block: &mut Block) {
        let stride = super::quantize::stride(self.width);
        let blocks = columns.codes.chunks(BLOCK_ROWS * stride);
        let scales = columns.scales.chunks(BLOCK_ROWS).zip(columns.errors.chunks(BLOCK_ROWS));
        for (number, (codes, (scales, errors))) in blocks.zip(scales).enumerate() {
            if !query.bound(codes, scales, errors, best.threshold, block) {
                continue;
            }
            for i in 0..scales.len() {
                let upper = block.upper[i];
                let row = number * BLOCK_ROWS + i;
                if !below(upper, best.threshold) && !self.dead.contains(first + row) && passes(filter, &columns, row) {
                    best.offer(Candidate { upper, id: columns.id(row) }, query.lower(block, i, columns.scale(row)));
                }
            }
        }
    }
}

fn push(rows: &mut Rows, row: &Row<'_>) -> Result<(), Unavailable> {
    if rows.push(row) { Ok(()) } else { Err(Unavailable::Row { source_name: row.source.to_owned() }) }
}

fn passes(filter: &Filter, columns: &Columns<'_>, row: usize) -> bool {
    filter.since.is_none_or(|since| columns.time(row) >= since)
        && filter.until.is_none_or(|until| columns.time(row) <= until)
        && filter.source.as_ref().is_none_or(|prefix| columns.source(row).starts_with(prefix.as_bytes()))
}

/// The largest lower bounds so far, and who may still be among the best.
struct Best {
    count: usize,
    /// The `count` largest lower bounds.
    lowest: BinaryHeap<Reverse<Ordered>>,
    candidates: Vec<Candidate>,
    /// The smallest of them, once there are so many.
    threshold: f32,
}

/// A number that is one.
#[derive(PartialEq)]
struct Ordered(f32);

impl Eq for Ordered {}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Best {
    fn offer(&mut self, candidate: Candidate, lower: f32) {
        self.candidates.push(candidate);
        if lower.is_nan() {
            return;
        }
        self.lowest.push(Reverse(Ordered(lower)));
        if self.lowest.len() > self.count {
            self.lowest.pop();
        }
        if self.lowest.len() == self.count
            && let Some(Reverse(Ordered(lowest))) = self.lowest.peek()
        {
            self.threshold = *lowest;
        }
        // What fell behind meanwhile is dropped now and then, so that this stays short.
        if self.candidates.len() > 1024 && self.candidates.len().is_power_of_two() {
            self.drop_the_hopeless();
        }
    }

    fn drop_the_hopeless(&mut self) {
        let threshold = self.threshold;
        self.candidates.retain(|candidate| !below(candidate.upper, threshold));
    }

    fn finish(mut self) -> Vec<Candidate> {
        self.drop_the_hopeless();
        self.candidates.sort_by(|a, b| b.upper.total_cmp(&a.upper).then(a.id.cmp(&b.id)));
        self.candidates
    }
}
