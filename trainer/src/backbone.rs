//! MobileNetV2 1.0 as a frozen feature extractor: pixels to 7×7 regions of 1292 features, and the classifier on a region.
//!
//! A region's feature is the network's last 1280 channels at that cell, and then the mean colours of the cell's four quarters,
//! which a classifier's last layer has mostly forgotten. Inference only, with batch norm folded into the convolutions. Activations are kept as `[pixels, channels]`, so that
//! pointwise convolutions are matrix products and depthwise ones run over contiguous channels.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use multiversion::multiversion;
use rand::Rng;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::ops::kernels::{Matrix, Product, sgemm};

/// Side of the input image in pixels.
pub const INPUT: usize = 224;
/// Cells along a side of the output grid.
pub const GRID: usize = 7;
/// Channels of the last layer.
pub const CHANNELS: usize = 1280;
/// Mean red, green and blue of a cell's four quarters.
pub const COLOURS: usize = 12;
/// Features of a region: [`CHANNELS`], then [`COLOURS`].
pub const FEATURES: usize = CHANNELS + COLOURS;
/// Classes of the classifier.
pub const CLASSES: usize = 1000;

/// `(output channels, expansion, stride)` of the inverted residual blocks (Sandler et al., arXiv 1801.04381, table 2).
pub const BLOCKS: [(usize, usize, usize); 17] = [
    (16, 1, 1),
    (24, 6, 2),
    (24, 6, 1),
    (32, 6, 2),
    (32, 6, 1),
    (32, 6, 1),
    (64, 6, 2),
    (64, 6, 1),
    (64, 6, 1),
    (64, 6, 1),
    (96, 6, 1),
    (96, 6, 1),
    (96, 6, 1),
    (160, 6, 2),
    (160, 6, 1),
    (160, 6, 1),
    (320, 6, 1),
];

struct Convolution {
    /// Pointwise: `[out, in]`; 3×3 full: `[out, 27]` (kernel position, then channel); depthwise: `[9, channels]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// The network's weights.
pub struct Backbone {
    layers: HashMap<String, Convolution>,
}

impl Backbone {
    /// Reads a backbone file: safetensors, f16 or f32, batch norm folded in; convolutions `stem`, `block0.{depthwise,project}`,
    /// `block{1..16}.{expand,depthwise,project}` and `head` as `[out, in, height, width]` (depthwise `[channels, 1, 3, 3]`),
    /// and, where soft labels are wanted, `classifier` `[1000, 1280]`; each with `.weight` and `.bias`.
    ///
    /// # Errors
    /// A missing or misshapen tensor, by name.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read the backbone {}", path.display()))?;
        Self::from_bytes(&bytes).with_context(|| format!("in {}", path.display()))
    }

