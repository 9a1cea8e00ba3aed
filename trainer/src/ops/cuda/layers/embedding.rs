//! The rows that the layers are given: embedded tokens and regions, packed.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::super::elementwise::add_to;
use super::super::layer_norm::{LayerNorm, Parameters};
use super::super::linear::Linear;
use super::super::machine::{Address, Element, Machine};
use super::super::operator::{Input, Operator};
use super::super::rows::{PackRows, by_table, selected};
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
    /// What the packing is told.
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

    fn packing(&self, common: &Common) -> Result<PackRows> {
        let [tokens, positions] = self.texts.each_ref().map(|of| of.len());
        if tokens != positions {
            candle_core::bail!("{NAME}: {positions} positions for {tokens} tokens");
        }
        PackRows::new(&self.order, self.counts()?, (common.rate, self.seed))
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
    /// Rows that are not packed once each; tokens and positions that there are none of; those of candle.
    pub(super) fn forward<M: Machine>(&self, machine: &M, common: &Common, to: &Input) -> Result<Embedded<M>> {
        let packing = self.packing(common)?;
        let words = machine.upload(packing.words())?;
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
        let both = normalised.each_ref().map(|values| values.as_ref().map_or(Address::NULL, |of| machine.at(of)));
        packing.pack(machine, both, machine.words_at(&words), to)?;
        Ok(Embedded { sums, words })
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
        let (counts, width) = (self.counts()?, self.hidden());
        let [by_texts, by_images] = counts.map(|count| machine.allocate(count * width));
        let (by_texts, by_images) = (by_texts?, by_images?);
        let both = [machine.at(&by_texts), machine.at(&by_images)];
        self.packing(common)?.unpack(machine, by_packed, machine.words_at(&embedded.words), both)?;

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
