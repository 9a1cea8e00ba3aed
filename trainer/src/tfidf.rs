//! Captions of other images that read most alike: hard negatives for the matching objective.

use std::collections::{HashMap, HashSet};

/// An index over texts, each belonging to one image.
pub struct TfIdfIndex {
    /// For each text, its terms with L2-normalised TF-IDF weights.
    vectors: Vec<Vec<(u32, f32)>>,
    /// For each term, the texts that hold it with its weight there; terms in more than a tenth of the texts are left out.
    postings: Vec<Vec<(u32, f32)>>,
    image_of: Vec<u32>,
    /// Logarithm of the inverse share of the texts that hold each term.
    idf: Vec<f32>,
}

impl TfIdfIndex {
    /// Indexes tokenised texts; `image_of[t]` is the image that text `t` describes.
    #[must_use]
    pub fn new(texts: &[&[u32]], image_of: Vec<u32>) -> Self {
        let terms = texts.iter().flat_map(|t| t.iter()).max().map_or(0, |&m| m as usize + 1);
        let mut document_frequency = vec![0u32; terms];
        for text in texts {
            for &term in text.iter().collect::<HashSet<_>>() {
                document_frequency[term as usize] += 1;
            }
        }
        let n = texts.len() as f32;
        let idf: Vec<f32> = document_frequency.iter().map(|&texts| (n / texts.max(1) as f32).ln()).collect();
        let vectors: Vec<Vec<(u32, f32)>> = texts.iter().map(|text| vector(text, &idf)).collect();
        let common = (texts.len() / 10).max(8) as u32;
        let mut postings = vec![Vec::new(); terms];
        for (i, vector) in vectors.iter().enumerate() {
            for &(term, weight) in vector {
                if document_frequency[term as usize] <= common {
                    postings[term as usize].push((i as u32, weight));
                }
            }
        }
        Self { vectors, postings, image_of, idf }
    }

    /// The `count` texts of other images with the largest cosine similarity to text `text`, best first; ties by index.
    #[must_use]
    pub fn hard_negatives(&self, text: usize, count: usize) -> Vec<usize> {
        let others = |other: usize| self.image_of[other] != self.image_of[text];
        self.ranked(&self.vectors[text], others, count).into_iter().map(|(other, _)| other).collect()
    }

    /// The `count` texts with the largest cosine similarity to other terms, and that similarity, best first; ties by index.
    /// Texts that share no term, and terms that no text holds, count nothing.
    #[must_use]
    pub fn nearest(&self, terms: &[u32], count: usize) -> Vec<(usize, f32)> {
        self.ranked(&vector(terms, &self.idf), |_| true, count)
    }

    fn ranked(&self, query: &[(u32, f32)], allowed: impl Fn(usize) -> bool, count: usize) -> Vec<(usize, f32)> {
        let mut scores: HashMap<u32, f32> = HashMap::new();
        for &(term, weight) in query {
            for &(other, other_weight) in &self.postings[term as usize] {
                *scores.entry(other).or_default() += weight * other_weight;
            }
        }
        let mut ranked: Vec<(usize, f32)> =
            scores.into_iter().map(|(other, score)| (other as usize, score)).filter(|&(other, _)| allowed(other)).collect();
        ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.truncate(count);
        ranked
    }
}

/// TF-IDF weights of length 1, sorted by term; terms beyond the index are left out.
fn vector(terms: &[u32], idf: &[f32]) -> Vec<(u32, f32)> {
    let mut counts: HashMap<u32, f32> = HashMap::new();
    for &term in terms.iter().filter(|&&term| (term as usize) < idf.len()) {
        *counts.entry(term).or_default() += 1.0;
    }
    let mut vector: Vec<(u32, f32)> = counts.into_iter().map(|(t, c)| (t, c * idf[t as usize])).collect();
    vector.sort_unstable_by_key(|&(t, _)| t);
    let norm = vector.iter().map(|(_, w)| w * w).sum::<f32>().sqrt().max(1e-12);
    for (_, weight) in &mut vector {
        *weight /= norm;
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_text_of_another_image_comes_first() {
        // Terms: 0 a, 1 red, 2 blue, 3 circle, 4 square, 5 dog
        let texts: [&[u32]; 5] = [&[0, 1, 3], &[0, 1, 3, 3], &[0, 1, 4], &[0, 5], &[0, 1, 3, 4]];
        let index = TfIdfIndex::new(&texts, vec![0, 0, 1, 2, 3]);
        // The sibling (text 1) is nearest of all, and is no negative.
        assert_eq!(index.hard_negatives(0, 2), [4, 2]);
        assert_eq!(index.hard_negatives(3, 2).len(), 2);
    }
}
