//! The pieces of a caption, on the default bundle and a drawn scene: one thread, engine tract.

// A benchmark that cannot begin has nothing to report.
#![allow(clippy::expect_used)]

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use unimo::bundle::BundleSource;
use unimo::captioning::{Branch, DecodeOptions, LanguageModel, beam_search};
use unimo::engine::EngineOptions;
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};
use unimo_train::scenes;

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

/// A language model that costs nothing: logits that were drawn before.
struct Recited {
    logits: Vec<Vec<f32>>,
    words: usize,
}

impl LanguageModel for Recited {
    type Error = std::convert::Infallible;

    fn read(&mut self, branches: &[Branch]) -> Result<Vec<f32>, Self::Error> {
        self.words += 1;
        let drawn =
            |branch: &Branch| &self.logits[(branch.id as usize).wrapping_mul(31).wrapping_add(self.words) % self.logits.len()];
        Ok(branches.iter().flat_map(drawn).copied().collect())
    }

    fn is_forbidden(&self, id: u32) -> bool {
        id == 1
    }
}

/// What beam search does around the model: scores, the best continuations, ranking.
fn bookkeeping(c: &mut Criterion) {
    let vocabulary = 8192;
    let mut rng = StdRng::seed_from_u64(1);
    let mut logits = || (0..vocabulary).map(|_| rng.random_range(-8.0..8.0f32)).collect::<Vec<_>>();
    let mut model = Recited { logits: (0..64).map(|_| logits()).collect(), words: 0 };
    for beam in [1, 3, 5] {
        let options = DecodeOptions { beam, max_words: 20, length_penalty: 0.7, no_repeat: 3 };
        c.bench_function(&format!("beam of {beam}, 20 words of {vocabulary}, without a model"), |b| {
            b.iter(|| beam_search(black_box(&mut model), &options));
        });
    }
}

fn words(c: &mut Criterion) {
    let model = model();
    let text = "Two dogs, one brown and one white, are running after a red ball on a wet beach at sunset.";
    let ids = model.tokenizer().encode(text, 64);
    c.bench_function("encode a caption of 19 words", |b| b.iter(|| model.tokenizer().encode(black_box(text), 64)));
    c.bench_function("decode a caption of 19 words", |b| b.iter(|| model.tokenizer().decode(black_box(&ids))));
}

criterion_group!(benches, words, bookkeeping, captioning);
criterion_main!(benches);
