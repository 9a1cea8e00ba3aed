//! `unimo-train finetune caption|self-critical|retrieval`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use super::pretrain::DataArgs;
use unimo_train::checkpoint;
use unimo_train::model::ModelConfig;
use unimo_train::recipe::Recipe;

const EXAMPLES: &str = "Examples:
  unimo-train finetune caption --init runs/edge-s --tokenizer tokenizer.json \\
      --pairs flickr8k/train --dev flickr8k/dev-0000.tar --out runs/edge-s-caption
  unimo-train finetune self-critical --init runs/edge-s-caption --tokenizer tokenizer.json \\
      --pairs flickr8k/train --dev flickr8k/dev-0000.tar --out runs/edge-s-final";

/// Adapt a pretrained checkpoint.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Captioning with label smoothing; the contrast goes on, so that one model captions and searches
    Caption(TaskArgs),
    /// Captioning by its metric, after `caption`: captions drawn from the model are rewarded by CIDEr-D
    SelfCritical(TaskArgs),
    /// Retrieval: contrast of separate encodings, and matching with TF-IDF hard negatives
    Retrieval(TaskArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
struct TaskArgs {
    /// Checkpoint (or run) to start from
    #[arg(long, value_name = "CHECKPOINT")]
    init: PathBuf,
    /// Recipe (TOML) instead of the task's own
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
}

const CAPTION: &str = include_str!("../../recipes/finetune-caption.toml");
const SELF_CRITICAL: &str = include_str!("../../recipes/finetune-self-critical.toml");
const RETRIEVAL: &str = include_str!("../../recipes/finetune-retrieval.toml");

/// Runs the subcommand.
///
/// # Errors
/// Unusable input or failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let (task, default) = match &args.task {
        Task::Caption(task) => (task, CAPTION),
        Task::SelfCritical(task) => (task, SELF_CRITICAL),
        Task::Retrieval(task) => (task, RETRIEVAL),
    };
    let recipe = match &task.recipe {
        Some(path) => Recipe::from_file(path)?,
        None => Recipe::from_toml(default)?,
    };
    let init = checkpoint::resolve(&task.init)?;
    let size = ModelConfig::named(&init.join("model.toml").to_string_lossy())?;
    task.data.run(&task.data.job(recipe, size, Some(init)))
}
