//! The pieces of a caption and of a search, on the default bundle and a drawn scene: one thread, engine tract.

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use unimo::bundle::BundleSource;
use unimo::captioning::DecodeOptions;
use unimo::engine::EngineOptions;
use unimo::gallery::{Entry, Filter, Gallery, Time};
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};
use unimo_train::scenes;

/// Pictures in the searched gallery.
const GALLERY: usize = 10_000;

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/bundle/default.tar");
    let model = Model::open(&BundleSource::Path(path), &EngineOptions::default()).expect("the default bundle opens");
    model.load(&GraphName::ALL).expect("the default bundle's graphs load");
    model
}

fn captioning(c: &mut Criterion) {
    let model = model();
    let image = scenes::generate(1, 1).draw();
    let mut jpeg = std::io::Cursor::new(Vec::new());
    image.write_to(&mut jpeg, image::ImageFormat::Jpeg).expect("a picture can be encoded");
    let jpeg = jpeg.into_inner();
    let vision = model.see(&image).expect("vision runs");
    let greedy = DecodeOptions { beam: 1, ..model.decode_options() };

    c.bench_function("decode a 224×224 JPEG", |b| b.iter(|| decode(black_box(&jpeg), &DecodeLimits::default())));
    c.bench_function("prepare pixels", |b| b.iter(|| model.manifest().image.tensor(black_box(&image))));
    c.bench_function("vision", |b| b.iter(|| model.see(black_box(&image))));
    c.bench_function("greedy caption after vision", |b| b.iter(|| model.caption(black_box(&vision), &greedy)));
    c.bench_function("beam caption after vision", |b| b.iter(|| model.caption(black_box(&vision), &model.decode_options())));
    c.bench_function("embed a text", |b| b.iter(|| model.embed_text(black_box("a dog runs on the beach"))));
    c.bench_function("match", |b| b.iter(|| model.match_score(black_box(&vision), "a red circle")));
}

fn search(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let width = 256;
    let unit = |seed: usize| -> Vec<f32> {
        let values: Vec<f32> = (0..width).map(|i| ((seed * 31 + i * 17) as f32 * 0.37).sin()).collect();
        let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
        values.into_iter().map(|v| v / length).collect()
    };
    let mut gallery = Gallery::open_or_create(&folder.path().join("gallery"), "bench", width).expect("a gallery");
    let entries: Vec<Entry> = (0..GALLERY)
        .map(|i| Entry {
            source: format!("picture {i}"),
            hash: [0; 32],
            embedding: unit(i),
            caption: None,
            time: Time::from_milliseconds(i as i64),
        })
        .collect();
    gallery.put(&entries).expect("entries are stored");
    let query = unit(GALLERY / 2);
    c.bench_function(&format!("search among {GALLERY} pictures"), |b| {
        b.iter(|| gallery.search(black_box(&query), &Filter::default(), 5));
    });
}

criterion_group!(benches, captioning, search);
criterion_main!(benches);
