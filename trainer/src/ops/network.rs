//! Convolutional networks of inverted residual blocks (Sandler et al., arXiv 1801.04381), all of whose layers are trained.

use candle_core::{Result, Tensor};

use super::{convolution_relu6, depthwise_relu6, linear, relu6};

/// What a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A 1×1 convolution (see [`linear`]), and ReLU6 if it is activated.
    Pointwise {
        /// Whether ReLU6 follows.
        activated: bool,
    },
    /// See [`depthwise_relu6`].
    Depthwise {
        /// 1 or 2.
        stride: usize,
    },
    /// See [`convolution_relu6`].
    Convolution {
        /// 1 or 2.
        stride: usize,
    },
}

/// A layer and its weights, as its operator takes them.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What it computes.
    pub kind: Kind,
    /// Weight.
    pub weight: Tensor,
    /// Bias.
    pub bias: Tensor,
}

/// Layers one after the other.
#[derive(Debug, Clone)]
pub struct Block {
    /// First to last; there is one at least.
    pub layers: Vec<Layer>,
    /// What the block is given is added to what its last layer gives.
    pub residual: bool,
}

/// Blocks one after the other.
#[derive(Debug, Clone)]
pub struct Network {
    blocks: Vec<Block>,
}

impl Network {
    /// Of these blocks.
    ///
    /// # Errors
    /// A block without layers, or a residual one that does not begin with a pointwise layer and end with another that is not
    /// activated.
    pub fn new(blocks: Vec<Block>) -> Result<Self> {
        for Block { layers, residual } in &blocks {
            let (first, last) = (layers.first().map(|layer| layer.kind), layers.last().map(|layer| layer.kind));
            let expands = matches!(first, Some(Kind::Pointwise { .. })) && layers.len() > 1;
            if first.is_none() || (*residual && !(expands && last == Some(Kind::Pointwise { activated: false }))) {
                candle_core::bail!("no inverted residual block: {first:?} to {last:?}");
            }
        }
        Ok(Self { blocks })
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Weight and bias of every layer, first to last.
    pub fn weights(&self) -> impl Iterator<Item = &Tensor> {
        self.blocks.iter().flat_map(|block| &block.layers).flat_map(|layer| [&layer.weight, &layer.bias])
    }

    /// What it makes of `x`, `[images, side², channels]`, through which candle takes gradients back.
    ///
    /// # Errors
    /// Shapes that do not fit, and those of candle.
    pub fn run(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for Block { layers, residual } in &self.blocks {
            let mut y = x.clone();
            for Layer { kind, weight, bias } in layers {
                y = match *kind {
                    Kind::Pointwise { activated: false } => linear(&y, weight, bias)?,
                    Kind::Pointwise { activated: true } => relu6(&linear(&y, weight, bias)?)?,
                    Kind::Depthwise { stride } => depthwise_relu6(&y, weight, bias, stride)?,
                    Kind::Convolution { stride } => convolution_relu6(&y, weight, bias, stride)?,
                };
            }
            x = if *residual { (y + x)? } else { y };
        }
        Ok(x)
    }
}
