//! The model as the trainer runs it, in candle.

use std::path::Path;

use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use unimo_train::backbone::Backbone;
use unimo_train::model::{Packer, Unimo};

use super::Peer;
use super::inputs::{Input, Values};

pub fn load(checkpoint: &Path, graph: &str, inputs: &[Input]) -> anyhow::Result<Box<dyn Peer>> {
    let checkpoint = unimo_train::checkpoint::resolve(checkpoint)?;
    let model = Unimo::load(&checkpoint, &Device::Cpu)?;
    let input = |name: &str| inputs.iter().find(|input| input.name == name).with_context(|| format!("no input {name:?}"));
    Ok(match graph {
        "vision" => {
            let Values::F32(pixels) = &input("pixels")?.values else { bail!("pixels are not f32") };
            let backbone = Backbone::load(&checkpoint.join("backbone.safetensors"))?;
            Box::new(Vision { model, backbone, pixels: pixels.clone() })
        }
        "text" => Box::new(Text { ids: integers(input("ids")?)?, model }),
        "decode" => {
            // A whole cache of its own, as full as the graph's, for as many hypotheses as the graph takes.
            let tokens = integers(inputs.iter().find(|input| input.name.contains("token")).context("no tokens")?)?;
            let position = integers(inputs.iter().find(|input| input.name.contains("position")).context("no position")?)?;
            let position = position.first().copied().unwrap_or_default() as usize;
            let config = model.config();
            let shape = (tokens.len(), config.heads, config.image_tokens() + position, config.hidden / config.heads);
            let layers = |_| Ok(Tensor::rand(-1f32, 1f32, shape, &Device::Cpu)?);
            let keys = (0..config.layers).map(layers).collect::<anyhow::Result<_>>()?;
            let values = (0..config.layers).map(layers).collect::<anyhow::Result<_>>()?;
            Box::new(Decode { model, tokens, position, keys, values })
        }
        other => bail!("candle is not asked to run {other:?}"),
    })
}

fn integers(input: &Input) -> anyhow::Result<Vec<u32>> {
    let Values::I64(values) = &input.values else { bail!("{} is not i64", input.name) };
    values.iter().map(|&value| u32::try_from(value).with_context(|| format!("{value} in {}", input.name))).collect()
}

struct Vision {
    model: Unimo,
    backbone: Backbone,
    pixels: Vec<f32>,
}

impl Peer for Vision {
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>> {
        let regions = self.backbone.forward(&self.pixels)?;
        let config = self.model.config();
        let regions = Tensor::from_vec(regions, (1, config.regions(), config.region_feature), &Device::Cpu)?;
        let encoded = self.model.encode_image(&regions)?;
        let embedding = self.model.embed_image(&encoded)?;
        Ok(vec![embedding.flatten_all()?.to_vec1()?])
    }
}

struct Text {
    model: Unimo,
    ids: Vec<u32>,
}

impl Peer for Text {
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>> {
        let mut packer = Packer::new(&self.model);
        let row = packer.text(&self.ids, false);
        let batch = packer.finish(&Device::Cpu)?;
        let embedding = self.model.text_embedding(&batch, &self.model.evaluate(&batch)?, &[row])?;
        Ok(vec![embedding.flatten_all()?.to_vec1()?])
    }
}

struct Decode {
    model: Unimo,
    tokens: Vec<u32>,
    position: usize,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
}

impl Peer for Decode {
    /// Nothing to compare: the cache is its own.
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>> {
        self.model.decode_step(&self.tokens, self.position, &self.keys, &self.values)?;
        Ok(Vec::new())
    }
}
