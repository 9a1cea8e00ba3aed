//! `unimo-train eval captions`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use unimo_train::metrics::caption_scores;

use super::lines::{CaptionLine, Keys, Matched, read, references};

/// Arguments of `eval captions`.
#[derive(Debug, Args)]
#[command(after_help = "\
A line belongs to the sample whose key is the name of its file without the extension; `data unpack` writes such files.
Scores agree with pycocoevalcap. Document frequencies of CIDEr-D come from the references given: score a whole split.

Exit codes: 0 done, 2 usage, 3 captions are missing or files do not belong together.

Example:
  unimo-train eval captions --references flickr8k/dev-0000.tar --predictions captions.jsonl --json")]
pub struct CaptionsArgs {
    /// Shards with the true captions, or folders of shards
    #[arg(long, required = true, num_args = 1.., value_name = "SHARDS")]
    references: Vec<PathBuf>,
    /// What `unimo caption --jsonl` wrote
    #[arg(long, value_name = "FILE")]
    predictions: PathBuf,
    /// Score the captions that are there when others are missing
    #[arg(long)]
    allow_missing: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The caption of each line, or the error that the model's program told instead.
pub(super) fn captions_of(lines: Vec<CaptionLine>) -> impl Iterator<Item = (String, Result<String, String>)> {
    lines.into_iter().map(|CaptionLine { source, caption, error }| {
        let caption = caption.ok_or_else(|| error.unwrap_or_else(|| "its line has no caption".into()));
        (source, caption)
    })
}

pub(super) fn run(args: &CaptionsArgs) -> Result<ExitCode> {
    let (keys, truth) = references(&args.references)?;
    let index = Keys::new(keys.iter().map(String::as_str))?;
    let matched = Matched::new(&index, captions_of(read(&args.predictions)?))?;
    let missing = matched.check(&keys, args.allow_missing)?;
    let extra = matched.extra.len();
    let (candidates, truth): (Vec<String>, Vec<Vec<String>>) =
        matched.found.into_iter().zip(truth).filter_map(|(found, truth)| Some((found.ok()?, truth))).unzip();
    let scores = caption_scores(&candidates, &truth);
    if args.json {
        let object = serde_json::json!({
            "schema": 1, "images": candidates.len(), "missing": missing, "extra": extra,
            "bleu": scores.bleu, "rouge_l": scores.rouge_l, "cider": scores.cider,
        });
        println!("{object}");
    } else {
        println!("{} captions, {} missing, {extra} left out", candidates.len(), missing.len());
        for (n, bleu) in scores.bleu.iter().enumerate() {
            println!("BLEU-{}   {bleu:.4}", n + 1);
        }
        println!("ROUGE-L  {:.4}\nCIDEr-D  {:.4}", scores.rouge_l, scores.cider);
    }
    Ok(ExitCode::SUCCESS)
}
