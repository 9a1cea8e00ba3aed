use std::collections::BTreeMap;

use candle_core::Device;

use super::super::{Features, ModelConfig, Packer, Regions};
use super::layers::Counts;
use super::*;
use crate::ops::Precision;
use crate::ops::cuda::emulation::{computing_in, emulated, recording_only};

fn model_of(layers: usize) -> Unimo {
    let config = ModelConfig { grid: 2, region_feature: 3, layers, ..ModelConfig::named("pico").unwrap() };
    Unimo::new(config, 1, &Device::Cpu).unwrap()
}

/// A model of three layers, a batch of a text and a pair for it, and where their texts start.
fn model_and_batch() -> (Unimo, PackedBatch, [usize; 2]) {
    let model = model_of(3);
    let features: Vec<f32> = (0..12).map(|v| (v as f32 * 0.7).sin()).collect();
    let mut packer = Packer::new(&model);
    let text = packer.text(&[0, 7, 2], false);
    let pair = packer.pair(Regions::visible(&features), &[0, 9, 2]).texts[0];
    let batch = packer.finish(&Device::Cpu).unwrap();
    (model, batch, [text, pair])
}

/// What may be trained, how many layers of it, and the last of the layers that the pass goes back to.
const TRAINED: [(&[&str], usize, Option<usize>); 5] = [
    (&[], 3, Some(0)),
    (&["layers.2.", "embed."], 1, Some(2)),
    (&["layers.1."], 1, Some(1)),
    (&["text."], 0, Some(0)),
    (&["embed.", "temperature"], 0, None),
];

/// Gradients by name of a loss that reads tokens (tied to their embeddings) and an embedding, and the layers that were said to be
/// complete. Their gradients are those that they had then.
fn by_name(model: &Unimo, batch: &PackedBatch, texts: [usize; 2]) -> (BTreeMap<String, Vec<f32>>, Vec<usize>) {
    gradients_of(model, batch, texts, Dropout::of(0.3, 5))
}

fn gradients_of(
    model: &Unimo,
    batch: &PackedBatch,
    [text, pair]: [usize; 2],
    dropout: Dropout,
) -> (BTreeMap<String, Vec<f32>>, Vec<usize>) {
    let passed = model.forward(batch, None, dropout).unwrap();
    let by_layer = model.checkpoints_activations || model.goes_by_layer || ops::cuda::works_on(&Device::Cpu);
    assert_eq!(passed.kept.is_some(), by_layer && passed.hidden.is_tracked());
    assert!(passed.kept.is_none() || passed.hidden.is_leaf(), "activations hang on the hidden states");
    let rows = passed.hidden.rows(&[text, pair]).unwrap();
    let words = model.language_loss(&rows, vec![7, 9], 0.1).unwrap();
    let embedding = model.text_embedding(batch, &passed.hidden, &[text]).unwrap();
    let losses = vec![words.into(), embedding.narrow(1, 0, 3).unwrap().sum_all().unwrap().into()];
    let by: Vec<Var> = model.weights().values().cloned().collect();
    let (mut left, mut taken) = (Vec::new(), GradStore::default());
    let mut complete = |layer: usize, all: &mut GradStore| {
        left.push(layer);
        for (_, var) in model.trained().filter(|(name, _)| name.starts_with(&format!("layers.{layer}."))) {
            taken.insert(var, all.remove(var).unwrap());
        }
        Ok(())
    };
    let mut found = passed.backward_by_layer(model, batch, losses, &by, &mut complete).unwrap();
    for var in &by {
        let Some(gradient) = taken.remove(var) else { continue };
        assert!(found.insert(var, gradient).is_none(), "what was complete goes on");
    }
    let named = named(model, &found);
    assert_eq!(found.get_ids().count(), named.len(), "something else is kept");
    assert!(by.iter().filter_map(|var| found.get(var)).all(|gradient| !gradient.track_op()), "a graph is kept");
    (named, left)
}

#[test]
fn gradients_are_those_of_a_pass_through_all_at_once() {
    let (mut model, batch, texts) = model_and_batch();
    for (trained, count, last) in TRAINED {
        model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        model.set_activation_checkpointing(false);
        model.set_backward_by_layer(false);
        let (expected, left) = by_name(&model, &batch, texts);
        assert!(left.is_empty());
        let of_layers = expected.keys().filter(|name| name.ends_with("attention.qkv.weight")).count();
        assert_eq!(of_layers, count);
        for (recomputed, by_layer) in [(true, false), (false, true), (true, true)] {
            model.set_activation_checkpointing(recomputed);
            model.set_backward_by_layer(by_layer);
            let (found, left) = by_name(&model, &batch, texts);
            assert_eq!(left, last.map_or(Vec::new(), |last| (last..3).rev().collect()));
            assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{trained:?}");
            // The token embeddings' parts are summed in another order.
            assert_near(&expected, &found, 1e-6);
        }
    }
}

