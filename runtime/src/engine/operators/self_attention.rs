//! Attention of rows over each other.

use super::{Attributes, Operator, View};
use crate::kernels::SelfAttention;

/// Inputs: queries, keys and values `[rows, 3 · heads · depth]`, and perhaps a mask `[1, rows]`. Output: `[rows, heads · depth]`.
pub(in crate::engine) const NAME: &str = "UnimoSelfAttention";

#[derive(Debug)]
pub(super) struct Attention {
    heads: usize,
    depth: usize,
    scale: f32,
}

impl Attention {
    /// Reads the attributes `heads`, `depth` and `scale`.
    pub fn new(attributes: &Attributes<'_>) -> Result<Self, String> {
        Ok(Self { heads: attributes.size("heads")?, depth: attributes.size("depth")?, scale: attributes.get("scale")?.f })
    }
}

impl Operator for Attention {
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>, String> {
        let hidden = self.heads * self.depth;
        let (qkv, mask) = match *inputs {
            [qkv] => (qkv, None),
            [qkv, mask] => (qkv, Some(mask)),
            _ => return Err(format!("an attention of {} inputs", inputs.len())),
        };
        match *qkv {
            [rows, width] if width == 3 * hidden && mask.is_none_or(|mask| mask == [1, rows]) => Ok(vec![rows, hidden]),
            _ => Err(format!("{} heads of {} over {inputs:?}", self.heads, self.depth)),
        }
    }

    fn compute(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<(), String> {
        let (qkv, mask) = match inputs {
            [qkv] => (qkv.values, None),
            [qkv, mask] => (qkv.values, Some(mask.values)),
            _ => return Err(format!("an attention of {} inputs", inputs.len())),
        };
        let kernel = SelfAttention { heads: self.heads, depth: self.depth, scale: self.scale, qkv, mask };
        kernel.read(output).ok_or_else(|| "an attention over rows of another size".to_owned())
    }
}
