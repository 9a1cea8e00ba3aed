//! `vision`: pixels → image embedding, keys and values for decoding, region features.

use tract_onnx::pb::ModelProto;
use unimo_train::model::ImageEmbedding;

use super::Builder;
use super::transformer::Context;
use crate::graph::{GraphError, Value};

impl Builder<'_> {
    pub(super) fn vision(mut self) -> Result<ModelProto, GraphError> {
        let pixels = self.graph.input("pixels")?;
        let regions = self.backbone(&pixels)?;
        let (mut x, mean) = self.embed_regions(&regions)?;
        let kind = self.image_embedding()?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer in 0..self.sizes.layers {
            let last = layer + 1 == self.sizes.layers;
            let cache = if last && kind == ImageEmbedding::Pooled {
                self.keys_and_values(layer, &x)?
            } else {
                let (next, cache) = self.layer(layer, &x, Context::Rows(None))?;
                x = next;
                cache
            };
            keys.push(cache.keys);
            values.push(cache.values);
        }
        let embedded = match kind {
            ImageEmbedding::Token => self.row(&x, 0)?,
            ImageEmbedding::Pooled => self.graph.reshape(&mean, &[1.into(), self.sizes.region_feature.into()])?,
        };
        let embedding = self.embed_image(&embedded)?;
        let (keys, values) = (self.stack(&keys)?, self.stack(&values)?);
        self.graph.finish(&[embedding, keys, values, regions])
    }

    /// What the image's embedding is made of, told by the width that its layer takes: no manifest has to say it.
    fn image_embedding(&self) -> Result<ImageEmbedding, GraphError> {
        match self.graph.shape_of("embed.image.weight")? {
            [width, _] if *width == self.sizes.hidden => Ok(ImageEmbedding::Token),
            [width, _] if *width == self.sizes.region_feature => Ok(ImageEmbedding::Pooled),
            other => {
                let reason = format!("`embed.image.weight` is {other:?}, which takes neither hidden states nor region features");
                Err(GraphError::Shape { operator: "MatMul", reason })
            }
        }
    }

    fn embed_image(&mut self, x: &Value) -> Result<Value, GraphError> {
        let embedding = self.graph.linear("embed.image", x)?;
        self.graph.unit_length(&embedding)
    }
}
