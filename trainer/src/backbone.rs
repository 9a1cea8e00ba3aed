//! MobileNetV2 1.0 as a feature extractor: pixels to 7×7 regions of 1292 features, and the classifier on a region.
//!
//! A region's feature is the network's last 1280 channels at that cell, and then the mean colours of the cell's four quarters,
//! which a classifier's last layer has mostly forgotten. Inference only ([`crate::vision`] trains its last blocks), with batch
//! norm folded into the convolutions. Activations are kept as `[pixels, channels]`, so that pointwise convolutions are matrix
//! products and depthwise ones run over contiguous channels.
//!
//! The forward pass can be cut in two, so that the frozen part need run only once over a picture: [`Backbone::record`] computes
//! what a feature cache keeps, [`Backbone::regions`] makes region features of it.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rand::Rng;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use sha2::{Digest, Sha256};

use crate::ops::kernels::{Matrix, Plane, Product, depthwise_relu6, patches, sgemm};

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

/// One layer's weights, as the kernels want them.
#[derive(Debug, Clone, PartialEq)]
pub struct Convolution {
    /// Pointwise: `[out, in]`; 3×3 full: `[out, 27]` (kernel position, then channel); depthwise: `[9, channels]`.
    pub weight: Vec<f32>,
    /// `[out]`.
    pub bias: Vec<f32>,
}

/// What `trained_blocks` is where the whole network is trained: its blocks, and the first convolution as one of them.
pub const WHOLE: usize = BLOCKS.len() + 1;

/// Channels and side of what enters the part of the network that is trained, which is not nothing: the blocks from some on, or the
/// pixels.
#[must_use]
pub fn entering_trained(trained_blocks: usize) -> (usize, usize) {
    BLOCKS.len().checked_sub(trained_blocks).map_or((3, INPUT), entering)
}

/// Channels and side of what enters block `block`; of the last block's result for 17.
#[must_use]
pub fn entering(block: usize) -> (usize, usize) {
    BLOCKS[..block].iter().fold((32, INPUT / 2), |(_, side), &(out, _, stride)| (out, side / stride))
}

/// Values of a picture's record in a feature cache: the region features where no block is trained, else what enters the trained part,
/// and the colours.
#[must_use]
pub fn record_values(trained_blocks: usize) -> usize {
    if trained_blocks == 0 {
        return GRID * GRID * FEATURES;
    }
    let (channels, side) = entering_trained(trained_blocks);
    side * side * channels + GRID * GRID * COLOURS
}

