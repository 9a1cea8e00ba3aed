//! Captions of other images that read most alike: hard negatives for the matching objective.

use std::collections::{HashMap, HashSet};

/// An index over texts, each belonging to one image.
pub struct TfIdfIndex {
    /// For each text, its terms with L2-normalised TF-IDF weights.
    vectors: Vec<Vec<(u32, f32)>>,
    /// For each term, the texts that hold it with its weight there; terms in more than a tenth of the texts are left out.
    postings: Vec<Vec<(u32, f32)>>,
    image_of: Vec<u32>,
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
        let idf = |term: u32| (n / document_frequency[term as usize] as f32).ln();
        let vectors: Vec<Vec<(u32, f32)>> = texts
            .iter()
            .map(|text| {
                let mut counts: HashMap<u32, f32> = HashMap::new();
                for &term in *text {
                    *counts.entry(term).or_default() += 1.0;
                }
                let mut vector: Vec<(u32, f32)> = counts.into_iter().map(|(t, c)| (t, c * idf(t))).collect();
                vector.sort_unstable_by_key(|&(t, _)| t);
                let norm = vector.iter().map(|(_, w)| w * w).sum::<f32>().sqrt().max(1e-12);
                for (_, weight) in &mut vector {
                    *weight /= norm;
                }
                vector
            })
            .collect();
        let common = (texts.len() / 10).max(8) as u32;
        let mut postings = vec![Vec::new(); terms];
        for (i, vector) in vectors.iter().enumerate() {
            for &(term, weight) in vector {
                if document_frequency[term as usize] <= common {
                    postings[term as usize].push((i as u32, weight));
                }
            }
        }
        Self { vectors, postings, image_of }
    }

    /// The `count` texts of other images with the largest cosine similarity to text `text`, best first; ties by index.
    #[must_use]
    pub fn hard_negatives(&self, text: usize, count: usize) -> Vec<usize> {
        let mut scores: HashMap<u32, f32> = HashMap::new();
        for &(term, weight) in &self.vectors[text] {
            for &(other, other_weight) in &self.postings[term as usize] {
                *scores.entry(other).or_default() += weight * other_weight;
            }
        }
        let mut ranked: Vec<(u32, f32)> =
            scores.into_iter().filter(|&(other, _)| self.image_of[other as usize] != self.image_of[text]).collect();
        ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.into_iter().take(count).map(|(other, _)| other as usize).collect()
    }
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
