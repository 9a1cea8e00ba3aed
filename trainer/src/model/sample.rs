//! Captions drawn at random from the language model, several of each image at once: what self-critical training judges.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use unimo::tokenizer::{CLS, SEP};

use super::{ImageCache, Unimo};
use crate::ops::kernels::{Seen, attend_one};

/// Keys and values of all images in one layer, `[images, heads, rows, depth]` each.
struct Prefix {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// A caption being drawn, with its own keys and values of every layer, `[tokens, hidden]` each.
struct Draft {
    image: usize,
    rng: ChaCha8Rng,
    ids: Vec<u32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Unimo {
    /// Draws `each` captions of every image from the softmax of the model's logits divided by `temperature`, over all of the
    /// vocabulary; the first image's come first. Captions are `[CLS] … [SEP]`;
    /// one that has no end after `tokens` tokens lacks its `[SEP]`. An image's captions depend on its own one of the `seeds`, not on the
    /// images beside it.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sample_captions(
        &self,
        image: &ImageCache,
        each: usize,
        tokens: usize,
        temperature: f64,
        seeds: &[u64],
    ) -> Result<Vec<Vec<u32>>> {
        let (images, image_rows, _) = image.hidden.dims3()?;
        if seeds.len() != images {
            candle_core::bail!("{} seeds for {images} images", seeds.len());
        }
        if !self.device.is_cpu() {
            return self.sample_on_device(image, each, tokens, temperature, seeds);
        }
        let flat = |t: &Tensor| t.contiguous()?.flatten_all()?.to_vec1::<f32>();
        let prefixes = (image.keys.iter().zip(&image.values))
            .map(|(keys, values)| Ok(Prefix { keys: flat(keys)?, values: flat(values)? }))
            .collect::<Result<Vec<_>>>()?;
        let layers = self.config.layers;
        let draft = |i: usize| Draft {
            image: i / each,
            rng: rng_of(seeds, each, i),
            ids: vec![CLS],
            keys: vec![Vec::new(); layers],
            values: vec![Vec::new(); layers],
        };
        let mut drafts: Vec<Draft> = (0..images * each).map(draft).collect();
        for position in 0..tokens.min(self.config.positions - 1) {
            let mut open: Vec<&mut Draft> = drafts.iter_mut().filter(|d| d.ids.last() != Some(&SEP)).collect();
            if open.is_empty() {
                break;
            }
            let last: Arc<[u32]> = open.iter().map(|d| d.ids[position]).collect();
            let positions = vec![position as u32; last.len()].into();
            let mut x = self.embed_tokens(&last, &positions)?;
            for (layer, prefix) in prefixes.iter().enumerate() {
                let qkv = flat(&self.linear(&format!("layers.{layer}.attention.qkv"), &x)?)?;
                let attended = self.attend(layer, prefix, image_rows, &qkv, &mut open);
                x = self.after_attention(layer, &x, &Tensor::from_vec(attended, x.shape(), &self.device)?)?.detach();
            }
            let logits = flat(&self.language_logits(&x)?)?;
            let draws: Vec<f64> = open.iter_mut().map(|draft| draft.rng.random()).collect();
            let rows = logits.par_chunks_exact(self.config.vocabulary).zip(draws);
            let chosen: Vec<u32> = rows.map(|(row, draw)| choose(row, temperature, draw)).collect();
            for (draft, token) in open.iter_mut().zip(chosen) {
                draft.ids.push(token);
            }
        }
        Ok(drafts.into_iter().map(|d| d.ids).collect())
    }

