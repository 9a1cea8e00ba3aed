//! The model of the exporter's reference script, `exporter/tests/reference/reference.py`, and what that script computes with it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use tempfile::TempDir;
use unimo_train::backbone::layer_shapes;
use unimo_train::model::{ImageEmbedding, ModelConfig, TextEmbedding};
use unimo_train::tokenizer_training;

const GOLDEN: &str = include_str!("../../exporter/tests/reference/golden.json");

/// What the script prints.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    sizes: BTreeMap<String, usize>,
    /// By graph and output.
    pub outputs: BTreeMap<String, GoldenOutput>,
    /// `vision.embedding` of the same model with a pooled image embedding.
    pub pooled_embedding: GoldenOutput,
    /// `text.embedding` of the same model with a text embedding of both kinds.
    pub both_embedding: GoldenOutput,
}

/// An output: its root mean square, and some of its values.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenOutput {
    /// Root mean square of all values.
    pub rms: f64,
    /// Places of those given.
    pub at: Vec<usize>,
    /// The values there.
    pub values: Vec<f64>,
}

impl GoldenOutput {
    /// Largest difference from values that should be these, as a share of the root mean square.
    pub fn error(&self, found: &[f32]) -> f64 {
        let rms = (found.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / found.len() as f64).sqrt();
        let errors = self.at.iter().zip(&self.values).map(|(&at, value)| (f64::from(found[at]) - value).abs());
        errors.fold((rms - self.rms).abs(), f64::max) / self.rms
    }
}

/// What the script has printed.
pub fn golden() -> Golden {
    serde_json::from_str(GOLDEN).unwrap()
}

/// The sizes of the reference script, with what only training needs.
fn sizes(image_embedding: ImageEmbedding, text_embedding: TextEmbedding) -> ModelConfig {
    let sizes = golden().sizes.iter().map(|(name, value)| format!("{name} = {value}\n")).collect::<String>();
    let sizes = ModelConfig::from_toml(&format!("name = \"golden\"\nregion_classes = 8\ndropout = 0.1\n{sizes}")).unwrap();
    ModelConfig { image_embedding, text_embedding, ..sizes }
}

/// `scattered` of the reference script: values in `centre ± bound`, fixed by the tensor's name.
pub fn scattered(name: &str, shape: &[usize], bound: f64, centre: f64) -> Tensor {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let value = |i: usize| {
        let mut x = (i as u32).wrapping_add(seed);
        for (shift, factor) in [(16, 0x7FEB_352D), (15, 0x846C_A68B)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        x ^= x >> 16;
        (centre + bound * (f64::from(x) / f64::from(1u32 << 31) - 1.0)) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn model_weights(sizes: &ModelConfig) -> HashMap<String, Tensor> {
    let weight = |(name, shape): (String, Vec<usize>)| {
        let (bound, centre) = match shape[..] {
            _ if name.ends_with("norm.weight") => (0.3, 1.0),
            [_, _] if name.starts_with("text.") => ((3.0 / sizes.hidden as f64).sqrt(), 0.0),
            [_, inputs] => ((3.0 / inputs as f64).sqrt(), 0.0),
            _ => (0.3, 0.0),
        };
        let tensor = scattered(&name, &shape, bound, centre);
        (name, tensor)
    };
    let statistics = [("image.mean", 0.0), ("image.deviation", 1.0)]
        .map(|(name, centre)| (name.to_owned(), scattered(name, &[sizes.region_feature], 0.5, centre)));
    sizes.weights().into_iter().map(weight).chain(statistics).collect()
}

fn backbone_weights() -> HashMap<String, Tensor> {
    let mut weights = HashMap::new();
    for (layer, shape) in layer_shapes() {
        let bound = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
        let kernel = scattered(&format!("backbone.{layer}.weight"), &shape, bound, 0.0);
        weights.insert(format!("{layer}.weight"), kernel.to_dtype(DType::F16).unwrap());
        weights.insert(format!("{layer}.bias"), scattered(&format!("backbone.{layer}.bias"), &shape[..1], 0.1, 0.0));
    }
    weights
}

/// Writes weights as a checkpoint holds them.
pub fn save(weights: &HashMap<String, Tensor>, path: &Path) {
    candle_core::safetensors::save(weights, path).unwrap();
}

/// The reference script's model as a checkpoint folder.
pub fn checkpoint(image_embedding: ImageEmbedding, text_embedding: TextEmbedding) -> TempDir {
    let (folder, sizes) = (tempfile::tempdir().unwrap(), sizes(image_embedding, text_embedding));
    let at = |file: &str| folder.path().join(file);
    let words = "one two three four five six seven eight nine ten eleven twelve";
    let text = words.repeat(4);
    let tokenizer = tokenizer_training::train([text.as_str(); 4].into_iter(), sizes.vocabulary).unwrap();
    fs::write(at("tokenizer.json"), tokenizer).unwrap();
    fs::write(at("model.toml"), toml::to_string(&sizes).unwrap()).unwrap();
    fs::write(at("training.toml"), "data = \"none\"\n").unwrap();
    save(&model_weights(&sizes), &at("model.safetensors"));
    save(&backbone_weights(), &at("backbone.safetensors"));
    folder
}
