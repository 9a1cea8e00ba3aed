//! The rows that the layers are given: embedded tokens and regions, packed.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::super::draws;
use super::super::elementwise::add_to;
use super::super::layer_norm::{LayerNorm, Parameters};
use super::super::linear::Linear;
use super::super::machine::{Address, Element, Grid, Kernel, Machine, THREADS, arguments};
use super::super::operator::{Input, Operator};
use super::super::rows::{by_table, selected};
use super::{Common, NAME};

/// Weights of the embeddings, in this order.
pub const EMBEDDING_WEIGHTS: [&str; 10] = [
    "text.token.weight",
    "text.position.weight",
    "text.norm.weight",
    "text.norm.bias",
    "image.feature.weight",
    "image.feature.bias",
    "image.box.weight",
    "image.box.bias",
    "image.norm.weight",
    "image.norm.bias",
];

const TOKEN: usize = 0;
const POSITION: usize = 1;
const TEXT_NORM: [usize; 2] = [2, 3];
const FEATURE: [usize; 2] = [4, 5];
const BOX: [usize; 2] = [6, 7];
const IMAGE_NORM: [usize; 2] = [8, 9];

/// What rows are made of.
pub struct Embedding {
    /// Token and position of each text row.
    pub texts: [Arc<[u32]>; 2],
    /// Of the image rows, standardised features `[image rows, region_feature]` and boxes `[image rows, 5]`.
    pub images: Option<[Tensor; 2]>,
    /// For each packed row, its place in texts ++ images: each of these once.
    pub order: Arc<[u32]>,
    /// Those of [`EMBEDDING_WEIGHTS`], f32. Of one that is not tracked no gradient is told.
    pub weights: [Tensor; EMBEDDING_WEIGHTS.len()],
    /// Seed of the dropout of packed rows.
    pub seed: u32,
}

/// Gradients by what embeds the rows.
pub struct ByEmbedding {
    /// By the weights.
    pub weights: [Option<Tensor>; EMBEDDING_WEIGHTS.len()],
    /// By the standardised features, where they are tracked.
    pub features: Option<Tensor>,
}

/// What a backward pass takes.
pub(super) struct Embedded<M: Machine> {
    /// Sums before they are normalised, of text rows and of image rows.
    sums: [Option<M::Values>; 2],
    /// Where each packed row comes from, and then where each text row and image row is packed.
    words: M::Words,
}

impl Embedding {
    /// Packed rows.
    pub fn rows(&self) -> usize {
        self.order.len()
    }

    /// Width of a row.
    pub fn hidden(&self) -> usize {
        self.weights[TEXT_NORM[0]].elem_count()
    }

    /// Text rows and image rows.
    fn counts(&self) -> Result<[usize; 2]> {
        let images = self.images.as_ref().map_or(Ok(0), |[features, _]| features.dim(0))?;
        Ok([self.texts[0].len(), images])
    }

    /// Whether anything of it has a gradient.
    pub fn is_tracked(&self) -> bool {
        let features = self.images.as_ref().is_some_and(|[features, _]| features.track_op());
        features || self.weights.iter().any(Tensor::track_op)
    }

    /// For each text row and image row, which packed row it is.
    ///
    /// # Errors
    /// Rows that are packed twice or not at all; positions for another number of tokens.
    fn places(&self) -> Result<Vec<u32>> {
        const NOWHERE: u32 = u32::MAX;
        let [texts, images] = self.counts()?;
        let mut places = vec![NOWHERE; texts + images];
        for (packed, &source) in (0..).zip(self.order.iter()) {
            match places.get_mut(source as usize) {
                Some(place) if *place == NOWHERE => *place = packed,
                _ => candle_core::bail!("{NAME}: row {source} of {} is packed twice, or is none", texts + images),
            }
        }
        if places.len() != self.rows() || self.texts[1].len() != texts {
            candle_core::bail!("{NAME}: {} rows are packed of {texts} and {images}", self.rows());
        }
        Ok(places)
    }

    fn weight<M: Machine>(&self, machine: &M, number: usize) -> Result<Input> {
        machine.place(NAME, &self.weights[number])
    }

