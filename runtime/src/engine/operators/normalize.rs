//! LayerNorm, with the sum before it.

use super::{Attributes, Operator, View};
use crate::kernels::LayerNorm;

/// One input `[…, width]`, or two that are added first, broadcast as `Add` does it.
pub(in crate::engine) const NAME: &str = "UnimoLayerNorm";

#[derive(Debug)]
pub(super) struct Normalize(LayerNorm);

impl Normalize {
    /// Reads the attributes `weight` and `bias` (both `[width]`) and `epsilon`.
    pub fn new(attributes: &Attributes<'_>) -> Result<Self, String> {
        let vector = |name: &str| attributes.floats(name).ok_or_else(|| format!("a LayerNorm without {name}"));
        let norm = LayerNorm::new(vector("weight")?, vector("bias")?, attributes.get("epsilon")?.f);
        norm.map(Self).ok_or_else(|| "weights of another size".to_owned())
    }
}

/// Size along an axis of the broadcast shape, counted from the last one.
fn size(shape: &[usize], from_last: usize) -> usize {
    shape.len().checked_sub(from_last + 1).map_or(1, |axis| shape[axis])
}

/// The shape that two are broadcast to (<https://onnx.ai/onnx/repo-docs/Broadcasting.html>).
fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let axis = |from_last: usize| match (size(a, from_last), size(b, from_last)) {
        (a, b) if a == b || b == 1 => Some(a),
        (1, b) => Some(b),
        _ => None,
    };
    (0..a.len().max(b.len())).rev().map(axis).collect()
}

/// Whether values of one shape are added to those of another by going through them over and over.
fn repeats(shape: &[usize], whole: &[usize]) -> bool {
    let ones = shape.iter().take_while(|&&size| size == 1).count();
    !shape[ones..].is_empty() && whole.ends_with(&shape[ones..])
}

/// The sum of both, in the shape that they are broadcast to.
fn add(a: &View<'_>, b: &View<'_>, whole: &[usize], output: &mut [f32]) {
    // How far apart neighbours along an axis lie; not at all where there is one value for all.
    let steps = |view: &View<'_>| -> Vec<usize> {
        let mut step = 1;
        let along = |from_last: usize| {
            let size = size(view.shape, from_last);
            step *= size;
            if size == 1 { 0 } else { step / size }
        };
        (0..whole.len()).map(along).collect()
    };
    let (a_steps, b_steps) = (steps(a), steps(b));
    for (at, sum) in output.iter_mut().enumerate() {
        let (mut rest, mut from_a, mut from_b) = (at, 0, 0);
        for (from_last, size) in whole.iter().rev().enumerate() {
            from_a += rest % size * a_steps[from_last];
            from_b += rest % size * b_steps[from_last];
            rest /= size;
        }
        *sum = a.values[from_a] + b.values[from_b];
    }
}

impl Operator for Normalize {
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>, String> {
        let shape = match inputs {
            [x] => Some(x.to_vec()),
            [a, b] => broadcast(a, b),
            _ => None,
        };
        let shape = shape.filter(|shape| shape.last() == Some(&self.0.width()));
        shape.ok_or_else(|| format!("a LayerNorm of {} over {inputs:?}", self.0.width()))
    }

    fn compute(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<(), String> {
        let shapes: Vec<&[usize]> = inputs.iter().map(|input| input.shape).collect();
        let whole = self.shape(&shapes)?;
        match inputs {
            [x] => output.copy_from_slice(x.values),
            [a, b] | [b, a] if a.shape == whole && repeats(b.shape, &whole) => {
                output.copy_from_slice(a.values);
                self.0.normalize(output, Some(b.values));
                return Ok(());
            }
            [a, b] => add(a, b, &whole, output),
            _ => {}
        }
        self.0.normalize(output, None);
        Ok(())
    }
}