    /// Parses the bytes of a backbone file.
    ///
    /// # Errors
    /// As [`Backbone::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).context("not a safetensors file")?;
        let with_classifier = file.names().contains(&"classifier.weight");
        let mut layers = HashMap::new();
        for (name, shape) in layer_shapes().into_iter().filter(|(name, _)| with_classifier || name != "classifier") {
            let weight = tensor(&file, &format!("{name}.weight"), &shape)?;
            let bias = tensor(&file, &format!("{name}.bias"), &shape[..1])?;
            let weight = match shape[1..] {
                // [out, 3, 3, 3] → [out, kernel position, channel]
                [3, 3, 3] => reorder(&weight, shape[0], 3),
                // [channels, 1, 3, 3] → [kernel position, channels]
                [1, 3, 3] => (0..9).flat_map(|k| (0..shape[0]).map(move |c| c * 9 + k)).map(|i| weight[i]).collect(),
                _ => weight,
            };
            layers.insert(name, Convolution { weight, bias });
        }
        Ok(Self { layers })
    }

    fn layer(&self, name: &str) -> &Convolution {
        // Every name that `forward` asks for was inserted by `from_bytes`.
        &self.layers[name]
    }

    /// Region features of one prepared image: `[3, 224, 224]` in [−1, 1] → `[49, 1292]`.
    ///
    /// # Errors
    /// Another number of values.
    pub fn forward(&self, pixels: &[f32]) -> Result<Vec<f32>> {
        if pixels.len() != 3 * INPUT * INPUT {
            bail!("the backbone takes 3×{INPUT}×{INPUT} values, not {}", pixels.len());
        }
        let mut x = self.stem(pixels);
        let (mut channels, mut side) = (32, INPUT / 2);
        for (i, (out, expansion, stride)) in BLOCKS.into_iter().enumerate() {
            let inner = channels * expansion;
            let mut y = if expansion > 1 { self.pointwise(&format!("block{i}.expand"), &x, channels, true) } else { x.clone() };
            let depthwise = self.layer(&format!("block{i}.depthwise"));
            let next = side / stride;
            let mut filtered = vec![0f32; next * next * inner];
            depthwise_3x3(&y, &depthwise.weight, &depthwise.bias, Plane { side, stride, channels: inner }, &mut filtered);
            y = self.pointwise(&format!("block{i}.project"), &filtered, inner, false);
            if stride == 1 && channels == out {
                for (y, x) in y.iter_mut().zip(&x) {
                    *y += x;
                }
            }
            (x, channels, side) = (y, out, next);
        }
        let x = self.pointwise("head", &x, channels, true);
        let colours = quarter_colours(pixels);
        Ok(x.chunks_exact(CHANNELS).zip(colours.chunks_exact(COLOURS)).flat_map(|(x, c)| x.iter().chain(c)).copied().collect())
    }

    fn stem(&self, pixels: &[f32]) -> Vec<f32> {
        let (side, plane) = (INPUT / 2, INPUT * INPUT);
        // Stride 2 pads one pixel at bottom and right only.
        let mut patches = vec![0f32; side * side * 27];
        for (i, patch) in patches.chunks_exact_mut(27).enumerate() {
            let (row, column) = (i / side * 2, i % side * 2);
            for k in 0..9 {
                let (r, c) = (row + k / 3, column + k % 3);
                if r < INPUT && c < INPUT {
                    for channel in 0..3 {
                        patch[k * 3 + channel] = pixels[channel * plane + r * INPUT + c];
                    }
                }
            }
        }
        self.pointwise("stem", &patches, 27, true)
    }

    /// `x · weightᵀ + bias` for every pixel, then ReLU6 where asked.
    fn pointwise(&self, name: &str, x: &[f32], inputs: usize, relu6: bool) -> Vec<f32> {
        let layer = self.layer(name);
        let (rows, outputs) = (x.len() / inputs, layer.bias.len());
        let mut y = Vec::with_capacity(rows * outputs);
        for _ in 0..rows {
            y.extend_from_slice(&layer.bias);
        }
        let size = Product { m: rows, n: outputs, k: inputs, accumulate: true, parallel: false };
        sgemm(size, Matrix::rows(x, inputs), Matrix::rows(&layer.weight, inputs).transposed(), &mut y, outputs);
        if relu6 {
            for v in &mut y {
                *v = v.clamp(0.0, 6.0);
            }
        }
        y
    }

    /// Rounds the kernels to 16 bits and back: what an f16 bundle computes with. Biases stay.
    pub fn round_to_f16(&mut self) {
        for layer in self.layers.values_mut() {
            for weight in &mut layer.weight {
                *weight = half::f16::from_f32(*weight).to_f32();
            }
        }
    }

    /// Whether the file held the classifier, which only the soft labels of masked regions need.
    #[must_use]
    pub fn has_classifier(&self) -> bool {
        self.layers.contains_key("classifier")
    }

    /// Class logits of region features `[n, 1292]` → `[n, 1000]`.
    ///
    /// # Errors
    /// A backbone without a classifier.
    pub fn classify(&self, features: &[f32]) -> Result<Vec<f32>> {
        if !self.has_classifier() {
            bail!("this backbone file has no classifier: set the recipe's weight `region_classes` to 0");
        }
        let channels: Vec<f32> = features.chunks_exact(FEATURES).flat_map(|f| &f[..CHANNELS]).copied().collect();
        Ok(self.pointwise("classifier", &channels, CHANNELS, false))
    }
}

/// Mean colours of each cell's quarters, `[49, 12]`: upper left, upper right, lower left, lower right, each red, green, blue.
fn quarter_colours(pixels: &[f32]) -> Vec<f32> {
    const QUARTER: usize = INPUT / (2 * GRID);
    let mut sums = vec![0f32; GRID * GRID * COLOURS];
    for (i, value) in pixels.iter().enumerate() {
        let (channel, row, column) = (i / (INPUT * INPUT), i / INPUT % INPUT, i % INPUT);
        let (row, column) = (row / QUARTER, column / QUARTER);
        let cell = row / 2 * GRID + column / 2;
        sums[cell * COLOURS + (row % 2 * 2 + column % 2) * 3 + channel] += value;
    }
    sums.iter_mut().for_each(|sum| *sum /= (QUARTER * QUARTER) as f32);
    sums
}

