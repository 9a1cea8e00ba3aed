//! Slice kernels of the fused operators: plain loops that vectorise, compiled for several instruction sets and chosen at
//! run time (AVX-512, AVX2 + FMA, or the target's baseline).

pub mod amx;
mod convolution;

use gemm::Parallelism;
use multiversion::multiversion;
use unimo::lanes::{LANES, exp};

use super::precision::{Precision, precision};

pub use convolution::{
    DepthwiseGradient, Plane, depthwise_relu6, depthwise_relu6_backward, patches, patches_backward, relu6, relu6_backward,
};

/// The error function with absolute error below 2e-7 (Abramowitz & Stegun 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let y = 1.0 - p * exp(-a * a);
    y.copysign(x)
}

#[inline(always)]
fn sum_by(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    lanes.iter().sum::<f32>() + chunks.remainder().iter().map(|&v| f(v)).sum::<f32>()
}

#[inline(always)]
fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    chunks.remainder().iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (mut ca, mut cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in (&mut ca).zip(&mut cb) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum::<f32>()
}

/// `y = (x − mean) / √(var + eps) · weight + bias` for each row of `weight.len()` values.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let h = weight.len();
    for (y, x) in y.chunks_exact_mut(h).zip(x.chunks_exact(h)) {
        let mean = sum_by(x, |v| v) / h as f32;
        let scale = 1.0 / (sum_by(x, |v| (v - mean) * (v - mean)) / h as f32 + eps).sqrt();
        for i in 0..h {
            y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
    }
}

/// Backward of [`layer_norm`]: writes `dx`, adds to `dweight` and `dbias`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn layer_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let h = weight.len();
    let (mut normal, mut scaled) = (vec![0f32; h], vec![0f32; h]);
    for ((dx, x), dy) in dx.chunks_exact_mut(h).zip(x.chunks_exact(h)).zip(dy.chunks_exact(h)) {
        let mean = sum_by(x, |v| v) / h as f32;
        let scale = 1.0 / (sum_by(x, |v| (v - mean) * (v - mean)) / h as f32 + eps).sqrt();
        for i in 0..h {
            normal[i] = (x[i] - mean) * scale;
            scaled[i] = dy[i] * weight[i];
            dweight[i] += dy[i] * normal[i];
            dbias[i] += dy[i];
        }
        let mean_scaled = sum_by(&scaled, |v| v) / h as f32;
        let projection = dot(&scaled, &normal) / h as f32;
        for i in 0..h {
            dx[i] = scale * (scaled[i] - mean_scaled - normal[i] * projection);
        }
    }
}

/// `y = x · Φ(x)`, Φ the standard normal distribution function.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn gelu(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    }
}

/// Backward of [`gelu`]: `dx = dy · (Φ(x) + x φ(x))`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn gelu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
        let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        *dx = dy * (cdf + x * INV_SQRT_2PI * exp(-0.5 * x * x));
    }
}

/// Softmax of `row · scale` in place.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn softmax(row: &mut [f32], scale: f32) {
    let max = max_of(row) * scale;
    for v in row.iter_mut() {
        *v = exp(*v * scale - max);
    }
    let inverse = 1.0 / sum_by(row, |v| v);
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

/// Keys and values in rows of `stride`; the first `query.len()` values of a row count.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// First row's keys onwards.
    pub keys: &'a [f32],
    /// First row's values onwards.
    pub values: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
}

/// Attention of one query over several runs of rows: `out = softmax(query · keysᵀ · scale) · values`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn attend_one(query: &[f32], seen: &[Seen], scale: f32, out: &mut [f32]) {
    let depth = query.len();
    let mut weights = Vec::with_capacity(seen.iter().map(|s| s.rows).sum());
    for run in seen {
        weights.extend((0..run.rows).map(|row| dot(query, &run.keys[row * run.stride..row * run.stride + depth]) * scale));
    }
    let max = max_of(&weights);
    for weight in &mut weights {
        *weight = exp(*weight - max);
    }
    let total = 1.0 / sum_by(&weights, |w| w);
    out.fill(0.0);
    let mut at = weights.iter();
    for run in seen {
        for (row, &weight) in (0..run.rows).zip(&mut at) {
            for (out, &value) in out.iter_mut().zip(&run.values[row * run.stride..row * run.stride + depth]) {
                *out += weight * total * value;
            }
        }
    }
}

/// Backward of [`softmax`]: turns `dp` (gradient of the probabilities `p`) into the gradient of the unscaled logits, in place.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn softmax_backward(p: &[f32], scale: f32, dp: &mut [f32]) {
    let projection = dot(p, dp);
    for (dp, &p) in dp.iter_mut().zip(p) {
        *dp = scale * p * (*dp - projection);
    }
}

/// Adds `bias` to a row of logits and returns its cross-entropy with `target`, smoothed by `smoothing` over all classes;
/// the row becomes the gradient of the loss by the logits, times `weight`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn cross_entropy_row(row: &mut [f32], bias: &[f32], target: usize, smoothing: f32, weight: f32) -> f32 {
    for (v, b) in row.iter_mut().zip(bias) {
        *v += b;
    }
    let n = row.len() as f32;
    let max = max_of(row);
    let sum = sum_by(row, |v| v);
    let at_target = row[target];
    for v in row.iter_mut() {
        *v = exp(*v - max);
    }
    let total = sum_by(row, |v| v);
    let log_total = total.ln() + max;
    let scale = weight / total;
    let floor = weight * smoothing / n;
    for v in row.iter_mut() {
        *v = *v * scale - floor;
    }
    row[target] -= weight * (1.0 - smoothing);
    (1.0 - smoothing) * (log_total - at_target) + smoothing * (log_total - sum / n)
}

