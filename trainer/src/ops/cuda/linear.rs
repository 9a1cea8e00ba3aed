//! Fully connected layers: cuBLAS products, with the bias and GELU around them.

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Grid, Kernel, Machine, Matrix, Product, arguments};
use super::operator::{Input, OnMachine, Operator, Pass};
use super::{Precision, column_sums};

/// A factor of a product, rounded to bf16 if that is asked for.
pub(super) struct Factor<M: Machine> {
    pub(super) at: Address,
    _rounded: Option<M::Values>,
}

impl<M: Machine> Factor<M> {
    pub(super) fn new(machine: &M, at: Address, count: usize, precision: Precision) -> Result<Self> {
        if precision != Precision::Bf16 {
            return Ok(Self { at, _rounded: None });
        }
        let rounded = machine.allocate(count.div_ceil(2))?;
        let to = machine.at(&rounded);
        machine.launch(Kernel("elementwise", "to_bf16"), Grid::each(count), arguments![at, to, count])?;
        Ok(Self { at: to, _rounded: Some(rounded) })
    }
}

/// `x · weightᵀ + bias`, or without a third input the product alone.
struct Linear {
    precision: Precision,
}

impl Linear {
    /// Rows of x, its columns, and those of the result.
    fn sizes(inputs: &[Input]) -> Result<(usize, usize, usize)> {
        let ((rows, width), (outputs, inner)) = (inputs[0].matrix(), inputs[1].shape.dims2()?);
        if width != inner || inputs.get(2).is_some_and(|bias| bias.count() != outputs) {
            candle_core::bail!("linear: {:?} · {:?}ᵀ", inputs[0].shape, inputs[1].shape);
        }
        Ok((rows, width, outputs))
    }
}

impl Operator for Linear {
    const NAME: &'static str = "linear";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (rows, width, outputs) = Self::sizes(inputs)?;
        let y = machine.allocate(rows * outputs)?;
        if let Some(bias) = inputs.get(2) {
            let arguments = arguments![bias.at, machine.at(&y), rows * outputs, outputs as u32];
            machine.launch(Kernel("elementwise", "fill_rows"), Grid::each(rows * outputs), arguments)?;
        }
        let x = Factor::new(machine, inputs[0].at, rows * width, self.precision)?;
        let weight = Factor::new(machine, inputs[1].at, outputs * width, self.precision)?;
        machine.multiply(&Product {
            m: rows,
            n: outputs,
            k: width,
            a: Matrix::rows(x.at, width),
            b: Matrix::rows(weight.at, width).t(),
            c: machine.at(&y),
            accumulate: inputs.len() > 2,
            precision: self.precision,
        })?;
        let mut dims = inputs[0].shape.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok((y, Shape::from(dims)))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (rows, width, outputs) = Self::sizes(pass.inputs)?;
        let dy = Factor::new(machine, pass.gradient.at, rows * outputs, self.precision)?;
        // Inputs that lead to no parameter (region features) need no gradient.
        let mut dx = None;
        if pass.inputs[0].wanted {
            let weight = Factor::new(machine, pass.inputs[1].at, outputs * width, self.precision)?;
            let made = machine.allocate(rows * width)?;
            machine.multiply(&Product {
                m: rows,
                n: width,
                k: outputs,
                a: Matrix::rows(dy.at, outputs),
                b: Matrix::rows(weight.at, width),
                c: machine.at(&made),
                accumulate: false,
                precision: self.precision,
            })?;
            dx = Some(made);
        }
        let x = Factor::new(machine, pass.inputs[0].at, rows * width, self.precision)?;
        let dw = machine.allocate(outputs * width)?;
        machine.multiply(&Product {
            m: outputs,
            n: width,
            k: rows,
            a: Matrix::rows(dy.at, outputs).t(),
            b: Matrix::rows(x.at, width),
            c: machine.at(&dw),
            accumulate: false,
            precision: self.precision,
        })?;
        let mut gradients = vec![dx, Some(dw)];
        if pass.inputs.len() > 2 {
            gradients.push(Some(column_sums(machine, pass.gradient.at, rows, outputs)?));
        }
        Ok(gradients)
    }
}

/// See [`linear`](crate::ops::linear).
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, precision: Precision) -> Result<Tensor> {
    x.contiguous()?.apply_op3(weight, &bias.contiguous()?, OnMachine(Linear { precision }))
}

/// `GELU(x + bias)`
struct BiasGelu;

impl Operator for BiasGelu {
    const NAME: &'static str = "bias_gelu";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let ((x, bias), count) = ((&inputs[0], &inputs[1]), inputs[0].count());
        let y = machine.allocate(count)?;
        let arguments = arguments![x.at, bias.at, machine.at(&y), count, bias.count() as u32];
        machine.launch(Kernel("elementwise", "gelu"), Grid::each(count), arguments)?;
        Ok((y, x.shape.clone()))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let ((x, bias), count) = ((&pass.inputs[0], &pass.inputs[1]), pass.inputs[0].count());
        let (dx, width) = (machine.allocate(count)?, bias.count());
        let arguments = arguments![x.at, bias.at, pass.gradient.at, machine.at(&dx), count, width as u32];
        machine.launch(Kernel("elementwise", "gelu_backward"), Grid::each(count), arguments)?;
        let by_bias = column_sums(machine, machine.at(&dx), count / width.max(1), width)?;
        Ok(vec![Some(dx), Some(by_bias)])
    }
}

/// See [`linear_gelu`](crate::ops::linear_gelu).
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor, precision: Precision) -> Result<Tensor> {
    let product = x.contiguous()?.apply_op2(weight, OnMachine(Linear { precision }))?;
    product.apply_op2(bias, OnMachine(BiasGelu))
}