    /// A linear layer's inputs.
    fn inputs<M: Machine>(&self, machine: &M, x: &Tensor, [weight, bias]: [usize; 2]) -> Result<[Input; 3]> {
        Ok([machine.place(NAME, x)?, self.weight(machine, weight)?, self.weight(machine, bias)?])
    }

    fn parameters<M: Machine>(&self, machine: &M, [weight, bias]: [usize; 2]) -> Result<Parameters> {
        let (weight, bias) = (self.weight(machine, weight)?.at, self.weight(machine, bias)?.at);
        Ok(Parameters { weight, bias, added: Address::NULL, seed: Address::NULL })
    }

    fn array<M: Machine>(&self, machine: &M, values: &M::Values, rows: usize) -> Input {
        let shape = Shape::from((rows, self.hidden()));
        Input { at: machine.at(values), shape, element: Element::F32, wanted: true }
    }

    /// Asks for the rows to be embedded and packed into `to`, whose other rows become zeros.
    ///
    /// # Errors
    /// As [`Self::places`]; tokens and positions that there are none of, and those of candle.
    pub(super) fn forward<M: Machine>(&self, machine: &M, common: &Common, to: &Input) -> Result<Embedded<M>> {
        let words = machine.upload(&[&self.order[..], &self.places()?].concat())?;
        let (norm, linear) = (LayerNorm { eps: common.eps, keep: None }, Linear { precision: common.precision });
        let [texts, images] = self.counts()?;
        let (mut sums, mut normalised) = ([None, None], [None, None]);
        if texts > 0 {
            let [tokens, places] = [TOKEN, POSITION].map(|which| {
                let table = self.weight(machine, which)?;
                selected(machine, &table, &self.texts[which])
            });
            let (tokens, places) = (tokens?, places?);
            let sum = self.array(machine, &tokens, texts);
            add_to(machine, &self.array(machine, &places, texts), sum.at)?;
            normalised[0] = Some(norm.of(machine, &[sum], &self.parameters(machine, TEXT_NORM)?)?.0);
            sums[0] = Some(tokens);
        }
        if let Some([features, boxes]) = &self.images {
            let (of_features, _) = linear.forward(machine, &self.inputs(machine, features, FEATURE)?)?;
            let (of_boxes, _) = linear.forward(machine, &self.inputs(machine, boxes, BOX)?)?;
            let sum = self.array(machine, &of_features, images);
            add_to(machine, &self.array(machine, &of_boxes, images), sum.at)?;
            normalised[1] = Some(norm.of(machine, &[sum], &self.parameters(machine, IMAGE_NORM)?)?.0);
            sums[1] = Some(of_features);
        }
        let ((rows, width), (limit, scale)) = (to.matrix(), draws(1.0 - common.rate));
        let [first, second] = normalised.each_ref().map(|values| values.as_ref().map_or(Address::NULL, |of| machine.at(of)));
        let from = arguments![first, second, texts as u32, machine.words_at(&words), to.at, rows as u32, self.rows() as u32];
        let last = arguments![width as u32, self.seed, limit, scale];
        let kernel = Kernel::on(to.element, "rows", ["pack_rows", "pack_rows_bf16"]);
        machine.launch(kernel, Self::grid(rows, width), &[&from[..], last].concat())?;
        Ok(Embedded { sums, words })
    }

    /// A thread for every eight columns of every row.
    fn grid(rows: usize, width: usize) -> Grid {
        Grid { blocks: [(rows * width.div_ceil(8)).div_ceil(THREADS).max(1), 1, 1], threads: THREADS, shared: 0 }
    }