/// `y += x`
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn add_assign(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// A draw in [0, 2^32) for position `index` of stream `seed`: the same on every machine and for every chunking of the work.
#[inline(always)]
fn draw(seed: u32, index: u32) -> u32 {
    let mut x = index.wrapping_mul(0x9e37_79b9) ^ seed;
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// `y = residual + dropout(x)`, element `i` decided by the draw `first + i`; `keep` is 1 − p.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn dropout_add(residual: &[f32], x: &[f32], seed: u32, first: u32, keep: f32, y: &mut [f32]) {
    let (limit, scale) = (keep_limit(keep), 1.0 / keep);
    for (i, ((y, &r), &x)) in y.iter_mut().zip(residual).zip(x).enumerate() {
        let kept = draw(seed, first.wrapping_add(i as u32)) <= limit;
        *y = r + if kept { x * scale } else { 0.0 };
    }
}

/// Multiplies by the dropout mask in place: the backward of dropout, and dropout of probabilities.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn dropout_mask(x: &mut [f32], seed: u32, first: u32, keep: f32) {
    let (limit, scale) = (keep_limit(keep), 1.0 / keep);
    for (i, x) in x.iter_mut().enumerate() {
        let kept = draw(seed, first.wrapping_add(i as u32)) <= limit;
        *x = if kept { *x * scale } else { 0.0 };
    }
}

/// The largest draw that keeps a value, where `keep` is the share kept.
#[inline(always)]
#[must_use]
pub fn keep_limit(keep: f32) -> u32 {
    (f64::from(keep) * f64::from(u32::MAX)) as u32
}

/// One AdamW update of `weights` (decoupled decay; `correction` are 1/(1−β₁ᵗ) and 1/(1−β₂ᵗ)).
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn adamw(weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], step: &AdamWStep) {
    let AdamWStep { rate, decay, beta1, beta2, eps, correction1, correction2, gradient_scale } = *step;
    for (((w, &g), m), v) in weights.iter_mut().zip(gradient).zip(first).zip(second) {
        let g = g * gradient_scale;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *w = *w * (1.0 - rate * decay) - rate * (*m * correction1) / ((*v * correction2).sqrt() + eps);
    }
}

/// The scalars of one AdamW update.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate.
    pub rate: f32,
    /// Decoupled weight decay.
    pub decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// 1 / (1 − β₁ᵗ).
    pub correction1: f32,
    /// 1 / (1 − β₂ᵗ).
    pub correction2: f32,
    /// Multiplies the gradient first (global-norm clipping).
    pub gradient_scale: f32,
}

/// A matrix inside a slice: element (i, j) lies at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Storage, starting at element (0, 0).
    pub values: &'a [f32],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub fn rows(values: &'a [f32], row_stride: usize) -> Self {
        Self { values, row_stride, column_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn transposed(self) -> Self {
        Self { values: self.values, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.values.len()
    }
}

/// Size of a product: `c[m, n] (+)= a[m, k] · b[k, n]`.
#[derive(Clone, Copy)]
pub struct Product {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// Adds to `c` instead of overwriting it.
    pub accumulate: bool,
    /// Spreads the product over the thread pool.
    pub parallel: bool,
}

/// Matrix product into `c`, whose rows are `c_stride` apart.
///
/// # Panics
/// When a matrix does not lie inside its slice.
pub fn sgemm(size: Product, a: Matrix, b: Matrix, c: &mut [f32], c_stride: usize) {
    let Product { m, n, k, accumulate, parallel } = size;
    assert!(a.holds(m, k) && b.holds(k, n), "operand outside its slice");
    assert!(m == 0 || n == 0 || (m - 1) * c_stride + n <= c.len(), "result outside its slice");
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the assertions above keep every element that gemm touches inside the three slices, and `c` is borrowed
    // exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            accumulate,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// [`sgemm`] in the precision that is [set](super::set_precision).
///
/// # Panics
/// As [`sgemm`].
pub fn matmul(size: Product, a: Matrix, b: Matrix, c: &mut [f32], c_stride: usize) {
    /// Products of less are made before their factors are laid out.
    const WORTH_LAYING_OUT: usize = 8 * 8 * 16;
    let worth = size.m * size.n * size.k >= WORTH_LAYING_OUT;
    if !(worth && precision() == Precision::Bf16 && amx::multiply(size, a, b, c, c_stride)) {
        sgemm(size, a, b, c, c_stride);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_agrees_with_references() {
        // Values of scipy.special.erf.
        for (x, expected) in
            [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (-2.0, -0.995_322_265), (3.5, 0.999_999_256_9)]
        {
            assert!((f64::from(erf(x)) - expected).abs() < 3e-7, "erf({x})");
        }
    }

    #[test]
    fn dropout_keeps_the_asked_share_and_does_not_depend_on_chunks() {
        let mut whole = vec![1f32; 100_000];
        dropout_mask(&mut whole, 77, 0, 0.9);
        let kept = whole.iter().filter(|&&v| v != 0.0).count();
        // Standard deviation of the count is 95.
        assert!((89_500..90_500).contains(&kept), "{kept}");
        let mut tail = vec![1f32; 50_000];
        dropout_mask(&mut tail, 77, 50_000, 0.9);
        assert_eq!(tail, whole[50_000..]);
    }
}
