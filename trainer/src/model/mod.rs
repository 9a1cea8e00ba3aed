//! The UNIMO model: one post-LayerNorm Transformer over image regions and text (arXiv 2012.15409, section 2).

mod by_layer;
mod computing;
mod config;
mod generate;
mod heads;
mod hidden;
mod packing;
mod sample;
mod statistics;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;

pub use computing::{Back, Computing, Found, Given, Losses, Pending, gradients_of};
pub use config::{ImageEmbedding, ModelConfig, TextEmbedding};
pub use generate::{ImageCache, Step};
pub use heads::{EmbeddedImages, TEMPERATURE, TextRows};
pub use hidden::Hidden;
pub use packing::{Features, ImageRows, PackedBatch, Packer, Regions, region_boxes};
pub use statistics::RegionStatistics;

use crate::ops::{self, AtOnce};
use packing::ImageFeatures;

/// LayerNorm's addition to the variance, everywhere.
pub const LAYER_NORM_EPS: f32 = 1e-5;
/// Initial temperature of the contrast.
pub const INITIAL_TEMPERATURE: f64 = 0.07;

/// Dropout of one forward pass: the rate, and the seed from which every site draws its own stream.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of values dropped in the layers; 0 in evaluation.
    pub rate: f32,
    /// Share dropped of a picture's mean feature before it is embedded.
    pub features: f32,
    /// Seed of this pass.
    pub seed: u64,
}

impl Dropout {
    /// Nothing dropped.
    pub const OFF: Self = Self::of(0.0, 0);

    /// The same share of what the layers compute and of mean features.
    #[must_use]
    pub const fn of(rate: f32, seed: u64) -> Self {
        Self { rate, features: rate, seed }
    }

    fn site(&self, site: usize) -> u32 {
        crate::seed::mix(self.seed, site as u64) as u32
    }
}

/// What a forward pass makes of a packed batch.
pub struct Passed {
    /// Hidden states.
    pub hidden: Hidden,
    /// What the images' rows were embedded from; absent without images.
    features: Option<ImageFeatures>,
    /// The pass's dropout.
    pub dropout: Dropout,
    /// What a backward pass by layers needs.
    kept: Option<by_layer::Kept>,
}

/// The model's weights and sizes.
pub struct Unimo {
    config: ModelConfig,
    device: Device,
    weights: BTreeMap<String, Var>,
    /// Those of them that are not trained, over the same memory and cut off from gradients.
    frozen: BTreeMap<String, Tensor>,
    statistics: RegionStatistics,
    checkpoints_activations: bool,
    goes_by_layer: bool,
    /// Where heads and objectives are computed.
    computing: Computing,
    /// Passes through the layers on the kernels for CUDA devices.
    #[cfg(any(feature = "cuda", test))]
    runs: Arc<ops::cuda::layers::Runs>,
}

/// Names under which a checkpoint holds the region statistics, beside the weights.
const STATISTICS: [&str; 2] = ["image.mean", "image.deviation"];

