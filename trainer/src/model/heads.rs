//! Heads: pooled vectors, unified-space embeddings, matching score, language model, regions.

use candle_core::{D, Result, Tensor};

use super::Unimo;
use crate::ops;

/// Bounds of the learnt temperature.
const TEMPERATURE: (f64, f64) = (0.001, 0.5);

impl Unimo {
    /// Rows of the hidden states, `[rows, hidden]` → `[chosen, hidden]`.
    ///
    /// # Errors
    /// A row out of range.
    pub fn rows(&self, hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
        ops::select_rows(hidden, &rows.iter().map(|&row| row as u32).collect())
    }

    /// Unified-space embeddings of separately encoded images: hidden states of `[IMG]`, `[n, hidden]` → `[n, embedding]`, unit length.
    ///
    /// # Errors
    /// Those of candle.
    pub fn image_embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        unit(&self.linear("embed.image", hidden)?)
    }

    /// Unified-space embeddings of separately encoded texts: hidden states of `[CLS]`, `[n, hidden]` → `[n, embedding]`, unit length.
    ///
    /// # Errors
    /// Those of candle.
    pub fn text_embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        unit(&self.linear("embed.text", hidden)?)
    }

    /// Matching logits of jointly encoded pairs: hidden states of `[IMG]` and `[CLS]`, both `[n, hidden]` → `[n]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn match_logits(&self, image: &Tensor, text: &Tensor) -> Result<Tensor> {
        let image = self.linear("pool.image", image)?.relu()?;
        let text = self.linear("pool.text", text)?.relu()?;
        self.linear("match", &(image * text)?)?.squeeze(1)
    }

    /// Logits of a downstream task, `[n, classes]`, from hidden states `[rows, hidden]`: the poolings of `[IMG]` (at rows `images`)
    /// and `[CLS]` (at rows `texts`), multiplied, or that of `[CLS]` alone where there are no images; then a hidden layer.
    ///
    /// # Errors
    /// Another number of images than of texts, a model without a task's head, and those of candle.
    pub fn task_logits(&self, hidden: &Tensor, images: &[usize], texts: &[usize]) -> Result<Tensor> {
        let mut pooled = self.linear("pool.text", &self.rows(hidden, texts)?)?.relu()?;
        if !images.is_empty() {
            pooled = (pooled * self.linear("pool.image", &self.rows(hidden, images)?)?.relu()?)?;
        }
        self.linear("task.output", &self.linear_gelu("task.hidden", &pooled)?)
    }

    /// The contrast's temperature τ, a scalar inside [0.001, 0.5].
    ///
    /// # Errors
    /// Those of candle.
    pub fn temperature(&self) -> Result<Tensor> {
        self.weight("temperature")?.exp()?.clamp(TEMPERATURE.0, TEMPERATURE.1)
    }

    fn lm_transform(&self, hidden: &Tensor) -> Result<Tensor> {
        self.norm("lm.norm", &self.linear_gelu("lm.transform", hidden)?)
    }

    /// Mean cross-entropy of the language model at the given hidden states `[n, hidden]`.
    ///
    /// # Errors
    /// As many targets as rows are needed, inside the vocabulary.
    pub fn language_loss(&self, hidden: &Tensor, targets: Vec<u32>, smoothing: f32) -> Result<Tensor> {
        let x = self.lm_transform(hidden)?;
        ops::tied_cross_entropy(&x, self.weight("text.token.weight")?, self.weight("lm.bias")?, targets, None, smoothing)
    }

    /// Policy-gradient loss of sampled tokens: the mean of −advantage · ln p(target), p being the softmax of the logits divided
    /// by `temperature`, at the given hidden states `[n, hidden]`.
    ///
    /// # Errors
    /// As many targets and advantages as rows are needed, targets inside the vocabulary.
    pub fn policy_loss(&self, hidden: &Tensor, targets: Vec<u32>, advantages: Vec<f32>, temperature: f64) -> Result<Tensor> {
        let x = (self.lm_transform(hidden)? / temperature)?;
        let bias = (self.weight("lm.bias")? / temperature)?;
        ops::tied_cross_entropy(&x, self.weight("text.token.weight")?, &bias, targets, Some(advantages), 0.0)
    }

    /// Logits of the language model, `[n, hidden]` → `[n, vocabulary]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn language_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        ops::linear(&self.lm_transform(hidden)?, self.weight("text.token.weight")?, self.weight("lm.bias")?)
    }

    /// Predicted features of regions, `[n, hidden]` → `[n, region_feature]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn region_features(&self, hidden: &Tensor) -> Result<Tensor> {
        self.linear("region.feature", hidden)
    }

    /// Logits of the regions' classes, `[n, hidden]` → `[n, region_classes]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn region_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.linear("region.class", hidden)
    }
}

fn unit(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)
}
