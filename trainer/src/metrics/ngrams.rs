//! Counts of word n-grams.

use std::collections::HashMap;

/// Longest n-gram that the scores use.
pub(super) const LONGEST: usize = 4;

/// An n-gram as ids of its words.
pub(super) type Ngram = Vec<u32>;

/// How often each n-gram of one caption occurs, for n = 1 to [`LONGEST`].
#[derive(Debug, Default)]
pub(super) struct NgramCounts {
    words: u64,
    orders: [HashMap<Ngram, u64>; LONGEST],
}

impl NgramCounts {
    pub(super) fn new(words: &[u32]) -> Self {
        let mut counts = Self { words: words.len() as u64, ..Self::default() };
        for (n, order) in counts.orders.iter_mut().enumerate() {
            for ngram in words.windows(n + 1) {
                *order.entry(ngram.to_vec()).or_default() += 1;
            }
        }
        counts
    }

    /// Length of the caption in words.
    pub(super) fn words(&self) -> u64 {
        self.words
    }

    /// The n-grams of `n + 1` words.
    pub(super) fn order(&self, n: usize) -> &HashMap<Ngram, u64> {
        &self.orders[n]
    }

    /// How often an n-gram of `n + 1` words occurs.
    pub(super) fn count(&self, n: usize, ngram: &Ngram) -> u64 {
        self.orders[n].get(ngram).copied().unwrap_or(0)
    }
}

/// Numbers words, so that n-grams compare quickly.
#[derive(Debug, Default)]
pub(super) struct WordIds(HashMap<String, u32>);

impl WordIds {
    pub(super) fn ids(&mut self, words: &[String]) -> Vec<u32> {
        let ids = &mut self.0;
        let number = |word: &String| {
            let next = ids.len() as u32;
            *ids.entry(word.clone()).or_insert(next)
        };
        words.iter().map(number).collect()
    }

    /// As [`Self::ids`], without learning new words: those get numbers from the top, which no known word has.
    pub(super) fn known_ids(&self, words: &[String]) -> Vec<u32> {
        let mut unknown: Vec<&String> = Vec::new();
        let mut number = |word| {
            let seen = unknown.iter().position(|other| *other == word).unwrap_or_else(|| {
                unknown.push(word);
                unknown.len() - 1
            });
            u32::MAX - seen as u32
        };
        words.iter().map(|word| self.0.get(word).copied().unwrap_or_else(|| number(word))).collect()
    }
}
