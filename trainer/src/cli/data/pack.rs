//! `unimo-train data pack`.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;
use unimo::image::{DecodeLimits, ImagePreparation, decode};
use unimo_train::scenes::PictureFormat;
use unimo_train::shards::ShardWriter;

use super::captions_file;

/// Arguments of `data pack`.
#[derive(Debug, Args)]
#[command(after_help = "\
Captions files, told apart by their ending; `picture` is the path below --pictures:
  .jsonl  {\"picture\": \"dogs/one.jpg\", \"captions\": [\"a dog runs\", \"a brown dog\"]}, one object a line
  .csv    a header line `picture,caption`, then one caption a line; fields may be quoted
  .tsv    a header line `picture<TAB>caption`, then one caption a line; quotes mean nothing

Every picture is decoded once: one that cannot be is left out and listed, and the exit code is then 3.

Examples:
  unimo-train data pack --pictures photos --captions photos.csv --size 224 --out shards/photos
  unimo-train data pack --pictures more-photos --out shards/pictures-alone")]
pub struct PackArgs {
    /// Folder of JPEG, PNG and WebP pictures, searched with its subfolders
    #[arg(long, value_name = "DIR")]
    pictures: PathBuf,
    /// Captions of the pictures; pictures without a caption are then left out. Without it, pictures are packed alone
    #[arg(long, value_name = "FILE")]
    captions: Option<PathBuf>,
    /// Folder for the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Squash every picture to N×N pixels and store it as JPEG; without it, files are stored as they are
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=4096))]
    size: Option<u32>,
    /// Samples of a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    shard_size: usize,
    /// Beginning of the shards' names
    #[arg(long, value_name = "NAME", default_value = "shard")]
    prefix: String,
    /// Print what was packed as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Skipped {
    picture: String,
    reason: String,
}

/// What was packed, and what was not.
#[derive(Debug, Serialize)]
struct PackReport {
    schema: u32,
    pictures: usize,
    captions: usize,
    shards: Vec<PathBuf>,
    /// Pictures left out because nothing is said of them.
    uncaptioned: usize,
    /// Pictures left out because they cannot be used.
    skipped: Vec<Skipped>,
    /// Names in the captions file for which there is no picture.
    unknown: Vec<String>,
}

/// Pictures that are decoded at once, in parallel.
const BATCH: usize = 64;

pub(super) fn run(args: &PackArgs) -> Result<ExitCode> {
    let files = pictures_below(&args.pictures)?;
    if files.is_empty() {
        bail!("{} holds no JPEG, PNG or WebP picture", args.pictures.display());
    }
    let mut captions = match &args.captions {
        Some(file) => Some(captions_file::read(file)?),
        None => None,
    };
    let mut report = PackReport {
        schema: 1,
        pictures: 0,
        captions: 0,
        shards: Vec::new(),
        uncaptioned: 0,
        skipped: Vec::new(),
        unknown: Vec::new(),
    };
    let chosen = choose(files, captions.as_mut(), &mut report);
    if let Some(left) = captions {
        report.unknown = left.into_keys().collect();
        report.unknown.sort_unstable();
    }
    let mut writer = ShardWriter::create(&args.out, &args.prefix, args.shard_size)?;
    for batch in chosen.chunks(BATCH) {
        let loaded: Vec<Result<Picture>> = batch.par_iter().map(|c| load(&args.pictures.join(&c.name), args.size)).collect();
        for (Chosen { name, key, captions }, picture) in batch.iter().zip(loaded) {
            match picture {
                Ok(picture) => {
                    let json = serde_json::to_vec(&serde_json::json!({ "captions": captions }))?;
                    let mut members: Vec<(&str, &[u8])> = vec![(picture.extension, &picture.bytes)];
                    if !captions.is_empty() {
                        members.push(("json", &json));
                    }
                    writer.write(key, &members)?;
                    report.pictures += 1;
                    report.captions += captions.len();
                }
                Err(error) => report.skipped.push(Skipped { picture: name.clone(), reason: format!("{error:#}") }),
            }
        }
    }
    report.shards = writer.finish()?;
    show(&report, args)?;
    let whole = report.skipped.is_empty() && report.unknown.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(super::BAD_INPUT) })
}

