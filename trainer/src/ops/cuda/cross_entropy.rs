//! Softmax cross-entropy straight from hidden states and the tied output projection, a chunk of rows at a time.

use candle_core::{Result, Shape, Tensor};

use super::linear::Factor;
use super::machine::{Address, Element, Grid, Kernel, Machine, Matrix, Product, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};
use super::{Precision, all_column_sums, column_sums, copy};
use crate::ops::cross_entropy::{Row, Targets};

/// Logits that exist at one time: 64 MiB of them.
const CHUNK_LOGITS: usize = 1 << 24;
/// Words of a `Predicted`.
const ROW: usize = 4;

/// The forward pass has the logits at hand, so it makes the gradients too: the projection is computed once, not twice. It is told a
/// `Predicted` of the kernels for each row, then a `Mean` for each part. Of its result, a gradient by the first value is taken.
#[derive(Debug)]
pub(super) struct TiedCrossEntropy {
    parts: usize,
    chunk_rows: usize,
    precision: Precision,
    gradients: Kept,
}

impl TiedCrossEntropy {
    /// Of so many parts, as many rows at one time as is good for so many classes.
    pub(super) fn of(parts: usize, classes: usize, precision: Precision) -> Self {
        let chunk_rows = (CHUNK_LOGITS / classes.max(1)).max(1);
        Self { parts, chunk_rows, precision, gradients: Kept::default() }
    }

    /// Rows of hidden states, their width, and classes.
    fn sizes(inputs: &[Input]) -> Result<(usize, usize, usize)> {
        let ((rows, width), (classes, inner)) = (inputs[0].matrix(), inputs[1].shape.dims2()?);
        if width != inner || inputs[2].count() != classes {
            candle_core::bail!("tied_cross_entropy: hidden {:?}, weight {:?}", inputs[0].shape, inputs[1].shape);
        }
        Ok((rows, width, classes))
    }

    /// What is told of targets of the first of so many rows. The others count nothing.
    pub(super) fn words(targets: &Targets, rows: usize) -> Vec<u32> {
        let of_rows = targets.rows().flat_map(|Row { target, weight, share, smoothing }| {
            [target, weight.to_bits(), share.to_bits(), smoothing.to_bits()]
        });
        let mut words: Vec<u32> = of_rows.collect();
        words.resize(ROW * rows, 0);
        let mut first = 0;
        words.extend(targets.parts.iter().flat_map(|part| {
            let start = first;
            first += part.rows as u32;
            [start, first, (1.0 / part.rows as f32).to_bits(), part.factor.to_bits()]
        }));
        words
    }
}

