//! Sentence-level negatives by a model: captions of other pictures that its embeddings put nearest to a picture. They are what its first
//! pass of retrieval takes for right, and what its matching has to tell from it.

use std::collections::HashMap;

use anyhow::Result;
use rayon::prelude::*;

use crate::corpus::Corpus;
use crate::evaluation::{embed_images, embed_texts};
use crate::model::Unimo;
use crate::ops::kernels::{Matrix, Product, sgemm};
use crate::vision::Vision;

/// Pictures compared with all texts at once.
const BLOCK: usize = 32;

/// By each picture's key, the `count` captions of other pictures that are nearest to it, nearest first.
///
/// # Errors
/// Those of candle.
pub fn nearest_captions(model: &Unimo, vision: &Vision, corpus: &Corpus, count: usize) -> Result<HashMap<String, Vec<String>>> {
    let images = embed_images(model, vision, corpus, corpus.pairs.len())?;
    let (texts, image_of_text) = embed_texts(model, corpus, corpus.pairs.len())?;
    let written: Vec<&String> = corpus.pairs.iter().flat_map(|pair| &pair.references).collect();
    let near = nearest(
        &images,
        &texts,
        |image, text| image_of_text[text] != image && !corpus.pairs[image].references.contains(written[text]),
        count,
    );
    let captions = |near: Vec<usize>| near.into_iter().map(|text| written[text].clone()).collect();
    Ok(corpus.pairs.iter().zip(near).map(|(pair, near)| (pair.key.clone(), captions(near))).collect())
}

/// For each image, the texts with the largest dot products among those that are `eligible(image, text)`.
fn nearest(
    images: &[Vec<f32>],
    texts: &[Vec<f32>],
    eligible: impl Fn(usize, usize) -> bool + Sync,
    count: usize,
) -> Vec<Vec<usize>> {
    let (n, k) = (texts.len(), images.first().map_or(0, Vec::len));
    if n == 0 {
        return vec![Vec::new(); images.len()];
    }
    let texts = texts.concat();
    let of_block = |(block, images): (usize, &[Vec<f32>])| -> Vec<Vec<usize>> {
        let (rows, mut products) = (images.concat(), vec![0.0; images.len() * n]);
        let size = Product { m: images.len(), n, k, accumulate: false, parallel: false };
        sgemm(size, Matrix::rows(&rows, k), Matrix::rows(&texts, k).transposed(), &mut products, n);
        let of_image = |(image, products): (usize, &[f32])| {
            let image = block * BLOCK + image;
            let mut found: Vec<usize> = (0..n).collect();
            let order = |a: &usize, b: &usize| products[*b].total_cmp(&products[*a]).then(a.cmp(b));
            // Some of the nearest may be its own: a few more than are wanted are put in order.
            let mut sorted = n.min(count + 64);
            loop {
                if sorted < n {
                    found.select_nth_unstable_by(sorted, order);
                }
                found[..sorted].sort_unstable_by(order);
                let near: Vec<usize> =
                    found[..sorted].iter().copied().filter(|&text| eligible(image, text)).take(count).collect();
                if near.len() == count || sorted == n {
                    return near;
                }
                sorted = n.min(2 * sorted);
            }
        };
        products.chunks_exact(n).enumerate().map(of_image).collect()
    };
    images.par_chunks(BLOCK).enumerate().flat_map_iter(of_block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_eligible_texts_come_nearest_first() {
        let number = |i: usize| ((i * 7919) % 1009) as f32 / 504.5 - 1.0;
        let vectors = |count: usize, seed: usize| -> Vec<Vec<f32>> {
            (0..count).map(|i| (0..5).map(|d| number(seed + i * 5 + d)).collect()).collect()
        };
        let (images, texts) = (vectors(70, 3), vectors(300, 11));
        let eligible = |image: usize, text: usize| text % 70 != image && !text.is_multiple_of(3);
        let found = nearest(&images, &texts, eligible, 10);
        for (image, found) in found.iter().enumerate() {
            let dot = |text: usize| images[image].iter().zip(&texts[text]).map(|(a, b)| a * b).sum::<f32>();
            assert_eq!(found.len(), 10);
            assert!(found.iter().all(|&text| eligible(image, text)));
            assert!(found.windows(2).all(|pair| dot(pair[0]) >= dot(pair[1]) - 1e-5));
            let last = dot(found[9]);
            let better = (0..300).filter(|&text| eligible(image, text) && !found.contains(&text) && dot(text) > last + 1e-5);
            assert_eq!(better.count(), 0);
        }
        // Fewer than asked for are all there are.
        assert!(nearest(&images, &texts, eligible, 500).iter().all(|found| (190..=200).contains(&found.len())));
        assert_eq!(nearest(&[vec![1.0]], &[], |_, _| true, 3), [[0usize; 0]]);
    }
}
