//! Beam search over a next-word model.

use super::DecodeOptions;
use crate::lanes::log_sum_exp;
use crate::tokenizer::{CLS, SEP};

/// A text that goes on: which of the texts of the call before, and with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    /// Place of that text in the call before; 0 in the first call, where nothing is before.
    pub parent: usize,
    /// The id that it goes on with.
    pub id: u32,
}

/// A model that continues several texts at once, word by word.
pub trait LanguageModel {
    /// What can go wrong.
    type Error;

    /// Reads one more id of each text and gives a logit for every id that may follow, `[branches, vocabulary]`. All texts have
    /// the same length; those of the call before that are no parent are forgotten.
    ///
    /// # Errors
    /// Where the model cannot be run.
    fn read(&mut self, branches: &[Branch]) -> Result<Vec<f32>, Self::Error>;

    /// Whether an id may never be written, such as `[PAD]`. `[SEP]` ends a text and is dealt with by the search.
    fn is_forbidden(&self, id: u32) -> bool;
}

/// A text found by the search.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Its ids, without `[CLS]` and `[SEP]`.
    pub tokens: Vec<u32>,
    /// Log-probability of the ids, and of `[SEP]` where the model ended the text itself.
    pub log_probability: f32,
    /// What hypotheses are ranked by: the log-probability divided by the number of summands to the length penalty.
    pub score: f32,
}

impl Hypothesis {
    fn new(tokens: Vec<u32>, log_probability: f32, summands: usize, options: &DecodeOptions) -> Self {
        let score = log_probability / (summands.max(1) as f32).powf(options.length_penalty);
        Self { tokens, log_probability, score }
    }
}

/// A text still being written.
struct Live {
    tokens: Vec<u32>,
    log_probability: f32,
}

/// One way of continuing a live text.
struct Continuation {
    branch: Branch,
    log_probability: f32,
}

/// Writes a text from `[CLS]` to `[SEP]`, keeping the `options.beam` likeliest beginnings at every step; with a beam of 1, the
/// likeliest id each time. Texts have at least one id; those that reach `options.max_words` are taken as they stand. The search
/// ends when as many texts have ended as the beam is wide and no text still open ranks above them (after Wu et al., "Google's
/// Neural Machine Translation System", arXiv 1609.08144, section 7, with the length itself as normaliser and no coverage term).
///
/// # Errors
/// Those of the model.
pub fn beam_search<M: LanguageModel>(model: &mut M, options: &DecodeOptions) -> Result<Hypothesis, M::Error> {
    let beam = options.beam.max(1);
    let mut live = vec![Live { tokens: Vec::new(), log_probability: 0.0 }];
    let mut branches = vec![Branch { parent: 0, id: CLS }];
    let mut ended: Vec<Hypothesis> = Vec::new();
    for length in 1..=options.max_words.max(1) {
        let logits = model.read(&branches)?;
        let vocabulary = logits.len() / branches.len();
        let mut continuations = Vec::new();
        for (parent, (text, logits)) in live.iter().zip(logits.chunks_exact(vocabulary.max(1))).enumerate() {
            let allowed = |id| {
                if id == SEP { length > 1 } else { !model.is_forbidden(id) && !repeats(&text.tokens, id, options.no_repeat) }
            };
            // One more than the beam: `[SEP]` may be among them, and ends a text instead of continuing it.
            for (id, log_probability) in likeliest(logits, beam + 1, allowed) {
                let log_probability = text.log_probability + log_probability;
                continuations.push(Continuation { branch: Branch { parent, id }, log_probability });
            }
        }
        continuations.sort_by(|a, b| b.log_probability.total_cmp(&a.log_probability));
        let ends = continuations.iter().take(beam).filter(|next| next.branch.id == SEP);
        ended.extend(ends.map(|end| {
            let tokens = live[end.branch.parent].tokens.clone();
            Hypothesis::new(tokens, end.log_probability, length, options)
        }));
        continuations.retain(|next| next.branch.id != SEP);
        continuations.truncate(beam);
        let advance = |next: &Continuation| Live {
            tokens: live[next.branch.parent].tokens.iter().copied().chain([next.branch.id]).collect(),
            log_probability: next.log_probability,
        };
        live = continuations.iter().map(advance).collect();
        branches = continuations.iter().map(|next| next.branch).collect();

        ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        ended.truncate(beam);
        let open = live.first().map(|best| Hypothesis::new(Vec::new(), best.log_probability, length, options).score);
        if open.is_none_or(|open| ended.len() == beam && open <= ended[beam - 1].score) {
            live.clear();
            break;
        }
    }
    let cut = live.into_iter().map(|text| {
        let length = text.tokens.len();
        Hypothesis::new(text.tokens, text.log_probability, length, options)
    });
    let best = ended.into_iter().chain(cut).max_by(|a, b| a.score.total_cmp(&b.score));
    Ok(best.unwrap_or_else(|| Hypothesis::new(Vec::new(), 0.0, 1, options)))
}

