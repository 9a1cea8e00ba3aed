//! A forward pass of a step: its packed rows, and the losses and encodings that are read off them.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::draft::{Parts, Predictions};
use super::masked_regions::{MaskedRegions, region_classification, region_regression};
use super::tally::Tally;
use super::{Source, matching_loss};
use crate::model::{Dropout, EmbeddedImages, Hidden, PackedBatch, Passed, Unimo};
use crate::ops::{Ahead, Part, Targets};
use crate::recipe::Recipe;
use crate::tasks::task_loss;
use crate::vision::{Pictures, Seen, Vision};

/// One forward pass of a step.
pub(super) struct Chunk {
    /// How what follows came to the device.
    pub(super) ahead: Ahead,
    pub(super) packed: PackedBatch,
    pub(super) parts: Parts,
    /// Means of the standardised features of pictures that are contrasted and nothing else, `[n, region_feature]`.
    pub(super) further_means: Option<Tensor>,
    /// What its masked regions were.
    pub(super) regions: Option<MaskedRegions>,
    /// Its pictures where the backbone is trained.
    pub(super) pictures: Option<Pictures>,
}

/// What a forward pass of a chunk left.
pub(super) struct Forward {
    /// Of the model.
    pub(super) passed: Passed,
    /// Of a backbone that is trained.
    seen: Option<Seen>,
}

/// An objective's part in a step's loss.
#[derive(Clone, Copy)]
pub(super) struct Counted {
    pub(super) name: &'static str,
    pub(super) weight: f64,
    /// Share of the objective's samples that lie in this pass.
    pub(super) share: f64,
}

/// Losses of objectives in one forward pass, which were computed together.
pub(super) struct Term {
    pub(super) of: Vec<Counted>,
    /// One of each, constants: `[objectives]`, or of a single one a scalar.
    pub(super) values: Tensor,
    /// Their weighted sum, a scalar.
    pub(super) sum: Tensor,
}

impl Term {
    /// The loss of an objective by itself.
    pub(super) fn of_one(of: Counted, loss: Tensor) -> candle_core::Result<Self> {
        let (factor, values) = (of.weight * of.share, loss.detach());
        let sum = if factor == 1.0 { loss } else { loss.affine(factor, 0.0)? };
        Ok(Self { of: vec![of], values, sum })
    }

    /// Name and loss of a single objective.
    #[cfg(test)]
    pub(super) fn alone(&self) -> (&'static str, f64) {
        (self.of[0].name, f64::from(self.values.to_scalar::<f32>().unwrap()))
    }
}

/// Kinds of what the contrasts compare.
pub(super) const KINDS: usize = 7;

/// What the contrasts compare; each absent where a chunk or step has none.
#[derive(Default, Clone)]
pub(super) struct Encoded {
    /// Unified-space embeddings `[n, embedding]` of pictures, captions, retrieved images and retrieved texts; the matching logits
    /// `[n]` of jointly encoded pairs; then embeddings of further pictures and, one of each, their captions.
    pub(super) tensors: [Option<Tensor>; KINDS],
}

impl Encoded {
    pub(super) fn detached(&self) -> Self {
        Self { tensors: self.tensors.clone().map(|t| t.map(|t| t.detach())) }
    }
}

impl Chunk {
    pub(super) fn forward(&self, model: &Unimo, source: &Source, dropout: Dropout) -> Result<Forward> {
        self.ahead.join()?;
        let seen = self.pictures.as_ref().map(|pictures| source.vision.see(pictures)).transpose()?;
        let passed = model.forward(&self.packed, seen.as_ref().map(|seen| &seen.regions), dropout)?;
        Ok(Forward { passed, seen })
    }

    /// Gradients by variables of the sum of `losses`, which were computed of this chunk's forward pass. `complete` is as
    /// [`Passed::backward_by_layer`] has it.
    pub(super) fn backward(
        &self,
        Forward { passed, seen }: Forward,
        (model, vision): (&Unimo, &Vision),
        losses: Vec<Tensor>,
        by: &[Var],
        complete: &mut dyn FnMut(usize, &mut GradStore) -> candle_core::Result<()>,
    ) -> candle_core::Result<GradStore> {
        let leaf = seen.as_ref().and_then(Seen::leaf).cloned();
        let by: Vec<Var> = by.iter().cloned().chain(leaf).collect();
        let mut all = passed.backward_by_layer(model, &self.packed, losses, &by, complete)?;
        if let (Some(seen), Some(pictures)) = (&seen, &self.pictures) {
            seen.backward(vision, pictures, &mut all)?;
        }
        Ok(all)
    }

    fn match_logits(&self, hidden: &Hidden, model: &Unimo) -> Result<Option<Tensor>> {
        let parts = &self.parts;
        if parts.match_labels.is_empty() {
            return Ok(None);
        }
        Ok(Some(model.match_logits(&hidden.rows(&parts.match_images)?, &hidden.rows(&parts.match_texts)?)?))
    }

