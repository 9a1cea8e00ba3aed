//! `unimo-train data unpack`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use unimo_train::shards::read_shards;

/// Arguments of `data unpack`.
#[derive(Debug, Args)]
#[command(after_help = "\
Writes <key>.jpg (or .png, .webp) for every picture, captions.txt with one caption a line, and captions.tsv with the same
captions in the same order beside their keys. `eval` finds its references again in what `unimo` makes of these files:

  unimo-train data unpack flickr8k/dev-0000.tar --out dev
  unimo caption --jsonl dev > captions.jsonl
  unimo-train eval captions --references flickr8k/dev-0000.tar --predictions captions.jsonl
  unimo embed --jsonl --image dev > images.jsonl
  unimo embed --jsonl --text-file dev/captions.txt > texts.jsonl
  unimo-train eval retrieval --references flickr8k/dev-0000.tar --images images.jsonl --texts texts.jsonl")]
pub struct UnpackArgs {
    /// Shards, or folders of shards
    #[arg(required = true, value_name = "SHARDS")]
    shards: Vec<PathBuf>,
    /// Folder for the files; it is made where needed, and files in it are replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Unpack the first N samples only
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

pub(super) fn run(args: &UnpackArgs) -> Result<ExitCode> {
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    let mut lines = Lines::create(&args.out.join("captions.txt"))?;
    let mut table = Lines::create(&args.out.join("captions.tsv"))?;
    table.line("picture\tcaption")?;
    let (mut pictures, mut captions, mut samples) = (0usize, 0usize, 0usize);
    let mut refused: Vec<(String, &str)> = Vec::new();
    let mut keys = HashSet::new();
    let report = read_shards(&args.shards, |sample| {
        if args.limit.is_some_and(|limit| samples >= limit) {
            return Ok(());
        }
        samples += 1;
        if !stays_below(Path::new(&sample.key)) {
            refused.push((sample.key, "its key leads out of the folder"));
            return Ok(());
        }
        if !keys.insert(sample.key.clone()) {
            refused.push((sample.key, "another sample has the same key"));
            return Ok(());
        }
        let extension = sample.image.as_deref().map_or("jpg", extension);
        let name = format!("{}.{extension}", sample.key);
        if let Some(bytes) = &sample.image {
            let path = args.out.join(&name);
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            }
            std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            pictures += 1;
        }
        for caption in one_line_captions(&sample.captions) {
            lines.line(&caption)?;
            table.line(&format!("{name}\t{caption}"))?;
            captions += 1;
        }
        Ok(())
    })?;
    lines.finish()?;
    table.finish()?;
    super::warn_damaged(&report.damaged);
    for (key, reason) in &refused {
        eprintln!("skipped `{key}`: {reason}");
    }
    println!("{pictures} pictures and {captions} captions at {}", args.out.display());
    let whole = report.damaged.is_empty() && refused.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(super::BAD_INPUT) })
}

/// Captions as lines of a text file: white space collapsed, blank ones left out. The order is the contract with `eval`.
pub(crate) fn one_line_captions(captions: &[String]) -> impl Iterator<Item = String> {
    captions.iter().map(|c| c.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|c| !c.is_empty())
}

/// A shard from elsewhere must not write beside the folder.
fn stays_below(key: &Path) -> bool {
    key.components().all(|part| matches!(part, Component::Normal(_)))
}

fn extension(bytes: &[u8]) -> &'static str {
    match image::guess_format(bytes) {
        Ok(image::ImageFormat::Png) => "png",
        Ok(image::ImageFormat::WebP) => "webp",
        _ => "jpg",
    }
}

/// A text file that is written line by line; errors name it.
struct Lines {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl Lines {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path: path.to_path_buf(), writer: BufWriter::new(file) })
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.writer, "{text}").with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn finish(mut self) -> Result<()> {
        self.writer.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }
}
