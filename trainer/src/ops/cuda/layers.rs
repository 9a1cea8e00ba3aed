//! The Transformer's layers, forward and backward, without candle between their operators: activations stay in the machine's memory,
//! in bf16 where products are computed in it, and a gradient that comes from two sides is added up where it is made. candle clears
//! memory for every gradient and adds to that, which would move more bytes than some of the operators do.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::attention::{Attended, Attention};
use super::elementwise::Gelu;
use super::layer_norm::{LayerNorm, Parameters};
use super::linear::Linear;
use super::machine::{Address, Element, Grid, Kernel, Machine, THREADS, arguments};
use super::operator::{Input, Operator, Pass, on_machine};
use super::{Precision, column_sums, rounded, widened};
use crate::ops::AttentionPlan;

/// In messages.
const NAME: &str = "layers";

/// Weights of a layer, in this order.
pub const WEIGHTS: [&str; 12] = [
    "attention.qkv.weight",
    "attention.qkv.bias",
    "attention.output.weight",
    "attention.output.bias",
    "attention.norm.weight",
    "attention.norm.bias",
    "ffn.up.weight",
    "ffn.up.bias",
    "ffn.down.weight",
    "ffn.down.bias",
    "ffn.norm.weight",
    "ffn.norm.bias",
];

/// Which of them products are made with, and which of these is whose.
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

/// What all layers of a pass have in common.
pub struct Common {
    /// Which rows see each other.
    pub plan: Arc<AttentionPlan>,
    /// Heads of attention.
    pub heads: usize,
    /// LayerNorm's addition to the variance.
    pub eps: f32,
    /// Share of values dropped.
    pub rate: f32,
    /// What products are computed in, and with it what activations are stored as.
    pub precision: Precision,
    /// The first layer that the backward pass goes through; there is none beyond the last.
    pub first_kept: usize,
    /// Keeps of each layer its input alone, and computes the rest again in the backward pass.
    pub checkpointing: bool,
}

/// What a layer is given beside its input.
pub struct Given {
    /// Those of [`WEIGHTS`], f32. Of one that is not tracked no gradient is made, unless it comes by the way.
    pub weights: [Tensor; WEIGHTS.len()],
    /// Seeds of the dropout in attention and at both sums.
    pub seeds: [u32; 3],
}

/// Gradients by a layer's weights.
pub type Gradients = [Option<Tensor>; WEIGHTS.len()];

/// What a forward pass keeps for the backward pass.
pub trait Kept {
    /// From the gradient by the last layer's result to that by what the first was given, if that is tracked. `complete` is told the
    /// number of each layer, the last first, with the gradients by its weights.
    ///
    /// # Errors
    /// Those of candle and of `complete`.
    fn backward(
        self: Box<Self>,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<Tensor>>;
}

/// Runs `layers` over `x`, `[rows, hidden]` in f32; so is the result, which is a constant to candle.
///
/// # Errors
/// Shapes that do not fit each other or the plan, a device without kernels, and those of candle.
pub fn run(x: &Tensor, layers: Vec<Given>, common: Common) -> Result<(Tensor, Option<Box<dyn Kept>>)> {
    let (rows, hidden) = x.dims2()?;
    common.plan.check(rows, hidden, common.heads)?;
    on_machine!(x.device(), NAME, |machine| run_on(machine, x, layers, common))
}

/// An array in a machine's memory, and what holds that.
struct Array<M: Machine> {
    at: Address,
    shape: Shape,
    element: Element,
    memory: Memory<M>,
}

/// What an array's address points to.
enum Memory<M: Machine> {
    Values(M::Values),
    Tensor(Tensor),
}

impl<M: Machine> Array<M> {
    fn new(machine: &M, (values, shape): (M::Values, Shape), element: Element) -> Self {
        Self { at: machine.at(&values), shape, element, memory: Memory::Values(values) }
    }

    /// An f32 tensor, stored as that.
    fn of(machine: &M, tensor: &Tensor, element: Element) -> Result<Self> {
        let tensor = tensor.contiguous()?.detach();
        let Input { at, shape, .. } = machine.place(NAME, &tensor)?;
        match element {
            Element::F32 => Ok(Self { at, shape, element, memory: Memory::Tensor(tensor) }),
            Element::Bf16 => {
                let values = rounded(machine, at, shape.elem_count())?;
                Ok(Self::new(machine, (values, shape), element))
            }
        }
    }

