//! A bundle as a checkpoint of the trainer's: to train it further, or to write its weights in other precisions.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::Precision;
use unimo_train::model::{ImageEmbedding, ModelConfig, TextEmbedding, Unimo, region_boxes};

use crate::backbone_file;
use crate::graph::{WeightStore, transposed};
use crate::stored;
use crate::writing::{clear, sibling};

/// Seed of the weights that no bundle holds.
const SEED: u64 = 1;

/// Deviation of a fresh embedding's weights, as a share of the model's own. An embedding's length is divided away, so that the same
/// steps turn a small one further: at the rates of fine-tuning it learns faster.
const FRESH_SHARE: f64 = 0.1;

/// Kinds of embeddings that are asked for; the bundle's own, where none is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Embeddings {
    /// What of a picture is embedded.
    pub image: Option<ImageEmbedding>,
    /// What of a text is embedded.
    pub text: Option<TextEmbedding>,
}

/// Writes the weights of a bundle's precision (its widest, if none is named) as a checkpoint folder. What only pretraining uses, the heads
/// of masked regions and the contrast's temperature, is fresh, and so is an embedding of which `embeddings` asks for another kind than
/// the bundle's; optimiser and run state are left out: training begins anew from it.
///
/// # Errors
/// A bundle that is damaged or has a backbone other than the trainer's, a folder that is there already, or failed writes; nothing is left
/// at `out` then.
pub fn write(bundle: &Bundle, precision: Option<Precision>, embeddings: Embeddings, out: &Path) -> Result<()> {
    if out.exists() {
        bail!("{} is already there", out.display());
    }
    let there = &bundle.manifest().precisions;
    let widest = Precision::ALL.into_iter().find(|precision| there.contains(precision));
    let weights = stored::weights_of(bundle, bundle.precision(precision.or(widest))?)?;
    let model = model(bundle, &weights, embeddings)?;
    let partial = sibling(out, "partial");
    let write = || -> Result<()> {
        clear(&partial)?;
        fs::create_dir_all(&partial)?;
        fs::write(partial.join("model.toml"), toml::to_string(model.config())?)?;
        candle_core::safetensors::save(&model.tensors()?, partial.join("model.safetensors"))?;
        fs::write(partial.join("backbone.safetensors"), backbone_file::of_weights(&weights)?)?;
        fs::write(partial.join("tokenizer.json"), bundle.read("tokenizer.json")?)?;
        fs::write(partial.join("training.toml"), toml::to_string(&bundle.manifest().training)?)?;
        Ok(fs::rename(&partial, out)?)
    };
    let written = write().with_context(|| format!("cannot write {}", out.display()));
    let _ = fs::remove_dir_all(&partial);
    written
}

