//! The rows that the layers are given: embedded tokens and regions, packed.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};

use super::super::attention_tables::{filled, unit};
use super::super::layer_norm::{LayerNorm, Parameters};
use super::super::machine::{Address, Element, Machine, Matrix, Product};
use super::super::operator::{Array, Input};
use super::super::rows::{Choosers, Packing, check_ids, select_sums, sum_chosen};
use super::super::{fill_rows, rounded};
use super::stack::ByWeights;
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

/// Numbers of rows, filled up so that they repeat.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sizes {
    /// Text rows and image rows.
    rows: [usize; 2],
    /// Different tokens and positions; none of a table that is not trained.
    chosen: [usize; 2],
}

impl Sizes {
    /// Packed rows.
    pub(super) fn all(&self) -> usize {
        self.rows.iter().sum()
    }

    /// Those of images.
    pub(super) fn images(&self) -> usize {
        self.rows[1]
    }

    fn packing(&self, common: &Common) -> Packing {
        Packing { rows: self.rows, keep: 1.0 - common.rate }
    }
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

    /// Rows of images.
    pub(super) fn image_rows(&self) -> Result<usize> {
        self.images.as_ref().map_or(Ok(0), |[features, _]| features.dim(0))
    }

    /// Whether anything of it has a gradient.
    pub fn is_tracked(&self) -> bool {
        self.features_tracked() || self.weights.iter().any(Tensor::track_op)
    }

    /// Whether the features have a gradient.
    pub(super) fn features_tracked(&self) -> bool {
        self.images.as_ref().is_some_and(|[features, _]| features.track_op())
    }

    /// The matrices that products are made with.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        self.images.iter().flat_map(|_| [FEATURE[0], BOX[0]].map(|number| &self.weights[number]))
    }

    /// Sizes that the pass is filled up to, and the words that it is told: tokens, positions, those of the packing, and who chose each
    /// token and each position.
    ///
    /// # Errors
    /// Rows that are not packed once each; tokens and positions that there are none of; features and boxes that do not fit.
    pub(super) fn told(&self, common: &Common) -> Result<(Sizes, Vec<u32>)> {
        let (counts, tables) = ([self.texts[0].len(), self.image_rows()?], [TOKEN, POSITION].map(|which| &self.weights[which]));
        if self.texts[1].len() != counts[0] {
            candle_core::bail!("{NAME}: {} positions for {} tokens", self.texts[1].len(), counts[0]);
        }
        for (ids, table) in self.texts.iter().zip(tables) {
            check_ids(ids, table.dim(0)?)?;
        }
        for (values, matrix) in self.images.iter().flatten().zip(self.matrices()) {
            let ((rows, inner), weight) = (values.dims2()?, matrix.dims2()?);
            if rows != counts[1] || weight != (self.hidden(), inner) {
                candle_core::bail!("{NAME}: {rows} rows of {inner} values for {} images' rows and {weight:?} weights", counts[1]);
            }
        }
        // Image rows seldom change from batch to batch; text rows may as well be filled up by a part of both.
        let rows = [counts[0].next_multiple_of(unit(counts[0] + counts[1], 128)), filled(counts[1], 128)];
        let rows = rows.map(|rows| rows.next_multiple_of(16));
        let choosers = [0, 1].map(|which| {
            let (table, ids) = (tables[which], &self.texts[which]);
            table.track_op().then(|| Choosers::of(ids, table.elem_count() / self.hidden()))
        });
        // A row of the table that nobody chose costs a block of threads that ends at once.
        let chosen = choosers.each_ref().map(|of| of.as_ref().map_or(0, |of| filled(of.chosen(), 2).next_multiple_of(64)));
        let sizes = Sizes { rows, chosen };
        let mut words = Vec::new();
        for ids in &self.texts {
            words.extend_from_slice(ids);
            words.resize(words.len() + rows[0] - counts[0], 0);
        }
        words.extend(sizes.packing(common).words(&self.order, counts, self.seed)?);
        for (of, chosen) in choosers.into_iter().zip(chosen) {
            words.extend(of.map_or(Vec::new(), |of| of.filled(rows[0], chosen).words()));
        }
        Ok((sizes, words))
    }
}

