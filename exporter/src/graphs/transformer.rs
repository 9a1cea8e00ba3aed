//! Embeddings and Transformer layers, as the trainer's `model` computes them.

use anyhow::Result;

use super::{Builder, EPS};
use crate::checkpoint::Checkpoint;
use crate::graph::{Dim, GraphError, Value, WeightStore, transposed};

/// Keys and values of one layer, `[heads, rows, depth]` each.
pub(super) struct LayerCache {
    pub keys: Value,
    pub values: Value,
}

/// What rows of a layer attend to.
pub(super) enum Context<'a> {
    /// Each other; an additive mask `[1, rows]` may hide some of them.
    Rows(Option<&'a Value>),
    /// Themselves, and not each other; keys and values that all of them see; and others of which an additive mask `[rows, slots]`
    /// says who sees them.
    Past {
        /// Seen by all.
        prefix: &'a LayerCache,
        /// Seen by some.
        past: &'a LayerCache,
        /// Who sees what of `past`.
        mask: &'a Value,
    },
}

/// Adds the Transformer's and the heads' weights.
pub(super) fn add_weights(store: &mut WeightStore, checkpoint: &Checkpoint) -> Result<()> {
    for (name, shape) in checkpoint.config().weights() {
        let values = checkpoint.weight(&name);
        let training_only = name.starts_with("region.") || name == "temperature";
        // The boxes' embedding is folded into `image.places`; see below.
        if training_only || name.starts_with("image.box") || name == "image.feature.bias" {
            continue;
        }
        let table = name == "text.token.weight" || name == "text.position.weight";
        match shape[..] {
            [rows, columns] if !table => store.add(&name, &[columns, rows], 1, &transposed(values, &shape))?,
            _ => store.add(&name, &shape, 0, values)?,
        }
    }
    add_places(store, checkpoint)
}

/// `image.places` `[image_tokens, hidden]`: FC(box) + both biases of the region embedding. The grid's boxes never change.
fn add_places(store: &mut WeightStore, checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    let (weight, bias) = (checkpoint.weight("image.box.weight"), checkpoint.weight("image.box.bias"));
    let feature_bias = checkpoint.weight("image.feature.bias");
    let boxes = unimo_train::model::region_boxes(config.grid);
    let mut places = Vec::with_capacity(config.image_tokens() * config.hidden);
    for region in boxes.chunks_exact(5) {
        for (row, (b, f)) in weight.chunks_exact(5).zip(bias.iter().zip(feature_bias)) {
            places.push(row.iter().zip(region).map(|(w, x)| w * x).sum::<f32>() + b + f);
        }
    }
    store.add_exact("image.places", &[config.image_tokens(), config.hidden], &places)
}

