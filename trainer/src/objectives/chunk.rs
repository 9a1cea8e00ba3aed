//! A forward pass of a step: its packed rows, and the losses and encodings that are read off them.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::Source;
use super::draft::{Parts, Predictions};
use super::losses::{Encoding, Kind, Language, Matching, Policy, Regions, Task};
use super::masked_regions::MaskedRegions;
use super::tally::Tally;
use crate::model::{Back, Computing, Dropout, EmbeddedImages, Given, Hidden, Losses, PackedBatch, Passed, Pending, Unimo};
use crate::ops::{Ahead, Computation, Part, Targets};
use crate::recipe::Recipe;
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
    /// The loss of each, one tensor or several, constants.
    pub(super) values: Vec<Tensor>,
    /// How their weighted sum leads back.
    pub(super) back: Back,
}

impl Term {
    /// Computes losses of objectives by themselves.
    pub(super) fn of<C: Computation>(
        of: Vec<Counted>,
        computing: &Computing,
        computation: &C,
        from: (Option<&Hidden>, &[Given]),
        device: &Device,
    ) -> candle_core::Result<Self> {
        let factors: Vec<f64> = of.iter().map(|counted| counted.weight * counted.share).collect();
        let Losses { outputs, back } = computing.losses(computation, from, &factors, device)?;
        Ok(Self { of, values: outputs, back })
    }

    /// Name and loss of a single objective, which may be the sum of two values.
    #[cfg(test)]
    pub(super) fn alone(&self) -> (&'static str, f64) {
        let value = |value: &Tensor| f64::from(value.to_scalar::<f32>().unwrap());
        (self.of[0].name, self.values.iter().map(value).sum())
    }
}

/// Kinds of what the contrasts compare.
pub(super) const KINDS: usize = 7;

/// The kind that is logits of pairs.
pub(super) const JOINT: usize = 4;

/// What the contrasts compare; each absent where a chunk or step has none.
#[derive(Default)]
pub(super) struct Encoded {
    /// Unified-space embeddings `[n, embedding]` of pictures, captions, retrieved images and retrieved texts; the matching logits
    /// `[n]` of jointly encoded pairs; then embeddings of further pictures and, one of each, their captions.
    pub(super) tensors: [Option<Tensor>; KINDS],
    /// What leads back from them, where they are not tracked.
    pub(super) pending: Option<Pending>,
}

impl Encoded {
    /// The values, which lead nowhere.
    pub(super) fn detached(&self) -> Self {
        Self { tensors: self.tensors.clone().map(|t| t.map(|t| t.detach())), pending: None }
    }
}

impl Chunk {
    pub(super) fn forward(&self, model: &Unimo, source: &Source, dropout: Dropout) -> Result<Forward> {
        self.ahead.join()?;
        let seen = self.pictures.as_ref().map(|pictures| source.vision.see(pictures)).transpose()?;
        let passed = model.forward(&self.packed, seen.as_ref().map(|seen| &seen.regions), dropout)?;
        Ok(Forward { passed, seen })
    }

