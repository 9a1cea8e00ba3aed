//! Products with constant matrices.

use std::ops::Range;

use multiversion::multiversion;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows that one call of the innermost loop works on where there are 32 registers, and where there are 16.
const ROWS_MANY: usize = 12;
const ROWS_FEW: usize = 6;
/// Registers of weights that one step of the innermost loop reads: a panel's width.
const REGISTERS: usize = 2;
/// Multiplications from which on it pays to wake other threads.
const WORTH_SHARING: usize = 1 << 17;
/// The widest panel of any instruction set.
const WIDEST: usize = 32;

/// What is done to each sum before it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x · ½ · (1 + erf(x/√2))`.
    Gelu,
}

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

/// A matrix's values as they are given: row-major `[inputs, outputs]`, or `[outputs, inputs]` where `transposed`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 8-bit levels with a scale for each output.
    I8(&'a [i8], &'a [f32]),
}

#[derive(Debug)]
enum Panels {
    F32(Vec<f32>),
    I8(Vec<i8>),
}

/// A constant matrix and a bias, laid out for products with rows: panels of some outputs (two registers of this processor), each
/// `[inputs, width]`.
#[derive(Debug)]
pub(crate) struct Matrix {
    arch: Arch,
    inputs: usize,
    outputs: usize,
    width: usize,
    panels: Panels,
    /// Of each output, padded to whole panels; none for 32-bit weights.
    scales: Option<Vec<f32>>,
    /// Of each output, padded to whole panels.
    bias: Vec<f32>,
}

