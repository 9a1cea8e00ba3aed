//! `unimo-export`; see `unimo-export --help`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use unimo::bundle::manifest::{DecodingDefaults, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo_export::export::{ExportOptions, Gate, export};
use unimo_export::parity::Sample;
use unimo_export::quality::{Development, MaxDrop};
use unimo_export::sample::drawn_samples;

const EXAMPLES: &str = "Examples:
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --verify flickr8k/dev-0000.tar
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --precision i8 --measure flickr8k/dev-0000.tar
  unimo-export --checkpoint runs/pico --out pico-bundle --precision f32,f16,i8
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --precision i8 --keep-f16 backbone.,image.feature
  unimo-export backbone --bundle runtime/bundle/default.tar --out mobilenetv2.safetensors
  unimo-export upgrade --bundle old.tar --out new.tar

Every output of every graph is compared with candle on real inputs before the bundle gets its name; where they differ the
export fails with the table and leaves nothing behind. With --measure each precision also captions and finds the pictures given,
through the runtime; one that loses more than --max-drop of f32's CIDEr or of its R@1 in either direction fails the export.
Exit codes: 0 done, 2 usage, 3 bad input, parity that does not hold or a precision that loses too much.";

/// Exports a checkpoint to a bundle of ONNX graphs.
#[derive(Debug, Parser)]
#[command(name = "unimo-export", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    export: Option<ExportArgs>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take the convolutional backbone out of a bundle, to train other models on
    Backbone {
        /// Bundle: a folder or a .tar
        #[arg(long, value_name = "BUNDLE")]
        bundle: PathBuf,
        /// Safetensors file to write; it has no classifier, so that recipes on it set `region_classes` to 0
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Write a bundle of an earlier version anew: this version's graphs over the same weights
    Upgrade {
        /// Bundle: a folder or a .tar
        #[arg(long, value_name = "BUNDLE")]
        bundle: PathBuf,
        /// Where to write: a name that ends in .tar, or a folder
        #[arg(long, value_name = "PATH")]
        out: PathBuf,
        /// Replace a bundle that is already there
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    /// Checkpoint folder, or a run's folder (its newest checkpoint)
    #[arg(long, value_name = "FOLDER")]
    checkpoint: PathBuf,
    /// Where to write: a name that ends in .tar, or a folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Precisions of the stored weights, the default one first
    #[arg(long, value_delimiter = ',', default_value = "f16", value_name = "LIST")]
    precision: Vec<Precision>,
    /// Beginnings of the names of weights that i8 keeps in 16 bits, where a gate refuses it otherwise
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    keep_f16: Vec<String>,
    /// Shards whose pictures and captions are compared on [default: drawn scenes]
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    verify: Vec<PathBuf>,
    /// Pictures compared
    #[arg(long, default_value_t = 8, value_name = "N")]
    verify_samples: usize,
    /// Shards on whose pictures every precision is measured, against f32, through the runtime; the figures go into the manifest
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    measure: Vec<PathBuf>,
    /// Pictures measured [default: all]
    #[arg(long, value_name = "N", requires = "measure")]
    measure_samples: Option<usize>,
    /// Largest loss of CIDEr or R@1 against f32 that a precision may bring, as a share or in percent
    #[arg(long, default_value = "1%", value_name = "SHARE")]
    max_drop: MaxDrop,
    /// Hypotheses kept while decoding, by default
    #[arg(long, default_value_t = 3)]
    beam: usize,
    /// Power of the length by which hypotheses are ranked
    #[arg(long, default_value_t = 0.7)]
    length_penalty: f32,
    /// No run of so many tokens twice in a caption; 0 allows repetition
    #[arg(long, default_value_t = 3)]
    no_repeat: usize,
    /// TOML of measured figures to put into the manifest, a table per precision
    #[arg(long, value_name = "FILE")]
    quality: Option<PathBuf>,
    /// Replace a bundle that is already there
    #[arg(long)]
    force: bool,
}

fn samples(cli: &ExportArgs) -> Result<Vec<Sample>> {
    if cli.verify.is_empty() {
        return Ok(drawn_samples(cli.verify_samples as u64));
    }
    let mut samples = Vec::new();
    let report = unimo_train::shards::read_shards(&cli.verify, |sample| {
        if let (true, Some(bytes), Some(text)) = (samples.len() < cli.verify_samples, &sample.image, sample.captions.first()) {
            samples.push(Sample { image: unimo::image::decode(bytes, &Default::default())?, text: text.clone() });
        }
        Ok(())
    })?;
    for damage in &report.damaged {
        eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    if samples.is_empty() {
        bail!("the shards given with --verify hold no picture with a caption");
    }
    Ok(samples)
}

fn run(cli: &ExportArgs) -> Result<()> {
    let mut options = ExportOptions {
        precisions: cli.precision.clone(),
        keep_f16: cli.keep_f16.clone(),
        force: cli.force,
        ..Default::default()
    };
    options.decoding =
        DecodingDefaults { beam: cli.beam, length_penalty: cli.length_penalty, no_repeat: cli.no_repeat, ..options.decoding };
    if let Some(path) = &cli.quality {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        options.quality = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    }
    if !cli.measure.is_empty() {
        let development = Arc::new(Development::read(&cli.measure, cli.measure_samples.unwrap_or(usize::MAX))?);
        options.gate = Some(Gate { development, max_drop: cli.max_drop });
    }
    let style = ProgressStyle::with_template("measuring: {bar:32} {pos}/{len} pictures, {eta} left")?;
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0).with_style(style) } else { ProgressBar::hidden() };
    let progress = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let written = export(&cli.checkpoint, &cli.out, &options, &samples(cli)?, &progress);
    bar.finish_and_clear();
    for one in written? {
        println!("{}\n{}", one.precision, one.parity);
        for (name, value) in one.figures.iter().flatten() {
            println!("{name:<28} {value}");
        }
    }
    println!("{}", cli.out.display());
    Ok(())
}

fn dispatch(cli: Cli) -> Result<()> {
    match (cli.command, cli.export) {
        (Some(Command::Backbone { bundle, out }), _) => {
            let bytes = unimo_export::backbone_file::extract(&Bundle::open(&BundleSource::Path(bundle))?)?;
            std::fs::write(&out, bytes).with_context(|| format!("cannot write {}", out.display()))
        }
        (Some(Command::Upgrade { bundle, out, force }), _) => {
            let report = unimo_export::upgrade::upgrade(&bundle, &out, force, &drawn_samples(3))?;
            println!("{report}\n{}", out.display());
            Ok(())
        }
        (None, Some(args)) => run(&args),
        (None, None) => {
            let message = "give --checkpoint and --out, or a subcommand";
            Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, message).exit()
        }
    }
}

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(3)
        }
    }
}
