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
            let embedded: Vec<f64> = weight.chunks_exact(2 * width).zip(&bias).map(|(row, bias)| product(row) + bias).collect();
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
