//! Exact search. The index bounds every picture's product with the query; those that may be among the best are looked at again
//! in full. Where there is no index, every embedding is read.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rusqlite::{Row, ToSql};

use super::embedding::{dot, values};
use super::index::{self, Unavailable};
use super::indexing::NoIndex;
use super::quantize::{Query, below};
use super::{Gallery, GalleryError, Time};

/// How often a search begins again where another process is ahead of it, before it takes the index for another gallery's.
const TURNS: usize = 3;

/// Which pictures are considered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Not before this time.
    pub since: Option<Time>,
    /// Not after this time.
    pub until: Option<Time>,
    /// Sources that begin with this.
    pub source: Option<String>,
}

/// A picture that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hit {
    /// Path or URI.
    pub source: String,
    /// Cosine similarity with the query, in −1..=1.
    pub score: f32,
    /// Caption, where one was made.
    pub caption: Option<String>,
    /// When the picture was taken or last changed.
    pub time: Time,
}

/// What a search gives.
#[derive(Debug)]
pub struct Found {
    /// The pictures, best first.
    pub hits: Vec<Hit>,
    /// How they were found; it makes no difference to what is found.
    pub method: Method,
}

/// How pictures were found.
#[derive(Debug)]
pub enum Method {
    /// Through the index.
    Index {
        /// Embeddings that were read in full.
        rescored: usize,
    },
    /// By reading every embedding, which is as fast: the gallery is small, or very many pictures are alike.
    Scan,
    /// By reading every embedding, because there is no index.
    ScanWithoutIndex(Unavailable),
}

/// Score and row; equal scores rank older rows first, so that results do not depend on the heap.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    id: i64,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The best so many.
struct Best {
    count: usize,
    heap: BinaryHeap<Reverse<Candidate>>,
}

impl Best {
    fn new(count: usize) -> Self {
        Self { count, heap: BinaryHeap::new() }
    }

    fn offer(&mut self, candidate: Candidate) {
        self.heap.push(Reverse(candidate));
        if self.heap.len() > self.count {
            self.heap.pop();
        }
    }

    /// The worst score, once there are as many as asked for.
    fn worst_of_full(&self) -> Option<f32> {
        if self.heap.len() < self.count {
            return None;
        }
        self.heap.peek().map(|Reverse(candidate)| candidate.score)
    }

    fn sorted(self) -> Vec<Candidate> {
        // Ascending by the reversed order.
        self.heap.into_sorted_vec().into_iter().map(|Reverse(candidate)| candidate).collect()
    }
}

