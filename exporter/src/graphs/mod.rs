//! The four graphs of a bundle, and the weights they read.

mod backbone;
mod decode;
mod r#match;
mod text;
mod transformer;
mod vision;

use tract_onnx::pb::ModelProto;
use unimo::bundle::manifest::{GraphSignature, ModelSizes, Size};
use unimo::image::ImagePreparation;

use crate::checkpoint::Checkpoint;
use crate::graph::{GraphBuilder, GraphError, Products, Storage, WeightStore};

/// LayerNorm's addition to the variance; the trainer's.
const EPS: f32 = unimo_train::model::LAYER_NORM_EPS;

/// Sizes, and the weights laid out for the graphs.
pub struct Graphs {
    /// Sizes as the manifest states them.
    pub sizes: ModelSizes,
    /// Signatures of the four graphs.
    pub signatures: Vec<GraphSignature<Size>>,
    /// Weights, shared by all of them.
    pub weights: WeightStore,
}

/// What building one graph needs.
struct Builder<'g> {
    graph: GraphBuilder<'g>,
    sizes: &'g ModelSizes,
}

impl Graphs {
    /// Lays out a checkpoint's weights: matrices as `[in, out]`, and the boxes' embedding computed once, since the grid is fixed.
    ///
    /// # Errors
    /// Moments that do not fit the weights.
    pub fn new(checkpoint: &Checkpoint, max_text: usize, image: &ImagePreparation, storage: Storage) -> anyhow::Result<Self> {
        let config = checkpoint.config();
        let sizes = ModelSizes {
            name: config.name.clone(),
            hidden: config.hidden,
            layers: config.layers,
            heads: config.heads,
            vocabulary: config.vocabulary,
            positions: config.positions,
            embedding: config.embedding,
            image_tokens: config.image_tokens(),
            max_text,
            region_feature: config.region_feature,
        };
        let signatures = GraphSignature::contract(&sizes, image);
        let mut weights = WeightStore::new(storage);
        transformer::add_weights(&mut weights, checkpoint)?;
        backbone::add_weights(&mut weights, checkpoint)?;
        Ok(Self { sizes, signatures, weights })
    }

    /// Builds the graph of a signature.
    ///
    /// # Errors
    /// A checkpoint whose weights do not fit, or a signature this exporter does not know.
    pub fn build(&self, signature: &GraphSignature<Size>, products: Products<'_>) -> Result<ModelProto, GraphError> {
        let builder = Builder { graph: GraphBuilder::new(signature, &self.weights, products), sizes: &self.sizes };
        match signature.name.as_str() {
            "vision" => builder.vision(),
            "decode" => builder.decode(),
            "text" => builder.text(),
            "match" => builder.matching(),
            other => Err(GraphError::Shape { operator: "Graph", reason: format!("no graph is called `{other}`") }),
        }
    }
}
