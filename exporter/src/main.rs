//! `unimo-export`; see `unimo-export --help`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use unimo::bundle::manifest::{DecodingDefaults, Form, Manifest, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::EngineKind;
use unimo_export::calibrate::Range;
use unimo_export::export::{ExportOptions, export};
use unimo_export::forms::{FormOptions, WrittenForm};
use unimo_export::from_bundle::{self, Embeddings};
use unimo_export::gate::Gate;
use unimo_export::parity::Sample;
use unimo_export::quality::{Development, Figures, MaxDrop};
use unimo_export::sample::drawn_samples;
use unimo_export::upgrade::{UpgradeOptions, upgrade};
use unimo_train::model::{ImageEmbedding, TextEmbedding};

const EXAMPLES: &str = "Examples:
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --verify flickr8k/dev-0000.tar
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --precision i8 --measure flickr8k/dev-0000.tar
  unimo-export --checkpoint runs/pico --out pico-bundle --precision f32,f16,i8
  unimo-export --checkpoint runs/edge-s-caption --out edge-s.tar --precision i8 --keep-f16 backbone.,image.feature
  unimo-export backbone --bundle runtime/bundle/default.tar --out mobilenetv2.safetensors
  unimo-export --checkpoint runs/pico --out pico.tar --precision i8 --form dynamic,static --calibrate flickr8k/train-0000.tar
  unimo-export checkpoint --bundle runtime/bundle/default.tar --out default-checkpoint
  unimo-export --checkpoint default-checkpoint --out small.tar --precision i4 --keep-f16 backbone.,image.feature --form dynamic \\
      --calibrate flickr8k/train-0000.tar --calibrate-samples 256
  unimo-export upgrade --bundle old.tar --out new.tar
  unimo-export upgrade --bundle old.tar --out new.tar --form dynamic --measure flickr8k/dev-0000.tar

Every output of every graph is compared with candle on real inputs before the bundle gets its name; where they differ the
export fails with the table and leaves nothing behind. With --measure each precision also captions and finds the pictures given,
through the runtime; one that loses more than --max-drop of f32's CIDEr or of its R@1 in either direction fails the export.
Forms read the same weights. They are compared with the expanded graphs on ONNX Runtime, which must be there; the static one is
held to the rules that TensorRT's documents give for quantized graphs.
Exit codes: 0 done, 2 usage, 3 bad input, parity that does not hold or a precision that loses too much.";

/// Exports a checkpoint to a bundle of ONNX graphs.
#[derive(Debug, Parser)]
#[command(name = "unimo-export", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    export: ExportArgs,
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
    /// Write a bundle's weights as a checkpoint: to train the model further, or to export it in another precision
    Checkpoint {
        /// Bundle: a folder or a .tar
        #[arg(long, value_name = "BUNDLE")]
        bundle: PathBuf,
        /// Which of its precisions [default: the widest]
        #[arg(long, value_name = "NAME")]
        precision: Option<Precision>,
        /// What of a picture is taken into the space of images and texts: token, pooled; where the bundle has the other, that layer is
        /// fresh and must be trained [default: the bundle's]
        #[arg(long, value_name = "KIND")]
        image_embedding: Option<ImageEmbedding>,
        /// What of a text is taken there: token, both; where the bundle has the other, that layer is fresh and must be trained
        /// [default: the bundle's]
        #[arg(long, value_name = "KIND")]
        text_embedding: Option<TextEmbedding>,
        /// Folder to write
        #[arg(long, value_name = "FOLDER")]
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
        #[command(flatten)]
        forms: FormArgs,
        #[command(flatten)]
        measure: MeasureArgs,
        /// Replace a bundle that is already there
        #[arg(long)]
        force: bool,
    },
}

/// Other forms of 8- and 4-bit graphs.
#[derive(Debug, clap::Args)]
struct FormArgs {
    /// Further forms: dynamic (i8 and i4, for processors), static (i8, for TensorRT)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    form: Vec<Form>,
    /// Shards on whose pictures and captions the static form is calibrated, and 4-bit weights are rounded (otherwise each by itself)
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    calibrate: Vec<PathBuf>,
    /// Pictures to calibrate on; 256 are not too many for 4 bits
    #[arg(long, default_value_t = 64, value_name = "N")]
    calibrate_samples: usize,
    /// What becomes the largest level: minmax, percentile (99.99), entropy, mse
    #[arg(long, default_value_t, value_name = "NAME")]
    range: Range,
    /// ONNX Runtime's library, or its folder, on which forms are checked [default: the first found]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
}

impl FormArgs {
    fn options(&self) -> Result<FormOptions> {
        let calibration = match self.calibrate.is_empty() {
            true if self.form.contains(&Form::Static) => bail!("the static form is calibrated on shards: give --calibrate"),
            true => Vec::new(),
            false => read_samples(&self.calibrate, self.calibrate_samples, "--calibrate")?,
        };
        Ok(FormOptions { forms: self.form.clone(), calibration, range: self.range, library: self.ort_lib.clone() })
    }
}

