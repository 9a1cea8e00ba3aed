//! `unimo-train eval checkpoint`

use std::path::PathBuf;
use std::process::ExitCode;

use super::super::device::DeviceArgs;
use anyhow::{Result, bail};
use clap::Args;
use unimo::tokenizer::Tokenizer;
use unimo_train::checkpoint;
use unimo_train::corpus::Corpus;
use unimo_train::detections::DetectionCache;
use unimo_train::evaluation::{self, Extent};
use unimo_train::features::FeatureCache;
use unimo_train::model::Unimo;
use unimo_train::vision::Vision;

const EXAMPLES: &str = "Examples:
  unimo-train eval checkpoint --checkpoint runs/edge-s --dev flickr8k/dev-0000.tar --features runs/edge-s/features
  # what a second look at the best candidates gains
  unimo-train eval checkpoint --checkpoint runs/edge-s --dev flickr8k/dev-0000.tar --features runs/edge-s/features --rerank 16

Captions are greedy and computed by the trainer; `eval captions` scores those of the exported bundle.";

/// Captions and retrieval of a checkpoint on development shards.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckpointArgs {
    /// Checkpoint folder, or a run's folder (its newest checkpoint)
    #[arg(long, value_name = "FOLDER")]
    checkpoint: PathBuf,
    /// Development shards
    #[arg(long, num_args = 1.., required = true, value_name = "SHARD")]
    dev: Vec<PathBuf>,
    /// Tables of the detected regions of the pictures, for a checkpoint that sees such
    #[arg(long, num_args = 1.., value_name = "TABLE")]
    regions: Vec<PathBuf>,
    /// Folder of cached region features
    #[arg(long, value_name = "FOLDER")]
    features: PathBuf,
    /// Pictures evaluated
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true, value_name = "N")]
    limit: usize,
    /// Puts the first K answers to every picture and text in order by reading each with its query, and tells recall after that
    #[arg(long, value_name = "K")]
    rerank: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
///
/// # Errors
/// Unusable checkpoint or shards.
pub fn run(args: &CheckpointArgs) -> Result<ExitCode> {
    let folder = checkpoint::resolve(&args.checkpoint)?;
    let device = args.device.open()?;
    let model = Unimo::load(&folder, &device)?;
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
    let (config, vision) = (model.config(), Vision::of_checkpoint(&folder, model.config(), &device)?);
    let mut corpus = Corpus::default();
    if config.detects() {
        let cache = DetectionCache { folder: &args.features, shapes: config.region_shapes() };
        corpus.add_detections(&args.regions, &cache, &|_| {})?;
        let without = corpus.add_captions(&args.dev, &tokenizer, config.positions)?;
        if without > 0 {
            eprintln!("{without} pictures left out: their regions are in none of the tables of --regions");
        }
    } else {
        let cache = FeatureCache { folder: &args.features, backbone: vision.given()?, trained_blocks: 0, views: 1 };
        corpus.add_pairs(&args.dev, &cache, &tokenizer, config.positions, &|_| {})?;
    }
    super::super::data::warn_damaged(&corpus.damaged);
    if corpus.pairs.is_empty() {
        bail!("the shards hold no pictures with captions");
    }
    let scores = evaluation::evaluate(&model, &vision, &tokenizer, &corpus, Extent { images: args.limit, rerank: args.rerank })?;
    if args.json {
        let mut value = serde_json::to_value(&scores)?;
        value["schema"] = 1.into();
        println!("{value}");
    } else {
        for (key, caption) in &scores.samples {
            println!("{key}: {caption}");
        }
        println!("{scores}");
    }
    Ok(ExitCode::SUCCESS)
}
