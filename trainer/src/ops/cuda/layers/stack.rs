//! What the layers compute, on a machine.

use candle_core::{Result, Shape, Tensor};

use super::super::attention::{Attended, Attention};
use super::super::attention_tables::Placed;
use super::super::column_sums;
use super::super::elementwise::Gelu;
use super::super::layer_norm::{LayerNorm, Parameters};
use super::super::linear::Linear;
use super::super::machine::{Address, Element, Grid, Kernel, Machine, THREADS, arguments};
use super::super::operator::{Array, Input, Operator, Pass};
use super::{Common, Given, NAME, SEEDS};

/// Which of a layer's weights products are made with, and which of these is whose.
const MATRICES: [usize; 4] = [0, 2, 6, 8];
const QKV: usize = 0;
const OUTPUT: usize = 1;
const UP: usize = 2;
const DOWN: usize = 3;
/// The biases that are no LayerNorm's business.
const QKV_BIAS: usize = 1;
const UP_BIAS: usize = 7;
/// Weight, bias and the bias of the product that each LayerNorm takes.
const MIDDLE_NORM: [usize; 3] = [4, 5, 3];
const LAST_NORM: [usize; 3] = [10, 11, 9];

/// All that a layer computes on its way, but for what it gives. Of products whose bias is added by what follows, it is still missing.
struct Activations<M: Machine> {
    qkv: Array<M>,
    attended: Array<M>,
    /// Of attention.
    logarithms: M::Values,
    projected: Array<M>,
    middle: Array<M>,
    raised: Array<M>,
    inner: Array<M>,
    lowered: Array<M>,
}

/// What a backward pass takes of a layer.
pub(super) struct Left<M: Machine> {
    pub(super) number: usize,
    input: Array<M>,
    activations: Option<Activations<M>>,
}

/// Gradients by weights, those of them that are trained.
pub(super) struct ByWeights<M: Machine> {
    /// Number of each weight, where its gradient lies, and how many values that has.
    pub(super) places: Vec<(usize, Address, usize)>,
    memory: Vec<M::Values>,
}

impl<M: Machine> ByWeights<M> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), memory: Vec::new() }
    }

    /// Takes those by the weights of these numbers, which lie one behind the other.
    pub(super) fn put(&mut self, machine: &M, values: M::Values, weights: &[Tensor], numbers: &[usize]) {
        let mut at = machine.at(&values);
        for &number in numbers {
            let count = weights[number].elem_count();
            if weights[number].track_op() {
                self.places.push((number, at, count));
            }
            at = at.after(count);
        }
        self.memory.push(values);
    }
}

/// What all layers of a pass are computed with.
pub(super) struct Stack<'a, M: Machine> {
    pub(super) machine: &'a M,
    pub(super) common: &'a Common,
    pub(super) layers: &'a [Given],
    pub(super) attention: &'a Attention,
    /// Those of [`MATRICES`], one layer's after another's.
    pub(super) matrices: &'a [Address],
    /// Tables of the attention, and the seeds of each layer, one layer's after another's.
    pub(super) placed: Placed,
}

/// The matrices that the layers' products are made with.
pub(super) fn matrices(layers: &[Given]) -> impl Iterator<Item = &Tensor> {
    layers.iter().flat_map(|given| MATRICES.map(|number| &given.weights[number]))
}

/// Matrices as products take them.
pub(super) struct Matrices<M: Machine> {
    /// Where each of them lies.
    pub(super) at: Vec<Address>,
    rounding: Option<Rounding<M>>,
}

/// Matrices that are rounded to bf16 when a pass begins.
struct Rounding<M: Machine> {
    /// What `round_pieces` is told.
    pieces: Vec<u32>,
    blocks: usize,
    _memory: M::Values,
}

