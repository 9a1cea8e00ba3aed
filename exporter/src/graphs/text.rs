//! `text`: ids → text embedding.

use tract_onnx::pb::ModelProto;
use unimo_train::model::TextEmbedding;

use super::Builder;
use super::transformer::Context;
use crate::graph::{GraphError, Value};

impl Builder<'_> {
    pub(super) fn text(mut self) -> Result<ModelProto, GraphError> {
        let (ids, mask) = (self.graph.input("ids")?, self.graph.input("mask")?);
        let mut x = self.embed_text(&ids)?;
        for layer in 0..self.sizes.layers {
            x = self.layer(layer, &x, Context::Rows(Some(&mask)))?.0;
        }
        let mut embedded = self.row(&x, 0)?;
        if self.text_embedding()? == TextEmbedding::Both {
            let mean = self.mean_of_tokens(&x, &mask)?;
            embedded = self.graph.concat(&[&embedded, &mean], 1)?;
        }
        let embedding = self.graph.linear("embed.text", &embedded)?;
        let embedding = self.graph.unit_length(&embedding)?;
        self.graph.finish(&[embedding])
    }

    /// What the text's embedding is made of, told as the image's is.
    fn text_embedding(&self) -> Result<TextEmbedding, GraphError> {
        match self.graph.shape_of("embed.text.weight")? {
            [width, _] if *width == self.sizes.hidden => Ok(TextEmbedding::Token),
            [width, _] if *width == 2 * self.sizes.hidden => Ok(TextEmbedding::Both),
            other => {
                let reason = format!("`embed.text.weight` is {other:?}, which takes neither one hidden state nor two");
                Err(GraphError::Shape { operator: "MatMul", reason })
            }
        }
    }

    /// Mean of the rows of `x` `[n, hidden]` that the additive mask `[1, n]` shows, without the first: `[1, hidden]`.
    fn mean_of_tokens(&mut self, x: &Value, mask: &Value) -> Result<Value, GraphError> {
        let (tokens, mask) = (self.graph.rest(x, 0, 1)?, self.graph.rest(mask, 1, 1)?);
        // The mask is 0 or −10⁴: this gives 1 or 0, exactly.
        let (minus, one) = (self.graph.scale(&mask, 1e-4)?, self.graph.constant(&[1], &[1.0]));
        let shown = self.graph.add(&minus, &one)?;
        let sum = self.graph.matmul(&shown, &tokens)?;
        let count = self.graph.sum_of_rows(&shown);
        self.graph.div(&sum, &count)
    }
}