/// Whether a run of `length` ids that `id` completes is in the text already; never, for a length of 0.
fn repeats(tokens: &[u32], id: u32, length: usize) -> bool {
    if length == 0 || tokens.len() < length {
        return false;
    }
    let begun = &tokens[tokens.len() + 1 - length..];
    tokens.windows(length).any(|run| run[length - 1] == id && run[..length - 1] == *begun)
}

/// The `count` likeliest allowed ids with their log-probabilities (softmax over all ids), likeliest first; of equals, the lower id.
fn likeliest(logits: &[f32], count: usize, allowed: impl Fn(u32) -> bool) -> Vec<(u32, f32)> {
    let normaliser = log_sum_exp(logits);
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in (0u32..).zip(logits) {
        // Few ids get as far as the second question, which looks through the whole text.
        if best.last().is_some_and(|worst| best.len() == count && logit <= worst.1) || !allowed(id) {
            continue;
        }
        let place = best.partition_point(|better| better.1 >= logit);
        best.insert(place, (id, logit));
        best.truncate(count);
    }
    best.into_iter().map(|(id, logit)| (id, logit - normaliser)).collect()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const IDS: usize = 9;
    const FORBIDDEN: [u32; 4] = [0, 1, 3, 8];

    /// Logits that depend on the whole text so far, reproducibly; counts how often it is run.
    struct Toy {
        seed: u64,
        runs: usize,
        texts: Vec<Vec<u32>>,
    }

    impl Toy {
        fn logits(&self, text: &[u32]) -> Vec<f32> {
            (0..IDS as u64)
                .map(|id| {
                    let mut hash = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ id;
                    for &word in text {
                        hash = (hash ^ u64::from(word + 1)).wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(23);
                    }
                    (hash >> 40) as f32 / (1u64 << 24) as f32 * 6.0
                })
                .collect()
        }
    }

    impl LanguageModel for Toy {
        type Error = Infallible;

        fn read(&mut self, branches: &[Branch]) -> Result<Vec<f32>, Infallible> {
            self.runs += 1;
            let longer = |branch: &Branch| self.texts[branch.parent].iter().copied().chain([branch.id]).collect();
            self.texts = branches.iter().map(longer).collect();
            Ok(self.texts.iter().flat_map(|text| self.logits(text)).collect())
        }

        fn is_forbidden(&self, id: u32) -> bool {
            FORBIDDEN.contains(&id)
        }
    }

    fn toy(seed: u64) -> Toy {
        Toy { seed, runs: 0, texts: vec![Vec::new()] }
    }

    /// The best of all texts there are.
    fn exhaustive(model: &Toy, text: &[u32], log_probability: f32, options: &DecodeOptions) -> Hypothesis {
        let mut read = vec![CLS];
        read.extend(text);
        let logits = model.logits(&read);
        let normaliser = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
        let mut best = Hypothesis::new(Vec::new(), f32::NEG_INFINITY, 1, options);
        for id in (0..IDS as u32).filter(|id| !FORBIDDEN.contains(id)) {
            let log_probability = log_probability + logits[id as usize] - normaliser;
            let found = if id == SEP {
                if text.is_empty() {
                    continue;
                }
                Hypothesis::new(text.to_vec(), log_probability, text.len() + 1, options)
            } else {
                let longer = [text, &[id]].concat();
                if longer.len() == options.max_words {
                    let length = longer.len();
                    Hypothesis::new(longer, log_probability, length, options)
                } else {
                    exhaustive(model, &longer, log_probability, options)
                }
            };
            if found.score > best.score {
                best = found;
            }
        }
        best
    }

    #[test]
    fn a_beam_of_one_takes_the_likeliest_word_each_time() {
        for seed in 0..40 {
            let mut model = toy(seed);
            let options = DecodeOptions { beam: 1, max_words: 6, length_penalty: 1.0, no_repeat: 0 };
            let found = beam_search(&mut model, &options).unwrap();
            let mut text = vec![CLS];
            while text.len() <= 6 {
                let logits = model.logits(&text);
                let allowed = |&id: &u32| !FORBIDDEN.contains(&id) && (id != SEP || text.len() > 1);
                let next = (0..IDS as u32).filter(allowed).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
                match next.unwrap() {
                    SEP => break,
                    id => text.push(id),
                }
            }
            assert_eq!(found.tokens, text[1..], "seed {seed}");
            assert_eq!(model.runs, (found.tokens.len() + 1).min(6), "seed {seed}: no run is wasted");
        }
    }

    #[test]
    fn a_beam_as_wide_as_the_space_finds_the_best_text() {
        for seed in 0..40 {
            for length_penalty in [0.0, 0.7, 1.0] {
                let mut model = toy(seed);
                // 4 writable ids and 3 places: never more than 64 open texts.
                let options = DecodeOptions { beam: 85, max_words: 3, length_penalty, no_repeat: 0 };
                let found = beam_search(&mut model, &options).unwrap();
                let best = exhaustive(&model, &[], 0.0, &options);
                assert_eq!(found.tokens, best.tokens, "seed {seed}, penalty {length_penalty}");
                // Sums of at most 4 terms of size 10, in f32.
                assert!((found.score - best.score).abs() < 1e-5, "seed {seed}: {} {}", found.score, best.score);
            }
        }
    }

    #[test]
    fn a_wider_beam_finds_likelier_texts_on_the_whole() {
        let sum = |beam| -> f32 {
            let options = DecodeOptions { beam, max_words: 6, length_penalty: 1.0, no_repeat: 0 };
            (0..60).map(|seed| beam_search(&mut toy(seed), &options).unwrap().score).sum()
        };
        assert!(sum(3) > sum(1) + 1.0, "{} {}", sum(3), sum(1));
    }

    #[test]
    fn only_words_are_written() {
        for seed in 0..40 {
            for beam in [1, 2, 5] {
                for max_words in [1, 2, 9] {
                    let options = DecodeOptions { beam, max_words, length_penalty: 1.0, no_repeat: 0 };
                    let found = beam_search(&mut toy(seed), &options).unwrap();
                    assert!((1..=max_words).contains(&found.tokens.len()));
                    assert!(found.tokens.iter().all(|id| *id != SEP && !FORBIDDEN.contains(id)));
                }
            }
        }
    }

    #[test]
    fn picks_in_order() {
        let all = |_| true;
        let picked: Vec<u32> = likeliest(&[0.0, 3.0, 1.0, 3.0], 3, all).iter().map(|p| p.0).collect();
        assert_eq!(picked, [1, 3, 2]);
        let [(_, one), (_, two)] = likeliest(&[0.0, 1000.0, 1000.0], 2, all)[..] else { panic!() };
        // Two equal ids that hold all probability: ln(1/2) each.
        assert!((one + std::f32::consts::LN_2).abs() < 1e-4 && one == two);
        assert!(likeliest(&[1.0; 4], 2, |_| false).is_empty());
    }

    #[test]
    fn runs_that_occurred_are_known() {
        for (tokens, id, length, expected) in [
            (&[5, 6, 7, 5, 6][..], 7, 3, true),
            (&[5, 6, 7, 5, 6], 5, 3, false),
            (&[5, 6, 7, 5, 6], 7, 0, false),
            (&[5, 6, 5], 6, 2, true),
            (&[5], 5, 1, true),
            (&[5, 6], 5, 3, false),
        ] {
            assert_eq!(repeats(tokens, id, length), expected, "{tokens:?} {id} {length}");
        }
    }

    #[test]
    fn no_run_occurs_twice_where_that_is_forbidden() {
        for seed in 0..40 {
            let options = DecodeOptions { beam: 3, max_words: 12, length_penalty: 4.0, no_repeat: 2 };
            let found = beam_search(&mut toy(seed), &options).unwrap().tokens;
            for i in 2..found.len() {
                assert!(!repeats(&found[..i], found[i], 2), "seed {seed}: {found:?}");
            }
        }
    }
}