    /// The same where the caches lie on a device and grow there: only logits come to the host, where tokens are drawn. Captions
    /// that have ended are decoded on with the others, and nothing is drawn for them.
    fn sample_on_device(
        &self,
        image: &ImageCache,
        each: usize,
        tokens: usize,
        temperature: f64,
        seeds: &[u64],
    ) -> Result<Vec<Vec<u32>>> {
        let for_each = |caches: &[Tensor]| -> Result<Vec<Tensor>> {
            let repeated = caches.iter().map(|cache| {
                let (images, heads, rows, depth) = cache.dims4()?;
                cache.unsqueeze(1)?.broadcast_as((images, each, heads, rows, depth))?.contiguous()?.flatten(0, 1)
            });
            repeated.collect()
        };
        let (mut keys, mut values) = (for_each(&image.keys)?, for_each(&image.values)?);
        let mut drafts: Vec<(Vec<u32>, ChaCha8Rng)> =
            (0..seeds.len() * each).map(|i| (vec![CLS], rng_of(seeds, each, i))).collect();
        for position in 0..tokens.min(self.config.positions - 1) {
            let last: Vec<u32> = drafts.iter().filter_map(|(ids, _)| ids.last().copied()).collect();
            if last.iter().all(|&token| token == SEP) {
                break;
            }
            let step = self.decode_step(&last, position, &keys, &values)?;
            (keys, values) = (step.keys, step.values);
            let logits = step.logits.flatten_all()?.to_vec1::<f32>()?;
            for ((ids, rng), row) in drafts.iter_mut().zip(logits.chunks_exact(self.config.vocabulary)) {
                if ids.last() != Some(&SEP) {
                    ids.push(choose(row, temperature, rng.random()));
                }
            }
        }
        Ok(drafts.into_iter().map(|(ids, _)| ids).collect())
    }

    /// Appends the newest tokens' keys and values (in `qkv`, `[open, 3 · hidden]`) and attends from them, `[open, hidden]`.
    /// Captions of one image read its `seen` keys and values where they are.
    fn attend(&self, layer: usize, prefix: &Prefix, seen: usize, qkv: &[f32], open: &mut [&mut Draft]) -> Vec<f32> {
        let (hidden, heads) = (self.config.hidden, self.config.heads);
        let depth = hidden / heads;
        let mut attended = vec![0f32; open.len() * hidden];
        let rows = qkv.par_chunks_exact(3 * hidden).zip(attended.par_chunks_exact_mut(hidden));
        rows.zip(open.par_iter_mut()).for_each(|((qkv, out), draft)| {
            draft.keys[layer].extend_from_slice(&qkv[hidden..2 * hidden]);
            draft.values[layer].extend_from_slice(&qkv[2 * hidden..]);
            for head in 0..heads {
                let (own, image) = (head * depth, (draft.image * heads + head) * seen * depth);
                let (keys, values) = (&draft.keys[layer], &draft.values[layer]);
                let runs = [
                    Seen { keys: &prefix.keys[image..], values: &prefix.values[image..], stride: depth, rows: seen },
                    Seen { keys: &keys[own..], values: &values[own..], stride: hidden, rows: keys.len() / hidden },
                ];
                attend_one(&qkv[own..own + depth], &runs, 1.0 / (depth as f32).sqrt(), &mut out[own..own + depth]);
            }
        });
        attended
    }

