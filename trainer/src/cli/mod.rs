//! The command line: one module a subcommand, thin over the library.

pub mod ablate;
pub mod average;
pub mod data;
pub mod device;
pub mod eval;
pub mod finetune;
pub mod gpu;
pub mod plan;
pub mod pretrain;
pub mod report;
pub mod retrieve;
pub mod rewrite;
pub mod tasks;
pub mod tokenizer;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

const EXAMPLES: &str = "Examples:
  # Draw a corpus, train the smallest model on it, look at what it learnt
  unimo-train data scenes --out scenes/train --count 2000 --seed 1
  unimo-train data scenes --out scenes/dev --count 100 --seed 2
  unimo-train tokenizer --pairs scenes/train --vocabulary 512 --out tokenizer.json
  unimo-train pretrain --size pico --recipe trainer/recipes/pico-scenes.toml --tokenizer tokenizer.json \\
      --backbone mobilenetv2.safetensors --pairs scenes/train --dev scenes/dev --out runs/pico

Exit codes: 0 done, 2 usage, 3 bad input, 4 device not there, 5 build or libraries without CUDA, 6 a kernel is wrong, 130 interrupted.";

/// Trains the UNIMO image–text model: data, tokenizer, pretraining, fine-tuning, evaluation.
#[derive(Debug, Parser)]
#[command(name = "unimo-train", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// The command line, or clap's message and the end of the process. A plan begins with pretraining, and may be given to that
    /// command: `pretrain --config PLAN` is `plan --config PLAN`.
    pub fn from_words(words: impl Iterator<Item = OsString>) -> Self {
        let mut words: Vec<OsString> = words.collect();
        let is_config = |word: &OsString| word.to_str().is_some_and(|word| word == "--config" || word.starts_with("--config="));
        if words.get(1).is_some_and(|word| word == "pretrain") && words.iter().any(is_config) {
            words[1] = "plan".into();
        }
        Self::parse_from(words)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draw, pack, unpack and describe shards of pictures and captions
    Data(data::DataArgs),
    /// Train the byte-level BPE vocabulary
    Tokenizer(tokenizer::Args),
    /// Make negatives of captions by rewriting them
    Rewrite(rewrite::Args),
    /// Find images alone and texts alone that are like each pair
    Retrieve(retrieve::Args),
    /// Train a model from nothing, or go on from a checkpoint, on all objectives of a recipe
    Pretrain(pretrain::Args),
    /// Adapt a pretrained checkpoint to captioning or retrieval
    Finetune(finetune::Args),
    /// Train variants of a recipe with several seeds and compare them
    Ablate(ablate::Args),
    /// Average the weights of checkpoints
    Average(average::Args),
    /// Run the stages of a plan, from data to a finished model
    Plan(plan::Args),
    /// Write a run's curves, scores and sample captions as one HTML file
    Report(report::Args),
    /// Score captions, embeddings or a checkpoint
    Eval(eval::EvalArgs),
    /// Check the kernels on a CUDA device
    Gpu(gpu::GpuArgs),
}

/// Runs a parsed command line.
///
/// # Errors
/// Whatever the subcommand could not do.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Data(args) => data::run(args),
        Command::Tokenizer(args) => tokenizer::run(&args),
        Command::Rewrite(args) => rewrite::run(&args),
        Command::Retrieve(args) => retrieve::run(&args),
        Command::Pretrain(args) => pretrain::run(&args),
        Command::Finetune(args) => finetune::run(&args),
        Command::Ablate(args) => ablate::run(&args),
        Command::Average(args) => average::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Eval(args) => eval::run(args),
        Command::Gpu(args) => gpu::run(&args),
    }
}
