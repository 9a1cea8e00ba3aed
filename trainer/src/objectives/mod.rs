//! Pretraining and fine-tuning objectives.
//!
//! [`StepBatch::build`] draws a step's samples and packs them into one or several chunks; [`StepBatch::learn`] runs the forward
//! passes, reads every objective's loss off the hidden states, and gives the gradients. Draws depend on the seed, the step and
//! the sample's number alone: the same samples come out however many chunks a step is cut into.

mod chunk;
mod comparison;
mod contrastive;
mod draft;
mod learning;
pub(crate) mod losses;
mod masked_regions;
mod masking;
mod members;
mod passes;
mod self_critical;
mod step;
mod tally;

use rand::seq::SliceRandom;

pub use contrastive::contrastive_loss;
pub use learning::{Learnt, Losses};
pub use masking::{Fragments, MaskedText, Vocabulary, mask_detected, mask_regions, mask_text, take_fragments};
pub use self_critical::Critic;
pub use step::StepBatch;
pub use tally::Tally;

use crate::corpus::Corpus;
use crate::seed;
use crate::tasks::TaskData;
use crate::tasks::generation::WritingData;
use crate::tfidf::TfIdfIndex;
use crate::vision::Vision;

/// What a step draws from.
pub struct Source<'a> {
    /// Samples.
    pub corpus: &'a Corpus,
    /// Hard negatives; its texts are all pairs' captions in order.
    pub tfidf: Option<&'a TfIdfIndex>,
    /// First text in `tfidf` of each pair.
    pub first_text: &'a [usize],
    /// Makes region features of records, and the soft labels of masked regions.
    pub vision: &'a Vision,
    /// What masking has to know of the tokenizer.
    pub vocabulary: &'a Vocabulary,
    /// Examples of a downstream task.
    pub task: Option<&'a TaskData>,
    /// Examples of writing a text of another.
    pub writing: Option<&'a WritingData>,
    /// Rewards sampled captions.
    pub critic: Option<&'a Critic>,
}

/// Draws without replacement inside a pass: position `at` of the endless sequence of seeded permutations of `count` items.
fn shuffled(seed_value: u64, count: usize, at: u64, cache: &mut Option<(u64, Vec<u32>)>) -> usize {
    let pass = at / count as u64;
    if cache.as_ref().is_none_or(|(p, _)| *p != pass) {
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.shuffle(&mut seed::rng(seed::mix(seed_value, pass)));
        *cache = Some((pass, order));
    }
    cache.as_ref().map_or(0, |(_, order)| order[(at % count as u64) as usize] as usize)
}

/// Permutations in use, so that they are not made anew for every draw.
#[derive(Default)]
pub struct Orders {
    pairs: Option<(u64, Vec<u32>)>,
    further_pairs: Option<(u64, Vec<u32>)>,
    images: Option<(u64, Vec<u32>)>,
    texts: Option<(u64, Vec<u32>)>,
    examples: Option<(u64, Vec<u32>)>,
}

/// A small corpus for the tests of this module.
#[cfg(test)]
mod testing {
    use unimo::tokenizer::Tokenizer;

    use super::{Source, Vocabulary};
    use crate::backbone::{self, Backbone};
    use crate::corpus::Corpus;
    use crate::features::FeatureCache;
    use crate::scenes::{CorpusOptions, write_corpus};
    use crate::shards::read_shards;
    use crate::tokenizer_training;
    use crate::vision::Vision;

    /// What steps draw from: six scenes, five captions each.
    pub fn source<'a>(corpus: &'a Corpus, vision: &'a Vision, vocabulary: &'a Vocabulary) -> Source<'a> {
        const FIRST_TEXT: [usize; 6] = [0, 5, 10, 15, 20, 25];
        Source { corpus, tfidf: None, first_text: &FIRST_TEXT, vision, vocabulary, task: None, writing: None, critic: None }
    }

    /// Six scenes, each in a plain and a mirrored view, for a backbone of which so many blocks are trained.
    pub fn six_scenes(folder: &std::path::Path, trained_blocks: usize) -> (Corpus, Backbone, Tokenizer) {
        let file = |name: &str| folder.join(name);
        let shards = file("scenes");
        write_corpus(&shards, &CorpusOptions { seed: 5, count: 6, ..Default::default() }).unwrap();
        let mut texts = Vec::new();
        let shard = [shards.join("scenes-0000.tar")];
        read_shards(&shard, |sample| {
            texts.extend(sample.captions);
            Ok(())
        })
        .unwrap();
        let tokenizer = tokenizer_training::train(texts.iter().map(String::as_str), 400).unwrap();
        std::fs::write(file("tokenizer.json"), tokenizer).unwrap();
        let tokenizer = Tokenizer::from_file(&file("tokenizer.json")).unwrap();
        std::fs::write(file("backbone"), backbone::random_file(1).unwrap()).unwrap();
        let backbone = Backbone::load(&file("backbone")).unwrap();
        let cache = FeatureCache { folder: &file("features"), backbone: &backbone, trained_blocks, views: 2 };
        let mut corpus = Corpus::default();
        corpus.add_pairs(&[shards], &cache, &tokenizer, 48, &|_| ()).unwrap();
        (corpus, backbone, tokenizer)
    }
}