/// Names and weight shapes of the layers, in order; each has a bias of its first dimension.
#[must_use]
pub fn layer_shapes() -> Vec<(String, Vec<usize>)> {
    let mut list = vec![("stem".to_owned(), vec![32, 3, 3, 3])];
    let mut channels = 32;
    for (i, (out, expansion, _)) in BLOCKS.into_iter().enumerate() {
        let inner = channels * expansion;
        if expansion > 1 {
            list.push((format!("block{i}.expand"), vec![inner, channels, 1, 1]));
        }
        list.push((format!("block{i}.depthwise"), vec![inner, 1, 3, 3]));
        list.push((format!("block{i}.project"), vec![out, inner, 1, 1]));
        channels = out;
    }
    list.push(("head".to_owned(), vec![CHANNELS, channels, 1, 1]));
    list.push(("classifier".to_owned(), vec![CLASSES, CHANNELS]));
    list
}

/// A backbone file of random weights, scaled to keep the size of activations: what tests use that need shapes, not sight.
///
/// # Errors
/// Those of safetensors.
pub fn random_file(seed: u64) -> Result<Vec<u8>> {
    let mut rng = crate::seed::rng(seed);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape) in layer_shapes() {
        let bound = (6.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        let weight = (0..shape.iter().product())
            .flat_map(|_| half::f16::from_f32(rng.random_range(-bound..bound)).to_le_bytes())
            .collect();
        let bias = (0..shape[0]).flat_map(|_| rng.random_range(-0.1f32..0.1).to_le_bytes()).collect();
        tensors.push((format!("{name}.bias"), vec![shape[0]], bias));
        tensors.push((format!("{name}.weight"), shape, weight));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = if name.ends_with(".bias") { Dtype::F32 } else { Dtype::F16 };
        Ok((name.as_str(), TensorView::new(dtype, shape.clone(), bytes)?))
    });
    let views: Vec<(&str, TensorView)> = views.collect::<Result<_>>()?;
    Ok(safetensors::serialize(views, None)?)
}

fn tensor(file: &SafeTensors, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let view = file.tensor(name).with_context(|| format!("no tensor `{name}`"))?;
    if view.shape() != shape {
        bail!("`{name}` is {:?}, expected {shape:?}", view.shape());
    }
    match view.dtype() {
        Dtype::F16 => Ok(view.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Dtype::F32 => Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        other => bail!("`{name}` is {other:?}, expected F16 or F32"),
    }
}

fn reorder(weight: &[f32], out: usize, channels: usize) -> Vec<f32> {
    let mut result = Vec::with_capacity(weight.len());
    for o in 0..out {
        for k in 0..9 {
            for c in 0..channels {
                result.push(weight[(o * channels + c) * 9 + k]);
            }
        }
    }
    result
}

#[derive(Clone, Copy)]
struct Plane {
    side: usize,
    stride: usize,
    channels: usize,
}

/// 3×3 depthwise convolution with ReLU6. Stride 1 pads one pixel all round, stride 2 one at bottom and right.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2+fma"))]
fn depthwise_3x3(x: &[f32], weight: &[f32], bias: &[f32], plane: Plane, y: &mut [f32]) {
    let Plane { side, stride, channels } = plane;
    let out = side / stride;
    let before = if stride == 1 { 1 } else { 0 };
    for (i, y) in y.chunks_exact_mut(channels).enumerate() {
        let (row, column) = (i / out * stride, i % out * stride);
        y.copy_from_slice(bias);
        for k in 0..9 {
            let (r, c) = (row + k / 3, column + k % 3);
            if r < before || c < before || r - before >= side || c - before >= side {
                continue;
            }
            let at = ((r - before) * side + (c - before)) * channels;
            for ((y, x), w) in y.iter_mut().zip(&x[at..at + channels]).zip(&weight[k * channels..]) {
                *y += x * w;
            }
        }
        for v in y.iter_mut() {
            *v = v.clamp(0.0, 6.0);
        }
    }
}
