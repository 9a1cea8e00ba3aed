//! `text`: ids → text embedding.

use tract_onnx::pb::ModelProto;

use super::Builder;
use super::transformer::Context;
use crate::graph::GraphError;

impl Builder<'_> {
    pub(super) fn text(mut self) -> Result<ModelProto, GraphError> {
        let (ids, mask) = (self.graph.input("ids")?, self.graph.input("mask")?);
        let mut x = self.embed_text(&ids)?;
        for layer in 0..self.sizes.layers {
            x = self.layer(layer, &x, Context::Rows(Some(&mask)))?.0;
        }
        let first = self.row(&x, 0)?;
        let embedding = self.graph.linear("embed.text", &first)?;
        let embedding = self.graph.unit_length(&embedding)?;
        self.graph.finish(&[embedding])
    }
}
