//! Products with constant matrices, in floats or in integers.

mod activation;
mod finish;
mod floats;
mod integers;
mod nibbles;
mod tile;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use self::activation::Activation;
use self::activation::gelu_all;
use self::finish::Finish;
pub(super) use self::floats::lanes;
pub(crate) use self::integers::{multiplies_bytes, round_rows};
use self::nibbles::Nibbles;

/// Multiplications from which on it pays to wake other threads.
pub(super) const WORTH_SHARING: usize = 1 << 17;
/// The widest panel of any instruction set.
const WIDEST: usize = 32;
/// Inputs of an output that share a scale where weights have 4 bits.
pub(crate) const BLOCK: usize = 32;

/// Where rows lie in a slice: row m begins at `start + (m / width) · line + (m % width) · step`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Beginning of row 0.
    pub start: usize,
    /// Rows of a line.
    pub width: usize,
    /// From a line's beginning to the next one's.
    pub line: usize,
    /// From a row's beginning to the next one's.
    pub step: usize,
}

impl Layout {
    /// Rows one behind the other.
    pub fn dense(step: usize) -> Self {
        Self { start: 0, width: usize::MAX, line: 0, step }
    }

    #[inline(always)]
    fn at(&self, row: usize) -> usize {
        self.start + row / self.width * self.line + row % self.width * self.step
    }
}

/// A matrix's values as they are given, row-major `[inputs, outputs]`, or `[outputs, inputs]` where `transposed`; and how they are
/// multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 8-bit levels with a scale for each output, multiplied as floats.
    I8(&'a [i8], &'a [f32]),
    /// The same, multiplied as integers: each row is rounded to 256 levels between its least and its largest value.
    Integers(&'a [i8], &'a [f32]),
    /// 4-bit levels, each 8 too large, `[outputs, inputs]` in any case, two a byte with the lower half first; scales
    /// `[outputs, inputs / BLOCK]`. Multiplied as floats.
    I4(&'a [u8], &'a [f32]),
    /// The same, multiplied as integers.
    FourBitIntegers(&'a [u8], &'a [f32]),
}

#[derive(Debug)]
enum Panels {
    Floats(floats::Panels),
    Integers(integers::Panels),
    Blocks(integers::Blocks),
}

impl Panels {
    /// Outputs of a panel.
    fn width(&self) -> usize {
        match self {
            Self::Floats(panels) => panels.width(),
            Self::Integers(panels) => panels.width(),
            Self::Blocks(panels) => panels.width(),
        }
    }
}

/// A constant matrix and a bias, laid out for products with rows: panels of some outputs, as wide as this processor's registers
/// make good.
#[derive(Debug)]
pub(crate) struct Matrix {
    inputs: usize,
    outputs: usize,
    /// Outputs of a panel.
    width: usize,
    panels: Panels,
    /// Of each output, padded to whole panels; none for weights of 32 and of 4 bits.
    scales: Option<Vec<f32>>,
    /// Of each output, padded to whole panels.
    bias: Vec<f32>,
}

