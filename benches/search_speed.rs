//! What a search in a gallery costs, and what its 8 bits would lose without the second look.
//!
//! ```text
//! cargo run --release -p unimo-benches --bin search-speed                         100,000 and 1,000,000 random embeddings
//! unimo embed --jsonl --image photos/ > pictures.jsonl
//! unimo embed --jsonl --text-file captions.txt > texts.jsonl
//! cargo run --release -p unimo-benches --bin search-speed -- --embeddings pictures.jsonl --queries texts.jsonl
//! ```
//!
//! Prints a Markdown table. Searches are timed in a process of their own: `first` from opening the gallery to the result of the
//! first search, the files being in the system's cache; `p50`, `p90` of the searches after it, each with another query; `scan`
//! the median where there is no index and every embedding is read. Memory is what the process held after all searches, less
//! before: its own (`own`), and pages of mapped files (`mapped`), which the system takes back when it needs them. `+1` and
//! `+1000` are the first searches after so many pictures were added. `8 bits` is the share of the true ten best that the codes
//! alone rank among the ten best, `found` that of the search itself.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use unimo::bundle::{Bundle, BundleSource};
use unimo::gallery::quantize::{Query, quantize, stride};
use unimo::gallery::{Entry, Filter, Gallery, Method, Time};

/// Pictures looked for.
const BEST: usize = 10;
/// Random queries.
const QUERIES: usize = 100;
/// Pictures stored at once.
const CHUNK: usize = 20_000;

/// Measures searches in galleries of random or given embeddings.
#[derive(Debug, Parser)]
struct Args {
    /// Pictures in the galleries of random embeddings
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS", default_value = "100000,1000000")]
    pictures: Vec<usize>,
    /// Values of a random embedding
    #[arg(long, default_value_t = 256)]
    width: usize,
    /// Embeddings of pictures, as `unimo embed --jsonl` prints them, instead of random ones
    #[arg(long, value_name = "FILE", requires = "queries")]
    embeddings: Option<PathBuf>,
    /// Embeddings to search with
    #[arg(long, value_name = "FILE", requires = "embeddings")]
    queries: Option<PathBuf>,
    /// The bundle that the galleries are for, so that `unimo search` can be timed on them
    #[arg(long, value_name = "PATH", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/bundle/default.tar"))]
    bundle: PathBuf,
    /// Keep the galleries in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Measure the searches in one gallery; what this command starts
    #[arg(long, hide = true, value_names = ["GALLERY", "QUERIES"], num_args = 2)]
    worker: Option<Vec<PathBuf>>,
}

/// What a worker prints.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    first_ms: f64,
    p50_ms: f64,
    p90_ms: f64,
    rescored: f64,
    indexed: bool,
    own_bytes: u64,
    mapped_bytes: u64,
    /// The sources found with each query.
    found: Vec<Vec<String>>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some([gallery, queries]) = args.worker.as_deref() {
        println!("{}", serde_json::to_string(&work(gallery, queries)?)?);
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let folder = args.keep.clone().unwrap_or_else(|| scratch.path().to_path_buf());
    let bundle = Bundle::open(&BundleSource::Path(args.bundle.clone()))?.id().to_owned();
    println!(
        "| embeddings | pictures | gallery MB | index MB | make s | first ms | p50 ms | p90 ms | +1 ms | +1000 ms | scan ms | \
         rescored | own MB | mapped MB | 8 bits | found |\n|{}",
        "---|".repeat(16)
    );
    if let (Some(embeddings), Some(queries)) = (&args.embeddings, &args.queries) {
        return measure("given", &folder.join("given.gallery"), &bundle, &read(embeddings)?, &read(queries)?);
    }
    for &pictures in &args.pictures {
        let mut rng = StdRng::seed_from_u64(pictures as u64);
        let mut random = |count: usize| (0..count).map(|_| unit(&mut rng, args.width)).collect::<Vec<_>>();
        let (rows, queries) = (random(pictures), random(QUERIES));
        measure("random", &folder.join(format!("random-{pictures}.gallery")), &bundle, &rows, &queries)?;
    }
    Ok(())
}

