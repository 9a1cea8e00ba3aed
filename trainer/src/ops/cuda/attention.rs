//! Attention over packed sequences, forward and backward, without its probabilities in memory.

use candle_core::{Result, Shape, Tensor};

use super::attention_tables::{Placed, Tables};
use super::machine::{Address, Argument, Element, Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};
use super::{column_sums, draws};
use crate::ops::AttentionPlan;

/// The kernels of one file.
struct Kernels {
    /// Rows of a tile: `STAYING` of the file.
    tile: usize,
    file: &'static str,
    /// Forward, backward by queries and by keys.
    names: [&'static str; 3],
    /// Makes what gradients by probabilities are measured from, and how many of its threads share a row of a head.
    delta: (Kernel, usize),
    /// Shared memory that they take, in 32-bit values.
    shared: [usize; 3],
    /// Whether they are told how wide a head is.
    any_width: bool,
}

/// Rows that pass by a tile at one time: `PASSING` of both files.
const PASSING: usize = 32;
/// Widest head: three values a lane, and tiles that fit the shared memory of any device.
const WIDEST_HEAD: usize = 96;

impl Kernels {
    /// Those of `attention.cu`, whose products are in f32.
    fn floats(depth: usize, element: Element) -> Self {
        const TILE: usize = 16;
        let shared = |staying: usize| staying * TILE * depth + 2 * PASSING * (depth + 1);
        Self {
            tile: TILE,
            file: "attention",
            names: match element {
                Element::F32 => ["attention", "attention_queries_backward", "attention_keys_backward"],
                Element::Bf16 => ["attention_bf16", "attention_queries_backward_bf16", "attention_keys_backward_bf16"],
            },
            delta: (Kernel::on(element, "attention", ["attention_delta", "attention_delta_bf16"]), WARP),
            shared: [shared(1), shared(2), shared(2)],
            any_width: true,
        }
    }

    /// Those of `attention_bf16.cu`, for what is stored in bf16, if they are there for heads of this width.
    fn tensor_cores(depth: usize) -> Option<Self> {
        const TILE: usize = 64;
        let (names, delta) = match depth {
            32 => (
                ["attention_bf16_32", "attention_bf16_queries_backward_32", "attention_bf16_keys_backward_32"],
                "attention_bf16_delta_32",
            ),
            64 => (
                ["attention_bf16_64", "attention_bf16_queries_backward_64", "attention_bf16_keys_backward_64"],
                "attention_bf16_delta_64",
            ),
            _ => return None,
        };
        let delta = (Kernel("attention_bf16", delta), depth / 8);
        // Two bf16 are a 32-bit value.
        let rows = |count: usize| count * (depth + 8) / 2;
        let both = rows(2 * TILE + 2 * PASSING);
        let shared = [rows(TILE + 2 * PASSING), both, both + 2 * PASSING];
        Some(Self { tile: TILE, file: "attention_bf16", names, delta, shared, any_width: false })
    }

    /// A block of four warps for each tile and head.
    fn launch<M: Machine>(&self, machine: &M, which: usize, blocks: [usize; 2], arguments: &[Argument]) -> Result<()> {
        let grid = Grid { blocks: [blocks[0], blocks[1], 1], threads: 4 * WARP, shared: self.shared[which] };
        machine.launch(Kernel(self.file, self.names[which]), grid, arguments)
    }
}

/// What a forward pass gives.
pub(super) struct Attended<V> {
    /// The result and its shape.
    pub(super) made: (V, Shape),
    /// Logarithm of each row's and head's sum of exponentials.
    pub(super) logarithms: V,
}

/// Attention over rows of one plan.
pub(super) struct Attention {
    kernels: Kernels,
    element: Element,
    heads: usize,
    keep: f32,
    /// Tiles of queries and of keys.
    tiles: [usize; 2],
}

/// Which kernels take heads of `depth` values that are stored so.
fn kernels(depth: usize, element: Element) -> Result<Kernels> {
    if depth > WIDEST_HEAD {
        candle_core::bail!("attention: heads of {depth} values are wider than {WIDEST_HEAD}, the widest on a CUDA device");
    }
    let on_tensor_cores = (element == Element::Bf16).then(|| Kernels::tensor_cores(depth)).flatten();
    Ok(on_tensor_cores.unwrap_or_else(|| Kernels::floats(depth, element)))
}

impl Attention {
    /// Of what is stored as `element`, of heads of `depth` values, of whose probabilities the share `keep` is kept. Also what it is told
    /// of a plan and of rows behind it, up to so many.
    pub(super) fn of_plan(
        plan: &AttentionPlan,
        rows: usize,
        (heads, depth): (usize, usize),
        keep: f32,
        element: Element,
    ) -> Result<(Self, Tables)> {
        let kernels = kernels(depth, element)?;
        let tables = Tables::of(plan, kernels.tile).with_rows_to(plan.rows(), rows).filled();
        let tiles = [tables.query_tiles(), tables.key_tiles()];
        Ok((Self { kernels, element, heads, keep, tiles }, tables))
    }

    /// Rows, hidden and width of a head.
    fn sizes(&self, qkv: &Input) -> Result<(usize, usize, usize)> {
        let (rows, width) = qkv.shape.dims2()?;
        Ok((rows, width / 3, width / 3 / self.heads))
    }

    /// What every kernel ends with: heads, their width if it is asked for, and the draws.
    fn last_arguments(&self, depth: usize, seed: Address) -> Vec<Argument> {
        let (limit, scale) = draws(self.keep);
        let wide = self.kernels.any_width.then_some(Argument::Word(depth as u32));
        let draws = arguments![seed, limit, scale];
        [Argument::Word(self.heads as u32)].into_iter().chain(wide).chain(draws.iter().copied()).collect()
    }

