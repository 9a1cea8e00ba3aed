//! Keeps the search index what the gallery is: opens it, takes in what has changed, writes it down, makes it anew.

use std::path::PathBuf;

use rusqlite::Row as Record;

use super::embedding::values;
use super::index::{FLUSH, Flushed, Index, MOST_IN_MEMORY, Revision, Row, Unavailable};
use super::{BUSY, Gallery, GalleryError, Time, beside, changes};

/// Pictures from which on an index is made: reading the embeddings of fewer takes about a millisecond.
pub(super) const WORTH_INDEXING: usize = 1000;

/// Why a search has no index.
#[derive(Debug)]
pub(super) enum NoIndex {
    /// The gallery is small, or damaged where a search may not meet it.
    NotNeeded,
    /// It cannot be had.
    Unavailable(Unavailable),
    /// Its file is of a later state than the transaction sees: another process has gone on meanwhile.
    Later,
}

/// What can go wrong while an index is made or brought up to date.
enum Fault {
    Index(Unavailable),
    Gallery(GalleryError),
    Later,
}

impl From<Unavailable> for Fault {
    fn from(error: Unavailable) -> Self {
        Self::Index(error)
    }
}

impl From<GalleryError> for Fault {
    fn from(error: GalleryError) -> Self {
        Self::Gallery(error)
    }
}

impl Gallery {
    /// The file of the search index, beside the gallery's. It can be deleted at any time.
    #[must_use]
    pub fn index_path(&self) -> PathBuf {
        beside(&self.path, "-index")
    }

    /// Brings the search index up to date, so that the next search need not.
    ///
    /// # Errors
    /// A damaged gallery. An index that cannot be made is none: searches then say so.
    pub fn prepare_search(&self) -> Result<(), GalleryError> {
        self.keep_changes();
        let _snapshot = self.connection.unchecked_transaction().map_err(|e| self.fault(e))?;
        // One that is ahead of this transaction is as good.
        self.refresh(false).map(drop)
    }

    /// Sees to it that the gallery keeps a list of its changes, as far as can be done at once: galleries of earlier versions
    /// keep none, and are then searched as those versions do.
    pub(super) fn keep_changes(&self) {
        let begin = || -> rusqlite::Result<()> {
            if changes::are_kept(&self.connection)? {
                return Ok(());
            }
            self.connection.busy_timeout(std::time::Duration::ZERO)?;
            let transaction = rusqlite::Transaction::new_unchecked(&self.connection, rusqlite::TransactionBehavior::Immediate)?;
            changes::begin(&transaction)?;
            transaction.commit()
        };
        // What fails here is found missing in `refresh`.
        let _ = begin();
        let _ = self.connection.busy_timeout(BUSY);
    }

    /// Makes `self.index` a copy of what the open transaction sees. One of a later state is made again only where `waited`, as one
    /// of another gallery is.
    pub(super) fn refresh(&self, waited: bool) -> Result<Result<(), NoIndex>, GalleryError> {
        let mut held = self.index.borrow_mut();
        if held.is_none() && self.is_small().map_err(|e| self.fault(e))? {
            return Ok(Err(NoIndex::NotNeeded));
        }
        let latest = || if changes::are_kept(&self.connection)? { changes::latest(&self.connection) } else { Ok(None) };
        let Some(latest) = latest().map_err(|e| self.fault(e))? else {
            *held = None;
            return Ok(Err(NoIndex::Unavailable(Unavailable::NoChanges)));
        };
        // In use already, and right: the usual case.
        if held.as_ref().is_some_and(|index| index.revision() == latest) {
            return Ok(Ok(()));
        }
        match self.current(held.take(), latest, waited) {
            Ok(index) => {
                *held = Some(index);
                Ok(Ok(()))
            }
            // Searching without the index finds the same, and says whose embedding is damaged if it is met.
            Err(Fault::Gallery(GalleryError::Damaged { .. })) => Ok(Err(NoIndex::NotNeeded)),
            Err(Fault::Gallery(error)) => Err(error),
            Err(Fault::Later) => Ok(Err(NoIndex::Later)),
            Err(Fault::Index(error)) => Ok(Err(NoIndex::Unavailable(error))),
        }
    }

