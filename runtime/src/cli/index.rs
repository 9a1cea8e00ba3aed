//! `unimo index`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use sha2::{Digest, Sha256};
use unimo::gallery::{Entry, Gallery, Known, Time};
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};
use unimo::ordered::ordered_map;
use unimo_devices::source::{Picture, pictures};

use super::ModelArgs;
use super::exit::{NOTHING_FOUND, UsageError};
use super::output::{Output, SCHEMA, Subject};

const EXAMPLES: &str = "\
Examples:
  unimo index add --gallery holidays.gallery holidays/     pictures that are there, unchanged, are passed over
  unimo index stats --gallery holidays.gallery
  unimo index verify --gallery holidays.gallery
  unimo index export --gallery holidays.gallery > holidays.jsonl

A gallery is one SQLite file, bound to the model that made it. A picture is reported once it is on the disk.
";

/// Keep a gallery of pictures to search in
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct IndexArgs {
    #[command(subcommand)]
    command: IndexCommand,
}

#[derive(Debug, Subcommand)]
enum IndexCommand {
    /// Embed, caption and store pictures
    Add(AddArgs),
    /// Forget pictures, named as `index export` names them
    Remove {
        #[command(flatten)]
        gallery: GalleryArgs,
        /// Sources to forget
        #[arg(required = true, value_name = "SOURCE")]
        sources: Vec<String>,
    },
    /// Print how much a gallery holds
    Stats {
        #[command(flatten)]
        gallery: GalleryArgs,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check the file and every embedding in it
    Verify {
        #[command(flatten)]
        gallery: GalleryArgs,
    },
    /// Print every picture with its embedding, a JSON object a line
    Export {
        #[command(flatten)]
        gallery: GalleryArgs,
    },
}

/// Which gallery.
#[derive(Debug, Args)]
pub struct GalleryArgs {
    /// The gallery's file
    #[arg(long, value_name = "FILE")]
    pub gallery: PathBuf,
}

#[derive(Debug, Args)]
struct AddArgs {
    #[command(flatten)]
    gallery: GalleryArgs,
    /// Pictures (JPEG, PNG, WebP) or folders of them
    #[arg(required = true, value_name = "PICTURE")]
    sources: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Store no captions: faster, and search needs none
    #[arg(long)]
    no_captions: bool,
    /// Print one JSON object a picture, once it is stored
    #[arg(long)]
    jsonl: bool,
}

/// One object of `index add --jsonl`.
#[derive(Debug, Serialize)]
struct AddedLine<'a> {
    schema: u32,
    source: &'a str,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    caption: Option<&'a str>,
}

/// One object of `index export`.
#[derive(Debug, Serialize)]
struct ExportLine<'a> {
    schema: u32,
    source: &'a str,
    caption: Option<&'a str>,
    time: String,
    embedding: &'a [f32],
}

pub fn run(args: &IndexArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        IndexCommand::Add(args) => add(args),
        IndexCommand::Remove { gallery, sources } => {
            let sources = sources.iter().map(|source| stored_name(source)).collect::<io::Result<Vec<_>>>()?;
            let removed = Gallery::open(&gallery.gallery)?.remove(&sources)?;
            writeln!(io::stdout(), "{removed} forgotten")?;
            Ok(ExitCode::from(if removed == 0 { NOTHING_FOUND } else { 0 }))
        }
        IndexCommand::Stats { gallery, json } => stats(&gallery.gallery, *json),
        IndexCommand::Verify { gallery } => {
            let pictures = Gallery::open(&gallery.gallery)?.verify()?;
            writeln!(io::stdout(), "{}: {pictures} pictures, all sound", gallery.gallery.display())?;
            Ok(ExitCode::SUCCESS)
        }
        IndexCommand::Export { gallery } => export(&gallery.gallery),
    }
}

/// What a gallery calls a picture: its absolute path, so that it is found again from any folder, and equal names in two folders
/// are two pictures.
pub fn stored_name(path: &str) -> io::Result<String> {
    Ok(std::path::absolute(path)?.display().to_string())
}

/// What became of a picture: nothing to do, an entry to store, or words on why not.
enum Looked {
    Unchanged(Option<String>),
    Entry(Box<Entry>),
    Bad(String),
}

/// Makes a write beyond the user's limit on file sizes fail, as on a full disk, instead of ending the program.
#[cfg(unix)]
fn survive_file_size_limit() -> io::Result<()> {
    let noticed = std::sync::Arc::default();
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, noticed).map(drop)
}