    /// Gradients, of that by the packed rows.
    pub(super) fn backward<M: Machine>(
        &self,
        machine: &M,
        common: &Common,
        embedded: Embedded<M>,
        by_packed: &Input,
    ) -> Result<ByEmbedding> {
        let (norm, linear) = (LayerNorm { eps: common.eps, keep: None }, Linear { precision: common.precision });
        let (counts, width, (limit, scale)) = (self.counts()?, self.hidden(), draws(1.0 - common.rate));
        let [by_texts, by_images] = counts.map(|count| machine.allocate(count * width));
        let (by_texts, by_images) = (by_texts?, by_images?);
        let places = machine.words_at(&embedded.words).after(self.rows());
        let to = arguments![by_packed.at, machine.at(&by_texts), machine.at(&by_images), counts[0] as u32];
        let from = arguments![places, self.rows() as u32, width as u32, self.seed, limit, scale];
        let kernel = Kernel::on(by_packed.element, "rows", ["pack_rows_backward", "pack_rows_backward_bf16"]);
        machine.launch(kernel, Self::grid(self.rows(), width), &[&to[..], from].concat())?;

        let mut by = ByEmbedding { weights: Default::default(), features: None };
        // By what is normalised, and by weight and bias of the LayerNorm.
        let of_norm = |sum: &M::Values, rows: usize, gradient: &M::Values, numbers: [usize; 2]| -> Result<(M::Values, Tensor)> {
            let (sum, gradient) = (self.array(machine, sum, rows), self.array(machine, gradient, rows));
            let found = norm.gradients(machine, &[sum], &self.parameters(machine, numbers)?, &gradient)?;
            Ok((found.by_sum, machine.tensor(found.by_parameters, &Shape::from((2, width)))?))
        };
        let [texts, images] = embedded.sums;
        if let Some(sum) = texts {
            let (by_sum, by_norm) = of_norm(&sum, counts[0], &by_texts, TEXT_NORM)?;
            for (row, number) in TEXT_NORM.into_iter().enumerate() {
                by.weights[number] = Some(by_norm.get(row)?);
            }
            for which in [TOKEN, POSITION].into_iter().filter(|&which| self.weights[which].track_op()) {
                let values = by_table(machine, self.weights[which].dims2()?, &self.texts[which], machine.at(&by_sum))?;
                by.weights[which] = Some(machine.tensor(values, self.weights[which].shape())?);
            }
        }
        if let (Some(sum), Some([features, boxes])) = (images, &self.images) {
            let (memory, by_norm) = of_norm(&sum, counts[1], &by_images, IMAGE_NORM)?;
            for (row, number) in IMAGE_NORM.into_iter().enumerate() {
                by.weights[number] = Some(by_norm.get(row)?);
            }
            let by_sum = self.array(machine, &memory, counts[1]);
            for (x, numbers) in [(features, FEATURE), (boxes, BOX)] {
                let mut found = linear.gradients(machine, &self.inputs(machine, x, numbers)?, &by_sum, None)?.into_iter();
                if let Some(values) = found.next().flatten() {
                    by.features = Some(machine.tensor(values, x.shape())?);
                }
                for (number, values) in numbers.into_iter().zip(found) {
                    by.weights[number] = values.map(|values| machine.tensor(values, self.weights[number].shape())).transpose()?;
                }
            }
        }
        for (gradient, weight) in by.weights.iter_mut().zip(&self.weights) {
            gradient.take_if(|_| !weight.track_op());
        }
        Ok(by)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn every_row_is_packed_once() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let places = |order: &[u32], positions: &[u32]| {
            let weights = std::array::from_fn(|_| zeros(&[4]));
            let images = Some([zeros(&[2, 3]), zeros(&[2, 5])]);
            Embedding { texts: [[7, 8].into(), positions.into()], images, order: order.into(), weights, seed: 0 }.places()
        };
        assert_eq!(places(&[2, 0, 3, 1], &[0, 1]).unwrap(), [1, 3, 0, 2]);
        for (order, positions, expected) in [
            (&[2, 0, 2, 1][..], &[0, 1][..], "row 2 of 4 is packed twice"),
            (&[2, 0, 4, 1], &[0, 1], "row 4 of 4 is packed twice, or is none"),
            (&[2, 0, 1], &[0, 1], "3 rows are packed of 2 and 2"),
            (&[2, 0, 3, 1], &[0], "4 rows are packed of 2 and 2"),
        ] {
            let error = places(order, positions).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
