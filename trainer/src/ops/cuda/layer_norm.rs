//! LayerNorm, alone or of a residual sum with dropout.

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Element, Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{all_column_sums, copy, draws};

/// Values that a block may add up in its shared memory, 48 KiB on every device.
const SHARED_VALUES: usize = 48 * 1024 / 4;

/// Values of a row that a warp takes at one time: `FEW` of the kernels a lane.
const STEP: usize = 8 * WARP;
/// Kernels whose warps hold rows of one to four such steps in their registers: forward and backward.
const HOLDING: [[&str; 2]; 4] = [
    ["layer_norm_bf16_1", "layer_norm_backward_bf16_1"],
    ["layer_norm_bf16_2", "layer_norm_backward_bf16_2"],
    ["layer_norm_bf16_3", "layer_norm_backward_bf16_3"],
    ["layer_norm_bf16_4", "layer_norm_backward_bf16_4"],
];

/// Those for such rows, if there are any and all that they read and write lies in places of sixteen bytes.
fn holding(element: Element, width: usize, places: &[Address]) -> Option<[&'static str; 2]> {
    let whole = element == Element::Bf16 && width.is_multiple_of(8) && places.iter().all(|place| place.0.is_multiple_of(16));
    HOLDING.get(width.div_ceil(STEP).checked_sub(1)?).filter(|_| whole).copied()
}

/// LayerNorm of one array or of the sum of two.
#[derive(Debug)]
pub(super) struct LayerNorm {
    pub(super) eps: f32,
    /// The share kept, of a sum.
    pub(super) keep: Option<f32>,
}

/// Where its parameters lie, `[hidden]` each, in f32.
pub(super) struct Parameters {
    pub(super) weight: Address,
    pub(super) bias: Address,
    /// What is added to the values before they are dropped out, such as the bias of the product that they are; or nowhere.
    pub(super) added: Address,
    /// The seed that they are dropped out by; nowhere if none are.
    pub(super) seed: Address,
}

/// Gradients of a LayerNorm.
pub(super) struct Gradients<V> {
    /// By the sum, and so by the residual.
    pub(super) by_sum: V,
    /// By the other summand, where there is a residual; else by the sum is by the values.
    pub(super) by_x: Option<V>,
    /// By weight, bias and, where there is something, what is added: so many rows, in f32.
    pub(super) by_parameters: V,
}

impl LayerNorm {
    /// Residual and values, their rows and columns, and what they are stored as.
    fn summands(&self, summands: &[Input]) -> Result<([Address; 2], [usize; 2], Element)> {
        let (x, residual) = match (summands, self.keep) {
            ([x], None) => (x, Address::NULL),
            ([residual, x], Some(_)) if residual.shape == x.shape && residual.element == x.element => (x, residual.at),
            _ => candle_core::bail!("layer_norm: {} summands that do not fit", summands.len()),
        };
        let (rows, width) = x.matrix();
        Ok(([residual, x.at], [rows, width], x.element))
    }

    /// Limit and scale.
    fn draws(&self) -> (u32, f32) {
        draws(self.keep.unwrap_or(1.0))
    }

    /// The result, of one or two summands.
    pub(super) fn of<M: Machine>(&self, machine: &M, summands: &[Input], parameters: &Parameters) -> Result<(M::Values, Shape)> {
        let ([residual, x], [rows, width], element) = self.summands(summands)?;
        let Parameters { weight, bias, added, seed } = *parameters;
        let (y, (limit, scale)) = (summands[0].alike(machine)?, self.draws());
        let grid = Grid { blocks: [rows.div_ceil(4).max(1), 1, 1], threads: 4 * WARP, shared: 0 };
        let (to, count, wide) = (machine.at(&y), rows as u32, width as u32);
        let arguments = arguments![residual, x, added, weight, bias, to, count, wide, self.eps, seed, limit, scale];
        let holding = holding(element, width, &[residual, x, added, weight, bias, to]);
        let kernel = match holding {
            Some([forward, _]) => Kernel("layer_norm", forward),
            None => Kernel::on(element, "layer_norm", ["layer_norm", "layer_norm_bf16"]),
        };
        machine.launch(kernel, grid, arguments)?;
        Ok((y, summands[0].shape.clone()))
    }

