//! Contrasts of images and texts.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::ops::{AtOnce, Operators};

/// Added to a picture's share of its texts, so that its logarithm is finite.
const LEAST_SHARE: f64 = 1e-12;

/// Mean of the image→text and text→image contrasts. `images` is `[n, embedding]`, `texts` `[m, embedding]`, unit length;
/// `image_of_text[t]` is the row of the image that text `t` describes; `temperature` a scalar.
///
/// An image's captions are all its positives, summed inside the logarithm (arXiv 2012.15409, equation 1), and so never each
/// other's negatives. Images without a text add no image→text term.
///
/// # Errors
/// No text, and those of candle.
pub fn contrastive_loss(images: &Tensor, texts: &Tensor, image_of_text: &[usize], temperature: &Tensor) -> Result<Tensor> {
    let (n, all) = (images.dim(0)?, [0..images.dim(0)?, 0..texts.dim(0)?]);
    let terms = contrastive_part(&AtOnce(images.device()), [images, texts], image_of_text, n, temperature, &all)?;
    match terms.into_iter().map(Ok).reduce(|sum, term| sum? + term?) {
        Some(loss) => loss,
        None => candle_core::bail!("contrastive_loss: there is no text"),
    }
}

/// The terms of [`contrastive_loss`] of some of `n` images and some of the texts, which add up to their part of it; none where these have
/// none.
///
/// # Errors
/// Those of the operators.
pub(super) fn contrastive_part<O: Operators>(
    on: &O,
    [images, texts]: [&O::Array; 2],
    image_of_text: &[usize],
    n: usize,
    temperature: &O::Array,
    [own_images, own_texts]: &[Range<usize>; 2],
) -> Result<Vec<O::Array>> {
    let m = image_of_text.len();
    let mut is_described = vec![false; n];
    image_of_text.iter().for_each(|&image| is_described[image] = true);
    let described = is_described.iter().filter(|described| **described).count();
    let numbers = |of: &[usize]| of.iter().map(|&number| number as u32).collect::<Vec<u32>>();
    let (of_images, of_texts) = (numbers(&(0..n).collect::<Vec<_>>()), numbers(image_of_text));
    // Of these rows with all columns.
    let term = |[rows, columns]: [&O::Array; 2], own: &Range<usize>, numbers: [&[u32]; 2], least: f64, count: usize| {
        let rows = if own.len() == numbers[0].len() { rows.clone() } else { on.some_rows(rows, own.clone())? };
        let [of_rows, of_columns] = numbers;
        let products = on.scalar_products(&rows, columns)?;
        on.log_shares(&products, temperature, [&of_rows[own.clone()], of_columns], [least, -0.5 / count as f64])
    };
    let mut terms = Vec::new();
    if own_images.clone().any(|image| is_described[image]) {
        terms.push(term([images, texts], own_images, [&of_images, &of_texts], LEAST_SHARE, described)?);
    }
    if !own_texts.is_empty() {
        terms.push(term([texts, images], own_texts, [&of_texts, &of_images], 0.0, m)?);
    }
    Ok(terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Against a direct float64 evaluation of the formula.
    #[test]
    fn agrees_with_the_formula() {
        let (n, m, width, tau) = (3, 5, 4, 0.3);
        let image_of_text = [0, 0, 1, 2, 2];
        let row = |seed: usize| -> Vec<f64> {
            let v: Vec<f64> = (0..width).map(|i| ((seed * 7 + i * 3) as f64 * 1.7).sin()).collect();
            let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            v.into_iter().map(|x| x / norm).collect()
        };
        let images: Vec<Vec<f64>> = (0..n).map(|i| row(i + 1)).collect();
        let texts: Vec<Vec<f64>> = (0..m).map(|i| row(i + 11)).collect();
        let d = |i: usize, t: usize| (images[i].iter().zip(&texts[t]).map(|(a, b)| a * b).sum::<f64>() / tau).exp();
        let mut image_to_text = 0.0;
        for i in 0..n {
            let positive: f64 = (0..m).filter(|&t| image_of_text[t] == i).map(|t| d(i, t)).sum();
            image_to_text -= (positive / (0..m).map(|t| d(i, t)).sum::<f64>()).ln() / n as f64;
        }
        let mut text_to_image = 0.0;
        for (t, &own) in image_of_text.iter().enumerate() {
            text_to_image -= (d(own, t) / (0..n).map(|i| d(i, t)).sum::<f64>()).ln() / m as f64;
        }
        let expected = 0.5 * (image_to_text + text_to_image);
        let tensor = |rows: &[Vec<f64>]| {
            let flat: Vec<f32> = rows.iter().flatten().map(|&v| v as f32).collect();
            Tensor::from_vec(flat, (rows.len(), width), &Device::Cpu).unwrap()
        };
        let tau = Tensor::new(tau as f32, &Device::Cpu).unwrap();
        let got = contrastive_loss(&tensor(&images), &tensor(&texts), &image_of_text, &tau).unwrap().to_scalar::<f32>().unwrap();
        // f32 sums of a dozen terms of order 1.
        assert!((f64::from(got) - expected).abs() < 1e-5, "{got} {expected}");
    }
}
