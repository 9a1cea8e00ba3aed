//! LayerNorm, alone or of a residual sum with dropout.

use candle_core::{Result, Shape, Tensor};

use super::dropout;
use super::machine::{Address, Element, Grid, Kernel, Machine, WARP, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{all_column_sums, machine};

/// Rows that a block of the backward pass takes.
const ROWS_EACH: usize = 32;
/// Values that a block may add up in its shared memory, 48 KiB on every device.
const SHARED_VALUES: usize = 48 * 1024 / 4;

/// Inputs: the residual where there is one, the normalised values, and weight and bias as `[2, hidden]`.
pub(super) struct LayerNorm {
    pub(super) eps: f32,
    /// Seed and share kept, of a sum.
    pub(super) dropout: Option<(u32, f32)>,
}

/// Where the parts of the inputs lie.
struct Parts {
    residual: Address,
    x: Address,
    weight: Address,
    bias: Address,
    rows: usize,
    width: usize,
}

impl LayerNorm {
    fn parts(&self, inputs: &[Input]) -> Result<Parts> {
        let ([.., x, parameters], (rows, width)) = (inputs, inputs[0].matrix()) else {
            candle_core::bail!("layer_norm: {} inputs", inputs.len());
        };
        if parameters.shape.dims() != [2, width] || x.shape != inputs[0].shape {
            candle_core::bail!("layer_norm: {:?} by {:?}, hidden {width}", x.shape, parameters.shape);
        }
        let residual = if self.dropout.is_some() { inputs[0].at } else { Address::NULL };
        Ok(Parts { residual, x: x.at, weight: parameters.at, bias: parameters.at.after(width), rows, width })
    }

    /// Seed, limit and scale.
    fn draws(&self) -> (u32, u32, f32) {
        let (seed, keep) = self.dropout.unwrap_or((0, 1.0));
        let (limit, scale) = dropout(keep);
        (seed, limit, scale)
    }
}

impl Operator for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn activations(&self) -> usize {
        1 + usize::from(self.dropout.is_some())
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let Parts { residual, x, weight, bias, rows, width } = self.parts(inputs)?;
        let (y, (seed, limit, scale)) = (inputs[0].alike(machine)?, self.draws());
        let grid = Grid { blocks: [rows.div_ceil(4).max(1), 1, 1], threads: 4 * WARP, shared: 0 };
        let (count, wide) = (rows as u32, width as u32);
        let arguments = arguments![residual, x, weight, bias, machine.at(&y), count, wide, self.eps, seed, limit, scale];
        machine.launch(Kernel::on(inputs[0].element, "layer_norm", ["layer_norm", "layer_norm_bf16"]), grid, arguments)?;
        Ok((y, inputs[0].shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let Parts { residual, x, weight, rows, width, .. } = self.parts(pass.inputs)?;
        // Sums lie in spans of eight columns.
        let sums_of_warp = 2 * width.next_multiple_of(8);
        let warps = (SHARED_VALUES / sums_of_warp.max(1)).min(4);
        if warps == 0 {
            candle_core::bail!("layer_norm: rows of {width} values are wider than a block's memory");
        }
        let blocks = rows.div_ceil(ROWS_EACH).max(1);
        let (by_sum, partial) = (pass.inputs[0].alike(machine)?, machine.allocate(blocks * 2 * width)?);
        let by_x = self.dropout.map(|_| pass.inputs[0].alike(machine)).transpose()?;
        let dx = by_x.as_ref().map_or(Address::NULL, |dx| machine.at(dx));
        let (seed, limit, scale) = self.draws();
        let grid = Grid { blocks: [blocks, 1, 1], threads: warps * WARP, shared: warps * sums_of_warp };
        let (count, wide, each) = (rows as u32, width as u32, ROWS_EACH as u32);
        let sums = machine.at(&partial);
        let arguments = machine::arguments![
            residual,
            x,
            weight,
            pass.gradient.at,
            machine.at(&by_sum),
            dx,
            sums,
            count,
            wide,
            each,
            self.eps,
            seed,
            limit,
            scale
        ];
        let names = ["layer_norm_backward", "layer_norm_backward_bf16"];
        machine.launch(Kernel::on(pass.inputs[0].element, "layer_norm", names), grid, arguments)?;
        let by_parameters = all_column_sums(machine, partial, blocks, 2 * width)?;
        Ok(match by_x {
            Some(by_x) => vec![Some(by_sum), Some(by_x), Some(by_parameters)],
            None => vec![Some(by_sum), Some(by_parameters)],
        })
    }
}

/// See [`layer_norm`](crate::ops::layer_norm) and [`dropout_add_layer_norm`](crate::ops::dropout_add_layer_norm): with `residual`
/// (the other summand, rate and seed), of the sum. All but the parameters are stored as `element` within.
pub fn layer_norm(
    x: &Tensor,
    residual: Option<(&Tensor, f32, u32)>,
    [weight, bias]: [&Tensor; 2],
    eps: f32,
    element: Element,
) -> Result<Tensor> {
    let parameters = Tensor::stack(&[weight, bias], 0)?;
    let x = x.contiguous()?;
    match residual {
        None => x.apply_op2(&parameters, OnMachine::within(LayerNorm { eps, dropout: None }, element)),
        Some((residual, rate, seed)) => {
            let op = LayerNorm { eps, dropout: Some((seed, 1.0 - rate)) };
            residual.contiguous()?.apply_op3(&x, &parameters, OnMachine::within(op, element))
        }
    }
}
