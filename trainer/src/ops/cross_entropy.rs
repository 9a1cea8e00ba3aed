//! Softmax cross-entropy straight from hidden states and the tied output projection.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernels::{Matrix, Product, add_assign, cross_entropy_row, matmul};
use super::{f32_slice, linear, on_cuda};

/// Rows of logits that exist at one time; bounds memory to this many times the vocabulary.
const CHUNK_ROWS: usize = 256;

/// Rows whose cross-entropies make one mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// How many.
    pub rows: usize,
    /// Share that is spread over all classes.
    pub smoothing: f32,
    /// How many times the mean counts.
    pub factor: f32,
}

/// What rows have to predict.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// The class of each row.
    pub classes: Vec<u32>,
    /// How many times each row's cross-entropy counts, a number of any sign; absent where all are 1. A mean divides by the number of its
    /// rows nevertheless.
    pub weights: Option<Vec<f32>>,
    /// Which rows belong together, one part behind the other.
    pub parts: Vec<Part>,
}

/// A row's target, and how it counts.
pub(super) struct Row {
    pub(super) target: u32,
    pub(super) weight: f32,
    /// What its cross-entropy counts in the sum of all means.
    pub(super) share: f32,
    pub(super) smoothing: f32,
}

impl Targets {
    /// One mean over all rows, which counts once.
    #[must_use]
    pub fn of_one(classes: Vec<u32>, weights: Option<Vec<f32>>, smoothing: f32) -> Self {
        let parts = vec![Part { rows: classes.len(), smoothing, factor: 1.0 }];
        Self { classes, weights, parts }
    }

    /// That there are as many as rows, in parts that have some each, and classes for them.
    pub(super) fn check(&self, rows: usize, classes: usize) -> Result<()> {
        let own = self.classes.len();
        if own != rows {
            candle_core::bail!("tied_cross_entropy: {own} targets for {rows} rows");
        }
        if own == 0 || self.parts.iter().any(|part| part.rows == 0) {
            candle_core::bail!("tied_cross_entropy: no rows");
        }
        if self.parts.iter().map(|part| part.rows).sum::<usize>() != rows {
            candle_core::bail!("tied_cross_entropy: parts {:?} of {rows} rows", self.parts);
        }
        if let Some(bad) = self.classes.iter().find(|&&target| target as usize >= classes) {
            candle_core::bail!("tied_cross_entropy: target {bad} outside {classes} classes");
        }
        if self.weights.as_ref().is_some_and(|weights| weights.len() != rows) {
            candle_core::bail!("tied_cross_entropy: one weight a row is needed for {rows} rows");
        }
        Ok(())
    }

    /// One after the other.
    pub(super) fn rows(&self) -> impl Iterator<Item = Row> {
        let parts = self.parts.iter().flat_map(|part| std::iter::repeat_n(part, part.rows));
        parts.zip(&self.classes).enumerate().map(|(row, (part, &target))| {
            let weight = self.weights.as_ref().map_or(1.0, |weights| weights[row]);
            Row { target, weight, share: weight * part.factor / part.rows as f32, smoothing: part.smoothing }
        })
    }
}

/// Gradients by the hidden states, the projection and the bias, for an upstream gradient of 1.
struct Gradients {
    hidden: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// The forward pass has the logits at hand, so it makes the gradients too: the projection is computed once, not twice.
struct TiedCrossEntropy {
    targets: Targets,
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
        let rows = hidden.len() / width.max(1);
        if hidden.len() != rows * width || bias.len() != classes {
            candle_core::bail!("{name}: hidden {:?}, weight {:?}", l1.dims(), l2.dims());
        }
        self.targets.check(rows, classes)?;
        let mut gradients =
            Gradients { hidden: vec![0f32; hidden.len()], weight: vec![0f32; weight.len()], bias: vec![0f32; classes] };
        let of_rows: Vec<Row> = self.targets.rows().collect();
        let mut logits = vec![0f32; CHUNK_ROWS.min(rows) * classes];
        let mut losses = Vec::new();
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
            let of_chunk = logits.par_chunks_mut(classes).zip(&of_rows[start..start + n]).map(|(logits, row)| {
                let loss = cross_entropy_row(logits, bias, row.target as usize, row.smoothing, row.share);
                f64::from(row.weight) * f64::from(loss)
            });
            losses.extend(of_chunk.collect::<Vec<f64>>());
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
        let (mut sum, mut found, mut left) = (0f64, vec![0.0], &losses[..]);
        for part in &self.targets.parts {
            let (own, others) = left.split_at(part.rows);
            let mean = own.iter().sum::<f64>() / part.rows as f64;
            sum += f64::from(part.factor) * mean;
            found.push(mean as f32);
            left = others;
        }
        found[0] = sum as f32;
        let shape = Shape::from(found.len());
        Ok((CpuStorage::F32(found), shape))
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
        let upstream = f64::from(gradient.get(0)?.to_scalar::<f32>()?);
        let scaled = |values: Vec<f32>, like: &Tensor| -> Result<Option<Tensor>> {
            let tensor = Tensor::from_vec(values, like.shape(), like.device())?;
            if upstream == 1.0 { Ok(Some(tensor)) } else { tensor.affine(upstream, 0.0).map(Some) }
        };
        Ok((scaled(made.hidden, hidden)?, scaled(made.weight, weight)?, scaled(made.bias, bias)?))
    }
}

