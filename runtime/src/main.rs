//! `unimo`: captions pictures and finds them by words, offline.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::exit::code(cli::Cli::parse().run())
}
