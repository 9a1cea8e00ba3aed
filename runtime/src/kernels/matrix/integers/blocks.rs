//! Products with 4-bit levels that have a scale for each [`BLOCK`] inputs of an output.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::finish::Finish;
use super::super::tile::{Tile, for_rows};
use super::super::{BLOCK, Layout, Nibbles, WIDEST};
use super::{Dot, GROUP, Instructions, Row, quantized};

/// [`GROUP`]s of inputs that share a scale.
const GROUPS: usize = BLOCK / GROUP;
/// What a stored level is too large by.
pub(super) const OFFSET: i8 = Nibbles::OFFSET as i8;

/// Levels in panels, each `[inputs / GROUP, width · GROUP / 2]` bytes: the lower half of a step's levels in the bytes' lower halves,
/// the upper half in the upper ones.
#[derive(Debug)]
pub(in super::super) struct Panels {
    instructions: Instructions,
    inputs: usize,
    levels: Vec<u8>,
    /// Of each panel, `[inputs / BLOCK, width]`.
    scales: Vec<f32>,
    /// Of each output's scaled levels, padded to whole panels.
    sums: Vec<f32>,
}

impl Panels {
    pub fn new(nibbles: Nibbles<'_>) -> Self {
        Self::with(Instructions::detect(), nibbles)
    }

    pub(super) fn with(instructions: Instructions, nibbles: Nibbles<'_>) -> Self {
        let Nibbles { inputs, outputs, .. } = nibbles;
        let width = instructions.width();
        let padded = outputs.next_multiple_of(width);
        let step = width * GROUP / 2;
        let (mut levels, mut sums) = (vec![0; padded * inputs / 2], vec![0.0; padded]);
        for output in 0..outputs {
            for input in 0..inputs {
                sums[output] += nibbles.value(output, input);
                let place = output % width * GROUP + input % GROUP;
                let byte = &mut levels[(output / width * inputs + input) / GROUP * step + place % step];
                *byte |= nibbles.stored(output, input) << (place / step * 4);
            }
        }
        Self { instructions, inputs, levels, scales: nibbles.scales_in_panels(width), sums }
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

impl super::Work for Product<'_> {
    #[inline(always)]
    fn run<D: Dot>(mut self) {
        let weights = self.weights;
        let groups = weights.inputs / GROUP;
        // Floats take as many registers as the integers.
        let most = D::ROWS / 2;
        let (packed, ranges) = quantized::<D>(self.rows, most, self.x, weights.inputs);
        let (size, blocks) = (groups * GROUP * D::WIDTH / 2, groups / GROUPS * D::WIDTH);
        for panel in self.panels {
            let mut tile = BlockTile {
                x: &packed,
                groups,
                ranges: &ranges,
                levels: &weights.levels[panel * size..][..size],
                scales: &weights.scales[panel * blocks..][..blocks],
                sums: &weights.sums[panel * D::WIDTH..][..D::WIDTH],
                panel,
                finish: &mut self.finish,
                dot: PhantomData::<D>,
            };
            for_rows(most, self.rows, &mut tile);
        }
    }
}

/// Some rows by one panel.
struct BlockTile<'a, 'b, D> {
    x: &'a [[u8; GROUP]],
    groups: usize,
    ranges: &'a [Row],
    levels: &'a [u8],
    scales: &'a [f32],
    sums: &'a [f32],
    panel: usize,
    finish: &'a mut Finish<'b>,
    dot: PhantomData<D>,
}

impl<D: Dot> Tile for BlockTile<'_, '_, D> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, row: usize) {
        let mut scaled = [D::zero_floats(); ROWS];
        let x = self.x[row * self.groups..].as_chunks::<ROWS>().0;
        let steps = GROUPS * GROUP * D::WIDTH / 2;
        for ((x, levels), scales) in
            x.chunks_exact(GROUPS).zip(self.levels.chunks_exact(steps)).zip(self.scales.chunks_exact(D::WIDTH))
        {
            let mut sums = [D::zero(); ROWS];
            for (x, levels) in x.iter().zip(levels.chunks_exact(GROUP * D::WIDTH / 2)) {
                let weights = D::load_halves(levels);
                for (sums, x) in sums.iter_mut().zip(x) {
                    *sums = D::add(*sums, weights, *x);
                }
            }
            for (scaled, sums) in scaled.iter_mut().zip(sums) {
                *scaled = D::add_scaled(*scaled, sums, scales);
            }
        }
        let mut done = [[0f32; WIDEST]; ROWS];
        for ((done, scaled), range) in done.iter_mut().zip(scaled).zip(&self.ranges[row..]) {
            D::store_floats(scaled, done);
            for (done, sum) in done.iter_mut().zip(self.sums) {
                *done = (*done - range.zero as f32 * sum) * range.scale;
            }
        }
        self.finish.store(&done, self.panel, row);
    }
}
