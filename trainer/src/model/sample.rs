//! Captions drawn at random from the language model, several of each image at once: what self-critical training judges.

use candle_core::{D, Result, Tensor};
use rand::Rng;
use rayon::prelude::*;
use unimo::tokenizer::{CLS, SEP};

use super::Unimo;
use crate::ops::{self, reference::softmax};

/// Keys and values of the texts so far, `[images · each, heads, rows, depth]`; absent before the first token.
type TextCache = Option<(Tensor, Tensor)>;

/// Keys (transposed) and values of an image in one layer, `[images, heads, depth, rows]` and `[images, heads, rows, depth]`.
struct Prefix {
    keys: Tensor,
    values: Tensor,
}

impl Unimo {
    /// Draws `each` captions of every image from the model's own distribution (temperature 1, all of the vocabulary), the
    /// first image's first. `regions` is `[images, regions, region_feature]`. Captions are `[CLS] … [SEP]`; one that has no
    /// end after `tokens` tokens lacks its `[SEP]`. The same seed draws the same captions.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sample_captions(&self, regions: &Tensor, each: usize, tokens: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
        let image = self.encode_image(regions)?;
        let prefixes = image
            .keys
            .iter()
            .zip(image.values)
            .map(|(keys, values)| Ok(Prefix { keys: keys.t()?.contiguous()?, values }))
            .collect::<Result<Vec<_>>>()?;
        let mut rng = crate::seed::rng(seed);
        let count = regions.dim(0)? * each;
        let mut captions = vec![vec![CLS]; count];
        let mut texts: Vec<TextCache> = vec![None; self.config.layers];
        for position in 0..tokens.min(self.config.positions - 1) {
            if captions.iter().all(|ids| ids.last() == Some(&SEP)) {
                break;
            }
            let last: Vec<u32> = captions.iter().map(|ids| ids[ids.len() - 1]).collect();
            let positions = Tensor::full(position as u32, count, &self.device)?;
            let mut x = self.embed_tokens(&Tensor::new(last, &self.device)?, &positions)?;
            for (layer, (prefix, text)) in prefixes.iter().zip(&mut texts).enumerate() {
                x = self.sampling_layer(layer, &x, prefix, text)?;
            }
            let draws: Vec<f64> = (0..count).map(|_| rng.random()).collect();
            let logits = self.language_logits(&x)?.flatten_all()?.to_vec1::<f32>()?;
            let rows = logits.par_chunks_exact(self.config.vocabulary).zip(draws);
            let chosen: Vec<u32> = rows.map(|(row, draw)| choose(row, draw)).collect();
            for (ids, token) in captions.iter_mut().zip(chosen) {
                if ids.last() != Some(&SEP) {
                    ids.push(token);
                }
            }
        }
        Ok(captions)
    }

    /// One layer over the newest token of every caption, `[images · each, hidden]`. The captions of an image read its keys and
    /// values where they are: repeating them for each caption would cost more than the arithmetic.
    fn sampling_layer(&self, layer: usize, x: &Tensor, prefix: &Prefix, text: &mut TextCache) -> Result<Tensor> {
        let (count, hidden) = x.dims2()?;
        let heads = self.config.heads;
        let (images, each, depth) = (prefix.keys.dim(0)?, count / prefix.keys.dim(0)?, hidden / heads);
        let qkv = self.linear(&format!("layers.{layer}.attention.qkv"), x)?;
        let part = |i: usize| qkv.narrow(D::Minus1, i * hidden, hidden)?.contiguous();
        let one = (count, heads, 1, depth);
        let query = (part(0)? / (depth as f64).sqrt())?;
        let (mut keys, mut values) = (part(1)?.reshape(one)?, part(2)?.reshape(one)?);
        if let Some((past_keys, past_values)) = text.take() {
            keys = Tensor::cat(&[&past_keys, &keys], 2)?;
            values = Tensor::cat(&[&past_values, &values], 2)?;
        }
        let of_image = query.reshape((images, each, heads, depth))?.transpose(1, 2)?.contiguous()?.matmul(&prefix.keys)?;
        let seen = of_image.dim(D::Minus1)?;
        let of_image = of_image.transpose(1, 2)?.reshape((count, heads, seen))?;
        // One query a head: products by rows, without a matrix product's fixed costs.
        let of_text = query.reshape(one)?.broadcast_mul(&keys)?.sum(D::Minus1)?;
        let weights = softmax(&Tensor::cat(&[of_image, of_text], D::Minus1)?)?;
        let rows = keys.dim(2)?;
        let from_image = weights
            .narrow(D::Minus1, 0, seen)?
            .reshape((images, each, heads, seen))?
            .transpose(1, 2)?
            .contiguous()?
            .matmul(&prefix.values)?
            .transpose(1, 2)?
            .reshape((count, hidden))?;
        let from_text =
            weights.narrow(D::Minus1, seen, rows)?.unsqueeze(D::Minus1)?.broadcast_mul(&values)?.sum(2)?.reshape((count, hidden))?;
        *text = Some((keys.detach(), values.detach()));
        Ok(self.after_attention(layer, x, &(from_image + from_text)?)?.detach())
    }

    /// The rest of a layer: output projection, feed-forward block, and both normalisations.
    pub(super) fn after_attention(&self, layer: usize, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let x = self.norm(&name("attention.norm"), &(x + self.linear(&name("attention.output"), attended)?)?)?;
        let inner = ops::gelu(&self.linear(&name("ffn.up"), &x)?)?;
        self.norm(&name("ffn.norm"), &(&x + self.linear(&name("ffn.down"), &inner)?)?)
    }
}

