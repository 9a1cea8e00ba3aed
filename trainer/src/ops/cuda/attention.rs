//! Attention over packed sequences, forward and backward, without its probabilities in memory.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::attention_tables::{TILE, Tables};
use super::dropout;
use super::machine::{Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};
use crate::ops::AttentionPlan;

/// Rows that pass by a tile at one time: `PASSING` of `kernels/attention.cu`.
const PASSING: usize = 32;
/// Widest head: three values a lane, and tiles that fit the shared memory of any device.
const WIDEST_HEAD: usize = 96;

struct Attention {
    tables: Arc<Tables>,
    heads: usize,
    keep: f32,
    seed: u32,
    /// Logarithm of each row's and head's sum of exponentials.
    logarithms: Kept,
}

impl Attention {
    /// Rows, hidden and width of a head.
    fn sizes(&self, qkv: &Input) -> Result<(usize, usize, usize)> {
        let (rows, width) = qkv.shape.dims2()?;
        Ok((rows, width / 3, width / 3 / self.heads))
    }

    /// A block of four warps for each tile and head, with room for `staying` and `passing` tiles.
    fn grid(&self, tiles: usize, staying: usize, passing: usize, depth: usize) -> Grid {
        let shared = staying * TILE * depth + passing * PASSING * (depth + 1);
        Grid { blocks: [tiles, self.heads, 1], threads: 4 * WARP, shared }
    }
}

impl Operator for Attention {
    const NAME: &'static str = "attention";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (rows, hidden, depth) = self.sizes(&inputs[0])?;
        let (y, logarithms) = (machine.allocate(rows * hidden)?, machine.allocate(rows * self.heads)?);
        let (queries, (limit, scale)) = (machine.upload(&self.tables.queries)?, dropout(self.keep));
        let arguments = arguments![
            inputs[0].at,
            machine.words_at(&queries),
            machine.at(&y),
            machine.at(&logarithms),
            self.heads as u32,
            depth as u32,
            self.seed,
            limit,
            scale
        ];
        let grid = self.grid(self.tables.query_tiles(), 1, 2, depth);
        machine.launch(Kernel("attention", "attention"), grid, arguments)?;
        self.logarithms.put(logarithms);
        Ok((y, Shape::from((rows, hidden))))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (qkv, dy) = (pass.inputs[0].at, pass.gradient.at);
        let (rows, hidden, depth) = self.sizes(&pass.inputs[0])?;
        let logarithms = self.logarithms.take::<M::Values>(Self::NAME)?;
        let (delta, dqkv) = (machine.allocate(rows * self.heads)?, machine.allocate(rows * 3 * hidden)?);
        let (sums, projections, to) = (machine.at(&logarithms), machine.at(&delta), machine.at(&dqkv));
        let (heads, wide, (limit, scale)) = (self.heads as u32, depth as u32, dropout(self.keep));
        let count = rows * self.heads;
        let of_rows = Grid { blocks: [count.div_ceil(4).max(1), 1, 1], threads: 4 * WARP, shared: 0 };
        let arguments = arguments![pass.result.at, dy, projections, count as u32, wide];
        machine.launch(Kernel("attention", "attention_delta"), of_rows, arguments)?;
        let queries = machine.upload(&self.tables.queries)?;
        let table = machine.words_at(&queries);
        let arguments = arguments![qkv, table, dy, sums, projections, to, heads, wide, self.seed, limit, scale];
        let grid = self.grid(self.tables.query_tiles(), 2, 2, depth);
        machine.launch(Kernel("attention", "attention_queries_backward"), grid, arguments)?;
        let (keys, segments) = (machine.upload(&self.tables.keys)?, machine.upload(&self.tables.segments)?);
        let (table, seen_by) = (machine.words_at(&keys), machine.words_at(&segments));
        let arguments = arguments![qkv, table, seen_by, dy, sums, projections, to, heads, wide, self.seed, limit, scale];
        let grid = self.grid(self.tables.key_tiles(), 2, 2, depth);
        machine.launch(Kernel("attention", "attention_keys_backward"), grid, arguments)?;
        Ok(vec![Some(dqkv)])
    }
}

/// See [`attention`](crate::ops::attention), which has checked plan and shape.
pub fn attention(qkv: &Tensor, plan: &Arc<AttentionPlan>, heads: usize, rate: f32, seed: u32) -> Result<Tensor> {
    let depth = qkv.dim(1)? / 3 / heads;
    if depth > WIDEST_HEAD {
        candle_core::bail!("attention: heads of {depth} values are wider than {WIDEST_HEAD}, the widest on a CUDA device");
    }
    let op = Attention { tables: Tables::shared(plan), heads, keep: 1.0 - rate, seed, logarithms: Kept::default() };
    qkv.contiguous()?.apply_op1(OnMachine(op))
}
