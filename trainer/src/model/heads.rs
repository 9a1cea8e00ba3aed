//! Heads: pooled vectors, unified-space embeddings, matching score, language model, regions.

use candle_core::{Result, Tensor};

use super::{Dropout, Given, Hidden, ImageCache, ImageEmbedding, LAYER_NORM_EPS, PackedBatch, Passed, TextEmbedding, Unimo};
use crate::ops::{self, Operators, Targets};

/// Bounds of the learnt temperature.
pub const TEMPERATURE: [f32; 2] = [0.001, 0.5];

/// Images that are embedded together; each kind has dropout of its own where it is embedded from means of features.
#[derive(Debug, Clone, Copy)]
pub enum EmbeddedImages {
    /// The pictures that a step describes.
    Described,
    /// Images retrieved for them.
    Retrieved,
    /// Further pictures, of which the means of their features alone are known.
    Further,
}

/// Rows that a text is embedded from.
pub struct TextRows {
    /// Which, text after text.
    pub rows: Vec<usize>,
    /// Tokens behind each text's first; nothing where that alone is read.
    pub counts: Option<Vec<usize>>,
}

impl TextRows {
    /// As what embeds the texts is given them.
    #[must_use]
    pub fn given(&self) -> Given {
        match self.counts {
            Some(_) => Given::rows_to_read(&self.rows),
            None => Given::rows(&self.rows),
        }
    }
}

impl Unimo {
    /// Unified-space embeddings of images encoded alone, whose `[IMG]`s lie at `rows` of a pass over `batch`: `[n, embedding]`, unit
    /// length.
    ///
    /// # Errors
    /// Rows that are not an image's, and those of candle.
    pub fn image_embedding(&self, batch: &PackedBatch, passed: &Passed, rows: &[usize], kind: EmbeddedImages) -> Result<Tensor> {
        let x = match self.image_means(batch, passed, rows)? {
            Some(means) => means,
            None => passed.hidden.rows(rows)?,
        };
        self.embed_images(&self.at_once(), &x, passed.dropout, kind)
    }

    /// Of a model that embeds images by these, the means of the standardised features of images whose `[IMG]`s lie at `rows` of a pass
    /// over `batch`, `[n, region_feature]`. Another one embeds the rows' hidden states.
    ///
    /// # Errors
    /// Rows that are not an image's, and those of candle.
    pub fn image_means(&self, batch: &PackedBatch, passed: &Passed, rows: &[usize]) -> Result<Option<Tensor>> {
        match (self.config.image_embedding, &passed.features) {
            (ImageEmbedding::Token, _) => Ok(None),
            (ImageEmbedding::Pooled, Some(features)) => batch.means(features, rows).map(Some),
            (ImageEmbedding::Pooled, None) => candle_core::bail!("a batch without images has no image to embed"),
        }
    }

