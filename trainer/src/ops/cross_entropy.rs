//! Softmax cross-entropy straight from hidden states and the tied output projection.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernels::{Matrix, Product, add_assign, cross_entropy_row, matmul};
use super::{f32_slice, linear, on_cuda};

/// Rows of logits that exist at one time; bounds memory to this many times the vocabulary.
const CHUNK_ROWS: usize = 256;

/// Gradients by the hidden states, the projection and the bias, for an upstream gradient of 1.
struct Gradients {
    hidden: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// The forward pass has the logits at hand, so it makes the gradients too: the projection is computed once, not twice.
struct TiedCrossEntropy {
    targets: Vec<u32>,
    /// Of each row; absent where all are 1.
    weights: Option<Vec<f32>>,
    smoothing: f32,
    gradients: Mutex<Option<Gradients>>,
}

impl CustomOp3 for TiedCrossEntropy {
    fn name(&self) -> &'static str {
        "tied_cross_entropy"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (hidden, weight, bias) = (f32_slice(name, s1, l1)?, f32_slice(name, s2, l2)?, f32_slice(name, s3, l3)?);
        let (classes, width) = l2.shape().dims2()?;
        let rows = self.targets.len();
        if hidden.len() != rows * width || bias.len() != classes {
            candle_core::bail!("{name}: hidden {:?}, weight {:?}, {rows} targets", l1.dims(), l2.dims());
        }
        if let Some(bad) = self.targets.iter().find(|&&t| t as usize >= classes) {
            candle_core::bail!("{name}: target {bad} outside {classes} classes");
        }
        if self.weights.as_ref().is_some_and(|w| w.len() != rows) {
            candle_core::bail!("{name}: one weight a row is needed for {rows} rows");
        }
        let mut gradients =
            Gradients { hidden: vec![0f32; hidden.len()], weight: vec![0f32; weight.len()], bias: vec![0f32; classes] };
        let weight_of = |row: usize| self.weights.as_ref().map_or(1.0, |w| w[row]);
        let mut logits = vec![0f32; CHUNK_ROWS.min(rows) * classes];
        let mut loss = 0f64;
        for start in (0..rows).step_by(CHUNK_ROWS) {
            let n = CHUNK_ROWS.min(rows - start);
            let logits = &mut logits[..n * classes];
            let x = &hidden[start * width..(start + n) * width];
            let product = |m, n, k, accumulate| Product { m, n, k, accumulate, parallel: true };
            matmul(
                product(n, classes, width, false),
                Matrix::rows(x, width),
                Matrix::rows(weight, width).transposed(),
                logits,
                classes,
            );
            loss += logits
                .par_chunks_mut(classes)
                .zip(&self.targets[start..start + n])
                .enumerate()
                .map(|(i, (row, &target))| {
                    let weight = weight_of(start + i);
                    let loss = cross_entropy_row(row, bias, target as usize, self.smoothing, weight / rows as f32);
                    f64::from(weight) * f64::from(loss)
                })
                .collect::<Vec<_>>()
                .iter()
                .sum::<f64>();
            let dx = &mut gradients.hidden[start * width..(start + n) * width];
            matmul(product(n, width, classes, false), Matrix::rows(logits, classes), Matrix::rows(weight, width), dx, width);
            let dw = &mut gradients.weight;
            matmul(
                product(classes, width, n, true),
                Matrix::rows(logits, classes).transposed(),
                Matrix::rows(x, width),
                dw,
                width,
            );
            add_assign(&mut gradients.bias, &linear::column_sums(logits, classes));
        }
        *self.gradients.lock().map_err(|_| Error::Msg(format!("{name}: poisoned")))? = Some(gradients);
        Ok((CpuStorage::F32(vec![(loss / rows as f64) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let taken = self.gradients.lock().map_err(|_| Error::Msg(format!("{}: poisoned", self.name())))?.take();
        let Some(made) = taken else {
            candle_core::bail!("{}: a second backward pass through one forward pass", self.name());
        };
        let upstream = f64::from(gradient.to_scalar::<f32>()?);
        let scaled = |values: Vec<f32>, like: &Tensor| -> Result<Option<Tensor>> {
            let tensor = Tensor::from_vec(values, like.shape(), like.device())?;
            if upstream == 1.0 { Ok(Some(tensor)) } else { tensor.affine(upstream, 0.0).map(Some) }
        };
        Ok((scaled(made.hidden, hidden)?, scaled(made.weight, weight)?, scaled(made.bias, bias)?))
    }
}

/// Mean cross-entropy of `hidden · weightᵀ + bias` with `targets`; `smoothing` spreads that share over all classes.
///
/// `hidden` is `[rows, width]`, `weight` `[classes, width]`, `bias` `[classes]`, `targets` one class a row. With `weights`, one
/// number of any sign a row, each row's term counts that many times (the mean still divides by the number of rows). The result
/// is a scalar. No `[rows, classes]` tensor is kept.
///
/// # Errors
/// Shapes that do not fit, no rows, a target outside the classes.
pub fn tied_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    targets: Vec<u32>,
    weights: Option<Vec<f32>>,
    smoothing: f32,
) -> Result<Tensor> {
    if targets.is_empty() {
        candle_core::bail!("tied_cross_entropy: no rows");
    }
    on_cuda!(
        hidden.device(),
        super::cuda::tied_cross_entropy([hidden, weight, bias], targets, weights, smoothing, super::precision())
    );
    let op = TiedCrossEntropy { targets, weights, smoothing, gradients: Mutex::new(None) };
    hidden.contiguous()?.apply_op3(weight, bias, op)
}
