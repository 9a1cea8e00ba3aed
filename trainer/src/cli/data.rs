//! `unimo-train data`: makes, packs, inspects and unpacks shards.

mod captions_file;
mod pack;
mod scenes;
mod stats;
pub(super) mod unpack;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Arguments of `unimo-train data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Draw scenes of coloured shapes with captions, scene graphs and questions: a corpus with exact ground truth
    Scenes(scenes::ScenesArgs),
    /// Pack a folder of pictures, with or without captions, into shards
    Pack(pack::PackArgs),
    /// Count what shards hold and list damaged records
    Stats(stats::StatsArgs),
    /// Write the pictures and captions of shards as plain files
    Unpack(unpack::UnpackArgs),
}

/// Runs `unimo-train data …`.
///
/// # Errors
/// Input that cannot be read or output that cannot be written. Damaged records are not an error; see the exit codes of each.
pub fn run(args: DataArgs) -> Result<ExitCode> {
    match args.command {
        DataCommand::Scenes(args) => scenes::run(&args),
        DataCommand::Pack(args) => pack::run(&args),
        DataCommand::Stats(args) => stats::run(&args),
        DataCommand::Unpack(args) => unpack::run(&args),
    }
}

/// Exit code for input that was read, but not whole.
const BAD_INPUT: u8 = 3;

/// Tells on stderr which records were skipped.
pub(crate) fn warn_damaged(damaged: &[unimo_train::shards::Damage]) {
    for damage in damaged {
        eprintln!("skipped `{}` of {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
}
