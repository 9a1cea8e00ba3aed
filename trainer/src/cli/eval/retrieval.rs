//! `unimo-train eval retrieval`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use unimo_train::metrics::{RECALL_AT, recall_at_k};

use super::lines::{EmbeddingLine, Keys, Matched, read, references};
use crate::cli::data::unpack::one_line_captions;

/// Arguments of `eval retrieval`.
#[derive(Debug, Args)]
#[command(after_help = "\
Pictures are found by the name of their file, texts by their order, which must be that of captions.txt from `data unpack`;
the words are compared, so that files of different data are refused. A tie counts against the model.

Exit codes: 0 done, 2 usage, 3 embeddings are missing or files do not belong together.

Example:
  unimo-train data unpack flickr8k/dev-0000.tar --out dev
  unimo embed --jsonl --image dev > images.jsonl
  unimo embed --jsonl --text-file dev/captions.txt > texts.jsonl
  unimo-train eval retrieval --references flickr8k/dev-0000.tar --images images.jsonl --texts texts.jsonl")]
pub struct RetrievalArgs {
    /// Shards with pictures and their captions, or folders of shards
    #[arg(long, required = true, num_args = 1.., value_name = "SHARDS")]
    references: Vec<PathBuf>,
    /// What `unimo embed --jsonl --image …` wrote
    #[arg(long, value_name = "FILE")]
    images: PathBuf,
    /// What `unimo embed --jsonl --text-file captions.txt` wrote
    #[arg(long, value_name = "FILE")]
    texts: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &RetrievalArgs) -> Result<ExitCode> {
    let (keys, truth) = references(&args.references)?;
    let index = Keys::new(keys.iter().map(String::as_str))?;
    let lines: Vec<EmbeddingLine> = read(&args.images)?;
    let matched = Matched::new(&index, lines.into_iter().map(image_embedding))?;
    matched.check(&keys, false)?;
    let images: Vec<Vec<f32>> = matched.found.into_iter().filter_map(Result::ok).collect();

    let expected: Vec<(usize, String)> = truth
        .iter()
        .enumerate()
        .flat_map(|(image, captions)| one_line_captions(captions).map(move |caption| (image, caption)))
        .collect();
    let texts = text_embeddings(&args.texts, read(&args.texts)?, &expected)?;
    let image_of_text: Vec<usize> = expected.iter().map(|(image, _)| *image).collect();
    let width = images.first().map_or(0, Vec::len);
    if images.iter().chain(&texts).any(|vector| vector.len() != width) {
        bail!("the embeddings are not all of the same width: do the files come from the same model?");
    }
    let scores = recall_at_k(&images, &texts, &image_of_text);
    if args.json {
        let object = serde_json::json!({
            "schema": 1, "images": images.len(), "texts": texts.len(), "at": RECALL_AT,
            "image_to_text": scores.image_to_text, "text_to_image": scores.text_to_image,
        });
        println!("{object}");
    } else {
        println!("{} images, {} texts", images.len(), texts.len());
        let row = |recalls: [f64; 3]| recalls.map(|r| format!("{:>6.1} %", 100.0 * r)).join("");
        println!("                {}", RECALL_AT.map(|k| format!("{:>8}", format!("R@{k}"))).join(""));
        println!("image to text   {}", row(scores.image_to_text));
        println!("text to image   {}", row(scores.text_to_image));
    }
    Ok(ExitCode::SUCCESS)
}

fn image_embedding(line: EmbeddingLine) -> (String, Result<Vec<f32>, String>) {
    let reason = || line.error.unwrap_or_else(|| "its line has no embedding".into());
    (line.source.unwrap_or_default(), line.embedding.ok_or_else(reason))
}

/// The embeddings of the texts, after making sure that they are those expected, in order.
fn text_embeddings(path: &Path, lines: Vec<EmbeddingLine>, expected: &[(usize, String)]) -> Result<Vec<Vec<f32>>> {
    let same = |a: &str, b: &str| a.split_whitespace().eq(b.split_whitespace());
    for (number, (line, (_, caption))) in lines.iter().zip(expected).enumerate() {
        let text = line.text.as_deref().unwrap_or_default();
        if !same(text, caption) {
            bail!("text {} of {} is `{text}`, the references have `{caption}` there", number + 1, path.display());
        }
    }
    if lines.len() != expected.len() {
        bail!("{} holds {} texts, the references have {}", path.display(), lines.len(), expected.len());
    }
    let embedding = |(number, line): (usize, EmbeddingLine)| {
        let reason = line.error.unwrap_or_else(|| "no embedding".into());
        line.embedding.ok_or_else(|| anyhow::anyhow!("text {} of {}: {reason}", number + 1, path.display()))
    };
    lines.into_iter().enumerate().map(embedding).collect()
}
