//! Checkpoints and bundles of random weights, and pictures to compare on: for tests and benchmarks that need shapes, not sight.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Device;
use unimo_train::checkpoint::{self, Companions, RunState};
use unimo_train::model::{ModelConfig, RegionStatistics, Unimo};
use unimo_train::optimizer::{AdamW, OptimizerConfig};
use unimo_train::{backbone, scenes, tokenizer_training};

use crate::export::{ExportOptions, export};
use crate::parity::Sample;

/// Drawn scenes with their first captions.
#[must_use]
pub fn drawn_samples(count: u64) -> Vec<Sample> {
    (0..count)
        .map(|index| {
            let scene = scenes::generate(7, index);
            Sample { image: scene.draw(), text: scene.captions.first().cloned().unwrap_or_default() }
        })
        .collect()
}

/// Writes a checkpoint of random weights into `folder`, in place of any that is there, and returns its path.
///
/// # Errors
/// An unknown size, or failed writes.
pub fn random_checkpoint(folder: &Path, size: &str, seed: u64) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // A checkpoint that is there would be kept, and may be one of another version.
    for old in checkpoint::list(folder)? {
        std::fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    let captions: Vec<String> = (0..60).flat_map(|i| scenes::generate(seed, i).captions).collect();
    let json = tokenizer_training::train(captions.iter().map(String::as_str), 400)?;
    let tokenizer = folder.join("tokenizer.json");
    std::fs::write(&tokenizer, &json)?;
    let backbone = backbone::random_file(seed)?;
    let vocabulary = unimo::tokenizer::Tokenizer::from_bytes(json.as_bytes())?.vocabulary_size();
    let config = ModelConfig { vocabulary, ..ModelConfig::named(size)? };
    let mut model = Unimo::new(config, seed, &Device::Cpu)?;
    let width = model.config().region_feature;
    let weights_of = backbone::Backbone::from_bytes(&backbone)?;
    let scene = unimo::image::ImagePreparation::default().tensor(&scenes::generate(seed, 0).draw());
    model.set_statistics(RegionStatistics::of(width, std::iter::once(weights_of.forward(&scene)?)))?;
    let optimizer = AdamW::new(OptimizerConfig::default(), model.weights());
    let state = RunState { step: 0, updates: 0, fingerprint: "random".into() };
    let training = "data = \"none: random weights\"\n".to_owned();
    checkpoint::save(
        folder,
        &model,
        &optimizer,
        &state,
        &Companions { tokenizer, backbone: Some(backbone), task: None, training },
    )
}

/// Writes `<folder>/bundle.tar`, a pico bundle of random weights.
///
/// # Errors
/// Failed writes.
pub fn random_bundle(folder: &Path, seed: u64) -> Result<PathBuf> {
    let checkpoint = random_checkpoint(&folder.join("checkpoint"), "pico", seed)?;
    let out = folder.join("bundle.tar");
    export(&checkpoint, &out, &ExportOptions { force: true, ..Default::default() }, &drawn_samples(1), &|_, _| ())?;
    Ok(out)
}
