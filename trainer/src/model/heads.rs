//! Heads: pooled vectors, unified-space embeddings, matching score, language model, regions.

use candle_core::{Result, Tensor};

use super::{Dropout, Given, Hidden, ImageCache, ImageEmbedding, LAYER_NORM_EPS, PackedBatch, Passed, TextEmbedding, Unimo};
use crate::ops::{self, Operators, Targets};

/// Bounds of the learnt temperature.
pub const TEMPERATURE: [f32; 2] = [0.001, 0.5];

/// Images that are embedded together; each kind has dropout of its own where it is embedded from means of features.
#[derive(Debug, Clone, Copy)]
pub enum EmbeddedImages {
    /// The pictures that a step describes.
    Described,
    /// Images retrieved for them.
    Retrieved,
    /// Further pictures, of which the means of their features alone are known.
    Further,
}

/// Rows that a text is embedded from.
pub struct TextRows {
    /// Which, text after text.
    pub rows: Vec<usize>,
    /// Tokens behind each text's first; nothing where that alone is read.
    pub counts: Option<Vec<usize>>,
}

impl TextRows {
    /// As what embeds the texts is given them.
    #[must_use]
    pub fn given(&self) -> Given {
        match self.counts {
            Some(_) => Given::rows_to_read(&self.rows),
            None => Given::rows(&self.rows),
        }
    }
}

impl Unimo {
    /// Unified-space embeddings of images encoded alone, whose `[IMG]`s lie at `rows` of a pass over `batch`: `[n, embedding]`, unit
    /// length.
    ///
    /// # Errors
    /// Rows that are not an image's, and those of candle.
    pub fn image_embedding(&self, batch: &PackedBatch, passed: &Passed, rows: &[usize], kind: EmbeddedImages) -> Result<Tensor> {
        let x = match self.image_means(batch, passed, rows)? {
            Some(means) => means,
            None => passed.hidden.rows(rows)?,
        };
        self.embed_images(&self.at_once(), &x, passed.dropout, kind)
    }

    /// Of a model that embeds images by these, the means of the standardised features of images whose `[IMG]`s lie at `rows` of a pass
    /// over `batch`, `[n, region_feature]`. Another one embeds the rows' hidden states.
    ///
    /// # Errors
    /// Rows that are not an image's, and those of candle.
    pub fn image_means(&self, batch: &PackedBatch, passed: &Passed, rows: &[usize]) -> Result<Option<Tensor>> {
        match (self.config.image_embedding, &passed.features) {
            (ImageEmbedding::Token, _) => Ok(None),
            (ImageEmbedding::Pooled, Some(features)) => batch.means(features, rows).map(Some),
            (ImageEmbedding::Pooled, None) => candle_core::bail!("a batch without images has no image to embed"),
        }
    }

