//! A network of convolutions whose layers are all trained, forward and backward, without candle between its operators.

mod runs;

use candle_core::{Result, Shape, Tensor};

pub use runs::{Forward, Runs};

use super::convolution::{Depthwise, Patches};
use super::elementwise::{add_to, relu6_backward, relu6_to};
use super::linear::Linear;
use super::machine::{Element, Machine};
use super::operator::{Input, Operator, Pass};
use super::{Precision, copy};
use crate::ops::kernels::Plane;
use crate::ops::network::{Block, Kind, Layer, Network};

/// In messages.
const NAME: &str = "network";

/// What a layer was given and what it made of that.
struct Made<M: Machine> {
    given: Input,
    /// What a 3×3 convolution saw.
    patches: Option<(M::Values, Input)>,
    result: Input,
    /// Holds the result.
    _memory: M::Values,
}

/// Gradients by weight and bias of every layer, and the numbers of their values.
type Gradients<M> = Vec<(<M as Machine>::Values, usize)>;

fn array<M: Machine>(machine: &M, values: &M::Values, shape: Shape, element: Element) -> Input {
    Input { at: machine.at(values), shape, element, wanted: true }
}

/// A network on a machine.
struct OnMachine<'a, M: Machine> {
    machine: &'a M,
    network: &'a Network,
    precision: Precision,
}

impl<M: Machine> OnMachine<'_, M> {
    /// A layer's weights, after what it is given.
    fn inputs(&self, given: Input, layer: &Layer) -> Result<[Input; 3]> {
        let weight = |tensor: &Tensor| Ok::<_, candle_core::Error>(Input { wanted: true, ..self.machine.place(NAME, tensor)? });
        Ok([given, weight(&layer.weight)?, weight(&layer.bias)?])
    }

    fn linear(&self) -> Linear {
        Linear { precision: self.precision }
    }

    /// What every layer makes of `x`, `[images, side², channels]`. What a residual block's last one makes, the sum is then.
    fn forward(&self, x: &Input) -> Result<Vec<Made<M>>> {
        let mut x = Input { wanted: false, ..x.clone() };
        let mut all = Vec::new();
        for Block { layers, residual } in self.network.blocks() {
            let entered = x.clone();
            for layer in layers {
                let made = self.layer(layer, x)?;
                x = made.result.clone();
                all.push(made);
            }
            if *residual {
                add_to(self.machine, &entered, x.at)?;
            }
        }
        Ok(all)
    }

    fn layer(&self, layer: &Layer, given: Input) -> Result<Made<M>> {
        let machine = self.machine;
        let mut patches = None;
        let (values, shape) = match layer.kind {
            Kind::Pointwise { .. } => self.linear().forward(machine, &self.inputs(given.clone(), layer)?)?,
            Kind::Depthwise { stride } => {
                let of = Depthwise { plane: plane(&given, stride)? };
                of.forward(machine, &self.inputs(given.clone(), layer)?)?
            }
            Kind::Convolution { stride } => {
                let of = Patches { plane: plane(&given, stride)? };
                let (values, shape) = of.forward(machine, std::slice::from_ref(&given))?;
                let seen = Input { wanted: given.wanted, ..array(machine, &values, shape, given.element) };
                patches = Some((values, seen.clone()));
                self.linear().forward(machine, &self.inputs(seen, layer)?)?
            }
        };
        let result = array(machine, &values, shape, given.element);
        if in_place(layer.kind) {
            relu6_to(machine, &result, result.at)?;
        }
        Ok(Made { given, patches, result, _memory: values })
    }

    /// Gradients by the weights, of what [`Self::forward`] made and the gradient by the last layer's result, whose memory is written to.
    fn backward(&self, mut made: Vec<Made<M>>, by_result: &Input) -> Result<Gradients<M>> {
        let mut by_weights = Vec::new();
        let (mut gradient, mut memory) = (by_result.clone(), None);
        for Block { layers, residual } in self.network.blocks().iter().rev() {
            // By the sum, and so by what the block was given beside what goes through its layers.
            let mut by_sum = None;
            if *residual && memory.is_none() {
                let own = gradient.alike(self.machine)?;
                copy(self.machine, gradient.at, self.machine.at(&own), gradient.element.words(gradient.count()))?;
                gradient.at = self.machine.at(&own);
                memory = Some(own);
            }
            for (number, layer) in layers.iter().enumerate().rev() {
                let Some(made) = made.pop() else { candle_core::bail!("{NAME}: fewer results than layers") };
                if in_place(layer.kind) {
                    relu6_backward(self.machine, &made.result, gradient.at, gradient.at)?;
                }
                let onto = if number == 0 { by_sum.take() } else { None };
                let given = made.given.clone();
                let [by_given, by_weight, by_bias] = self.gradients(layer, made, &gradient, onto)?;
                for (values, of) in [(by_bias, &layer.bias), (by_weight, &layer.weight)] {
                    let Some(values) = values else { candle_core::bail!("{NAME}: a weight without a gradient") };
                    by_weights.push((values, of.elem_count()));
                }
                let Some(by_given) = by_given else {
                    by_weights.reverse();
                    return Ok(by_weights);
                };
                gradient = Input { at: self.machine.at(&by_given), ..given };
                let left = memory.replace(by_given);
                if *residual && number + 1 == layers.len() {
                    by_sum = left;
                }
            }
        }
        candle_core::bail!("{NAME}: something before it is trained")
    }

    /// By what the layer was given, added to `onto` if there is something; by its weight; by its bias.
    fn gradients(&self, layer: &Layer, made: Made<M>, by: &Input, onto: Option<M::Values>) -> Result<[Option<M::Values>; 3]> {
        let machine = self.machine;
        let Made { given, patches, result, _memory } = made;
        let found = match (layer.kind, patches) {
            (Kind::Depthwise { stride }, _) => {
                let of = Depthwise { plane: plane(&given, stride)? };
                let inputs = self.inputs(given, layer)?;
                of.backward(machine, &Pass { inputs: &inputs, result: &result, gradient: by })?
            }
            (Kind::Convolution { stride }, Some((_seen, patches))) => {
                let mut found = self.linear().gradients(machine, &self.inputs(patches.clone(), layer)?, by, None)?;
                if let Some(by_patches) = found[0].take() {
                    let gradient = array(machine, &by_patches, patches.shape, patches.element);
                    let of = Patches { plane: plane(&given, stride)? };
                    let inputs = [given];
                    found[0] =
                        of.backward(machine, &Pass { inputs: &inputs, result: &result, gradient: &gradient })?.swap_remove(0);
                }
                found
            }
            _ => self.linear().gradients(machine, &self.inputs(given, layer)?, by, onto)?,
        };
        found.try_into().map_err(|_| candle_core::Error::Msg(format!("{NAME}: a layer has another number of gradients")))
    }
}

/// Whether ReLU6 follows the layer's operator, and overwrites what that gave.
fn in_place(kind: Kind) -> bool {
    matches!(kind, Kind::Pointwise { activated: true } | Kind::Convolution { .. })
}

fn plane(given: &Input, stride: usize) -> Result<Plane> {
    let (_, pixels, channels) = given.shape.dims3()?;
    let plane = Plane { side: pixels.isqrt(), stride, channels };
    if plane.side * plane.side != pixels || !(stride == 1 || (stride == 2 && plane.side.is_multiple_of(2))) {
        candle_core::bail!("{NAME}: no square images, or no stride of theirs: {:?}, {stride}", given.shape);
    }
    Ok(plane)
}

#[cfg(test)]
mod tests;