    fn tensor(self, machine: &M) -> Result<Tensor> {
        match (self.memory, self.element) {
            (Memory::Tensor(tensor), _) => Ok(tensor),
            (Memory::Values(values), Element::F32) => machine.tensor(values, &self.shape),
            (Memory::Values(_values), Element::Bf16) => {
                machine.tensor(widened(machine, self.at, self.shape.elem_count())?, &self.shape)
            }
        }
    }

    /// As an operator takes it, with a gradient to be made by it.
    fn input(&self) -> Input {
        Input { at: self.at, shape: self.shape.clone(), element: self.element, wanted: true }
    }
}

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

/// A layer that a pass goes through.
struct Layer {
    number: usize,
    given: Given,
    /// Where those of [`MATRICES`] lie, as products take them.
    matrices: [Address; MATRICES.len()],
}

/// What a backward pass takes of a layer.
struct Left<M: Machine> {
    layer: Layer,
    input: Array<M>,
    activations: Option<Activations<M>>,
}

/// What all layers of a pass are computed with.
struct Stack<M: Machine> {
    machine: M,
    common: Common,
    element: Element,
    /// Of attention.
    tables: [M::Words; 3],
    /// All matrices in bf16, where products take them so.
    _rounded: Option<M::Values>,
}

fn run_on<M: Machine>(machine: M, x: &Tensor, layers: Vec<Given>, common: Common) -> Result<(Tensor, Option<Box<dyn Kept>>)> {
    let input_wanted = common.first_kept == 0 && x.track_op();
    let element = Element::of(common.precision);
    let depth = x.dims2()?.1 / common.heads;
    let tables = common.attention(0, depth, element)?.upload(&machine)?;
    let (layers, rounded) = laid_out(&machine, layers, element)?;
    let mut x = Array::of(&machine, x, element)?;
    let stack = Stack { machine, common, element, tables, _rounded: rounded };
    let mut left = Vec::new();
    for layer in layers {
        let (y, activations) = stack.forward(&layer, &x)?;
        let input = std::mem::replace(&mut x, y);
        if layer.number >= stack.common.first_kept {
            left.push(Left { layer, input, activations: (!stack.common.checkpointing).then_some(activations) });
        }
    }
    let hidden = x.tensor(&stack.machine)?;
    let kept = (!left.is_empty()).then(|| Box::new(Run { stack, left, input_wanted }) as Box<dyn Kept>);
    Ok((hidden, kept))
}

/// The layers with their matrices rounded, all at once, if products take them so.
fn laid_out<M: Machine>(machine: &M, layers: Vec<Given>, element: Element) -> Result<(Vec<Layer>, Option<M::Values>)> {
    let place = |given: &Given, number: usize| machine.place(NAME, &given.weights[number]);
    let mut laid_out = Vec::new();
    for (number, given) in layers.into_iter().enumerate() {
        let mut matrices = [Address::NULL; MATRICES.len()];
        for (at, number) in matrices.iter_mut().zip(MATRICES) {
            *at = place(&given, number)?.at;
        }
        laid_out.push(Layer { number, given, matrices });
    }
    if element == Element::F32 || laid_out.is_empty() {
        return Ok((laid_out, None));
    }
    let count = |layer: &Layer, number: usize| layer.given.weights[number].elem_count();
    // Each begins in a place of sixteen bytes.
    let room = |layer: &Layer, number: usize| element.words(count(layer, number)).next_multiple_of(4);
    let words = laid_out.iter().flat_map(|layer| MATRICES.map(|number| room(layer, number))).sum();
    let rounded = machine.allocate(words)?;
    // Values of a piece, what one block rounds: enough blocks for a large device, and a small table.
    let piece = (2 * words / 2048).next_multiple_of(1 << 11);
    let (mut to, mut pieces, mut blocks) = (machine.at(&rounded), Vec::new(), 0);
    for layer in &mut laid_out {
        for (i, number) in MATRICES.into_iter().enumerate() {
            let (from, count) = (std::mem::replace(&mut layer.matrices[i], to), count(layer, number));
            for start in (0..count).step_by(piece) {
                for Address(at) in [from.after(start), element.after(to, start)] {
                    pieces.extend([at as u32, (at >> 32) as u32]);
                }
                pieces.extend([piece.min(count - start) as u32, 0]);
                blocks += 1;
            }
            to = to.after(room(layer, number));
        }
    }
    let pieces = machine.upload(&pieces)?;
    let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: 0 };
    machine.launch(Kernel("elementwise", "round_pieces"), grid, arguments![machine.words_at(&pieces)])?;
    Ok((laid_out, Some(rounded)))
}

