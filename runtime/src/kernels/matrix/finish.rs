//! From sums to what is stored.

use super::{Activation, Layout, Matrix, WIDEST};

/// What is done to sums, and where they go. [`Activation::Gelu`] is not done here: it costs less once all are stored.
pub(super) struct Finish<'a> {
    matrix: &'a Matrix,
    /// The panel whose columns `y` begins with.
    first: usize,
    add: Option<(&'a [f32], Layout)>,
    relu6: bool,
    y: (&'a mut [f32], Layout),
}

impl<'a> Finish<'a> {
    pub fn new(
        matrix: &'a Matrix,
        first: usize,
        add: Option<(&'a [f32], Layout)>,
        activation: Activation,
        y: (&'a mut [f32], Layout),
    ) -> Self {
        Self { matrix, first, add, relu6: activation == Activation::Relu6, y }
    }

    /// Scales sums of some rows with a panel, adds what is to be added and stores them.
    #[inline(always)]
    pub fn store(&mut self, sums: &[[f32; WIDEST]], panel: usize, row: usize) {
        let matrix = self.matrix;
        let first = panel * matrix.width;
        let column = first - self.first * matrix.width;
        let lanes = matrix.width.min(matrix.outputs - first);
        let relu6 = self.relu6;
        let (y, to) = &mut self.y;
        for (r, sums) in sums.iter().enumerate() {
            let parts = Parts {
                sums: &sums[..lanes],
                scales: matrix.scales.as_ref().map(|scales| &scales[first..first + lanes]),
                bias: &matrix.bias[first..first + lanes],
                add: self.add.map(|(add, layout)| &add[layout.at(row + r) + first..][..lanes]),
            };
            let y = &mut y[to.at(row + r) + column..][..lanes];
            // Lengths that are known when this is compiled take a few registers; others, calls and loops.
            match lanes {
                32 => parts.store_whole::<32>(relu6, y),
                16 => parts.store_whole::<16>(relu6, y),
                8 => parts.store_whole::<8>(relu6, y),
                _ => parts.store(relu6, y),
            }
        }
    }
}

/// A row's sums with a panel, and what goes with them; all as long as there are outputs.
struct Parts<'a> {
    sums: &'a [f32],
    scales: Option<&'a [f32]>,
    bias: &'a [f32],
    add: Option<&'a [f32]>,
}

impl Parts<'_> {
    #[inline(always)]
    fn store_whole<const LANES: usize>(&self, relu6: bool, y: &mut [f32]) {
        let whole = (self.sums.first_chunk::<LANES>(), self.bias.first_chunk::<LANES>(), y.first_chunk_mut::<LANES>());
        let (Some(sums), Some(bias), Some(y)) = whole else { return };
        let mut values = *sums;
        if let Some(scales) = self.scales.and_then(|scales| scales.first_chunk::<LANES>()) {
            for lane in 0..LANES {
                values[lane] *= scales[lane];
            }
        }
        for lane in 0..LANES {
            values[lane] += bias[lane];
        }
        if let Some(add) = self.add.and_then(|add| add.first_chunk::<LANES>()) {
            for lane in 0..LANES {
                values[lane] += add[lane];
            }
        }
        if relu6 {
            for value in &mut values {
                *value = value.clamp(0.0, 6.0);
            }
        }
        *y = values;
    }

    #[inline(always)]
    fn store(&self, relu6: bool, y: &mut [f32]) {
        for (lane, y) in y.iter_mut().enumerate() {
            let scaled = self.sums[lane] * self.scales.map_or(1.0, |scales| scales[lane]);
            let sum = scaled + self.bias[lane] + self.add.map_or(0.0, |add| add[lane]);
            *y = if relu6 { sum.clamp(0.0, 6.0) } else { sum };
        }
    }
}