/// The class at share `draw` (in [0, 1)) of the cumulative softmax of `logits`.
fn choose(logits: &[f32], draw: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |v: &f32| f64::from((v - max).exp());
    let mut left = draw * logits.iter().map(weight).sum::<f64>();
    for (id, v) in logits.iter().enumerate() {
        left -= weight(v);
        if left < 0.0 {
            return id as u32;
        }
    }
    logits.len() as u32 - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ModelConfig, Packer, Regions};
    use crate::ops::reference::log_softmax;
    use candle_core::Device;

    #[test]
    fn classes_are_chosen_in_proportion_to_their_probability() {
        let logits = [0.0f32, 2f32.ln(), f32::NEG_INFINITY, 1f32.ln()];
        let counts = (0..400).map(|i| choose(&logits, (f64::from(i) + 0.5) / 400.0)).fold([0; 4], |mut counts, id| {
            counts[id as usize] += 1;
            counts
        });
        assert_eq!(counts, [100, 200, 0, 100]);
    }

    /// The distribution that captions are drawn from is the one whose likelihood the packed forward pass computes: with a model
    /// that is nearly certain of every token, each draw must be the token that the forward pass finds most likely.
    #[test]
    fn samples_follow_the_distribution_of_the_forward_pass() {
        let config =
            ModelConfig { grid: 2, region_feature: 3, vocabulary: 40, initial_deviation: 0.5, ..ModelConfig::named("pico").unwrap() };
        let regions = config.regions();
        let model = Unimo::new(config, 3, &Device::Cpu).unwrap();
        let sharp = (model.weights()["text.token.weight"].as_tensor() * 30.0).unwrap();
        model.weights()["text.token.weight"].set(&sharp).unwrap();
        let features: Vec<f32> = (0..2 * regions * 3).map(|v| (v as f32 * 0.9).sin()).collect();
        let tensor = Tensor::from_slice(&features, (2, regions, 3), &Device::Cpu).unwrap();
        let captions = model.sample_captions(&tensor, 3, 7, 5).unwrap();
        assert_eq!(captions, model.sample_captions(&tensor, 3, 7, 5).unwrap());
        assert_eq!(captions.len(), 6);

        let mut packer = Packer::new(&model);
        let mut rows = Vec::new();
        for (image, own) in captions.chunks(3).enumerate() {
            let inputs: Vec<&[u32]> = own.iter().map(|ids| &ids[..ids.len() - 1]).collect();
            let features = &features[image * regions * 3..(image + 1) * regions * 3];
            let placed = packer.image_with_captions(Regions::visible(features), &inputs);
            for (first, ids) in placed.texts.iter().zip(own) {
                rows.extend((0..ids.len() - 1).map(|i| (first + i, ids[i + 1])));
            }
        }
        let hidden = model.evaluate(&packer.finish(&Device::Cpu).unwrap()).unwrap();
        let places: Vec<usize> = rows.iter().map(|(row, _)| *row).collect();
        let log_p = log_softmax(&model.language_logits(&model.rows(&hidden, &places).unwrap()).unwrap()).unwrap();
        let log_p = log_p.to_vec2::<f32>().unwrap();
        let (mut certain, mut agreeing) = (0, 0);
        for (row, (_, token)) in log_p.iter().zip(&rows) {
            if row.iter().any(|&v| v > -1e-3) {
                certain += 1;
                agreeing += usize::from(row[*token as usize] > -1e-3);
            }
        }
        assert!(certain >= rows.len() / 2, "{certain} of {} tokens are certain: the test asks too little", rows.len());
        assert_eq!(agreeing, certain);
    }
}