impl Common {
    fn attention(&self, seed: u32, depth: usize, element: Element) -> Result<Attention> {
        Attention::new(&self.plan, (self.heads, depth), (self.rate, seed), element)
    }

    /// The LayerNorm of a sum whose second summand is dropped out.
    fn norm(&self, seed: u32) -> LayerNorm {
        LayerNorm { eps: self.eps, dropout: Some((seed, 1.0 - self.rate)) }
    }
}

impl<M: Machine> Stack<M> {
    fn linear(&self) -> Linear {
        Linear { precision: self.common.precision }
    }

    fn attention(&self, layer: &Layer, qkv: &Array<M>) -> Result<Attention> {
        let depth = qkv.shape.dims2()?.1 / 3 / self.common.heads;
        self.common.attention(layer.given.seeds[0], depth, self.element)
    }

    /// One of the layer's [`MATRICES`].
    fn matrix(&self, layer: &Layer, which: usize) -> Input {
        let weight = &layer.given.weights[MATRICES[which]];
        Input { at: layer.matrices[which], shape: weight.shape().clone(), element: self.element, wanted: weight.track_op() }
    }

    /// Another weight.
    fn vector(&self, layer: &Layer, number: usize) -> Result<Input> {
        self.machine.place(NAME, &layer.given.weights[number])
    }

    /// Those of a LayerNorm: its own two, and the bias of the product that it takes.
    fn parameters(&self, layer: &Layer, numbers: [usize; 3]) -> Result<Parameters> {
        let [weight, bias, added] = numbers.map(|number| self.vector(layer, number));
        Ok(Parameters { weight: weight?.at, bias: bias?.at, added: added?.at })
    }

    fn forward(&self, layer: &Layer, x: &Array<M>) -> Result<(Array<M>, Activations<M>)> {
        let machine = &self.machine;
        let make = |made: (M::Values, Shape)| Array::new(machine, made, self.element);
        let product = |x: &Array<M>, which: usize| -> Result<Array<M>> {
            Ok(make(self.linear().forward(machine, &[x.input(), self.matrix(layer, which)])?))
        };
        let norm = |summands: [&Array<M>; 2], numbers: [usize; 3], seed: u32| -> Result<Array<M>> {
            let parameters = self.parameters(layer, numbers)?;
            Ok(make(self.common.norm(seed).of(machine, &summands.map(Array::input), &parameters)?))
        };
        let [_, at_middle, at_end] = layer.given.seeds;
        let inputs = [x.input(), self.matrix(layer, QKV), self.vector(layer, QKV_BIAS)?];
        let qkv = make(self.linear().forward(machine, &inputs)?);
        let Attended { made, logarithms } = self.attention(layer, &qkv)?.of(machine, &qkv.input(), &self.tables)?;
        let attended = make(made);
        let projected = product(&attended, OUTPUT)?;
        let middle = norm([x, &projected], MIDDLE_NORM, at_middle)?;
        let raised = product(&middle, UP)?;
        let inner = make(Gelu.forward(machine, &[raised.input(), self.vector(layer, UP_BIAS)?])?);
        let lowered = product(&inner, DOWN)?;
        let y = norm([&middle, &lowered], LAST_NORM, at_end)?;
        Ok((y, Activations { qkv, attended, logarithms, projected, middle, raised, inner, lowered }))
    }

