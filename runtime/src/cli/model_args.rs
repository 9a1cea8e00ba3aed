//! Options that every command with a model has.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;

use clap::Args;
use unimo::bundle::BundleSource;
use unimo::bundle::manifest::{Form, Precision};
use unimo::engine::{EngineKind, EngineOptions, Provider};
use unimo::model::Model;
use unimo_devices::board;

use super::loading;

/// Which model to run, and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Bundle to run, a folder or a .tar [default: the one inside this program]
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// Engine: tract, ort, or auto for the first of the board's that is installed (see `unimo devices show`)
    #[arg(long, value_name = "NAME", default_value = "tract", env = "UNIMO_ENGINE", hide_env_values = true)]
    engine: EngineChoice,
    /// What the engine computes on: cpu, cuda, tensorrt, xnnpack [default: cpu, or what goes with `--engine auto`]
    #[arg(long, value_name = "NAME", env = "UNIMO_PROVIDER", hide_env_values = true)]
    provider: Option<Provider>,
    /// Weights to run: f32, f16, i8, i4 [default: the bundle's first]
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

/// An engine, and what it computes on.
type Way = (EngineKind, Provider);

/// What `--engine` says.
#[derive(Debug, Clone, Copy)]
enum EngineChoice {
    /// What the board's file prefers, of what is installed.
    Auto,
    Named(EngineKind),
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "auto" {
            return Ok(Self::Auto);
        }
        name.parse().map(Self::Named).map_err(|error| format!("{error}, auto"))
    }
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
        let (engine, provider) = self.engine()?;
        let options = EngineOptions {
            engine,
            provider,
            precision: self.precision,
            form: self.form,
            threads,
            spinning: self.spin,
            library: self.ort_lib.clone(),
            ..EngineOptions::default()
        };
        let source = self.bundle.clone().map_or(BundleSource::Embedded, BundleSource::Path);
        let mut model = Model::open(&source, &options)?;
        model.observe_loading(loading::observer(&options));
        Ok((model, workers))
    }

    fn engine(&self) -> anyhow::Result<Way> {
        if let EngineChoice::Named(engine) = self.engine {
            return Ok((engine, self.provider.unwrap_or_default()));
        }
        let on_ort = self.providers_of_ort()?;
        let board = board::detect(Path::new("/"), std::env::consts::ARCH)?.board;
        let wanted: Vec<Way> = board.map_or_else(Vec::new, |(board, _)| {
            board.run.engines.iter().filter_map(|way| Some((way.engine.parse().ok()?, way.provider.parse().ok()?))).collect()
        });
        Ok(first_installed(&wanted, self.provider, &on_ort))
    }

    /// What ONNX Runtime computes on here; nothing where it is not installed. A library that was named has to be one.
    #[cfg(feature = "ort")]
    fn providers_of_ort(&self) -> anyhow::Result<Vec<Provider>> {
        match unimo::engine::ort_library(self.ort_lib.as_deref()) {
            Ok(library) => Ok(library.providers),
            Err(error) if self.ort_lib.is_some() => Err(error.into()),
            Err(_) => Ok(Vec::new()),
        }
    }

    #[cfg(not(feature = "ort"))]
    fn providers_of_ort(&self) -> anyhow::Result<Vec<Provider>> {
        Ok(Vec::new())
    }
}

/// The first wanted way to run a model that can be had, and tract on the processor where there is none. A provider that the user
/// named is kept: what cannot be had then is an error of the engine, not another provider.
fn first_installed(wanted: &[Way], provider: Option<Provider>, on_ort: &[Provider]) -> Way {
    let is_installed = |&(engine, on): &Way| match engine {
        EngineKind::Ort => on_ort.contains(&on),
        EngineKind::Tract => cfg!(feature = "tract") && on == Provider::Cpu,
    };
    let is_asked_for = |&(_, on): &Way| provider.is_none_or(|provider| provider == on);
    let found = wanted.iter().copied().find(|way| is_asked_for(way) && is_installed(way));
    found.unwrap_or_else(|| match provider {
        Some(provider) if provider != Provider::Cpu => (EngineKind::Ort, provider),
        _ => (EngineKind::Tract, Provider::Cpu),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boards_first_engine_that_is_installed_is_taken() {
        use EngineKind::{Ort, Tract};
        use Provider::{Cpu, Cuda, Tensorrt, Xnnpack};
        let jetson = [(Ort, Tensorrt), (Ort, Cuda), (Ort, Cpu), (Tract, Cpu)];
        type Case<'a> = (&'a [Way], Option<Provider>, &'a [Provider], Way);
        let cases: [Case; 9] = [
            (&jetson, None, &[Cpu, Cuda, Tensorrt], (Ort, Tensorrt)),
            (&jetson, None, &[Cpu, Cuda], (Ort, Cuda)),
            (&jetson, None, &[Cpu], (Ort, Cpu)),
            (&jetson, None, &[], (Tract, Cpu)),
            (&jetson, Some(Cpu), &[Cpu, Cuda, Tensorrt], (Ort, Cpu)),
            // Asked for and not there: the engine will say so.
            (&jetson, Some(Cuda), &[Cpu], (Ort, Cuda)),
            (&jetson, Some(Xnnpack), &[], (Ort, Xnnpack)),
            // No board is known.
            (&[], None, &[Cpu], (Tract, Cpu)),
            (&[], Some(Cuda), &[Cpu, Cuda], (Ort, Cuda)),
        ];
        for (wanted, provider, on_ort, expected) in cases {
            assert_eq!(first_installed(wanted, provider, on_ort), expected, "{wanted:?} {provider:?} {on_ort:?}");
        }
    }
}
