//! Objectives as computations of what they read off the hidden states: losses, and what the contrasts compare.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::contrastive::contrastive_part;
use crate::model::{Dropout, EmbeddedImages, TEMPERATURE, Unimo};
use crate::ops::{Computation, Operators, Relations, Scores, Targets};
use crate::tasks::{Goal, task_loss};

fn given<'a, const N: usize, A>(name: &str, given: &'a [A]) -> Result<&'a [A; N]> {
    match given.try_into() {
        Ok(given) => Ok(given),
        Err(_) => candle_core::bail!("{name} is computed of {N} arrays, not of {}", given.len()),
    }
}

/// Words that are predicted, of their rows: one loss of all parts.
pub(crate) struct Language<'a> {
    pub model: &'a Unimo,
    pub targets: &'a Targets,
}

impl Computation for Language<'_> {
    const NAME: &'static str = "language";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let [rows] = given(Self::NAME, arrays)?;
        Ok(vec![self.model.language_losses(on, rows, self.targets)?])
    }
}

/// Sampled words, of their rows, whose advantages are the targets' weights: one loss.
pub(crate) struct Policy<'a> {
    pub model: &'a Unimo,
    pub targets: &'a Targets,
    /// That they were sampled at.
    pub temperature: f64,
}

impl Computation for Policy<'_> {
    const NAME: &'static str = "policy";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let [rows] = given(Self::NAME, arrays)?;
        Ok(vec![self.model.policy_loss(on, rows, self.targets, self.temperature)?])
    }
}

/// Which pairs belong together, of the rows of `[IMG]` and `[CLS]`: the mean binary cross-entropy with labels 0 or 1.
pub(crate) struct Matching<'a> {
    pub model: &'a Unimo,
    pub labels: &'a [f32],
}

impl Computation for Matching<'_> {
    const NAME: &'static str = "matching";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let [images, texts] = given(Self::NAME, arrays)?;
        let labels = on.constants(self.labels.to_vec(), (self.labels.len(), 1))?;
        Ok(vec![on.binary_cross_entropy(&self.model.match_logits(on, images, texts)?, &labels)?])
    }
}

/// A downstream task's examples, of the rows of `[CLS]` and, where there are pictures, of `[IMG]`.
pub(crate) struct Task<'a> {
    pub model: &'a Unimo,
    pub classes: usize,
    pub goal: Goal,
    pub targets: &'a [&'a [(u32, f32)]],
}

impl Computation for Task<'_> {
    const NAME: &'static str = "task";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let (text, image) = match arrays {
            [text] => (text, None),
            [text, image] => (text, Some(image)),
            _ => candle_core::bail!("{} is computed of one or two arrays", Self::NAME),
        };
        let logits = self.model.task_logits(on, image, text)?;
        Ok(vec![task_loss(on, &logits, self.classes, self.goal, self.targets)?])
    }
}

/// What masked regions were, of their rows and their features `[n, region_feature]`: the mean squared error of these; with soft labels
/// `[n, region_classes]`, also the cross-entropy, whose gradient is that of the Kullback–Leibler divergence.
pub(crate) struct Regions<'a> {
    pub model: &'a Unimo,
}

impl Computation for Regions<'_> {
    const NAME: &'static str = "masked_regions";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let (rows, features, labels) = match arrays {
            [rows, features] => (rows, features, None),
            [rows, features, labels] => (rows, features, Some(labels)),
            _ => candle_core::bail!("{} is computed of two or three arrays", Self::NAME),
        };
        let mut losses = vec![on.squared_error(&self.model.region_features(on, rows)?, features)?];
        if let Some(labels) = labels {
            losses.push(on.soft_cross_entropy(&self.model.region_logits(on, rows)?, labels)?);
        }
        Ok(losses)
    }
}

/// Some of what the contrasts compare.
pub(crate) enum Kind {
    /// Embeddings of images, of an array of what these are embedded by.
    Images(EmbeddedImages),
    /// Embeddings of texts, of the rows that they are embedded from: with so many tokens behind each one's first, or that alone.
    Texts(Option<Vec<usize>>),
    /// Logits of pairs, of the rows of `[IMG]` and those of `[CLS]`.
    Pairs,
}

/// What the contrasts compare, one array of each kind.
pub(crate) struct Encoding<'a> {
    pub model: &'a Unimo,
    pub dropout: Dropout,
    pub kinds: Vec<Kind>,
}

