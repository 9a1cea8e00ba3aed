//! `unimo-train retrieve`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use unimo_train::model::ModelConfig;
use unimo_train::retrieval::{RetrievalJob, Seer, retrieve};

const EXAMPLES: &str = "Examples:
  unimo-train retrieve --pairs flickr8k/train --images coco --texts captions.txt --backbone mobilenetv2.safetensors \\
      --features features --out retrieved
  # by the classes of a detector
  unimo-train retrieve --pairs coco-captions --regions coco-regions --images openimages-regions --out retrieved
  # and then, with a recipe that sets retrieved_pairs and the weight cross_modal
  unimo-train pretrain … --images coco --texts captions.txt --retrieved retrieved

The folder holds one file for each shard of pairs, with one JSON object for each picture:
{\"key\": …, \"images\": [{\"key\": …, \"score\": …}, …], \"texts\": [{\"text\": …, \"score\": …}, …]}. A run that was interrupted goes on
when it is given the same arguments: finished files are kept.";

/// Find images alone that look like each picture, and texts alone that read like its captions.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Shards (or folders of shards) of pictures with captions
    #[arg(long, num_args = 1.., required = true, value_name = "SHARD")]
    pairs: Vec<PathBuf>,
    /// Shards of pictures without captions; with --regions, tables of their detected regions
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    images: Vec<PathBuf>,
    /// Text files, one text a line
    #[arg(long, num_args = 1.., value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// MobileNetV2 weights with their classifier, by whose classes images are found
    #[arg(long, value_name = "FILE", required_unless_present = "regions", conflicts_with = "regions")]
    backbone: Option<PathBuf>,
    /// Tables (or folders of .tsv) of the detected regions of the pictures with captions, by whose classes images are found
    #[arg(long, num_args = 1.., value_name = "TABLE")]
    regions: Vec<PathBuf>,
    /// Size of the model that the tables are made for
    #[arg(long, default_value = "base", value_name = "SIZE")]
    size: String,
    /// Folder of cached region features [default: OUT/features]
    #[arg(long, value_name = "FOLDER")]
    features: Option<PathBuf>,
    /// Images, and texts, kept for each picture
    #[arg(long, default_value_t = 10, value_name = "N")]
    count: usize,
    /// Folder for the result
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Runs the subcommand.
///
/// # Errors
/// Unusable input or failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let seer = match &args.backbone {
        Some(backbone) => Seer::Backbone(backbone.clone()),
        None => {
            let size = ModelConfig::named(&args.size)?;
            if !size.detects() {
                bail!("{} sees the cells of a grid, and no tables of detected regions", size.name);
            }
            Seer::Detector { tables: args.regions.clone(), shapes: size.region_shapes() }
        }
    };
    let job = RetrievalJob {
        pairs: args.pairs.clone(),
        images: args.images.clone(),
        texts: args.texts.clone(),
        seer,
        features: args.features.clone().unwrap_or_else(|| args.out.join("features")),
        count: args.count,
        out: args.out.clone(),
    };
    let bar = if std::io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{spinner} {pos} pictures, {per_sec}, {elapsed} gone")?);
    let report = retrieve(&job, &|n| bar.inc(n))?;
    bar.finish_and_clear();
    for damage in &report.damaged {
        eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    let [images, texts] = report.found;
    println!(
        "{}: {} files written, {} kept; for {} pictures {images} images and {texts} texts",
        job.out.display(),
        report.written,
        report.kept,
        report.pictures
    );
    Ok(ExitCode::SUCCESS)
}