impl Matrix {
    /// Lays out weights; `None` where sizes do not fit, or sums of integers might not fit into 32 bits. A missing bias is zero.
    pub fn new(weights: Weights<'_>, [inputs, outputs]: [usize; 2], transposed: bool, bias: Option<&[f32]>) -> Option<Self> {
        let count = inputs.checked_mul(outputs)?;
        let (given, scales) = match weights {
            Weights::F32(values) => (values.len(), None),
            Weights::I8(levels, scales) | Weights::Integers(levels, scales) => (levels.len(), Some(scales)),
            Weights::I4(levels, _) | Weights::FourBitIntegers(levels, _) => (2 * levels.len(), None),
        };
        let fits = given == count && count > 0 && scales.is_none_or(|s| s.len() == outputs);
        if !fits || bias.is_some_and(|b| b.len() != outputs) {
            return None;
        }
        let shape = [inputs, outputs];
        let panels = match weights {
            Weights::F32(values) => Panels::Floats(floats::Panels::of_floats(values, shape, transposed)),
            Weights::I8(levels, _) => Panels::Floats(floats::Panels::of_levels(levels, shape, transposed)),
            Weights::Integers(levels, _) => Panels::Integers(integers::Panels::new(levels, shape, transposed)?),
            Weights::I4(levels, scales) => Panels::Floats(floats::Panels::of_nibbles(Nibbles::new(levels, scales, shape)?)),
            Weights::FourBitIntegers(levels, scales) => {
                Panels::Blocks(integers::Blocks::new(Nibbles::new(levels, scales, shape)?))
            }
        };
        let width = panels.width();
        let padded = |values: &[f32]| {
            let mut values = values.to_vec();
            values.resize(outputs.next_multiple_of(width), 0.0);
            values
        };
        let bias = padded(bias.unwrap_or_default());
        Some(Self { inputs, outputs, width, panels, scales: scales.map(padded), bias })
    }

    /// Values of a row of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Values of a row of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// For each of `rows` rows: `y = activation(x · W + bias + add)`, the last where given.
    ///
    /// # Panics
    /// Where a layout leads out of its slice.
    pub fn multiply(
        &self,
        rows: usize,
        x: (&[f32], Layout),
        add: Option<(&[f32], Layout)>,
        activation: Activation,
        y: (&mut [f32], Layout),
    ) {
        self.some_panels(0..self.bias.len() / self.width, rows, x, add, activation, y);
    }

    /// [`Self::multiply`] without `add`, its outputs shared among the threads of the pool that it is called in, if it is.
    ///
    /// # Panics
    /// Where a layout leads out of its slice.
    pub fn multiply_shared(&self, rows: usize, x: (&[f32], Layout), activation: Activation, y: (&mut [f32], Layout)) {
        let threads = threads();
        if threads == 1 || rows * self.inputs * self.outputs < WORTH_SHARING {
            return self.multiply(rows, x, None, activation, y);
        }
        let panels = self.bias.len() / self.width;
        let each = panels.div_ceil(threads);
        let parts: Vec<(usize, Vec<f32>)> = (0..panels)
            .into_par_iter()
            .step_by(each)
            .map(|first| {
                let range = first..(first + each).min(panels);
                let columns = (range.end * self.width).min(self.outputs) - first * self.width;
                let mut part = vec![0.0; rows * columns];
                self.some_panels(range, rows, x, None, activation, (&mut part, Layout::dense(columns)));
                (first * self.width, part)
            })
            .collect();
        let (y, to) = y;
        for (first, part) in parts {
            let columns = part.len() / rows;
            for (row, part) in part.chunks_exact(columns).enumerate() {
                y[to.at(row) + first..][..columns].copy_from_slice(part);
            }
        }
    }

    /// Some of the panels; `y` begins with the first one's columns.
    fn some_panels(
        &self,
        panels: Range<usize>,
        rows: usize,
        x: (&[f32], Layout),
        add: Option<(&[f32], Layout)>,
        activation: Activation,
        (y, to): (&mut [f32], Layout),
    ) {
        let columns = (panels.end * self.width).min(self.outputs) - panels.start * self.width;
        let finish = Finish::new(self, panels.start, add, activation, (&mut *y, to));
        match &self.panels {
            Panels::Floats(weights) => weights.multiply(panels, rows, x, finish),
            Panels::Integers(weights) => weights.multiply(panels, rows, x, finish),
            Panels::Blocks(weights) => weights.multiply(panels, rows, x, finish),
        }
        if activation == Activation::Gelu {
            for row in 0..rows {
                gelu_all(&mut y[to.at(row)..][..columns]);
            }
        }
    }
}

/// Threads of the pool that this is called in; 1 outside of one.
pub(super) fn threads() -> usize {
    rayon::current_thread_index().map_or(1, |_| rayon::current_num_threads())
}

#[cfg(test)]
mod tests;
