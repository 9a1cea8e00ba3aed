//! `--device` and `--precision`, which every command that computes takes.

use anyhow::Result;
use candle_core::Device;
use clap::{Args, ValueEnum};
use unimo_train::device::DeviceChoice;
use unimo_train::ops::{self, Precision};
use unimo_train::parallel::{Alone, Collective, local_rank};

/// What matrix products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionChoice {
    /// Nothing rounded
    F32,
    /// Factors rounded to 11 bits
    Tf32,
    /// Factors rounded to 8 bits, and on a CUDA device what layers keep and the gradients by it; weights, their gradients and sums stay
    /// f32
    Bf16,
}

/// Where to compute, and how exactly.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda or cuda:N; auto is a CUDA device if this build can use one and there is one, else the CPU.
    /// Several ranks on a host have its devices in turn, unless a number says which
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,
    /// What matrix products are computed in [default: tf32 on a CUDA device, f32 on the CPU]; the CPU knows f32 and, where it has
    /// Intel's AMX, bf16
    #[arg(long, value_name = "PRECISION")]
    precision: Option<PrecisionChoice>,
}

impl DeviceArgs {
    /// The words that give a command these arguments, where they are not the default.
    pub fn words(&self) -> Vec<String> {
        let device = (self.device != DeviceChoice::default()).then(|| ["--device".to_owned(), self.device.to_string()]);
        let precision = self.precision.and_then(|precision| precision.to_possible_value());
        let precision = precision.map(|value| ["--precision".to_owned(), value.get_name().to_owned()]);
        [device, precision].into_iter().flatten().flatten().collect()
    }

    /// Opens the device, and says which it is unless that is the CPU of a build that knows no other.
    ///
    /// # Errors
    /// A device that cannot be had, or a precision that it does not have.
    pub fn open(&self) -> Result<Device> {
        self.open_among(&Alone)
    }

    /// As [`DeviceArgs::open`], for each of several ranks its own.
    ///
    /// # Errors
    /// As there; a rank that is gone.
    pub fn open_among(&self, ranks: &dyn Collective) -> Result<Device> {
        let device = self.device.open(local_rank(ranks)?)?;
        let precision = match (self.precision, device.is_cpu()) {
            (None | Some(PrecisionChoice::F32), true) | (Some(PrecisionChoice::F32), false) => Precision::F32,
            (Some(PrecisionChoice::Tf32), true) => {
                anyhow::bail!("--precision tf32 is for CUDA devices; the CPU computes in f32 or bf16")
            }
            (Some(PrecisionChoice::Bf16), true) if !ops::kernels::amx::available() => {
                anyhow::bail!("--precision bf16 needs a CUDA device or a processor with Intel's AMX; this one computes in f32")
            }
            (None | Some(PrecisionChoice::Tf32), false) => Precision::Tf32,
            (Some(PrecisionChoice::Bf16), _) => Precision::Bf16,
        };
        ops::set_precision(precision);
        if let candle_core::DeviceLocation::Cuda { gpu_id } = device.location() {
            eprintln!("computing on CUDA device {gpu_id}, matrix products in {precision:?}");
        } else if cfg!(feature = "cuda") {
            eprintln!("computing on the CPU");
        }
        Ok(device)
    }
}
