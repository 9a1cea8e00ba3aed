//! The contrasts of a step over all ranks.
//!
//! Every rank encodes its own samples; embeddings, and nothing else, are gathered. A rank computes the rows of its own pictures
//! and of its own texts of the matrix of similarities, one other rank's columns at a time and each of them twice: once for the
//! sums of exponentials, once for the gradients. In between, ranks tell each other those sums. So no rank holds more than a block
//! of its own rows by another's columns, no gradient travels, and the gradients by its own embeddings, which it carries back
//! through its own passes, are those of one process that holds all.

mod exchange;

use anyhow::Result;
use candle_core::{D, Device, Tensor};

use self::exchange::{Block, Sums, exchange, gather};
use super::Collective;
use crate::objectives::LEAST_SHARE;

/// In place of −∞, which no difference may be taken of.
const NOTHING: f32 = -1e30;

/// What a rank has encoded, without gradients, and who belongs to whom. Pictures are numbered over all ranks, in their order.
pub struct Own<'a> {
    /// Unit-length embeddings `[n, embedding]` of its pictures, its captions, images retrieved for its pictures and texts
    /// retrieved for them; then the logits `[n]` of jointly encoded pairs. Each absent where there are none.
    pub encoded: &'a [Option<Tensor>; 5],
    /// Picture of each caption.
    pub image_of_text: &'a [usize],
    /// Picture of each retrieved image.
    pub retrieved_image_of: &'a [usize],
    /// Picture of each retrieved text.
    pub retrieved_text_of: &'a [usize],
    /// Picture of each pair encoded jointly.
    pub joint_image_of: &'a [usize],
    /// Whether each of these belongs together.
    pub joint_labels: &'a [f32],
}

impl<'a> Own<'a> {
    /// Pictures and captions encoded alone and nothing else, whose captions' pictures are still to be told.
    #[must_use]
    pub fn separate(encoded: &'a [Option<Tensor>; 5]) -> Self {
        Self {
            encoded,
            image_of_text: &[],
            retrieved_image_of: &[],
            retrieved_text_of: &[],
            joint_image_of: &[],
            joint_labels: &[],
        }
    }
}

/// Weights of the two contrasts, and what their scores are divided by.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Weight of the contrast of separately encoded images and texts.
    pub contrast: f64,
    /// Weight of the cross-modal contrast (arXiv 2012.15409, equation 1).
    pub cross_modal: f64,
    /// Temperature.
    pub temperature: f64,
    /// Width of the embeddings.
    pub width: usize,
}

/// What the contrasts teach a rank.
#[derive(Debug, Clone)]
pub struct Compared {
    /// This rank's parts of the two losses, unweighted: the losses are their sums over the ranks.
    pub losses: [f64; 2],
    /// Gradients of the weighted sum of the whole losses by what this rank has encoded.
    pub gradients: [Option<Tensor>; 5],
    /// This rank's part of the gradient by the temperature.
    pub by_temperature: f64,
}

/// What only the rank itself needs.
#[derive(Debug, Clone, Default)]
struct Positives {
    /// Of each picture with its own texts.
    image: Vec<f64>,
    /// Of the positives in each picture's cross-modal contrast; ∞ where there is none.
    cross: Vec<f64>,
}

/// Scores of this rank's own samples with each other, `[row][column]`.
#[derive(Default)]
struct Scores {
    /// Pictures by texts.
    pairs: Vec<Vec<f32>>,
    /// Retrieved images by texts.
    found_images: Vec<Vec<f32>>,
    /// Pictures by retrieved texts.
    found_texts: Vec<Vec<f32>>,
    joint: Vec<f32>,
}

/// Factors of the gradient's parts: weights over the number of terms that a mean is taken of.
struct Factors {
    image: f64,
    text: f64,
    cross: f64,
}