fn add(args: &AddArgs) -> anyhow::Result<ExitCode> {
    #[cfg(unix)]
    survive_file_size_limit()?;
    let mut pictures = pictures(&args.sources)?;
    if pictures.contains(&Picture::Stdin) {
        return Err(UsageError("a picture on standard input has no name to be found by again: index files".to_owned()).into());
    }
    for picture in &mut pictures {
        match picture {
            Picture::File(path) => *path = std::path::absolute(&*path)?,
            Picture::Camera(uri) => {
                return Err(UsageError(format!("{uri}: a camera has no picture to be found by again: index files")).into());
            }
            Picture::Stdin => {}
        }
    }
    let (model, workers) = args.model.open_for(pictures.len())?;
    let path = &args.gallery.gallery;
    let mut gallery = Gallery::open_or_create(path, model.bundle_id(), model.manifest().model.embedding)?;
    // Workers ask through a connection of their own: the first one is busy storing.
    let known = std::sync::Mutex::new(Gallery::open(path)?);
    let mut output = Output::new(pictures.len());
    let work = |picture: &Picture| (picture.name(), look(&model, picture, &known, !args.no_captions));
    ordered_map(pictures.iter(), workers, work, |(source, looked)| {
        match looked? {
            Looked::Unchanged(caption) => report(&output, args.jsonl, &source, "unchanged", caption.as_deref())?,
            Looked::Bad(reason) => drop(output.failure(Subject::Source(&source), &reason, false, args.jsonl)?),
            Looked::Entry(entry) => {
                // Asked again: the command line may name a picture twice, and a second worker then began before the first was done.
                let status = match gallery.known(&source, &entry.hash)? {
                    Known::New => "added",
                    Known::Unchanged(caption) if caption.is_some() || entry.caption.is_none() => "unchanged",
                    Known::Changed | Known::Unchanged(_) => "updated",
                };
                if status != "unchanged" {
                    gallery.put(std::slice::from_ref(&*entry))?;
                }
                report(&output, args.jsonl, &source, status, entry.caption.as_deref())?;
            }
        }
        output.advance();
        anyhow::Ok(())
    })?;
    Ok(output.finish())
}

fn report(output: &Output, jsonl: bool, source: &str, status: &str, caption: Option<&str>) -> anyhow::Result<()> {
    if jsonl {
        return output.json(&AddedLine { schema: SCHEMA, source, status, caption });
    }
    match caption {
        Some(caption) => output.line(&format!("{source}: {status}: {caption}"))?,
        None => output.line(&format!("{source}: {status}"))?,
    }
    Ok(())
}

fn look(model: &Model, picture: &Picture, known: &std::sync::Mutex<Gallery>, captions: bool) -> anyhow::Result<Looked> {
    let Picture::File(path) = picture else { return Ok(Looked::Bad("not a file".to_owned())) };
    let (bytes, time) = match read(path) {
        Ok(read) => read,
        Err(error) => return Ok(Looked::Bad(format!("cannot read {}: {error}", path.display()))),
    };
    let hash: [u8; 32] = Sha256::digest(&bytes).into();
    // The stored name is what the picture is read by again.
    let Some(source) = path.to_str().map(str::to_owned) else {
        return Ok(Looked::Bad("its name is not UTF-8".to_owned()));
    };
    let stored = known.lock().unwrap_or_else(std::sync::PoisonError::into_inner).known(&source, &hash)?;
    // One stored without a caption is looked at again where a caption is wanted.
    match stored {
        Known::Unchanged(caption) if caption.is_some() || !captions => return Ok(Looked::Unchanged(caption)),
        _ => {}
    }
    let image = match decode(&bytes, &DecodeLimits::default()) {
        Ok(image) => image,
        Err(error) => return Ok(Looked::Bad(error.to_string())),
    };
    let vision = model.see(&image)?;
    let caption = if captions {
        model.load(&[GraphName::Decode])?;
        Some(model.caption(&vision, &model.decode_options())?.text)
    } else {
        None
    };
    Ok(Looked::Entry(Box::new(Entry { source, hash, embedding: vision.embedding, caption, time })))
}

fn read(path: &Path) -> std::io::Result<(Vec<u8>, Time)> {
    let limit = DecodeLimits::default().max_bytes;
    let file = File::open(path)?;
    let time = file.metadata()?.modified()?.into();
    let mut bytes = Vec::new();
    // Not by the length that the system tells: a device has none, and no end.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("it has more than the {limit} bytes allowed")));
    }
    Ok((bytes, time))
}

fn stats(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let stats = Gallery::open(path)?.stats()?;
    if json {
        let object = serde_json::json!({
            "schema": SCHEMA,
            "images": stats.images,
            "captions": stats.captions,
            "bundle": stats.bundle,
            "embedding": stats.width,
            "bytes": stats.bytes,
        });
        writeln!(io::stdout(), "{object}")?;
    } else {
        writeln!(
            io::stdout(),
            "pictures   {} ({} with captions)\nembedding  {} values\nbundle     {}\nsize       {} bytes",
            stats.images,
            stats.captions,
            stats.width,
            stats.bundle,
            stats.bytes
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn export(path: &Path) -> anyhow::Result<ExitCode> {
    let output = Output::new(1);
    Gallery::open(path)?.each(|hit, embedding| {
        output
            .json(&ExportLine {
                schema: SCHEMA,
                source: &hit.source,
                caption: hit.caption.as_deref(),
                time: hit.time.to_string(),
                embedding: &embedding,
            })
            .context("cannot write the export")
    })?;
    Ok(output.finish())
}