fn named(model: &Unimo, found: &GradStore) -> BTreeMap<String, Vec<f32>> {
    let of = |(name, var): (&String, &Var)| Some((name.clone(), found.get(var)?.flatten_all().unwrap().to_vec1().unwrap()));
    model.weights().iter().filter_map(of).collect()
}

/// In units of each weight's largest gradient.
fn assert_near(expected: &BTreeMap<String, Vec<f32>>, found: &BTreeMap<String, Vec<f32>>, tolerance: f32) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, expected) in expected {
        let largest = expected.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
        assert!(largest > 0.0, "{name} does not move");
        for (expected, found) in expected.iter().zip(&found[name]) {
            assert!((expected - found).abs() <= tolerance * largest, "{name}: {found} is not {expected}");
        }
    }
}

#[test]
fn gradients_in_kernels_are_those_of_the_composed_layers() {
    let (mut model, batch, texts) = model_and_batch();
    for (trained, _, last) in TRAINED {
        model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        model.set_activation_checkpointing(false);
        let (expected, _) = by_name(&model, &batch, texts);
        for recomputed in [false, true] {
            model.set_activation_checkpointing(recomputed);
            let (found, left) = emulated(1, || by_name(&model, &batch, texts));
            assert_eq!(left, last.map_or(Vec::new(), |last| (last..3).rev().collect()));
            // Sums of products in another order, through three layers.
            assert_near(&expected, &found, 2e-4);
        }
    }
}

