//! MobileNetV2 from pixels to region features, as the trainer's `backbone` computes it.

use anyhow::Result;
use unimo_train::backbone::{BLOCKS, CHANNELS, COLOURS, GRID, INPUT, layer_shapes};

use super::Builder;
use crate::checkpoint::Checkpoint;
use crate::graph::{Dim, GraphError, Value, WeightStore};

use crate::graph::Convolution;

/// Adds the convolutions' weights as `backbone.<layer>`; the classifier stays behind.
pub(super) fn add_weights(store: &mut WeightStore, checkpoint: &Checkpoint) -> Result<()> {
    for (layer, shape) in layer_shapes().into_iter().filter(|(layer, _)| layer != "classifier") {
        let name = |kind: &str| format!("backbone.{layer}.{kind}");
        store.add(&name("weight"), &shape, 0, checkpoint.weight(&name("weight")))?;
        store.add(&name("bias"), &shape[..1], 0, checkpoint.weight(&name("bias")))?;
    }
    Ok(())
}

/// 3×3: one pixel all round at stride 1, at bottom and right only at stride 2.
fn padded(stride: usize, groups: usize) -> Convolution {
    Convolution { stride, pads: if stride == 1 { [1; 4] } else { [0, 0, 1, 1] }, groups }
}

const POINTWISE: Convolution = Convolution { stride: 1, pads: [0; 4], groups: 1 };

impl Builder<'_> {
    /// Pixels `[1, 3, 224, 224]` → region features `[1, 49, 1292]`.
    pub(super) fn backbone(&mut self, pixels: &Value) -> Result<Value, GraphError> {
        let x = self.graph.convolution("backbone.stem", pixels, padded(2, 1))?;
        let mut x = self.graph.relu6(&x);
        for (i, (_, expansion, stride)) in BLOCKS.into_iter().enumerate() {
            let name = |part: &str| format!("backbone.block{i}.{part}");
            let mut y = x.clone();
            if expansion > 1 {
                y = self.graph.convolution(&name("expand"), &y, POINTWISE)?;
                y = self.graph.relu6(&y);
            }
            let channels = y.shape()[1].fixed().unwrap_or_default();
            y = self.graph.convolution(&name("depthwise"), &y, padded(stride, channels))?;
            y = self.graph.relu6(&y);
            y = self.graph.convolution(&name("project"), &y, POINTWISE)?;
            x = if stride == 1 && x.shape() == y.shape() { self.graph.add(&x, &y)? } else { y };
        }
        let x = self.graph.convolution("backbone.head", &x, POINTWISE)?;
        let x = self.graph.relu6(&x);
        let x = self.graph.reshape(&x, &[1, CHANNELS, GRID * GRID].map(Dim::from))?;
        let x = self.graph.transpose(&x, &[0, 2, 1])?;
        let colours = self.quarter_colours(pixels)?;
        self.graph.concat(&[&x, &colours], 2)
    }

    /// Mean colours of each cell's four quarters, `[1, 49, 12]`.
    fn quarter_colours(&mut self, pixels: &Value) -> Result<Value, GraphError> {
        let x = self.graph.average_pool(pixels, INPUT / (2 * GRID))?;
        let x = self.graph.reshape(&x, &[3, GRID, 2, GRID, 2].map(Dim::from))?;
        let x = self.graph.transpose(&x, &[1, 3, 2, 4, 0])?;
        self.graph.reshape(&x, &[1, GRID * GRID, COLOURS].map(Dim::from))
    }
}