impl<M: Machine> Matrices<M> {
    pub(super) fn of<'a>(machine: &M, matrices: impl IntoIterator<Item = &'a Tensor>, element: Element) -> Result<Self> {
        let (mut at, mut counts) = (Vec::new(), Vec::new());
        for matrix in matrices {
            let place = machine.place(NAME, matrix)?;
            at.push(place.at);
            counts.push(place.count());
        }
        if element == Element::F32 || at.is_empty() {
            return Ok(Self { at, rounding: None });
        }
        // Each begins in a place of sixteen bytes.
        let room = |count: usize| element.words(count).next_multiple_of(4);
        let words = counts.iter().copied().map(room).sum();
        let memory = machine.allocate(words)?;
        // Values of a piece, what one block rounds: enough blocks for a large device, and a small table.
        let piece = (2 * words / 2048).next_multiple_of(1 << 11);
        let (mut to, mut pieces, mut blocks) = (machine.at(&memory), Vec::new(), 0);
        for (at, count) in at.iter_mut().zip(counts) {
            let from = std::mem::replace(at, to);
            for start in (0..count).step_by(piece) {
                for Address(at) in [from.after(start), element.after(to, start)] {
                    pieces.extend([at as u32, (at >> 32) as u32]);
                }
                pieces.extend([piece.min(count - start) as u32, 0]);
                blocks += 1;
            }
            to = to.after(room(count));
        }
        Ok(Self { at, rounding: Some(Rounding { pieces, blocks, _memory: memory }) })
    }

    /// What has to lie where [`Self::round`] is told, if that has anything to do.
    pub(super) fn pieces(&self) -> Option<&[u32]> {
        self.rounding.as_ref().map(|rounding| &rounding.pieces[..])
    }

    /// Asks for them to be rounded.
    pub(super) fn round(&self, machine: &M, pieces: Address) -> Result<()> {
        let Some(rounding) = &self.rounding else { return Ok(()) };
        let grid = Grid { blocks: [rounding.blocks, 1, 1], threads: THREADS, shared: 0 };
        machine.launch(Kernel("elementwise", "round_pieces"), grid, arguments![pieces])
    }
}

