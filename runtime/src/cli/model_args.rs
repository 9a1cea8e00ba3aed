//! Options that every command with a model has.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;

use clap::Args;
use unimo::bundle::BundleSource;
use unimo::bundle::manifest::{Form, Precision};
use unimo::engine::{EngineKind, EngineOptions, Provider};
use unimo::model::Model;

/// Which model to run, and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Bundle to run, a folder or a .tar [default: the one inside this program]
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// Engine: tract, ort
    #[arg(long, value_name = "NAME", default_value_t, env = "UNIMO_ENGINE", hide_env_values = true)]
    engine: EngineKind,
    /// What the engine computes on: cpu, cuda, tensorrt, xnnpack
    #[arg(long, value_name = "NAME", default_value_t, env = "UNIMO_PROVIDER", hide_env_values = true)]
    provider: Provider,
    /// Weights to run: f32, f16, i8 [default: the bundle's first]
    #[arg(long, value_name = "NAME")]
    precision: Option<Precision>,
    /// Form of the graphs: expanded, dynamic, static [default: what the engine is fastest with here]
    #[arg(long, value_name = "NAME")]
    form: Option<Form>,
    /// Processor threads: several pictures are worked on side by side, one alone is shared among them [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Let ONNX Runtime's idle threads spin: faster on a machine with nothing else to do
    #[arg(long)]
    spin: bool,
    /// ONNX Runtime's library, or its folder [default: the first found; see `unimo doctor`]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the model for one piece of work at a time, which gets all threads.
    pub fn open(&self) -> anyhow::Result<Model> {
        Ok(self.open_for(1)?.0)
    }

    /// Opens the model for so many pieces of work, and says how many of them to do side by side.
    pub fn open_for(&self, jobs: usize) -> anyhow::Result<(Model, usize)> {
        let cores = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = self.threads.map_or_else(cores, NonZeroUsize::get);
        // Pictures side by side keep all cores busy; one alone is faster with its matrix products split.
        let (workers, threads) = if jobs > 1 { (threads.min(jobs), 1) } else { (1, threads) };
        let options = EngineOptions {
            engine: self.engine,
            provider: self.provider,
            precision: self.precision,
            form: self.form,
            threads,
            spinning: self.spin,
            library: self.ort_lib.clone(),
            ..EngineOptions::default()
        };
        let source = self.bundle.clone().map_or(BundleSource::Embedded, BundleSource::Path);
        Ok((Model::open(&source, &options)?, workers))
    }
}