/// Both contrasts over what all ranks have encoded. Every rank calls it, also one that has nothing to compare.
///
/// # Errors
/// Those of candle; a rank that is gone, or whose captions are not of its own pictures.
pub fn compare(ranks: &dyn Collective, own: &Own, settings: &Settings, device: &Device) -> Result<Compared> {
    let blocks = gather(ranks, own, settings.width, device)?;
    let here = Here { own, settings, blocks: &blocks, rank: ranks.rank(), device };
    let scores = here.scores()?;
    let (sums, positives) = here.sums(&scores)?;
    let all = exchange(ranks, &sums)?;
    let described = blocks.iter().map(|b| b.first..b.first + b.image_count()).zip(&blocks);
    let described = described.flat_map(|(images, b)| images.filter(|image| b.image_of_text.contains(image))).count();
    let share = |weight: f64, count: usize| if count == 0 { 0.0 } else { weight / count as f64 };
    let texts = blocks.iter().map(|b| b.image_of_text.len()).sum();
    let crossed = all.iter().flat_map(|sums| &sums.cross).filter(|sum| sum.is_finite()).count();
    let (half, one) = (settings.contrast * 0.5, settings.cross_modal);
    let factors = Factors { image: share(half, described), text: share(half, texts), cross: share(one, crossed) };
    let [mut contrast, mut cross] = [0.0; 2];
    for (number, (all, own)) in sums.image.iter().zip(&positives.image).enumerate() {
        if here.texts_of(number).next().is_some() {
            contrast -= share(0.5, described) * ((own - all).exp() + LEAST_SHARE).ln();
        }
    }
    for (text, &image) in own.image_of_text.iter().enumerate() {
        contrast += share(0.5, texts) * (sums.text[text] - f64::from(scores.pairs[here.place(image)][text]));
    }
    for (all, own) in sums.cross.iter().zip(&positives.cross).filter(|(all, _)| all.is_finite()) {
        cross += share(1.0, crossed) * (all - own);
    }
    let (gradients, by_temperature) = here.gradients(&scores, &all, &positives, &factors)?;
    Ok(Compared { losses: [contrast, cross], gradients, by_temperature })
}

/// Logarithm of the sum of exponentials.
fn log_sum(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.iter().map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// A rank's own part of the matrix of similarities.
struct Here<'a> {
    own: &'a Own<'a>,
    settings: &'a Settings,
    blocks: &'a [Block],
    rank: usize,
    device: &'a Device,
}

