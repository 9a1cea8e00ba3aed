//! The same operators composed of candle's differentiable ones: slow, on every device, and what the fused ones are tested
//! against.

use candle_core::{D, Result, Tensor};

use super::{AttentionPlan, Part, Targets};

/// See [`layer_norm`](super::layer_norm).
///
/// # Errors
/// Shapes that do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    centred.broadcast_div(&deviation)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// See [`linear`](super::linear).
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)
}

/// Softmax over the last dimension.
///
/// # Errors
/// Those of candle.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// Logarithm of the softmax over the last dimension.
///
/// # Errors
/// Those of candle.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// The sum of [`tied_cross_entropy`](super::tied_cross_entropy).
///
/// # Errors
/// Shapes that do not fit.
pub fn tied_cross_entropy(hidden: &Tensor, weight: &Tensor, bias: &Tensor, targets: &Targets) -> Result<Tensor> {
    let log_p = log_softmax(&linear(hidden, weight, bias)?)?;
    let index = Tensor::new(&targets.classes[..], hidden.device())?.unsqueeze(1)?;
    let at_target = log_p.gather(&index, 1)?.squeeze(1)?;
    let smooth = log_p.mean(D::Minus1)?;
    let (mut sum, mut first) = (Tensor::zeros((), hidden.dtype(), hidden.device())?, 0);
    for &Part { rows, smoothing, factor } in &targets.parts {
        let own = |of: &Tensor| of.narrow(0, first, rows);
        let mut losses = ((own(&at_target)? * f64::from(smoothing - 1.0))? - (own(&smooth)? * f64::from(smoothing))?)?;
        if let Some(weights) = &targets.weights {
            losses = (losses * Tensor::new(&weights[first..first + rows], hidden.device())?)?;
        }
        sum = (sum + (losses.mean_all()? * f64::from(factor))?)?;
        first += rows;
    }
    Ok(sum)
}

/// See [`attention`](super::attention), without dropout.
///
/// # Errors
/// Shapes that do not fit.
pub fn attention(qkv: &Tensor, plan: &AttentionPlan, heads: usize) -> Result<Tensor> {
    let hidden = qkv.dim(1)? / 3;
    let depth = hidden / heads;
    let split = |which: usize, start: usize, len: usize| -> Result<Tensor> {
        qkv.narrow(0, start, len)?.narrow(1, which * hidden, hidden)?.reshape((len, heads, depth))?.transpose(0, 1)?.contiguous()
    };
    let mut outputs = Vec::new();
    for group in &plan.groups {
        for block in &group.blocks {
            let (n, c) = (block.rows.len(), block.context.len());
            let own = group.start + block.rows.start;
            let seen = |which| -> Result<Tensor> {
                let mine = split(which, own, n)?;
                if c == 0 { Ok(mine) } else { Tensor::cat(&[split(which, group.start + block.context.start, c)?, mine], 1) }
            };
            let mut scores = (split(0, own, n)?.matmul(&seen(1)?.t()?)? / (depth as f64).sqrt())?;
            if block.causal {
                let mask: Vec<f32> = (0..n * (c + n)).map(|i| if i % (c + n) > c + i / (c + n) { -1e9 } else { 0.0 }).collect();
                scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, n, c + n), qkv.device())?)?;
            }
            outputs.push(softmax(&scores)?.matmul(&seen(2)?)?.transpose(0, 1)?.reshape((n, hidden))?);
        }
    }
    Tensor::cat(&outputs, 0)
}

/// See [`relu6`](super::relu6).
///
/// # Errors
/// Those of candle.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    x.relu()? - (x - 6.0)?.relu()?
}

/// See [`convolution_relu6`](super::convolution_relu6).
///
/// # Errors
/// Shapes that do not fit.
pub fn convolution_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let (out, channels) = (bias.dim(0)?, x.dim(2)?);
    let kernel = weight.reshape((out, 9, channels))?.transpose(1, 2)?.contiguous()?.reshape((out, channels, 3, 3))?;
    convolution(x, &kernel, bias, stride, 1)
}

/// See [`depthwise_relu6`](super::depthwise_relu6).
///
/// # Errors
/// Shapes that do not fit.
pub fn depthwise_relu6(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let channels = x.dim(2)?;
    convolution(x, &weight.t()?.reshape((channels, 1, 3, 3))?, bias, stride, channels)
}

/// ReLU6 of a 3×3 convolution of `[images, side², channels]` by `[out, channels / groups, 3, 3]`.
fn convolution(x: &Tensor, kernel: &Tensor, bias: &Tensor, stride: usize, groups: usize) -> Result<Tensor> {
    let (images, pixels, channels) = x.dims3()?;
    let side = pixels.isqrt();
    let before = if stride == 1 { 1 } else { 0 };
    let planes = x.transpose(1, 2)?.reshape((images, channels, side, side))?;
    let padded = planes.pad_with_zeros(2, before, 1)?.pad_with_zeros(3, before, 1)?;
    let y = padded.conv2d(kernel, 0, stride, 1, groups)?.broadcast_add(&bias.reshape((1, bias.dim(0)?, 1, 1))?)?;
    relu6(&y.flatten_from(2)?.transpose(1, 2)?)
}
