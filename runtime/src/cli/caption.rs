//! `unimo caption`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use unimo::captioning::{Caption, DecodeOptions};
use unimo::model::{GraphName, Model, ModelError};
use unimo::ordered::ordered_map;

use super::ModelArgs;
use super::decode_args::DecodeArgs;
use super::exit::picture_code;
use super::output::{Output, SCHEMA, Subject, milliseconds};
use super::pictures::{self, Picture, PictureError};

const EXAMPLES: &str = "\
Examples:
  unimo caption photo.jpg                    the caption alone
  unimo caption a.jpg b.png holidays/        'path: caption' for each
  curl -s http://camera/still | unimo caption -
  unimo caption --jsonl --beam 5 holidays/   one JSON object a picture, in the order of the pictures
  unimo caption rpicam://0                   the next picture of a camera
";

/// Caption pictures
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CaptionArgs {
    /// Pictures (JPEG, PNG, WebP), folders of them, cameras, or - for one on standard input
    #[arg(required = true, value_name = "PICTURE")]
    sources: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    decode: DecodeArgs,
    /// Print one JSON document when all is done
    #[arg(long, conflicts_with = "jsonl")]
    json: bool,
    /// Print one JSON object a line, each as soon as it is there
    #[arg(long)]
    jsonl: bool,
}

/// One object of `--json` and `--jsonl`.
#[derive(Debug, Serialize)]
struct CaptionLine<'a> {
    schema: u32,
    source: &'a str,
    caption: &'a str,
    score: f32,
    tokens: usize,
    ms: Times,
    engine: &'a str,
    provider: &'a str,
    precision: &'a str,
}

/// Milliseconds that each part took.
#[derive(Debug, Clone, Copy, Serialize)]
struct Times {
    decode_image: f64,
    vision: f64,
    text: f64,
    total: f64,
}

/// What became of a picture; the model failing ends the whole command.
type Outcome = Result<Result<(Caption, Times), PictureError>, ModelError>;

pub fn run(args: &CaptionArgs) -> anyhow::Result<ExitCode> {
    let pictures = pictures::find(&args.sources)?;
    let (model, workers) = args.model.open_for(pictures.len())?;
    let options = args.decode.options(&model)?;
    model.load(&[GraphName::Vision, GraphName::Decode])?;

    let bare = pictures::is_single(&args.sources);
    let mut output = Output::new(pictures.len());
    let mut document = Vec::new();
    let work = |picture: &Picture| (picture.name(), caption(&model, picture, &options));
    ordered_map(pictures.iter(), workers, work, |(source, outcome)| {
        match outcome? {
            Ok((caption, ms)) => {
                let line = CaptionLine {
                    schema: SCHEMA,
                    source: &source,
                    caption: &caption.text,
                    score: caption.score,
                    tokens: caption.tokens.len(),
                    ms,
                    engine: model.options().engine.name(),
                    provider: model.options().provider.name(),
                    precision: model.precision().name(),
                };
                if args.json {
                    document.push(serde_json::to_value(line)?);
                } else if args.jsonl {
                    output.json(&line)?;
                } else if bare {
                    output.line(&caption.text)?;
                } else {
                    output.line(&format!("{source}: {}", caption.text))?;
                }
            }
            Err(error) => {
                output.failed_with(picture_code(&error));
                let line = output.failure(Subject::Source(&source), &error.to_string(), args.json, args.jsonl)?;
                document.extend(line);
            }
        }
        output.advance();
        anyhow::Ok(())
    })?;
    if args.json {
        output.json(&serde_json::json!({ "schema": SCHEMA, "results": document }))?;
    }
    Ok(output.finish())
}

fn caption(model: &Model, picture: &Picture, options: &DecodeOptions) -> Outcome {
    let start = Instant::now();
    let image = match pictures::load(picture) {
        Ok(image) => image,
        Err(error) => return Ok(Err(error)),
    };
    let decoded = Instant::now();
    let vision = model.see(&image)?;
    let seen = Instant::now();
    let caption = model.caption(&vision, options)?;
    let times = Times {
        decode_image: milliseconds(decoded - start),
        vision: milliseconds(seen - decoded),
        text: milliseconds(seen.elapsed()),
        total: milliseconds(start.elapsed()),
    };
    Ok(Ok((caption, times)))
}