/// The network's weights.
#[derive(Debug, Clone, PartialEq)]
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
                [3, 3, 3] => position_first(&weight, shape[0], 3),
                // [channels, 1, 3, 3] → [kernel position, channels]
                [1, 3, 3] => position_first(&weight, 1, shape[0]),
                _ => weight,
            };
            layers.insert(name, Convolution { weight, bias });
        }
        Ok(Self { layers })
    }

    /// A layer's weights, `stem`, `block3.project` and so on.
    ///
    /// # Panics
    /// For a name that [`layer_shapes`] does not give.
    #[must_use]
    pub fn layer(&self, name: &str) -> &Convolution {
        &self.layers[name]
    }

    /// Replaces a layer's weights by others of the same shape.
    ///
    /// # Panics
    /// For a name that [`layer_shapes`] does not give.
    pub fn set_layer(&mut self, name: &str, convolution: Convolution) {
        let layer = self.layers.get_mut(name).unwrap_or_else(|| panic!("no layer `{name}`"));
        debug_assert_eq!((layer.weight.len(), layer.bias.len()), (convolution.weight.len(), convolution.bias.len()));
        *layer = convolution;
    }

    /// SHA-256 of the layers that [`Backbone::record`] uses.
    #[must_use]
    pub fn record_hash(&self, trained_blocks: usize) -> [u8; 32] {
        let mut hash = Sha256::new();
        let last = match WHOLE - trained_blocks {
            // The pixels themselves.
            0 => return hash.finalize().into(),
            1 => "stem".to_owned(),
            WHOLE => "head".to_owned(),
            first => format!("block{}.project", first - 2),
        };
        for (name, _) in layer_shapes() {
            let layer = self.layer(&name);
            layer.weight.iter().chain(&layer.bias).for_each(|v| hash.update(v.to_le_bytes()));
            if name == last {
                break;
            }
        }
        hash.finalize().into()
    }

    /// Region features of one prepared image: `[3, 224, 224]` in [−1, 1] → `[49, 1292]`.
    ///
    /// # Errors
    /// Another number of values.
    pub fn forward(&self, pixels: &[f32]) -> Result<Vec<f32>> {
        self.record(pixels, 0)
    }

    /// What a feature cache keeps of one prepared image, `[3, 224, 224]` in [−1, 1], when the last `trained_blocks` blocks are
    /// still to change: [`record_values`] values.
    ///
    /// # Errors
    /// Another number of pixels, or more blocks than there are.
    pub fn record(&self, pixels: &[f32], trained_blocks: usize) -> Result<Vec<f32>> {
        if pixels.len() != 3 * INPUT * INPUT {
            bail!("the backbone takes 3×{INPUT}×{INPUT} values, not {}", pixels.len());
        }
        let by_pixel = by_pixel(pixels);
        let mut record = match BLOCKS.len().checked_sub(trained_blocks) {
            Some(first) => self.blocks(0..first, self.stem(&by_pixel)),
            None if trained_blocks == WHOLE => by_pixel,
            None => bail!("the backbone has {WHOLE} blocks to train, its first convolution among them, not {trained_blocks}"),
        };
        record.extend(quarter_colours(pixels));
        Ok(if trained_blocks == 0 { self.head(&record) } else { record })
    }

    /// Region features `[49, 1292]` of a record that was made with `trained_blocks`.
    ///
    /// # Panics
    /// When the record has another number of values than [`record_values`].
    #[must_use]
    pub fn regions(&self, record: &[f32], trained_blocks: usize) -> Vec<f32> {
        assert_eq!(record.len(), record_values(trained_blocks), "a record of other blocks");
        if trained_blocks == 0 {
            return record.to_vec();
        }
        let (activations, colours) = record.split_at(record.len() - GRID * GRID * COLOURS);
        let mut last = match BLOCKS.len().checked_sub(trained_blocks) {
            Some(first) => self.blocks(first..BLOCKS.len(), activations.to_vec()),
            None => self.blocks(0..BLOCKS.len(), self.stem(activations)),
        };
        last.extend(colours);
        self.head(&last)
    }

    /// The residual blocks `range` of what enters the first of them, `[pixels, channels]`.
    fn blocks(&self, range: std::ops::Range<usize>, mut x: Vec<f32>) -> Vec<f32> {
        let (mut channels, mut side) = entering(range.start);
        for i in range {
            let (out, expansion, stride) = BLOCKS[i];
            let plane = Plane { side, stride, channels: channels * expansion };
            let expanded =
                if expansion > 1 { self.pointwise(&format!("block{i}.expand"), &x, channels, true) } else { x.clone() };
            let depthwise = self.layer(&format!("block{i}.depthwise"));
            let mut filtered = vec![0f32; plane.outputs()];
            depthwise_relu6(&expanded, &depthwise.weight, &depthwise.bias, plane, &mut filtered);
            let mut y = self.pointwise(&format!("block{i}.project"), &filtered, plane.channels, false);
            if stride == 1 && channels == out {
                for (y, x) in y.iter_mut().zip(&x) {
                    *y += x;
                }
            }
            (x, channels, side) = (y, out, side / stride);
        }
        x
    }

    /// The last layer over the last block's activations, each cell followed by its colours; `last` holds all activations and
    /// then all colours.
    fn head(&self, last: &[f32]) -> Vec<f32> {
        let (activations, colours) = last.split_at(last.len() - GRID * GRID * COLOURS);
        let x = self.pointwise("head", activations, entering(BLOCKS.len()).0, true);
        x.chunks_exact(CHANNELS).zip(colours.chunks_exact(COLOURS)).flat_map(|(x, c)| x.iter().chain(c)).copied().collect()
    }

    /// The first convolution over `[224², 3]`.
    fn stem(&self, pixels: &[f32]) -> Vec<f32> {
        let plane = Plane { side: INPUT, stride: 2, channels: 3 };
        let mut seen = vec![0f32; 9 * plane.outputs()];
        patches(pixels, plane, &mut seen);
        self.pointwise("stem", &seen, 27, true)
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

    /// The weighted mean of backbones, layer by layer; the shares sum to 1. It has a classifier where each has one: a backbone that
    /// was trained along has outgrown its own.
    ///
    /// # Errors
    /// No backbone.
    pub fn average(backbones: &[Self], shares: &[f64]) -> Result<Self> {
        let Some(first) = backbones.first() else { bail!("no backbone to average") };
        let mean = |of: &dyn Fn(&Self) -> &[f32]| -> Vec<f32> {
            let term = |i: usize| backbones.iter().zip(shares).map(|(b, share)| f64::from(of(b)[i]) * share).sum::<f64>() as f32;
            (0..of(first).len()).map(term).collect()
        };
        let layer =
            |name: &String| Convolution { weight: mean(&|b| &b.layers[name].weight), bias: mean(&|b| &b.layers[name].bias) };
        let shared = first.layers.keys().filter(|name| backbones.iter().all(|b| b.layers.contains_key(*name)));
        Ok(Self { layers: shared.map(|name| (name.clone(), layer(name))).collect() })
    }

    /// A backbone file of these weights, 32 bits each: what [`Backbone::from_bytes`] reads.
    ///
    /// # Errors
    /// Those of safetensors.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        for (name, shape) in layer_shapes() {
            let Some(layer) = self.layers.get(&name) else { continue };
            let kernels = match shape[1..] {
                [3, 3, 3] => position_last(&layer.weight, shape[0], 3),
                [1, 3, 3] => position_last(&layer.weight, 1, shape[0]),
                _ => layer.weight.clone(),
            };
            tensors.push((format!("{name}.bias"), vec![shape[0]], bytes(&layer.bias)));
            tensors.push((format!("{name}.weight"), shape, bytes(&kernels)));
        }
        let views = tensors.iter().map(|(name, shape, b)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), b)?)));
        let views: Vec<(&str, TensorView)> = views.collect::<Result<_>>()?;
        Ok(safetensors::serialize(views, None)?)
    }

    /// Whether the file held the classifier, which only the soft labels of masked regions need.
    #[must_use]
    pub fn has_classifier(&self) -> bool {
        self.layers.contains_key("classifier")
    }

    /// Leaves the classifier out: it does not fit a backbone that was trained further.
    pub fn forget_classifier(&mut self) {
        self.layers.remove("classifier");
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

/// `[3, 224, 224]` → `[224², 3]`.
fn by_pixel(planes: &[f32]) -> Vec<f32> {
    let pixels = planes.len() / 3;
    (0..planes.len()).map(|i| planes[i % 3 * pixels + i / 3]).collect()
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

/// `[out, channel, kernel position]` → `[out, kernel position, channel]`.
fn position_first(weight: &[f32], out: usize, channels: usize) -> Vec<f32> {
    let at = move |o: usize, k: usize, c: usize| weight[(o * channels + c) * 9 + k];
    (0..out).flat_map(|o| (0..9).flat_map(move |k| (0..channels).map(move |c| at(o, k, c)))).collect()
}

/// The way back from [`position_first`].
fn position_last(weight: &[f32], out: usize, channels: usize) -> Vec<f32> {
    let at = move |o: usize, k: usize, c: usize| weight[(o * 9 + k) * channels + c];
    (0..out).flat_map(|o| (0..channels).flat_map(move |c| (0..9).map(move |k| at(o, k, c)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixels() -> Vec<f32> {
        (0..3 * INPUT * INPUT).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn a_pass_cut_anywhere_gives_the_same_regions() {
        let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
        let whole = backbone.forward(&pixels()).unwrap();
        assert_eq!(whole.len(), GRID * GRID * FEATURES);
        for trained in [0, 1, 4, 9, 17, WHOLE] {
            let record = backbone.record(&pixels(), trained).unwrap();
            assert_eq!(record.len(), record_values(trained));
            assert_eq!(backbone.regions(&record, trained), whole, "{trained} blocks");
        }
        assert!(backbone.record(&pixels(), WHOLE + 1).is_err());
    }

    #[test]
    fn records_are_known_by_the_layers_that_made_them() {
        let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
        let mut other = backbone.clone();
        let mut changed = other.layer("block13.expand").clone();
        changed.bias[0] += 1.0;
        other.set_layer("block13.expand", changed);
        for trained in 0..=WHOLE {
            assert_eq!(backbone.record_hash(trained) == other.record_hash(trained), trained >= 4, "{trained} blocks");
        }
    }

    #[test]
    fn a_written_backbone_reads_back_the_same() {
        let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
        assert_eq!(Backbone::from_bytes(&backbone.to_bytes().unwrap()).unwrap(), backbone);
    }
}