fn model(bundle: &Bundle, weights: &WeightStore, embeddings: Embeddings) -> Result<Unimo> {
    let own = config(bundle, weights)?;
    let image_embedding = embeddings.image.unwrap_or(own.image_embedding);
    let text_embedding = embeddings.text.unwrap_or(own.text_embedding);
    let fresh = [("embed.image.", image_embedding != own.image_embedding), ("embed.text.", text_embedding != own.text_embedding)];
    let model = Unimo::new(ModelConfig { image_embedding, text_embedding, ..own }, SEED, &Device::Cpu)?;
    let places = weights.values("image.places")?;
    for (name, var) in model.weights() {
        if fresh.iter().any(|(layer, fresh)| *fresh && name.starts_with(layer)) {
            var.set(&(var.as_tensor() * FRESH_SHARE)?)?;
            continue;
        }
        let shape = var.dims();
        let values = match (weights.get(name), shape) {
            // Bundles hold matrices as `[inputs, outputs]`; the token table and the positions stand as they are trained.
            (Some(stored), &[rows, columns]) if !name.starts_with("text.") && stored.shape == [columns, rows] => {
                transposed(&weights.values(name)?, &stored.shape)
            }
            (Some(stored), _) if stored.shape == shape => weights.values(name)?,
            (Some(stored), _) => bail!("weight `{name}` is {:?}, its model's is {shape:?}", stored.shape),
            (None, _) => match name.as_str() {
                "image.box.weight" => boxes(&places, model.config()).0,
                "image.box.bias" => boxes(&places, model.config()).1,
                // The bias of the boxes' embedding carries both.
                "image.feature.bias" => vec![0.0; shape.iter().product()],
                _ if name.starts_with("region.") || name == "temperature" => continue,
                _ => bail!("the bundle has no weight `{name}`"),
            },
        };
        var.set(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    Ok(model)
}

/// The sizes of a bundle's model. What they do not say, such as dropout, is that of the size of its name, or of `edge-s`.
fn config(bundle: &Bundle, weights: &WeightStore) -> Result<ModelConfig> {
    let sizes = &bundle.manifest().model;
    let inner = weights.get("layers.0.ffn.up.weight").context("the bundle has no weight `layers.0.ffn.up.weight`")?;
    let grid = (sizes.image_tokens - 1).isqrt();
    if grid * grid != sizes.image_tokens - 1 {
        bail!("{} image tokens are no grid", sizes.image_tokens);
    }
    // Told by the widths that the embeddings take.
    let takes = |name: &str, width: usize| -> Result<bool> {
        let embedding = weights.get(name).with_context(|| format!("the bundle has no weight `{name}`"))?;
        Ok(embedding.shape.first() == Some(&width))
    };
    let pooled = takes("embed.image.weight", sizes.region_feature)?;
    let both = takes("embed.text.weight", 2 * sizes.hidden)?;
    let known = ModelConfig::named(&sizes.name).or_else(|_| ModelConfig::named("edge-s"))?;
    Ok(ModelConfig {
        name: sizes.name.clone(),
        hidden: sizes.hidden,
        layers: sizes.layers,
        heads: sizes.heads,
        feed_forward: inner.shape.last().copied().unwrap_or_default(),
        vocabulary: sizes.vocabulary,
        positions: sizes.positions,
        embedding: sizes.embedding,
        image_embedding: if pooled { ImageEmbedding::Pooled } else { ImageEmbedding::Token },
        text_embedding: if both { TextEmbedding::Both } else { TextEmbedding::Token },
        region_feature: sizes.region_feature,
        grid,
        detected_regions: 0,
        task_classes: 0,
        ..known
    })
}

/// Weight `[hidden, 5]` and bias of an embedding of boxes that gives each image token its place: `[image_tokens, hidden]`. All cells are
/// of one size, so that their left and upper edges say all of them; what `[IMG]`, the whole picture, has of its own lies in the area.
fn boxes(places: &[f32], config: &ModelConfig) -> (Vec<f32>, Vec<f32>) {
    let (hidden, grid) = (config.hidden, config.grid);
    let regions = region_boxes(grid);
    let [whole, cell] = [regions[4], regions.get(9).copied().unwrap_or(0.0)];
    let last = (grid - 1) as f32 / grid as f32;
    let (mut weight, mut bias) = (Vec::with_capacity(5 * hidden), Vec::with_capacity(hidden));
    for unit in 0..hidden {
        let at = |token: usize| places[token * hidden + unit];
        let slope = |to: usize| if grid > 1 { (at(to) - at(1)) / last } else { 0.0 };
        let (x, y) = (slope(grid), slope(1 + grid * (grid - 1)));
        // area · whole + bias = the picture's place, area · cell + bias = the first cell's.
        let area = if whole > cell { (at(0) - at(1)) / (whole - cell) } else { 0.0 };
        weight.extend([x, y, 0.0, 0.0, area]);
        bias.push(at(0) - area * whole);
    }
    (weight, bias)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_give_every_token_its_place() {
        let config = ModelConfig { grid: 3, hidden: 2, ..ModelConfig::named("pico").unwrap() };
        let (weight, bias) = ([0.3, -0.2, 0.5, 0.1, 2.0, -1.0, 0.4, 0.7, 0.2, -3.0], [0.25, -0.75]);
        let of = |weight: &[f32], bias: &[f32]| -> Vec<f32> {
            let place = |region: &[f32], unit: usize| {
                weight[5 * unit..][..5].iter().zip(region).map(|(w, x)| w * x).sum::<f32>() + bias[unit]
            };
            region_boxes(3).chunks_exact(5).flat_map(|region| [place(region, 0), place(region, 1)]).collect()
        };
        let places = of(&weight, &bias);
        let (found, found_bias) = boxes(&places, &config);
        for (found, place) in of(&found, &found_bias).iter().zip(&places) {
            assert!((found - place).abs() < 1e-5, "{found} {place}");
        }
    }
}