/// What the rows are embedded with.
pub(super) struct Embedder<'a, M: Machine> {
    pub(super) machine: &'a M,
    pub(super) common: &'a Common,
    pub(super) embedding: &'a Embedding,
    pub(super) sizes: Sizes,
    /// Where the words lie that [`Embedding::told`] gave.
    pub(super) words: Address,
    /// Features and boxes, where they lie, with zeros behind them.
    pub(super) images: Option<[Input; 2]>,
    /// Those of [`Embedding::matrices`].
    pub(super) matrices: &'a [Address],
}

/// What a backward pass takes: sums before they are normalised, of text rows and of image rows. Of the latter the features' bias is still
/// missing.
pub(super) struct Embedded<M: Machine>([Option<Array<M>>; 2]);

/// Gradients by the weights, and by the features where these are tracked.
pub(super) type Found<M> = (ByWeights<M>, Option<Array<M>>);

impl<M: Machine> Embedder<'_, M> {
    fn ids_at(&self) -> [Address; 2] {
        [self.words, self.words.after(self.sizes.rows[0])]
    }

    fn packing_at(&self) -> Address {
        self.words.after(2 * self.sizes.rows[0])
    }

    /// Where the choosers of tokens and of positions begin.
    fn choosers_at(&self) -> [Address; 2] {
        let ([texts, _], [tokens, _]) = (self.sizes.rows, self.sizes.chosen);
        let first = self.packing_at().after(self.sizes.packing(self.common).words_count());
        let of_tokens = if tokens == 0 { 0 } else { tokens + 1 + tokens + texts };
        [first, first.after(of_tokens)]
    }

    fn norm(&self) -> LayerNorm {
        LayerNorm { eps: self.common.eps, keep: None }
    }

    fn weight(&self, number: usize) -> Result<Input> {
        self.machine.place(NAME, &self.embedding.weights[number])
    }

    /// Those of the LayerNorm of texts or images.
    fn parameters(&self, of_images: bool) -> Result<Parameters> {
        let [weight, bias] = if of_images { IMAGE_NORM } else { TEXT_NORM };
        let added = if of_images { self.weight(FEATURE[1])?.at } else { Address::NULL };
        Ok(Parameters { weight: self.weight(weight)?.at, bias: self.weight(bias)?.at, added, seed: Address::NULL })
    }

    fn array(&self, values: M::Values, rows: usize) -> Array<M> {
        Array::new(self.machine, (values, Shape::from((rows, self.embedding.hidden()))), Element::F32)
    }

    /// Asks for the rows to be embedded and packed into `to`, whose other rows become zeros.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn forward(&self, to: &Input) -> Result<Embedded<M>> {
        let (machine, [texts, images], width) = (self.machine, self.sizes.rows, self.embedding.hidden());
        let mut sums = [None, None];
        if texts > 0 {
            let ([ids, places], tables) = (self.ids_at(), [self.weight(TOKEN)?, self.weight(POSITION)?]);
            let sum = select_sums(machine, [(&tables[0], ids), (&tables[1], places)], texts)?;
            sums[0] = Some(self.array(sum, texts));
        }
        if let Some(inputs) = &self.images {
            let sum = machine.allocate(images * width)?;
            fill_rows(machine, self.weight(BOX[1])?.at, machine.at(&sum), Element::F32, images, width)?;
            for (x, &matrix) in inputs.iter().zip(self.matrices) {
                let inner = x.matrix().1;
                machine.multiply(&Product {
                    m: images,
                    n: width,
                    k: inner,
                    a: Matrix::rows(x.at, inner),
                    b: Matrix::rows(matrix, inner).t(),
                    c: machine.at(&sum),
                    stride: width,
                    of_result: Element::F32,
                    accumulate: true,
                    precision: self.common.precision,
                })?;
            }
            sums[1] = Some(self.array(sum, images));
        }
        let mut normalised = [None, None];
        for (of_images, (sum, normalised)) in [false, true].into_iter().zip(sums.iter().zip(&mut normalised)) {
            if let Some(sum) = sum {
                *normalised = Some(self.norm().of(machine, &[sum.input()], &self.parameters(of_images)?)?.0);
            }
        }
        let both = normalised.each_ref().map(|values| values.as_ref().map_or(Address::NULL, |of| machine.at(of)));
        self.sizes.packing(self.common).pack(machine, both, self.packing_at(), to)?;
        Ok(Embedded(sums))
    }

    /// Gradients, of that by the packed rows.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn backward(&self, Embedded([texts, images]): Embedded<M>, by_packed: &Input) -> Result<Found<M>> {
        let (machine, weights, width) = (self.machine, &self.embedding.weights, self.embedding.hidden());
        let [by_texts, by_images] = self.sizes.rows.map(|rows| Array::empty(machine, (rows, width), Element::F32));
        let (by_texts, by_images) = (by_texts?, by_images?);
        let both = [&by_texts, &by_images].map(|by| by.input().at);
        self.sizes.packing(self.common).unpack(machine, by_packed, self.packing_at(), both)?;

        let mut found = ByWeights::new();
        if let Some(sum) = texts {
            let by = self.norm().gradients(machine, &[sum.input()], &self.parameters(false)?, &by_texts.input())?;
            found.put(machine, by.by_parameters, weights, &TEXT_NORM);
            let tables = [TOKEN, POSITION].into_iter().zip(self.choosers_at()).zip(self.sizes.chosen);
            for ((which, choosers), chosen) in tables.filter(|((which, _), _)| weights[*which].track_op()) {
                let by_table = sum_chosen(machine, weights[which].dims2()?, (choosers, chosen), machine.at(&by.by_sum))?;
                found.put(machine, by_table, weights, &[which]);
            }
        }
        let (Some(sum), Some(inputs)) = (images, &self.images) else { return Ok((found, None)) };
        let by = self.norm().gradients(machine, &[sum.input()], &self.parameters(true)?, &by_images.input())?;
        // Both biases are added to the same sum.
        let by_bias = machine.at(&by.by_parameters).after(2 * width);
        if weights[BOX[1]].track_op() {
            found.places.push((BOX[1], by_bias, width));
        }
        found.put(machine, by.by_parameters, weights, &[IMAGE_NORM[0], IMAGE_NORM[1], FEATURE[1]]);
        let rows = self.sizes.rows[1];
        let (element, precision) = (Element::of(self.common.precision), self.common.precision);
        let by_sum = match element {
            Element::F32 => by.by_sum,
            Element::Bf16 => rounded(machine, machine.at(&by.by_sum), rows * width)?,
        };
        let by_sum_at = machine.at(&by_sum);
        for (x, number) in inputs.iter().zip([FEATURE[0], BOX[0]]).filter(|(_, number)| weights[*number].track_op()) {
            let inner = x.matrix().1;
            let by_weight = machine.allocate(width * inner)?;
            machine.multiply(&Product {
                m: width,
                n: inner,
                k: rows,
                a: Matrix::rows(by_sum_at, width).t(),
                b: Matrix::rows(x.at, inner),
                c: machine.at(&by_weight),
                stride: inner,
                of_result: Element::F32,
                accumulate: false,
                precision,
            })?;
            found.put(machine, by_weight, weights, &[number]);
        }
        if !self.embedding.features_tracked() {
            return Ok((found, None));
        }
        let by_features = Array::empty(machine, inputs[0].shape.clone(), Element::F32)?;
        let inner = inputs[0].matrix().1;
        machine.multiply(&Product {
            m: rows,
            n: inner,
            k: width,
            a: Matrix::rows(by_sum_at, width),
            b: Matrix::rows(self.matrices[0], inner),
            c: by_features.input().at,
            stride: inner,
            of_result: Element::F32,
            accumulate: false,
            precision,
        })?;
        Ok((found, Some(by_features)))
    }
}
