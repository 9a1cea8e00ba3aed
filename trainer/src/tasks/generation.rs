//! Text from text: summaries, questions about a passage, and whatever else is a file of sources and a file of targets, line by line.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use unimo::tokenizer::{CLS, PAD, SEP, Tokenizer, UNK};

use crate::corpus::text_ids;
use crate::metrics::{caption_scores, rouge_scores};
use crate::model::{Packer, Unimo};

/// Texts written side by side.
const BATCH: usize = 50;

/// A source and what is to be written of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceAndTarget {
    /// What is read.
    pub source: String,
    /// What is written.
    pub target: String,
}

/// Scores of written texts, each in `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WritingScores {
    /// Mean F1 of shared words.
    pub rouge_1: f64,
    /// Mean F1 of shared pairs of words.
    pub rouge_2: f64,
    /// Mean F1 of the longest common subsequence.
    pub rouge_l: f64,
    /// BLEU-4 of all texts.
    pub bleu_4: f64,
}

impl fmt::Display for WritingScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rouge_1, rouge_2, rouge_l, bleu_4 } = self;
        write!(f, "ROUGE-1/2/L {rouge_1:.3}/{rouge_2:.3}/{rouge_l:.3}  BLEU-4 {bleu_4:.3}")
    }
}

/// Examples ready for the model, `[CLS] … [SEP]` each.
pub struct WritingData {
    /// Ids of source and target.
    pub examples: Vec<(Vec<u32>, Vec<u32>)>,
    targets: Vec<String>,
}

/// Reads a file of sources and the file of their targets, one a line.
///
/// # Errors
/// Files of unlike length, or without a line.
pub fn read(sources: &Path, targets: &Path) -> Result<Vec<SourceAndTarget>> {
    let lines = |path: &Path| -> Result<Vec<String>> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let (from, to) = (lines(sources)?, lines(targets)?);
    if from.len() != to.len() {
        bail!("{} has {} lines, {} has {}", sources.display(), from.len(), targets.display(), to.len());
    }
    if from.is_empty() {
        bail!("{} is empty", sources.display());
    }
    Ok(from.into_iter().zip(to).map(|(source, target)| SourceAndTarget { source, target }).collect())
}

impl WritingData {
    /// Tokenised examples; what is longer than the model's positions is cut.
    #[must_use]
    pub fn new(raw: &[SourceAndTarget], tokenizer: &Tokenizer, positions: usize) -> Self {
        let ids = |text: &str| text_ids(tokenizer, text, positions);
        Self {
            examples: raw.iter().map(|example| (ids(&example.source), ids(&example.target))).collect(),
            targets: raw.iter().map(|example| example.target.clone()).collect(),
        }
    }

    /// Scores of texts written for the examples.
    #[must_use]
    pub fn score(&self, written: &[String]) -> WritingScores {
        let references: Vec<Vec<String>> = self.targets.iter().map(|target| vec![target.clone()]).collect();
        let [rouge_1, rouge_2, rouge_l] = rouge_scores(written, &references);
        WritingScores { rouge_1, rouge_2, rouge_l, bleu_4: caption_scores(written, &references).bleu[3] }
    }
}

/// Writes a text for every example, greedily, at most `tokens` tokens each.
///
/// # Errors
/// Those of candle.
pub fn write(model: &Unimo, tokenizer: &Tokenizer, data: &WritingData, tokens: usize) -> Result<Vec<String>> {
    let never = [CLS, PAD, UNK, tokenizer.mask()];
    let mut written = Vec::new();
    for batch in data.examples.chunks(BATCH) {
        let mut texts = vec![vec![CLS]; batch.len()];
        for _ in 0..tokens.min(model.config().positions - 1) {
            let open: Vec<usize> = (0..texts.len()).filter(|&i| texts[i].last() != Some(&SEP)).collect();
            if open.is_empty() {
                break;
            }
            let mut packer = Packer::new(model);
            let place = |&i: &usize| packer.target_after(None, &batch[i].0, &texts[i]) + texts[i].len() - 1;
            let rows: Vec<usize> = open.iter().map(place).collect();
            let hidden = model.evaluate(&packer.finish(model.device())?)?;
            let logits = model.language_logits(&hidden.rows(&rows)?)?.to_vec2::<f32>()?;
            for (&i, logits) in open.iter().zip(&logits) {
                let allowed = logits.iter().zip(0u32..).filter(|(_, id)| !never.contains(id));
                texts[i].push(allowed.max_by(|a, b| a.0.total_cmp(b.0)).map_or(SEP, |(_, id)| id));
            }
        }
        written.extend(texts.iter().map(|ids| tokenizer.decode(ids)));
    }
    Ok(written)
}