    /// The forward pass of queries, keys and values without their bias, which lies at `bias` in f32 unless that is null. The tables are
    /// those of the plan.
    pub(super) fn forward<M: Machine>(
        &self,
        machine: &M,
        qkv: &Input,
        bias: Address,
        placed: Placed,
    ) -> Result<Attended<M::Values>> {
        let (rows, hidden, depth) = self.sizes(qkv)?;
        let y = machine.allocate(self.element.words(rows * hidden))?;
        let logarithms = machine.allocate(rows * self.heads)?;
        let first = arguments![qkv.at, bias, placed.queries, machine.at(&y), machine.at(&logarithms)];
        let arguments = [&first[..], &self.last_arguments(depth, placed.seed)].concat();
        self.kernels.launch(machine, 0, [self.tiles[0], self.heads], &arguments)?;
        Ok(Attended { made: (y, Shape::from((rows, hidden))), logarithms })
    }

    /// The gradient by `qkv`, with what the forward pass gave.
    pub(super) fn gradient<M: Machine>(
        &self,
        machine: &M,
        pass: &Pass,
        bias: Address,
        logarithms: &M::Values,
        placed: Placed,
    ) -> Result<M::Values> {
        let (qkv, dy) = (pass.inputs[0].at, pass.gradient.at);
        let (rows, _, depth) = self.sizes(&pass.inputs[0])?;
        let (delta, dqkv) = (machine.allocate(rows * self.heads)?, pass.inputs[0].alike(machine)?);
        let (sums, projections, to) = (machine.at(logarithms), machine.at(&delta), machine.at(&dqkv));
        let (count, last) = (rows * self.heads, self.last_arguments(depth, placed.seed));
        let (delta_kernel, threads) = self.kernels.delta;
        let of_rows = Grid { blocks: [(count * threads).div_ceil(4 * WARP).max(1), 1, 1], threads: 4 * WARP, shared: 0 };
        machine.launch(delta_kernel, of_rows, arguments![pass.result.at, dy, projections, count as u32, depth as u32])?;
        let first = arguments![qkv, bias, placed.queries, dy, sums, projections, to];
        self.kernels.launch(machine, 1, [self.tiles[0], self.heads], &[&first[..], &last].concat())?;
        let first = arguments![qkv, bias, placed.keys, placed.segments, dy, sums, projections, to];
        self.kernels.launch(machine, 2, [self.tiles[1], self.heads], &[&first[..], &last].concat())?;
        Ok(dqkv)
    }
}

/// Attention by itself, of queries, keys and values and perhaps their bias.
struct Alone {
    attention: Attention,
    tables: Tables,
    seed: u32,
    /// Logarithm of each row's and head's sum of exponentials.
    logarithms: Kept,
}

impl Alone {
    fn bias(inputs: &[Input]) -> Address {
        inputs.get(1).map_or(Address::NULL, |bias| bias.at)
    }

    fn upload<M: Machine>(&self, machine: &M) -> Result<(M::Words, Placed)> {
        let words = machine.upload(&self.tables.words([self.seed]))?;
        let placed = Placed::at(machine.words_at(&words), self.tables.lengths());
        Ok((words, placed))
    }
}

impl Operator for Alone {
    const NAME: &'static str = "attention";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (_words, placed) = self.upload(machine)?;
        let Attended { made, logarithms } = self.attention.forward(machine, &inputs[0], Self::bias(inputs), placed)?;
        self.logarithms.put(logarithms);
        Ok(made)
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let logarithms = self.logarithms.take::<M::Values>(Self::NAME)?;
        let (_words, placed) = self.upload(machine)?;
        let (bias, qkv) = (Self::bias(pass.inputs), &pass.inputs[0]);
        let gradient = self.attention.gradient(machine, pass, bias, &logarithms, placed)?;
        let (rows, width) = qkv.matrix();
        let by_bias = || column_sums(machine, machine.at(&gradient), qkv.element, rows, width);
        let by_bias = pass.inputs.get(1).map(|_| by_bias()).transpose()?;
        Ok([Some(Some(gradient)), by_bias.map(Some)].into_iter().flatten().collect())
    }
}

/// See [`attention`](crate::ops::attention), which has checked plan and shape. A bias `[3 · hidden]` is still missing in `qkv`. Stored as
/// `element` within; in bf16 its products are on tensor cores, where heads are as wide as the kernels for that are made for.
pub fn attention(
    (qkv, bias): (&Tensor, Option<&Tensor>),
    plan: &AttentionPlan,
    heads: usize,
    (rate, seed): (f32, u32),
    element: Element,
) -> Result<Tensor> {
    let (attention, tables) = Attention::of_plan(plan, plan.rows(), (heads, qkv.dim(1)? / 3 / heads), 1.0 - rate, element)?;
    let op = OnMachine::within(Alone { attention, tables, seed, logarithms: Kept::default() }, element);
    match bias {
        Some(bias) => qkv.contiguous()?.apply_op2(&bias.contiguous()?, op),
        None => qkv.contiguous()?.apply_op1(op),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_the_shared_memory_that_every_device_gives() {
        let floats = (1..=WIDEST_HEAD).map(|depth| Kernels::floats(depth, Element::F32));
        let all = floats.chain((1..=WIDEST_HEAD).filter_map(Kernels::tensor_cores));
        for kernels in all {
            assert!(kernels.shared.iter().all(|&values| 4 * values <= 48 << 10), "{}: {:?}", kernels.names[0], kernels.shared);
        }
    }
}
