//! `unimo-train tokenizer`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use unimo_train::{shards, tokenizer_training};

const EXAMPLES: &str = "Example:
  unimo-train tokenizer --pairs flickr8k/train --texts captions.txt --vocabulary 4096 --out tokenizer.json";

/// Train a byte-level BPE vocabulary on captions and texts.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Shards (or folders of shards) whose captions are read
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    pairs: Vec<PathBuf>,
    /// Text files, one text a line
    #[arg(long, num_args = 1.., value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Tokens of the vocabulary, specials included
    #[arg(long, default_value_t = 4096)]
    vocabulary: usize,
    /// Where to write `tokenizer.json`
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the subcommand.
///
/// # Errors
/// Unreadable input, no text, a vocabulary that is too small.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.pairs.is_empty() && args.texts.is_empty() {
        bail!("give captions to train on, with --pairs or --texts");
    }
    let mut texts = Vec::new();
    if !args.pairs.is_empty() {
        let report = shards::read_shards(&args.pairs, |sample| {
            texts.extend(sample.captions);
            Ok(())
        })?;
        for damage in &report.damaged {
            eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
        }
    }
    for path in &args.texts {
        let content = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        texts.extend(content.lines().map(str::to_owned));
    }
    let json = tokenizer_training::train(texts.iter().map(String::as_str), args.vocabulary)?;
    let size = unimo::tokenizer::Tokenizer::from_bytes(json.as_bytes())?.vocabulary_size();
    let partial = args.out.with_extension("tmp");
    std::fs::write(&partial, &json).with_context(|| format!("cannot write {}", partial.display()))?;
    std::fs::rename(&partial, &args.out).with_context(|| format!("cannot write {}", args.out.display()))?;
    println!("{}: {size} tokens from {} texts", args.out.display(), texts.len());
    Ok(ExitCode::SUCCESS)
}
