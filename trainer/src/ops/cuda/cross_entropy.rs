//! Softmax cross-entropy straight from hidden states and the tied output projection, a chunk of rows at a time.

use candle_core::{Result, Shape, Tensor};

use super::linear::Factor;
use super::machine::{Address, Element, Grid, Kernel, Machine, Matrix, Product, arguments};
use super::operator::{Input, Kept, OnMachine, Operator, Pass};
use super::{Precision, all_column_sums, column_sums, fill_rows};

/// Logits that exist at one time: 64 MiB of them.
const CHUNK_LOGITS: usize = 1 << 24;

/// The forward pass has the logits at hand, so it makes the gradients too: the projection is computed once, not twice.
struct TiedCrossEntropy {
    targets: Vec<u32>,
    weights: Option<Vec<f32>>,
    smoothing: f32,
    chunk_rows: usize,
    precision: Precision,
    gradients: Kept,
}

impl TiedCrossEntropy {
    fn check(&self, inputs: &[Input]) -> Result<(usize, usize, usize)> {
        let ((rows, width), (classes, inner)) = (inputs[0].matrix(), inputs[1].shape.dims2()?);
        if rows != self.targets.len() || width != inner || inputs[2].count() != classes {
            let (hidden, weight) = (&inputs[0].shape, &inputs[1].shape);
            candle_core::bail!("tied_cross_entropy: hidden {hidden:?}, weight {weight:?}, {} targets", self.targets.len());
        }
        if let Some(bad) = self.targets.iter().find(|&&target| target as usize >= classes) {
            candle_core::bail!("tied_cross_entropy: target {bad} outside {classes} classes");
        }
        if self.weights.as_ref().is_some_and(|weights| weights.len() != rows) {
            candle_core::bail!("tied_cross_entropy: one weight a row is needed for {rows} rows");
        }
        Ok((rows, width, classes))
    }
}

impl Operator for TiedCrossEntropy {
    const NAME: &'static str = "tied_cross_entropy";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (rows, width, classes) = self.check(inputs)?;
        let precision = self.precision;
        let targets = machine.upload(&self.targets)?;
        let bits = |weights: &Vec<f32>| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<u32>>();
        let weights = self.weights.as_ref().map(|weights| machine.upload(&bits(weights))).transpose()?;
        let x = Factor::new(machine, &inputs[0], precision)?;
        let weight = Factor::new(machine, &inputs[1], precision)?;
        let (dx, dw) = (machine.allocate(rows * width)?, machine.allocate(classes * width)?);
        let chunks = rows.div_ceil(self.chunk_rows);
        // A row of column sums for each chunk.
        let (losses, biases) = (machine.allocate(rows)?, machine.allocate(chunks * classes)?);
        let logits = machine.allocate(self.chunk_rows.min(rows) * classes)?;
        let row = |factor: Address, start: usize| Element::of(precision).after(factor, start * width);
        for (chunk, start) in (0..rows).step_by(self.chunk_rows).enumerate() {
            let n = self.chunk_rows.min(rows - start);
            machine.multiply(&Product {
                m: n,
                n: classes,
                k: width,
                a: Matrix::rows(row(x.at, start), width),
                b: Matrix::rows(weight.at, width).t(),
                c: machine.at(&logits),
                of_result: Element::F32,
                accumulate: false,
                precision,
            })?;
            let weights_at = weights.as_ref().map_or(Address::NULL, |weights| machine.words_at(weights).after(start));
            let (targets_at, losses_at) = (machine.words_at(&targets).after(start), machine.at(&losses).after(start));
            let (share, count) = (1.0 / rows as f32, classes as u32);
            let of_row =
                arguments![machine.at(&logits), inputs[2].at, targets_at, weights_at, losses_at, count, self.smoothing, share];
            machine.launch(Kernel("cross_entropy", "cross_entropy_rows"), Grid::reducing(n), of_row)?;
            let of_logits =
                Input { at: machine.at(&logits), shape: Shape::from((n, classes)), element: Element::F32, wanted: true };
            let gradient = Factor::new(machine, &of_logits, precision)?;
            machine.multiply(&Product {
                m: n,
                n: width,
                k: classes,
                a: Matrix::rows(gradient.at, classes),
                b: Matrix::rows(weight.at, width),
                c: machine.at(&dx).after(start * width),
                of_result: Element::F32,
                accumulate: false,
                precision,
            })?;
            machine.multiply(&Product {
                m: classes,
                n: width,
                k: n,
                a: Matrix::rows(gradient.at, classes).t(),
                b: Matrix::rows(row(x.at, start), width),
                c: machine.at(&dw),
                of_result: Element::F32,
                accumulate: start > 0,
                precision,
            })?;
            let sums = column_sums(machine, machine.at(&logits), Element::F32, n, classes)?;
            let to = machine.at(&biases).after(chunk * classes);
            fill_rows(machine, machine.at(&sums), to, Element::F32, 1, classes)?;
        }
        let (loss, db) = (machine.allocate(1)?, all_column_sums(machine, biases, chunks, classes)?);
        let mean = arguments![machine.at(&losses), machine.at(&loss), rows as u32, 1.0 / rows as f32];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), mean)?;
        self.gradients.put([dx, dw, db]);
        Ok((loss, Shape::from(())))
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
pub fn tied_cross_entropy(
    inputs: [&Tensor; 3],
    targets: Vec<u32>,
    weights: Option<Vec<f32>>,
    smoothing: f32,
    precision: Precision,
) -> Result<Tensor> {
    let chunk_rows = (CHUNK_LOGITS / inputs[2].elem_count().max(1)).max(1);
    tied_cross_entropy_in_chunks(inputs, targets, weights, smoothing, precision, chunk_rows)
}

/// The same in chunks of `chunk_rows` rows.
pub fn tied_cross_entropy_in_chunks(
    [hidden, weight, bias]: [&Tensor; 3],
    targets: Vec<u32>,
    weights: Option<Vec<f32>>,
    smoothing: f32,
    precision: Precision,
    chunk_rows: usize,
) -> Result<Tensor> {
    let op = TiedCrossEntropy { targets, weights, smoothing, chunk_rows, precision, gradients: Kept::default() };
    hidden.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, OnMachine::of(op))
}
