//! The contrast of images with what is encoded jointly with them, with texts and with what was retrieved for both (arXiv 2012.15409,
//! equation 1). On CUDA devices it is two kernels each way.

use std::iter::repeat_n;

use candle_core::{D, DType, Device, Result, Tensor};

/// In place of −∞, which no difference may be taken of.
const NOTHING: f64 = -1e30;

/// Who belongs to whom, of images that are contrasted: a rank's, which may be some of all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Relations {
    /// Number of these images.
    pub images: usize,
    /// Others' images that come before them.
    pub first_image: usize,
    /// Others' texts that come before theirs.
    pub first_text: usize,
    /// The image of each of their texts, from 0 on.
    pub image_of_text: Vec<usize>,
    /// The image that each of the retrieved images is for.
    pub retrieved_image_of: Vec<usize>,
    /// The image that each of the retrieved texts is for.
    pub retrieved_text_of: Vec<usize>,
    /// Of each pair that was encoded jointly, the image, and whether the text belongs to it.
    pub pairs: Vec<(usize, bool)>,
}

/// What a contrast is made of. The first four are scalar products of embeddings, which the temperature divides.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a, A> {
    /// The images with all texts, `[images, all texts]`.
    pub with_texts: &'a A,
    /// Their texts with all images, `[texts, all images]`; absent where they have none, as others are.
    pub with_images: Option<&'a A>,
    /// Retrieved images with their texts, `[retrieved images, texts]`.
    pub of_retrieved_images: Option<&'a A>,
    /// The images with retrieved texts, `[images, retrieved texts]`.
    pub of_retrieved_texts: Option<&'a A>,
    /// Logits of pairs, `[pairs, 1]`.
    pub of_pairs: Option<&'a A>,
}

impl<'a, A> Scores<'a, A> {
    /// All of them, in this order.
    pub fn all(&self) -> [Option<&'a A>; 5] {
        [Some(self.with_texts), self.with_images, self.of_retrieved_images, self.of_retrieved_texts, self.of_pairs]
    }
}

/// Members of one image's contrast: places in the vector of scores.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Contrast {
    /// Scores of what belongs together.
    positives: Vec<usize>,
    /// Scores of that, or logarithms of sums of their exponentials, and of what does not.
    all: Vec<usize>,
}

/// Places at which `of` holds a number.
fn numbered(of: &[usize], number: usize) -> impl Iterator<Item = usize> + '_ {
    of.iter().enumerate().filter(move |(_, other)| **other == number).map(|(place, _)| place)
}

impl Relations {
    /// That scores are as many as they have to be: of `sizes`, rows and columns, where there are some.
    pub(super) fn check(&self, sizes: [Option<(usize, usize)>; 5]) -> Result<()> {
        let (images, texts) = (self.images, self.image_of_text.len());
        let (found_images, found_texts) = (self.retrieved_image_of.len(), self.retrieved_text_of.len());
        let of = [&self.image_of_text, &self.retrieved_image_of, &self.retrieved_text_of];
        let known = of.into_iter().flatten().chain(self.pairs.iter().map(|(image, _)| image)).all(|&image| image < images);
        let fits = match sizes {
            [Some((rows, all_texts)), with_images, of_images, of_texts, of_pairs] => {
                let there = |rows: usize, columns: usize| (rows > 0 && columns > 0).then_some((rows, columns));
                rows == images
                    && all_texts >= self.first_text + texts
                    && with_images.map_or(texts == 0, |(rows, all)| rows == texts && all >= self.first_image + images)
                    && of_images == there(found_images, texts)
                    && of_texts == there(images, found_texts)
                    && of_pairs == there(self.pairs.len(), 1)
            }
            _ => false,
        };
        if !known || !fits {
            candle_core::bail!("cross_modal: scores of {sizes:?} for {self:?}");
        }
        Ok(())
    }

