//! Attention over stacked caches.

use super::{Attributes, Operator, View};
use crate::kernels::{Cache, CachedAttention};

/// Inputs: queries, keys and values `[rows, 3 · heads · depth]`; prefix keys and values `[layers, heads, tokens, depth]`; past keys
/// and values `[layers, heads, slots, depth]`; mask `[rows, slots]`. Output: `[rows, heads · depth]`.
pub(in crate::engine) const NAME: &str = "UnimoCachedAttention";

#[derive(Debug)]
pub(super) struct Attention {
    layer: usize,
    scale: f32,
}

impl Attention {
    /// Reads the attributes `layer` and `scale`.
    pub fn new(attributes: &Attributes<'_>) -> Result<Self, String> {
        Ok(Self { layer: attributes.size("layer")?, scale: attributes.get("scale")?.f })
    }

    /// The layer's part of a stacked cache.
    fn of_layer<'a>(&self, cache: &View<'a>) -> Result<&'a [f32], String> {
        let size = cache.shape[1..].iter().product::<usize>();
        let part = cache.values.get(self.layer * size..(self.layer + 1) * size);
        part.ok_or_else(|| format!("no layer {} in a cache {:?}", self.layer, cache.shape))
    }
}

impl Operator for Attention {
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>, String> {
        let wrong = || format!("attention of layer {} over {inputs:?}", self.layer);
        let &[qkv, prefix, prefix_values, past, past_values, mask] = inputs else { return Err(wrong()) };
        let (&[rows, width], &[layers, heads, _, depth], &[_, _, slots, _]) = (qkv, prefix, past) else { return Err(wrong()) };
        let fits = width == 3 * heads * depth
            && past == [layers, heads, slots, depth]
            && (prefix_values, past_values) == (prefix, past)
            && mask == [rows, slots]
            && self.layer < layers;
        fits.then(|| vec![rows, heads * depth]).ok_or_else(wrong)
    }

    fn compute(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<(), String> {
        let wrong = || format!("attention of layer {} over other caches", self.layer);
        let [qkv, prefix_keys, prefix_values, past_keys, past_values, mask] = inputs else { return Err(wrong()) };
        let &[_, heads, _, depth] = prefix_keys.shape else { return Err(wrong()) };
        let attention = CachedAttention {
            heads,
            depth,
            scale: self.scale,
            qkv: qkv.values,
            prefix: Cache { keys: self.of_layer(prefix_keys)?, values: self.of_layer(prefix_values)? },
            past: Cache { keys: self.of_layer(past_keys)?, values: self.of_layer(past_values)? },
            mask: mask.values,
        };
        attention.read(output);
        Ok(())
    }
}