impl Builder<'_> {
    fn depth(&self) -> usize {
        self.sizes.hidden / self.sizes.heads
    }

    /// Embeds tokens `[n]`, all at one position `[1]`: `[n, hidden]`.
    pub(super) fn embed_tokens(&mut self, ids: &Value, position: &Value) -> Result<Value, GraphError> {
        let tokens = self.graph.rows_of("text.token.weight", ids)?;
        let places = self.graph.rows_of("text.position.weight", position)?;
        let sum = self.graph.add(&tokens, &places)?;
        self.graph.layer_norm("text.norm", &sum, EPS)
    }

    /// Embeds a whole text, ids `[1, n]`: `[n, hidden]`.
    pub(super) fn embed_text(&mut self, ids: &Value) -> Result<Value, GraphError> {
        let n = self.sizes.max_text;
        let ids = self.graph.reshape(ids, &[n.into()])?;
        let places = self.graph.weight("text.position.weight")?;
        let (tokens, places) = (self.graph.rows_of("text.token.weight", &ids)?, self.graph.slice(&places, 0, 0, n)?);
        let sum = self.graph.add(&tokens, &places)?;
        self.graph.layer_norm("text.norm", &sum, EPS)
    }

    /// Embeds an image's regions `[1, cells, region_feature]` with `[IMG]` in front: `[image_tokens, hidden]`. Gives the regions'
    /// mean `[1, 1, region_feature]` as well.
    pub(super) fn embed_regions(&mut self, regions: &Value) -> Result<(Value, Value), GraphError> {
        let mean = self.graph.mean(regions, 1)?;
        let features = self.graph.concat(&[&mean, regions], 1)?;
        let features = self.graph.reshape(&features, &[self.sizes.image_tokens.into(), self.sizes.region_feature.into()])?;
        let places = self.graph.weight("image.places")?;
        let product = self.graph.product(&features, "image.feature.weight", false)?;
        let sum = self.graph.add(&product, &places)?;
        Ok((self.graph.layer_norm("image.norm", &sum, EPS)?, mean))
    }

    /// Keys and values of one layer over rows `x` `[n, hidden]`, where nobody asks for its new rows.
    pub(super) fn keys_and_values(&mut self, layer: usize, x: &Value) -> Result<LayerCache, GraphError> {
        let (qkv, rows) = (self.graph.linear(&format!("layers.{layer}.attention.qkv"), x)?, x.shape()[0]);
        Ok(LayerCache { keys: self.third(&qkv, rows, 1)?, values: self.third(&qkv, rows, 2)? })
    }

    /// One layer over rows `x` `[n, hidden]`. Returns the new rows and their keys and values.
    pub(super) fn layer(&mut self, layer: usize, x: &Value, context: Context) -> Result<(Value, LayerCache), GraphError> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let rows = x.shape()[0];
        let qkv = self.graph.linear(&name("attention.qkv"), x)?;
        let [query, keys, values] = self.split_heads(&qkv, rows)?;
        let query = self.graph.scale(&query, 1.0 / (self.depth() as f32).sqrt())?;
        let attended = match context {
            Context::Rows(mask) => {
                let scores = self.scores(&query, &keys, mask)?;
                let p = self.graph.softmax(&scores);
                self.graph.matmul(&p, &values)?
            }
            Context::Past { prefix, past, mask } => self.attend_to_past(&query, &keys, &values, [prefix, past], mask)?,
        };
        let attended = self.graph.transpose(&attended, &[1, 0, 2])?;
        let attended = self.graph.reshape(&attended, &[rows, self.sizes.hidden.into()])?;
        let attended = self.graph.linear(&name("attention.output"), &attended)?;
        let sum = self.graph.add(x, &attended)?;
        let x = self.graph.layer_norm(&name("attention.norm"), &sum, EPS)?;
        let inner = self.graph.linear(&name("ffn.up"), &x)?;
        let inner = self.graph.gelu(&inner)?;
        let outer = self.graph.linear(&name("ffn.down"), &inner)?;
        let sum = self.graph.add(&x, &outer)?;
        let x = self.graph.layer_norm(&name("ffn.norm"), &sum, EPS)?;
        Ok((x, LayerCache { keys, values }))
    }

    /// `[rows, 3·hidden]` → queries, keys, values `[heads, rows, depth]`.
    fn split_heads(&mut self, qkv: &Value, rows: Dim) -> Result<[Value; 3], GraphError> {
        Ok([self.third(qkv, rows, 0)?, self.third(qkv, rows, 1)?, self.third(qkv, rows, 2)?])
    }

    /// The part of `[rows, 3·hidden]` with a number, `[heads, rows, depth]`.
    fn third(&mut self, qkv: &Value, rows: Dim, number: usize) -> Result<Value, GraphError> {
        let (hidden, heads, depth) = (self.sizes.hidden, self.sizes.heads, self.depth());
        let part = self.graph.slice(qkv, 1, number * hidden, (number + 1) * hidden)?;
        let part = self.graph.reshape(&part, &[rows, heads.into(), depth.into()])?;
        self.graph.transpose(&part, &[1, 0, 2])
    }

    /// Scaled queries against keys, plus a mask: `[heads, queries, keys]`.
    fn scores(&mut self, query: &Value, keys: &Value, mask: Option<&Value>) -> Result<Value, GraphError> {
        let keys = self.graph.transpose(keys, &[0, 2, 1])?;
        let scores = self.graph.matmul(query, &keys)?;
        match mask {
            Some(mask) => self.graph.add(&scores, mask),
            None => Ok(scores),
        }
    }

    /// Attention of each row over a cache that all see, over itself, and over a cache that `mask` hides from some, without
    /// joining the caches: only the scores are joined.
    fn attend_to_past(
        &mut self,
        query: &Value,
        keys: &Value,
        values: &Value,
        [prefix, past]: [&LayerCache; 2],
        mask: &Value,
    ) -> Result<Value, GraphError> {
        let of_prefix = self.scores(query, &prefix.keys, None)?;
        let product = self.graph.mul(query, keys)?;
        let of_self = self.graph.sum_of_rows(&product);
        let of_past = self.scores(query, &past.keys, Some(mask))?;
        let joined = self.graph.concat(&[&of_prefix, &of_self, &of_past], 2)?;
        let p = self.graph.softmax(&joined);
        let tokens = self.sizes.image_tokens;
        let to_prefix = self.graph.slice(&p, 2, 0, tokens)?;
        let to_self = self.graph.slice(&p, 2, tokens, tokens + 1)?;
        let to_past = self.graph.rest(&p, 2, tokens + 1)?;
        let from_prefix = self.graph.matmul(&to_prefix, &prefix.values)?;
        let from_self = self.graph.mul(&to_self, values)?;
        let from_past = self.graph.matmul(&to_past, &past.values)?;
        let sum = self.graph.add(&from_prefix, &from_self)?;
        self.graph.add(&sum, &from_past)
    }

    /// Row `row` of the hidden states: `[1, hidden]`.
    pub(super) fn row(&mut self, x: &Value, row: usize) -> Result<Value, GraphError> {
        self.graph.slice(x, 0, row, row + 1)
    }

    /// Per-layer values `[heads, rows, depth]` as one `[layers, heads, rows, depth]`.
    pub(super) fn stack(&mut self, parts: &[Value]) -> Result<Value, GraphError> {
        let mut raised = Vec::with_capacity(parts.len());
        for part in parts {
            let shape: Vec<Dim> = std::iter::once(Dim::from(1)).chain(part.shape().iter().copied()).collect();
            raised.push(self.graph.reshape(part, &shape)?);
        }
        self.graph.concat(&raised.iter().collect::<Vec<_>>(), 0)
    }
}
