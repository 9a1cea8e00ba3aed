//! What reading pictures of shards costs before any model sees them.
//!
//! ```text
//! cargo run --release -p unimo-benches --bin loader-speed -- flickr8k/dev-0000.tar --backbone mobilenetv2.safetensors
//! ```
//!
//! Prints a Markdown table: pictures a second and milliseconds of a picture on one thread and on all, each row with what the rows
//! above it do. A picture is read with its record, decoded, shown in one of its views (mirrored, cropped, its brightness and
//! contrast changed), scaled and normalised as the backbone takes it, and, with `--backbone`, sent through the frozen part of one:
//! what `unimo-train pretrain` does once for its cache of features. What a step then draws from the cache, and how many pictures it
//! can learn from, `unimo-train pretrain … --dry-run` tells.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use unimo::image::{DecodeLimits, ImagePreparation, decode};
use unimo_train::backbone::Backbone;
use unimo_train::features::view;
use unimo_train::shards::read_shards;

/// Measures how fast pictures of shards are read and prepared.
#[derive(Debug, Parser)]
struct Args {
    /// Shards (or folders of shards) of pictures
    #[arg(required = true, value_name = "SHARD")]
    shards: Vec<PathBuf>,
    /// Views of a picture that are taken in turn
    #[arg(long, default_value_t = 8)]
    views: usize,
    /// MobileNetV2 weights, safetensors with batch norm folded in
    #[arg(long, value_name = "FILE")]
    backbone: Option<PathBuf>,
    /// Blocks of the backbone that are left out, to be trained
    #[arg(long, default_value_t = 0)]
    trained_blocks: usize,
    /// Pictures that are prepared, the first of the shards
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pictures: usize,
}

/// A record's picture.
struct Encoded {
    key: String,
    bytes: Vec<u8>,
}

/// How far pictures are taken.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Stage {
    Decoded,
    Varied,
    Prepared,
    Seen,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Decoded => "decoded",
            Self::Varied => "and a view taken of it",
            Self::Prepared => "and scaled and normalised",
            Self::Seen => "and sent through the frozen backbone",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.views > 0, "--views 0 shows nothing");
    let backbone = args.backbone.as_deref().map(Backbone::load).transpose()?;
    let (mut pictures, mut bytes, mut count) = (Vec::new(), 0, 0usize);
    let started = Instant::now();
    read_shards(&args.shards, |sample| {
        if let Some(image) = sample.image {
            (bytes, count) = (bytes + image.len(), count + 1);
            if pictures.len() < args.pictures {
                pictures.push(Encoded { key: sample.key, bytes: image });
            }
        }
        Ok(())
    })?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(!pictures.is_empty(), "the shards hold no pictures");
    let threads = std::thread::available_parallelism()?.get();
    println!("{count} pictures of {:.0} kB, {threads} threads\n", bytes as f64 / count as f64 / 1e3);
    println!("| a picture is | 1 thread: pictures/s | ms | {threads} threads: pictures/s |\n|---|---|---|---|");
    println!("| read from its shard | {:.0} | {:.3} | |", count as f64 / seconds, seconds * 1e3 / count as f64);
    let stages = [Stage::Decoded, Stage::Varied, Stage::Prepared, Stage::Seen];
    for stage in stages.into_iter().filter(|stage| *stage < Stage::Seen || backbone.is_some()) {
        let [one, all] = [1, threads].map(|threads| -> anyhow::Result<f64> {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
            let started = Instant::now();
            pool.install(|| {
                pictures.par_iter().enumerate().try_for_each(|(number, picture)| {
                    let worked = work(picture, number % args.views, stage, backbone.as_ref(), args.trained_blocks);
                    worked.with_context(|| format!("picture {}", picture.key))
                })
            })?;
            Ok(started.elapsed().as_secs_f64() / pictures.len() as f64)
        });
        let (one, all) = (one?, all?);
        println!("| {} | {:.0} | {:.3} | {:.0} |", stage.name(), 1.0 / one, one * 1e3, 1.0 / all);
    }
    Ok(())
}

/// Takes a picture as far as a stage.
fn work(picture: &Encoded, number: usize, last: Stage, backbone: Option<&Backbone>, trained_blocks: usize) -> anyhow::Result<()> {
    let image = decode(&picture.bytes, &DecodeLimits::default())?;
    if last == Stage::Decoded {
        std::hint::black_box(image);
        return Ok(());
    }
    let varied = view(&image, &picture.key, number);
    if last == Stage::Varied {
        std::hint::black_box(varied);
        return Ok(());
    }
    let pixels = ImagePreparation::default().tensor(&varied);
    match backbone {
        Some(backbone) if last == Stage::Seen => drop(std::hint::black_box(backbone.record(&pixels, trained_blocks)?)),
        _ => drop(std::hint::black_box(pixels)),
    }
    Ok(())
}
