//! `unimo embed`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use unimo::model::{GraphName, Model, ModelError};
use unimo::ordered::ordered_map;

use super::ModelArgs;
use super::exit::picture_code;
use super::output::{Output, SCHEMA, Subject};
use super::pictures::{self, Picture, PictureError};
use super::texts::cut_warning;

const EXAMPLES: &str = "\
Examples:
  unimo embed --image photo.jpg --jsonl
  unimo embed --text 'a dog on the beach' --text 'two children' --jsonl
  unimo embed --text-file captions.txt --jsonl > captions.jsonl

Pictures and texts share one space: the dot product of two embeddings is their cosine similarity.
";

/// Embed pictures or texts as unit vectors in one space
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EmbedArgs {
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object a line, instead of numbers with spaces between them
    #[arg(long)]
    jsonl: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Pictures, folders of them, cameras, or - for one on standard input
    #[arg(long, value_name = "PICTURE", num_args = 1..)]
    image: Vec<String>,
    /// Texts
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,
    /// A file of texts, one a line, or - for standard input
    #[arg(long, value_name = "FILE")]
    text_file: Option<PathBuf>,
}

/// One object of `--jsonl`.
#[derive(Debug, Serialize)]
struct EmbeddingLine<'a> {
    schema: u32,
    #[serde(flatten)]
    of: Subject<'a>,
    embedding: &'a [f32],
}

pub fn run(args: &EmbedArgs) -> anyhow::Result<ExitCode> {
    if !args.what.image.is_empty() {
        return embed_pictures(args, &pictures::find(&args.what.image)?);
    }
    match &args.what.text_file {
        Some(file) => embed_texts(args, &lines(file)?),
        None => embed_texts(args, &args.what.text),
    }
}

fn embed_pictures(args: &EmbedArgs, pictures: &[Picture]) -> anyhow::Result<ExitCode> {
    let (model, workers) = args.model.open_for(pictures.len())?;
    model.load(&[GraphName::Vision])?;
    let mut output = Output::new(pictures.len());
    let work = |picture: &Picture| (picture.name(), embed_picture(&model, picture));
    ordered_map(pictures.iter(), workers, work, |(source, outcome)| {
        let embedding = outcome?.map_err(|error| {
            output.failed_with(picture_code(&error));
            error.to_string()
        });
        print(&mut output, Subject::Source(&source), embedding, args.jsonl)
    })?;
    Ok(output.finish())
}

fn embed_picture(model: &Model, picture: &Picture) -> Result<Result<Vec<f32>, PictureError>, ModelError> {
    match pictures::load(picture) {
        Ok(image) => model.embed_image(&image).map(Ok),
        Err(error) => Ok(Err(error)),
    }
}

fn embed_texts(args: &EmbedArgs, texts: &[String]) -> anyhow::Result<ExitCode> {
    let (model, workers) = args.model.open_for(texts.len())?;
    model.load(&[GraphName::Text])?;
    let mut output = Output::new(texts.len());
    let work = |text: &String| (text.clone(), model.embed_text(text));
    ordered_map(texts.iter(), workers, work, |(text, embedding)| {
        if let Some(warning) = cut_warning(&model, &text) {
            output.complain(&warning);
        }
        let embedding = if text.trim().is_empty() { Err("the text is empty".to_owned()) } else { Ok(embedding?) };
        print(&mut output, Subject::Text(&text), embedding, args.jsonl)
    })?;
    Ok(output.finish())
}

fn print(output: &mut Output, of: Subject<'_>, embedding: Result<Vec<f32>, String>, jsonl: bool) -> anyhow::Result<()> {
    match embedding {
        Ok(embedding) if jsonl => output.json(&EmbeddingLine { schema: SCHEMA, of, embedding: &embedding })?,
        Ok(embedding) => {
            let numbers: Vec<String> = embedding.iter().map(ToString::to_string).collect();
            output.line(&numbers.join(" "))?;
        }
        Err(error) => drop(output.failure(of, &error, false, jsonl)?),
    }
    output.advance();
    Ok(())
}

fn lines(path: &Path) -> anyhow::Result<Vec<String>> {
    let read = |reader: &mut dyn BufRead| reader.lines().collect::<io::Result<Vec<String>>>();
    let lines = if path == Path::new("-") {
        read(&mut io::stdin().lock())
    } else {
        File::open(path).and_then(|file| read(&mut BufReader::new(file)))
    };
    lines.with_context(|| format!("cannot read {}", path.display()))
}
