//! Multi-head attention over packed sequences: no padding, and several captions may share one image.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernels::{self, Matrix, Product, matmul};
use super::{f32_slice, on_cuda, with_values};

/// Rows that attend alike. Row numbers count from the start of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryBlock {
    /// The rows that ask.
    pub rows: Range<usize>,
    /// Rows that all of them see (an image in front of a caption); may be empty.
    pub context: Range<usize>,
    /// Whether a row sees, of its own block, only itself and what precedes it.
    pub causal: bool,
}

/// A run of rows that see nothing outside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionGroup {
    /// First row in the packed batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Blocks that together cover the group's rows, in order.
    pub blocks: Vec<QueryBlock>,
}

/// Who sees whom in a packed batch: groups that together cover all rows, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttentionPlan {
    /// The groups.
    pub groups: Vec<AttentionGroup>,
}

impl AttentionPlan {
    /// Number of rows covered.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.groups.last().map_or(0, |g| g.start + g.len)
    }

    /// Checks that it is one for so many rows, whose width so many parts share.
    ///
    /// # Errors
    /// Another number of rows, a width that the parts do not divide, and those of [`Self::validate`].
    pub fn check(&self, rows: usize, width: usize, parts: usize) -> Result<()> {
        if self.rows() != rows || !width.is_multiple_of(parts) {
            candle_core::bail!("attention: {rows}×{width} in {parts} parts against a plan of {} rows", self.rows());
        }
        self.validate()
    }

    /// Checks that groups and blocks cover the rows in order, without gaps.
    ///
    /// # Errors
    /// The first gap or overlap.
    pub fn validate(&self) -> Result<()> {
        let mut next = 0;
        for group in &self.groups {
            let mut row = 0;
            for block in &group.blocks {
                let fits = block.rows.start == row && block.rows.end > row && block.context.end <= block.rows.start;
                if !fits || block.context.start > block.context.end {
                    candle_core::bail!("attention plan: block {block:?} does not follow row {row}");
                }
                row = block.rows.end;
            }
            if group.start != next || row != group.len {
                candle_core::bail!("attention plan: group at {} of {} rows does not follow row {next}", group.start, group.len);
            }
            next += group.len;
        }
        Ok(())
    }
}

struct Attention {
    plan: Arc<AttentionPlan>,
    heads: usize,
    keep: f32,
    seed: u32,
}

/// Where head `head` of one group finds its values in packed `[rows, 3, heads, d]` storage.
struct HeadView {
    width: usize,
    stride: usize,
    depth: usize,
    query: usize,
    key: usize,
    value: usize,
}

impl HeadView {
    fn at<'a>(&self, values: &'a [f32], offset: usize, row: usize) -> Matrix<'a> {
        Matrix::rows(&values[row * self.stride + offset..], self.stride)
    }
}

impl Attention {
    fn view(&self, hidden: usize, head: usize) -> HeadView {
        let depth = hidden / self.heads;
        HeadView {
            width: hidden,
            stride: 3 * hidden,
            depth,
            query: head * depth,
            key: hidden + head * depth,
            value: 2 * hidden + head * depth,
        }
    }

    /// Probabilities `[rows, context + rows]` of one block, before dropout.
    fn probabilities(block: &QueryBlock, qkv: &[f32], view: &HeadView, p: &mut Vec<f32>) {
        let (n, c) = (block.rows.len(), block.context.len());
        let width = c + n;
        p.clear();
        p.resize(n * width, 0.0);
        let query = view.at(qkv, view.query, block.rows.start);
        let product = |columns| Product { m: n, n: columns, k: view.depth, accumulate: false, parallel: false };
        if c > 0 {
            matmul(product(c), query, view.at(qkv, view.key, block.context.start).transposed(), p, width);
        }
        matmul(product(n), query, view.at(qkv, view.key, block.rows.start).transposed(), &mut p[c..], width);
        let scale = 1.0 / (view.depth as f32).sqrt();
        for (i, row) in p.chunks_exact_mut(width).enumerate() {
            let seen = if block.causal { c + i + 1 } else { width };
            kernels::softmax(&mut row[..seen], scale);
            row[seen..].fill(0.0);
        }
    }

    /// Every (group, block, head) has draws of its own: a block's are numbered from its first row, head by head.
    fn drop(&self, p: &mut [f32], block: &QueryBlock, group: &AttentionGroup, head: usize) {
        if self.keep < 1.0 {
            let stream = self.seed
                ^ ((group.start + block.rows.start) as u32).wrapping_mul(0x85eb_ca6b)
                ^ (head as u32).wrapping_mul(0xc2b2_ae35);
            kernels::dropout_mask(p, stream, 0, self.keep);
        }
    }

    fn forward_group(&self, group: &AttentionGroup, qkv: &[f32], hidden: usize, y: &mut [f32], p: &mut Vec<f32>) {
        for block in &group.blocks {
            let (n, c) = (block.rows.len(), block.context.len());
            for head in 0..self.heads {
                let view = self.view(hidden, head);
                Self::probabilities(block, qkv, &view, p);
                self.drop(p, block, group, head);
                let out = &mut y[block.rows.start * view.width + head * view.depth..];
                let product = |k, accumulate| Product { m: n, n: view.depth, k, accumulate, parallel: false };
                matmul(
                    product(n, false),
                    Matrix::rows(&p[c..], c + n),
                    view.at(qkv, view.value, block.rows.start),
                    out,
                    view.width,
                );
                if c > 0 {
                    matmul(
                        product(c, true),
                        Matrix::rows(p, c + n),
                        view.at(qkv, view.value, block.context.start),
                        out,
                        view.width,
                    );
                }
            }
        }
    }