impl Computation for Encoding<'_> {
    const NAME: &'static str = "encoding";

    fn compute<O: Operators>(&self, on: &O, mut arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let mut next = |count: usize| {
            let Some((own, others)) = arrays.split_at_checked(count) else {
                candle_core::bail!("{}: an array is missing", Self::NAME)
            };
            arrays = others;
            Ok(own)
        };
        let encoded = self.kinds.iter().map(|kind| match kind {
            Kind::Images(of) => self.model.embed_images(on, &next(1)?[0], self.dropout, *of),
            Kind::Texts(counts) => self.model.embed_texts(on, &next(1)?[0], counts.as_deref()),
            Kind::Pairs => match next(2)? {
                [images, texts] => self.model.match_logits(on, images, texts),
                _ => candle_core::bail!("{}: an array is missing", Self::NAME),
            },
        });
        encoded.collect()
    }
}

/// The contrast of images and texts, of the embeddings of both, of all or some of them: one loss or two.
pub(crate) struct Contrasting<'a> {
    /// Logarithm of the temperature.
    pub temperature: &'a Tensor,
    /// The image of each text.
    pub image_of_text: &'a [usize],
    /// Number of images.
    pub images: usize,
    /// Images and texts whose terms these are.
    pub own: [Range<usize>; 2],
}

impl Contrasting<'_> {
    /// How many losses there are.
    pub(crate) fn terms(&self) -> usize {
        let [images, texts] = &self.own;
        let described = self.image_of_text.iter().any(|image| images.contains(image));
        usize::from(described) + usize::from(!texts.is_empty())
    }
}

impl Computation for Contrasting<'_> {
    const NAME: &'static str = "contrast";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let [images, texts] = given(Self::NAME, arrays)?;
        let temperature = on.bounded_exp(self.temperature, TEMPERATURE)?;
        contrastive_part(on, [images, texts], self.image_of_text, self.images, &temperature, &self.own)
    }
}

/// The cross-modal contrast of some images, of the embeddings of all images and all texts, and of those retrieved for the ones that are
/// contrasted, images and texts; then the logits of pairs.
pub(crate) struct CrossModal<'a> {
    /// Logarithm of the temperature.
    pub temperature: &'a Tensor,
    pub relations: &'a Relations,
    /// Images that are contrasted and their texts, among all.
    pub own: [Range<usize>; 2],
    /// Number of images and texts.
    pub all: [usize; 2],
    /// Whether anything was retrieved, images and texts, and whether there are pairs.
    pub found: [bool; 3],
    /// Contrasts that make one mean.
    pub pictures: usize,
}

impl Computation for CrossModal<'_> {
    const NAME: &'static str = "cross_modal";

    fn compute<O: Operators>(&self, on: &O, arrays: &[O::Array]) -> Result<Vec<O::Array>> {
        let [images, texts, found @ ..] = arrays else { candle_core::bail!("{}: an array is missing", Self::NAME) };
        let mut found = found.iter();
        let [found_images, found_texts, pairs] = self.found.map(|there| if there { found.next() } else { None });
        let own = |of: &O::Array, rows: &Range<usize>, all: usize| {
            if rows.len() == all { Ok(of.clone()) } else { on.some_rows(of, rows.clone()) }
        };
        let temperature = on.bounded_exp(self.temperature, TEMPERATURE)?;
        let own_images = own(images, &self.own[0], self.all[0])?;
        let own_texts = if self.own[1].is_empty() { None } else { Some(own(texts, &self.own[1], self.all[1])?) };
        let products = |a: Option<&O::Array>, b: Option<&O::Array>| a.zip(b).map(|(a, b)| on.scalar_products(a, b)).transpose();
        let (with_texts, with_images) = (on.scalar_products(&own_images, texts)?, products(own_texts.as_ref(), Some(images))?);
        let of_retrieved_images = products(found_images, own_texts.as_ref())?;
        let of_retrieved_texts = products(Some(&own_images), found_texts)?;
        let scores = Scores {
            with_texts: &with_texts,
            with_images: with_images.as_ref(),
            of_retrieved_images: of_retrieved_images.as_ref(),
            of_retrieved_texts: of_retrieved_texts.as_ref(),
            of_pairs: pairs,
        };
        Ok(vec![on.cross_modal(&scores, &temperature, self.relations, 1.0 / self.pictures as f64)?])
    }
}
