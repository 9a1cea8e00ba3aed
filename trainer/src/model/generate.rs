//! Inference in candle with cached keys and values: what training evaluates with, and what the exporter is compared to.

use candle_core::{D, Result, Tensor};

use super::packing::WHOLE_IMAGE;
use super::{Dropout, Hidden, PackedBatch, Unimo, region_boxes};
use crate::ops;
use crate::regions::Record;
use unimo::tokenizer::{CLS, PAD, SEP, UNK};

/// Keys and values of every layer, `[batch, heads, rows, depth]` each.
pub struct ImageCache {
    /// Hidden states of the image, `[batch, 1 + regions, hidden]`.
    pub hidden: Tensor,
    /// Means of the standardised region features, `[batch, region_feature]`: the features of `[IMG]`.
    pub means: Tensor,
    /// Per layer.
    pub keys: Vec<Tensor>,
    /// Per layer.
    pub values: Vec<Tensor>,
}

/// One decoding step's results.
pub struct Step {
    /// `[batch, vocabulary]`.
    pub logits: Tensor,
    /// Keys including the new row, per layer, `[batch, heads, rows, depth]`.
    pub keys: Vec<Tensor>,
    /// Values including the new row.
    pub values: Vec<Tensor>,
}

impl Unimo {
    /// `[batch, rows, 3·hidden]` → queries, keys, values `[batch, heads, rows, depth]`.
    fn split_heads(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, rows, width) = qkv.dims3()?;
        let (hidden, heads) = (width / 3, self.config.heads);
        let part = |i: usize| -> Result<Tensor> {
            qkv.narrow(D::Minus1, i * hidden, hidden)?
                .reshape((batch, rows, heads, hidden / heads))?
                .transpose(1, 2)?
                .contiguous()
        };
        Ok([part(0)?, part(1)?, part(2)?])
    }

    /// One layer over `x` `[batch, rows, hidden]`, whose rows see `past` (if any) and all rows of `x`.
    fn cached_layer(&self, layer: usize, x: &Tensor, past: Option<(&Tensor, &Tensor)>) -> Result<(Tensor, Tensor, Tensor)> {
        let (batch, rows, hidden) = x.dims3()?;
        let [query, mut keys, mut values] = self.split_heads(&self.linear(&format!("layers.{layer}.attention.qkv"), x)?)?;
        if let Some((past_keys, past_values)) = past {
            keys = Tensor::cat(&[past_keys, &keys], 2)?;
            values = Tensor::cat(&[past_values, &values], 2)?;
        }
        let depth = hidden / self.config.heads;
        let scores = (query.matmul(&keys.t()?.contiguous()?)? / (depth as f64).sqrt())?;
        let attended = ops::reference::softmax(&scores)?.matmul(&values)?.transpose(1, 2)?.reshape((batch, rows, hidden))?;
        Ok((self.after_attention(layer, x, &attended)?, keys, values))
    }

    /// Encodes images alone, whose regions are the cells of the grid: `regions` is `[batch, regions, region_feature]`, as the
    /// backbone gives them.
    ///
    /// # Errors
    /// A shape that does not fit the model.
    pub fn encode_image(&self, regions: &Tensor) -> Result<ImageCache> {
        let (batch, tokens) = (regions.dim(0)?, self.config.image_tokens());
        let boxes = Tensor::from_vec(region_boxes(self.config.grid).repeat(batch), (batch * tokens, 5), regions.device())?;
        self.encode(regions, &boxes)
    }

    /// Encodes pictures alone, all with equally many regions, cells or detected.
    ///
    /// # Errors
    /// Unlike numbers of regions, or a width that does not fit the model.
    pub fn encode_records(&self, records: &[&Record]) -> Result<ImageCache> {
        let width = self.config.region_feature;
        let count = records.first().map_or(0, |record| record.values.len() / width);
        let values: Vec<f32> = records.iter().flat_map(|record| &record.values).copied().collect();
        let regions = Tensor::from_vec(values, (records.len(), count, width), &self.device)?;
        if !self.config.detects() {
            return self.encode_image(&regions);
        }
        let mut boxes = Vec::with_capacity(records.len() * (1 + count) * 5);
        for record in records {
            boxes.extend(WHOLE_IMAGE);
            boxes.extend_from_slice(record.boxes().unwrap_or_default());
        }
        self.encode(&regions, &Tensor::from_vec(boxes, (records.len() * (1 + count), 5), &self.device)?)
    }

    /// `regions` is `[batch, regions, region_feature]`, `boxes` `[batch · (1 + regions), 5]`.
    fn encode(&self, regions: &Tensor, boxes: &Tensor) -> Result<ImageCache> {
        let (batch, count, width) = regions.dims3()?;
        let tokens = 1 + count;
        let mean = Tensor::new(self.statistics.mean.as_slice(), regions.device())?;
        let deviation = Tensor::new(self.statistics.deviation.as_slice(), regions.device())?;
        let regions = regions.broadcast_sub(&mean)?.broadcast_div(&deviation)?;
        let means = regions.mean_keepdim(1)?;
        let features = Tensor::cat(&[&means, &regions], 1)?;
        let x = self.embed_regions(&features.reshape((batch * tokens, width))?, boxes)?;
        let mut hidden = x.reshape((batch, tokens, self.config.hidden))?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer in 0..self.config.layers {
            let (next, k, v) = self.cached_layer(layer, &hidden, None)?;
            hidden = next.detach();
            keys.push(k.detach());
            values.push(v.detach());
        }
        Ok(ImageCache { hidden, means: means.squeeze(1)?, keys, values })
    }

    /// Decodes one token for every image: `tokens` `[batch]`, all at text position `position`.
    ///
    /// # Errors
    /// A position outside the model's.
    pub fn decode_step(&self, tokens: &[u32], position: usize, keys: &[Tensor], values: &[Tensor]) -> Result<Step> {
        let positions = vec![position as u32; tokens.len()].into();
        let mut x = self.embed_tokens(&tokens.into(), &positions)?.unsqueeze(1)?;
        let (mut new_keys, mut new_values) = (Vec::new(), Vec::new());
        for layer in 0..self.config.layers {
            let (next, k, v) = self.cached_layer(layer, &x, Some((&keys[layer], &values[layer])))?;
            x = next.detach();
            new_keys.push(k.detach());
            new_values.push(v.detach());
        }
        let logits = self.language_logits(&x.squeeze(1)?)?.detach();
        Ok(Step { logits, keys: new_keys, values: new_values })
    }

    /// Greedy captions of encoded images, as ids without specials.
    ///
    /// # Errors
    /// Those of candle.
    pub fn greedy_captions(&self, image: &ImageCache, max_words: usize) -> Result<Vec<Vec<u32>>> {
        let batch = image.hidden.dim(0)?;
        let (mut keys, mut values) = (image.keys.clone(), image.values.clone());
        let mut captions = vec![Vec::new(); batch];
        let mut tokens = vec![CLS; batch];
        let mut done = vec![false; batch];
        let mask = self.config.vocabulary as u32 - 1;
        for position in 0..max_words.min(self.config.positions - 1) {
            let step = self.decode_step(&tokens, position, &keys, &values)?;
            (keys, values) = (step.keys, step.values);
            for (i, logits) in step.logits.to_vec2::<f32>()?.into_iter().enumerate() {
                let never = [CLS, PAD, UNK, mask];
                let best = logits
                    .iter()
                    .enumerate()
                    .filter(|(id, _)| !never.contains(&(*id as u32)))
                    .max_by(|a, b| a.1.total_cmp(b.1))
                    .map_or(SEP, |(id, _)| id as u32);
                done[i] |= best == SEP;
                if !done[i] {
                    captions[i].push(best);
                }
                tokens[i] = best;
            }
            if done.iter().all(|&d| d) {
                break;
            }
        }
        Ok(captions)
    }

    /// Hidden states of a packed batch without dropout or gradient.
    ///
    /// # Errors
    /// Those of [`Unimo::forward`].
    pub fn evaluate(&self, batch: &PackedBatch) -> Result<Hidden> {
        Ok(self.forward(batch, None, Dropout::OFF)?.hidden.constants()?.into())
    }
}
