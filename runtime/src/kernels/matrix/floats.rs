//! Products in floats, through `pulp`.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::finish::Finish;
use super::tile::{Tile, for_rows, pack};
use super::{BLOCK, Layout, Nibbles, WIDEST};

/// Rows that one call of the innermost loop works on where there are 32 registers, and where there are 16.
const ROWS_MANY: usize = 12;
const ROWS_FEW: usize = 6;
/// Registers of weights that one step of the innermost loop reads: a panel's width.
const REGISTERS: usize = 2;

/// Weights in panels of [`REGISTERS`], each `[inputs, width]`.
#[derive(Debug)]
pub(super) struct Panels {
    arch: Arch,
    inputs: usize,
    width: usize,
    values: Values,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    I8(Vec<i8>),
    /// Bytes `[inputs / 2, width]` a panel: the first half of the inputs in the lower halves. Scales `[inputs / BLOCK, width]` a panel.
    I4(Vec<u8>, Vec<f32>),
}

impl Panels {
    pub fn of_floats(values: &[f32], shape: [usize; 2], transposed: bool) -> Self {
        Self::new(shape, |width| Values::F32(panels(values, shape, transposed, width)))
    }

    /// 8-bit levels, which stay so in memory.
    pub fn of_levels(levels: &[i8], shape: [usize; 2], transposed: bool) -> Self {
        Self::new(shape, |width| Values::I8(panels(levels, shape, transposed, width)))
    }

    /// 4-bit levels, which stay so in memory.
    pub fn of_nibbles(nibbles: Nibbles<'_>) -> Self {
        let Nibbles { inputs, outputs, .. } = nibbles;
        Self::new([inputs, outputs], |width| {
            let rows = inputs / 2;
            let mut levels = vec![0; outputs.next_multiple_of(width) * rows];
            for output in 0..outputs {
                for input in 0..inputs {
                    let byte = &mut levels[(output / width * rows + input % rows) * width + output % width];
                    *byte |= nibbles.stored(output, input) << (input / rows * 4);
                }
            }
            Values::I4(levels, nibbles.scales_in_panels(width))
        })
    }

    fn new(shape: [usize; 2], values: impl FnOnce(usize) -> Values) -> Self {
        let width = REGISTERS * lanes();
        Self { arch: Arch::new(), inputs: shape[0], width, values: values(width) }
    }

    /// Outputs of a panel.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Multiplies rows with some of the panels. Rows are packed before, as many together as the innermost loop works on, with
    /// their values side by side.
    pub fn multiply(&self, panels: Range<usize>, rows: usize, x: (&[f32], Layout), finish: Finish<'_>) {
        self.arch.dispatch(Product { weights: self, panels, rows, x, finish });
    }
}

fn panels<T: Copy + Default>(values: &[T], [inputs, outputs]: [usize; 2], transposed: bool, width: usize) -> Vec<T> {
    let mut panels = vec![T::default(); outputs.next_multiple_of(width) * inputs];
    for (first, panel) in (0..outputs).step_by(width).zip(panels.chunks_exact_mut(inputs * width)) {
        let lanes = width.min(outputs - first);
        if transposed {
            for (lane, row) in values[first * inputs..].chunks_exact(inputs).take(lanes).enumerate() {
                for (to, from) in panel.chunks_exact_mut(width).zip(row) {
                    to[lane] = *from;
                }
            }
        } else {
            for (to, row) in panel.chunks_exact_mut(width).zip(values.chunks_exact(outputs)) {
                to[..lanes].copy_from_slice(&row[first..first + lanes]);
            }
        }
    }
    panels
}

/// Floats of a register.
pub(crate) fn lanes() -> usize {
    Arch::new().dispatch(Lanes)
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
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

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.run::<S, ROWS_MANY>(simd);
        } else {
            self.run::<S, ROWS_FEW>(simd);
        }
    }
}

impl Product<'_> {
    /// Panel by panel: the weights of one stay in the nearest cache while all rows meet them.
    #[inline(always)]
    fn run<S: Simd, const MOST: usize>(mut self, simd: S) {
        let Panels { inputs, width, ref values, .. } = *self.weights;
        let (x, from) = self.x;
        let packed = pack(self.rows, MOST, inputs, |row| &x[from.at(row)..][..inputs]);
        let size = inputs * width;
        let mut expanded = Vec::new();
        for panel in self.panels {
            let weights = match values {
                Values::F32(panels) => &panels[panel * size..][..size],
                Values::I8(panels) => {
                    expanded.clear();
                    expanded.extend(panels[panel * size..][..size].iter().map(|&level| f32::from(level)));
                    &expanded
                }
                Values::I4(levels, scales) => {
                    let levels = &levels[panel * size / 2..][..size / 2];
                    expanded.clear();
                    expanded.extend(levels.iter().map(|byte| f32::from(byte & 0xf) - Nibbles::OFFSET));
                    expanded.extend(levels.iter().map(|byte| f32::from(byte >> 4) - Nibbles::OFFSET));
                    scale_blocks(simd, &mut expanded, &scales[panel * size / BLOCK..][..size / BLOCK]);
                    &expanded
                }
            };
            let weights = S::as_simd_f32s(weights).0.as_chunks::<REGISTERS>().0;
            let mut tile = FloatTile { simd, x: &packed, inputs, weights, panel, finish: &mut self.finish };
            for_rows(MOST, self.rows, &mut tile);
        }
    }
}

/// Multiplies a panel `[inputs, width]` with the scales `[inputs / BLOCK, width]` of its blocks.
#[inline(always)]
fn scale_blocks<S: Simd>(simd: S, panel: &mut [f32], scales: &[f32]) {
    let panel = S::as_mut_simd_f32s(panel).0.as_chunks_mut::<REGISTERS>().0;
    let scales = S::as_simd_f32s(scales).0.as_chunks::<REGISTERS>().0;
    for (rows, scales) in panel.chunks_exact_mut(BLOCK).zip(scales) {
        for row in rows {
            for (values, scales) in row.iter_mut().zip(scales) {
                *values = simd.mul_f32s(*values, *scales);
            }
        }
    }
}

/// Some rows by one panel.
struct FloatTile<'a, 'b, S: Simd> {
    simd: S,
    x: &'a [f32],
    inputs: usize,
    weights: &'a [[S::f32s; REGISTERS]],
    panel: usize,
    finish: &'a mut Finish<'b>,
}

impl<S: Simd> Tile for FloatTile<'_, '_, S> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, row: usize) {
        let simd = self.simd;
        let mut sums = [[simd.splat_f32s(0.0); REGISTERS]; ROWS];
        for (x, weights) in self.x[row * self.inputs..].as_chunks::<ROWS>().0.iter().zip(self.weights) {
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = simd.splat_f32s(*x);
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = simd.mul_add_e_f32s(x, *weight, *sum);
                }
            }
        }
        // A short loop of its own, which is unrolled: one that goes on with the sums would keep them in memory above as well.
        let mut done = [[0f32; WIDEST]; ROWS];
        for (done, sums) in done.iter_mut().zip(&sums) {
            let registers = S::as_mut_simd_f32s(done).0;
            registers[0] = sums[0];
            registers[1] = sums[1];
        }
        self.finish.store(&done, self.panel, row);
    }
}