impl Unimo {
    /// Fresh weights: normal(0, `initial_deviation`) truncated at two deviations for matrices (wider for
    /// the boxes', so that both parts of a region's embedding start alike), ones for LayerNorm weights, zeros for
    /// biases, log 0.07 for the temperature.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(config: ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for (i, (name, shape)) in config.weights().into_iter().enumerate() {
            let count = shape.iter().product();
            let values = if name == "temperature" {
                vec![INITIAL_TEMPERATURE.ln() as f32]
            } else if name.ends_with(".bias") {
                vec![0.0; count]
            } else if name.ends_with("norm.weight") {
                vec![1.0; count]
            } else {
                let mut deviation = config.initial_deviation;
                if name == "image.box.weight" {
                    // Five numbers beside a thousand features: from equal weights, places would drown in what is seen there.
                    deviation *= (config.region_feature as f64 / 5.0).sqrt();
                }
                truncated_normal(crate::seed::mix(seed, i as u64), count, deviation as f32)
            };
            weights.insert(name, Var::from_vec(values, shape, device)?);
        }
        let statistics = RegionStatistics::identity(config.region_feature);
        Ok(Self::of(config, device, weights, statistics))
    }

    fn of(config: ModelConfig, device: &Device, weights: BTreeMap<String, Var>, statistics: RegionStatistics) -> Self {
        Self {
            config,
            device: device.clone(),
            weights,
            frozen: BTreeMap::new(),
            statistics,
            checkpoints_activations: false,
            goes_by_layer: false,
            computing: Computing::default(),
            #[cfg(any(feature = "cuda", test))]
            runs: Arc::default(),
        }
    }

    /// The same model with a fresh head of `classes` outputs for a downstream task, in place of one that it may have. All weights
    /// are trained again.
    ///
    /// # Errors
    /// Those of candle.
    pub fn with_task(self, classes: usize, seed: u64) -> Result<Self> {
        let config = ModelConfig { task_classes: classes, ..self.config };
        let mut fresh = Self::new(config, seed, &self.device)?;
        for (name, var) in self.weights.into_iter().filter(|(name, _)| !name.starts_with("task.")) {
            fresh.weights.insert(name, var);
        }
        fresh.statistics = self.statistics;
        Ok(fresh)
    }

    /// Reads `model.toml` and `model.safetensors` of a checkpoint folder.
    ///
    /// # Errors
    /// A missing, extra or misshapen tensor, by name.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join("model.toml");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config = ModelConfig::from_toml(&text).with_context(|| format!("in {}", path.display()))?;
        Self::from_tensors(config, &folder.join("model.safetensors"), device)
    }

    fn from_tensors(config: ModelConfig, path: &Path, device: &Device) -> Result<Self> {
        let mut tensors =
            candle_core::safetensors::load(path, device).with_context(|| format!("cannot read {}", path.display()))?;
        let mut take = |name: &str, shape: &[usize]| {
            let Some(tensor) = tensors.remove(name) else { bail!("{} lacks `{name}`", path.display()) };
            if tensor.dims() != shape {
                bail!("{}: `{name}` is {:?}, the sizes ask for {shape:?}", path.display(), tensor.dims());
            }
            Ok(tensor.to_dtype(DType::F32)?)
        };
        let mut weights = BTreeMap::new();
        for (name, shape) in config.weights() {
            let tensor = take(&name, &shape)?;
            weights.insert(name, Var::from_tensor(&tensor)?);
        }
        let [mean, deviation] =
            STATISTICS.map(|name| take(name, &[config.region_feature])?.to_vec1().map_err(anyhow::Error::from));
        let statistics = RegionStatistics { mean: mean?, deviation: deviation? };
        if let Some(extra) = tensors.keys().next() {
            bail!("{} holds `{extra}`, which this model does not have", path.display());
        }
        Ok(Self::of(config, device, weights, statistics))
    }

    /// Trains, from now on, only the weights whose names begin with one of `beginnings`; all, if there are none. The others are
    /// constants: what is computed of them alone leaves nothing behind for a backward pass.
    ///
    /// # Errors
    /// A beginning that no weight has.
    pub fn train_only(&mut self, beginnings: &[String]) -> Result<()> {
        if let Some(unknown) = beginnings.iter().find(|&begin| !self.weights.keys().any(|name| name.starts_with(begin))) {
            bail!("`trained` names weights that begin with `{unknown}`, and {} has none", self.config.name);
        }
        let frozen = |name: &str| !beginnings.is_empty() && !beginnings.iter().any(|begin| name.starts_with(begin));
        let cut_off = self.weights.iter().filter(|(name, _)| frozen(name));
        self.frozen = cut_off.map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
        Ok(())
    }

    /// The weights that are trained, by name.
    pub fn trained(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.weights.iter().filter(|(name, _)| !self.frozen.contains_key(*name))
    }

    /// Everything that `model.safetensors` holds, by name.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors: HashMap<String, Tensor> =
            self.weights.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        for (name, values) in STATISTICS.into_iter().zip([&self.statistics.mean, &self.statistics.deviation]) {
            tensors.insert(name.to_owned(), Tensor::new(values.as_slice(), &self.device)?);
        }
        Ok(tensors)
    }

    /// How region features are standardised.
    #[must_use]
    pub fn statistics(&self) -> &RegionStatistics {
        &self.statistics
    }

    /// Standardises by other statistics from now on; what has been learnt does not fit them.
    ///
    /// # Errors
    /// Statistics of another width.
    pub fn set_statistics(&mut self, statistics: RegionStatistics) -> Result<()> {
        let width = self.config.region_feature;
        if statistics.mean.len() != width || statistics.deviation.len() != width {
            bail!("statistics of {} features for a model of {width}", statistics.mean.len());
        }
        self.statistics = statistics;
        Ok(())
    }

    /// Moves the standardisation into the layers that take region features (`image.feature`, and `embed.image` where it takes their
    /// mean), so that the model takes features as they are and computes the same.
    ///
    /// # Errors
    /// Those of candle.
    pub fn fold_statistics(&mut self) -> Result<()> {
        let width = self.config.region_feature;
        let mean = Tensor::new(self.statistics.mean.as_slice(), &self.device)?.reshape((width, 1))?;
        let deviation = Tensor::new(self.statistics.deviation.as_slice(), &self.device)?;
        let layers = match self.config.image_embedding {
            ImageEmbedding::Token => &["image.feature"][..],
            ImageEmbedding::Pooled => &["image.feature", "embed.image"],
        };
        for layer in layers {
            let (weight, bias) = (&self.weights[&format!("{layer}.weight")], &self.weights[&format!("{layer}.bias")]);
            weight.set(&weight.as_tensor().broadcast_div(&deviation)?)?;
            bias.set(&(bias.as_tensor() - weight.as_tensor().matmul(&mean)?.squeeze(1)?)?)?;
        }
        self.statistics = RegionStatistics::identity(width);
        Ok(())
    }

    /// Sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights live.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All weights by name.
    #[must_use]
    pub fn weights(&self) -> &BTreeMap<String, Var> {
        &self.weights
    }

    fn weight(&self, name: &str) -> candle_core::Result<&Tensor> {
        match self.frozen.get(name).or_else(|| self.weights.get(name).map(Var::as_tensor)) {
            Some(tensor) => Ok(tensor),
            None => Err(candle_core::Error::CannotFindTensor { path: name.to_owned() }),
        }
    }

    /// Where heads and objectives of this model's are computed.
    #[must_use]
    pub fn computing(&self) -> &Computing {
        &self.computing
    }

    /// Operators on tensors of the model's device.
    #[must_use]
    pub fn at_once(&self) -> AtOnce<'_> {
        AtOnce(&self.device)
    }

    /// Weight and bias.
    fn both(&self, name: &str) -> candle_core::Result<[&Tensor; 2]> {
        Ok([self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?])
    }

    fn linear(&self, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
        let [weight, bias] = self.both(name)?;
        ops::linear(x, weight, bias)
    }

    fn linear_gelu(&self, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
        let [weight, bias] = self.both(name)?;
        ops::linear_gelu(x, weight, bias)
    }

    fn norm(&self, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
        let [weight, bias] = self.both(name)?;
        ops::layer_norm(x, weight, bias, LAYER_NORM_EPS)
    }

    /// Normalised sum of a sublayer's input and what it made of it, with dropout at `site`.
    fn add_norm(&self, name: &str, both: (&Tensor, &Tensor), dropout: Dropout, site: usize) -> candle_core::Result<Tensor> {
        let [weight, bias] = self.both(name)?;
        ops::dropout_add_layer_norm(both, (dropout.rate, dropout.site(site)), weight, bias, LAYER_NORM_EPS)
    }

    /// Embeddings of text rows, one for each of `ids` and `positions`, `[rows, hidden]`.
    fn embed_tokens(&self, ids: &Arc<[u32]>, positions: &Arc<[u32]>) -> candle_core::Result<Tensor> {
        let tokens = ops::select_rows(self.weight("text.token.weight")?, ids)?;
        let places = ops::select_rows(self.weight("text.position.weight")?, positions)?;
        self.norm("text.norm", &(tokens + places)?)
    }

    /// Embeddings of image rows: standardised `features` `[rows, region_feature]`, `boxes` `[rows, 5]`.
    fn embed_regions(&self, features: &Tensor, boxes: &Tensor) -> candle_core::Result<Tensor> {
        let sum = (self.linear("image.feature", features)? + self.linear("image.box", boxes)?)?;
        self.norm("image.norm", &sum)
    }

    /// Runs the Transformer over a packed batch. `pictures` are the region features of a batch
    /// whose images were packed by picture, `[pictures, regions, region_feature]`, and nothing for another.
    ///
    /// # Errors
    /// Ids, positions or pictures out of range, and those of candle.
    pub fn forward(&self, batch: &PackedBatch, pictures: Option<&Tensor>, dropout: Dropout) -> candle_core::Result<Passed> {
        let features = batch.features.as_ref().map(|features| features.standardised(pictures, &self.statistics)).transpose()?;
        #[cfg(any(feature = "cuda", test))]
        if ops::cuda::works_on(&self.device) {
            let rows = features.as_ref().map(|features| &features.rows);
            let (hidden, kept) = self.pass_in_kernels(rows, batch, dropout)?;
            return Ok(Passed { hidden, features, dropout, kept });
        }
        let mut parts = Vec::new();
        if !batch.ids.is_empty() {
            parts.push(self.embed_tokens(&batch.ids, &batch.positions)?);
        }
        if let (Some(features), Some(boxes)) = (&features, &batch.boxes) {
            parts.push(self.embed_regions(&features.rows, boxes)?);
        }
        let x = ops::select_rows(&Tensor::cat(&parts, 0)?, &batch.order)?;
        let mut x = ops::dropout(&x, dropout.rate, dropout.site(0))?;
        if self.checkpoints_activations || self.goes_by_layer {
            let (hidden, kept) = self.layers_apart(x, batch, dropout)?;
            return Ok(Passed { hidden: hidden.into(), features, dropout, kept });
        }
        for layer in 0..self.config.layers {
            x = self.layer(layer, &x, batch, dropout)?;
        }
        Ok(Passed { hidden: x.into(), features, dropout, kept: None })
    }

    /// Where a layer drops values: in attention, and at both sums. Site 0 is that of the embeddings.
    fn sites(layer: usize) -> [usize; 3] {
        [1, 2, 3].map(|site| 3 * layer + site)
    }

    fn layer(&self, layer: usize, x: &Tensor, batch: &PackedBatch, dropout: Dropout) -> candle_core::Result<Tensor> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let [in_attention, at_middle, at_end] = Self::sites(layer);
        let qkv = self.linear(&name("attention.qkv"), x)?;
        let attended = ops::attention(&qkv, &batch.plan, self.config.heads, dropout.rate, dropout.site(in_attention))?;
        let attended = self.linear(&name("attention.output"), &attended)?;
        let x = self.add_norm(&name("attention.norm"), (x, &attended), dropout, at_middle)?;
        let inner = self.linear_gelu(&name("ffn.up"), &x)?;
        let outer = self.linear(&name("ffn.down"), &inner)?;
        self.add_norm(&name("ffn.norm"), (&x, &outer), dropout, at_end)
    }
}

