use super::*;
use crate::model::Dropout;
use crate::regions::Detected;

/// Standardised rows of one packed image.
fn rows(model: &Unimo, features: &[f32], masked: &[usize]) -> Vec<Vec<f32>> {
    let mut packer = Packer::new(model);
    packer.image_with_captions(Regions::masked(features, masked), &[]);
    let features = packer.finish(&Device::Cpu).unwrap().features.unwrap();
    features.standardised(None, model.statistics()).unwrap().rows.to_vec2().unwrap()
}

#[test]
fn what_a_masked_region_holds_reaches_no_row() {
    let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
    let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    model.set_statistics(RegionStatistics { mean: vec![1.0, 2.0, 3.0], deviation: vec![0.5, 1.0, 2.0] }).unwrap();
    let features: Vec<f32> = (0..12).map(|v| v as f32).collect();
    let mut changed = features.clone();
    changed[3..6].fill(1e3);

    let seen = rows(&model, &features, &[1]);
    assert_eq!(seen, rows(&model, &changed, &[1]));
    assert_ne!(rows(&model, &features, &[]), rows(&model, &changed, &[]));
    assert_eq!(seen[2], [0.0; 3]);
    // Regions 0, 2 and 3 are visible: [IMG] is their mean, and theirs alone.
    assert_eq!(seen[1], [-2.0, -1.0, -0.5]);
    let mean: Vec<f32> = (0..3).map(|i| (seen[1][i] + seen[3][i] + seen[4][i]) / 3.0).collect();
    assert!(seen[0].iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} is not {mean:?}", seen[0]);
}

#[test]
fn the_image_of_detected_regions_is_their_mean_in_the_whole_picture() {
    let config = ModelConfig { grid: 0, detected_regions: 3, region_feature: 2, ..ModelConfig::named("pico").unwrap() };
    let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    let boxes = vec![0.1, 0.2, 0.3, 0.4, 0.04, 0.0, 0.5, 1.0, 1.0, 0.5];
    let detected = Some(Detected { boxes: boxes.clone(), probabilities: Vec::new() });
    let record = Record { values: vec![1.0, 2.0, 5.0, 8.0], detected };
    let mut packer = Packer::new(&model);
    packer.pair(Regions::of(&record, &[]), &[0, 2]);
    packer.pair(Regions::of(&record, &[0]), &[0, 2]);
    let batch = packer.finish(&Device::Cpu).unwrap();
    let expected = [WHOLE_IMAGE.to_vec(), boxes].concat();
    assert_eq!(batch.boxes.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [expected.clone(), expected].concat());
    let rows = batch.features.unwrap().standardised(None, model.statistics()).unwrap().rows.to_vec2::<f32>().unwrap();
    assert_eq!(rows, [[3.0, 5.0], [1.0, 2.0], [5.0, 8.0], [5.0, 8.0], [0.0, 0.0], [5.0, 8.0]]);
}

#[test]
fn features_of_a_step_are_packed_like_values() {
    let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
    let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    model.set_statistics(RegionStatistics { mean: vec![1.0, 2.0, 3.0], deviation: vec![0.5, 1.0, 2.0] }).unwrap();
    let values: Vec<f32> = (0..24).map(|v| (v as f32).cos()).collect();
    let pictures = Tensor::from_slice(&values, (2, 4, 3), &Device::Cpu).unwrap();
    // The second picture twice, once with a region masked, before the first.
    let images: [(usize, &[usize]); 3] = [(1, &[]), (1, &[2]), (0, &[])];
    let (mut by_value, mut by_picture) = (Packer::new(&model), Packer::new(&model));
    for (picture, masked) in images {
        by_value.image_with_captions(Regions::masked(&values[picture * 12..(picture + 1) * 12], masked), &[]);
        by_picture.image_with_captions(Regions { features: Features::Picture(picture), boxes: None, masked }, &[]);
    }
    let rows = |packer: Packer, pictures: Option<&Tensor>| {
        let features = packer.finish(&Device::Cpu).unwrap().features.unwrap();
        features.standardised(pictures, model.statistics()).unwrap().rows.to_vec2::<f32>().unwrap()
    };
    let expected = rows(by_value, None);
    let got = rows(by_picture, Some(&pictures));
    assert_eq!(expected.len(), 15);
    for (a, b) in expected.iter().flatten().zip(got.iter().flatten()) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

/// Hidden states of a source and a target packed together, and the row at which the target starts.
fn source_and_target(model: &Unimo, with_image: bool, source: &[u32], target: &[u32]) -> (Vec<Vec<f32>>, usize) {
    let features: Vec<f32> = (0..12).map(|v| (v as f32).sin()).collect();
    let mut packer = Packer::new(model);
    let first = packer.target_after(with_image.then(|| Regions::visible(&features)), source, target);
    let hidden = model.evaluate(&packer.finish(&Device::Cpu).unwrap()).unwrap();
    (hidden.constants().unwrap().to_vec2().unwrap(), first)
}

#[test]
fn a_target_reads_its_source_and_its_own_past_and_the_source_reads_neither_future_nor_target() {
    let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
    let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    for with_image in [false, true] {
        let (plain, first) = source_and_target(&model, with_image, &[0, 9, 2], &[0, 7, 8, 2]);
        assert_eq!((first, plain.len()), (if with_image { 8 } else { 3 }, first + 4));
        let (other, _) = source_and_target(&model, with_image, &[0, 9, 2], &[0, 7, 5, 2]);
        for row in 0..plain.len() {
            assert_eq!(near(&plain[row], &other[row]), row < first + 2, "row {row} of a changed target");
        }
        let (other, _) = source_and_target(&model, with_image, &[0, 6, 2], &[0, 7, 8, 2]);
        assert!((0..plain.len()).all(|row| !near(&plain[row], &other[row])), "a changed source is not read everywhere");
    }
}

#[test]
fn a_batch_of_pictures_needs_them() {
    let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
    let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    let mut packer = Packer::new(&model);
    packer.image_with_captions(Regions { features: Features::Picture(0), boxes: None, masked: &[] }, &[]);
    let batch = packer.finish(&Device::Cpu).unwrap();
    assert!(model.forward(&batch, None, Dropout::OFF).is_err());
}
