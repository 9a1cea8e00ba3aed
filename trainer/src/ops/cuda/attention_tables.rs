//! An attention plan as the kernels read it: tiles of queries, tiles of keys, and who sees the latter.

use std::collections::BTreeSet;

use super::machine::Address;
use crate::ops::{AttentionPlan, QueryBlock};

/// Words of a `QueryTile`, a `KeyTile` and a `Segment`.
const WORDS: [usize; 3] = [8, 4, 6];

/// The tables, their entries one after another. Tiles without rows are passed over.
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

    /// With rows behind those of the plan: each tile of them sees itself and nothing else.
    pub fn with_rows_to(mut self, first: usize, end: usize) -> Self {
        for start in (first..end).step_by(self.tile) {
            let rows = 0..self.tile.min(end - start);
            let block = QueryBlock { rows: rows.clone(), context: 0..0, causal: false };
            self.add_queries(start, &block);
            self.add_keys(start, &[block], 0, rows.end);
        }
        self
    }

    /// With as many tiles that nothing is in, and segments that nobody asks for, as make numbers of them that repeat.
    pub fn filled(mut self) -> Self {
        // What is filled up costs next to nothing: blocks of threads that end at once, and a few words more to be copied.
        for ((table, words), parts) in
            [&mut self.queries, &mut self.keys, &mut self.segments].into_iter().zip(WORDS).zip([8, 8, 4])
        {
            table.resize(filled(table.len() / words, parts).next_multiple_of(4) * words, 0);
        }
        self
    }

    /// Numbers of words of the three.
    pub fn lengths(&self) -> [usize; 3] {
        [&self.queries, &self.keys, &self.segments].map(Vec::len)
    }

    /// All three and seeds, as they lie where [`Placed`] finds them.
    pub fn words(&self, seeds: impl IntoIterator<Item = u32>) -> Vec<u32> {
        [&self.queries, &self.keys, &self.segments].into_iter().flatten().copied().chain(seeds).collect()
    }
}

/// Where a pass finds its tables, and what it draws by.
#[derive(Debug, Clone, Copy)]
pub struct Placed {
    pub queries: Address,
    pub keys: Address,
    pub segments: Address,
    /// The seed; behind it those that follow, where there are more.
    pub seed: Address,
}

impl Placed {
    /// In what [`Tables::words`] of tables of these lengths gave.
    pub fn at(at: Address, [queries, keys, segments]: [usize; 3]) -> Self {
        let keys_at = at.after(queries);
        let segments_at = keys_at.after(keys);
        Self { queries: at, keys: keys_at, segments: segments_at, seed: segments_at.after(segments) }
    }
}

/// The next larger number of those that are used for shapes, so that these repeat.
pub fn filled(count: usize, parts: usize) -> usize {
    count.next_multiple_of(unit(count, parts))
}

/// What such numbers are multiples of: a power of two of about a part of them (`1 / parts` and less than twice that).
pub fn unit(count: usize, parts: usize) -> usize {
    count.div_ceil(parts).max(1).next_power_of_two()
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

    #[test]
    fn numbers_are_filled_up_by_a_small_part_of_them() {
        for (count, parts, expected) in
            [(0, 64, 0), (1, 64, 1), (64, 64, 64), (65, 64, 66), (257, 128, 260), (14_000, 128, 14_080)]
        {
            assert_eq!(filled(count, parts), expected, "{count} in {parts} parts");
        }
        for count in 1..20_000 {
            let more = filled(count, 128) - count;
            assert!(64 * more <= count + 64, "{count} rows and {more} more");
        }
    }

    /// Rows behind the plan's see those of their tile; tiles without rows end the tables.
    #[test]
    fn tables_are_filled_up() {
        let block = QueryBlock { rows: 0..5, context: 0..0, causal: true };
        let plan = AttentionPlan { groups: vec![AttentionGroup { start: 0, len: 5, blocks: vec![block] }] };
        let tables = Tables::of(&plan, 4).with_rows_to(5, 12).filled();
        let mut queries = vec![0, 4, 0, 5, 0, 0, 1, 0, 4, 1, 0, 5, 0, 0, 1, 0, 5, 4, 5, 4, 5, 0, 0, 0, 9, 3, 9, 3, 9, 0, 0, 0];
        assert_eq!(tables.queries, queries);
        assert_eq!(tables.keys, [0, 4, 0, 1, 4, 1, 1, 1, 5, 4, 2, 1, 9, 3, 3, 1]);
        assert_eq!(tables.segments[12..], [5, 4, 4, 0, 0, 0, 9, 3, 3, 0, 0, 0]);
        let more = Tables::of(&plan, 4).with_rows_to(5, 13).filled();
        queries[25] = 4;
        queries[27] = 4;
        assert_eq!((more.query_tiles(), &more.queries), (4, &queries));
        let most = Tables::of(&plan, 4).with_rows_to(5, 14).filled();
        assert_eq!((most.query_tiles(), most.key_tiles()), (8, 8));
        assert!(most.queries[40..].iter().chain(&most.keys[20..]).all(|&word| word == 0));
        let words = most.words([7, 8]);
        let placed = Placed::at(Address(1_000), most.lengths());
        let at = |Address(at): Address| ((at - 1_000) / 4) as usize;
        assert_eq!(words[at(placed.keys)..][..4], most.keys[..4]);
        assert_eq!(words[at(placed.segments)..][..6], most.segments[..6]);
        assert_eq!(words[at(placed.seed)..], [7, 8]);
    }
}
