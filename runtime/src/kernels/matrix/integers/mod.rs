//! Products in integers: 8-bit levels on one side, 8- or 4-bit ones on the other, sums in 32 bits, in one instruction where the
//! processor has it.

mod blocks;
#[cfg(target_arch = "aarch64")]
mod dotprod;
mod plain;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use multiversion::multiversion;

pub(super) use self::blocks::Panels as Blocks;
use super::finish::Finish;
use super::tile::{Tile, for_rows};
use super::{Layout, WIDEST};

/// Inputs whose levels are multiplied in one step.
const GROUP: usize = 4;
/// So many products of full-range levels fit into 32 bits.
const MOST_INPUTS: usize = 1 << 16;

/// How levels are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instructions {
    /// Any processor's.
    Plain,
    /// AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// ARM's dot product.
    #[cfg(target_arch = "aarch64")]
    DotProduct,
}

impl Instructions {
    /// Those of this processor.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if vnni::available() {
            return Self::Vnni;
        }
        #[cfg(target_arch = "aarch64")]
        if dotprod::available() {
            return Self::DotProduct;
        }
        Self::Plain
    }

    fn width(self) -> usize {
        match self {
            Self::Plain => plain::Plain::WIDTH,
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => vnni::Vnni::WIDTH,
            #[cfg(target_arch = "aarch64")]
            Self::DotProduct => dotprod::DotProduct::WIDTH,
        }
    }

    /// Does work with them.
    ///
    /// # Panics
    /// Where this processor does not have them.
    fn run(self, work: impl Work) {
        match self {
            Self::Plain => plain::run(work),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => vnni::run(work),
            #[cfg(target_arch = "aarch64")]
            Self::DotProduct => dotprod::run(work),
        }
    }
}

/// What is done with a set of instructions.
trait Work {
    fn run<D: Dot>(self);
}

/// Whether this processor multiplies bytes, and adds the products to 32-bit sums, in one instruction that is known here.
pub(crate) fn multiplies_bytes() -> bool {
    Instructions::detect() != Instructions::Plain
}

/// A set of such instructions.
trait Dot {
    /// Rows that one call of the innermost loop works on where it keeps sums of integers alone.
    const ROWS: usize;
    /// Outputs of a panel.
    const WIDTH: usize;
    /// The least level of a row's values; the largest is 255 more.
    const LEAST: i32;
    /// Sums of a row with a panel.
    type Sums: Copy;
    /// The same in floats.
    type Floats: Copy;
    /// Weights of a panel from [`GROUP`] inputs.
    type Weights: Copy;

    fn zero() -> Self::Sums;
    fn zero_floats() -> Self::Floats;
    /// Reads [`GROUP`] levels for each of a panel's outputs.
    fn load(weights: &[i8]) -> Self::Weights;
    /// Reads as many levels of 4 bits, each [`blocks::OFFSET`] too large: the lower half of them from the bytes' lower halves.
    fn load_halves(weights: &[u8]) -> Self::Weights;
    /// Adds to each output's sum the products of its levels with those of a row.
    fn add(sums: Self::Sums, weights: Self::Weights, x: [u8; GROUP]) -> Self::Sums;
    /// Stores `(sum − zero · of) · scale`, where `of` is the sum of the levels that a row's levels were multiplied with.
    fn store_scaled(sums: Self::Sums, of: &[i32], row: Row, to: &mut [f32; WIDEST]);
    /// Adds to each output's float its sum times its scale.
    fn add_scaled(floats: Self::Floats, sums: Self::Sums, scales: &[f32]) -> Self::Floats;
    fn store_floats(floats: Self::Floats, to: &mut [f32; WIDEST]);
}

/// Levels in panels, each `[inputs / GROUP, width, GROUP]`, filled up with zeros.
#[derive(Debug)]
pub(super) struct Panels {
    instructions: Instructions,
    inputs: usize,
    levels: Vec<i8>,
    /// Of each output's levels, padded to whole panels.
    sums: Vec<i32>,
}