fn show(report: &PackReport, args: &PackArgs) -> Result<()> {
    for Skipped { picture, reason } in &report.skipped {
        eprintln!("left out {picture}: {reason}");
    }
    for name in &report.unknown {
        eprintln!("{name} has captions, but is not in {}", args.pictures.display());
    }
    if args.json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    let PackReport { pictures, captions, shards, uncaptioned, skipped, .. } = report;
    println!("{pictures} pictures with {captions} captions in {} shards at {}", shards.len(), args.out.display());
    if *uncaptioned > 0 {
        println!("{uncaptioned} pictures without a caption left out");
    }
    if !skipped.is_empty() {
        println!("{} pictures that cannot be used left out", skipped.len());
    }
    Ok(())
}

/// A picture that is to be packed.
struct Chosen {
    /// Path below the folder, with `/`.
    name: String,
    key: String,
    captions: Vec<String>,
}

/// Gives keys and captions; takes the captions that are used out of the map.
fn choose(files: Vec<String>, mut captions: Option<&mut HashMap<String, Vec<String>>>, report: &mut PackReport) -> Vec<Chosen> {
    let mut keys = HashSet::new();
    let mut chosen = Vec::with_capacity(files.len());
    for name in files {
        let said = match &mut captions {
            Some(map) => map.remove(&name).unwrap_or_default(),
            None => Vec::new(),
        };
        if captions.is_some() && said.is_empty() {
            report.uncaptioned += 1;
            continue;
        }
        // A dot in a key would end it: WebDataset takes all that follows the first dot for the extension.
        let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
        let key = stem.replace('.', "_");
        if keys.insert(key.clone()) {
            chosen.push(Chosen { name, key, captions: said });
        } else {
            report.skipped.push(Skipped { reason: format!("another picture has the key `{key}` too"), picture: name });
        }
    }
    chosen
}

/// Pictures of a folder and its subfolders by their ending, as sorted paths below it.
fn pictures_below(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), String::new())];
    while let Some((path, prefix)) = folders.pop() {
        for entry in std::fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))? {
            let entry = entry.with_context(|| format!("cannot list {}", path.display()))?;
            let Ok(name) = entry.file_name().into_string() else {
                bail!("the name of {} is not UTF-8", entry.path().display());
            };
            let below = format!("{prefix}{name}");
            // Follows links to files, but not to folders, which may lead back here.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push((entry.path(), below + "/"));
            } else if is_picture(&name) && entry.path().is_file() {
                found.push(below);
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn is_picture(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    ["jpg", "jpeg", "png", "webp"].iter().any(|known| known.eq_ignore_ascii_case(extension))
}

struct Picture {
    extension: &'static str,
    bytes: Vec<u8>,
}

/// Reads a picture and makes sure that it decodes; squashes it where a size is asked for.
fn load(path: &Path, size: Option<u32>) -> Result<Picture> {
    let limits = DecodeLimits::default();
    let length = std::fs::metadata(path)?.len();
    if length > limits.max_bytes {
        bail!("the file has {length} bytes, more than the limit of {}", limits.max_bytes);
    }
    let bytes = std::fs::read(path)?;
    let image = decode(&bytes, &limits)?;
    match size {
        None => Ok(Picture { extension: extension_of(&bytes), bytes }),
        Some(side) => {
            let bytes = PictureFormat::Jpg.encode(&squash(&image, side)?)?;
            Ok(Picture { extension: "jpg", bytes })
        }
    }
}

/// The extension by content: a PNG that is called `.jpg` is stored as what it is.
fn extension_of(bytes: &[u8]) -> &'static str {
    match image::guess_format(bytes) {
        Ok(image::ImageFormat::Png) => "png",
        Ok(image::ImageFormat::WebP) => "webp",
        _ => "jpg",
    }
}

/// Squashes by the very filter that the runtime prepares pictures with.
fn squash(image: &RgbImage, side: u32) -> Result<RgbImage> {
    let preparation =
        ImagePreparation { width: side, height: side, mean: [0.0; 3], std: [1.0; 3], ..ImagePreparation::default() };
    let planes = preparation.tensor(image);
    let plane = (side * side) as usize;
    let pixels = (0..3 * plane).map(|i| planes[i % 3 * plane + i / 3] as u8).collect();
    RgbImage::from_raw(side, side, pixels).context("the prepared picture has another size than asked for")
}