    /// Unified-space embeddings, `[n, embedding]`, unit length, of what images are embedded by: means of their standardised region
    /// features, `[n, region_feature]`, which dropout takes from, or hidden states of `[IMG]`, `[n, hidden]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn embed_images<O: Operators>(&self, on: &O, x: &O::Array, dropout: Dropout, kind: EmbeddedImages) -> Result<O::Array> {
        let [weight, bias] = self.both("embed.image")?;
        let x = match self.config.image_embedding {
            ImageEmbedding::Token => x.clone(),
            ImageEmbedding::Pooled => {
                // Behind the sites of the layers.
                let site = dropout.site(1 + 3 * self.config.layers + kind as usize);
                on.dropout(x, dropout.features, site)?
            }
        };
        on.unit_rows(&on.linear(&x, weight, bias)?)
    }

    /// Unified-space embeddings of encoded images, `[batch, embedding]`, unit length.
    ///
    /// # Errors
    /// Those of candle.
    pub fn embed_image(&self, image: &ImageCache) -> Result<Tensor> {
        let x = match self.config.image_embedding {
            ImageEmbedding::Token => image.hidden.narrow(1, 0, 1)?.squeeze(1)?,
            ImageEmbedding::Pooled => image.means.clone(),
        };
        self.embed_images(&self.at_once(), &x, Dropout::OFF, EmbeddedImages::Described)
    }

    /// Unified-space embeddings of texts encoded alone, whose `[CLS]`s lie at `rows` of a pass over `batch` that gave the hidden
    /// states: `[n, embedding]`, unit length.
    ///
    /// # Errors
    /// Rows that are not a text's first, and those of candle.
    pub fn text_embedding(&self, batch: &PackedBatch, hidden: &Hidden, rows: &[usize]) -> Result<Tensor> {
        let TextRows { rows, counts } = self.text_rows(batch, rows)?;
        self.embed_texts(&self.at_once(), &hidden.rows(&rows)?, counts.as_deref())
    }

    /// What texts are embedded from, whose `[CLS]`s lie at `rows` of a batch.
    ///
    /// # Errors
    /// Rows that are not a text's first.
    pub fn text_rows(&self, batch: &PackedBatch, rows: &[usize]) -> Result<TextRows> {
        match self.config.text_embedding {
            TextEmbedding::Token => Ok(TextRows { rows: rows.to_vec(), counts: None }),
            TextEmbedding::Both => {
                let counts = rows.iter().map(|&row| batch.tokens_behind(row)).collect::<Result<Vec<usize>>>()?;
                let rows = rows.iter().zip(&counts).flat_map(|(&row, &count)| row..=row + count).collect();
                Ok(TextRows { rows, counts: Some(counts) })
            }
        }
    }

    /// Unified-space embeddings of texts, `[n, embedding]`, unit length, of the hidden states of what they are embedded from.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn embed_texts<O: Operators>(&self, on: &O, hidden: &O::Array, counts: Option<&[usize]>) -> Result<O::Array> {
        let [weight, bias] = self.both("embed.text")?;
        let x = match counts {
            Some(counts) => on.first_and_mean(hidden, counts)?,
            None => hidden.clone(),
        };
        on.unit_rows(&on.linear(&x, weight, bias)?)
    }

    /// Matching logits of jointly encoded pairs: hidden states of `[IMG]` and `[CLS]`, both `[n, hidden]` → `[n, 1]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn match_logits<O: Operators>(&self, on: &O, image: &O::Array, text: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("match")?;
        on.linear(&self.pool(on, Some(image), text)?, weight, bias)
    }

    /// The poolings of `[IMG]` and `[CLS]`, multiplied, or that of `[CLS]` alone.
    fn pool<O: Operators>(&self, on: &O, image: Option<&O::Array>, text: &O::Array) -> Result<O::Array> {
        let ([of_image, image_bias], [of_text, text_bias]) = (self.both("pool.image")?, self.both("pool.text")?);
        let text = on.linear(text, of_text, text_bias)?;
        match image {
            Some(image) => on.relu_product(&on.linear(image, of_image, image_bias)?, &text),
            None => on.relu(&text),
        }
    }

    /// Logits of a downstream task, `[n, classes]`, from hidden states: the poolings of `[IMG]` and `[CLS]`, multiplied, or that of
    /// `[CLS]` alone where there are no images; then a hidden layer.
    ///
    /// # Errors
    /// Another number of images than of texts, a model without a task's head, and those of the operators.
    pub fn task_logits<O: Operators>(&self, on: &O, image: Option<&O::Array>, text: &O::Array) -> Result<O::Array> {
        let ([of_hidden, hidden_bias], [of_output, output_bias]) = (self.both("task.hidden")?, self.both("task.output")?);
        on.linear(&on.linear_gelu(&self.pool(on, image, text)?, of_hidden, hidden_bias)?, of_output, output_bias)
    }

    /// The contrast's temperature τ, a scalar inside [0.001, 0.5].
    ///
    /// # Errors
    /// Those of candle.
    pub fn temperature(&self) -> Result<Tensor> {
        ops::bounded_exp(self.log_temperature()?, TEMPERATURE)
    }

    /// Its logarithm, where it is inside its bounds, [`TEMPERATURE`].
    ///
    /// # Errors
    /// Those of candle.
    pub fn log_temperature(&self) -> Result<&Tensor> {
        self.weight("temperature")
    }

    fn lm_transform<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let ([weight, bias], [of_norm, norm_bias]) = (self.both("lm.transform")?, self.both("lm.norm")?);
        on.layer_norm(&on.linear_gelu(hidden, weight, bias)?, of_norm, norm_bias, LAYER_NORM_EPS)
    }

    /// Mean cross-entropy of the language model at the given hidden states `[n, hidden]`.
    ///
    /// # Errors
    /// As many targets as rows are needed, inside the vocabulary.
    pub fn language_loss(&self, hidden: &Tensor, targets: Vec<u32>, smoothing: f32) -> Result<Tensor> {
        self.language_losses(&self.at_once(), hidden, &Targets::of_one(targets, None, smoothing))?.get(0)
    }

    /// Cross-entropies of the language model at the given hidden states `[n, hidden]`, as
    /// [`tied_cross_entropy`](ops::tied_cross_entropy) gives them: `[1 + parts]`.
    ///
    /// # Errors
    /// As many targets as rows are needed, inside the vocabulary.
    pub fn language_losses<O: Operators>(&self, on: &O, hidden: &O::Array, targets: &Targets) -> Result<O::Array> {
        let x = self.lm_transform(on, hidden)?;
        on.tied_cross_entropy(&x, self.weight("text.token.weight")?, &on.weight(self.weight("lm.bias")?), targets)
    }

    /// Policy-gradient loss of sampled tokens: the mean of −advantage · ln p(target), p being the softmax of the logits divided by
    /// `temperature`, at the given hidden states `[n, hidden]`; advantages are the targets' weights. As
    /// [`tied_cross_entropy`](ops::tied_cross_entropy) gives it: `[2]`, both the same.
    ///
    /// # Errors
    /// As many targets and advantages as rows are needed, targets inside the vocabulary.
    pub fn policy_loss<O: Operators>(&self, on: &O, hidden: &O::Array, targets: &Targets, temperature: f64) -> Result<O::Array> {
        let x = on.scaled(&self.lm_transform(on, hidden)?, 1.0 / temperature)?;
        let bias = on.scaled(&on.weight(self.weight("lm.bias")?), 1.0 / temperature)?;
        on.tied_cross_entropy(&x, self.weight("text.token.weight")?, &bias, targets)
    }

    /// Logits of the language model, `[n, hidden]` → `[n, vocabulary]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn language_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = self.lm_transform(&self.at_once(), hidden)?;
        ops::linear(&x, self.weight("text.token.weight")?, self.weight("lm.bias")?)
    }

    /// Predicted features of regions, `[n, hidden]` → `[n, region_feature]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn region_features<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("region.feature")?;
        on.linear(hidden, weight, bias)
    }

    /// Logits of the regions' classes, `[n, hidden]` → `[n, region_classes]`.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn region_logits<O: Operators>(&self, on: &O, hidden: &O::Array) -> Result<O::Array> {
        let [weight, bias] = self.both("region.class")?;
        on.linear(hidden, weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::model::{Features, ModelConfig, Packer, RegionStatistics, Regions};
    use crate::objectives::contrastive_loss;
    use crate::regions::{Detected, Record};

    const CELLS: usize = 4;
    const WIDTH: usize = 3;
    const EMBEDDING: usize = 5;

    /// Statistics that leave no feature as it is.
    const MEAN: [f32; WIDTH] = [1.0, -2.0, 0.3];
    const DEVIATION: [f32; WIDTH] = [0.5, 1.5, 2.0];

    fn model(grid: usize, detected_regions: usize) -> Unimo {
        let size = ModelConfig::named("pico").unwrap();
        let image_embedding = ImageEmbedding::Pooled;
        let config = ModelConfig { grid, detected_regions, region_feature: WIDTH, embedding: EMBEDDING, image_embedding, ..size };
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.set_statistics(RegionStatistics { mean: MEAN.to_vec(), deviation: DEVIATION.to_vec() }).unwrap();
        model.weights()["embed.image.bias"].set(&Tensor::new(&[0.1f32, -0.2, 0.3, -0.4, 0.5], &Device::Cpu).unwrap()).unwrap();
        model
    }

    fn wide(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
    }

    /// Weight, then bias, of `embed.image`.
    fn layer(model: &Unimo) -> Vec<f64> {
        ["weight", "bias"].iter().flat_map(|kind| wide(model.weights()[&format!("embed.image.{kind}")].as_tensor())).collect()
    }

    /// The embedding of row-major region features, by hand.
    fn by_hand(layer: &[f64], features: &[f64], hidden: &[usize]) -> Vec<f64> {
        let visible: Vec<&[f64]> =
            features.chunks_exact(WIDTH).enumerate().filter(|(r, _)| !hidden.contains(r)).map(|(_, row)| row).collect();
        let mean = |i: usize| visible.iter().map(|row| row[i]).sum::<f64>() / visible.len() as f64;
        let pooled = |i: usize| (mean(i) - f64::from(MEAN[i])) / f64::from(DEVIATION[i]);
        let (weight, bias) = layer.split_at(EMBEDDING * WIDTH);
        let embedded: Vec<f64> =
            (0..EMBEDDING).map(|row| bias[row] + (0..WIDTH).map(|i| weight[row * WIDTH + i] * pooled(i)).sum::<f64>()).collect();
        let length = embedded.iter().map(|v| v * v).sum::<f64>().sqrt();
        embedded.into_iter().map(|v| v / length).collect()
    }

    /// Sums of a dozen products of order 1 in f32.
    fn assert_near(got: &[f64], expected: &[f64], what: &str) {
        assert_eq!(got.len(), expected.len(), "{what}");
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{what}: {got:?} is not {expected:?}");
    }

    /// Features of two pictures.
    fn pictures() -> Vec<f32> {
        (0..2 * CELLS * WIDTH).map(|v| (v as f32 * 0.7).sin() * 3.0).collect()
    }

    /// Pictures as they are packed, and their hidden cells: the second one twice, the second time with a cell hidden.
    const IMAGES: [(usize, &[usize]); 3] = [(1, &[]), (1, &[2]), (0, &[])];

    /// Packs them between texts and other images, and gives the rows of their `[IMG]`s.
    fn pack<'p>(packer: &mut Packer, features: impl Fn(usize) -> Features<'p>) -> Vec<usize> {
        let mut rows = Vec::new();
        for (picture, masked) in IMAGES {
            packer.text(&[0, 9, 2], false);
            packer.pair(Regions { features: features(0), boxes: None, masked: &[0, 3] }, &[0, 7, 2]);
            let regions = Regions { features: features(picture), boxes: None, masked };
            rows.push(packer.image_with_captions(regions, &[&[0, 7]]).image);
        }
        rows
    }

    #[test]
    fn a_pooled_embedding_is_that_of_the_visible_cells_mean() {
        let mut model = model(2, 0);
        let (values, layer) = (pictures(), layer(&model));
        let cells = |picture: usize| &values[picture * CELLS * WIDTH..(picture + 1) * CELLS * WIDTH];
        let tensor = Tensor::from_slice(&values, (2, CELLS, WIDTH), &Device::Cpu).unwrap();
        let expected: Vec<f64> = IMAGES
            .into_iter()
            .flat_map(|(picture, hidden)| {
                let features: Vec<f64> = cells(picture).iter().map(|&v| f64::from(v)).collect();
                by_hand(&layer, &features, hidden)
            })
            .collect();
        let trained = |model: &Unimo, given: bool| {
            let mut packer = Packer::new(model);
            let rows = pack(&mut packer, |picture| match given {
                true => Features::Values(cells(picture)),
                false => Features::Picture(picture),
            });
            let batch = packer.finish(&Device::Cpu).unwrap();
            let passed = model.forward(&batch, (!given).then_some(&tensor), Dropout::OFF).unwrap();
            assert!(model.image_embedding(&batch, &passed, &[0], EmbeddedImages::Described).is_err(), "a text has no mean");
            wide(&model.image_embedding(&batch, &passed, &rows, EmbeddedImages::Described).unwrap())
        };
        let inferred = |model: &Unimo| {
            let embedded = wide(&model.embed_image(&model.encode_image(&tensor).unwrap()).unwrap());
            [&embedded[EMBEDDING..], &embedded[..EMBEDDING]].concat()
        };
        // Inference hides nothing: the second of the three is not among its images.
        let visible = [&expected[..EMBEDDING], &expected[2 * EMBEDDING..]].concat();
        assert_near(&trained(&model, true), &expected, "packed by value");
        assert_near(&trained(&model, false), &expected, "packed by picture");
        assert_near(&inferred(&model), &visible, "inference");
        model.fold_statistics().unwrap();
        assert_eq!(*model.statistics(), RegionStatistics::identity(WIDTH));
        assert_near(&trained(&model, true), &expected, "folded");
        assert_near(&inferred(&model), &visible, "folded inference");
    }

    #[test]
    fn a_pooled_embedding_of_detected_regions_takes_as_many_as_there_are() {
        let model = model(0, 3);
        let record = |regions: usize, phase: f32| Record {
            values: (0..WIDTH * regions).map(|v| (v as f32 * 0.7 + phase).sin()).collect(),
            detected: Some(Detected { boxes: vec![0.5; 5 * regions], probabilities: Vec::new() }),
        };
        let (records, mut packer) = ([record(3, 0.0), record(1, 1.0), record(2, 2.0)], Packer::new(&model));
        let rows = records.each_ref().map(|record| packer.image_with_captions(Regions::of(record, &[]), &[]).image);
        let batch = packer.finish(&Device::Cpu).unwrap();
        let passed = model.forward(&batch, None, Dropout::OFF).unwrap();
        let trained = wide(&model.image_embedding(&batch, &passed, &rows, EmbeddedImages::Described).unwrap());
        for (trained, record) in trained.chunks_exact(EMBEDDING).zip(&records) {
            let features: Vec<f64> = record.values.iter().map(|&v| f64::from(v)).collect();
            assert_near(trained, &by_hand(&layer(&model), &features, &[]), "training");
            assert_near(&wide(&model.embed_image(&model.encode_records(&[record]).unwrap()).unwrap()), trained, "inference");
        }
    }

    #[test]
    fn dropout_reaches_pooled_features_alike_in_both_passes_of_a_chunk_and_unlike_for_other_images() {
        let model = model(2, 0);
        let means = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0], (2, WIDTH), &Device::Cpu).unwrap();
        let embed =
            |dropout: Dropout, kind: EmbeddedImages| wide(&model.embed_images(&model.at_once(), &means, dropout, kind).unwrap());
        let dropout = Dropout::of(0.5, 7);
        let once = embed(dropout, EmbeddedImages::Described);
        assert_eq!(once, embed(dropout, EmbeddedImages::Described));
        assert_ne!(once, embed(Dropout::OFF, EmbeddedImages::Described));
        assert_ne!(once, embed(dropout, EmbeddedImages::Further));
        // Its share is not that of the layers.
        let kind = EmbeddedImages::Described;
        assert_eq!(once, embed(Dropout { rate: 0.0, ..dropout }, kind));
        assert_eq!(embed(Dropout { features: 0.0, ..dropout }, kind), embed(Dropout::OFF, kind));
    }

    /// Texts as they are packed, each behind a pair that is not among them; the second is empty.
    const TEXTS: [&[u32]; 4] = [&[0, 7, 2], &[0, 2], &[0, 9, 8, 7, 5, 2], &[0, 6, 2]];

    /// The values, and the gradients of their weighted sum by the hidden states.
    #[test]
    fn a_text_embedding_of_both_is_of_cls_beside_the_mean_of_the_tokens_behind_it() {
        let text_embedding = TextEmbedding::Both;
        let config = ModelConfig { text_embedding, ..model(2, 0).config().clone() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.weights()["embed.text.bias"].set(&Tensor::new(&[0.1f32, -0.2, 0.3, -0.4, 0.5], &Device::Cpu).unwrap()).unwrap();
        let (features, mut packer) = (pictures(), Packer::new(&model));
        let rows = TEXTS.map(|ids| {
            packer.pair(Regions::visible(&features[..CELLS * WIDTH]), &[0, 9, 2]);
            packer.text(ids, false)
        });
        let batch = packer.finish(&Device::Cpu).unwrap();
        let hidden = Var::from_tensor(&model.evaluate(&batch).unwrap().constants().unwrap()).unwrap();
        for row in [0, rows[0] + 1, batch.rows()] {
            assert!(
                model.text_embedding(&batch, &hidden.as_tensor().clone().into(), &[row]).is_err(),
                "row {row} is not a text's first"
            );
        }

        let width = model.config().hidden;
        let [weight, bias] = ["weight", "bias"].map(|kind| wide(model.weights()[&format!("embed.text.{kind}")].as_tensor()));
        let by_hand = |hidden: &[f64]| -> Vec<f64> {
            let of_text = |(row, ids): (usize, &[u32])| {
                let at = |row: usize, i: usize| hidden[row * width + i];
                let mean = |i: usize| (1..ids.len()).map(|token| at(row + token, i)).sum::<f64>() / (ids.len() - 1) as f64;
                let both: Vec<f64> = (0..width).map(|i| at(row, i)).chain((0..width).map(mean)).collect();
                let product = |row: &[f64]| row.iter().zip(&both).map(|(w, x)| w * x).sum::<f64>();
                let embedded: Vec<f64> =
                    weight.chunks_exact(2 * width).zip(&bias).map(|(row, bias)| product(row) + bias).collect();
                let length = embedded.iter().map(|v| v * v).sum::<f64>().sqrt();
                embedded.into_iter().map(|v| v / length).collect::<Vec<f64>>()
            };
            rows.into_iter().zip(TEXTS).flat_map(of_text).collect()
        };
        let (embedded, values) =
            (model.text_embedding(&batch, &hidden.as_tensor().clone().into(), &rows).unwrap(), wide(hidden.as_tensor()));
        assert_near(&wide(&embedded), &by_hand(&values), "packed");

        let count = TEXTS.len() * EMBEDDING;
        let factors: Vec<f32> = (0..count).map(|v| (v as f32 * 1.3).cos()).collect();
        let loss = |hidden: &[f64]| by_hand(hidden).iter().zip(&factors).map(|(v, f)| v * f64::from(*f)).sum::<f64>();
        let weighted = (embedded.flatten_all().unwrap() * Tensor::new(factors.as_slice(), &Device::Cpu).unwrap()).unwrap();
        let gradients = weighted.sum_all().unwrap().backward().unwrap();
        // Of the longest text every row, of all rows a few columns.
        for (place, got) in wide(gradients.get(&hidden).unwrap()).into_iter().enumerate().step_by(7) {
            let at = |delta: f64| {
                let mut moved = values.clone();
                moved[place] += delta;
                loss(&moved)
            };
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((slope - got).abs() < 1e-5 * (1.0 + slope.abs()), "{place}: {got} against {slope}");
        }
    }

    /// Of the contrast of pooled images with fixed texts, by the layer's weights and by the pictures' features.
    #[test]
    fn the_contrasts_gradients_are_those_of_the_formula() {
        const TEMPERATURE: f64 = 0.2;
        const IMAGE_OF_TEXT: [usize; 4] = [0, 2, 0, 1];
        let model = model(2, 0);
        let var = Var::from_vec(pictures(), (2, CELLS, WIDTH), &Device::Cpu).unwrap();
        let texts: Vec<f32> = (0..IMAGE_OF_TEXT.len() * EMBEDDING).map(|v| (v as f32 * 1.3).cos() * 0.4).collect();
        let texts = Tensor::from_vec(texts, (IMAGE_OF_TEXT.len(), EMBEDDING), &Device::Cpu).unwrap();
        let mut packer = Packer::new(&model);
        let rows = pack(&mut packer, Features::Picture);
        let batch = packer.finish(&Device::Cpu).unwrap();
        let passed = model.forward(&batch, Some(var.as_tensor()), Dropout::OFF).unwrap();
        let images = model.image_embedding(&batch, &passed, &rows, EmbeddedImages::Described).unwrap();
        let temperature = Tensor::new(TEMPERATURE as f32, &Device::Cpu).unwrap();
        let gradients = contrastive_loss(&images, &texts, &IMAGE_OF_TEXT, &temperature).unwrap().backward().unwrap();

        let texts = wide(&texts);
        let loss = |layer: &[f64], pictures: &[f64]| {
            let of_picture = |picture: usize| &pictures[picture * CELLS * WIDTH..(picture + 1) * CELLS * WIDTH];
            let images = IMAGES.map(|(picture, hidden)| by_hand(layer, of_picture(picture), hidden));
            let score = |i: usize, t: usize| {
                let text = &texts[t * EMBEDDING..(t + 1) * EMBEDDING];
                (images[i].iter().zip(text).map(|(a, b)| a * b).sum::<f64>() / TEMPERATURE).exp()
            };
            let (of_images, of_texts) = (0..IMAGES.len(), 0..IMAGE_OF_TEXT.len());
            let to_text = of_images.clone().map(|i| {
                let own: f64 = of_texts.clone().filter(|&t| IMAGE_OF_TEXT[t] == i).map(|t| score(i, t)).sum();
                -(own / of_texts.clone().map(|t| score(i, t)).sum::<f64>()).ln() / IMAGES.len() as f64
            });
            let to_image = of_texts.clone().map(|t| {
                let all: f64 = of_images.clone().map(|i| score(i, t)).sum();
                -(score(IMAGE_OF_TEXT[t], t) / all).ln() / IMAGE_OF_TEXT.len() as f64
            });
            0.5 * (to_text.sum::<f64>() + to_image.sum::<f64>())
        };
        let (layer, pictures) = (layer(&model), wide(var.as_tensor()));
        let of = |var: &Var| wide(gradients.get(var).unwrap());
        let weights = [of(&model.weights()["embed.image.weight"]), of(&model.weights()["embed.image.bias"])].concat();
        for (place, got) in weights.into_iter().chain(of(&var)).enumerate() {
            let at = |delta: f64| {
                let (mut layer, mut pictures) = (layer.clone(), pictures.clone());
                match place.checked_sub(layer.len()) {
                    None => layer[place] += delta,
                    Some(place) => pictures[place] += delta,
                }
                loss(&layer, &pictures)
            };
            let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
            // f32 sums of a dozen terms, divided by the temperature.
            assert!((slope - got).abs() < 2e-5 * (1.0 + slope.abs()), "{place}: {got} against {slope}");
        }
    }
}