/// Cross-entropies of `hidden · weightᵀ + bias` with `targets`, `[1 + parts]`: the sum of the parts' means, each as many times as it
/// counts, and then the means. A gradient leads back through the sum alone.
///
/// `hidden` is `[rows, width]`, `weight` `[classes, width]`, `bias` `[classes]`. No `[rows, classes]` tensor is kept.
///
/// # Errors
/// Shapes that do not fit, parts without rows or of other rows than there are, a target outside the classes.
pub fn tied_cross_entropy(hidden: &Tensor, weight: &Tensor, bias: &Tensor, targets: &Targets) -> Result<Tensor> {
    on_cuda!(hidden.device(), super::cuda::tied_cross_entropy([hidden, weight, bias], targets, super::precision()));
    let op = TiedCrossEntropy { targets: targets.clone(), gradients: Mutex::new(None) };
    hidden.contiguous()?.apply_op3(weight, bias, op)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::cuda::emulation::emulated;
    use crate::ops::reference;

    fn values(shape: &[usize], phase: f32) -> Tensor {
        let values = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * 1.3 + phase).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// On the CPU and in kernels: the sum, and of every part the mean, which is that of this part alone.
    #[test]
    fn parts_have_their_own_means() {
        let (hidden, weight, bias) = (values(&[9, 5], 0.0), values(&[7, 5], 1.0), values(&[7], 2.0));
        let part = |rows, smoothing, factor| Part { rows, smoothing, factor };
        let parts = vec![part(2, 0.1, 0.5), part(6, 0.0, 3.0), part(1, 0.4, -1.0)];
        let classes: Vec<u32> = (0..9).map(|row| row * 5 % 7).collect();
        let targets = Targets { classes: classes.clone(), weights: None, parts: parts.clone() };
        let (mut expected, mut first) = (Vec::new(), 0);
        for part in parts {
            let alone = Targets::of_one(classes[first..first + part.rows].to_vec(), None, part.smoothing);
            let rows = hidden.narrow(0, first, part.rows).unwrap();
            expected.push(reference::tied_cross_entropy(&rows, &weight, &bias, &alone).unwrap().to_scalar::<f32>().unwrap());
            first += part.rows;
        }
        let run = || tied_cross_entropy(&hidden, &weight, &bias, &targets).unwrap().to_vec1::<f32>().unwrap();
        for found in [run(), emulated(0, run)] {
            let (sum, means) = (found[0], &found[1..]);
            assert_eq!(means.len(), expected.len());
            assert!(means.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{means:?} is not {expected:?}");
            let whole = 0.5 * expected[0] + 3.0 * expected[1] - expected[2];
            assert!((sum - whole).abs() < 1e-5, "{sum} is not {whole}");
        }
    }

    #[test]
    fn targets_that_do_not_fit_are_refused() {
        let (hidden, weight, bias) = (values(&[3, 5], 0.0), values(&[7, 5], 1.0), values(&[7], 2.0));
        let good = Targets::of_one(vec![0, 6, 3], None, 0.1);
        let part = |rows| Part { rows, smoothing: 0.0, factor: 1.0 };
        for (targets, expected) in [
            (Targets { classes: vec![0, 6], ..good.clone() }, "2 targets for 3 rows"),
            (Targets { classes: vec![0, 7, 3], ..good.clone() }, "target 7 outside 7 classes"),
            (Targets { weights: Some(vec![1.0; 2]), ..good.clone() }, "one weight a row"),
            (Targets { parts: vec![part(1), part(1)], ..good.clone() }, "of 3 rows"),
            (Targets { parts: vec![part(3), part(0)], ..good.clone() }, "no rows"),
        ] {
            let run = || tied_cross_entropy(&hidden, &weight, &bias, &targets).unwrap_err().to_string();
            for error in [run(), emulated(0, run)] {
                assert!(error.contains(expected), "{error}");
            }
        }
    }
}
