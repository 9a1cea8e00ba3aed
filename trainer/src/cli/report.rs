//! `unimo-train report`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use unimo_train::report;

const EXAMPLE: &str = "Example:
  unimo-train report --run runs/edge-s --out edge-s.html

The file needs nothing beside it: curves of the losses, the learning rate, the gradient, throughput, recall and CIDEr over the steps,
captions of development pictures as they changed, and the recipe. A run that still goes on can be reported, too.";

/// Write a run's curves, scores and sample captions as one HTML file.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Folder of the run
    #[arg(long, value_name = "FOLDER")]
    run: PathBuf,
    /// Where to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the subcommand.
///
/// # Errors
/// A folder without a log, a failed write.
pub fn run(args: &Args) -> Result<ExitCode> {
    report::write(&args.run, &args.out)?;
    println!("{}", args.out.display());
    Ok(ExitCode::SUCCESS)
}
