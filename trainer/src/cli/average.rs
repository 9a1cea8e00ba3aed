//! `unimo-train average`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use unimo_train::averaging::average;

const EXAMPLE: &str = "Example:
  # four parts of what captioning made, six of what self-critical training made of it
  unimo-train average runs/caption runs/final --shares 0.4 0.6 --out runs/mean";

/// Average the weights of checkpoints that come from one another: often better than each of them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Checkpoints, or runs whose newest is taken
    #[arg(required = true, num_args = 2.., value_name = "CHECKPOINT")]
    checkpoints: Vec<PathBuf>,
    /// Share of each [default: equal]
    #[arg(long, num_args = 1.., value_name = "SHARE")]
    shares: Vec<f64>,
    /// Folder of the new run
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Runs the subcommand.
///
/// # Errors
/// Checkpoints that do not fit each other, failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let shares = if args.shares.is_empty() { vec![1.0; args.checkpoints.len()] } else { args.shares.clone() };
    if shares.len() != args.checkpoints.len() {
        bail!("{} shares for {} checkpoints", shares.len(), args.checkpoints.len());
    }
    let parts: Vec<(PathBuf, f64)> = args.checkpoints.iter().cloned().zip(shares).collect();
    println!("{}", average(&parts, &args.out)?.display());
    Ok(ExitCode::SUCCESS)
}
