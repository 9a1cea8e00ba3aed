//! Evaluation of a model on development pictures.

mod reranking;

use std::fmt;

use anyhow::Result;
use serde::Serialize;
use unimo::tokenizer::Tokenizer;

use crate::corpus::Corpus;
use crate::metrics::{caption_scores, recall_at_k};
use crate::model::{Packer, Unimo};
use crate::regions::alike;
use crate::vision::Vision;
use reranking::Embedded;

pub use reranking::Reranked;

/// Pictures or texts in one forward pass.
const BATCH: usize = 50;
/// Longest caption that is generated, in tokens.
const MAX_WORDS: usize = 30;

/// Scores on development pictures.
#[derive(Debug, Clone, Serialize)]
pub struct Scores {
    /// Pictures evaluated.
    pub images: usize,
    /// CIDEr-D of greedy captions.
    pub cider: f64,
    /// BLEU-1 to BLEU-4.
    pub bleu: [f64; 4],
    /// ROUGE-L.
    pub rouge_l: f64,
    /// Image→text recall at 1, 5, 10 among the evaluated pictures' captions.
    pub image_to_text: [f64; 3],
    /// Text→image recall at 1, 5, 10 among the evaluated pictures.
    pub text_to_image: [f64; 3],
    /// The same after a second pass over the best candidates, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reranked: Option<Reranked>,
    /// The first captions, `(key, caption)`.
    pub samples: Vec<(String, String)>,
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |r: &[f64; 3]| r.map(|v| format!("{:.1}", 100.0 * v)).join("/");
        write!(
            f,
            "CIDEr {:.3}  BLEU-4 {:.3}  R@1/5/10 image→text {}  text→image {}  ({} pictures)",
            self.cider,
            self.bleu[3],
            percent(&self.image_to_text),
            percent(&self.text_to_image),
            self.images
        )?;
        let Some(reranked) = self.reranked else { return Ok(()) };
        for (by, recall) in [("matching", reranked.by_matching), ("likelihood", reranked.by_likelihood)] {
            let (texts, images) = (percent(&recall.image_to_text), percent(&recall.text_to_image));
            write!(f, "\n{} candidates by {by}: image→text {texts}  text→image {images}", reranked.candidates)?;
        }
        Ok(())
    }
}

/// What [`evaluate`] looks at.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Pictures, from the first.
    pub images: usize,
    /// Candidates of each picture and each text that are read together and put in order anew.
    pub rerank: Option<usize>,
}

/// Greedy captions, and retrieval by separately encoded embeddings, of the first pictures.
///
/// # Errors
/// Those of candle.
pub fn evaluate(model: &Unimo, vision: &Vision, tokenizer: &Tokenizer, corpus: &Corpus, extent: Extent) -> Result<Scores> {
    let count = extent.images.min(corpus.pairs.len());
    let (mut captions, mut images) = (vec![String::new(); count], vec![Vec::new(); count]);
    for start in (0..count).step_by(BATCH) {
        let records = vision.regions((start..count.min(start + BATCH)).map(|i| corpus.pair_record(i, 0)).collect())?;
        for group in alike(&records, BATCH) {
            let encoded = model.encode_records(&group.iter().map(|&i| &records[i]).collect::<Vec<_>>())?;
            let written = model.greedy_captions(&encoded, MAX_WORDS)?;
            let embedded = model.embed_image(&encoded)?.to_vec2::<f32>()?;
            for ((&i, ids), embedding) in group.iter().zip(written).zip(embedded) {
                captions[start + i] = tokenizer.decode(&ids);
                images[start + i] = embedding;
            }
        }
    }
    let (texts, image_of_text) = embed_texts(model, corpus, count)?;
    let references: Vec<Vec<String>> = corpus.pairs[..count].iter().map(|p| p.references.clone()).collect();
    let caption = caption_scores(&captions, &references);
    let recall = recall_at_k(&images, &texts, &image_of_text);
    let embedded = Embedded { images, texts, image_of_text };
    let rerank = |candidates| reranking::rerank(model, vision, corpus, &embedded, candidates);
    let samples = corpus.pairs.iter().zip(&captions).take(8).map(|(p, c)| (p.key.clone(), c.clone())).collect();
    Ok(Scores {
        images: count,
        cider: caption.cider,
        bleu: caption.bleu,
        rouge_l: caption.rouge_l,
        image_to_text: recall.image_to_text,
        text_to_image: recall.text_to_image,
        reranked: extent.rerank.map(rerank).transpose()?,
        samples,
    })
}

/// Embeddings of the first pictures.
pub(crate) fn embed_images(model: &Unimo, vision: &Vision, corpus: &Corpus, count: usize) -> Result<Vec<Vec<f32>>> {
    let mut images = vec![Vec::new(); count];
    for start in (0..count).step_by(BATCH) {
        let records = vision.regions((start..count.min(start + BATCH)).map(|i| corpus.pair_record(i, 0)).collect())?;
        for group in alike(&records, BATCH) {
            let encoded = model.encode_records(&group.iter().map(|&i| &records[i]).collect::<Vec<_>>())?;
            for (&i, embedding) in group.iter().zip(model.embed_image(&encoded)?.to_vec2::<f32>()?) {
                images[start + i] = embedding;
            }
        }
    }
    Ok(images)
}

/// Embeddings of all captions of the first pictures, and whose they are.
pub(crate) fn embed_texts(model: &Unimo, corpus: &Corpus, count: usize) -> Result<(Vec<Vec<f32>>, Vec<usize>)> {
    let (mut texts, mut image_of_text) = (Vec::new(), Vec::new());
    let all: Vec<(usize, &Vec<u32>)> =
        corpus.pairs[..count].iter().enumerate().flat_map(|(i, p)| p.captions.iter().map(move |c| (i, c))).collect();
    for chunk in all.chunks(4 * BATCH) {
        let mut packer = Packer::new(model);
        let rows: Vec<usize> = chunk.iter().map(|(_, ids)| packer.text(ids, false)).collect();
        let batch = packer.finish(model.device())?;
        texts.extend(model.text_embedding(&batch, &model.evaluate(&batch)?, &rows)?.to_vec2::<f32>()?);
        image_of_text.extend(chunk.iter().map(|(i, _)| *i));
    }
    Ok((texts, image_of_text))
}
