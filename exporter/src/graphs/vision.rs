//! `vision`: pixels → image embedding, keys and values for decoding, region features.

use tract_onnx::pb::ModelProto;

use super::Builder;
use super::transformer::Context;
use crate::graph::GraphError;

impl Builder<'_> {
    pub(super) fn vision(mut self) -> Result<ModelProto, GraphError> {
        let pixels = self.graph.input("pixels")?;
        let regions = self.backbone(&pixels)?;
        let mut x = self.embed_regions(&regions)?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer in 0..self.sizes.layers {
            let (next, cache) = self.layer(layer, &x, Context::Rows(None))?;
            x = next;
            keys.push(cache.keys);
            values.push(cache.values);
        }
        let first = self.row(&x, 0)?;
        let embedding = self.graph.linear("embed.image", &first)?;
        let embedding = self.graph.unit_length(&embedding)?;
        let (keys, values) = (self.stack(&keys)?, self.stack(&values)?);
        self.graph.finish(&[embedding, keys, values, regions])
    }
}