    /// The gradient by the layer's input, if that is wanted, and those by its weights.
    fn backward(&self, left: Left<M>, gradient: Array<M>, input_wanted: bool) -> Result<(Option<Array<M>>, Gradients)> {
        let (machine, Left { layer, input: x, activations }) = (&self.machine, left);
        let Activations { qkv, attended, logarithms, projected, middle, raised, inner, lowered } = match activations {
            Some(activations) => activations,
            None => self.forward(&layer, &x)?.1,
        };
        let mut all = Gradients::default();
        let like = |values: M::Values, of: &Array<M>| Array::new(machine, (values, of.shape.clone()), of.element);
        let [_, at_middle, at_end] = layer.given.seeds;
        // By both summands.
        let norm = |summands: [&Array<M>; 2], numbers: [usize; 3], seed: u32, by: &Array<M>, all: &mut Gradients| {
            let parameters = self.parameters(&layer, numbers)?;
            let inputs = summands.map(Array::input);
            let found = self.common.norm(seed).gradients(machine, &inputs, &parameters, &by.input())?;
            let width = layer.given.weights[numbers[0]].elem_count();
            let by_parameters = machine.tensor(found.by_parameters, &Shape::from((numbers.len(), width)))?;
            for (row, number) in numbers.into_iter().enumerate() {
                all[number] = Some(by_parameters.get(row)?);
            }
            Ok::<_, candle_core::Error>((found.by_sum, like(there(found.by_x)?, summands[1])))
        };
        // By what a product was made of, added to what is given.
        let product = |x: Input, which: usize, by: &Array<M>, onto: Option<M::Values>, all: &mut Gradients| {
            let inputs = [x, self.matrix(&layer, which)];
            let [by_x, by_weight] = taken(self.linear().gradients(machine, &inputs, &by.input(), onto)?)?;
            all[MATRICES[which]] = by_weight.map(|values| machine.tensor(values, &inputs[1].shape)).transpose()?;
            Ok::<_, candle_core::Error>(by_x)
        };

        let (by_middle, by_lowered) = norm([&middle, &lowered], LAST_NORM, at_end, &gradient, &mut all)?;
        drop((gradient, lowered));
        let by_inner = like(there(product(inner.input(), DOWN, &by_lowered, None, &mut all)?)?, &inner);
        drop((by_lowered, inner));
        let inputs = [raised.input(), self.vector(&layer, UP_BIAS)?];
        let pass = Pass { inputs: &inputs, result: &by_inner.input(), gradient: &by_inner.input() };
        let [by_raised, by_bias] = taken(Gelu.backward(machine, &pass)?)?;
        all[UP_BIAS] = Some(machine.tensor(there(by_bias)?, &inputs[1].shape)?);
        let by_raised = like(there(by_raised)?, &raised);
        drop((by_inner, raised));
        let by_middle = like(there(product(middle.input(), UP, &by_raised, Some(by_middle), &mut all)?)?, &middle);
        drop((by_raised, middle));
        let (by_x, by_projected) = norm([&x, &projected], MIDDLE_NORM, at_middle, &by_middle, &mut all)?;
        drop((by_middle, projected));
        let by_attended = like(there(product(attended.input(), OUTPUT, &by_projected, None, &mut all)?)?, &attended);
        drop(by_projected);
        let pass = Pass { inputs: &[qkv.input()], result: &attended.input(), gradient: &by_attended.input() };
        let by_qkv = like(self.attention(&layer, &qkv)?.gradient(machine, &pass, &logarithms, &self.tables)?, &qkv);
        drop((by_attended, attended, logarithms, qkv));
        let (rows, width) = by_qkv.shape.dims2()?;
        let by_bias = column_sums(machine, by_qkv.at, by_qkv.element, rows, width)?;
        all[QKV_BIAS] = Some(machine.tensor(by_bias, layer.given.weights[QKV_BIAS].shape())?);
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

/// What a forward pass keeps.
struct Run<M: Machine> {
    stack: Stack<M>,
    /// Layers that the backward pass goes through.
    left: Vec<Left<M>>,
    /// Whether a gradient by the first one's input leads anywhere.
    input_wanted: bool,
}

impl<M: Machine> Kept for Run<M> {
    fn backward(
        self: Box<Self>,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let Self { stack, left, input_wanted } = *self;
        let mut gradient = Array::of(&stack.machine, gradient, stack.element)?;
        for of_layer in left.into_iter().rev() {
            let number = of_layer.layer.number;
            let is_first = number == stack.common.first_kept;
            let (by_input, by_weights) = stack.backward(of_layer, gradient, !is_first || input_wanted)?;
            complete(number, by_weights)?;
            let Some(by_input) = by_input else { return Ok(None) };
            gradient = by_input;
        }
        gradient.tensor(&stack.machine).map(Some)
    }
}
