//! `unimo-train finetune caption|self-critical|retrieval|answer|entail|write|classify`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use super::pretrain::DataArgs;
use super::tasks::{AnswerFiles, ExampleFiles, WritingFiles};
use unimo_train::checkpoint;
use unimo_train::model::ModelConfig;
use unimo_train::parallel;
use unimo_train::recipe::Recipe;
use unimo_train::tasks::tables::Glue;
use unimo_train::training::TrainingJob;

const EXAMPLES: &str = "Examples:
  unimo-train finetune caption --init runs/edge-s --tokenizer tokenizer.json \\
      --pairs flickr8k/train --dev flickr8k/dev-0000.tar --out runs/edge-s-caption
  unimo-train finetune self-critical --init runs/edge-s-caption --tokenizer tokenizer.json \\
      --pairs flickr8k/train --dev flickr8k/dev-0000.tar --out runs/edge-s-final
  unimo-train finetune answer --init runs/edge-s --tokenizer tokenizer.json --images coco-train \\
      --questions v2_train_questions.json --annotations v2_train_annotations.json --out runs/vqa
  unimo-train finetune classify --task cola --init runs/edge-s --tokenizer tokenizer.json --examples CoLA/train.tsv \\
      --dev-examples CoLA/dev.tsv --out runs/cola";

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
    /// Visual question answering, on files of VQA v2's form
    Answer {
        #[command(flatten)]
        files: AnswerFiles,
        #[command(flatten)]
        task: TaskArgs,
    },
    /// Visual entailment, on SNLI-VE's files
    Entail {
        #[command(flatten)]
        files: ExampleFiles,
        #[command(flatten)]
        task: TaskArgs,
    },
    /// Writing a text of another: summaries, questions about a passage
    Write {
        #[command(flatten)]
        files: WritingFiles,
        #[command(flatten)]
        task: TaskArgs,
    },
    /// Classification or regression of texts, on GLUE's tables
    Classify {
        /// Which task
        #[arg(long, value_name = "NAME")]
        task: Glue,
        #[command(flatten)]
        files: ExampleFiles,
        #[command(flatten)]
        args: TaskArgs,
    },
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
const DOWNSTREAM: &str = include_str!("../../recipes/finetune-task.toml");
const RETRIEVAL: &str = include_str!("../../recipes/finetune-retrieval.toml");

/// Runs the subcommand.
///
/// # Errors
/// Unusable input or failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    parallel::as_launched(|ranks| {
        let (task, default, downstream, writing) = match &args.task {
            Task::Caption(task) => (task, CAPTION, None, None),
            Task::SelfCritical(task) => (task, SELF_CRITICAL, None, None),
            Task::Retrieval(task) => (task, RETRIEVAL, None, None),
            Task::Answer { files, task } => (task, DOWNSTREAM, Some(files.job()?), None),
            Task::Entail { files, task } => (task, DOWNSTREAM, Some(files.job(None)?), None),
            Task::Write { files, task } => (task, DOWNSTREAM, None, Some(files.read()?)),
            Task::Classify { task, files, args } => (args, DOWNSTREAM, Some(files.job(Some(*task))?), None),
        };
        let recipe = match &task.recipe {
            Some(path) => Recipe::from_file(path)?,
            None => Recipe::from_toml(default)?,
        };
        let init = checkpoint::resolve(&task.init)?;
        let size = ModelConfig::named(&init.join("model.toml").to_string_lossy())?;
        task.data.run(ranks, &TrainingJob { task: downstream, writing, ..task.data.job(ranks, recipe, size, Some(init))? })
    })
}