    fn is_small(&self) -> rusqlite::Result<bool> {
        let mut statement = self.connection.prepare_cached("SELECT count(*) FROM (SELECT 1 FROM pictures LIMIT ?1)")?;
        let pictures: usize = statement.query_row([WORTH_INDEXING as i64], |row| row.get::<_, i64>(0)).map(|n| n as usize)?;
        Ok(pictures < WORTH_INDEXING)
    }

    /// An index of the latest state, from the one in use, the file, or the gallery.
    fn current(&self, mut held: Option<Index>, latest: Revision, waited: bool) -> Result<Index, Fault> {
        let path = self.index_path();
        let ours = |index: Index| match changes::reach_back_to(&self.connection, index.revision()) {
            Ok(reached) => Ok(reached.then_some(index)),
            Err(error) => Err(self.fault(error)),
        };
        for attempt in 0..2 {
            let mut found = held.take().map(ours).transpose()?.flatten();
            if found.is_none() {
                let opened = Index::open(&path, self.width);
                if !waited && opened.as_ref().is_some_and(|index| index.revision().number > latest.number) {
                    return Err(Fault::Later);
                }
                found = opened.map(ours).transpose()?.flatten();
            }
            let Some(mut index) = found else { break };
            let changed = changes::since(&self.connection, index.revision()).map_err(|e| self.fault(e))?;
            if index.unwritten() + changed.len() > MOST_IN_MEMORY {
                break;
            }
            for id in changed {
                self.picture(id, |row| Ok(index.change(id, row)?))?;
            }
            index.reached(latest);
            if !index.is_worn() {
                if index.unwritten() < FLUSH {
                    return Ok(index);
                }
                match index.flush() {
                    Ok(Flushed::Yes) => return Ok(index),
                    // The file is not what it was when it was opened: once more, with what it is now.
                    Ok(Flushed::FileChanged) if attempt == 0 => continue,
                    Ok(Flushed::FileChanged) => {}
                    Err(_) => return Ok(index),
                }
            }
            return match self.build(latest) {
                Err(Fault::Index(_)) => Ok(index),
                result => result,
            };
        }
        self.build(latest)
    }

    fn build(&self, latest: Revision) -> Result<Index, Fault> {
        Index::build(&self.index_path(), self.width, latest, |visit| {
            let mut statement = self
                .connection
                .prepare_cached("SELECT id, source, time, embedding FROM pictures ORDER BY id")
                .map_err(|e| self.fault(e))?;
            let mut records = statement.query([]).map_err(|e| self.fault(e))?;
            let mut embedding = Vec::with_capacity(self.width);
            while let Some(record) = records.next().map_err(|e| self.fault(e))? {
                visit(&self.row(record, &mut embedding)?)?;
            }
            Ok(())
        })
    }

    /// Calls `visit` with a picture, or with nothing where there is none.
    fn picture(&self, id: i64, visit: impl FnOnce(Option<&Row<'_>>) -> Result<(), Fault>) -> Result<(), Fault> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT id, source, time, embedding FROM pictures WHERE id = ?1")
            .map_err(|e| self.fault(e))?;
        let mut records = statement.query([id]).map_err(|e| self.fault(e))?;
        match records.next().map_err(|e| self.fault(e))? {
            Some(record) => visit(Some(&self.row(record, &mut Vec::new())?)),
            None => visit(None),
        }
    }

    /// A record of `id, source, time, embedding` as the index takes it.
    fn row<'a>(&self, record: &'a Record<'_>, embedding: &'a mut Vec<f32>) -> Result<Row<'a>, GalleryError> {
        let odd = |reason: &str| GalleryError::Damaged { path: self.path.clone(), reason: reason.to_owned() };
        let id: i64 = record.get(0).map_err(|e| self.fault(e))?;
        let source = record.get_ref(1).ok().and_then(|source| source.as_str().ok()).ok_or_else(|| odd("a source is no text"))?;
        let time: i64 = record.get(2).map_err(|_| odd("a time is no number"))?;
        let blob = record.get_ref(3).ok().and_then(|blob| blob.as_blob().ok()).ok_or_else(|| odd("an embedding is no blob"))?;
        if blob.len() != 4 * self.width {
            return Err(self.cut_embedding(source, blob.len()));
        }
        embedding.clear();
        embedding.extend(values(blob));
        if !embedding.iter().all(|value| value.is_finite()) {
            return Err(self.no_numbers(source));
        }
        Ok(Row { id, source, time: Time::from_milliseconds(time), embedding })
    }
}
