//! `unimo bundle`.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use unimo::bundle::manifest::{Manifest, Precision};
use unimo::bundle::{self, Bundle, BundleSource};
use unimo::engine::EngineOptions;
use unimo::model::{GraphName, Model};

use super::output::SCHEMA;

/// Look at, check and pack models
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Show what a bundle says about itself
    Inspect(InspectArgs),
    /// Hash every file, and load every graph
    Verify(VerifyArgs),
    /// Write a bundle folder as one .tar file
    Pack(PackArgs),
}

/// Arguments of `bundle inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A folder or a .tar [default: the bundle inside this program]
    bundle: Option<PathBuf>,
    /// Print the manifest as one JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `bundle verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A folder or a .tar [default: the bundle inside this program]
    bundle: Option<PathBuf>,
}

/// Arguments of `bundle pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The bundle, a folder
    bundle: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT.tar")]
    out: PathBuf,
}

pub fn run(command: &BundleCommand) -> anyhow::Result<ExitCode> {
    match command {
        BundleCommand::Inspect(args) => inspect(args)?,
        BundleCommand::Verify(args) => verify(args)?,
        BundleCommand::Pack(args) => {
            let source = BundleSource::Path(args.bundle.clone());
            bundle::pack(&Bundle::open(&source)?, &args.out)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn source(path: Option<&PathBuf>) -> BundleSource {
    path.cloned().map_or(BundleSource::Embedded, BundleSource::Path)
}

fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let bundle = Bundle::open(&source(args.bundle.as_ref()))?;
    let text = if args.json {
        let object = serde_json::json!({ "schema": SCHEMA, "bundle": bundle.id(), "manifest": bundle.manifest() });
        format!("{object}\n")
    } else {
        description(&bundle)?
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn description(bundle: &Bundle) -> anyhow::Result<String> {
    let manifest = bundle.manifest();
    let Manifest { model, image, decoding, .. } = manifest;
    let mut text = String::new();
    let forms = |precision: &Precision| match manifest.forms(*precision).as_slice() {
        [_] => precision.to_string(),
        forms => format!("{precision} ({})", forms.iter().map(|form| form.name()).collect::<Vec<_>>().join(", ")),
    };
    let precisions: Vec<String> = manifest.precisions.iter().map(forms).collect();
    writeln!(text, "bundle      {}", bundle.source())?;
    writeln!(text, "id          {}", bundle.id())?;
    writeln!(
        text,
        "model       {}: {} layers of width {}, {} heads; {} ids; embeddings of width {}",
        model.name, model.layers, model.hidden, model.heads, model.vocabulary, model.embedding
    )?;
    writeln!(text, "pictures    {}x{}, {} image tokens", image.width, image.height, model.image_tokens)?;
    writeln!(text, "texts       up to {} tokens", model.max_text - 2)?;
    writeln!(
        text,
        "captions    beam {}, up to {} tokens, length penalty {}",
        decoding.beam, decoding.max_words, decoding.length_penalty
    )?;
    writeln!(text, "precisions  {}", precisions.join(", "))?;
    for file in manifest.files.keys() {
        writeln!(text, "file        {:>10}  {file}", bundle.length(file).unwrap_or(0))?;
    }
    for (precision, figures) in &manifest.quality {
        for (name, value) in figures {
            writeln!(text, "quality     {precision} {name} {value}")?;
        }
    }
    if !manifest.training.is_empty() {
        write!(text, "\n[training]\n{}", toml::to_string(&manifest.training)?)?;
    }
    Ok(text)
}

fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let source = source(args.bundle.as_ref());
    let bundle = Bundle::open(&source)?;
    let bytes = bundle.verify()?;
    let manifest = bundle.manifest();
    for &precision in &manifest.precisions {
        let options = EngineOptions { precision: Some(precision), ..EngineOptions::default() };
        let load = Model::open(&source, &options).and_then(|model| model.load(&GraphName::ALL));
        load.map_err(|error| anyhow::Error::new(error).context(format!("{source}, {precision}")))?;
    }
    let (files, graphs) = (manifest.files.len() + 1, manifest.graphs.len() * manifest.precisions.len());
    writeln!(
        io::stdout(),
        "{source}: {files} files of {bytes} bytes are as the manifest says, {graphs} graphs load on {}",
        EngineOptions::default().engine
    )?;
    Ok(())
}
