//! 4-bit levels as they are given.

use super::BLOCK;

/// A matrix of 4-bit levels with a scale for each [`BLOCK`] inputs of an output, as ONNX Runtime's `MatMulNBits` has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nibbles<'a> {
    /// A row's values.
    pub inputs: usize,
    /// A product's values.
    pub outputs: usize,
    /// `[outputs, inputs]`, two a byte, the lower half first.
    levels: &'a [u8],
    /// `[outputs, inputs / BLOCK]`.
    scales: &'a [f32],
}

impl<'a> Nibbles<'a> {
    /// What a stored level is too large by.
    pub const OFFSET: f32 = 8.0;

    /// `None` where inputs are no whole blocks, or sizes do not fit.
    pub fn new(levels: &'a [u8], scales: &'a [f32], [inputs, outputs]: [usize; 2]) -> Option<Self> {
        let count = inputs.checked_mul(outputs)?;
        let fits = inputs.is_multiple_of(BLOCK) && levels.len() == count / 2 && scales.len() == count / BLOCK;
        fits.then_some(Self { inputs, outputs, levels, scales })
    }

    /// A level as it is stored, [`Self::OFFSET`] too large.
    pub fn stored(&self, output: usize, input: usize) -> u8 {
        self.levels[(output * self.inputs + input) / 2] >> (input % 2 * 4) & 0xf
    }

    /// What a level stands for.
    pub fn value(&self, output: usize, input: usize) -> f32 {
        let scale = self.scales[(output * self.inputs + input) / BLOCK];
        (f32::from(self.stored(output, input)) - Self::OFFSET) * scale
    }

    /// Scales in panels of `width` outputs, `[inputs / BLOCK, width]` each.
    pub fn scales_in_panels(&self, width: usize) -> Vec<f32> {
        let blocks = self.inputs / BLOCK;
        let mut panels = vec![0.0; self.outputs.next_multiple_of(width) * blocks];
        for (at, &scale) in self.scales.iter().enumerate() {
            let (output, block) = (at / blocks, at % blocks);
            panels[(output / width * blocks + block) * width + output % width] = scale;
        }
        panels
    }
}