/// What was stored in bf16 has nothing in its lower half, which products of rounded factors alone would leave there.
#[test]
fn layers_in_kernels_store_what_they_give_in_the_precision_of_their_products() {
    let (model, batch, _) = model_and_batch();
    for (precision, stored) in [(Precision::F32, false), (Precision::Bf16, true)] {
        let pass = || model.forward(&batch, None, Dropout::OFF).unwrap().hidden.constants().unwrap();
        let hidden = emulated(0, || computing_in(precision, pass)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(hidden.iter().all(|value| value.to_bits() & 0xffff == 0), stored, "{precision:?}");
    }
}

#[test]
fn a_loss_that_reads_no_hidden_state_runs_no_layer_again() {
    let (mut model, batch, _) = model_and_batch();
    model.set_activation_checkpointing(true);
    let passed = model.forward(&batch, None, Dropout::OFF).unwrap();
    let by: Vec<Var> = model.weights().values().cloned().collect();
    let found = passed.backward(&model, &batch, model.temperature().unwrap(), &by).unwrap();
    assert!(found.get_ids().count() == 1 && found.get(&model.weights()["temperature"]).is_some());
}

/// A batch of texts of such lengths and a pair, and where the first and the pair's text start.
fn batch_of(model: &Unimo, lengths: &[u32], seed: u32) -> (PackedBatch, [usize; 2]) {
    let features: Vec<f32> = (0..12).map(|v| ((v + seed) as f32 * 0.7).sin()).collect();
    let mut packer = Packer::new(model);
    let text = |length: u32| (0..length).map(|i| 3 + (5 * i + 11 * length + seed) % 31).collect::<Vec<u32>>();
    let starts: Vec<usize> = (0..).zip(lengths).map(|(i, &length)| packer.text(&text(length), i % 2 == 0)).collect();
    let pair = packer.pair(Regions::visible(&features), &text(6)).texts[0];
    (packer.finish(&Device::Cpu).unwrap(), [starts[0], pair])
}

/// Lengths of texts whose batches are filled up to the same shape: 124 to 127 text rows to 128, and the five of the pair's image to 16. So
/// are the tiles that these are cut into, and the different tokens and positions.
const ALIKE: [[u32; 9]; 4] = [
    [13, 13, 13, 13, 13, 13, 13, 13, 15],
    [15, 11, 13, 14, 12, 13, 13, 13, 17],
    [12, 13, 14, 13, 12, 13, 14, 13, 14],
    [16, 10, 13, 12, 14, 13, 13, 13, 16],
];

/// As an optimizer moves them: where they lie.
fn move_weights(model: &Unimo) {
    for var in model.weights().values() {
        var.set(&(var.as_tensor() * 0.97).unwrap()).unwrap();
    }
}

#[test]
fn passes_that_are_replayed_are_those_of_the_composed_layers() {
    let cases: [(Precision, &[&str], bool); 5] = [
        (Precision::F32, &[], false),
        (Precision::F32, &[], true),
        (Precision::F32, &["layers.1.attention."], false),
        (Precision::Bf16, &[], false),
        (Precision::Bf16, &["layers.1."], true),
    ];
    for (precision, trained, recomputed) in cases {
        let mut model = model_of(2);
        model.train_only(&trained.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        model.set_activation_checkpointing(recomputed);
        for (pass, lengths) in (0..).zip(ALIKE) {
            let (batch, texts) = batch_of(&model, &lengths, 7 * pass);
            assert_eq!(batch.rows(), [130, 132, 129, 131][pass as usize]);
            let dropout = Dropout::of(0.3, 5 + u64::from(pass));
            let (expected, _) = gradients_of(&model, &batch, texts, dropout);
            let of_kernels = || computing_in(precision, || gradients_of(&model, &batch, texts, dropout));
            let (found, left) = emulated(2, of_kernels);
            assert_eq!(left, if trained.is_empty() { vec![1, 0] } else { vec![1] });
            assert_near(&expected, &found, if precision == Precision::Bf16 { 8e-2 } else { 2e-4 });
            let counts = Counts { passes: 1 + u64::from(pass), replayed: pass.into(), recordings: pass.min(1).into() };
            assert_eq!(model.passes_through_layers(), counts);
            move_weights(&model);
        }
    }
}

/// So a run that is resumed, and asks where the other one replays, is the same run.
#[test]
fn passes_that_are_replayed_give_bit_by_bit_what_those_give_that_are_asked_for() {
    for precision in [Precision::F32, Precision::Bf16] {
        let model = model_of(2);
        let (batch, texts) = batch_of(&model, &ALIKE[1], 3);
        let pass = || computing_in(precision, || gradients_of(&model, &batch, texts, Dropout::of(0.2, 9)));
        let asked = emulated(0, pass);
        for time in 0..2 {
            assert!(emulated(0, pass) == asked, "{precision:?}, {time}");
        }
        assert_eq!(model.passes_through_layers().replayed, 2);
    }
}

/// A loss that every hidden state has a part in.
fn of_all_rows(hidden: &Hidden, batch: &PackedBatch) -> Tensor {
    let rows = hidden.rows(&(0..batch.rows()).collect::<Vec<_>>()).unwrap();
    let by = (0..rows.elem_count()).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
    (&rows * Tensor::from_vec(by, rows.shape(), &Device::Cpu).unwrap()).unwrap().sum_all().unwrap()
}

/// Batches of texts alone, of pictures alone, and of both, whose features are trained, with the same shapes again and again.
#[test]
fn passes_of_texts_and_pictures_that_are_replayed_give_their_gradients() {
    type Pack = fn(&mut Packer, u32);
    let texts: Pack = |packer, more| {
        packer.text(&(3..9 + more).collect::<Vec<_>>(), true);
        packer.text(&(7..12 - more).collect::<Vec<_>>(), false);
    };
    let pictures: Pack = |packer, _| {
        for (picture, masked) in [(1, &[] as &[usize]), (0, &[2])] {
            packer.image_with_captions(Regions { features: Features::Picture(picture), boxes: None, masked }, &[]);
        }
    };
    let both: Pack = |packer, more| {
        let regions = Regions { features: Features::Picture(1), boxes: None, masked: &[] };
        packer.image_with_captions(regions, &[&(3..9 + more).collect::<Vec<_>>(), &[5, 6]]);
        packer.pair(Regions { features: Features::Picture(0), boxes: None, masked: &[1] }, &[0, 9, 2]);
    };
    for (pack, pictured, precision) in [
        (texts, false, Precision::F32),
        (pictures, true, Precision::F32),
        (both, true, Precision::F32),
        (both, true, Precision::Bf16),
    ] {
        let model = model_of(1);
        for pass in 0..4 {
            let mut packer = Packer::new(&model);
            pack(&mut packer, pass);
            let batch = packer.finish(&Device::Cpu).unwrap();
            let values = (0..24).map(|v| ((v + 5 * pass) as f32 * 0.7).sin()).collect::<Vec<_>>();
            let given = Var::from_vec(values, (2, 4, 3), &Device::Cpu).unwrap();
            let by: Vec<Var> = model.weights().values().chain([&given]).cloned().collect();
            let gradients = || {
                let passed = model.forward(&batch, pictured.then_some(given.as_tensor()), Dropout::of(0.2, pass.into())).unwrap();
                let loss = of_all_rows(&passed.hidden, &batch);
                let found = passed.backward(&model, &batch, loss, &by).unwrap();
                let mut all = named(&model, &found);
                assert_eq!(found.get(&given).is_some(), pictured);
                all.extend(found.get(&given).map(|by| ("given".to_owned(), by.flatten_all().unwrap().to_vec1().unwrap())));
                all
            };
            let expected = gradients();
            let found = emulated(1, || computing_in(precision, gradients));
            assert_near(&expected, &found, if precision == Precision::Bf16 { 8e-2 } else { 2e-4 });
        }
        assert_eq!(model.passes_through_layers(), Counts { passes: 4, replayed: 3, recordings: 1 });
    }
}

#[test]
fn a_pass_that_another_one_came_after_is_done_again() {
    let model = model_of(2);
    let batches = [batch_of(&model, &ALIKE[0], 1), batch_of(&model, &ALIKE[2], 2), batch_of(&model, &[9, 4], 3)];
    let dropout = Dropout::of(0.2, 4);
    let by: Vec<Var> = model.weights().values().cloned().collect();
    let backward = |passed: Passed, batch: &PackedBatch| {
        let loss = of_all_rows(&passed.hidden, batch);
        named(&model, &passed.backward(&model, batch, loss, &by).unwrap())
    };
    let forward = |batch: &PackedBatch| model.forward(batch, None, dropout).unwrap();
    let expected = batches.each_ref().map(|(batch, _)| backward(forward(batch), batch));
    emulated(1, || {
        for time in 0..3 {
            let passes = batches.each_ref().map(|(batch, _)| forward(batch));
            for ((passed, (batch, _)), expected) in passes.into_iter().zip(&batches).zip(&expected) {
                assert_near(expected, &backward(passed, batch), 2e-4);
            }
            assert_eq!(model.passes_through_layers().passes, 6 * (time + 1));
        }
    });
    assert_eq!(model.passes_through_layers().recordings, 2);
}

#[test]
fn what_was_recorded_is_recorded_again_where_a_larger_pass_took_other_memory() {
    let model = model_of(1);
    let lengths: [&[u32]; 7] = [&[9, 4], &[9, 4], &[9, 4, 30], &[9, 4], &[9, 4], &[9, 4, 30], &[9, 4, 30]];
    for (pass, lengths) in (0..).zip(lengths) {
        let (batch, texts) = batch_of(&model, lengths, pass);
        let dropout = Dropout::of(0.2, pass.into());
        let (expected, _) = gradients_of(&model, &batch, texts, dropout);
        let (found, _) = emulated(1, || gradients_of(&model, &batch, texts, dropout));
        assert_near(&expected, &found, 2e-4);
    }
    assert_eq!(model.passes_through_layers(), Counts { passes: 7, replayed: 5, recordings: 3 });
}

/// 33 uses, which differ in how much is dropped: one more than is remembered.
#[test]
fn the_use_that_was_not_met_for_the_longest_time_is_forgotten() {
    let model = model_of(1);
    let (batch, [text, _]) = batch_of(&model, &[4], 0);
    let by: Vec<Var> = model.weights().values().cloned().collect();
    let pass = |number: u8| {
        let passed = model.forward(&batch, None, Dropout::of(f32::from(number) / 64.0, 1)).unwrap();
        let loss = passed.hidden.rows(&[text]).unwrap().sum_all().unwrap();
        passed.backward(&model, &batch, loss, &by).unwrap();
        model.passes_through_layers().replayed
    };
    emulated(0, || {
        assert!((0..32).all(|number| pass(number) == 0));
        assert_eq!((pass(0), pass(32)), (1, 1));
        assert_eq!(pass(0), 2, "what was met again is kept");
        assert_eq!(pass(1), 2, "what was not met again is forgotten");
        assert_eq!(pass(1), 3);
    });
}

/// At once, or in the middle of the way back.
#[test]
fn a_machine_that_does_not_record_is_asked_for_every_layer() {
    for recordings in [0, 2] {
        let model = model_of(2);
        for pass in 0..3 {
            let (batch, texts) = batch_of(&model, &ALIKE[0], pass);
            let dropout = Dropout::of(0.2, pass.into());
            let (expected, _) = gradients_of(&model, &batch, texts, dropout);
            let (found, _) = recording_only(recordings, || emulated(0, || gradients_of(&model, &batch, texts, dropout)));
            assert_near(&expected, &found, 2e-4);
        }
        assert_eq!(model.passes_through_layers(), Counts { passes: 3, replayed: 0, recordings: 0 });
    }
}