/// A random direction: normal deviates (Box–Muller), normalized.
fn unit(rng: &mut StdRng, width: usize) -> Vec<f32> {
    let mut values: Vec<f32> = (0..width)
        .map(|_| {
            let (a, b): (f32, f32) = (rng.random_range(f32::MIN_POSITIVE..1.0), rng.random_range(0.0..std::f32::consts::TAU));
            (-2.0 * a.ln()).sqrt() * b.cos()
        })
        .collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.iter_mut().for_each(|v| *v /= length);
    values
}

fn read(path: &Path) -> anyhow::Result<Vec<Vec<f32>>> {
    #[derive(Deserialize)]
    struct Line {
        embedding: Vec<f32>,
    }
    let file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let lines = BufReader::new(file).lines().map(|line| Ok(serde_json::from_str::<Line>(&line?)?.embedding));
    let rows: Vec<Vec<f32>> = lines.collect::<anyhow::Result<_>>().with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(!rows.is_empty(), "{} holds no embeddings", path.display());
    ensure!(rows.iter().all(|row| row.len() == rows[0].len()), "{} holds embeddings of several widths", path.display());
    Ok(rows)
}

fn entries(rows: &[Vec<f32>], first: usize) -> Vec<Entry> {
    let entry = |(i, embedding): (usize, &Vec<f32>)| Entry {
        source: format!("/pictures/camera/{:04}/{:08}.jpg", (first + i) / 1000, first + i),
        hash: [0; 32],
        embedding: embedding.clone(),
        caption: Some("a dog runs on the beach".to_owned()),
        time: Time::from_milliseconds(1_700_000_000_000 + 1000 * (first + i) as i64),
    };
    rows.iter().enumerate().map(entry).collect()
}