impl Gallery {
    /// Calls `visit` with `(id, source)` and the embedding's bytes of every picture that passes the filter.
    pub(super) fn each_embedding(
        &self,
        filter: &Filter,
        mut visit: impl FnMut(&Row, &[u8]) -> Result<(), GalleryError>,
    ) -> Result<(), GalleryError> {
        let since = filter.since.map_or(i64::MIN, Time::milliseconds);
        let until = filter.until.map_or(i64::MAX, Time::milliseconds);
        let prefix = filter.source.clone().unwrap_or_default();
        let parameters: [&dyn ToSql; 3] = [&since, &until, &prefix];
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT id, source, embedding FROM pictures
                 WHERE time BETWEEN ?1 AND ?2 AND substr(source, 1, length(?3)) = ?3 ORDER BY id",
            )
            .map_err(|e| self.fault(e))?;
        let mut rows = statement.query(&parameters[..]).map_err(|e| self.fault(e))?;
        while let Some(row) = rows.next().map_err(|e| self.fault(e))? {
            let embedding = row.get_ref(2).map_err(|e| self.fault(e))?;
            let bytes = embedding
                .as_blob()
                .map_err(|_| GalleryError::Damaged { path: self.path.clone(), reason: "an embedding is no blob".to_owned() })?;
            if bytes.len() != 4 * self.width {
                let source: String = row.get(1).map_err(|e| self.fault(e))?;
                return Err(self.cut_embedding(&source, bytes.len()));
            }
            visit(row, bytes)?;
        }
        Ok(())
    }

    pub(super) fn cut_embedding(&self, source: &str, bytes: usize) -> GalleryError {
        GalleryError::Damaged {
            path: self.path.clone(),
            reason: format!("the embedding of {source} has {bytes} bytes, not {}", 4 * self.width),
        }
    }

    pub(super) fn no_numbers(&self, source: &str) -> GalleryError {
        GalleryError::Damaged {
            path: self.path.clone(),
            reason: format!("the embedding of {source} holds values that are no numbers"),
        }
    }

    /// The `count` pictures most similar to a unit vector, best first.
    ///
    /// # Errors
    /// A query of another width, a damaged file.
    pub fn search(&self, query: &[f32], filter: &Filter, count: usize) -> Result<Vec<Hit>, GalleryError> {
        Ok(self.find(query, filter, count)?.hits)
    }

    /// The `count` pictures most similar to a unit vector, best first, and how they were found.
    ///
    /// # Errors
    /// A query of another width, a damaged file.
    pub fn find(&self, query: &[f32], filter: &Filter, count: usize) -> Result<Found, GalleryError> {
        if query.len() != self.width {
            return Err(GalleryError::Width { found: query.len(), expected: self.width });
        }
        self.keep_changes();
        let mut turn = 0;
        loop {
            // All that follows sees the gallery in one state, whoever writes meanwhile.
            let _snapshot = self.connection.unchecked_transaction().map_err(|e| self.fault(e))?;
            if let Some((best, method)) = self.best(query, filter, count, turn == TURNS)? {
                return Ok(Found { hits: self.hits(best)?, method });
            }
            turn += 1;
        }
    }

    /// The best, and how they were found; nothing where the index is of a later state than the transaction, unless `waited`.
    fn best(
        &self,
        query: &[f32],
        filter: &Filter,
        count: usize,
        waited: bool,
    ) -> Result<Option<(Vec<Candidate>, Method)>, GalleryError> {
        let scan = |method| Ok(Some((self.scan(query, filter, count)?, method)));
        let codes = Query::new(query).filter(|_| count > 0);
        let Some(codes) = codes else { return scan(Method::Scan) };
        for _ in 0..2 {
            match self.refresh(waited)? {
                Ok(()) => {}
                Err(NoIndex::NotNeeded) => break,
                Err(NoIndex::Unavailable(reason)) => return scan(Method::ScanWithoutIndex(reason)),
                Err(NoIndex::Later) => return Ok(None),
            }
            let mut held = self.index.borrow_mut();
            let Some(index) = held.as_ref() else { break };
            let candidates = index.candidates(&codes, filter, count);
            // As many alike: reading all in order is faster than so many one by one.
            if candidates.len() > 1000 + index.pictures() / 4 {
                break;
            }
            match self.rescore(query, &candidates, count)? {
                Some((best, rescored)) => return Ok(Some((best, Method::Index { rescored }))),
                // One is gone and no trigger told: the index is worth nothing.
                None => {
                    *held = None;
                    drop(std::fs::remove_file(self.index_path()));
                }
            }
        }
        scan(Method::Scan)
    }

    /// The best of the candidates by their products in full, and how many were looked at; nothing where one is not in the
    /// gallery.
    fn rescore(
        &self,
        query: &[f32],
        candidates: &[index::Candidate],
        count: usize,
    ) -> Result<Option<(Vec<Candidate>, usize)>, GalleryError> {
        let mut statement =
            self.connection.prepare_cached("SELECT source, embedding FROM pictures WHERE id = ?1").map_err(|e| self.fault(e))?;
        let mut best = Best::new(count);
        let mut rescored = 0;
        for candidate in candidates {
            if best.worst_of_full().is_some_and(|worst| below(candidate.upper, worst)) {
                break;
            }
            let mut rows = statement.query([candidate.id]).map_err(|e| self.fault(e))?;
            let Some(row) = rows.next().map_err(|e| self.fault(e))? else { return Ok(None) };
            let embedding = row.get_ref(1).ok().and_then(|blob| blob.as_blob().ok()).unwrap_or_default();
            if embedding.len() != 4 * self.width {
                return Ok(None);
            }
            best.offer(Candidate { score: self.product(query, embedding, row, 0)?, id: candidate.id });
            rescored += 1;
        }
        Ok(Some((best.sorted(), rescored)))
    }

    /// The best of all pictures, by reading every embedding.
    fn scan(&self, query: &[f32], filter: &Filter, count: usize) -> Result<Vec<Candidate>, GalleryError> {
        let mut best = Best::new(count);
        self.each_embedding(filter, |row, embedding| {
            let id = row.get(0).map_err(|e| self.fault(e))?;
            best.offer(Candidate { score: self.product(query, embedding, row, 1)?, id });
            Ok(())
        })?;
        Ok(best.sorted())
    }

    /// The product of a query and a stored embedding of a row whose column `source` holds the picture's.
    fn product(&self, query: &[f32], embedding: &[u8], row: &Row<'_>, source: usize) -> Result<f32, GalleryError> {
        let score = dot(query, embedding);
        // A NaN would rank above all.
        if score.is_finite() {
            return Ok(score);
        }
        let source: String = row.get(source).map_err(|e| self.fault(e))?;
        Err(self.no_numbers(&source))
    }

    fn hits(&self, best: Vec<Candidate>) -> Result<Vec<Hit>, GalleryError> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT source, caption, time FROM pictures WHERE id = ?1")
            .map_err(|e| self.fault(e))?;
        best.into_iter()
            .map(|Candidate { score, id }| {
                statement
                    .query_row([id], |row| {
                        Ok(Hit { source: row.get(0)?, score, caption: row.get(1)?, time: Time::from_milliseconds(row.get(2)?) })
                    })
                    .map_err(|e| self.fault(e))
            })
            .collect()
    }

    /// Every picture with its embedding, in the order of adding.
    ///
    /// # Errors
    /// A damaged file, or what `visit` returns.
    pub fn each<E: From<GalleryError>>(&self, mut visit: impl FnMut(Hit, Vec<f32>) -> Result<(), E>) -> Result<(), E> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT source, caption, time, embedding FROM pictures ORDER BY id")
            .map_err(|e| self.fault(e))?;
        let mut rows = statement.query([]).map_err(|e| self.fault(e))?;
        while let Some(row) = rows.next().map_err(|e| self.fault(e))? {
            let read = || -> rusqlite::Result<(Hit, Vec<f32>)> {
                let bytes: Vec<u8> = row.get(3)?;
                let time = Time::from_milliseconds(row.get(2)?);
                Ok((Hit { source: row.get(0)?, score: 1.0, caption: row.get(1)?, time }, values(&bytes).collect()))
            };
            let (hit, embedding) = read().map_err(|e| self.fault(e))?;
            if embedding.len() != self.width {
                return Err(self.cut_embedding(&hit.source, 4 * embedding.len()).into());
            }
            visit(hit, embedding)?;
        }
        Ok(())
    }
}