    fn backward_group(
        &self,
        group: &AttentionGroup,
        qkv: &[f32],
        dy: &[f32],
        hidden: usize,
        dx: &mut [f32],
        scratch: &mut [Vec<f32>; 3],
    ) {
        let [p, dropped, dp] = scratch;
        for block in &group.blocks {
            let (n, c) = (block.rows.len(), block.context.len());
            let width = c + n;
            for head in 0..self.heads {
                let view = self.view(hidden, head);
                let scale = 1.0 / (view.depth as f32).sqrt();
                Self::probabilities(block, qkv, &view, p);
                dropped.clone_from(p);
                self.drop(dropped, block, group, head);
                let dout = Matrix::rows(&dy[block.rows.start * hidden + head * view.depth..], hidden);
                dp.clear();
                dp.resize(n * width, 0.0);
                // (rows seen, their first column in p)
                for (seen, column) in [(&block.context, 0), (&block.rows, c)] {
                    if seen.is_empty() {
                        continue;
                    }
                    let grow = Product { m: seen.len(), n: view.depth, k: n, accumulate: true, parallel: false };
                    let target = &mut dx[seen.start * view.stride + view.value..];
                    matmul(grow, Matrix::rows(&dropped[column..], width).transposed(), dout, target, view.stride);
                    let back = Product { m: n, n: seen.len(), k: view.depth, accumulate: false, parallel: false };
                    matmul(back, dout, view.at(qkv, view.value, seen.start).transposed(), &mut dp[column..], width);
                }
                self.drop(dp, block, group, head);
                for (p, dp) in p.chunks_exact(width).zip(dp.chunks_exact_mut(width)) {
                    kernels::softmax_backward(p, scale, dp);
                }
                for (seen, column) in [(&block.context, 0), (&block.rows, c)] {
                    if seen.is_empty() {
                        continue;
                    }
                    let queries = Product { m: n, n: view.depth, k: seen.len(), accumulate: true, parallel: false };
                    let target = &mut dx[block.rows.start * view.stride + view.query..];
                    matmul(queries, Matrix::rows(&dp[column..], width), view.at(qkv, view.key, seen.start), target, view.stride);
                    let keys = Product { m: seen.len(), n: view.depth, k: n, accumulate: true, parallel: false };
                    let query = view.at(qkv, view.query, block.rows.start);
                    let target = &mut dx[seen.start * view.stride + view.key..];
                    matmul(keys, Matrix::rows(&dp[column..], width).transposed(), query, target, view.stride);
                }
            }
        }
    }

    /// Cuts `values` into the groups' parts, `width` values a row.
    fn split<'a>(&self, mut values: &'a mut [f32], width: usize) -> Vec<(&AttentionGroup, &'a mut [f32])> {
        let mut parts = Vec::with_capacity(self.plan.groups.len());
        for group in &self.plan.groups {
            let (part, rest) = values.split_at_mut(group.len * width);
            parts.push((group, part));
            values = rest;
        }
        parts
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = f32_slice(self.name(), storage, layout)?;
        let (rows, width) = layout.shape().dims2()?;
        let hidden = width / 3;
        let mut y = vec![0f32; rows * hidden];
        self.split(&mut y, hidden).into_par_iter().for_each_init(Vec::new, |p, (group, y)| {
            let part = &qkv[group.start * width..(group.start + group.len) * width];
            self.forward_group(group, part, hidden, y, p);
        });
        Ok((CpuStorage::F32(y), Shape::from((rows, hidden))))
    }

    fn bwd(&self, qkv: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = qkv.dims2()?;
        let hidden = width / 3;
        let dx = with_values(self.name(), [qkv, gradient], |[values, dy]| {
            let mut dx = vec![0f32; values.len()];
            self.split(&mut dx, width).into_par_iter().for_each_init(<[Vec<f32>; 3]>::default, |scratch, (group, dx)| {
                let part = &values[group.start * width..(group.start + group.len) * width];
                let dy = &dy[group.start * hidden..(group.start + group.len) * hidden];
                self.backward_group(group, part, dy, hidden, dx, scratch);
            });
            dx
        })?;
        Tensor::from_vec(dx, qkv.shape(), qkv.device()).map(Some)
    }
}

/// Scaled dot-product attention of packed rows: `qkv` is `[rows, 3·hidden]` (queries, keys, values, each head by head), the
/// result `[rows, hidden]`. `dropout` applies to the probabilities, drawn from `seed`.
///
/// # Errors
/// A plan that does not cover the rows, a width that the heads do not divide, a dtype other than f32.
pub fn attention(qkv: &Tensor, plan: &Arc<AttentionPlan>, heads: usize, dropout: f32, seed: u32) -> Result<Tensor> {
    let (rows, width) = qkv.dims2()?;
    plan.check(rows, width, 3 * heads)?;
    on_cuda!(qkv.device(), {
        let element = super::cuda::Element::of(super::precision());
        super::cuda::attention((qkv, None), plan, heads, (dropout, seed), element)
    });
    qkv.contiguous()?.apply_op1(Attention { plan: Arc::clone(plan), heads, keep: 1.0 - dropout, seed })
}
