//! `unimo`: captions pictures and finds them by words, offline.

mod cli;

use std::process::ExitCode;

use clap::Parser;

#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::exit::code(cli::Cli::parse().run())
}
