//! What a run of a bundle's graphs costs here and in other runtimes, in turns.
//!
//! ```text
//! cargo run --release -p unimo-benches --bin peers -- --bundle BUNDLE [--checkpoint CHECKPOINT] [--ort-lib FOLDER]
//! cargo run --release -p unimo-benches --bin peers -- --random edge-s
//! ```
//!
//! For `vision`, `decode` (one step) and `text`: this project's two engines, rten on the same ONNX file and weights, and, where
//! a checkpoint is given, candle as the trainer runs the model. Everybody gets one thread and the same inputs, which are made
//! from the manifest's signatures. The table has the median milliseconds of a run, its ratio to the fastest, and by how much the
//! outputs differ from the first engine's (the largest difference, as a share of the output's root mean square; candle computes
//! in f32, whatever the bundle's precision). `caption.py` beside this compares whole captions with a Python program.

mod candle;
mod inputs;
mod ours;
mod rten;
mod unpacked;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use unimo::bundle::manifest::{GraphSignature, Precision, Sizes};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::EngineKind;

use self::inputs::Input;

/// The graphs that are compared.
const GRAPHS: [&str; 3] = ["vision", "decode", "text"];

/// Times the graphs of a bundle in several runtimes, side by side.
#[derive(Debug, Parser)]
struct Args {
    /// The bundle, a folder or a .tar
    #[arg(long, value_name = "PATH", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/bundle/default.tar"))]
    bundle: PathBuf,
    /// The checkpoint that the bundle was exported from, for candle
    #[arg(long, value_name = "PATH")]
    checkpoint: Option<PathBuf>,
    /// A model of this size with random weights and a small vocabulary, instead of a bundle
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["bundle", "checkpoint"])]
    random: Option<String>,
    /// Weights to run [default: the bundle's first]
    #[arg(long, value_name = "NAME")]
    precision: Option<Precision>,
    /// Hypotheses that `decode` continues at once [default: the bundle's beam]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    beam: Option<u8>,
    /// ONNX Runtime's library, or its folder
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Seconds for each runtime and graph, in all rounds
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Rounds in which the runtimes take turns
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// A graph loaded into a runtime.
trait Peer {
    /// One run; the outputs in the signature's order, or as many of them as can be compared.
    fn run(&self) -> anyhow::Result<Vec<Vec<f32>>>;
}

/// A runtime's name, and its graph or why it cannot run it.
type Candidate = (&'static str, anyhow::Result<Box<dyn Peer>>);

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let scratch = tempfile::tempdir()?;
    let (path, checkpoint) = match &args.random {
        Some(size) => {
            let checkpoint = unimo_export::sample::random_checkpoint(scratch.path(), size, 1)?;
            let out = scratch.path().join("bundle.tar");
            let options = unimo_export::export::ExportOptions { precisions: vec![Precision::F32], ..Default::default() };
            unimo_export::export::export(&checkpoint, &out, &options, &unimo_export::sample::drawn_samples(1), &|_, _| ())?;
            (out, Some(checkpoint))
        }
        None => (args.bundle.clone(), args.checkpoint.clone()),
    };
    let bundle = Bundle::open(&BundleSource::Path(path))?;
    let precision = bundle.precision(args.precision)?;
    let beam = args.beam.map_or(bundle.manifest().decoding.beam, usize::from);
    let sizes = Sizes::of_beam(beam, bundle.manifest().model.max_text);
    println!("| graph, {precision} | runtime | ms | ratio | difference |\n|---|---|---|---|---|");
    for name in GRAPHS {
        let signature = bundle.manifest().graphs.iter().find(|graph| graph.name == name);
        let signature = signature.with_context(|| format!("the bundle has no graph {name:?}"))?;
        let signature = &signature.fixed(sizes);
        let inputs = inputs::make(signature, bundle.manifest());
        compare(&args, signature, candidates(&args, &bundle, precision, (signature, sizes), &inputs, checkpoint.as_ref()))?;
    }
    Ok(())
}

fn candidates(
    args: &Args,
    bundle: &Bundle,
    precision: Precision,
    (signature, sizes): (&GraphSignature, Sizes),
    inputs: &[Input],
    checkpoint: Option<&PathBuf>,
) -> Vec<Candidate> {
    let library = args.ort_lib.as_ref();
    let mut candidates: Vec<Candidate> = vec![
        ("unimo, tract", ours::load(EngineKind::Tract, library, bundle, precision, (signature, sizes), inputs)),
        ("unimo, ort", ours::load(EngineKind::Ort, library, bundle, precision, (signature, sizes), inputs)),
        ("rten", rten::load(bundle, precision, signature, inputs)),
    ];
    if let Some(checkpoint) = checkpoint {
        candidates.push(("candle", candle::load(checkpoint, &signature.name, inputs)));
    }
    candidates
}

fn compare(args: &Args, signature: &GraphSignature, candidates: Vec<Candidate>) -> anyhow::Result<()> {
    let mut running = Vec::new();
    for (name, loaded) in candidates {
        // The first run may still prepare something.
        match loaded.and_then(|peer| Ok((peer.run()?, peer))) {
            Ok((outputs, peer)) => running.push((name, peer, outputs, Vec::new())),
            Err(error) => println!("| {} | {name} | - | - | {} |", signature.name, one_line(&error)),
        }
    }
    ensure!(!running.is_empty(), "no runtime can run {}", signature.name);
    for _ in 0..args.rounds {
        for (_, peer, _, times) in &mut running {
            let deadline = Instant::now() + Duration::from_secs_f64(args.seconds / f64::from(args.rounds));
            while Instant::now() < deadline {
                let start = Instant::now();
                std::hint::black_box(peer.run()?);
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
        }
    }
    let medians: Vec<f64> = running.iter_mut().map(|(.., times)| median(times)).collect();
    let fastest = medians.iter().copied().fold(f64::INFINITY, f64::min);
    for ((name, _, outputs, _), ms) in running.iter().zip(&medians) {
        let differences = outputs.iter().zip(&running[0].2).map(|(own, first)| difference(own, first));
        let difference = differences.fold(None, |largest: Option<f64>, next| Some(largest.unwrap_or(0.0).max(next)));
        let difference = difference.map_or_else(|| "-".to_owned(), |share| format!("{share:.0e}"));
        println!("| {} | {name} | {ms:.2} | {:.2} | {difference} |", signature.name, ms / fastest);
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The largest difference, as a share of the root mean square; infinite where the sizes differ.
fn difference(own: &[f32], first: &[f32]) -> f64 {
    if own.len() != first.len() {
        return f64::INFINITY;
    }
    let squares: f64 = first.iter().map(|v| f64::from(*v).powi(2)).sum();
    let rms = (squares / first.len().max(1) as f64).sqrt();
    own.iter().zip(first).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / rms.max(f64::MIN_POSITIVE)
}

fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace(['\n', '|'], " ")
}
