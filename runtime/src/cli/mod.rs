//! The command line, as DESIGN fixes it; each command is a file.

mod bench;
mod bundle;
mod caption;
mod completions;
mod decode_args;
mod devices;
mod doctor;
mod embed;
pub mod exit;
#[cfg(feature = "gallery")]
mod index;
mod loading;
mod match_;
mod model_args;
mod output;
mod pictures;
#[cfg(feature = "gallery")]
mod search;
mod texts;
#[cfg(all(unix, feature = "watch"))]
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use self::model_args::ModelArgs;

const EXAMPLES: &str = "\
Examples:
  unimo caption photo.jpg
  unimo caption --jsonl holidays/ | jq -r .caption
  unimo match photo.jpg 'a dog on the beach' 'a red circle'
  unimo embed --text 'a dog on the beach' --jsonl
  unimo index add --gallery holidays.gallery holidays/
  unimo search 'a dog on the beach' --gallery holidays.gallery
  unimo bundle inspect model.tar
  unimo bench photo.jpg
  unimo caption rpicam://0
  unimo watch rpicam://0 --display fb
  unimo devices detect
";

/// Captions pictures and finds them by words, offline.
#[derive(Debug, Parser)]
#[command(name = "unimo", version, max_term_width = 110, after_help = format!("{EXAMPLES}\n{}", exit::HELP))]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Caption(caption::CaptionArgs),
    Embed(embed::EmbedArgs),
    Match(match_::MatchArgs),
    #[cfg(feature = "gallery")]
    Index(index::IndexArgs),
    #[cfg(feature = "gallery")]
    Search(search::SearchArgs),
    #[cfg(all(unix, feature = "watch"))]
    Watch(watch::WatchArgs),
    #[command(subcommand)]
    Bundle(bundle::BundleCommand),
    Bench(bench::BenchArgs),
    Devices(devices::DevicesArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

impl Cli {
    /// Does what the command line says; results go to standard output.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Caption(args) => caption::run(&args),
            Command::Embed(args) => embed::run(&args),
            Command::Match(args) => match_::run(&args),
            #[cfg(feature = "gallery")]
            Command::Index(args) => index::run(&args),
            #[cfg(feature = "gallery")]
            Command::Search(args) => search::run(&args),
            #[cfg(all(unix, feature = "watch"))]
            Command::Watch(args) => watch::run(&args),
            Command::Bundle(command) => bundle::run(&command),
            Command::Bench(args) => bench::run(&args),
            Command::Devices(args) => devices::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Completions(args) => completions::run(&args),
            Command::Man(args) => completions::run_man(&args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }
}