    /// Objectives whose loss is a mean over samples, each in one chunk.
    pub(super) fn local_terms(
        &self,
        hidden: &Hidden,
        model: &Unimo,
        recipe: &Recipe,
        source: &Source,
        whole: &Tally,
    ) -> Result<Vec<Term>> {
        type Of = fn(&Parts) -> &Predictions;
        let (parts, w) = (&self.parts, &recipe.weights);
        let smoothing = w.label_smoothing as f32;
        let generated: [(&str, f64, f32, Of); 5] = [
            ("caption", w.caption, smoothing, |p| &p.captions),
            ("text", w.text, smoothing, |p| &p.texts),
            ("fragments", w.fragments, smoothing, |p| &p.fragments),
            ("writing", w.task, smoothing, |p| &p.written),
            ("masked_language", w.masked_language, 0.0, |p| &p.masked_words),
        ];
        let counted = |name, weight, count: usize| Counted { name, weight, share: count as f64 / whole.samples(name) };
        let mut terms = Vec::new();
        // All words that are predicted go through the language model at one time.
        let (mut of, mut all_rows) = (Vec::new(), Vec::new());
        let mut all = Targets { classes: Vec::new(), weights: None, parts: Vec::new() };
        for (name, weight, smoothing, predictions) in generated {
            let Predictions { rows, targets } = predictions(parts);
            if !rows.is_empty() {
                let counted = counted(name, weight, rows.len());
                all.parts.push(Part { rows: rows.len(), smoothing, factor: (counted.weight * counted.share) as f32 });
                all.classes.extend(targets);
                all_rows.extend(rows);
                of.push(counted);
            }
        }
        if !of.is_empty() {
            let (sum, values) = model.language_losses(&hidden.rows(&all_rows)?, all)?;
            terms.push(Term { of, values, sum });
        }
        let mut put =
            |name, weight, count: usize, loss| Term::of_one(counted(name, weight, count), loss).map(|term| terms.push(term));
        let Predictions { rows, targets } = &parts.sampled.predictions;
        if !rows.is_empty() {
            let (advantages, temperature) = (parts.sampled.advantages.clone(), recipe.batch.sampling_temperature);
            let loss = model.policy_loss(&hidden.rows(rows)?, targets.clone(), advantages, temperature)?;
            put("self_critical", w.self_critical, rows.len(), loss)?;
        }
        if let Some(logits) = self.match_logits(hidden, model)? {
            let loss = matching_loss(&logits, &parts.match_labels)?;
            put("matching", w.matching, parts.match_labels.len(), loss)?;
        }
        if let (Some(task), false) = (source.task, parts.task_examples.is_empty()) {
            let logits = model.task_logits(hidden, &parts.task_images, &parts.task_texts)?;
            let targets: Vec<&[(u32, f32)]> = parts.task_examples.iter().map(|&i| task.examples[i].target.as_slice()).collect();
            let loss = task_loss(&logits, task.spec.goal, &targets)?;
            put("task", w.task, targets.len(), loss)?;
        }
        if let Some(MaskedRegions { features, labels }) = &self.regions {
            let rows = hidden.rows(&parts.regions.rows)?;
            put("region_features", w.region_features, parts.regions.rows.len(), region_regression(model, &rows, features)?)?;
            if let Some(labels) = labels {
                let loss = region_classification(model, &rows, labels)?;
                put("region_classes", w.region_classes, parts.regions.rows.len(), loss)?;
            }
        }
        Ok(terms)
    }

    pub(super) fn encode(&self, passed: &Passed, model: &Unimo, recipe: &Recipe) -> Result<Encoded> {
        let (parts, hidden) = (&self.parts, &passed.hidden);
        let images = |rows: &[usize], kind: EmbeddedImages| -> Result<Option<Tensor>> {
            Ok(if rows.is_empty() { None } else { Some(model.image_embedding(&self.packed, passed, rows, kind)?) })
        };
        let texts = |rows: &[usize]| -> Result<Option<Tensor>> {
            Ok(if rows.is_empty() { None } else { Some(model.text_embedding(&self.packed, hidden, rows)?) })
        };
        let mut encoded = Encoded::default();
        let [pictures, captions, found_images, found_texts, joint, further_pictures, further_captions] = &mut encoded.tensors;
        if !parts.text_rows.is_empty() {
            *pictures = images(&parts.image_rows, EmbeddedImages::Described)?;
            *captions = texts(&parts.text_rows)?;
            *found_images = images(&parts.retrieved_image_rows, EmbeddedImages::Retrieved)?;
            *found_texts = texts(&parts.retrieved_text_rows)?;
            *joint = if recipe.weights.cross_modal > 0.0 { self.match_logits(hidden, model)? } else { None };
        }
        if let Some(means) = &self.further_means {
            *further_pictures = Some(model.embed_means(means, passed.dropout, EmbeddedImages::Further)?);
            *further_captions = texts(&parts.further_text_rows)?;
        }
        Ok(encoded)
    }
}

/// What several passes have encoded, one after the other.
pub(super) fn together(passes: &[Encoded]) -> Result<[Option<Tensor>; KINDS]> {
    let mut whole: [Option<Tensor>; KINDS] = Default::default();
    for (kind, whole) in whole.iter_mut().enumerate() {
        let tensors: Vec<&Tensor> = passes.iter().filter_map(|e| e.tensors[kind].as_ref()).collect();
        if !tensors.is_empty() {
            *whole = Some(Tensor::cat(&tensors, 0)?);
        }
    }
    Ok(whole)
}