    /// Gradients by variables of the sum of all that leads back, which was computed of this chunk's forward pass. `complete` is as
    /// [`Passed::backward_by_layer`] has it.
    pub(super) fn backward(
        &self,
        Forward { passed, seen }: Forward,
        (model, vision): (&Unimo, &Vision),
        backs: Vec<Back>,
        by: &[Var],
        complete: &mut dyn FnMut(usize, &mut GradStore) -> candle_core::Result<()>,
    ) -> candle_core::Result<GradStore> {
        let leaf = seen.as_ref().and_then(Seen::leaf).cloned();
        let by: Vec<Var> = by.iter().cloned().chain(leaf).collect();
        let mut all = passed.backward_by_layer(model, &self.packed, backs, &by, complete)?;
        if let (Some(seen), Some(pictures)) = (&seen, &self.pictures) {
            seen.backward(vision, pictures, &mut all)?;
        }
        Ok(all)
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
        let (computing, device) = (model.computing(), model.device());
        if !of.is_empty() {
            let computation = Language { model, targets: &all };
            // The parts' factors are in their sum.
            let Losses { outputs, back } =
                computing.losses(&computation, (Some(hidden), &[Given::varying_rows(&all_rows)]), &[1.0], device)?;
            let values = outputs.iter().map(|output| output.narrow(0, 1, of.len())).collect::<Result<_, _>>()?;
            terms.push(Term { of, values, back });
        }
        let Predictions { rows, targets } = &parts.sampled.predictions;
        if !rows.is_empty() {
            let targets = Targets::of_one(targets.clone(), Some(parts.sampled.advantages.clone()), 0.0);
            let computation = Policy { model, targets: &targets, temperature: recipe.batch.sampling_temperature };
            let given = [Given::varying_rows(rows)];
            let of = vec![counted("self_critical", w.self_critical, rows.len())];
            let mut term = Term::of(of, computing, &computation, (Some(hidden), &given), device)?;
            term.values = vec![term.values[0].get(0)?];
            terms.push(term);
        }
        if !parts.match_labels.is_empty() {
            let computation = Matching { model, labels: &parts.match_labels };
            let given = [Given::rows(&parts.match_images), Given::rows(&parts.match_texts)];
            let of = vec![counted("matching", w.matching, parts.match_labels.len())];
            terms.push(Term::of(of, computing, &computation, (Some(hidden), &given), device)?);
        }
        if let (Some(task), false) = (source.task, parts.task_examples.is_empty()) {
            let targets: Vec<&[(u32, f32)]> = parts.task_examples.iter().map(|&i| task.examples[i].target.as_slice()).collect();
            let computation = Task { model, classes: task.spec.classes.len(), goal: task.spec.goal, targets: &targets };
            let mut given = vec![Given::rows(&parts.task_texts)];
            if !parts.task_images.is_empty() {
                given.push(Given::rows(&parts.task_images));
            }
            let of = vec![counted("task", w.task, targets.len())];
            terms.push(Term::of(of, computing, &computation, (Some(hidden), &given), device)?);
        }
        if let Some(MaskedRegions { features, labels }) = &self.regions {
            let (rows, mut of) = (&parts.regions.rows, Vec::new());
            let mut given = vec![Given::varying_rows(rows)];
            for (name, weight, targets) in
                [("region_features", w.region_features, Some(features)), ("region_classes", w.region_classes, labels.as_ref())]
            {
                if let Some(targets) = targets {
                    of.push(counted(name, weight, rows.len()));
                    given.push(Given::of_varying_rows(targets));
                }
            }
            terms.push(Term::of(of, computing, &Regions { model }, (Some(hidden), &given), device)?);
        }
        Ok(terms)
    }

    pub(super) fn encode(&self, passed: &Passed, model: &Unimo, recipe: &Recipe) -> Result<Encoded> {
        let parts = &self.parts;
        let (mut places, mut kinds, mut given) = (Vec::new(), Vec::new(), Vec::new());
        let mut put = |place: usize, kind: Kind, of_kind: Vec<Given>| {
            places.push(place);
            kinds.push(kind);
            given.extend(of_kind);
        };
        let images = |rows: &[usize]| {
            let means = model.image_means(&self.packed, passed, rows)?;
            anyhow::Ok(vec![means.map_or_else(|| Given::rows(rows), |means| Given::matrix(&means))])
        };
        let texts = |rows: &[usize]| {
            let rows = model.text_rows(&self.packed, rows)?;
            anyhow::Ok((vec![rows.given()], Kind::Texts(rows.counts)))
        };
        if !parts.text_rows.is_empty() {
            let both = [
                (&parts.image_rows, EmbeddedImages::Described, &parts.text_rows),
                (&parts.retrieved_image_rows, EmbeddedImages::Retrieved, &parts.retrieved_text_rows),
            ];
            for (place, (image_rows, of_images, text_rows)) in [0, 2].into_iter().zip(both) {
                if !image_rows.is_empty() {
                    put(place, Kind::Images(of_images), images(image_rows)?);
                }
                if !text_rows.is_empty() {
                    let (given, kind) = texts(text_rows)?;
                    put(place + 1, kind, given);
                }
            }
            if recipe.weights.cross_modal > 0.0 && !parts.match_labels.is_empty() {
                put(JOINT, Kind::Pairs, vec![Given::rows(&parts.match_images), Given::rows(&parts.match_texts)]);
            }
        }
        if let Some(means) = &self.further_means {
            put(5, Kind::Images(EmbeddedImages::Further), vec![Given::matrix(means)]);
            let (given, kind) = texts(&parts.further_text_rows)?;
            put(6, kind, given);
        }
        let mut encoded = Encoded::default();
        if kinds.is_empty() {
            return Ok(encoded);
        }
        let computation = Encoding { model, dropout: passed.dropout, kinds };
        let (tensors, pending) = model.computing().forward(&computation, (Some(&passed.hidden), &given), model.device())?;
        for (place, tensor) in places.into_iter().zip(tensors) {
            encoded.tensors[place] = Some(if place == JOINT { tensor.squeeze(1)? } else { tensor });
        }
        encoded.pending = pending;
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