/// Normal values with deviation `deviation`, redrawn beyond two deviations (Box–Muller on a seeded ChaCha stream).
fn truncated_normal(seed: u64, count: usize, deviation: f32) -> Vec<f32> {
    let mut rng = crate::seed::rng(seed);
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        let (u, v): (f32, f32) = (rng.random(), rng.random());
        let radius = (-2.0 * (1.0 - u).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
        for z in [radius * cos, radius * sin] {
            if z.abs() <= 2.0 && values.len() < count {
                values.push(z * deviation);
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regions::{Detected, Record};

    /// Hidden states of one image, `[image_tokens · hidden]`: packed as in training, and as inference encodes it.
    fn both_ways(model: &Unimo, features: &[f32]) -> [Vec<f32>; 2] {
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut packer = Packer::new(model);
        packer.image_with_captions(Regions::visible(features), &[]);
        let packed = model.evaluate(&packer.finish(&Device::Cpu).unwrap()).unwrap();
        let shape = (1, model.config().regions(), model.config().region_feature);
        let regions = Tensor::from_slice(features, shape, &Device::Cpu).unwrap();
        [flat(packed.constants().unwrap()), flat(model.encode_image(&regions).unwrap().hidden)]
    }

    #[test]
    fn training_inference_and_the_folded_model_standardise_alike() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let features: Vec<f32> = (0..12).map(|v| (v as f32 * 0.7).sin() * 3.0).collect();
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let [plain, _] = both_ways(&model, &features);
        model.set_statistics(RegionStatistics { mean: vec![1.0, -2.0, 0.3], deviation: vec![0.5, 1.5, 2.0] }).unwrap();
        let [packed, encoded] = both_ways(&model, &features);
        model.fold_statistics().unwrap();
        let [folded, folded_encoded] = both_ways(&model, &features);
        // Sums of products of order 1 in f32, in another order, through two layers.
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(!near(&plain, &packed), "the statistics do nothing");
        for (other, what) in [(encoded, "inference"), (folded, "folded"), (folded_encoded, "folded inference")] {
            assert!(near(&packed, &other), "{what} differs from training");
        }
    }

    #[test]
    fn what_is_not_trained_leaves_nothing_behind_for_a_backward_pass() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.train_only(&["embed.".into(), "temperature".into()]).unwrap();
        let mut packer = Packer::new(&model);
        let (text, features) = (packer.text(&[0, 7, 2], false), [0.5; 12]);
        packer.pair(Regions::visible(&features), &[0, 9, 2]);
        let batch = packer.finish(&Device::Cpu).unwrap();
        let hidden = model.forward(&batch, None, Dropout::of(0.1, 1)).unwrap().hidden;
        assert!(!hidden.is_tracked());
        let embedding = model.text_embedding(&batch, &hidden, &[text]).unwrap();
        let loss = (embedding.sum_all().unwrap() / model.temperature().unwrap()).unwrap();
        let gradients = loss.backward().unwrap();
        let moved = |model: &Unimo| model.weights().iter().filter(|(_, var)| gradients.get(var).is_some()).count();
        let trained: Vec<&str> = model.trained().map(|(name, _)| name.as_str()).collect();
        assert_eq!(trained, ["embed.image.bias", "embed.image.weight", "embed.text.bias", "embed.text.weight", "temperature"]);
        assert_eq!(moved(&model), 3, "those of the text, and the temperature");
        let error = model.train_only(&["embed.".into(), "wings.".into()]).unwrap_err().to_string();
        assert_eq!(error, "`trained` names weights that begin with `wings.`, and pico has none");
        model.train_only(&[]).unwrap();
        assert_eq!(model.trained().count(), model.weights().len());
    }

    #[test]
    fn detected_regions_of_unlike_number_are_packed_as_inference_encodes_them() {
        let config = ModelConfig { grid: 0, detected_regions: 4, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.set_statistics(RegionStatistics { mean: vec![1.0, -2.0, 0.3], deviation: vec![0.5, 1.5, 2.0] }).unwrap();
        let record = |regions: usize, phase: f32| {
            let values = (0..3 * regions).map(|v| (v as f32 * 0.7 + phase).sin()).collect();
            let boxes = (0..5 * regions).map(|v| (v as f32 * 0.3 + phase).cos().abs()).collect();
            Record { values, detected: Some(Detected { boxes, probabilities: Vec::new() }) }
        };
        let records = [record(2, 0.0), record(4, 1.0), record(1, 2.0)];
        let mut packer = Packer::new(&model);
        let starts = records.each_ref().map(|record| packer.image_with_captions(Regions::of(record, &[]), &[&[0, 7]]).image);
        assert_eq!(starts, [0, 5, 12]);
        let packed =
            model.evaluate(&packer.finish(&Device::Cpu).unwrap()).unwrap().constants().unwrap().to_vec2::<f32>().unwrap();
        for (start, record) in starts.into_iter().zip(&records) {
            let encoded = model.encode_records(&[record]).unwrap().hidden.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(encoded.len(), 1 + record.values.len() / 3);
            for (row, encoded) in encoded.iter().enumerate() {
                // Sums of products of order 1 in f32, in another order, through two layers.
                let near = encoded.iter().zip(&packed[start + row]).all(|(a, b)| (a - b).abs() < 1e-4);
                assert!(near, "row {row} of the image at {start}");
            }
        }
        // Where a region lies is seen.
        let mut moved = records[0].clone();
        moved.detected.as_mut().unwrap().boxes[0] += 0.5;
        let image = |record| model.encode_records(&[record]).unwrap().hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(image(&records[0]).iter().zip(image(&moved)).any(|(a, b)| (a - b).abs() > 1e-3));
        assert!(model.encode_records(&[&records[0], &records[1]]).is_err());
    }
}
