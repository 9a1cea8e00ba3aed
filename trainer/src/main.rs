//! `unimo-train`; see `unimo-train --help`.

use std::process::ExitCode;

use clap::Parser;
mod cli;

use cli::Cli;

// A training step frees and takes back hundreds of megabytes: the system's allocator returns them to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(3)
        }
    }
}