impl Here<'_> {
    fn mine(&self) -> &Block {
        &self.blocks[self.rank]
    }

    /// Place of a picture among this rank's.
    fn place(&self, image: usize) -> usize {
        image - self.mine().first
    }

    /// Texts of the picture at a place.
    fn texts_of(&self, place: usize) -> impl Iterator<Item = usize> + '_ {
        numbered(self.own.image_of_text, place + self.mine().first)
    }

    /// Scores `[rows, columns]`.
    fn similarity(&self, rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
        Ok(rows.matmul(&columns.t()?)?.affine(1.0 / self.settings.temperature, 0.0)?)
    }

    fn scores(&self) -> Result<Scores> {
        let [_, _, found_images, found_texts, joint] = self.own.encoded;
        let (Some(images), Some(texts)) = (&self.mine().images, &self.mine().texts) else { return Ok(Scores::default()) };
        let between = |rows: &Option<Tensor>, columns: &Option<Tensor>| -> Result<Vec<Vec<f32>>> {
            let (Some(rows), Some(columns)) = (rows, columns) else { return Ok(Vec::new()) };
            Ok(self.similarity(rows, columns)?.to_vec2()?)
        };
        let (images, texts) = (Some(images.clone()), Some(texts.clone()));
        Ok(Scores {
            pairs: between(&images, &texts)?,
            found_images: between(found_images, &texts)?,
            found_texts: between(&images, found_texts)?,
            joint: joint.as_ref().map(Tensor::to_vec1).transpose()?.unwrap_or_default(),
        })
    }

    /// Scores of the picture at a place with what was retrieved for it, and with its texts what was: all of them positives.
    fn found(&self, scores: &Scores, place: usize) -> Vec<f64> {
        let image = place + self.mine().first;
        let of_images = numbered(self.own.retrieved_image_of, image)
            .flat_map(|found| self.texts_of(place).map(move |text| (found, text)))
            .map(|(found, text)| scores.found_images[found][text]);
        let of_texts = numbered(self.own.retrieved_text_of, image).map(|found| scores.found_texts[place][found]);
        of_images.chain(of_texts).map(f64::from).collect()
    }

    fn sums(&self, scores: &Scores) -> Result<(Sums, Positives)> {
        let (mut sums, mut positives) = (Sums::default(), Positives::default());
        let mine = self.mine();
        let Some(images) = &mine.images else { return Ok((sums, positives)) };
        let of_rows = |parts: Vec<Tensor>, rows: usize| -> Result<Vec<f64>> {
            let parts: Vec<Vec<f32>> = parts.iter().map(Tensor::to_vec1).collect::<candle_core::Result<_>>()?;
            Ok((0..rows).map(|row| log_sum(&parts.iter().map(|part| f64::from(part[row])).collect::<Vec<_>>())).collect())
        };
        let mut parts = Vec::new();
        for texts in self.blocks.iter().filter_map(|block| block.texts.as_ref()) {
            parts.push(self.similarity(images, texts)?.log_sum_exp(D::Minus1)?);
        }
        sums.image = of_rows(parts, images.dim(0)?)?;
        let mut of_other_images = Vec::new();
        if let Some(texts) = &mine.texts {
            let (mut all, mut others) = (Vec::new(), Vec::new());
            for (rank, block) in self.blocks.iter().enumerate() {
                let Some(images) = &block.images else { continue };
                let scores = self.similarity(texts, images)?;
                let sum = scores.log_sum_exp(D::Minus1)?;
                others.push(match rank == self.rank {
                    true => (scores + self.own_pairs(0.0, 1.0)?.affine(f64::from(NOTHING), 0.0)?.t()?)?.log_sum_exp(D::Minus1)?,
                    false => sum.clone(),
                });
                all.push(sum);
            }
            sums.text = of_rows(all, texts.dim(0)?)?;
            of_other_images = of_rows(others, texts.dim(0)?)?;
        }
        for (place, &all) in sums.image.iter().enumerate() {
            let own: Vec<f64> = self.texts_of(place).map(|text| f64::from(scores.pairs[place][text])).collect();
            // Nothing is made of the sum of a picture without texts, whose weight is 0.
            let sum = if own.is_empty() { 0.0 } else { log_sum(&own) };
            let share = (sum - all).exp();
            sums.weight.push(if own.is_empty() { 0.0 } else { share / (share + LEAST_SHARE) });
            positives.image.push(sum);
            let joint = numbered(self.own.joint_image_of, place + mine.first);
            let joint: Vec<(f64, bool)> =
                joint.map(|pair| (f64::from(scores.joint[pair]), self.own.joint_labels[pair] > 0.5)).collect();
            let found = self.found(scores, place);
            let own: Vec<f64> = [own, found.clone(), joint.iter().filter(|j| j.1).map(|j| j.0).collect()].concat();
            if own.is_empty() || self.settings.cross_modal == 0.0 {
                sums.cross.push(f64::INFINITY);
                positives.cross.push(f64::INFINITY);
                continue;
            }
            let against = self.texts_of(place).map(|text| of_other_images[text]).collect();
            sums.cross.push(log_sum(&[vec![all], against, found, joint.iter().map(|j| j.0).collect()].concat()));
            positives.cross.push(log_sum(&own));
        }
        Ok((sums, positives))
    }

    /// `[pictures, texts]` of this rank, with `own` where they belong together and `other` where not.
    fn own_pairs(&self, other: f32, own: f32) -> Result<Tensor> {
        let (images, texts) = (self.mine().image_count(), self.own.image_of_text.len());
        let mut values = vec![other; images * texts];
        for (text, &image) in self.own.image_of_text.iter().enumerate() {
            values[self.place(image) * texts + text] = own;
        }
        Ok(Tensor::from_vec(values, (images, texts), self.device)?)
    }

    fn column(&self, values: impl Iterator<Item = f64>) -> Result<Tensor> {
        let values: Vec<f32> = values.map(|value| value as f32).collect();
        let count = values.len();
        Ok(Tensor::from_vec(values, (count, 1), self.device)?)
    }

    /// Gradient by the scores `[pictures, texts]` of rank `of_images`' pictures with rank `of_texts`' texts.
    fn by_scores(
        &self,
        scores: &Tensor,
        [of_images, of_texts]: [usize; 2],
        all: &[Sums],
        positives: &Positives,
        factors: &Factors,
    ) -> Result<Tensor> {
        let (images, texts) = (&all[of_images], &all[of_texts]);
        let block = &self.blocks[of_texts];
        let weight = self.column(images.weight.iter().map(|weight| weight * factors.image))?;
        let cross = self.column(images.cross.iter().copied())?;
        let cross_of_text = self.column(block.image_of_text.iter().map(|image| texts.cross[image - block.first]))?.t()?;
        let exp = |scores: &Tensor, sums: &Tensor| -> candle_core::Result<Tensor> { scores.broadcast_sub(sums)?.exp() };
        let mut gradient = exp(scores, &self.column(images.image.iter().copied())?)?.broadcast_mul(&weight)?;
        gradient = (gradient + exp(scores, &self.column(texts.text.iter().copied())?.t()?)?.affine(factors.text, 0.0)?)?;
        // A text counts in its own picture's contrast as well as in the other picture's.
        let crossed = (exp(scores, &cross)? + exp(scores, &cross_of_text)?)?;
        gradient = (gradient + crossed.affine(factors.cross, 0.0)?)?;
        if of_images != of_texts {
            return Ok(gradient);
        }
        // Where both belong together, it counts once, and as a positive.
        let own = (scores + self.own_pairs(NOTHING, 0.0)?)?;
        let positive = exp(&own, &self.column(positives.image.iter().copied())?)?.broadcast_mul(&weight)?;
        let crossed = (exp(&own, &cross)? + exp(&own, &self.column(positives.cross.iter().copied())?)?)?;
        let less = (positive + crossed.affine(factors.cross, 0.0)?)?;
        Ok(((gradient - less)? - self.own_pairs(0.0, 1.0)?.affine(factors.text, 0.0)?)?)
    }

    /// Gradients by what this rank has encoded, and its part of that by the temperature.
    fn gradients(
        &self,
        scores: &Scores,
        all: &[Sums],
        positives: &Positives,
        factors: &Factors,
    ) -> Result<([Option<Tensor>; 5], f64)> {
        let mine = self.mine();
        let (Some(images), Some(texts)) = (&mine.images, &mine.texts) else { return Ok((Default::default(), 0.0)) };
        let scale = 1.0 / self.settings.temperature;
        let (mut by_image, mut by_text) = (images.zeros_like()?, texts.zeros_like()?);
        let mut by_temperature = 0.0;
        for (rank, block) in self.blocks.iter().enumerate() {
            if let Some(their_texts) = &block.texts {
                let scores = self.similarity(images, their_texts)?;
                let gradient = self.by_scores(&scores, [self.rank, rank], all, positives, factors)?;
                by_image = (by_image + gradient.matmul(their_texts)?.affine(scale, 0.0)?)?;
                by_temperature -= scale * f64::from((scores * &gradient)?.sum_all()?.to_scalar::<f32>()?);
            }
            if let Some(their_images) = &block.images {
                let scores = self.similarity(their_images, texts)?;
                let gradient = self.by_scores(&scores, [rank, self.rank], all, positives, factors)?;
                by_text = (by_text + gradient.t()?.matmul(their_images)?.affine(scale, 0.0)?)?;
            }
        }
        let mut gradients: [Option<Tensor>; 5] = Default::default();
        let sums = &all[self.rank];
        let positive = |place: usize, score: f32| {
            let score = f64::from(score);
            factors.cross * ((score - sums.cross[place]).exp() - (score - positives.cross[place]).exp())
        };
        if let Some(found) = &self.own.encoded[2] {
            let mut by_score = vec![0f32; scores.found_images.len() * self.own.image_of_text.len()];
            for (row, &image) in self.own.retrieved_image_of.iter().enumerate() {
                for text in numbered(self.own.image_of_text, image) {
                    let score = scores.found_images[row][text];
                    by_score[row * self.own.image_of_text.len() + text] = positive(self.place(image), score) as f32;
                    by_temperature -= scale * f64::from(score) * positive(self.place(image), score);
                }
            }
            let by_score = Tensor::from_vec(by_score, (found.dim(0)?, texts.dim(0)?), self.device)?;
            gradients[2] = Some(by_score.matmul(texts)?.affine(scale, 0.0)?);
            by_text = (by_text + by_score.t()?.matmul(found)?.affine(scale, 0.0)?)?;
        }
        if let Some(found) = &self.own.encoded[3] {
            let count = self.own.retrieved_text_of.len();
            let mut by_score = vec![0f32; images.dim(0)? * count];
            for (column, &image) in self.own.retrieved_text_of.iter().enumerate() {
                let (place, score) = (self.place(image), scores.found_texts[self.place(image)][column]);
                by_score[place * count + column] = positive(place, score) as f32;
                by_temperature -= scale * f64::from(score) * positive(place, score);
            }
            let by_score = Tensor::from_vec(by_score, (images.dim(0)?, count), self.device)?;
            gradients[3] = Some(by_score.t()?.matmul(images)?.affine(scale, 0.0)?);
            by_image = (by_image + by_score.matmul(found)?.affine(scale, 0.0)?)?;
        }
        if self.own.encoded[4].is_some() {
            let by_score = scores.joint.iter().zip(self.own.joint_image_of).zip(self.own.joint_labels);
            let by_score = by_score.map(|((&score, &image), &label)| match label > 0.5 {
                true => positive(self.place(image), score) as f32,
                false => (factors.cross * (f64::from(score) - sums.cross[self.place(image)]).exp()) as f32,
            });
            gradients[4] = Some(Tensor::from_iter(by_score.collect::<Vec<_>>(), self.device)?);
        }
        (gradients[0], gradients[1]) = (Some(by_image), Some(by_text));
        Ok((gradients, by_temperature))
    }
}

/// Places at which `of` holds a number.
fn numbered(of: &[usize], number: usize) -> impl Iterator<Item = usize> + '_ {
    of.iter().enumerate().filter(move |(_, other)| **other == number).map(|(place, _)| place)
}

#[cfg(test)]
mod tests;
