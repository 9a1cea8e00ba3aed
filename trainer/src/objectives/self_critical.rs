//! Self-critical training (Rennie et al., CVPR 2017): captions drawn from the model itself, moved by their CIDEr-D.
//!
//! A caption's baseline is the mean reward of the picture's other draws (Luo, arXiv 2003.09971), so that every draw teaches and
//! none is decoded for the baseline alone. Draws are made without dropout and see every region; the pass that learns from them,
//! shared with the other objectives, has dropout and a recipe's `hidden_regions`.

use std::collections::HashMap;

use rayon::prelude::*;
use unimo::tokenizer::{SEP, Tokenizer};

use crate::corpus::Corpus;
use crate::features::is_mirrored;
use crate::metrics::CiderReward;

/// Rewards captions by CIDEr-D against the references of the pairs.
pub struct Critic {
    tokenizer: Tokenizer,
    reward: CiderReward,
    /// Reference set of mirrored views, where it differs from the pair's own.
    mirrored: HashMap<usize, usize>,
}

impl Critic {
    /// Takes the captions of all pairs, and those of mirrored views, as references.
    #[must_use]
    pub fn new(corpus: &Corpus, tokenizer: &Tokenizer) -> Self {
        let text = |captions: &[Vec<u32>]| captions.iter().map(|ids| tokenizer.decode(ids)).collect::<Vec<_>>();
        let mut references: Vec<Vec<String>> = corpus.pairs.par_iter().map(|pair| text(pair.captions_for(0))).collect();
        let mut mirrored = HashMap::new();
        for (i, pair) in corpus.pairs.iter().enumerate() {
            let other = pair.captions_for(1);
            if other != pair.captions_for(0) {
                mirrored.insert(i, references.len());
                references.push(text(other));
            }
        }
        Self { tokenizer: tokenizer.clone(), reward: CiderReward::new(&references), mirrored }
    }

    /// Rewards of captions (`[CLS] … [SEP]`, or cut off before `[SEP]`) of pair `pair` seen in `view`.
    #[must_use]
    pub fn rewards(&self, pair: usize, view: usize, captions: &[Vec<u32>]) -> Vec<f64> {
        let own = if is_mirrored(view) { self.mirrored.get(&pair).copied().unwrap_or(pair) } else { pair };
        let reward =
            |ids: &Vec<u32>| self.reward.score(own, &self.tokenizer.decode(ids), ids.last().is_some_and(|&last| last == SEP));
        captions.par_iter().map(reward).collect()
    }
}

/// Each reward less the mean of the others; their sum is zero.
pub(super) fn advantages(rewards: &[f64]) -> Vec<f64> {
    let sum: f64 = rewards.iter().sum();
    let others = rewards.len().saturating_sub(1).max(1) as f64;
    rewards.iter().map(|reward| reward - (sum - reward) / others).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::six_scenes;
    use super::super::{Orders, Source, StepBatch, shuffled};
    use super::*;
    use crate::model::{ModelConfig, Unimo};
    use crate::recipe::Recipe;
    use crate::vision::Vision;
    use candle_core::{Device, Tensor};

    #[test]
    fn advantages_compare_with_the_others() {
        assert_eq!(advantages(&[1.0, 2.0, 6.0]), [-3.0, -1.5, 4.5]);
        assert_eq!(advantages(&[0.7, 0.7]), [0.0, 0.0]);
        assert_eq!(advantages(&[]), [0.0; 0]);
    }

    #[test]
    fn every_sampled_token_carries_the_advantage_of_its_caption() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, backbone, tokenizer) = six_scenes(folder.path(), 0);
        let config = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        // A model that prefers the tokens of captions: draws of an untrained one would earn nothing.
        let mut bias = vec![0f32; tokenizer.vocabulary_size()];
        corpus.pairs.iter().flat_map(|p| &p.captions).flatten().for_each(|&id| bias[id as usize] = 4.0);
        model.weights()["lm.bias"].set(&Tensor::new(bias, &Device::Cpu).unwrap()).unwrap();
        let critic = Critic::new(&corpus, &tokenizer);
        let source = Source {
            corpus: &corpus,
            tfidf: None,
            first_text: &[],
            vision: &Vision::new(backbone, 0, &Device::Cpu).unwrap(),
            vocabulary: &super::super::Vocabulary::of(&tokenizer),
            task: None,
            writing: None,
            critic: Some(&critic),
        };
        let recipe = "steps = 1\nviews = 2\n[batch]\nimages = 5\ncaptions = 1\nsampled_captions = 3";
        let recipe = Recipe::from_toml(recipe).unwrap();
        let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), 0).unwrap();

        let sampled = &batch.chunks[0].parts.sampled;
        let mut captions = vec![vec![unimo::tokenizer::CLS]];
        for &token in &sampled.predictions.targets {
            let last = captions.last_mut().unwrap();
            last.push(token);
            if token == SEP || last.len() > super::super::step::SAMPLED_TOKENS {
                captions.push(vec![unimo::tokenizer::CLS]);
            }
        }
        captions.pop();
        assert_eq!(captions.len(), 15);
        let mut expected = Vec::new();
        for (image, own) in captions.chunks(3).enumerate() {
            let pair = shuffled(recipe.seed, corpus.pairs.len(), image as u64, &mut None);
            // The view is drawn inside; mirrored captions of these scenes differ, so only one view's rewards can agree.
            let rewards = &sampled.rewards[image * 3..image * 3 + 3];
            assert!((0..2).any(|view| critic.rewards(pair, view, own) == rewards), "{rewards:?}");
            for (ids, advantage) in own.iter().zip(advantages(rewards)) {
                expected.extend(vec![advantage as f32; ids.len() - 1]);
            }
        }
        assert_eq!(sampled.advantages, expected);
        assert!(expected.iter().any(|&a| a > 0.0) && expected.iter().any(|&a| a < 0.0), "no draw earned anything");
    }

    #[test]
    fn mirrored_views_are_judged_by_mirrored_captions() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, _, tokenizer) = six_scenes(folder.path(), 0);
        let critic = Critic::new(&corpus, &tokenizer);
        let sided = |p: &crate::corpus::Pair| p.captions_for(0) != p.captions_for(1);
        let pair = corpus.pairs.iter().position(sided).expect("one scene speaks of left or right");
        let caption = |view: usize| {
            let (plain, other) = (corpus.pairs[pair].captions_for(0), corpus.pairs[pair].captions_for(1));
            let differs = plain.iter().zip(other).position(|(a, b)| a != b).unwrap();
            vec![corpus.pairs[pair].captions_for(view)[differs].clone()]
        };
        for view in 0..2 {
            let (own, other) = (critic.rewards(pair, view, &caption(view)), critic.rewards(pair, view, &caption(1 - view)));
            assert!(own[0] > other[0], "view {view}: {own:?} {other:?}");
        }
    }
}
