//! What a step holds, over all its passes and all ranks: what the means of its losses are taken over, and what its log line says.

use anyhow::{Context, Result};

use super::StepBatch;
use super::draft::Parts;
use crate::model::Unimo;
use crate::parallel::Collective;
use crate::vision::Vision;

/// Samples of an objective in a pass.
type Samples = fn(&Parts) -> usize;

/// Objectives, and the samples that each has.
const OBJECTIVES: [(&str, Samples); 12] = [
    ("caption", |p| p.captions.rows.len()),
    ("text", |p| p.texts.rows.len()),
    ("fragments", |p| p.fragments.rows.len()),
    ("writing", |p| p.written.rows.len()),
    ("masked_language", |p| p.masked_words.rows.len()),
    ("self_critical", |p| p.sampled.predictions.rows.len()),
    ("matching", |p| p.match_labels.len()),
    ("task", |p| p.task_examples.len()),
    ("region_features", |p| p.regions.rows.len()),
    ("region_classes", |p| p.regions.rows.len()),
    (CONTRAST, |p| p.text_rows.len() + p.further_text_rows.len()),
    (CROSS_MODAL, |p| p.text_rows.len()),
];

/// The contrast of separately encoded images and texts.
pub(super) const CONTRAST: &str = "contrast";
/// The cross-modal contrast.
pub(super) const CROSS_MODAL: &str = "cross_modal";

/// What a step holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Tally {
    samples: [f64; OBJECTIVES.len()],
    /// Packed rows.
    pub rows: u64,
    /// Floating-point operations (see [`StepBatch::operations`]).
    pub operations: f64,
    rewards: Vec<f64>,
}

impl Tally {
    /// Of the passes of this rank.
    #[must_use]
    pub fn of(batch: &StepBatch, model: &Unimo, vision: &Vision) -> Self {
        let count = |of: Samples| batch.chunks.iter().map(|chunk| of(&chunk.parts)).sum::<usize>() as f64;
        Self {
            samples: OBJECTIVES.map(|(_, of)| count(of)),
            rows: batch.rows() as u64,
            operations: batch.operations(model, vision),
            rewards: batch.chunks.iter().flat_map(|chunk| &chunk.parts.sampled.rewards).copied().collect(),
        }
    }

    /// Of the whole step.
    ///
    /// # Errors
    /// A rank that is gone.
    pub fn over(self, ranks: &dyn Collective) -> Result<Self> {
        let beside = [self.rows as f64, self.operations];
        let own = self.samples.iter().chain(&beside).chain(&self.rewards);
        let mut whole = Self { samples: [0.0; OBJECTIVES.len()], rows: 0, operations: 0.0, rewards: Vec::new() };
        for numbers in gather(ranks, own)? {
            let (samples, rest) = numbers.split_at_checked(OBJECTIVES.len()).context("a rank brought too few counts")?;
            whole.samples.iter_mut().zip(samples).for_each(|(sum, count)| *sum += count);
            let [rows, operations, rewards @ ..] = rest else { anyhow::bail!("a rank brought too few counts") };
            whole.rows += *rows as u64;
            whole.operations += operations;
            whole.rewards.extend(rewards);
        }
        Ok(whole)
    }

    /// Samples of an objective.
    pub(super) fn samples(&self, objective: &str) -> f64 {
        let of = OBJECTIVES.iter().zip(&self.samples).find(|((name, _), _)| *name == objective);
        of.map_or(0.0, |(_, samples)| *samples)
    }

    /// Mean reward of the step's sampled captions, if there are any.
    #[must_use]
    pub fn reward(&self) -> Option<f64> {
        (!self.rewards.is_empty()).then(|| self.rewards.iter().sum::<f64>() / self.rewards.len() as f64)
    }
}

/// What every rank brings.
fn gather<'a>(ranks: &dyn Collective, own: impl Iterator<Item = &'a f64>) -> Result<Vec<Vec<f64>>> {
    let bytes: Vec<u8> = own.flat_map(|number| number.to_le_bytes()).collect();
    let numbers = |bytes: &Vec<u8>| bytes.chunks_exact(8).map(|b| Ok(f64::from_le_bytes(b.try_into()?))).collect();
    ranks.all_gather(&bytes)?.iter().map(numbers).collect()
}

/// Sums over the ranks of a total and of every objective's part of a loss; what no rank has stays absent.
pub(super) fn sum_losses(
    ranks: &dyn Collective,
    total: f64,
    losses: &[(&'static str, f64)],
) -> Result<(f64, Vec<(&'static str, f64)>)> {
    let of = |name: &str| losses.iter().find(|(known, _)| *known == name).map_or(f64::NAN, |(_, loss)| *loss);
    let own = OBJECTIVES.map(|(name, _)| of(name));
    let all = gather(ranks, [total].iter().chain(&own))?;
    let sum = |at: usize| all.iter().filter_map(|numbers| numbers.get(at)).filter(|v| !v.is_nan()).fold(0.0, |sum, v| sum + v);
    let some = |at: usize| all.iter().any(|numbers| numbers.get(at).is_some_and(|v| !v.is_nan()));
    let losses = OBJECTIVES.iter().enumerate().filter(|(i, _)| some(i + 1)).map(|(i, (name, _))| (*name, sum(i + 1)));
    Ok((sum(0), losses.collect()))
}
