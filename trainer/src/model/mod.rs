//! The UNIMO model: one post-LayerNorm Transformer over image regions and text (arXiv 2012.15409, section 2).

mod config;
mod generate;
mod heads;
mod packing;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;

pub use config::ModelConfig;
pub use generate::{ImageCache, Step};
pub use packing::{ImageRows, PackedBatch, Packer, Regions, region_boxes};

use crate::ops;

/// LayerNorm's addition to the variance, everywhere.
pub const LAYER_NORM_EPS: f32 = 1e-5;
/// Initial temperature of the contrast.
pub const INITIAL_TEMPERATURE: f64 = 0.07;

/// Dropout of one forward pass: the rate, and the seed from which every site draws its own stream.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of values dropped; 0 in evaluation.
    pub rate: f32,
    /// Seed of this pass.
    pub seed: u64,
}

impl Dropout {
    /// Nothing dropped.
    pub const OFF: Self = Self { rate: 0.0, seed: 0 };

    fn site(&self, site: usize) -> u32 {
        crate::seed::mix(self.seed, site as u64) as u32
    }
}

/// The model's weights and sizes.
pub struct Unimo {
    config: ModelConfig,
    device: Device,
    weights: BTreeMap<String, Var>,
}

impl Unimo {
    /// Fresh weights: normal(0, 0.02) truncated at two deviations for matrices, ones for LayerNorm weights, zeros for
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
                truncated_normal(crate::seed::mix(seed, i as u64), count, 0.02)
            };
            weights.insert(name, Var::from_vec(values, shape, device)?);
        }
        Ok(Self { config, device: device.clone(), weights })
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
        let mut weights = BTreeMap::new();
        for (name, shape) in config.weights() {
            let Some(tensor) = tensors.remove(&name) else { bail!("{} lacks `{name}`", path.display()) };
            if tensor.dims() != shape {
                bail!("{}: `{name}` is {:?}, the sizes ask for {shape:?}", path.display(), tensor.dims());
            }
            weights.insert(name, Var::from_tensor(&tensor.to_dtype(DType::F32)?)?);
        }
        if let Some(extra) = tensors.keys().next() {
            bail!("{} holds `{extra}`, which this model does not have", path.display());
        }
        Ok(Self { config, device: device.clone(), weights })
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
        match self.weights.get(name) {
            Some(var) => Ok(var.as_tensor()),
            None => Err(candle_core::Error::CannotFindTensor { path: name.to_owned() }),
        }
    }

    fn linear(&self, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::linear(x, self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?)
    }

    fn norm(&self, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::layer_norm(x, self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?, LAYER_NORM_EPS)
    }

    /// Embeddings of text rows: `ids` and `positions` are `[rows]` (u32), the result `[rows, hidden]`.
    fn embed_tokens(&self, ids: &Tensor, positions: &Tensor) -> candle_core::Result<Tensor> {
        let tokens = self.weight("text.token.weight")?.index_select(ids, 0)?;
        let places = self.weight("text.position.weight")?.index_select(positions, 0)?;
        self.norm("text.norm", &(tokens + places)?)
    }

    /// Embeddings of image rows: `features` `[rows, region_feature]`, `boxes` `[rows, 5]`.
    fn embed_regions(&self, features: &Tensor, boxes: &Tensor) -> candle_core::Result<Tensor> {
        let sum = (self.linear("image.feature", features)? + self.linear("image.box", boxes)?)?;
        self.norm("image.norm", &sum)
    }

    /// Runs the Transformer over a packed batch; the result is `[rows, hidden]`.
    ///
    /// # Errors
    /// Ids or positions out of range, and those of candle.
    pub fn forward(&self, batch: &PackedBatch, dropout: Dropout) -> candle_core::Result<Tensor> {
        let mut parts = Vec::new();
        if batch.ids.elem_count() > 0 {
            parts.push(self.embed_tokens(&batch.ids, &batch.positions)?);
        }
        if let (Some(features), Some(boxes)) = (&batch.features, &batch.boxes) {
            parts.push(self.embed_regions(features, boxes)?);
        }
        let mut x = Tensor::cat(&parts, 0)?.index_select(&batch.order, 0)?;
        if dropout.rate > 0.0 {
            x = ops::dropout_add(&x.zeros_like()?, &x, dropout.rate, dropout.site(0))?;
        }
        for layer in 0..self.config.layers {
            x = self.layer(layer, &x, batch, dropout)?;
        }
        Ok(x)
    }

    fn layer(&self, layer: usize, x: &Tensor, batch: &PackedBatch, dropout: Dropout) -> candle_core::Result<Tensor> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let site = |k: usize| dropout.site(1 + 3 * layer + k);
        let qkv = self.linear(&name("attention.qkv"), x)?;
        let attended = ops::attention(&qkv, &batch.plan, self.config.heads, dropout.rate, site(0))?;
        let attended = self.linear(&name("attention.output"), &attended)?;
        let x = self.norm(&name("attention.norm"), &ops::dropout_add(x, &attended, dropout.rate, site(1))?)?;
        let inner = ops::gelu(&self.linear(&name("ffn.up"), &x)?)?;
        let outer = self.linear(&name("ffn.down"), &inner)?;
        self.norm(&name("ffn.norm"), &ops::dropout_add(&x, &outer, dropout.rate, site(2))?)
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
