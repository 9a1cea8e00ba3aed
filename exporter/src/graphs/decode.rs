//! `decode`: the next token of every hypothesis and what came before → logits of the one after, and the tokens' keys and values.

use tract_onnx::pb::ModelProto;

use super::transformer::{Context, LayerCache};
use super::{Builder, EPS};
use crate::graph::{GraphError, Value};

impl Builder<'_> {
    pub(super) fn decode(mut self) -> Result<ModelProto, GraphError> {
        let (tokens, position) = (self.graph.input("tokens")?, self.graph.input("position")?);
        let prefix = [self.graph.input("prefix_keys")?, self.graph.input("prefix_values")?];
        let past = [self.graph.input("past_keys")?, self.graph.input("past_values")?];
        let mask = self.graph.input("mask")?;
        let mut x = self.embed_tokens(&tokens, &position)?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer in 0..self.sizes.layers {
            let (prefix, past) = (&self.of_layer(&prefix, layer)?, &self.of_layer(&past, layer)?);
            let (next, cache) = self.layer(layer, &x, Context::Past { prefix, past, mask: &mask })?;
            x = next;
            keys.push(cache.keys);
            values.push(cache.values);
        }
        let logits = self.language_logits(&x)?;
        let (keys, values) = (self.stack(&keys)?, self.stack(&values)?);
        self.graph.finish(&[logits, keys, values])
    }

    /// One layer of stacked caches `[layers, heads, rows, depth]`.
    fn of_layer(&mut self, stacked: &[Value; 2], layer: usize) -> Result<LayerCache, GraphError> {
        let mut part = |value: &Value| -> Result<Value, GraphError> {
            let one = self.graph.slice(value, 0, layer, layer + 1)?;
            self.graph.reshape(&one, &value.shape()[1..])
        };
        Ok(LayerCache { keys: part(&stacked[0])?, values: part(&stacked[1])? })
    }

    /// The token table is stored once; here it is read as a `[hidden, vocabulary]` matrix, which loaders make a constant of.
    fn language_logits(&mut self, x: &Value) -> Result<Value, GraphError> {
        let x = self.graph.linear("lm.transform", x)?;
        let x = self.graph.gelu(&x)?;
        let x = self.graph.layer_norm("lm.norm", &x, EPS)?;
        let bias = self.graph.weight("lm.bias")?;
        let logits = self.graph.product(&x, "text.token.weight", true)?;
        self.graph.add(&logits, &bias)
    }
}
