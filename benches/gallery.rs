//! Searches among random embeddings, through the index and by reading all. `search-speed` measures memory and recall.

// A benchmark that cannot begin has nothing to report.
#![allow(clippy::expect_used)]

use std::fs;
use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use unimo::gallery::quantize::{Block, Query, quantize};
use unimo::gallery::{Entry, Filter, Gallery, Time};

const WIDTH: usize = 256;
/// Pictures stored at once.
const CHUNK: usize = 20_000;
/// Rows whose codes stay in the nearest caches.
const ROWS: usize = 256;

fn unit(rng: &mut StdRng) -> Vec<f32> {
    let values: Vec<f32> = (0..WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

/// A gallery of `pictures` random embeddings: a picture a second, a thousand a folder.
fn gallery(folder: &Path, pictures: usize, rng: &mut StdRng) -> Gallery {
    let mut gallery = Gallery::open_or_create(&folder.join("gallery"), "bench", WIDTH).expect("a gallery");
    for first in (0..pictures).step_by(CHUNK) {
        let entry = |i: usize| Entry {
            source: format!("/camera/{:04}/{i:08}.jpg", i / 1000),
            hash: [0; 32],
            embedding: unit(rng),
            caption: None,
            time: Time::from_milliseconds(1000 * i as i64),
        };
        gallery.put(&(first..pictures.min(first + CHUNK)).map(entry).collect::<Vec<_>>()).expect("entries are stored");
    }
    gallery
}

fn search(c: &mut Criterion) {
    for pictures in [100_000, 1_000_000] {
        let mut rng = StdRng::seed_from_u64(pictures as u64);
        let folder = tempfile::tempdir().expect("a folder");
        let gallery = gallery(folder.path(), pictures, &mut rng);
        let queries: Vec<Vec<f32>> = (0..64).map(|_| unit(&mut rng)).collect();
        let last_hundredth = Time::from_milliseconds(990 * pictures as i64);
        let filters = [
            ("", Filter::default()),
            (", of a hundredth of the time", Filter { since: Some(last_hundredth), ..Filter::default() }),
            (", of one folder", Filter { source: Some("/camera/0042/".to_owned()), ..Filter::default() }),
        ];
        let mut group = c.benchmark_group(format!("search among {pictures}"));
        group.sample_size(30);
        for (name, filter) in filters {
            let mut turn = queries.iter().cycle();
            group.bench_function(format!("10 best{name}"), |b| {
                b.iter(|| gallery.search(black_box(turn.next().expect("queries")), &filter, 10).expect("a search"));
            });
        }
        // A folder in its place keeps an index from being made.
        let index = gallery.index_path();
        drop(gallery);
        fs::remove_file(&index).expect("an index");
        fs::create_dir(&index).expect("a folder");
        let reading = Gallery::open(&folder.path().join("gallery")).expect("a gallery");
        group.sample_size(10);
        group.bench_function("10 best, by reading all", |b| {
            b.iter(|| reading.search(black_box(&queries[0]), &Filter::default(), 10).expect("a search"));
        });
        group.finish();
    }
}

fn kernel(c: &mut Criterion) {
    let mut rng = StdRng::seed_from_u64(1);
    let query = Query::new(&unit(&mut rng)).expect("a query");
    let (mut codes, mut scales, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROWS {
        let row = quantize(&unit(&mut rng), &mut codes).expect("numbers");
        scales.push(row.scale.to_le_bytes());
        errors.push(row.error.to_le_bytes());
    }
    let mut block = Block::default();
    c.bench_function(&format!("bound {ROWS} products of {WIDTH} codes"), |b| {
        b.iter(|| query.bound(black_box(&codes), &scales, &errors, 0.3, &mut block));
    });
    let row = unit(&mut rng);
    c.bench_function(&format!("quantize {WIDTH} values"), |b| {
        b.iter(|| {
            codes.clear();
            quantize(black_box(&row), &mut codes)
        });
    });
}

criterion_group!(benches, kernel, search);
criterion_main!(benches);