impl Operator for TiedCrossEntropy {
    const NAME: &'static str = "tied_cross_entropy";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (rows, width, classes) = Self::sizes(inputs)?;
        let (precision, words_at) = (self.precision, inputs[3].at);
        let x = Factor::new(machine, &inputs[0], precision)?;
        let weight = Factor::new(machine, &inputs[1], precision)?;
        let (dx, dw) = (machine.allocate(rows * width)?, machine.allocate(classes * width)?);
        let chunks = rows.div_ceil(self.chunk_rows);
        // Rows of logits begin where whole vectors do, which products are faster with.
        let stride = classes.next_multiple_of(8);
        // A row of column sums for each chunk.
        let (losses, biases) = (machine.allocate(rows)?, machine.allocate(chunks * stride)?);
        let (element, most) = (Element::of(precision), self.chunk_rows.min(rows) * stride);
        let logits = machine.allocate(most)?;
        // In f32 the gradient by the logits takes their place.
        let rounded = (element == Element::Bf16).then(|| machine.allocate(element.words(most))).transpose()?;
        let gradient = rounded.as_ref().map_or_else(|| machine.at(&logits), |rounded| machine.at(rounded));
        let row = |factor: Address, start: usize| element.after(factor, start * width);
        for (chunk, start) in (0..rows).step_by(self.chunk_rows).enumerate() {
            let n = self.chunk_rows.min(rows - start);
            machine.multiply(&Product {
                m: n,
                n: classes,
                k: width,
                a: Matrix::rows(row(x.at, start), width),
                b: Matrix::rows(weight.at, width).t(),
                c: machine.at(&logits),
                stride,
                of_result: Element::F32,
                accumulate: false,
                precision,
            })?;
            let (rows_at, losses_at) = (words_at.after(ROW * start), machine.at(&losses).after(start));
            let of_row = arguments![machine.at(&logits), inputs[2].at, rows_at, losses_at, gradient, classes as u32];
            let kernel = Kernel::on(element, "cross_entropy", ["cross_entropy_rows", "cross_entropy_rows_bf16"]);
            machine.launch(kernel, Grid::reducing(n), of_row)?;
            machine.multiply(&Product {
                m: n,
                n: width,
                k: classes,
                a: Matrix::rows(gradient, stride),
                b: Matrix::rows(weight.at, width),
                c: machine.at(&dx).after(start * width),
                stride: width,
                of_result: Element::F32,
                accumulate: false,
                precision,
            })?;
            machine.multiply(&Product {
                m: classes,
                n: width,
                k: n,
                a: Matrix::rows(gradient, stride).t(),
                b: Matrix::rows(row(x.at, start), width),
                c: machine.at(&dw),
                stride: width,
                of_result: Element::F32,
                accumulate: start > 0,
                precision,
            })?;
            let sums = column_sums(machine, gradient, element, n, stride)?;
            copy(machine, machine.at(&sums), machine.at(&biases).after(chunk * stride), stride)?;
        }
        let (sums, db) = (all_column_sums(machine, biases, chunks, stride)?, machine.allocate(classes)?);
        copy(machine, machine.at(&sums), machine.at(&db), classes)?;
        let found = machine.allocate(1 + self.parts)?;
        let (losses_at, parts_at) = (machine.at(&losses), words_at.after(ROW * rows));
        let of_parts = arguments![losses_at, parts_at, machine.at(&found), self.parts as u32];
        machine.launch(Kernel("cross_entropy", "cross_entropy_parts"), Grid::reducing(1), of_parts)?;
        self.gradients.put([dx, dw, db]);
        Ok((found, Shape::from(1 + self.parts)))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let made = self.gradients.take::<[M::Values; 3]>(Self::NAME)?;
        for (values, input) in made.iter().zip(pass.inputs) {
            let arguments = arguments![machine.at(values), pass.gradient.at, input.count()];
            machine.launch(Kernel("elementwise", "scale_by"), Grid::each(input.count()), arguments)?;
        }
        Ok(made.map(Some).into())
    }
}

/// See [`tied_cross_entropy`](crate::ops::tied_cross_entropy).
pub fn tied_cross_entropy(inputs: [&Tensor; 3], targets: &Targets, precision: Precision) -> Result<Tensor> {
    let op = TiedCrossEntropy::of(targets.parts.len(), inputs[2].elem_count(), precision);
    apply(op, inputs, targets)
}

/// The same in chunks of `chunk_rows` rows.
pub fn tied_cross_entropy_in_chunks(
    inputs: [&Tensor; 3],
    targets: &Targets,
    precision: Precision,
    chunk_rows: usize,
) -> Result<Tensor> {
    let op = TiedCrossEntropy { chunk_rows, ..TiedCrossEntropy::of(targets.parts.len(), 1, precision) };
    apply(op, inputs, targets)
}

fn apply(op: TiedCrossEntropy, [hidden, weight, bias]: [&Tensor; 3], targets: &Targets) -> Result<Tensor> {
    let rows = hidden.dim(0)?;
    targets.check(rows, bias.elem_count())?;
    let op = OnMachine::of(op).told(TiedCrossEntropy::words(targets, rows));
    hidden.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}
