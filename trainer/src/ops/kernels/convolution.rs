//! Slice kernels of the convolutional backbone, on images `[side², channels]`.

use multiversion::multiversion;

use super::add_assign;

/// A square of pixels, row-major, each `channels` values, as a 3×3 convolution reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Pixels along a side.
    pub side: usize,
    /// 1 or 2; 1 pads one pixel all round, 2 one pixel at bottom and right.
    pub stride: usize,
    /// Values of a pixel.
    pub channels: usize,
}

impl Plane {
    /// Values of the input.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.side * self.side * self.channels
    }

    /// Values of the result of a depthwise convolution.
    #[must_use]
    pub fn outputs(&self) -> usize {
        let side = self.side / self.stride;
        side * side * self.channels
    }

    /// First value of the pixel that kernel position `k` sees for result pixel `i`, unless it is padding.
    #[inline(always)]
    fn seen(&self, i: usize, k: usize) -> Option<usize> {
        let (out, before) = (self.side / self.stride, if self.stride == 1 { 1 } else { 0 });
        let (row, column) = (i / out * self.stride + k / 3, i % out * self.stride + k % 3);
        let inside = row >= before && column >= before && row - before < self.side && column - before < self.side;
        inside.then(|| ((row - before) * self.side + (column - before)) * self.channels)
    }
}

/// 3×3 depthwise convolution with ReLU6: `weight` is `[9, channels]` (kernel position first), `bias` `[channels]`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn depthwise_relu6(x: &[f32], weight: &[f32], bias: &[f32], plane: Plane, y: &mut [f32]) {
    let channels = plane.channels;
    for (i, y) in y.chunks_exact_mut(channels).enumerate() {
        y.copy_from_slice(bias);
        for k in 0..9 {
            let Some(at) = plane.seen(i, k) else { continue };
            for ((y, x), w) in y.iter_mut().zip(&x[at..at + channels]).zip(&weight[k * channels..]) {
                *y += x * w;
            }
        }
        for v in y.iter_mut() {
            *v = v.clamp(0.0, 6.0);
        }
    }
}

/// What [`depthwise_relu6`] read and made, and the gradient by the latter.
#[derive(Clone, Copy)]
pub struct DepthwiseGradient<'a> {
    /// Input.
    pub x: &'a [f32],
    /// Kernels, `[9, channels]`.
    pub weight: &'a [f32],
    /// Result.
    pub y: &'a [f32],
    /// Gradient by the result.
    pub dy: &'a [f32],
}

/// Backward of [`depthwise_relu6`]: adds to `dx`, `dweight` and `dbias`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn depthwise_relu6_backward(of: DepthwiseGradient, plane: Plane, dx: &mut [f32], dweight: &mut [f32], dbias: &mut [f32]) {
    let channels = plane.channels;
    let mut gradient = vec![0f32; channels];
    for (i, (y, dy)) in of.y.chunks_exact(channels).zip(of.dy.chunks_exact(channels)).enumerate() {
        relu6_backward(y, dy, &mut gradient);
        add_assign(dbias, &gradient);
        for k in 0..9 {
            let Some(at) = plane.seen(i, k) else { continue };
            let (weight, dweight) =
                (&of.weight[k * channels..(k + 1) * channels], &mut dweight[k * channels..(k + 1) * channels]);
            let (x, dx) = (&of.x[at..at + channels], &mut dx[at..at + channels]);
            for c in 0..channels {
                dx[c] += gradient[c] * weight[c];
                dweight[c] += gradient[c] * x[c];
            }
        }
    }
}

/// What a 3×3 convolution sees for each of its results, `[(side / stride)², 9 · channels]` (kernel position first); padding is 0.
pub fn patches(x: &[f32], plane: Plane, y: &mut [f32]) {
    let channels = plane.channels;
    for (i, y) in y.chunks_exact_mut(9 * channels).enumerate() {
        for (k, y) in y.chunks_exact_mut(channels).enumerate() {
            match plane.seen(i, k) {
                Some(at) => y.copy_from_slice(&x[at..at + channels]),
                None => y.fill(0.0),
            }
        }
    }
}

/// Backward of [`patches`]: adds to `dx`.
pub fn patches_backward(dy: &[f32], plane: Plane, dx: &mut [f32]) {
    let channels = plane.channels;
    for (i, dy) in dy.chunks_exact(9 * channels).enumerate() {
        for (k, dy) in dy.chunks_exact(channels).enumerate() {
            if let Some(at) = plane.seen(i, k) {
                add_assign(&mut dx[at..at + channels], dy);
            }
        }
    }
}

/// `min(max(x, 0), 6)`
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn relu6(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x.clamp(0.0, 6.0);
    }
}

/// Backward of [`relu6`], from its input or its result: the gradient passes where that is strictly between 0 and 6.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
pub fn relu6_backward(y: &[f32], dy: &[f32], dx: &mut [f32]) {
    for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx = if y > 0.0 && y < 6.0 { dy } else { 0.0 };
    }
}
