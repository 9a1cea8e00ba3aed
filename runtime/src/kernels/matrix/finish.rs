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
    pub fn store(&mut self, sums: &mut [[f32; WIDEST]], panel: usize, row: usize) {
        let matrix = self.matrix;
        let first = panel * matrix.width;
        let column = first - self.first * matrix.width;
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
