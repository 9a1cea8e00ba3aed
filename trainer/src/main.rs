//! `unimo-train`; see `unimo-train --help`.

use std::process::ExitCode;

mod cli;

use cli::Cli;
use unimo_train::device::DeviceError;

// A training step frees and takes back hundreds of megabytes: the system's allocator returns them to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h, which its Rust crate leaves out: milliseconds until freed memory goes back to the
/// kernel, −1 for never.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // Given back after mimalloc's 10 ms, the memory would have to be cleared again in the next step: a sixth of the time.
    // SAFETY: sets one number of the allocator, which it reads when it frees.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    match cli::run(Cli::from_words(std::env::args_os())) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(error.downcast_ref::<DeviceError>().map_or(3, DeviceError::exit_code))
        }
    }
}