    /// Unified-space embeddings, `[n, embedding]`, unit length, of what images are embedded by: means of their standardised region
    /// features, `[n, region_feature]`, which dropout takes from, or hidden states of `[IMG]`, `[n, hidden]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn embed_images<O: Operators>(&self, on: &O, x: &O::Array, dropout: Dropout, kind: EmbeddedImages) -> Result<O::Array> {
        let [weight, bias] = self.both("embed.image")?;
        let x = match self.config.image_embedding {
            ImageEmbedding::Token => x.clone(),
            ImageEmbedding::Pooled => {
                // Behind the sites of the layers.
                let site = dropout.site(1 + 3 * self.config.layers + kind as usize);
                on.dropout(x, dropout.features, site)?
            }
        };
        on.unit_rows(&on.linear(&x, weight, bias)?)
    }

    /// Unified-space embeddings of encoded images, `[batch, embedding]`, unit length.
    ///
    /// # Errors
    /// Those of candle.
    pub fn embed_image(&self, image: &ImageCache) -> Result<Tensor> {
        let x = match self.config.image_embedding {
            ImageEmbedding::Token => image.hidden.narrow(1, 0, 1)?.squeeze(1)?,
            ImageEmbedding::Pooled => image.means.clone(),
        };
        self.embed_images(&self.at_once(), &x, Dropout::OFF, EmbeddedImages::Described)
    }

    /// Unified-space embeddings of texts encoded alone, whose `[CLS]`s lie at `rows` of a pass over `batch` that gave the hidden
    /// states: `[n, embedding]`, unit length.
    ///
    /// # Errors
    /// Rows that are not a text's first, and those of candle.
    pub fn text_embedding(&self, batch: &PackedBatch, hidden: &Hidden, rows: &[usize]) -> Result<Tensor> {
        let TextRows { rows, counts } = self.text_rows(batch, rows)?;
        self.embed_texts(&self.at_once(), &hidden.rows(&rows)?, counts.as_deref())
    }

    /// What texts are embedded from, whose `[CLS]`s lie at `rows` of a batch.
    ///
    /// # Errors
    /// Rows that are not a text's first.
    pub fn text_rows(&self, batch: &PackedBatch, rows: &[usize]) -> Result<TextRows> {
        match self.config.text_embedding {
            TextEmbedding::Token => Ok(TextRows { rows: rows.to_vec(), counts: None }),
            TextEmbedding::Both => {
                let counts = rows.iter().map(|&row| batch.tokens_behind(row)).collect::<Result<Vec<usize>>>()?;
                let rows = rows.iter().zip(&counts).flat_map(|(&row, &count)| row..=row + count).collect();
                Ok(TextRows { rows, counts: Some(counts) })
            }
        }
    }

    /// Unified-space embeddings of texts, `[n, embedding]`, unit length, of the hidden states of what they are embedded from.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn embed_texts<O: Operators>(&self, on: &O, hidden: &O::Array, counts: Option<&[usize]>) -> Result<O::Array> {
        let [weight, bias] = self.both("embed.text")?;
        let x = match counts {
            Some(counts) => on.first_and_mean(hidden, counts)?,
            None => hidden.clone(),
        };
        on.unit_rows(&on.linear(&x, weight, bias)?)
    }

    /// Matching logits of jointly encoded pairs: hidden states of `[IMG]` and `[CLS]`, both `[n, hidden]` → `[n, 1]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn match_logits<O: Operators>(&self, on: &O, image: &O::Array, text: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("match")?;
        on.linear(&self.pool(on, Some(image), text)?, weight, bias)
    }

    /// The poolings of `[IMG]` and `[CLS]`, multiplied, or that of `[CLS]` alone.
    fn pool<O: Operators>(&self, on: &O, image: Option<&O::Array>, text: &O::Array) -> Result<O::Array> {
        let ([of_image, image_bias], [of_text, text_bias]) = (self.both("pool.image")?, self.both("pool.text")?);
        let text = on.linear(text, of_text, text_bias)?;
        match image {
            Some(image) => on.relu_product(&on.linear(image, of_image, image_bias)?, &text),
            None => on.relu(&text),
        }
    }

    /// Logits of a downstream task, `[n, classes]`, from hidden states: the poolings of `[IMG]` and `[CLS]`, multiplied, or that of
    /// `[CLS]` alone where there are no images; then a hidden layer.
    ///
    /// # Errors
    /// Another number of images than of texts, a model without a task's head, and those of the operators.
    pub fn task_logits<O: Operators>(&self, on: &O, image: Option<&O::Array>, text: &O::Array) -> Result<O::Array> {
        let ([of_hidden, hidden_bias], [of_output, output_bias]) = (self.both("task.hidden")?, self.both("task.output")?);
        on.linear(&on.linear_gelu(&self.pool(on, image, text)?, of_hidden, hidden_bias)?, of_output, output_bias)
    }

    /// The contrast's temperature τ, a scalar inside [0.001, 0.5].
    ///
    /// # Errors
    /// Those of candle.
    pub fn temperature(&self) -> Result<Tensor> {
        ops::bounded_exp(self.log_temperature()?, TEMPERATURE)
    }

    /// Its logarithm, where it is inside its bounds, [`TEMPERATURE`].
    ///
    /// # Errors
    /// Those of candle.
    pub fn log_temperature(&self) -> Result<&Tensor> {
        self.weight("temperature")
    }

    fn lm_transform<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let ([weight, bias], [of_norm, norm_bias]) = (self.both("lm.transform")?, self.both("lm.norm")?);
        on.layer_norm(&on.linear_gelu(hidden, weight, bias)?, of_norm, norm_bias, LAYER_NORM_EPS)
    }

    /// Mean cross-entropy of the language model at the given hidden states `[n, hidden]`.
    ///
    /// # Errors
    /// As many targets as rows are needed, inside the vocabulary.
    pub fn language_loss(&self, hidden: &Tensor, targets: Vec<u32>, smoothing: f32) -> Result<Tensor> {
        self.language_losses(&self.at_once(), hidden, &Targets::of_one(targets, None, smoothing))?.get(0)
    }

    /// Cross-entropies of the language model at the given hidden states `[n, hidden]`, as
    /// [`tied_cross_entropy`](ops::tied_cross_entropy) gives them: `[1 + parts]`.
    ///
    /// # Errors
    /// As many targets as rows are needed, inside the vocabulary.
    pub fn language_losses<O: Operators>(&self, on: &O, hidden: &O::Array, targets: &Targets) -> Result<O::Array> {
        let x = self.lm_transform(on, hidden)?;
        on.tied_cross_entropy(&x, self.weight("text.token.weight")?, &on.weight(self.weight("lm.bias")?), targets)
    }

    /// Policy-gradient loss of sampled tokens: the mean of −advantage · ln p(target), p being the softmax of the logits divided by
    /// `temperature`, at the given hidden states `[n, hidden]`; advantages are the targets' weights. As
    /// [`tied_cross_entropy`](ops::tied_cross_entropy) gives it: `[2]`, both the same.
    ///
    /// # Errors
    /// As many targets and advantages as rows are needed, targets inside the vocabulary.
    pub fn policy_loss<O: Operators>(&self, on: &O, hidden: &O::Array, targets: &Targets, temperature: f64) -> Result<O::Array> {
        let x = on.scaled(&self.lm_transform(on, hidden)?, 1.0 / temperature)?;
        let bias = on.scaled(&on.weight(self.weight("lm.bias")?), 1.0 / temperature)?;
        on.tied_cross_entropy(&x, self.weight("text.token.weight")?, &bias, targets)
    }

    /// Logits of the language model, `[n, hidden]` → `[n, vocabulary]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn language_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = self.lm_transform(&self.at_once(), hidden)?;
        ops::linear(&x, self.weight("text.token.weight")?, self.weight("lm.bias")?)
    }

    /// Predicted features of regions, `[n, hidden]` → `[n, region_feature]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn region_features<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("region.feature")?;
        on.linear(hidden, weight, bias)
    }

    /// Logits of the regions' classes, `[n, hidden]` → `[n, region_classes]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn region_logits<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("region.class")?;
        on.linear(hidden, weight, bias)
    }
}

#[cfg(test)]
mod tests;
