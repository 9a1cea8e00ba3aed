//! The contrasts of a step, over all its passes and all ranks.
//!
//! Every rank encodes its own samples; the embeddings of pictures and captions are gathered. A rank adds up the terms of its own
//! pictures and captions, each against all there are, and takes their gradients by everything gathered; sums of these over the
//! ranks are the gradients of the whole loss, of which each rank carries its own rows back through its passes. So a rank holds the
//! rows of its own pictures and captions of the matrix of similarities, and with devices that reach each other nothing of it passes
//! through a host.

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::chunk::{Counted, Encoded, JOINT, KINDS, Term};
use super::losses::{Contrasting, CrossModal};
use super::members::Members;
use super::tally::{CONTRAST, CROSS_MODAL};
use crate::model::{Computing, Given};
use crate::parallel::{Collective, sums};
use crate::recipe::LossWeights;

/// Kinds of which every rank sees those of all; of the others, a rank sees its own.
const SHARED: [usize; 4] = [IMAGES, TEXTS, FURTHER_IMAGES, FURTHER_TEXTS];
const IMAGES: usize = 0;
const TEXTS: usize = 1;
const FURTHER_IMAGES: usize = 5;
const FURTHER_TEXTS: usize = 6;

/// What is compared, as this rank sees it.
pub(super) struct Comparison {
    /// Of each kind everything that this rank sees, the ranks' in their order.
    leaves: [Option<Var>; KINDS],
    /// Of every rank.
    members: Vec<Members>,
    rank: usize,
}

impl Comparison {
    /// Gathers what all ranks have encoded, embeddings of width `width`. Every rank calls it, also one that has nothing to compare.
    ///
    /// # Errors
    /// Those of candle; a rank that is gone, or whose captions are not of its own pictures.
    pub fn among(ranks: &dyn Collective, own: Encoded, members: &Members, width: usize, device: &Device) -> Result<Self> {
        let members: Vec<Members> = ranks
            .all_gather(&serde_json::to_vec(members)?)?
            .iter()
            .map(|own| serde_json::from_slice(own))
            .collect::<Result<_, _>>()?;
        let mut pictures = 0;
        for (rank, members) in members.iter().enumerate() {
            let follow = members.images.is_empty() || members.images.start == pictures;
            ensure!(follow && members.are_complete(), "rank {rank} brought captions of pictures that are not its own");
            pictures += members.images.len();
        }
        let mut comparison = Self { leaves: Default::default(), members, rank: ranks.rank() };
        let mut tensors = own.tensors;
        for (kind, tensor) in tensors.iter().enumerate() {
            let (rows, expected) = (tensor.as_ref().map_or(0, |tensor| tensor.dims()[0]), comparison.own_rows(kind).len());
            ensure!(rows == expected, "{rows} rows of kind {kind} were encoded for {expected}");
        }
        if ranks.ranks() > 1 {
            let mut gathered = Vec::new();
            for kind in comparison.shared() {
                let all = Tensor::zeros((comparison.count(kind), width), DType::F32, device)?;
                if let Some(own) = &tensors[kind] {
                    all.slice_set(&own.contiguous()?, 0, comparison.own_rows(kind).start)?;
                }
                gathered.push(all);
            }
            let kinds: Vec<usize> = comparison.shared().collect();
            for (kind, all) in kinds.into_iter().zip(sums::of_tensors(ranks, gathered)?) {
                tensors[kind] = Some(all);
            }
        }
        for (leaf, tensor) in comparison.leaves.iter_mut().zip(tensors) {
            *leaf = tensor.map(|tensor| Var::from_tensor(&tensor)).transpose()?;
        }
        Ok(comparison)
    }

    /// What gradients are to be taken by.
    pub fn leaves(&self) -> impl Iterator<Item = &Var> {
        self.leaves.iter().flatten()
    }

    /// This rank's terms of the losses, which are sums over the ranks.
    ///
    /// # Errors
    /// Those of candle.
    pub fn terms(&self, weights: &LossWeights, computing: &Computing, log_temperature: &Tensor) -> Result<Vec<Term>> {
        let mut terms = Vec::new();
        if weights.contrast > 0.0 {
            terms.extend(self.contrast(weights.contrast, computing, log_temperature)?);
        }
        if weights.cross_modal > 0.0 {
            terms.extend(self.cross_modal(weights.cross_modal, computing, log_temperature)?);
        }
        Ok(terms)
    }

    /// The gradients of the whole loss by what this rank has encoded, of those of its own terms by the leaves, which are taken out.
    ///
    /// # Errors
    /// Those of candle; a rank that is gone.
    pub fn own_gradients(&self, ranks: &dyn Collective, by_leaf: &mut GradStore) -> Result<[Option<Tensor>; KINDS]> {
        let mut gradients = self.leaves.each_ref().map(|leaf| by_leaf.remove(leaf.as_ref()?));
        if ranks.ranks() == 1 {
            return Ok(gradients);
        }
        let mut parts = Vec::new();
        for kind in self.shared() {
            let Some(leaf) = &self.leaves[kind] else { continue };
            parts.push(match gradients[kind].take() {
                Some(gradient) => gradient,
                None => leaf.zeros_like()?,
            });
        }
        for (kind, sum) in self.shared().zip(sums::of_tensors(ranks, parts)?) {
            let Range { start, end } = self.own_rows(kind);
            gradients[kind] = (end > start).then(|| sum.narrow(0, start, end - start)).transpose()?;
        }
        Ok(gradients)
    }

