//! Scores of captions and of retrieval, in agreement with the implementations that published figures come from.
//!
//! The golden values of the tests are made by `reference/coco_eval.py`, which runs `pycocoevalcap` and numpy.

mod bleu;
mod cider;
pub mod classification;
mod ngrams;
mod recall;
mod rouge;
mod tokenise;

pub use cider::CiderReward;
pub use recall::{RECALL_AT, RecallScores, recall_at_k, recall_of_ranks};
pub use rouge::rouge_scores;
pub use tokenise::tokenise;

use ngrams::{NgramCounts, WordIds};
use rayon::prelude::*;
use serde::Serialize;

/// Scores of a set of captions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CaptionScores {
    /// BLEU-1 to BLEU-4 of the corpus, in `0..=1`.
    pub bleu: [f64; 4],
    /// ROUGE-L, in `0..=1`.
    pub rouge_l: f64,
    /// CIDEr-D, in `0..=10`; document frequencies are those of the references given. 0 where there is only one image.
    pub cider: f64,
}

/// Scores one candidate caption for each image against that image's references, all tokenised by [`tokenise`].
///
/// # Panics
/// If `references` is not as long as `candidates`.
#[must_use]
pub fn caption_scores(candidates: &[String], references: &[Vec<String>]) -> CaptionScores {
    assert_eq!(candidates.len(), references.len(), "one set of references for each candidate");
    let candidates: Vec<Vec<String>> = candidates.par_iter().map(|c| tokenise(c)).collect();
    let references: Vec<Vec<Vec<String>>> = references.par_iter().map(|set| set.iter().map(|r| tokenise(r)).collect()).collect();
    let mut words = WordIds::default();
    let candidates: Vec<Vec<u32>> = candidates.iter().map(|c| words.ids(c)).collect();
    let references: Vec<Vec<Vec<u32>>> = references.iter().map(|set| set.iter().map(|r| words.ids(r)).collect()).collect();
    let rouge_l = rouge::rouge_l(&candidates, &references);
    let candidates: Vec<NgramCounts> = candidates.iter().map(|c| NgramCounts::new(c)).collect();
    let references: Vec<Vec<NgramCounts>> =
        references.iter().map(|set| set.iter().map(|r| NgramCounts::new(r)).collect()).collect();
    CaptionScores { bleu: bleu::bleu(&candidates, &references), rouge_l, cider: cider::cider(&candidates, &references) }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        samples: Vec<Sample>,
        corpora: Vec<Corpus>,
        recall: Vec<Recall>,
    }

    #[derive(Deserialize)]
    struct Sample {
        candidate: String,
        references: Vec<String>,
        candidate_tokens: String,
        reference_tokens: Vec<String>,
    }

    #[derive(Deserialize)]
    struct Corpus {
        name: String,
        from: usize,
        to: usize,
        bleu: [f64; 4],
        rouge_l: f64,
        cider: f64,
    }

    #[derive(Deserialize)]
    struct Recall {
        images: Vec<Vec<f32>>,
        texts: Vec<Vec<f32>>,
        image_of_text: Vec<usize>,
        image_to_text: [f64; 3],
        text_to_image: [f64; 3],
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("reference/golden.json")).unwrap()
    }

    #[test]
    fn tokens_agree_with_the_ptb_tokenizer() {
        for sample in golden().samples {
            assert_eq!(tokenise(&sample.candidate).join(" "), sample.candidate_tokens);
            for (reference, tokens) in sample.references.iter().zip(&sample.reference_tokens) {
                assert_eq!(&tokenise(reference).join(" "), tokens, "{reference}");
            }
        }
    }

    #[test]
    fn caption_scores_agree_with_pycocoevalcap() {
        let golden = golden();
        for corpus in &golden.corpora {
            let samples = &golden.samples[corpus.from..corpus.to];
            let candidates: Vec<String> = samples.iter().map(|s| s.candidate.clone()).collect();
            let references: Vec<Vec<String>> = samples.iter().map(|s| s.references.clone()).collect();
            let scores = caption_scores(&candidates, &references);
            // Both sides compute in f64; only the order of sums differs.
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-9;
            let bleu = scores.bleu.iter().zip(corpus.bleu).all(|(&a, b)| close(a, b));
            let others = close(scores.rouge_l, corpus.rouge_l) && close(scores.cider, corpus.cider);
            assert!(bleu && others, "{}: {scores:?}", corpus.name);
        }
    }

    #[test]
    fn recall_agrees_with_numpy() {
        for case in golden().recall {
            let scores = recall_at_k(&case.images, &case.texts, &case.image_of_text);
            // The same counts divided by the same counts; reading JSON may lose the last bit.
            let close = |a: [f64; 3], b: [f64; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(close(scores.image_to_text, case.image_to_text), "{scores:?}");
            assert!(close(scores.text_to_image, case.text_to_image), "{scores:?}");
        }
    }

    #[test]
    fn nothing_to_score_is_zero_and_finite() {
        let scores = caption_scores(&[], &[]);
        assert!(scores.bleu.iter().all(|b| b.is_finite() && *b < 1e-3));
        assert_eq!((scores.rouge_l, scores.cider), (0.0, 0.0));
    }
}