impl Matrix {
    /// Lays out weights; `None` where sizes do not fit. A missing bias is zero.
    pub fn new(weights: Weights<'_>, [inputs, outputs]: [usize; 2], transposed: bool, bias: Option<&[f32]>) -> Option<Self> {
        let count = inputs.checked_mul(outputs)?;
        let (given, scales) = match weights {
            Weights::F32(values) => (values.len(), None),
            Weights::I8(levels, scales) => (levels.len(), Some(scales)),
        };
        let fits = given == count && count > 0 && scales.is_none_or(|s| s.len() == outputs);
        if !fits || bias.is_some_and(|b| b.len() != outputs) {
            return None;
        }
        let arch = Arch::new();
        let width = REGISTERS * lanes();
        let shape = [inputs, outputs];
        let panels = match weights {
            Weights::F32(values) => Panels::F32(panels(values, shape, transposed, width)),
            Weights::I8(levels, _) => Panels::I8(panels(levels, shape, transposed, width)),
        };
        let padded = |values: &[f32]| {
            let mut values = values.to_vec();
            values.resize(outputs.next_multiple_of(width), 0.0);
            values
        };
        let bias = padded(bias.unwrap_or_default());
        Some(Self { arch, inputs, outputs, width, panels, scales: scales.map(padded), bias })
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
        let relu6 = activation == Activation::Relu6;
        self.arch.dispatch(Product { matrix: self, panels, rows, x, add, relu6, y: (&mut *y, to) });
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
pub(super) fn lanes() -> usize {
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

/// One call of [`Matrix::multiply`].
struct Product<'a> {
    matrix: &'a Matrix,
    panels: Range<usize>,
    rows: usize,
    x: (&'a [f32], Layout),
    add: Option<(&'a [f32], Layout)>,
    relu6: bool,
    y: (&'a mut [f32], Layout),
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.panels::<S, ROWS_MANY>(simd);
        } else {
            self.panels::<S, ROWS_FEW>(simd);
        }
    }
}

impl Product<'_> {
    /// Panel by panel: the weights of one stay in the nearest cache while all rows meet them. Rows are packed before, as many
    /// together as the innermost loop works on, with their values side by side.
    #[inline(always)]
    fn panels<S: Simd, const MOST: usize>(&mut self, simd: S) {
        let matrix = self.matrix;
        let packed = self.pack(MOST);
        let size = matrix.inputs * matrix.width;
        let mut expanded = Vec::new();
        for panel in self.panels.clone() {
            let weights = match &matrix.panels {
                Panels::F32(panels) => &panels[panel * size..][..size],
                Panels::I8(panels) => {
                    expanded.clear();
                    expanded.extend(panels[panel * size..][..size].iter().map(|&level| f32::from(level)));
                    &expanded
                }
            };
            let weights = S::as_simd_f32s(weights).0.as_chunks::<REGISTERS>().0;
            let mut row = 0;
            while row < self.rows {
                let x = &packed[row * matrix.inputs..];
                row += match (self.rows - row).min(MOST) {
                    1 => self.tile::<S, 1>(simd, x, weights, panel, row),
                    2 => self.tile::<S, 2>(simd, x, weights, panel, row),
                    3 => self.tile::<S, 3>(simd, x, weights, panel, row),
                    4 => self.tile::<S, 4>(simd, x, weights, panel, row),
                    5 => self.tile::<S, 5>(simd, x, weights, panel, row),
                    6 => self.tile::<S, 6>(simd, x, weights, panel, row),
                    7 => self.tile::<S, 7>(simd, x, weights, panel, row),
                    8 => self.tile::<S, 8>(simd, x, weights, panel, row),
                    9 => self.tile::<S, 9>(simd, x, weights, panel, row),
                    10 => self.tile::<S, 10>(simd, x, weights, panel, row),
                    11 => self.tile::<S, 11>(simd, x, weights, panel, row),
                    _ => self.tile::<S, MOST>(simd, x, weights, panel, row),
                };
            }
        }
    }

    fn pack(&self, most: usize) -> Vec<f32> {
        let (inputs, (x, from)) = (self.matrix.inputs, self.x);
        let mut packed = vec![0.0; self.rows * inputs];
        for first in (0..self.rows).step_by(most) {
            let rows = most.min(self.rows - first);
            let tile = &mut packed[first * inputs..][..rows * inputs];
            for row in 0..rows {
                let x = &x[from.at(first + row)..][..inputs];
                for (to, from) in tile.iter_mut().skip(row).step_by(rows).zip(x) {
                    *to = *from;
                }
            }
        }
        packed
    }

    /// `ROWS` rows by one panel, all sums in registers; gives `ROWS`.
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize>(
        &mut self,
        simd: S,
        x: &[f32],
        weights: &[[S::f32s; REGISTERS]],
        panel: usize,
        row: usize,
    ) -> usize {
        let mut sums = [[simd.splat_f32s(0.0); REGISTERS]; ROWS];
        for (x, weights) in x.as_chunks::<ROWS>().0.iter().zip(weights) {
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
        self.finish(&mut done, panel, row);
        ROWS
    }

    /// Scales, bias and what else is done to sums before they are stored.
    #[inline(always)]
    fn finish(&mut self, sums: &mut [[f32; WIDEST]], panel: usize, row: usize) {
        let matrix = self.matrix;
        let first = panel * matrix.width;
        let column = first - self.panels.start * matrix.width;
        let lanes = matrix.width.min(matrix.outputs - first);
        let bias = &matrix.bias[first..first + lanes];
        let (y, to) = &mut self.y;
        for (r, sums) in sums.iter_mut().enumerate() {
            let sums = &mut sums[..lanes];
            if let Some(scales) = &matrix.scales {
                sums.iter_mut().zip(&scales[first..first + lanes]).for_each(|(sum, scale)| *sum *= scale);
            }
            sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            if let Some((add, layout)) = self.add {
                let add = &add[layout.at(row + r) + first..][..lanes];
                sums.iter_mut().zip(add).for_each(|(sum, add)| *sum += add);
            }
            if self.relu6 {
                sums.iter_mut().for_each(|sum| *sum = sum.clamp(0.0, 6.0));
            }
            y[to.at(row + r) + column..][..lanes].copy_from_slice(sums);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn gelu_all(values: &mut [f32]) {
    for value in values {
        *value = gelu(*value);
    }
}

/// e^x to about 2 ulp for x in [−87, 88], clamped outside (polynomial of Cephes' `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and subtracting 1.5·2^23 rounds to the nearest integer without a call.
    let z = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = x - z * 0.693_359_4 - z * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits((((z as i32) + 127) as u32) << 23)
}

/// GELU by the error function to an absolute error below 2e-7 (Abramowitz & Stegun 7.1.26).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let erf = (1.0 - p * exp(-a * a)).copysign(x);
    0.5 * x * (1.0 + erf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 0.731).sin()).collect()
    }

    /// The product in 64 bits.
    fn expected(x: &[f32], w: &dyn Fn(usize, usize) -> f32, bias: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f64> {
        let row = |x: &[f32]| -> Vec<f64> {
            let sum = |n: usize| (0..inputs).map(|k| f64::from(x[k]) * f64::from(w(k, n))).sum::<f64>();
            (0..outputs).map(|n| f64::from(bias[n]) + sum(n)).collect()
        };
        x.chunks_exact(inputs).flat_map(row).collect()
    }

    fn near(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            // Sums of at most 70 products of size 1 in f32.
            assert!((f64::from(*f) - e).abs() < 2e-5, "{i}: {f} {e}");
        }
    }

    #[test]
    fn products_of_every_shape_and_form() {
        for rows in [1, 2, 3, 5, 12, 13, 29] {
            for [inputs, outputs] in [[1, 1], [7, 16], [33, 40], [64, 31], [16, 48]] {
                let (x, w, bias) = (numbers(rows * inputs, 0.0), numbers(inputs * outputs, 9.0), numbers(outputs, 3.0));
                let turned: Vec<f32> =
                    (0..outputs).flat_map(|n| (0..inputs).map(move |k| (k, n))).map(|(k, n)| w[k * outputs + n]).collect();
                for (weights, transposed) in [(&w, false), (&turned, true)] {
                    let matrix = Matrix::new(Weights::F32(weights), [inputs, outputs], transposed, Some(&bias)).unwrap();
                    let mut y = vec![9.0; rows * outputs];
                    matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
                    near(&y, &expected(&x, &|k, n| w[k * outputs + n], &bias, [inputs, outputs]));
                }
                let levels: Vec<i8> = w.iter().map(|v| (v * 127.0) as i8).collect();
                let scales: Vec<f32> = (0..outputs).map(|n| 0.001 * (n + 1) as f32 / outputs as f32).collect();
                let matrix = Matrix::new(Weights::I8(&levels, &scales), [inputs, outputs], false, Some(&bias)).unwrap();
                let mut y = vec![9.0; rows * outputs];
                matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
                near(&y, &expected(&x, &|k, n| f32::from(levels[k * outputs + n]) * scales[n], &bias, [inputs, outputs]));
            }
        }
    }

    #[test]
    fn threads_share_the_outputs() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let (rows, inputs, outputs) = (5, 300, 333);
        let (x, w, bias) = (numbers(rows * inputs, 0.0), numbers(inputs * outputs, 9.0), numbers(outputs, 3.0));
        let matrix = Matrix::new(Weights::F32(&w), [inputs, outputs], false, Some(&bias)).unwrap();
        let (from, to) = (Layout::dense(inputs), Layout { start: 2, width: 2, line: 900, step: 400 });
        let mut alone = vec![7.0; 2 + 3 * 900];
        let mut shared = alone.clone();
        matrix.multiply_shared(rows, (&x, from), Activation::Gelu, (&mut alone, to));
        pool.install(|| matrix.multiply_shared(rows, (&x, from), Activation::Gelu, (&mut shared, to)));
        assert_eq!(alone, shared);
        assert_ne!(alone[2 + 1800 + 332], 7.0);
    }

    #[test]
    fn rows_lie_where_layouts_say_and_are_added_to() {
        let (inputs, outputs) = (3, 5);
        let (x, w, add) = (numbers(24, 0.0), numbers(15, 9.0), numbers(40, 5.0));
        let matrix = Matrix::new(Weights::F32(&w), [inputs, outputs], false, None).unwrap();
        // Four rows in two lines of two.
        let from = Layout { start: 1, width: 2, line: 11, step: 4 };
        let onto = Layout { start: 2, width: 2, line: 18, step: 7 };
        let mut y = vec![7.0; 40];
        matrix.multiply(4, (&x, from), Some((&add, onto)), Activation::Relu6, (&mut y, onto));
        for row in 0..4 {
            let (a, b) = (1 + row / 2 * 11 + row % 2 * 4, 2 + row / 2 * 18 + row % 2 * 7);
            for n in 0..outputs {
                let sum: f32 = (0..inputs).map(|k| x[a + k] * w[k * outputs + n]).sum();
                assert!((y[b + n] - (sum + add[b + n]).clamp(0.0, 6.0)).abs() < 1e-6);
            }
        }
        assert_eq!((y[0], y[1], y[7], y[8], y[14]), (7.0, 7.0, 7.0, 7.0, 7.0));
    }

    #[test]
    fn gelu_is_that_of_the_error_function() {
        // scipy.special.erf: x, x/2·(1 + erf(x/√2)).
        for (x, expected) in [
            (-6.0, -5.919_527e-9),
            (-3.0, -0.004_049_694),
            (-1.0, -0.158_655_25),
            (0.0, 0.0),
            (0.5, 0.345_731_23),
            (2.0, 1.954_499_7),
        ] {
            assert!((gelu(x) - expected).abs() < 1e-6, "{x}: {} {expected}", gelu(x));
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(Matrix::new(Weights::F32(&[0.0; 5]), [2, 3], false, None).is_none());
        assert!(Matrix::new(Weights::F32(&[0.0; 6]), [2, 3], false, Some(&[0.0; 2])).is_none());
        assert!(Matrix::new(Weights::I8(&[0; 6], &[0.0; 2]), [2, 3], false, None).is_none());
        assert!(Matrix::new(Weights::F32(&[]), [0, 3], false, None).is_none());
        assert!(Matrix::new(Weights::F32(&[]), [usize::MAX, 3], false, None).is_none());
    }
}