/// What precisions and forms are measured on.
#[derive(Debug, clap::Args)]
struct MeasureArgs {
    /// Shards on whose pictures every precision and form is measured through the runtime; the figures go into the manifest
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    measure: Vec<PathBuf>,
    /// Pictures measured [default: all]
    #[arg(long, value_name = "N", requires = "measure")]
    measure_samples: Option<usize>,
    /// Largest loss of CIDEr or R@1 that a precision or form may bring, as a share or in percent: against f32, or against the
    /// expanded form where a bundle is upgraded
    #[arg(long, default_value = "1%", value_name = "SHARE")]
    max_drop: MaxDrop,
}

impl MeasureArgs {
    fn gate(&self) -> Result<Option<Gate>> {
        if self.measure.is_empty() {
            return Ok(None);
        }
        let development = Arc::new(Development::read(&self.measure, self.measure_samples.unwrap_or(usize::MAX))?);
        Ok(Some(Gate { development, max_drop: self.max_drop }))
    }
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    /// Checkpoint folder, or a run's folder (its newest checkpoint)
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,
    /// Where to write: a name that ends in .tar, or a folder
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Precisions of the stored weights, the default one first: f32, f16, i8, i4
    #[arg(long, value_delimiter = ',', default_value = "f16", value_name = "LIST")]
    precision: Vec<Precision>,
    /// Beginnings of the names of weights that i8 and i4 keep in 16 bits, where a gate refuses it otherwise
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    keep_f16: Vec<String>,
    /// Shards whose pictures and captions are compared on [default: drawn scenes]
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    verify: Vec<PathBuf>,
    /// Pictures compared
    #[arg(long, default_value_t = 8, value_name = "N")]
    verify_samples: usize,
    #[command(flatten)]
    forms: FormArgs,
    #[command(flatten)]
    measure: MeasureArgs,
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
    read_samples(&cli.verify, cli.verify_samples, "--verify")
}

/// Pictures of shards with their first captions.
fn read_samples(shards: &[PathBuf], limit: usize, option: &str) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let report = unimo_train::shards::read_shards(shards, |sample| {
        if let (true, Some(bytes), Some(text)) = (samples.len() < limit, &sample.image, sample.captions.first()) {
            samples.push(Sample { image: unimo::image::decode(bytes, &Default::default())?, text: text.clone() });
        }
        Ok(())
    })?;
    for damage in &report.damaged {
        eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    if samples.is_empty() {
        bail!("the shards given with {option} hold no picture with a caption");
    }
    Ok(samples)
}

/// Runs work that measures, with a progress bar where there is a terminal.
fn with_progress<T>(work: impl FnOnce(&dyn Fn(u64, u64)) -> Result<T>) -> Result<T> {
    let style = ProgressStyle::with_template("measuring: {bar:32} {pos}/{len} pictures, {eta} left")?;
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0).with_style(style) } else { ProgressBar::hidden() };
    let result = work(&|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}

fn print_form(precision: Precision, form: &WrittenForm) {
    println!("{}\n{}", Manifest::quality_name(precision, form.form, EngineKind::Ort), form.parity);
    for (name, figures) in &form.figures {
        println!("{name}");
        print_figures(Some(figures));
    }
}

fn print_figures(figures: Option<&Figures>) {
    for (name, value) in figures.into_iter().flatten() {
        println!("{name:<28} {value}");
    }
}

fn run(cli: &ExportArgs, checkpoint: &Path, out: &Path) -> Result<()> {
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
    options.gate = cli.measure.gate()?;
    options.forms = cli.forms.options()?;
    let samples = samples(cli)?;
    for one in with_progress(|progress| export(checkpoint, out, &options, &samples, progress))? {
        println!("{}\n{}", one.precision, one.parity);
        print_figures(one.figures.as_ref());
        one.forms.iter().for_each(|form| print_form(one.precision, form));
    }
    println!("{}", out.display());
    Ok(())
}

fn dispatch(cli: Cli) -> Result<()> {
    match cli.command {
        Some(Command::Backbone { bundle, out }) => {
            let bytes = unimo_export::backbone_file::extract(&Bundle::open(&BundleSource::Path(bundle))?)?;
            std::fs::write(&out, bytes).with_context(|| format!("cannot write {}", out.display()))
        }
        Some(Command::Checkpoint { bundle, precision, image_embedding, text_embedding, out }) => {
            let embeddings = Embeddings { image: image_embedding, text: text_embedding };
            from_bundle::write(&Bundle::open(&BundleSource::Path(bundle))?, precision, embeddings, &out)?;
            println!("{}", out.display());
            Ok(())
        }
        Some(Command::Upgrade { bundle, out, forms, measure, force }) => {
            let options = UpgradeOptions { force, forms: forms.options()?, gate: measure.gate()? };
            let (report, forms) = with_progress(|progress| upgrade(&bundle, &out, &options, &drawn_samples(3), progress))?;
            println!("{report}");
            forms.iter().for_each(|(precision, form)| print_form(*precision, form));
            println!("{}", out.display());
            Ok(())
        }
        None => {
            let (Some(checkpoint), Some(out)) = (&cli.export.checkpoint, &cli.export.out) else {
                let message = "give --checkpoint and --out, or a subcommand";
                Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, message).exit()
            };
            run(&cli.export, checkpoint, out)
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