    /// From the gradient by the result.
    pub(super) fn gradients<M: Machine>(
        &self,
        machine: &M,
        summands: &[Input],
        parameters: &Parameters,
        gradient: &Input,
    ) -> Result<Gradients<M::Values>> {
        let ([residual, x], [rows, width], element) = self.summands(summands)?;
        let Parameters { weight, added, seed, .. } = *parameters;
        let parts = if added == Address::NULL { 2 } else { 3 };
        // Sums lie in spans of eight columns.
        let sums_of_warp = parts * width.next_multiple_of(8);
        let warps = (SHARED_VALUES / sums_of_warp.max(1)).min(4);
        if warps == 0 {
            candle_core::bail!("layer_norm: rows of {width} values are wider than a block's memory");
        }
        let by_sum = summands[0].alike(machine)?;
        let by_x = self.keep.map(|_| summands[0].alike(machine)).transpose()?;
        let (ds, dx) = (machine.at(&by_sum), by_x.as_ref().map_or(Address::NULL, |dx| machine.at(dx)));
        let holding = holding(element, width, &[residual, x, added, weight, gradient.at, ds, dx]);
        // Rows of a block: it leaves sums behind, and a large device wants to be busy. Where warps hold their rows, three blocks share one of
        // its 132 multiprocessors, and all should run at the same time.
        let each = match holding {
            Some(_) => rows.div_ceil(3 * 128).clamp(8, 64),
            None => (rows / 512).clamp(8, 32),
        };
        let blocks = rows.div_ceil(each).max(1);
        let partial = machine.allocate(blocks * parts * width)?;
        let (limit, scale) = self.draws();
        let grid = Grid { blocks: [blocks, 1, 1], threads: warps * WARP, shared: warps * sums_of_warp };
        let of_values = arguments![residual, x, added, weight, gradient.at, ds, dx, machine.at(&partial)];
        let of_rows = arguments![rows as u32, width as u32, each as u32, self.eps, seed, limit, scale];
        let kernel = match holding {
            Some([_, backward]) => Kernel("layer_norm", backward),
            None => Kernel::on(element, "layer_norm", ["layer_norm_backward", "layer_norm_backward_bf16"]),
        };
        machine.launch(kernel, grid, &[&of_values[..], of_rows].concat())?;
        let by_parameters = all_column_sums(machine, partial, blocks, parts * width)?;
        Ok(Gradients { by_sum, by_x, by_parameters })
    }
}

/// A LayerNorm of one array by itself. Inputs: this, weight and bias.
#[derive(Debug)]
pub(super) struct OfOne {
    norm: LayerNorm,
}

impl OfOne {
    pub(super) fn of(eps: f32) -> Self {
        Self { norm: LayerNorm { eps, keep: None } }
    }

    fn parameters(inputs: &[Input]) -> Result<(&[Input], Parameters)> {
        match inputs {
            [x, weight, bias] if [weight, bias].iter().all(|of| of.shape.elem_count() == x.matrix().1) => {
                let (added, seed) = (Address::NULL, Address::NULL);
                Ok((&inputs[..1], Parameters { weight: weight.at, bias: bias.at, added, seed }))
            }
            _ => candle_core::bail!("layer_norm: weight and bias that do not fit the values"),
        }
    }
}

impl Operator for OfOne {
    const NAME: &'static str = "layer_norm";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (x, parameters) = Self::parameters(inputs)?;
        self.norm.of(machine, x, &parameters)
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (x, parameters) = Self::parameters(pass.inputs)?;
        let Gradients { by_sum, by_parameters, .. } = self.norm.gradients(machine, x, &parameters, pass.gradient)?;
        let width = x[0].matrix().1;
        // By the weight in front, where it may stay.
        let by_bias = machine.allocate(width)?;
        copy(machine, machine.at(&by_parameters).after(width), machine.at(&by_bias), width)?;
        Ok(vec![Some(by_sum), Some(by_parameters), Some(by_bias)])
    }
}

/// A LayerNorm of a sum by itself. Inputs: the residual, what is dropped out, and weight, bias and perhaps what is added to the values
/// before they are dropped out, as `[2 or 3, hidden]`. It is told the seed.
struct OfSum {
    norm: LayerNorm,
}

impl OfSum {
    /// What lies where, in one array but for the seed.
    fn parameters(inputs: &[Input]) -> Result<(&[Input], Parameters)> {
        let [summands @ .., parameters, seed] = inputs else { candle_core::bail!("layer_norm: no inputs") };
        let width = summands.first().map_or(0, |first| first.matrix().1);
        let (at, rows) = match parameters.shape.dims() {
            [rows @ (2 | 3), of_row] if *of_row == width => (parameters.at, *rows),
            other => candle_core::bail!("layer_norm: {other:?} parameters, hidden {width}"),
        };
        let added = if rows == 3 { at.after(2 * width) } else { Address::NULL };
        Ok((summands, Parameters { weight: at, bias: at.after(width), added, seed: seed.at }))
    }
}

impl Operator for OfSum {
    const NAME: &'static str = "layer_norm";

    fn activations(&self) -> usize {
        2
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (summands, parameters) = Self::parameters(inputs)?;
        self.norm.of(machine, summands, &parameters)
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (summands, parameters) = Self::parameters(pass.inputs)?;
        let Gradients { by_sum, by_x, by_parameters } = self.norm.gradients(machine, summands, &parameters, pass.gradient)?;
        Ok(vec![Some(by_sum), by_x, Some(by_parameters)])
    }
}

/// See [`layer_norm`](crate::ops::layer_norm).
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, OnMachine::of(OfOne::of(eps)))
}

/// See [`dropout_add_layer_norm`](crate::ops::dropout_add_layer_norm). `parameters` are weight, bias and perhaps what is added to `x`
/// first. All others are stored as `element` within.
pub fn dropout_add_layer_norm(
    (residual, x): (&Tensor, &Tensor),
    (rate, seed): (f32, u32),
    parameters: &[&Tensor],
    eps: f32,
    element: Element,
) -> Result<Tensor> {
    let op = OnMachine::within(OfSum { norm: LayerNorm { eps, keep: Some(1.0 - rate) } }, element).told(vec![seed]);
    residual.contiguous()?.apply_op3(&x.contiguous()?, &Tensor::stack(parameters, 0)?, op)
}