    /// The kinds of which any rank has something that all see.
    fn shared(&self) -> impl Iterator<Item = usize> {
        SHARED.into_iter().filter(|&kind| self.count(kind) > 0)
    }

    /// Rows of a kind, of all ranks.
    fn count(&self, kind: usize) -> usize {
        self.members.iter().map(|members| members.counts()[kind]).sum()
    }

    /// This rank's rows among those of a kind that it sees.
    fn own_rows(&self, kind: usize) -> Range<usize> {
        let shared = SHARED.contains(&kind);
        let start = self.members[..self.rank].iter().map(|before| if shared { before.counts()[kind] } else { 0 }).sum();
        start..start + self.members[self.rank].counts()[kind]
    }

    fn leaf(&self, kind: usize) -> Option<&Tensor> {
        self.leaves[kind].as_ref().map(Var::as_tensor)
    }

    /// This rank's terms of the contrast of separately encoded pictures and captions. Every rank's further ones lie behind its others.
    fn contrast(&self, weight: f64, computing: &Computing, log_temperature: &Tensor) -> Result<Option<Term>> {
        let images = self.alternating(IMAGES, FURTHER_IMAGES)?;
        let texts = self.alternating(TEXTS, FURTHER_TEXTS)?;
        let (Some(device), false) = (images.first().map(Tensor::device), texts.is_empty()) else { return Ok(None) };
        let (mut image_of_text, mut own) = (Vec::new(), [0..0, 0..0]);
        let mut images_before = 0;
        for (rank, members) in self.members.iter().enumerate() {
            let (first_text, first_further) = (image_of_text.len(), images_before + members.images.len());
            image_of_text.extend(members.image_of_text.iter().map(|image| image - members.images.start + images_before));
            image_of_text.extend(first_further..first_further + members.further);
            if rank == self.rank {
                own = [images_before..first_further + members.further, first_text..image_of_text.len()];
            }
            images_before = first_further + members.further;
        }
        let computation = Contrasting { temperature: log_temperature, image_of_text: &image_of_text, images: images_before, own };
        let terms = computation.terms();
        if terms == 0 {
            return Ok(None);
        }
        let given = [images.clone(), texts].map(|all| Given::Matrices { all, parts: None });
        // The loss is the sum of them.
        let of = vec![Counted { name: CONTRAST, weight, share: 1.0 }; terms];
        Ok(Some(Term::of(of, computing, &computation, (None, &given), device)?))
    }

    /// Each rank's rows of one kind and then its rows of another.
    fn alternating(&self, one: usize, other: usize) -> Result<Vec<Tensor>> {
        let (first, second) = match (self.leaf(one), self.leaf(other)) {
            (Some(first), Some(second)) => (first, second),
            (first, second) => return Ok(first.or(second).cloned().into_iter().collect()),
        };
        let (mut parts, mut at) = (Vec::new(), [0; 2]);
        for members in &self.members {
            for ((all, at), kind) in [first, second].into_iter().zip(&mut at).zip([one, other]) {
                let count = members.counts()[kind];
                if count == all.dim(0)? {
                    parts.push(all.clone());
                } else if count > 0 {
                    parts.push(all.narrow(0, *at, count)?);
                }
                *at += count;
            }
        }
        Ok(parts)
    }

    /// This rank's terms of the cross-modal contrast: those of its own pictures.
    fn cross_modal(&self, weight: f64, computing: &Computing, log_temperature: &Tensor) -> Result<Option<Term>> {
        let members = &self.members[self.rank];
        let (Some(images), Some(texts)) = (self.leaf(IMAGES), self.leaf(TEXTS)) else { return Ok(None) };
        if members.contrasted() == 0 {
            return Ok(None);
        }
        let found = [2, 3, JOINT].map(|kind| self.leaf(kind));
        let mut given = vec![Given::matrix(images), Given::matrix(texts)];
        for (kind, leaf) in [2, 3, JOINT].into_iter().zip(found) {
            if let Some(leaf) = leaf {
                given.push(if kind == JOINT { Given::matrix(&leaf.unsqueeze(1)?) } else { Given::matrix(leaf) });
            }
        }
        let own_texts = self.own_rows(TEXTS);
        let computation = CrossModal {
            temperature: log_temperature,
            relations: &members.relations(own_texts.start),
            own: [self.own_rows(IMAGES), own_texts],
            all: [images.dim(0)?, texts.dim(0)?],
            found: found.map(|leaf| leaf.is_some()),
            pictures: self.members.iter().map(Members::contrasted).sum(),
        };
        let of = vec![Counted { name: CROSS_MODAL, weight, share: 1.0 }];
        Ok(Some(Term::of(of, computing, &computation, (None, &given), images.device())?))
    }
}

#[cfg(test)]
mod tests;
