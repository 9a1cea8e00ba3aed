//! Fully connected layers: cuBLAS products, with the bias and GELU around them.

use candle_core::{Result, Shape, Tensor};

use super::elementwise::Gelu;
use super::machine::{Address, Element, Machine, Matrix, Product};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};
use super::{Precision, column_sums, fill_rows, rounded};

/// A factor of a product, rounded to bf16 if that is asked for.
pub(super) struct Factor<M: Machine> {
    pub(super) at: Address,
    /// A copy, where it is one.
    rounded: Option<M::Values>,
}

impl<M: Machine> Factor<M> {
    pub(super) fn new(machine: &M, of: &Input, precision: Precision) -> Result<Self> {
        match (precision, of.element) {
            (Precision::Bf16, Element::F32) => {
                let rounded = rounded(machine, of.at, of.count())?;
                Ok(Self { at: machine.at(&rounded), rounded: Some(rounded) })
            }
            (Precision::F32 | Precision::Tf32, Element::Bf16) => {
                candle_core::bail!("a product in {precision:?} of what is stored in bf16")
            }
            _ => Ok(Self { at: of.at, rounded: None }),
        }
    }
}

/// `x · weightᵀ + bias`, or without a third input the product alone.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) precision: Precision,
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

    /// The result, and the factors that it was made of.
    #[expect(clippy::type_complexity, reason = "a result as operators give it")]
    fn product<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<((M::Values, Shape), [Factor<M>; 2])> {
        let (rows, width, outputs) = Self::sizes(inputs)?;
        let element = inputs[0].element;
        let y = machine.allocate(element.words(rows * outputs))?;
        if let Some(bias) = inputs.get(2) {
            fill_rows(machine, bias.at, machine.at(&y), element, rows, outputs)?;
        }
        let factors = [Factor::new(machine, &inputs[0], self.precision)?, Factor::new(machine, &inputs[1], self.precision)?];
        machine.multiply(&Product {
            m: rows,
            n: outputs,
            k: width,
            a: Matrix::rows(factors[0].at, width),
            b: Matrix::rows(factors[1].at, width).t(),
            c: machine.at(&y),
            stride: outputs,
            of_result: element,
            accumulate: inputs.len() > 2,
            precision: self.precision,
        })?;
        let mut dims = inputs[0].shape.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok(((y, Shape::from(dims)), factors))
    }

    /// Gradients as [`Operator::backward`] gives them; that by x is added to `onto`, if that is given.
    pub(super) fn gradients<M: Machine>(
        &self,
        machine: &M,
        inputs: &[Input],
        gradient: &Input,
        onto: Option<M::Values>,
    ) -> Result<Vec<Option<M::Values>>> {
        self.gradients_by(machine, inputs, [None, None], gradient, onto)
    }

    /// The same, of factors that are there already.
    fn gradients_by<M: Machine>(
        &self,
        machine: &M,
        inputs: &[Input],
        [x, weight]: [Option<Factor<M>>; 2],
        gradient: &Input,
        onto: Option<M::Values>,
    ) -> Result<Vec<Option<M::Values>>> {
        let factor = |there: Option<Factor<M>>, of: &Input| there.map_or_else(|| Factor::new(machine, of, self.precision), Ok);
        let (rows, width, outputs) = Self::sizes(inputs)?;
        let dy = Factor::new(machine, gradient, self.precision)?;
        // Inputs that lead to no parameter (region features) need no gradient, nor do weights that are not trained.
        let mut dx = None;
        if inputs[0].wanted {
            let weight = factor(weight, &inputs[1])?;
            let accumulate = onto.is_some();
            let made = onto.map_or_else(|| inputs[0].alike(machine), Ok)?;
            machine.multiply(&Product {
                m: rows,
                n: width,
                k: outputs,
                a: Matrix::rows(dy.at, outputs),
                b: Matrix::rows(weight.at, width),
                c: machine.at(&made),
                stride: width,
                of_result: inputs[0].element,
                accumulate,
                precision: self.precision,
            })?;
            dx = Some(made);
        }
        let mut dw = None;
        if inputs[1].wanted {
            let x = factor(x, &inputs[0])?;
            let made = machine.allocate(outputs * width)?;
            machine.multiply(&Product {
                m: outputs,
                n: width,
                k: rows,
                a: Matrix::rows(dy.at, outputs).t(),
                b: Matrix::rows(x.at, width),
                c: machine.at(&made),
                stride: width,
                of_result: Element::F32,
                accumulate: false,
                precision: self.precision,
            })?;
            dw = Some(made);
        }
        let mut gradients = vec![dx, dw];
        if let Some(bias) = inputs.get(2) {
            let sums = || column_sums(machine, gradient.at, gradient.element, rows, outputs);
            gradients.push(bias.wanted.then(sums).transpose()?);
        }
        Ok(gradients)
    }
}

impl Operator for Linear {
    const NAME: &'static str = "linear";

    fn activations(&self) -> usize {
        1
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        Ok(self.product(machine, inputs)?.0)
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        self.gradients(machine, pass.inputs, pass.gradient, None)
    }
}

/// A layer by itself, whose factors are rounded once for both ways.
#[derive(Debug)]
pub(super) struct Alone {
    linear: Linear,
    factors: Kept,
}

impl Alone {
    pub(super) fn of(precision: Precision) -> Self {
        Self { linear: Linear { precision }, factors: Kept::default() }
    }
}

impl Operator for Alone {
    const NAME: &'static str = Linear::NAME;

    fn activations(&self) -> usize {
        self.linear.activations()
    }

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (made, factors) = self.linear.product(machine, inputs)?;
        // Of those that are no copies, the memory is not theirs.
        self.factors.put(factors.map(|factor| factor.rounded.is_some().then_some(factor)));
        Ok(made)
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let factors = self.factors.try_take().unwrap_or([None, None]);
        self.linear.gradients_by(machine, pass.inputs, factors, pass.gradient, None)
    }
}

/// See [`linear`](crate::ops::linear). Activations are stored as `element` within.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, precision: Precision, element: Element) -> Result<Tensor> {
    x.contiguous()?.apply_op3(weight, &bias.contiguous()?, OnMachine::within(Alone::of(precision), element))
}

/// See [`scalar_products`](crate::ops::scalar_products).
pub fn scalar_products(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, OnMachine::of(Alone::of(Precision::F32)))
}

/// See [`linear_gelu`](crate::ops::linear_gelu). Activations are stored as `element` within.
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor, precision: Precision, element: Element) -> Result<Tensor> {
    let product = x.contiguous()?.apply_op2(weight, OnMachine::within(Alone::of(precision), element))?;
    product.apply_op2(bias, OnMachine::within(Gelu, element))
}
