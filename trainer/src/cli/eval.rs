//! `unimo-train eval`: scores what a model says against what is true.

mod captions;
mod checkpoint;
mod lines;
mod retrieval;
mod scenes;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Arguments of `unimo-train eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(Debug, Subcommand)]
enum EvalCommand {
    /// BLEU, ROUGE-L and CIDEr-D of the captions that `unimo caption --jsonl` wrote
    Captions(captions::CaptionsArgs),
    /// Recall at 1, 5 and 10 both ways of the embeddings that `unimo embed --jsonl` wrote
    Retrieval(retrieval::RetrievalArgs),
    /// Captions and retrieval of a checkpoint, computed by the trainer
    Checkpoint(checkpoint::CheckpointArgs),
    /// Accuracy, or whatever a task is judged by, of a checkpoint fine-tuned on it
    Task(super::tasks::TaskArgs),
    /// ROUGE and BLEU of texts that a checkpoint writes of others
    Written(super::tasks::WrittenArgs),
    /// How many captions of drawn scenes name the right objects and colours
    Scenes(scenes::ScenesArgs),
}

/// Runs `unimo-train eval …`.
///
/// # Errors
/// Files that cannot be read or do not belong together.
pub fn run(args: EvalArgs) -> Result<ExitCode> {
    match args.command {
        EvalCommand::Captions(args) => captions::run(&args),
        EvalCommand::Retrieval(args) => retrieval::run(&args),
        EvalCommand::Checkpoint(args) => checkpoint::run(&args),
        EvalCommand::Task(args) => super::tasks::run(&args),
        EvalCommand::Written(args) => super::tasks::run_written(&args),
        EvalCommand::Scenes(args) => scenes::run(&args),
    }
}
