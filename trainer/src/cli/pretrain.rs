//! `unimo-train pretrain`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::device::DeviceArgs;
use unimo_train::model::ModelConfig;
use unimo_train::parallel::{self, Collective};
use unimo_train::recipe::Recipe;
use unimo_train::training::{self, TrainingJob};

const EXAMPLES: &str = "Examples:
  unimo-train pretrain --size edge-s --recipe trainer/recipes/edge-s-pretrain.toml --tokenizer tokenizer.json \\
      --backbone mobilenetv2.safetensors --pairs flickr8k/train scenes/train --images coco --texts captions.txt \\
      --dev flickr8k/dev-0000.tar --out runs/edge-s
  # the paper's sizes see detected regions, read from tables as those of the released UNIMO: picture, width, height, number of
  # regions, and in base64 boxes, 2048 features and 1601 class probabilities of each
  unimo-train pretrain --size base --recipe recipe.toml --tokenizer tokenizer.json --pairs coco-captions --regions coco-regions \\
      --images openimages-regions --texts captions.txt --out runs/base
  # all stages of a plan, from data to a finished model (see `unimo-train plan --help`)
  unimo-train pretrain --config trainer/recipes/edge-s.toml --backbone mobilenetv2.safetensors --pairs flickr8k/train … --out runs/edge-s
  # what would it cost?
  unimo-train pretrain … --out runs/edge-s --dry-run
  # after an interruption, with the same arguments
  unimo-train pretrain … --out runs/edge-s --resume
  # as several processes that share out every step; resuming may use another number (trainer/PARALLEL.md)
  mpirun -np 4 unimo-train pretrain … --out runs/edge-s
  srun --ntasks=4 unimo-train pretrain … --out runs/edge-s
  torchrun --no-python --nproc-per-node=4 unimo-train pretrain … --out runs/edge-s

The run's folder holds checkpoints/step-*/ (each whole or absent), log.jsonl (one line a step) and recipe.toml.";

/// Data and places that every training command takes.
#[derive(Debug, clap::Args)]
pub struct DataArgs {
    /// `tokenizer.json` (see `unimo-train tokenizer`)
    #[arg(long, value_name = "FILE")]
    pub tokenizer: PathBuf,
    /// MobileNetV2 weights, safetensors with batch norm folded in; a checkpoint to start from brings its own
    #[arg(long, value_name = "FILE")]
    pub backbone: Option<PathBuf>,
    /// Shards (or folders of shards) of pictures with captions
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    pub pairs: Vec<PathBuf>,
    /// Shards of pictures without captions; for a size with detected regions, tables of theirs
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    pub images: Vec<PathBuf>,
    /// Tables (or folders of .tsv) of the detected regions of pictures with captions, for sizes that see such, as base and large
    #[arg(long, num_args = 1.., value_name = "TABLE")]
    pub regions: Vec<PathBuf>,
    /// Text files, one text a line
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub texts: Vec<PathBuf>,
    /// Folders of rewritten captions (see `unimo-train rewrite`)
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    pub rewrites: Vec<PathBuf>,
    /// Folders of retrieved images and texts (see `unimo-train retrieve`)
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    pub retrieved: Vec<PathBuf>,
    /// Development shards, evaluated on the way
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    pub dev: Vec<PathBuf>,
    /// Folder of cached region features [default: OUT/features]
    #[arg(long, value_name = "FOLDER")]
    pub features: Option<PathBuf>,
    /// Folder of the run
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Go on with the run in OUT from its newest checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Run a few steps, throw them away, and say what the whole costs: parameters, memory, operations, time
    #[arg(long)]
    pub dry_run: bool,
    /// Stop after this many steps; --resume goes on
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,
    /// Keep of the layers' activations their inputs alone, and compute the rest again in the backward pass: less memory, a third
    /// more arithmetic, the same gradients. A run may be resumed with it or without
    #[arg(long)]
    pub activation_checkpointing: bool,
    /// Threads that draw and pack batches ahead, the same batches whatever their number [default: 1, on a GPU half of the cores and
    /// 8 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub drawing_threads: Option<u16>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// What the data is and under which licence, for the model card
    #[arg(long, default_value = "not stated", value_name = "TEXT")]
    pub data_note: String,
}

/// Train on all objectives of a recipe.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Model size: pico, edge-xs, edge-s, edge-m, base, large, or a TOML file
    #[arg(long, default_value = "edge-s")]
    size: String,
    /// Recipe (TOML): steps, batch, objectives, optimiser
    #[arg(long, value_name = "FILE")]
    recipe: PathBuf,
    /// Start from this checkpoint (or run) instead of fresh weights
    #[arg(long, value_name = "CHECKPOINT")]
    init: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
}

impl DataArgs {
    /// Runs the job, or rehearses it, together with the other ranks, and says what came out.
    ///
    /// # Errors
    /// Unusable input or failed writes.
    pub fn run(&self, ranks: &dyn Collective, job: &TrainingJob) -> Result<ExitCode> {
        let told = if self.dry_run {
            training::rehearse_among(ranks, job)?.to_string()
        } else {
            training::run_among(ranks, job)?.display().to_string()
        };
        if ranks.rank() == 0 {
            println!("{told}");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The job that these arguments describe, for one of the ranks.
    ///
    /// # Errors
    /// A device that cannot be had.
    pub fn job(&self, ranks: &dyn Collective, recipe: Recipe, size: ModelConfig, init: Option<PathBuf>) -> Result<TrainingJob> {
        Ok(TrainingJob {
            recipe,
            size,
            init,
            tokenizer: self.tokenizer.clone(),
            backbone: self.backbone.clone(),
            pairs: self.pairs.clone(),
            images: self.images.clone(),
            regions: self.regions.clone(),
            texts: self.texts.clone(),
            rewrites: self.rewrites.clone(),
            retrieved: self.retrieved.clone(),
            development: self.dev.clone(),
            task: None,
            writing: None,
            features: self.features.clone().unwrap_or_else(|| self.out.join("features")),
            run: self.out.clone(),
            resume: self.resume,
            data_note: self.data_note.clone(),
            stop_after: self.stop_after,
            activation_checkpointing: self.activation_checkpointing,
            drawing_threads: self.drawing_threads.map_or(0, usize::from),
            device: self.device.open_among(ranks)?,
        })
    }
}

/// Runs the subcommand.
///
/// # Errors
/// Unusable input or failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    parallel::as_launched(|ranks| {
        let job = args.data.job(ranks, Recipe::from_file(&args.recipe)?, ModelConfig::named(&args.size)?, args.init.clone())?;
        args.data.run(ranks, &job)
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn tables_of_regions_reach_the_job() {
        let words = "pretrain --size base --recipe r --tokenizer t --pairs p --regions a b --images c --out o";
        let args = Program::parse_from(words.split(' ')).args;
        let recipe = Recipe::from_toml("steps = 1\n[batch]\nimages = 2\ncaptions = 1\n").unwrap();
        let job = args.data.job(&parallel::Alone, recipe, ModelConfig::named(&args.size).unwrap(), None).unwrap();
        assert_eq!((job.regions, job.images), (vec!["a".into(), "b".into()], vec!["c".into()]));
        assert!(job.size.detects() && job.backbone.is_none());
    }
}
