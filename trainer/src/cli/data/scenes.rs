//! `unimo-train data scenes`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use unimo_train::scenes::{CorpusOptions, MAX_OBJECTS, PictureFormat, signatures, write_corpus};

/// Arguments of `data scenes`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each sample is <key>.jpg and <key>.json: {\"captions\": [5 strings], \"graph\": …, \"questions\": [{question, answer}, …]}.
The same seed always gives the same scenes.

Examples:
  unimo-train data scenes --out scenes/train --count 5000 --seed 1
  unimo-train data scenes --out scenes/dev --count 100 --seed 2 --distinct --exclude scenes/train")]
pub struct ScenesArgs {
    /// Folder for the shards scenes-0000.tar, scenes-0001.tar, …
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Scenes to draw
    #[arg(long, value_name = "N", default_value_t = 1000)]
    count: usize,
    /// Seed of the corpus
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Samples of a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    shard_size: usize,
    /// How pictures are stored
    #[arg(long, value_enum, default_value_t = PictureFormat::Jpg)]
    format: PictureFormat,
    /// Most objects of a scene, 1 to 3
    #[arg(long, value_name = "N", default_value_t = MAX_OBJECTS, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=MAX_OBJECTS as u64))]
    max_objects: usize,
    /// No two scenes of which the same could be said
    #[arg(long)]
    distinct: bool,
    /// Leave out scenes of which the same could be said as of one in these shards (files or folders)
    #[arg(long, value_name = "SHARDS", num_args = 1..)]
    exclude: Vec<PathBuf>,
    /// Print what was written as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ScenesArgs) -> Result<ExitCode> {
    let options = CorpusOptions {
        seed: args.seed,
        count: args.count,
        max_objects: args.max_objects,
        format: args.format,
        samples_per_shard: args.shard_size,
        distinct: args.distinct,
        exclude: signatures(&args.exclude)?,
    };
    let report = write_corpus(&args.out, &options)?;
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        value["schema"] = 1.into();
        println!("{value}");
    } else {
        println!("{} scenes in {} shards at {}", report.scenes, report.shards.len(), args.out.display());
        if report.left_out > 0 {
            println!("{} left out: excluded, or the same as another", report.left_out);
        }
    }
    Ok(ExitCode::SUCCESS)
}