    /// The rest of a layer: output projection, feed-forward block, and both normalisations.
    pub(super) fn after_attention(&self, layer: usize, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let x = self.norm(&name("attention.norm"), &(x + self.linear(&name("attention.output"), attended)?)?)?;
        let inner = self.linear_gelu(&name("ffn.up"), &x)?;
        self.norm(&name("ffn.norm"), &(&x + self.linear(&name("ffn.down"), &inner)?)?)
    }
}

/// Draws of caption `i`, where every image has `each`.
fn rng_of(seeds: &[u64], each: usize, i: usize) -> ChaCha8Rng {
    crate::seed::rng(crate::seed::mix(seeds[i / each], (i % each) as u64))
}

/// The class at share `draw` (in [0, 1)) of the cumulative softmax of `logits / temperature`.
fn choose(logits: &[f32], temperature: f64, draw: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (1.0 / temperature) as f32;
    let weight = |v: &f32| f64::from(((v - max) * scale).exp());
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
    use crate::model::{Given, ModelConfig, Packer, Regions};
    use crate::objectives::losses::Policy;
    use crate::ops::Targets;
    use crate::ops::cuda::emulation::emulated;
    use crate::ops::reference::log_softmax;
    use candle_core::Device;

    #[test]
    fn classes_are_chosen_in_proportion_to_their_probability() {
        let logits = [0.0f32, 2f32.ln(), f32::NEG_INFINITY, 1f32.ln()];
        for (temperature, expected) in [(1.0, [100, 200, 0, 100]), (0.5, [67, 266, 0, 67])] {
            let counts =
                (0..400).map(|i| choose(&logits, temperature, (f64::from(i) + 0.5) / 400.0)).fold([0; 4], |mut counts, id| {
                    counts[id as usize] += 1;
                    counts
                });
            assert_eq!(counts, expected);
        }
    }

    /// The distribution that captions are drawn from is the one whose likelihood the packed forward pass computes: with a model
    /// that is nearly certain of every token, each draw must be the token that the forward pass finds most likely.
    #[test]
    fn samples_follow_the_distribution_of_the_forward_pass() {
        let config = ModelConfig {
            grid: 2,
            region_feature: 3,
            vocabulary: 40,
            initial_deviation: 0.5,
            ..ModelConfig::named("pico").unwrap()
        };
        let regions = config.regions();
        let model = Unimo::new(config, 3, &Device::Cpu).unwrap();
        let sharp = (model.weights()["text.token.weight"].as_tensor() * 30.0).unwrap();
        model.weights()["text.token.weight"].set(&sharp).unwrap();
        let features: Vec<f32> = (0..2 * regions * 3).map(|v| (v as f32 * 0.9).sin()).collect();
        let tensor = Tensor::from_slice(&features, (2, regions, 3), &Device::Cpu).unwrap();
        let captions = model.sample_captions(&model.encode_image(&tensor).unwrap(), 3, 7, 1.0, &[5, 6]).unwrap();
        // The second image alone gets the captions that it gets beside the first.
        let second = model.encode_image(&tensor.narrow(0, 1, 1).unwrap()).unwrap();
        assert_eq!(captions[3..], model.sample_captions(&second, 3, 7, 1.0, &[6]).unwrap());
        assert_eq!(captions.len(), 6);
        // A device draws the same ones, also where the model is not certain and every caption has draws of its own.
        let encoded = model.encode_image(&tensor).unwrap();
        assert_eq!(captions, model.sample_on_device(&encoded, 3, 7, 1.0, &[5, 6]).unwrap());
        let varied = model.sample_captions(&encoded, 3, 7, 30.0, &[5, 6]).unwrap();
        assert!(varied[0] != varied[1] && varied[1] != varied[2], "{varied:?}");
        assert_eq!(varied, model.sample_on_device(&encoded, 3, 7, 30.0, &[5, 6]).unwrap());

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
        let log_p = log_softmax(&model.language_logits(&hidden.rows(&places).unwrap()).unwrap()).unwrap();
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

    #[test]
    fn the_policy_whose_likelihood_moves_is_the_one_that_is_drawn_from() {
        let model = Unimo::new(ModelConfig { vocabulary: 40, ..ModelConfig::named("pico").unwrap() }, 3, &Device::Cpu).unwrap();
        let hidden: Vec<f32> = (0..3 * 64).map(|v| (v as f32 * 0.61).sin()).collect();
        let hidden = Tensor::from_vec(hidden, (3, 64), &Device::Cpu).unwrap();
        let (targets, advantages) = (vec![7, 30, 2], vec![0.5, -1.5, 0.25]);
        let logits = model.language_logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
        for temperature in [1.0, 0.4] {
            let expected: f64 = (logits.iter().zip(&targets).zip(&advantages))
                .map(|((row, &target), &advantage)| {
                    let weights: Vec<f64> = row.iter().map(|&v| (f64::from(v) / temperature).exp()).collect();
                    -f64::from(advantage) * (weights[target as usize] / weights.iter().sum::<f64>()).ln() / 3.0
                })
                .sum();
            let targets = Targets::of_one(targets.clone(), Some(advantages.clone()), 0.0);
            let policy = Policy { model: &model, targets: &targets, temperature };
            let run = || {
                let computed = model.computing().losses(&policy, (None, &[Given::matrix(&hidden)]), &[1.0], model.device());
                f64::from(computed.unwrap().outputs[0].get(0).unwrap().to_scalar::<f32>().unwrap())
            };
            // Sums of three logarithms of order 4, in f32.
            for loss in [run(), emulated(0, run)] {
                assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
            }
        }
    }
}