    /// The contrast of each image that has something to be attracted to. Positives: its texts, encoded alone and jointly; the images
    /// retrieved for it with its texts; it with the texts retrieved for it. Negatives: rewritten and neighbouring texts encoded with it;
    /// the other texts with it, and its texts with the other images. What was retrieved for others counts neither way: it may well fit
    /// this image too.
    ///
    /// Places are those of scores one after the other: of each image the sum over all texts, of each text the sum over all other images,
    /// of each text the score with its own, of each retrieved image those with all texts, of each image those with all retrieved texts,
    /// and of each pair.
    fn contrasts(&self) -> Vec<Contrast> {
        let (images, texts) = (self.images, self.image_of_text.len());
        let others = images;
        let own = others + texts;
        let of_retrieved_images = own + texts;
        let of_retrieved_texts = of_retrieved_images + self.retrieved_image_of.len() * texts;
        let of_pairs = of_retrieved_texts + images * self.retrieved_text_of.len();
        let of_image = |image: usize| {
            let mut positives = Vec::new();
            let mut all = vec![image];
            for text in numbered(&self.image_of_text, image) {
                all.push(others + text);
                positives.push(own + text);
            }
            let mut found = Vec::new();
            for retrieved in numbered(&self.retrieved_image_of, image) {
                found.extend(numbered(&self.image_of_text, image).map(|text| of_retrieved_images + retrieved * texts + text));
            }
            let row = of_retrieved_texts + image * self.retrieved_text_of.len();
            found.extend(numbered(&self.retrieved_text_of, image).map(|retrieved| row + retrieved));
            let pairs = || self.pairs.iter().enumerate().filter(|(_, (of, _))| *of == image);
            positives.extend(&found);
            positives.extend(pairs().filter(|(_, (_, fits))| *fits).map(|(pair, _)| of_pairs + pair));
            all.extend(found);
            all.extend(pairs().map(|(pair, _)| of_pairs + pair));
            Contrast { positives, all }
        };
        (0..images).map(of_image).filter(|contrast| !contrast.positives.is_empty()).collect()
    }
}

/// Cross-modal contrast: `factor` times the sum, over the images that have something to be attracted to, of −ln( Σ₊ eˢ / Σ eˢ ), a
/// scalar. The sum over positives is inside the logarithm. `temperature` is a scalar.
///
/// # Errors
/// Scores that do not fit those related, and those of candle.
pub fn cross_modal(scores: &Scores<Tensor>, temperature: &Tensor, relations: &Relations, factor: f64) -> Result<Tensor> {
    let sizes = scores.all().map(|of| of.map(Tensor::dims2).transpose());
    let [first, second, third, fourth, fifth] = sizes;
    relations.check([first?, second?, third?, fourth?, fifth?])?;
    let (device, over) = (temperature.device(), |of: &Tensor| of.broadcast_div(temperature));
    let mut vector = vec![over(scores.with_texts)?.log_sum_exp(D::Minus1)?];
    if let Some(with_images) = scores.with_images {
        let (with_images, all_images) = (over(with_images)?, with_images.dim(1)?);
        let columns: Vec<usize> = relations.image_of_text.iter().map(|image| relations.first_image + image).collect();
        let own = same(&columns, &(0..all_images).collect::<Vec<_>>(), device)?;
        vector.push((&with_images + own.affine(NOTHING, 0.0)?)?.log_sum_exp(D::Minus1)?);
        vector.push((with_images * own)?.sum(D::Minus1)?);
    }
    for of in [scores.of_retrieved_images, scores.of_retrieved_texts].into_iter().flatten() {
        vector.push(over(of)?.flatten_all()?);
    }
    if let Some(of_pairs) = scores.of_pairs {
        vector.push(of_pairs.flatten_all()?);
    }
    let contrasts = relations.contrasts();
    if contrasts.is_empty() {
        return scores.with_texts.sum_all()?.affine(0.0, 0.0);
    }
    sum_of_contrasts(&Tensor::cat(&vector, 0)?, &contrasts)?.affine(factor, 0.0)
}

/// `[rows, columns]`: 1 where both have the same number, 0 elsewhere.
fn same(rows: &[usize], columns: &[usize], device: &Device) -> Result<Tensor> {
    let numbers = |of: &[usize]| Tensor::from_vec(of.iter().map(|&number| number as u32).collect(), of.len(), device);
    numbers(rows)?.unsqueeze(1)?.broadcast_eq(&numbers(columns)?.unsqueeze(0)?)?.to_dtype(DType::F32)
}

