//! `unimo match`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use unimo::model::GraphName;

use super::ModelArgs;
use super::exit::{UsageError, picture_code};
use super::output::{Output, SCHEMA, Subject};
use super::pictures;
use super::texts::cut_warning;

const EXAMPLES: &str = "\
Examples:
  unimo match photo.jpg 'a dog on the beach' 'a red circle'
  unimo match --jsonl photo.jpg 'a dog on the beach'
";

/// Tell how probably each text describes a picture
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MatchArgs {
    /// The picture, a camera, or - for one on standard input
    image: String,
    /// Texts to compare it with
    #[arg(required = true)]
    text: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object a line
    #[arg(long)]
    jsonl: bool,
}

/// One object of `--jsonl`.
#[derive(Debug, Serialize)]
struct MatchLine<'a> {
    schema: u32,
    source: &'a str,
    text: &'a str,
    /// Probability that the text describes the picture.
    score: f32,
}

pub fn run(args: &MatchArgs) -> anyhow::Result<ExitCode> {
    let pictures = pictures::find(std::slice::from_ref(&args.image))?;
    let [picture] = pictures.as_slice() else {
        return Err(UsageError(format!("{} has {} pictures, match takes one", args.image, pictures.len())).into());
    };
    let model = args.model.open()?;
    model.load(&[GraphName::Vision, GraphName::Match])?;
    let mut output = Output::new(1);
    let source = picture.name();
    let image = match pictures::load(picture) {
        Ok(image) => image,
        Err(error) => {
            output.failed_with(picture_code(&error));
            output.failure(Subject::Source(&source), &error.to_string(), false, args.jsonl)?;
            return Ok(output.finish());
        }
    };
    let vision = model.see(&image)?;
    for text in &args.text {
        if let Some(warning) = cut_warning(&model, text) {
            output.complain(&warning);
        }
        let score = model.match_score(&vision, text)?;
        if args.jsonl {
            output.json(&MatchLine { schema: SCHEMA, source: &source, text, score })?;
        } else {
            output.line(&format!("{score:.4}  {text}"))?;
        }
    }
    Ok(output.finish())
}