impl Panels {
    /// `None` where sums might not fit into 32 bits.
    pub fn new(levels: &[i8], shape: [usize; 2], transposed: bool) -> Option<Self> {
        Self::with(Instructions::detect(), levels, shape, transposed)
    }

    fn with(instructions: Instructions, levels: &[i8], [inputs, outputs]: [usize; 2], transposed: bool) -> Option<Self> {
        if inputs > MOST_INPUTS {
            return None;
        }
        let width = instructions.width();
        let size = inputs.next_multiple_of(GROUP) * width;
        let mut panels = vec![0; outputs.div_ceil(width) * size];
        let mut sums = vec![0; outputs.next_multiple_of(width)];
        if transposed {
            for (output, levels) in levels.chunks_exact(inputs).enumerate() {
                let places = panels[output / width * size..][..size].chunks_exact_mut(GROUP).skip(output % width).step_by(width);
                places.zip(levels.chunks(GROUP)).for_each(|(to, levels)| to[..levels.len()].copy_from_slice(levels));
                sums[output] = levels.iter().map(|&level| i32::from(level)).sum();
            }
        } else {
            for (input, levels) in levels.chunks_exact(outputs).enumerate() {
                for (levels, panel) in levels.chunks(width).zip(panels.chunks_exact_mut(size)) {
                    let places = &mut panel[input / GROUP * width * GROUP..][..width * GROUP];
                    places.iter_mut().skip(input % GROUP).step_by(GROUP).zip(levels).for_each(|(to, level)| *to = *level);
                }
                sums.iter_mut().zip(levels).for_each(|(sum, &level)| *sum += i32::from(level));
            }
        }
        Some(Self { instructions, inputs, levels: panels, sums })
    }

    /// Outputs of a panel.
    pub fn width(&self) -> usize {
        self.instructions.width()
    }

    /// Multiplies rows with some of the panels.
    pub fn multiply(&self, panels: Range<usize>, rows: usize, x: (&[f32], Layout), finish: Finish<'_>) {
        self.instructions.run(Product { weights: self, panels, rows, x, finish });
    }
}

/// One call of [`Panels::multiply`].
struct Product<'a> {
    weights: &'a Panels,
    panels: Range<usize>,
    rows: usize,
    x: (&'a [f32], Layout),
    finish: Finish<'a>,
}

/// Rows rounded to levels, [`GROUP`] together and the last ones filled up with anything, and what they stand for. Those of `most` rows
/// lie side by side, as [`for_rows`] takes them.
fn quantized<D: Dot>(rows: usize, most: usize, (x, from): (&[f32], Layout), inputs: usize) -> (Vec<[u8; GROUP]>, Vec<Row>) {
    let groups = inputs.div_ceil(GROUP);
    let (mut packed, mut ranges) = (vec![[0; GROUP]; rows * groups], Vec::with_capacity(rows));
    let mut levels = vec![[0; GROUP]; groups];
    for (tile, first) in packed.chunks_mut((most * groups).max(1)).zip((0..).step_by(most)) {
        let count = most.min(rows - first);
        for place in 0..count {
            ranges.push(quantize(&x[from.at(first + place)..][..inputs], D::LEAST, levels.as_flattened_mut()));
            tile.iter_mut().skip(place).step_by(count).zip(&levels).for_each(|(to, levels)| *to = *levels);
        }
    }
    (packed, ranges)
}

impl Work for Product<'_> {
    /// Panel by panel, as in floats.
    #[inline(always)]
    fn run<D: Dot>(mut self) {
        let weights = self.weights;
        let groups = weights.inputs.div_ceil(GROUP);
        let (packed, ranges) = quantized::<D>(self.rows, D::ROWS, self.x, weights.inputs);
        let size = groups * GROUP * D::WIDTH;
        for panel in self.panels {
            let mut tile = IntegerTile {
                x: &packed,
                groups,
                ranges: &ranges,
                levels: &weights.levels[panel * size..][..size],
                sums: &weights.sums[panel * D::WIDTH..][..D::WIDTH],
                panel,
                finish: &mut self.finish,
                dot: std::marker::PhantomData::<D>,
            };
            for_rows(D::ROWS, self.rows, &mut tile);
        }
    }
}

