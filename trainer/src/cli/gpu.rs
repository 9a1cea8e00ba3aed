//! `unimo-train gpu check`

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use unimo_train::device::DeviceChoice;

const EXAMPLES: &str = "Example:
  unimo-train gpu check

A line each: what was checked, its error and the largest error that is right. Exit codes: 0 all right, 4 no device, 5 this build or
this machine has no CUDA, 6 something is wrong.";

/// Arguments of `unimo-train gpu`.
#[derive(Debug, Args)]
pub struct GpuArgs {
    #[command(subcommand)]
    command: GpuCommand,
}

#[derive(Debug, Subcommand)]
enum GpuCommand {
    /// Compare every kernel with an f64 computation, and steps of training with the CPU's
    Check(CheckArgs),
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
struct CheckArgs {
    /// Which CUDA device: cuda or cuda:N
    #[arg(long, default_value = "cuda", value_name = "DEVICE")]
    device: DeviceChoice,
    /// Also steps of a model as wide as `base`, with more rows than a device works on at one time; the CPU takes them too, to compare
    #[arg(long)]
    wide: bool,
}

/// Runs `unimo-train gpu …`.
///
/// # Errors
/// A device that cannot be had, a kernel that does not run.
pub fn run(args: &GpuArgs) -> Result<ExitCode> {
    let GpuCommand::Check(CheckArgs { device, wide }) = args.command;
    anyhow::ensure!(device != DeviceChoice::Cpu, "the CPU has no kernels to check; the tests do that by emulation");
    let device = match device {
        DeviceChoice::Auto => DeviceChoice::Cuda(None),
        named => named,
    };
    check(&device.open(0)?, wide)
}

#[cfg(feature = "cuda")]
fn check(device: &candle_core::Device, wide: bool) -> Result<ExitCode> {
    use unimo_train::ops::cuda::check::{Extent, Outcome};
    use unimo_train::ops::{self, Precision, cuda::check};

    let mut outcomes = check::operators(device, |outcome| println!("{outcome}"));
    let mut tell = |what: &str, made: Result<Vec<Outcome>>| {
        let made = made.unwrap_or_else(|error| vec![Outcome::failed(what, &error)]);
        made.iter().for_each(|outcome| println!("{outcome}"));
        outcomes.extend(made);
    };
    for extent in [Extent::small()].into_iter().chain(wide.then(Extent::wide)) {
        let expected = check::first_steps(&extent, &candle_core::Device::Cpu)?;
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            ops::set_precision(precision);
            let steps = check::first_steps(&extent, device).map(|steps| steps.compare(&expected, precision));
            tell(&format!("steps in {precision:?}"), steps);
        }
    }
    for precision in [Precision::F32, Precision::Bf16] {
        ops::set_precision(precision);
        tell(&format!("passes of a backbone in {precision:?}"), check::recorded_passes(device, precision));
    }
    let wrong = outcomes.iter().filter(|outcome| !outcome.holds()).count();
    println!("{} checked, {wrong} wrong", outcomes.len());
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::from(6) })
}

#[cfg(not(feature = "cuda"))]
fn check(_device: &candle_core::Device, _wide: bool) -> Result<ExitCode> {
    Err(unimo_train::device::DeviceError::NotBuilt.into())
}
