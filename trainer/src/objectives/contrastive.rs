//! In-batch contrast of separately encoded images and texts.

use candle_core::{D, Result, Tensor};

use crate::ops;
use crate::ops::reference::log_softmax;

/// Added to a picture's share of its texts, so that its logarithm is finite.
pub(crate) const LEAST_SHARE: f64 = 1e-12;

/// Mean of the image→text and text→image contrasts. `images` is `[n, embedding]`, `texts` `[m, embedding]`, unit length;
/// `image_of_text[t]` is the row of the image that text `t` describes; `temperature` a scalar.
///
/// An image's captions are all its positives, summed inside the logarithm (arXiv 2012.15409, equation 1), and so never each
/// other's negatives. Images without a text add no image→text term.
///
/// # Errors
/// Those of candle.
pub fn contrastive_loss(images: &Tensor, texts: &Tensor, image_of_text: &[usize], temperature: &Tensor) -> Result<Tensor> {
    let (n, m) = (images.dim(0)?, texts.dim(0)?);
    let similarity = images.matmul(&texts.t()?)?.broadcast_div(temperature)?;
    let mut own = vec![0f32; n * m];
    for (text, &image) in image_of_text.iter().enumerate() {
        own[image * m + text] = 1.0;
    }
    let described = (0..n).filter(|i| image_of_text.contains(i)).map(|i| i as u32).collect();
    let own = Tensor::from_vec(own, (n, m), images.device())?;

    let p = log_softmax(&similarity)?.exp()?;
    let of_image = ops::select_rows(&(p * &own)?.sum_keepdim(D::Minus1)?, &described)?;
    let image_to_text = (of_image + LEAST_SHARE)?.log()?.mean_all()?.neg()?;
    let log_p = log_softmax(&similarity.t()?.contiguous()?)?;
    let text_to_image = (log_p * own.t()?)?.sum_all()?.neg()?.affine(1.0 / m as f64, 0.0)?;
    (image_to_text + text_to_image)?.affine(0.5, 0.0)
}

/// Members of one pair's contrast: places in the vector of scores.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contrast {
    /// Scores of what belongs together.
    pub positives: Vec<usize>,
    /// Scores of what does not.
    pub negatives: Vec<usize>,
}

/// Cross-modal contrastive loss over sets of unlike origin (arXiv 2012.15409, equation 1): the mean over `contrasts` of
/// −ln( Σ₊ eˢ / (Σ₊ eˢ + Σ₋ eˢ) ), the sum over positives inside the logarithm. `scores` is `[n]`: similarities already divided
/// by the temperature, of jointly or of separately encoded pairs.
///
/// # Errors
/// A contrast without a positive, a place outside the scores, and those of candle.
pub fn cross_modal_contrast(scores: &Tensor, contrasts: &[Contrast]) -> Result<Tensor> {
    let count = scores.dim(0)?;
    if contrasts.is_empty() || contrasts.iter().any(|c| c.positives.is_empty()) {
        candle_core::bail!("cross_modal_contrast: a contrast has no positive");
    }
    let width = contrasts.iter().map(|c| c.positives.len() + c.negatives.len()).max().unwrap_or(0);
    // Rows of equal width; what is filled up counts nothing.
    let (mut places, mut all, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for contrast in contrasts {
        let members = contrast.positives.iter().chain(&contrast.negatives);
        if let Some(bad) = members.clone().find(|&&place| place >= count) {
            candle_core::bail!("cross_modal_contrast: place {bad} of {count} scores");
        }
        let filled = contrast.positives.len() + contrast.negatives.len();
        places.extend(members.map(|&place| place as u32).chain(std::iter::repeat_n(0, width - filled)));
        all.extend((0..width).map(|i| if i < filled { 0f32 } else { f32::NEG_INFINITY }));
        own.extend((0..width).map(|i| if i < contrast.positives.len() { 0f32 } else { f32::NEG_INFINITY }));
    }
    let shape = (contrasts.len(), width);
    let device = scores.device();
    let rows = ops::select_rows(&scores.unsqueeze(1)?, &places.into())?.reshape(shape)?;
    let sum = |mask: Vec<f32>| (&rows + Tensor::from_vec(mask, shape, device)?)?.log_sum_exp(D::Minus1);
    (sum(all)? - sum(own)?)?.mean_all()
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

    /// Loss and gradient against a direct float64 evaluation, with contrasts of unlike sizes that share scores.
    #[test]
    fn cross_modal_contrast_agrees_with_the_formula() {
        let scores: Vec<f32> = (0..9).map(|i| (i as f32 * 1.3).sin() * 4.0).collect();
        let contrasts = [
            Contrast { positives: vec![0, 3], negatives: vec![1, 2, 8] },
            Contrast { positives: vec![4], negatives: vec![5, 6, 7, 0, 1] },
            Contrast { positives: vec![2, 5, 8], negatives: vec![] },
        ];
        let formula = |scores: &[f64]| -> f64 {
            let sum = |places: &[usize]| places.iter().map(|&p| scores[p].exp()).sum::<f64>();
            contrasts.iter().map(|c| -(sum(&c.positives) / (sum(&c.positives) + sum(&c.negatives))).ln()).sum::<f64>() / 3.0
        };
        let wide: Vec<f64> = scores.iter().map(|&s| f64::from(s)).collect();
        let var = candle_core::Var::from_vec(scores, 9, &Device::Cpu).unwrap();
        let loss = cross_modal_contrast(var.as_tensor(), &contrasts).unwrap();
        let gradient = loss.backward().unwrap().get(&var).unwrap().to_vec1::<f32>().unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - formula(&wide)).abs() < 1e-5);
        for (i, got) in gradient.into_iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = wide.clone();
                moved[i] += delta;
                formula(&moved)
            };
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((slope - f64::from(got)).abs() < 1e-5, "score {i}: {got} against {slope}");
        }
        let empty = Contrast { positives: vec![], negatives: vec![1] };
        assert!(cross_modal_contrast(var.as_tensor(), &[empty]).is_err());
        let outside = Contrast { positives: vec![9], negatives: vec![] };
        assert!(cross_modal_contrast(var.as_tensor(), &[outside]).is_err());
    }
}
