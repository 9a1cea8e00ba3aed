//! Engines: what runs a bundle's graphs.
//!
//! An engine loads ONNX graphs and runs them on host tensors; nothing outside this module knows which one it is. tract is
//! compiled in with the feature `tract`.

#[cfg(feature = "tract")]
mod onnx;
mod tensor;
#[cfg(all(test, feature = "tract"))]
pub(crate) mod toy;
#[cfg(feature = "tract")]
mod tract;

use std::fmt;
use std::str::FromStr;

pub use self::tensor::Tensor;
use crate::bundle::manifest::{Dtype, GraphSignature, Precision, TensorSignature};

/// Which engine runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// sonos/tract, in pure Rust.
    #[default]
    Tract,
    /// ONNX Runtime, a shared library.
    Ort,
}

/// What an engine computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An NVIDIA GPU through TensorRT.
    Tensorrt,
    /// The processor through XNNPACK.
    Xnnpack,
}

macro_rules! named {
    ($type:ident { $($variant:ident = $name:literal),+ $(,)? }) => {
        impl $type {
            /// The name on the command line and in JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(name: &str) -> Result<Self, String> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(format!("{name} is none of {}", [$($name),+].join(", "))),
                }
            }
        }
    };
}

named!(EngineKind { Tract = "tract", Ort = "ort" });
named!(Provider { Cpu = "cpu", Cuda = "cuda", Tensorrt = "tensorrt", Xnnpack = "xnnpack" });

/// How to run a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// The engine.
    pub engine: EngineKind,
    /// What it computes on. Another one than asked for is never taken silently.
    pub provider: Provider,
    /// The weights to run; the bundle's first precision if none is named.
    pub precision: Option<Precision>,
    /// Threads inside one run of a graph.
    pub threads: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { engine: EngineKind::default(), provider: Provider::default(), precision: None, threads: 1 }
    }
}

/// Why an engine could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// This program was built without the engine.
    #[error("this build has no engine {0}; built in: {built}", built = built_in())]
    NotBuilt(EngineKind),
    /// The engine has no such provider.
    #[error("engine {engine} cannot compute on {provider}")]
    Provider {
        /// The engine.
        engine: EngineKind,
        /// What was asked for.
        provider: Provider,
    },
    /// Threads could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// How many.
        threads: usize,
        /// The system's reason.
        reason: String,
    },
    /// The ONNX file is malformed or uses what the engine does not know.
    #[error("graph {graph:?} cannot be loaded: {reason}")]
    Load {
        /// The graph.
        graph: String,
        /// The engine's reason.
        reason: String,
    },
    /// A weight is not where the graph says, or not of the size it says.
    #[error("graph {graph:?}: tensor {tensor:?} {reason}")]
    Weight {
        /// The graph.
        graph: String,
        /// The weight.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// An input or output is not what the manifest says.
    #[error("graph {graph:?}: {tensor} is {found}, expected {expected}")]
    Shape {
        /// The graph.
        graph: String,
        /// Input or output.
        tensor: String,
        /// Its type and shape.
        found: String,
        /// What the signature fixes.
        expected: String,
    },
    /// Running failed.
    #[error("graph {graph:?} failed: {reason}")]
    Run {
        /// The graph.
        graph: String,
        /// The engine's reason.
        reason: String,
    },
    /// A run gave infinities or NaN.
    #[error("graph {graph:?} gave a value that is no number in {tensor:?}")]
    NotFinite {
        /// The graph.
        graph: String,
        /// The output.
        tensor: String,
    },
}

fn built_in() -> &'static str {
    if cfg!(feature = "tract") { "tract" } else { "none" }
}

/// A graph as it lies in a bundle.
pub struct GraphSource<'a> {
    /// What it must read and give.
    pub signature: &'a GraphSignature,
    /// The ONNX file.
    pub onnx: &'a [u8],
    /// Finds external data by the location that the ONNX file names.
    pub external: &'a dyn Fn(&str) -> Option<&'a [u8]>,
}

/// Loads graphs.
pub trait Engine: Send + Sync {
    /// Loads a graph and prepares it to run.
    ///
    /// # Errors
    /// Where the graph is malformed, a weight is out of range, or inputs and outputs differ from the signature.
    fn load(&self, source: &GraphSource<'_>) -> Result<Box<dyn Graph>, EngineError>;
}

/// A loaded graph; many threads may run it at once.
pub trait Graph: Send + Sync {
    /// Runs it once. Inputs are found by name; outputs come in the signature's order.
    ///
    /// # Errors
    /// Where an input is missing or of another shape, or the engine fails.
    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError>;
}

/// Opens the engine that the options name.
///
/// # Errors
/// Where it is not built in or has no such provider.
pub fn open(options: &EngineOptions) -> Result<Box<dyn Engine>, EngineError> {
    match options.engine {
        #[cfg(feature = "tract")]
        EngineKind::Tract if options.provider == Provider::Cpu => Ok(Box::new(tract::Tract::new(options.threads)?)),
        EngineKind::Tract if cfg!(feature = "tract") => {
            Err(EngineError::Provider { engine: options.engine, provider: options.provider })
        }
        engine => Err(EngineError::NotBuilt(engine)),
    }
}

/// Picks the inputs that a signature lists, in its order, and checks their types and shapes.
#[cfg_attr(not(feature = "tract"), allow(dead_code))]
fn ordered_inputs<'a>(signature: &GraphSignature, inputs: &[(&str, &'a Tensor)]) -> Result<Vec<&'a Tensor>, EngineError> {
    let pick = |expected: &TensorSignature| {
        let found = inputs.iter().find(|(name, _)| *name == expected.name).map(|(_, tensor)| *tensor);
        match found {
            Some(tensor) if tensor.dtype() == expected.dtype && tensor.shape() == expected.shape => Ok(tensor),
            found => Err(EngineError::Shape {
                graph: signature.name.clone(),
                tensor: format!("input {:?}", expected.name),
                found: found.map_or_else(|| "missing".to_owned(), |t| typed(t.dtype(), t.shape())),
                expected: typed(expected.dtype, &expected.shape),
            }),
        }
    };
    signature.inputs.iter().map(pick).collect()
}

fn typed(dtype: Dtype, shape: &[usize]) -> String {
    format!("{dtype:?} {shape:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_that_are_not_there() {
        let options = |engine, provider| EngineOptions { engine, provider, ..EngineOptions::default() };
        let error = |options| open(&options).err().map(|error| error.to_string());
        let ort = error(options(EngineKind::Ort, Provider::Cpu)).unwrap();
        assert!(ort.starts_with("this build has no engine ort; built in: "), "{ort}");
        let cuda = error(options(EngineKind::Tract, Provider::Cuda)).unwrap();
        let expected = if cfg!(feature = "tract") {
            "engine tract cannot compute on cuda"
        } else {
            "this build has no engine tract; built in: none"
        };
        assert_eq!(cuda, expected);
    }

    #[test]
    fn names() {
        assert_eq!("tensorrt".parse(), Ok(Provider::Tensorrt));
        assert_eq!("Tract".parse::<EngineKind>(), Err("Tract is none of tract, ort".to_owned()));
        assert_eq!(EngineKind::Ort.to_string(), "ort");
    }
}