impl<M: Machine> Stack<'_, M> {
    fn element(&self) -> Element {
        Element::of(self.common.precision)
    }

    fn linear(&self) -> Linear {
        Linear { precision: self.common.precision }
    }

    /// The LayerNorm of a sum whose second summand is dropped out.
    fn norm(&self) -> LayerNorm {
        LayerNorm { eps: self.common.eps, keep: Some(1.0 - self.common.rate) }
    }

    /// Where the seeds of a layer lie: those of attention and of both sums.
    fn seeds(&self, layer: usize) -> [Address; SEEDS] {
        std::array::from_fn(|site| self.placed.seed.after(SEEDS * layer + site))
    }

    fn placed(&self, layer: usize) -> Placed {
        Placed { seed: self.seeds(layer)[0], ..self.placed }
    }

    /// One of a layer's [`MATRICES`].
    fn matrix(&self, layer: usize, which: usize) -> Input {
        let weight = &self.layers[layer].weights[MATRICES[which]];
        Input {
            at: self.matrices[MATRICES.len() * layer + which],
            shape: weight.shape().clone(),
            element: self.element(),
            wanted: weight.track_op(),
        }
    }

    /// Another weight.
    fn vector(&self, layer: usize, number: usize) -> Result<Input> {
        self.machine.place(NAME, &self.layers[layer].weights[number])
    }

    /// Those of a LayerNorm: its own two, and the bias of the product that it takes.
    fn parameters(&self, layer: usize, numbers: [usize; 3], seed: Address) -> Result<Parameters> {
        let [weight, bias, added] = numbers.map(|number| self.vector(layer, number));
        Ok(Parameters { weight: weight?.at, bias: bias?.at, added: added?.at, seed })
    }

    /// What the last layer makes of `x`, and what a backward pass takes.
    pub(super) fn forward(&self, mut x: Array<M>) -> Result<(Array<M>, Vec<Left<M>>)> {
        let mut left = Vec::new();
        for number in 0..self.layers.len() {
            let (y, activations) = self.layer(number, &x)?;
            let input = std::mem::replace(&mut x, y);
            if number >= self.common.first_kept {
                left.push(Left { number, input, activations: (!self.common.checkpointing).then_some(activations) });
            }
        }
        Ok((x, left))
    }

    fn layer(&self, number: usize, x: &Array<M>) -> Result<(Array<M>, Activations<M>)> {
        let machine = self.machine;
        let make = |made: (M::Values, Shape)| Array::new(machine, made, self.element());
        let product = |x: &Array<M>, which: usize| -> Result<Array<M>> {
            Ok(make(self.linear().forward(machine, &[x.input(), self.matrix(number, which)])?))
        };
        let norm = |summands: [&Array<M>; 2], numbers: [usize; 3], seed: Address| -> Result<Array<M>> {
            let parameters = self.parameters(number, numbers, seed)?;
            Ok(make(self.norm().of(machine, &summands.map(Array::input), &parameters)?))
        };
        let [_, at_middle, at_end] = self.seeds(number);
        let qkv = product(x, QKV)?;
        let bias = self.vector(number, QKV_BIAS)?.at;
        let Attended { made, logarithms } = self.attention.forward(machine, &qkv.input(), bias, self.placed(number))?;
        let attended = make(made);
        let projected = product(&attended, OUTPUT)?;
        let middle = norm([x, &projected], MIDDLE_NORM, at_middle)?;
        let raised = product(&middle, UP)?;
        let inner = make(Gelu.forward(machine, &[raised.input(), self.vector(number, UP_BIAS)?])?);
        let lowered = product(&inner, DOWN)?;
        let y = norm([&middle, &lowered], LAST_NORM, at_end)?;
        Ok((y, Activations { qkv, attended, logarithms, projected, middle, raised, inner, lowered }))
    }

    /// The gradient by a layer's input, if that is wanted, and those by its weights.
    pub(super) fn backward(
        &self,
        left: Left<M>,
        gradient: Array<M>,
        input_wanted: bool,
    ) -> Result<(Option<Array<M>>, ByWeights<M>)> {
        let (machine, Left { number: layer, input: x, activations }) = (self.machine, left);
        let Activations { qkv, attended, logarithms, projected, middle, raised, inner, lowered } = match activations {
            Some(activations) => activations,
            None => self.layer(layer, &x)?.1,
        };
        let weights = &self.layers[layer].weights;
        let mut all = ByWeights::new();
        let found = |all: &mut ByWeights<M>, values: M::Values, numbers: &[usize]| all.put(machine, values, weights, numbers);
        let like = |values: M::Values, of: &Array<M>| Array::new(machine, (values, of.shape.clone()), of.element);
        let [_, at_middle, at_end] = self.seeds(layer);
        // By both summands.
        let norm = |summands: [&Array<M>; 2], numbers: [usize; 3], seed: Address, by: &Array<M>, all: &mut ByWeights<M>| {
            let parameters = self.parameters(layer, numbers, seed)?;
            let inputs = summands.map(Array::input);
            let by_norm = self.norm().gradients(machine, &inputs, &parameters, &by.input())?;
            found(all, by_norm.by_parameters, &numbers);
            Ok::<_, candle_core::Error>((by_norm.by_sum, like(there(by_norm.by_x)?, summands[1])))
        };
        // By what a product was made of, added to what is given.
        let product = |x: Input, which: usize, by: &Array<M>, onto: Option<M::Values>, all: &mut ByWeights<M>| {
            let inputs = [x, self.matrix(layer, which)];
            let [by_x, by_weight] = taken(self.linear().gradients(machine, &inputs, &by.input(), onto)?)?;
            if let Some(values) = by_weight {
                found(all, values, &[MATRICES[which]]);
            }
            Ok::<_, candle_core::Error>(by_x)
        };

        let (by_middle, by_lowered) = norm([&middle, &lowered], LAST_NORM, at_end, &gradient, &mut all)?;
        drop((gradient, lowered));
        let by_inner = like(there(product(inner.input(), DOWN, &by_lowered, None, &mut all)?)?, &inner);
        drop((by_lowered, inner));
        let inputs = [raised.input(), self.vector(layer, UP_BIAS)?];
        let pass = Pass { inputs: &inputs, result: &by_inner.input(), gradient: &by_inner.input() };
        let [by_raised, by_bias] = taken(Gelu.backward(machine, &pass)?)?;
        found(&mut all, there(by_bias)?, &[UP_BIAS]);
        let by_raised = like(there(by_raised)?, &raised);
        drop((by_inner, raised));
        let by_middle = like(there(product(middle.input(), UP, &by_raised, Some(by_middle), &mut all)?)?, &middle);
        drop((by_raised, middle));
        let (by_x, by_projected) = norm([&x, &projected], MIDDLE_NORM, at_middle, &by_middle, &mut all)?;
        drop((by_middle, projected));
        let by_attended = like(there(product(attended.input(), OUTPUT, &by_projected, None, &mut all)?)?, &attended);
        drop(by_projected);
        let pass = Pass { inputs: &[qkv.input()], result: &attended.input(), gradient: &by_attended.input() };
        let bias = self.vector(layer, QKV_BIAS)?.at;
        let by_qkv = like(self.attention.gradient(machine, &pass, bias, &logarithms, self.placed(layer))?, &qkv);
        drop((by_attended, attended, logarithms, qkv));
        let (rows, width) = by_qkv.shape.dims2()?;
        let by_bias = column_sums(machine, by_qkv.at, by_qkv.element, rows, width)?;
        found(&mut all, by_bias, &[QKV_BIAS]);
        let last = Input { wanted: input_wanted, ..x.input() };
        let by_x = product(last, QKV, &by_qkv, Some(by_x), &mut all)?;
        Ok((by_x.map(|values| like(values, &x)), all))
    }
}

/// So many gradients.
fn taken<T, const N: usize>(gradients: Vec<T>) -> Result<[T; N]> {
    gradients.try_into().map_err(|_| candle_core::Error::Msg("an operator of the layers has another number of gradients".into()))
}

/// A gradient that an operator makes in any case.
fn there<T>(gradient: Option<T>) -> Result<T> {
    gradient.ok_or_else(|| candle_core::Error::Msg("an operator of the layers lacks a gradient".into()))
}