/// The sum over `contrasts` of −ln( Σ₊ eˢ / Σ eˢ ); `scores` is `[n]`.
fn sum_of_contrasts(scores: &Tensor, contrasts: &[Contrast]) -> Result<Tensor> {
    let column = scores.unsqueeze(1)?;
    let sums = |of: fn(&Contrast) -> &Vec<usize>| {
        // Rows of equal width; what is filled up counts nothing.
        let width = contrasts.iter().map(|contrast| of(contrast).len()).max().unwrap_or(0);
        let (mut places, mut mask) = (Vec::<u32>::new(), Vec::new());
        for contrast in contrasts {
            let members = of(contrast);
            places.extend(members.iter().map(|&place| place as u32).chain(repeat_n(0, width - members.len())));
            mask.extend(repeat_n(0f32, members.len()).chain(repeat_n(f32::NEG_INFINITY, width - members.len())));
        }
        let shape = (contrasts.len(), width);
        let rows = super::select_rows(&column, &places.into())?.reshape(shape)?;
        (rows + super::from_host(mask, shape, scores.device())?)?.log_sum_exp(D::Minus1)
    };
    (sums(|contrast| &contrast.all)? - sums(|contrast| &contrast.positives)?)?.sum_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loss and gradient against a direct float64 evaluation, with contrasts of unlike sizes that share scores.
    #[test]
    fn sums_of_contrasts_agree_with_the_formula() {
        let scores: Vec<f32> = (0..9).map(|i| (i as f32 * 1.3).sin() * 4.0).collect();
        let contrasts = [
            Contrast { positives: vec![0, 3], all: vec![0, 3, 1, 2, 8] },
            Contrast { positives: vec![4], all: vec![5, 6, 7, 4, 0, 1] },
            Contrast { positives: vec![2, 5, 8], all: vec![2, 5, 8] },
        ];
        let formula = |scores: &[f64]| -> f64 {
            let sum = |places: &[usize]| places.iter().map(|&p| scores[p].exp()).sum::<f64>();
            contrasts.iter().map(|c| -(sum(&c.positives) / sum(&c.all)).ln()).sum::<f64>()
        };
        let wide: Vec<f64> = scores.iter().map(|&s| f64::from(s)).collect();
        let var = candle_core::Var::from_vec(scores, 9, &Device::Cpu).unwrap();
        let loss = sum_of_contrasts(var.as_tensor(), &contrasts).unwrap();
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
        let empty = Contrast { positives: vec![], all: vec![1] };
        assert!(sum_of_contrasts(var.as_tensor(), &[empty]).is_err());
        let outside = Contrast { positives: vec![9], all: vec![9] };
        assert!(sum_of_contrasts(var.as_tensor(), &[outside]).is_err());
    }

    #[test]
    fn siblings_and_what_was_retrieved_are_positives() {
        // Two images, with two texts and one. Scores: 0, 1 each image with all texts; 2, 3, 4 each text with other images; 5, 6, 7 with
        // its own.
        let mut relations = Relations { images: 2, image_of_text: vec![0, 0, 1], ..Relations::default() };
        let listed = |relations: &Relations| -> Vec<[Vec<usize>; 2]> {
            relations.contrasts().into_iter().map(|contrast| [contrast.positives, contrast.all]).collect()
        };
        assert_eq!(listed(&relations), [[vec![5, 6], vec![0, 2, 3]], [vec![7], vec![1, 4]]]);
        // An image for image 1 (8, 9, 10 with the texts), two texts for image 0 (11, 12 with image 0; 13, 14 with image 1), and image 0
        // read with a text of its own (15) and a false one (16).
        relations.retrieved_image_of = vec![1];
        relations.retrieved_text_of = vec![0, 0];
        relations.pairs = vec![(0, true), (0, false)];
        let expected = [[vec![5, 6, 11, 12, 15], vec![0, 2, 3, 11, 12, 15, 16]], [vec![7, 10], vec![1, 4, 10]]];
        assert_eq!(listed(&relations), expected);
        // Read with a false text alone, an image is attracted to nothing.
        let repelled = Relations { images: 1, pairs: vec![(0, false)], ..Relations::default() };
        assert_eq!(listed(&repelled), Vec::<[Vec<usize>; 2]>::new());
    }
}
