//! Recall at k of image–text retrieval, both ways, with several texts for an image.

use rayon::prelude::*;
use serde::Serialize;

/// The ranks that recall is told for.
pub const RECALL_AT: [usize; 3] = [1, 5, 10];

/// R@1, R@5 and R@10, each in `0..=1`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct RecallScores {
    /// Share of the images with one of their own texts among the first k.
    pub image_to_text: [f64; 3],
    /// Share of the texts with their own image among the first k.
    pub text_to_image: [f64; 3],
}

/// Recall both ways of unit vectors by their dot product.
///
/// `images` is `[images][width]`, `texts` `[texts][width]`; text `t` belongs to image `image_of_text[t]`. Rank of a query's
/// best right answer = how many wrong answers score **at least** as high: a tie counts against the model, so that
/// embeddings that are all the same score nothing. An image without a text never counts as found.
///
/// # Panics
/// If `image_of_text` is not as long as `texts`.
#[must_use]
pub fn recall_at_k(images: &[Vec<f32>], texts: &[Vec<f32>], image_of_text: &[usize]) -> RecallScores {
    assert_eq!(texts.len(), image_of_text.len(), "one image for each text");
    let text_ranks: Vec<Option<usize>> = texts
        .par_iter()
        .zip(image_of_text)
        .map(|(text, &own)| {
            let score = dot(text, images.get(own)?);
            Some(images.iter().enumerate().filter(|&(image, v)| image != own && !below(dot(text, v), score)).count())
        })
        .collect();
    let image_ranks: Vec<Option<usize>> = images
        .par_iter()
        .enumerate()
        .map(|(image, vector)| {
            let scores: Vec<f32> = texts.iter().map(|text| dot(vector, text)).collect();
            let own = |t: &usize| image_of_text[*t] == image;
            let best = (0..texts.len()).filter(own).map(|t| scores[t]).reduce(f32::max)?;
            Some((0..texts.len()).filter(|t| !own(t) && !below(scores[*t], best)).count())
        })
        .collect();
    RecallScores { image_to_text: recall_of_ranks(&image_ranks), text_to_image: recall_of_ranks(&text_ranks) }
}

/// Not the negation of `>=`: where either is not a number, the answer counts as above, so that a broken model finds nothing.
fn below(score: f32, best: f32) -> bool {
    score < best
}

/// Recall at [`RECALL_AT`] of queries whose best right answer has so many wrong ones before it; `None` where it was not found.
#[must_use]
pub fn recall_of_ranks(ranks: &[Option<usize>]) -> [f64; 3] {
    RECALL_AT.map(|k| {
        let found = ranks.iter().flatten().filter(|&&rank| rank < k).count();
        found as f64 / ranks.len().max(1) as f64
    })
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_against_the_model() {
        let same = vec![vec![1.0, 0.0]; 12];
        let owners: Vec<usize> = (0..12).collect();
        assert_eq!(recall_at_k(&same, &same, &owners), RecallScores::default());
    }

    #[test]
    fn any_of_an_images_texts_will_do() {
        let images = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
        // Image 0 has a right and a wrong text, image 1 a half right one.
        let texts = vec![vec![0.9, 0.1], vec![0.0, 0.8], vec![0.2, 0.7]];
        let scores = recall_at_k(&images, &texts, &[0, 0, 1]);
        assert_eq!(scores.image_to_text, [0.5, 1.0, 1.0]);
        assert_eq!(scores.text_to_image, [2.0 / 3.0, 1.0, 1.0]);
    }

    #[test]
    fn not_a_number_finds_nothing() {
        let nan = vec![vec![f32::NAN]; 12];
        let owners: Vec<usize> = (0..12).collect();
        assert_eq!(recall_at_k(&nan, &vec![vec![1.0]; 12], &owners), RecallScores::default());
    }

    #[test]
    fn an_image_without_a_text_is_not_found() {
        let scores = recall_at_k(&[vec![1.0], vec![0.5]], &[vec![1.0]], &[0]);
        assert_eq!((scores.image_to_text[2], scores.text_to_image[0]), (0.5, 1.0));
    }
}