/// Rows of constant weights in 8 bits, with a scale for each: `value ≈ level · scale`, levels from −127 to 127.
pub(crate) fn round_rows(values: &[f32], inputs: usize) -> (Vec<i8>, Vec<f32>) {
    let mut levels = vec![0; values.len()];
    let rows = levels.chunks_exact_mut(inputs).zip(values.chunks_exact(inputs));
    let scales = rows.map(|(levels, row)| round_row(row, levels)).collect();
    (levels, scales)
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn round_row(row: &[f32], levels: &mut [i8]) -> f32 {
    const LANES: usize = 16;
    const LEVELS: f32 = 127.0;
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut most = [0f32; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            most[lane] = most[lane].max(chunk[lane].abs());
        }
    }
    let most = most.iter().chain(rest).fold(0f32, |most, value| most.max(value.abs()));
    let scale = most / LEVELS;
    if scale < f32::MIN_POSITIVE {
        levels.fill(0);
        return 0.0;
    }
    let inverse = scale.recip();
    for (level, value) in levels.iter_mut().zip(row) {
        let rounded = (value * inverse + ROUND).to_bits().cast_signed() - ROUND.to_bits().cast_signed();
        *level = rounded.clamp(-127, 127) as i8;
    }
    scale
}

/// 1.5 · 2²³: adding it leaves a number rounded to the nearest integer in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// What a row's levels stand for: `value ≈ (level − zero) · scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    scale: f32,
    zero: i32,
}

/// Rounds a row to 256 levels from its least value, or zero, to its largest, or zero; zero itself is kept. As ONNX's
/// `DynamicQuantizeLinear`, but for each row. Levels begin at `least`, and are stored as bytes.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn quantize(x: &[f32], least: i32, levels: &mut [u8]) -> Row {
    const LANES: usize = 16;
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    // One loop each: of both at once, the compiler makes shuffles.
    for chunk in chunks {
        for lane in 0..LANES {
            low[lane] = low[lane].min(chunk[lane]);
        }
    }
    for chunk in chunks {
        for lane in 0..LANES {
            high[lane] = high[lane].max(chunk[lane]);
        }
    }
    let low = low.iter().chain(rest).fold(0f32, |low, &x| low.min(x));
    let high = high.iter().chain(rest).fold(0f32, |high, &x| high.max(x));
    let scale = (high - low) / 255.0;
    if scale < f32::MIN_POSITIVE {
        levels.fill(0);
        return Row { scale: 0.0, zero: 0 };
    }
    let inverse = scale.recip();
    let zero = (-low * inverse).round_ties_even().min(255.0);
    for (level, x) in levels.iter_mut().zip(x) {
        let rounded = (x * inverse + (zero + ROUND)).to_bits().cast_signed() - ROUND.to_bits().cast_signed();
        *level = (rounded.clamp(0, 255) + least) as u8;
    }
    Row { scale, zero: zero as i32 + least }
}

/// Some rows by one panel.
struct IntegerTile<'a, 'b, D> {
    x: &'a [[u8; GROUP]],
    groups: usize,
    ranges: &'a [Row],
    levels: &'a [i8],
    sums: &'a [i32],
    panel: usize,
    finish: &'a mut Finish<'b>,
    dot: std::marker::PhantomData<D>,
}

impl<D: Dot> Tile for IntegerTile<'_, '_, D> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, row: usize) {
        let mut sums = [D::zero(); ROWS];
        let x = self.x[row * self.groups..].as_chunks::<ROWS>().0;
        for (x, weights) in x.iter().zip(self.levels.chunks_exact(GROUP * D::WIDTH)) {
            let weights = D::load(weights);
            for (sums, x) in sums.iter_mut().zip(x) {
                *sums = D::add(*sums, weights, *x);
            }
        }
        let mut done = [[0f32; WIDEST]; ROWS];
        for ((done, sums), range) in done.iter_mut().zip(sums).zip(&self.ranges[row..]) {
            D::store_scaled(sums, self.sums, *range, done);
        }
        self.finish.store(&done, self.panel, row);
    }
}

#[cfg(test)]
mod tests;