fn measure(name: &str, path: &Path, bundle: &str, rows: &[Vec<f32>], queries: &[Vec<f32>]) -> anyhow::Result<()> {
    ensure!(rows[0].len() == queries[0].len(), "embeddings and queries have different widths");
    let mut gallery = Gallery::open_or_create(path, bundle, rows[0].len())?;
    for (number, chunk) in rows.chunks(CHUNK).enumerate() {
        gallery.put(&entries(chunk, number * CHUNK))?;
    }
    let start = Instant::now();
    gallery.prepare_search()?;
    let make = start.elapsed().as_secs_f64();
    let stats = gallery.stats()?;
    let query_file = path.with_extension("queries");
    let line = |query: &Vec<f32>| serde_json::json!({ "embedding": query }).to_string();
    fs::write(&query_file, queries.iter().map(line).collect::<Vec<_>>().join("\n"))?;
    let measured = worker(path, &query_file)?;

    // The last query is one of its own, near nothing that is there.
    let mut after = [0.0; 2];
    for (ms, added) in after.iter_mut().zip([1, 1000]) {
        gallery.search(&queries[0], &Filter::default(), BEST)?;
        let more: Vec<Vec<f32>> = rows.iter().cycle().take(added).map(|row| row.iter().rev().copied().collect()).collect();
        gallery.put(&entries(&more, 100_000_000 + added))?;
        *ms = timed(|| gallery.search(&queries[0], &Filter::default(), BEST)).0;
    }
    let index = gallery.index_path();
    drop(gallery);
    // Where a folder stands in its place, no index can be made.
    drop(fs::remove_file(&index));
    fs::create_dir(&index)?;
    let without = worker(path, &query_file);
    fs::remove_dir(&index)?;
    let without = without?;
    ensure!(measured.indexed && !without.indexed, "the index was not used where it should, or used where it should not");

    let (alone, found) = recalls(rows, queries, &measured.found);
    println!(
        "| {name} | {} | {:.0} | {:.1} | {make:.2} | {:.1} | {:.2} | {:.2} | {:.2} | {:.1} | {:.0} | {:.0} | {:.1} | {:.1} | \
         {alone:.4} | {found:.4} |",
        rows.len(),
        megabytes(stats.bytes),
        megabytes(stats.index_bytes),
        measured.first_ms,
        measured.p50_ms,
        measured.p90_ms,
        after[0],
        after[1],
        without.p50_ms,
        measured.rescored,
        megabytes(measured.own_bytes),
        megabytes(measured.mapped_bytes),
    );
    Ok(())
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn timed<T>(act: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = act();
    (1e3 * start.elapsed().as_secs_f64(), result)
}

fn worker(gallery: &Path, queries: &Path) -> anyhow::Result<Measured> {
    let output = Command::new(std::env::current_exe()?).arg("--worker").args([gallery, queries]).output()?;
    ensure!(output.status.success(), "a worker failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn work(path: &Path, queries: &Path) -> anyhow::Result<Measured> {
    let queries = read(queries)?;
    let before = memory()?;
    let (first_ms, gallery) = timed(|| -> anyhow::Result<Gallery> {
        let gallery = Gallery::open(path)?;
        gallery.find(&queries[0], &Filter::default(), BEST)?;
        Ok(gallery)
    });
    let gallery = gallery?;
    let (mut times, mut looked_at, mut found, mut indexed) = (Vec::new(), 0, Vec::new(), true);
    for query in &queries {
        let (ms, result) = timed(|| gallery.find(query, &Filter::default(), BEST));
        let result = result?;
        match result.method {
            Method::Index { rescored } => looked_at += rescored,
            _ => indexed = false,
        }
        times.push(ms);
        found.push(result.hits.into_iter().map(|hit| hit.source).collect());
        // Reading all takes long: a few are enough.
        if !indexed && times.len() == 5 {
            break;
        }
    }
    let after = memory()?;
    times.sort_by(f64::total_cmp);
    Ok(Measured {
        first_ms,
        p50_ms: times[times.len() / 2],
        p90_ms: times[times.len() * 9 / 10],
        rescored: looked_at as f64 / times.len() as f64,
        indexed,
        own_bytes: after[0].saturating_sub(before[0]),
        mapped_bytes: after[1].saturating_sub(before[1]),
        found,
    })
}

/// What this process holds: memory of its own, and pages of files.
fn memory() -> anyhow::Result<[u64; 2]> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kilobytes = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let bytes = |name: &str| kilobytes(name).map(|kilobytes| 1024 * kilobytes).with_context(|| format!("no {name} in status"));
    Ok([bytes("RssAnon:")?, bytes("RssFile:")?])
}

/// Shares of the true best that the codes alone, and the search, have among theirs.
fn recalls(rows: &[Vec<f32>], queries: &[Vec<f32>], found: &[Vec<String>]) -> (f64, f64) {
    let row_stride = stride(rows[0].len());
    let mut codes = Vec::with_capacity(rows.len() * row_stride);
    let scales: Vec<_> = rows.iter().filter_map(|row| quantize(row, &mut codes)).collect();
    let (mut alone, mut by_search, mut all) = (0, 0, 0);
    for (query, found) in queries.iter().zip(found) {
        let product = |row: &Vec<f32>| row.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
        let truth: HashSet<usize> = best(rows.iter().map(product)).collect();
        let Some(coded) = Query::new(query) else { continue };
        let approximate = codes.chunks_exact(row_stride).zip(&scales).map(|(codes, &scale)| coded.approximate(codes, scale));
        alone += best(approximate).filter(|row| truth.contains(row)).count();
        let number = |source: &String| source.rsplit('/').next()?.strip_suffix(".jpg")?.parse::<usize>().ok();
        by_search += found.iter().filter_map(number).filter(|row| truth.contains(row)).count();
        all += truth.len();
    }
    (alone as f64 / all as f64, by_search as f64 / all as f64)
}

/// The numbers of the largest.
fn best(scores: impl Iterator<Item = f32>) -> impl Iterator<Item = usize> {
    let mut best: Vec<(f32, usize)> = Vec::new();
    for (row, score) in scores.enumerate() {
        if best.len() < BEST || score > best[BEST - 1].0 {
            best.truncate(BEST - 1);
            best.insert(best.partition_point(|&(other, _)| other >= score), (score, row));
        }
    }
    best.into_iter().map(|(_, row)| row)
}
