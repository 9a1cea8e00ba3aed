//! The Transformer's layers, forward and backward, without candle between their operators: activations stay in the machine's memory,
//! in bf16 where products are computed in it, and a gradient that comes from two sides is added up where it is made. candle clears
//! memory for every gradient and adds to that, which would move more bytes than some of the operators do.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::attention::Attention;
use super::elementwise::Gelu;
use super::layer_norm::LayerNorm;
use super::linear::Linear;
use super::machine::{Address, Element, Machine};
use super::operator::{Input, Operator, Pass, on_machine};
use super::{Precision, rounded, widened};
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

/// Where the two weights of each part are among them.
const QKV: [usize; 2] = [0, 1];
const OUTPUT: [usize; 2] = [2, 3];
const MIDDLE_NORM: [usize; 2] = [4, 5];
const UP: [usize; 2] = [6, 7];
const DOWN: [usize; 2] = [8, 9];
const LAST_NORM: [usize; 2] = [10, 11];

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
/// Shapes that do not fit, a device without kernels, and those of candle.
pub fn run(x: &Tensor, layers: Vec<Given>, common: Common) -> Result<(Tensor, Option<Box<dyn Kept>>)> {
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

/// All that a layer computes on its way, but for what it gives.
struct Activations<M: Machine> {
    attention: Attention,
    qkv: Array<M>,
    attended: Array<M>,
    projected: Array<M>,
    middle: Array<M>,
    /// Before the bias.
    raised: Array<M>,
    inner: Array<M>,
    lowered: Array<M>,
}

/// A layer of a pass.
struct Layer<M: Machine> {
    number: usize,
    given: Given,
    input: Array<M>,
    activations: Option<Activations<M>>,
}

/// The layers that a backward pass goes through.
struct Stack<M: Machine> {
    machine: M,
    common: Common,
    layers: Vec<Layer<M>>,
    /// Whether a gradient by the first one's input leads anywhere.
    input_wanted: bool,
}

fn run_on<M: Machine>(machine: M, x: &Tensor, layers: Vec<Given>, common: Common) -> Result<(Tensor, Option<Box<dyn Kept>>)> {
    let input_wanted = common.first_kept == 0 && x.track_op();
    let mut x = Array::of(&machine, x, Element::of(common.precision))?;
    let mut kept = Vec::new();
    for (number, given) in layers.into_iter().enumerate() {
        let (y, activations) = common.forward(&machine, &given, &x)?;
        let input = std::mem::replace(&mut x, y);
        if number >= common.first_kept {
            kept.push(Layer { number, given, input, activations: (!common.checkpointing).then_some(activations) });
        }
    }
    let hidden = x.tensor(&machine)?;
    if kept.is_empty() {
        return Ok((hidden, None));
    }
    Ok((hidden, Some(Box::new(Stack { machine, common, layers: kept, input_wanted }))))
}

/// LayerNorm's parameters as its operator takes them, `[2, hidden]`.
fn stacked(given: &Given, [weight, bias]: [usize; 2]) -> Result<Tensor> {
    Tensor::stack(&[given.weights[weight].detach(), given.weights[bias].detach()], 0)
}

impl Common {
    fn linear(&self) -> Linear {
        Linear { precision: self.precision }
    }

    /// The LayerNorm of a sum whose second summand is dropped out.
    fn norm(&self, seed: u32) -> LayerNorm {
        LayerNorm { eps: self.eps, dropout: Some((seed, 1.0 - self.rate)) }
    }

    fn forward<M: Machine>(&self, machine: &M, given: &Given, x: &Array<M>) -> Result<(Array<M>, Activations<M>)> {
        let make = |made: (M::Values, Shape)| Array::new(machine, made, x.element);
        let weight = |number: usize| machine.place(NAME, &given.weights[number]);
        let linear = |x: &Array<M>, [weights, bias]: [usize; 2]| -> Result<Array<M>> {
            Ok(make(self.linear().forward(machine, &[x.input(), weight(weights)?, weight(bias)?])?))
        };
        let norm = |residual: &Array<M>, x: &Array<M>, parameters: [usize; 2], seed: u32| -> Result<Array<M>> {
            let parameters = stacked(given, parameters)?;
            let inputs = [residual.input(), x.input(), machine.place(NAME, &parameters)?];
            Ok(make(self.norm(seed).forward(machine, &inputs)?))
        };
        let [in_attention, at_middle, at_end] = given.seeds;
        let qkv = linear(x, QKV)?;
        let heads = (self.heads, qkv.shape.dims2()?.1 / 3 / self.heads);
        let attention = Attention::new(&self.plan, heads, (self.rate, in_attention), x.element)?;
        let attended = make(attention.forward(machine, &[qkv.input()])?);
        let projected = linear(&attended, OUTPUT)?;
        let middle = norm(x, &projected, MIDDLE_NORM, at_middle)?;
        let raised = make(self.linear().forward(machine, &[middle.input(), weight(UP[0])?])?);
        let inner = make(Gelu.forward(machine, &[raised.input(), weight(UP[1])?])?);
        let lowered = linear(&inner, DOWN)?;
        let y = norm(&middle, &lowered, LAST_NORM, at_end)?;
        Ok((y, Activations { attention, qkv, attended, projected, middle, raised, inner, lowered }))
    }

    /// The gradient by the layer's input, if that is wanted, and those by its weights.
    fn backward<M: Machine>(
        &self,
        machine: &M,
        Layer { given, input: x, activations, .. }: Layer<M>,
        gradient: Array<M>,
        input_wanted: bool,
    ) -> Result<(Option<Array<M>>, Gradients)> {
        let Activations { attention, qkv, attended, projected, middle, raised, inner, lowered } = match activations {
            Some(activations) => activations,
            None => self.forward(machine, &given, &x)?.1,
        };
        let mut gradients = Gradients::default();
        let weight = |number: usize| machine.place(NAME, &given.weights[number]);
        let like = |values: M::Values, of: &Array<M>| Array::new(machine, (values, of.shape.clone()), of.element);
        let [_, at_middle, at_end] = given.seeds;

        // Both summands of a LayerNorm.
        let norm = |[residual, x]: [&Array<M>; 2], numbers: [usize; 2], seed: u32, by: &Array<M>, all: &mut Gradients| {
            let parameters = stacked(&given, numbers)?;
            let inputs = [residual.input(), x.input(), machine.place(NAME, &parameters)?];
            let pass = Pass { inputs: &inputs, result: &by.input(), gradient: &by.input() };
            let [by_residual, by_x, by_parameters] = taken(self.norm(seed).backward(machine, &pass)?)?;
            let by_parameters = machine.tensor(made(by_parameters)?, parameters.shape())?;
            for (row, number) in numbers.into_iter().enumerate() {
                all[number] = Some(by_parameters.get(row)?);
            }
            Ok::<_, candle_core::Error>((made(by_residual)?, like(made(by_x)?, x)))
        };
        // Of a product, added to what is given.
        let linear = |x: Input, numbers: &[usize], by: &Array<M>, onto: Option<M::Values>, all: &mut Gradients| {
            let weights = numbers.iter().map(|&number| weight(number)).collect::<Result<Vec<_>>>()?;
            let inputs: Vec<Input> = std::iter::once(x).chain(weights).collect();
            let mut found = self.linear().gradients(machine, &inputs, &by.input(), onto)?.into_iter();
            let by_x = found.next().flatten();
            for ((&number, values), input) in numbers.iter().zip(found).zip(&inputs[1..]) {
                all[number] = values.map(|values| machine.tensor(values, &input.shape)).transpose()?;
            }
            Ok::<_, candle_core::Error>(by_x)
        };

        let (by_middle, by_lowered) = norm([&middle, &lowered], LAST_NORM, at_end, &gradient, &mut gradients)?;
        drop((gradient, lowered));
        let by_inner = like(made(linear(inner.input(), &DOWN, &by_lowered, None, &mut gradients)?)?, &inner);
        drop((by_lowered, inner));
        let inputs = [raised.input(), weight(UP[1])?];
        let pass = Pass { inputs: &inputs, result: &by_inner.input(), gradient: &by_inner.input() };
        let [by_raised, by_bias] = taken(Gelu.backward(machine, &pass)?)?;
        gradients[UP[1]] = Some(machine.tensor(made(by_bias)?, &inputs[1].shape)?);
        let by_raised = like(made(by_raised)?, &raised);
        drop((by_inner, raised));
        let by_middle = linear(middle.input(), &UP[..1], &by_raised, Some(by_middle), &mut gradients)?;
        let by_middle = like(made(by_middle)?, &middle);
        drop((by_raised, middle));
        let (by_x, by_projected) = norm([&x, &projected], MIDDLE_NORM, at_middle, &by_middle, &mut gradients)?;
        drop((by_middle, projected));
        let by_attended = like(made(linear(attended.input(), &OUTPUT, &by_projected, None, &mut gradients)?)?, &attended);
        drop(by_projected);
        let pass = Pass { inputs: &[qkv.input()], result: &attended.input(), gradient: &by_attended.input() };
        let [by_qkv] = taken(attention.backward(machine, &pass)?)?;
        let by_qkv = like(made(by_qkv)?, &qkv);
        drop((by_attended, attended, qkv));
        let last = Input { wanted: input_wanted, ..x.input() };
        let by_x = linear(last, &QKV, &by_qkv, Some(by_x), &mut gradients)?;
        Ok((by_x.map(|values| like(values, &x)), gradients))
    }
}

/// So many gradients.
fn taken<T, const N: usize>(gradients: Vec<T>) -> Result<[T; N]> {
    gradients.try_into().map_err(|_| candle_core::Error::Msg("an operator of the layers has another number of gradients".into()))
}

/// A gradient that an operator makes in any case.
fn made<T>(gradient: Option<T>) -> Result<T> {
    gradient.ok_or_else(|| candle_core::Error::Msg("an operator of the layers lacks a gradient".into()))
}

impl<M: Machine> Kept for Stack<M> {
    fn backward(
        self: Box<Self>,
        gradient: &Tensor,
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let Self { machine, common, layers, input_wanted } = *self;
        let mut gradient = Array::of(&machine, gradient, Element::of(common.precision))?;
        for layer in layers.into_iter().rev() {
            let (number, first) = (layer.number, layer.number == common.first_kept);
            let (by_input, by_weights) = common.backward(&machine, layer, gradient, !first || input_wanted)?;
            complete(number, by_weights)?;
            let Some(by_input) = by_input else { return Ok(None) };
            gradient = by_input;
        }
        gradient.tensor(&machine).map(Some)
    }
}
