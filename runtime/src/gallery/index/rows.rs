//! Quantized pictures in columns, as they lie in the index's file and in memory.

use super::super::Time;
use super::super::quantize::{RowScale, quantize, stride};

/// Bytes of a row in all its columns of fixed width, besides the codes.
pub(super) const ROW_BYTES: usize = 8 + 8 + 4 + 4 + 4;

/// Columns of quantized pictures; numbers are little-endian.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns<'a> {
    /// `[rows, stride]`.
    pub codes: &'a [u8],
    pub ids: &'a [[u8; 8]],
    /// Milliseconds since 1970.
    pub times: &'a [[u8; 8]],
    pub scales: &'a [[u8; 4]],
    pub errors: &'a [[u8; 4]],
    /// Where each source ends in `sources`.
    pub ends: &'a [[u8; 4]],
    /// UTF-8, one after the other.
    pub sources: &'a [u8],
}

impl Columns<'_> {
    pub fn id(&self, row: usize) -> i64 {
        i64::from_le_bytes(self.ids[row])
    }

    pub fn time(&self, row: usize) -> Time {
        Time::from_milliseconds(i64::from_le_bytes(self.times[row]))
    }

    pub fn scale(&self, row: usize) -> RowScale {
        RowScale { scale: f32::from_le_bytes(self.scales[row]), error: f32::from_le_bytes(self.errors[row]) }
    }

    /// The source's bytes; none where the ends make no sense.
    pub fn source(&self, row: usize) -> &[u8] {
        let end = |row: usize| u32::from_le_bytes(self.ends[row]) as usize;
        let start = if row == 0 { 0 } else { end(row - 1) };
        self.sources.get(start..end(row)).unwrap_or_default()
    }
}

/// A picture that the index is to hold.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Number in the store; ascending within what is pushed.
    pub id: i64,
    /// Path or URI.
    pub source: &'a str,
    /// When it was taken.
    pub time: Time,
    /// `[width]`.
    pub embedding: &'a [f32],
}

/// Rows in memory.
#[derive(Debug, Default, Clone)]
pub struct Rows {
    codes: Vec<u8>,
    ids: Vec<[u8; 8]>,
    times: Vec<[u8; 8]>,
    scales: Vec<[u8; 4]>,
    errors: Vec<[u8; 4]>,
    ends: Vec<[u8; 4]>,
    sources: Vec<u8>,
}

impl Rows {
    pub(super) fn columns(&self) -> Columns<'_> {
        Columns {
            codes: &self.codes,
            ids: &self.ids,
            times: &self.times,
            scales: &self.scales,
            errors: &self.errors,
            ends: &self.ends,
            sources: &self.sources,
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Adds a picture. Gives whether it could be: its embedding holds numbers only, and the sources have less than 4 GB.
    #[must_use]
    pub fn push(&mut self, row: &Row<'_>) -> bool {
        let Ok(end) = u32::try_from(self.sources.len() + row.source.len()) else { return false };
        let Some(RowScale { scale, error }) = quantize(row.embedding, &mut self.codes) else { return false };
        self.ids.push(row.id.to_le_bytes());
        self.times.push(row.time.milliseconds().to_le_bytes());
        self.scales.push(scale.to_le_bytes());
        self.errors.push(error.to_le_bytes());
        self.ends.push(end.to_le_bytes());
        self.sources.extend_from_slice(row.source.as_bytes());
        true
    }

    /// Copies some rows, in this order.
    pub(super) fn picked(&self, rows: &[usize], width: usize) -> Self {
        let mut picked = Self::default();
        let columns = self.columns();
        for &row in rows {
            picked.codes.extend_from_slice(&columns.codes[row * stride(width)..][..stride(width)]);
            picked.ids.push(self.ids[row]);
            picked.times.push(self.times[row]);
            picked.scales.push(self.scales[row]);
            picked.errors.push(self.errors[row]);
            picked.sources.extend_from_slice(columns.source(row));
            // Not more than there were.
            picked.ends.push((picked.sources.len() as u32).to_le_bytes());
        }
        picked
    }

    /// Forgets all, and keeps the room.
    pub fn clear(&mut self) {
        self.codes.clear();
        self.ids.clear();
        self.times.clear();
        self.scales.clear();
        self.errors.clear();
        self.ends.clear();
        self.sources.clear();
    }
}
