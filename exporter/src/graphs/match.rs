//! `match`: region features and ids, read together → matching logit.

use tract_onnx::pb::ModelProto;

use super::Builder;
use super::transformer::Context;
use crate::graph::GraphError;

impl Builder<'_> {
    pub(super) fn matching(mut self) -> Result<ModelProto, GraphError> {
        let (regions, ids, mask) = (self.graph.input("regions")?, self.graph.input("ids")?, self.graph.input("mask")?);
        let image_tokens = self.sizes.image_tokens;
        let ((image, _), text) = (self.embed_regions(&regions)?, self.embed_text(&ids)?);
        let mut x = self.graph.concat(&[&image, &text], 0)?;
        let visible = self.graph.constant(&[1, image_tokens], &vec![0.0; image_tokens]);
        let mask = self.graph.concat(&[&visible, &mask], 1)?;
        for layer in 0..self.sizes.layers {
            x = self.layer(layer, &x, Context::Rows(Some(&mask)))?.0;
        }
        let (image, text) = (self.row(&x, 0)?, self.row(&x, image_tokens)?);
        let image = self.graph.linear("pool.image", &image)?;
        let image = self.graph.relu(&image);
        let text = self.graph.linear("pool.text", &text)?;
        let text = self.graph.relu(&text);
        let product = self.graph.mul(&image, &text)?;
        let score = self.graph.linear("match", &product)?;
        let score = self.graph.reshape(&score, &[1.into()])?;
        self.graph.finish(&[score])
    }
}
