//! An attention plan as the kernels read it: tiles of queries, tiles of keys, and who sees the latter.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};

use crate::ops::{AttentionPlan, QueryBlock};

/// Words of a `QueryTile`, a `KeyTile` and a `Segment`.
const WORDS: [usize; 3] = [8, 4, 6];

/// The tables, their entries one after another.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// The most rows of a tile.
    tile: usize,
    /// Each `QueryTile`: first row, rows; first row and rows of their block; first row and rows of its context; causal; 0.
    pub queries: Vec<u32>,
    /// Each `KeyTile`: first row, rows; first segment, segments.
    pub keys: Vec<u32>,
    /// Each `Segment`: first row and rows of a block that sees the tile; width of its probabilities and the tile's column there;
    /// causal; row of the block that first sees the tile's first key, if causal.
    pub segments: Vec<u32>,
}

impl Tables {
    /// The tables of a valid plan, in tiles of at most so many rows.
    pub fn of(plan: &AttentionPlan, tile: usize) -> Self {
        let mut tables = Self { tile, ..Self::default() };
        for group in &plan.groups {
            for block in &group.blocks {
                tables.add_queries(group.start, block);
            }
            // Between two cuts, the same blocks see all rows.
            let ends = |range: &std::ops::Range<usize>| [range.start, range.end];
            let cuts: BTreeSet<usize> =
                group.blocks.iter().flat_map(|b| ends(&b.rows).into_iter().chain(ends(&b.context))).collect();
            let cuts: Vec<usize> = cuts.into_iter().collect();
            for cut in cuts.windows(2) {
                for first in (cut[0]..cut[1]).step_by(tile) {
                    tables.add_keys(group.start, &group.blocks, first, tile.min(cut[1] - first));
                }
            }
        }
        tables
    }

    /// Tiles of queries.
    pub fn query_tiles(&self) -> usize {
        self.queries.len() / WORDS[0]
    }

    /// Tiles of keys.
    pub fn key_tiles(&self) -> usize {
        self.keys.len() / WORDS[1]
    }

    fn add_queries(&mut self, start: usize, block: &QueryBlock) {
        for first in block.rows.clone().step_by(self.tile) {
            let count = self.tile.min(block.rows.end - first);
            let rows = [start + first, count, start + block.rows.start, block.rows.len()];
            let seen = [start + block.context.start, block.context.len(), usize::from(block.causal), 0];
            self.queries.extend(rows.into_iter().chain(seen).map(|word| word as u32));
        }
    }

    fn add_keys(&mut self, start: usize, blocks: &[QueryBlock], first: usize, count: usize) {
        let before = self.segments.len() / WORDS[2];
        for block in blocks {
            let width = block.context.len() + block.rows.len();
            let (column, causal, first_seen) = if block.rows.contains(&first) {
                let own = first - block.rows.start;
                (block.context.len() + own, block.causal, own)
            } else if block.context.contains(&first) {
                (first - block.context.start, false, 0)
            } else {
                continue;
            };
            let segment = [start + block.rows.start, block.rows.len(), width, column, usize::from(causal), first_seen];
            self.segments.extend(segment.map(|word| word as u32));
        }
        let segments = self.segments.len() / WORDS[2] - before;
        self.keys.extend([start + first, count, before, segments].map(|word| word as u32));
    }

    /// Those that were asked for last are kept: all layers of a step share one plan.
    pub fn shared(plan: &Arc<AttentionPlan>, tile: usize) -> Arc<Self> {
        static LAST: Mutex<Option<(Weak<AttentionPlan>, Arc<Tables>)>> = Mutex::new(None);
        let mut last = LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((of, tables)) = &*last {
            // The weak reference keeps the plan's place from being taken by another one.
            if std::ptr::eq(of.as_ptr(), Arc::as_ptr(plan)) && tables.tile == tile {
                return Arc::clone(tables);
            }
        }
        let tables = Arc::new(Self::of(plan, tile));
        *last = Some((Arc::downgrade(plan), Arc::clone(&tables)));
        tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::AttentionGroup;

    #[test]
    fn an_image_that_two_captions_read_is_cut_into_tiles() {
        let block = |rows, context, causal| QueryBlock { rows, context, causal };
        let blocks = vec![block(0..18, 0..0, false), block(18..21, 0..18, true), block(21..23, 0..18, true)];
        let tables = Tables::of(&AttentionPlan { groups: vec![AttentionGroup { start: 100, len: 23, blocks }] }, 16);
        let rows = |table: &[u32], words: usize| table.chunks(words).map(<[u32]>::to_vec).collect::<Vec<_>>();
        let queries = [
            [100, 16, 100, 18, 100, 0, 0, 0],
            [116, 2, 100, 18, 100, 0, 0, 0],
            [118, 3, 118, 3, 100, 18, 1, 0],
            [121, 2, 121, 2, 100, 18, 1, 0],
        ];
        assert_eq!(rows(&tables.queries, 8), queries);
        assert_eq!(rows(&tables.keys, 4), [[100, 16, 0, 3], [116, 2, 3, 3], [118, 3, 6, 1], [121, 2, 7, 1]]);
        let segments = [
            [100, 18, 18, 0, 0, 0],
            [118, 3, 21, 0, 0, 0],
            [121, 2, 20, 0, 0, 0],
            [100, 18, 18, 16, 0, 16],
            [118, 3, 21, 16, 0, 0],
            [121, 2, 20, 16, 0, 0],
            [118, 3, 21, 18, 1, 0],
            [121, 2, 20, 18, 1, 0],
        ];
        assert_eq!(rows(&tables.segments, 6), segments);
    }
}
