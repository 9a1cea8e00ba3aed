//! A trainer's checkpoint with all its weights as plain f32 values. The standardisation of region features is folded into the
//! layers that take them: the bundle's graphs take features as the backbone gives them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use unimo::tokenizer::Tokenizer;
use unimo_train::backbone::{Backbone, layer_shapes};
use unimo_train::model::{ModelConfig, Unimo};

use crate::graph::Storage;

/// A checkpoint, checked for completeness.
pub struct Checkpoint {
    /// Its folder.
    pub folder: PathBuf,
    /// The candle model.
    pub model: Unimo,
    /// The backbone.
    pub backbone: Backbone,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// `training.toml`.
    pub training: toml::Table,
    weights: BTreeMap<String, Vec<f32>>,
}

impl Checkpoint {
    /// Opens a checkpoint folder, or the newest checkpoint of a run.
    ///
    /// # Errors
    /// Missing files; tensors that are missing, superfluous or misshapen; a tokenizer of another size; a model of detected regions.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = unimo_train::checkpoint::resolve(path)?;
        let mut model = Unimo::load(&folder, &Device::Cpu)?;
        if model.config().detects() {
            bail!(
                "{} sees regions that a detector found; a board has none: only models of a grid (`grid` in their size) are exported",
                folder.display()
            );
        }
        model.fold_statistics()?;
        let backbone = Backbone::load(&folder.join("backbone.safetensors"))?;
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        if tokenizer.vocabulary_size() != model.config().vocabulary {
            bail!("the tokenizer has {} tokens, the model {}", tokenizer.vocabulary_size(), model.config().vocabulary);
        }
        let note = folder.join("training.toml");
        let text = std::fs::read_to_string(&note).with_context(|| format!("cannot read {}", note.display()))?;
        let training = text.parse().with_context(|| format!("in {}", note.display()))?;
        let mut weights = BTreeMap::new();
        for (name, var) in model.weights() {
            weights.insert(name.clone(), var.as_tensor().flatten_all()?.to_vec1::<f32>()?);
        }
        let path = folder.join("backbone.safetensors");
        let tensors =
            candle_core::safetensors::load(&path, &Device::Cpu).with_context(|| format!("cannot read {}", path.display()))?;
        for (layer, _) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
            for kind in ["weight", "bias"] {
                let name = format!("{layer}.{kind}");
                let tensor = tensors.get(&name).with_context(|| format!("{} lacks `{name}`", path.display()))?;
                weights.insert(format!("backbone.{name}"), tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?);
            }
        }
        Ok(Self { folder, model, backbone, tokenizer, training, weights })
    }

    /// Sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// A weight's values; the backbone's are called `backbone.<layer>.<weight|bias>`.
    ///
    /// # Panics
    /// For a name that no checkpoint of this form has.
    #[must_use]
    pub fn weight(&self, name: &str) -> &[f32] {
        &self.weights[name]
    }

    /// Whether any weight's name begins so.
    #[must_use]
    pub fn has(&self, beginning: &str) -> bool {
        self.weights.range(beginning.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(beginning))
    }

    /// The first weight that 16 bits cannot hold, by name: one that is no number or lies beyond ±65504.
    #[must_use]
    pub fn beyond_f16(&self) -> Option<&str> {
        let limit = half::f16::MAX.to_f32();
        let found = self.weights.iter().find(|(_, values)| values.iter().any(|v| !v.is_finite() || v.abs() > limit));
        found.map(|(name, _)| name.as_str())
    }

    /// Rounds, here and in candle's model, what a bundle that is stored so rounds: matrices and kernels. The boxes' embedding is
    /// folded into a 32-bit table instead.
    ///
    /// # Errors
    /// Those of candle, and moments that do not fit.
    pub fn round(&mut self, storage: &Storage) -> Result<()> {
        for (name, var) in self.model.weights() {
            if name != "image.box.weight" {
                // Outputs lie along the first dimension here, wherever the bundle has them.
                let shape = var.dims();
                let rounded = storage.rounded(name, &self.weights[name], shape, 0)?;
                var.set(&Tensor::from_slice(&rounded, shape, var.device())?)?;
                self.weights.insert(name.clone(), rounded);
            }
        }
        for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
            let name = format!("backbone.{layer}.weight");
            if let Some(values) = self.weights.get_mut(&name) {
                *values = storage.rounded(&name, values, &shape, 0)?;
            }
        }
        self.backbone = self.backbone_of_weights()?;
        Ok(())
    }

    fn backbone_of_weights(&self) -> Result<Backbone> {
        let mut tensors = Vec::new();
        for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
            for (kind, shape) in [("weight", &shape[..]), ("bias", &shape[..1])] {
                let name = format!("{layer}.{kind}");
                let values = self.weight(&format!("backbone.{name}"));
                tensors.push((name, Tensor::from_slice(values, shape, &Device::Cpu)?));
            }
        }
        Backbone::from_bytes(&safetensors::serialize(tensors, None)?)
    }
}
