//! Exact search: every embedding's dot product with the query, the best kept in a heap.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rusqlite::{Row, ToSql};

use super::{Gallery, GalleryError, Time};

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

/// The floats of a stored embedding.
pub(super) fn values(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))
}

/// Dot product in 16 running sums, which compilers turn into vector instructions.
fn dot(query: &[f32], stored: &[u8]) -> f32 {
    let (queries, query_rest) = query.as_chunks::<16>();
    let (rows, row_rest) = stored.as_chunks::<64>();
    let mut sums = [0f32; 16];
    for (q, s) in queries.iter().zip(rows) {
        for ((sum, q), s) in sums.iter_mut().zip(q).zip(s.as_chunks::<4>().0) {
            *sum += q * f32::from_le_bytes(*s);
        }
    }
    sums.iter().sum::<f32>() + query_rest.iter().zip(values(row_rest)).map(|(q, s)| q * s).sum::<f32>()
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

    fn cut_embedding(&self, source: &str, bytes: usize) -> GalleryError {
        GalleryError::Damaged {
            path: self.path.clone(),
            reason: format!("the embedding of {source} has {bytes} bytes, not {}", 4 * self.width),
        }
    }

    /// The `count` pictures most similar to a unit vector, best first.
    ///
    /// # Errors
    /// A query of another width, a damaged file.
    pub fn search(&self, query: &[f32], filter: &Filter, count: usize) -> Result<Vec<Hit>, GalleryError> {
        if query.len() != self.width {
            return Err(GalleryError::Width { found: query.len(), expected: self.width });
        }
        let mut best: BinaryHeap<Reverse<Candidate>> = BinaryHeap::new();
        self.each_embedding(filter, |row, embedding| {
            let id = row.get(0).map_err(|e| self.fault(e))?;
            let score = dot(query, embedding);
            // A NaN would rank above all.
            if !score.is_finite() {
                let source: String = row.get(1).map_err(|e| self.fault(e))?;
                return Err(GalleryError::Damaged {
                    path: self.path.clone(),
                    reason: format!("the embedding of {source} holds values that are no numbers"),
                });
            }
            best.push(Reverse(Candidate { score, id }));
            if best.len() > count {
                best.pop();
            }
            Ok(())
        })?;
        let mut statement = self
            .connection
            .prepare_cached("SELECT source, caption, time FROM pictures WHERE id = ?1")
            .map_err(|e| self.fault(e))?;
        // Sorted ascending by the reversed order: best first.
        best.into_sorted_vec()
            .into_iter()
            .map(|Reverse(Candidate { score, id })| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_products_of_every_width() {
        for width in [1, 15, 16, 17, 64, 250] {
            let a: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..width).map(|i| (i as f32 * 1.3).cos()).collect();
            let bytes: Vec<u8> = b.iter().flat_map(|v| v.to_le_bytes()).collect();
            let expected: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &bytes)) - expected).abs() < 1e-4, "{width}");
        }
    }
}
