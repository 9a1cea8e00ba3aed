//! Engines: what runs a bundle's graphs.
//!
//! An engine loads ONNX graphs and runs them on host tensors; nothing outside this module knows which one it is. tract is
//! compiled in with the feature `tract`, ONNX Runtime is loaded at run time with the feature `ort`.

#[cfg(feature = "tract")]
mod blocks;
#[cfg(feature = "tract")]
mod cost;
mod form;
#[cfg(feature = "tract")]
mod fusion;
#[cfg(feature = "tract")]
mod network;
#[cfg(feature = "tract")]
mod onnx;
#[cfg(feature = "tract")]
mod operators;
#[cfg(feature = "ort")]
mod ort;
mod tensor;
#[cfg(all(test, feature = "tract"))]
pub(crate) mod toy;
#[cfg(feature = "tract")]
mod tract;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
#[cfg(feature = "tract")]
use std::sync::Arc;

#[cfg(feature = "tract")]
pub use self::cost::{GraphCost, graph_cost};
pub use self::form::preferred_form;
#[cfg(feature = "ort")]
pub use self::ort::{OrtLibrary, ort_library, tensorrt_cache};
pub use self::tensor::Tensor;
use crate::bundle::SharedBytes;
use crate::bundle::manifest::{Dtype, Form, GraphSignature, Precision, Sizes, TensorSignature};

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
    /// The form of the graphs; [`preferred_form`] if none is named.
    pub form: Option<Form>,
    /// Threads inside one run of a graph.
    pub threads: usize,
    /// Whether ONNX Runtime's idle threads spin: faster on a machine with nothing else to do, slower on a busy one.
    pub spinning: bool,
    /// Whether graphs are rewritten before ONNX Runtime runs them, by it and, on the processor, for kernels of ours. Without that
    /// it folds constants and computes what the file says, node by node: slow, and a reference.
    pub rewriting: bool,
    /// ONNX Runtime's library; it is looked for if none is named.
    pub library: Option<PathBuf>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            engine: EngineKind::default(),
            provider: Provider::default(),
            precision: None,
            form: None,
            threads: 1,
            spinning: false,
            rewriting: true,
            library: None,
        }
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
    /// The engine does not run graphs of this form.
    #[error("engine {engine} does not run the {form} form of graphs")]
    Form {
        /// The engine.
        engine: EngineKind,
        /// What was asked for.
        form: Form,
    },
    /// ONNX Runtime is not there, or cannot be used.
    #[error("no usable library of ONNX Runtime: {reason}")]
    Library {
        /// What is wrong.
        reason: String,
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
    match (cfg!(feature = "tract"), cfg!(feature = "ort")) {
        (true, true) => "tract, ort",
        (true, false) => "tract",
        (false, true) => "ort",
        (false, false) => "none",
    }
}

/// A graph as it lies in a bundle.
pub struct GraphSource<'a> {
    /// What it must read and give.
    pub signature: &'a GraphSignature,
    /// What the symbols in the ONNX file stand for.
    pub sizes: Sizes,
    /// The ONNX file.
    pub onnx: &'a [u8],
    /// Finds external data by the location that the ONNX file names.
    pub external: &'a dyn Fn(&str) -> Option<SharedBytes>,
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

    /// The graph with its past kept where the engine computes; `None` where that is the host's memory, which the engine reads in
    /// place.
    ///
    /// # Errors
    /// Where the engine has no memory for it.
    fn cached(&self) -> Result<Option<Box<dyn CachedGraph>>, EngineError> {
        Ok(None)
    }
}

/// A graph that goes on from what it gave before: of its inputs, every `past_x` stays with the engine, which writes the output
/// `new_x` into it. Neither crosses to the host.
pub trait CachedGraph: Send {
    /// Runs it once. Of the inputs those that are not `past_…` are given, of the outputs those that are not `new_…` come back, in
    /// the signature's order. Row i of each `new_x`, along the axis before the last, is written to row `slot + i` of `past_x`,
    /// before or while this run reads `past_x`: these rows must not matter to it.
    ///
    /// # Errors
    /// Where an input is missing or of another shape, the rows do not fit, or the engine fails.
    fn run(&mut self, inputs: &[(&str, &Tensor)], slot: usize) -> Result<Vec<Tensor>, EngineError>;
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
        #[cfg(feature = "ort")]
        EngineKind::Ort => Ok(Box::new(ort::Ort::new(options)?)),
        engine => Err(EngineError::NotBuilt(engine)),
    }
}

/// Threads for kernels of ours; none for one: the caller's.
#[cfg(feature = "tract")]
fn pool(threads: usize) -> Result<Option<Arc<rayon::ThreadPool>>, EngineError> {
    if threads <= 1 {
        return Ok(None);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kernels-{i}")).build();
    let pool = pool.map_err(|error| EngineError::Threads { threads, reason: error.to_string() })?;
    Ok(Some(Arc::new(pool)))
}

/// Picks the inputs that a signature lists, in its order, and checks their types and shapes.
#[cfg_attr(not(any(feature = "tract", feature = "ort")), allow(dead_code))]
fn ordered_inputs<'a>(signature: &GraphSignature, inputs: &[(&str, &'a Tensor)]) -> Result<Vec<&'a Tensor>, EngineError> {
    let pick = |expected: &TensorSignature| {
        let found = inputs.iter().find(|(name, _)| *name == expected.name).map(|(_, tensor)| *tensor);
        match found {
            Some(tensor) if tensor.dtype() == expected.dtype && tensor.shape() == expected.shape => Ok(tensor),
            found => {
                let found = found.map_or_else(|| "missing".to_owned(), |t| typed(t.dtype(), t.shape()));
                Err(shape_error(signature, "input", expected, found))
            }
        }
    };
    signature.inputs.iter().map(pick).collect()
}

/// That an input or output is not what the signature says.
fn shape_error(signature: &GraphSignature, kind: &str, expected: &TensorSignature, found: String) -> EngineError {
    EngineError::Shape {
        graph: signature.name.clone(),
        tensor: format!("{kind} {:?}", expected.name),
        found,
        expected: typed(expected.dtype, &expected.shape),
    }
}

/// Inputs and outputs must be the signature's, in its order.
#[cfg_attr(not(any(feature = "tract", feature = "ort")), allow(dead_code))]
fn check_names(signature: &GraphSignature, inputs: &[&str], outputs: &[&str]) -> Result<(), EngineError> {
    for (kind, found, expected) in [("inputs", inputs, &signature.inputs), ("outputs", outputs, &signature.outputs)] {
        let expected: Vec<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
        if found != expected {
            return Err(EngineError::Load {
                graph: signature.name.clone(),
                reason: format!("its {kind} are {found:?}, expected {expected:?}"),
            });
        }
    }
    Ok(())
}

/// Output `index` of a run, held to its shape and to being all numbers.
#[cfg_attr(not(any(feature = "tract", feature = "ort")), allow(dead_code))]
fn checked_output(
    signature: &GraphSignature,
    index: usize,
    shape: &[usize],
    tensor: Option<Tensor>,
) -> Result<Tensor, EngineError> {
    let expected = &signature.outputs[index];
    let tensor = tensor.filter(|tensor| tensor.shape() == expected.shape);
    let tensor = tensor.ok_or_else(|| shape_error(signature, "output", expected, format!("{shape:?}")))?;
    // Whole stretches at once, which is done in vectors.
    let strays = |values: &[f32]| values.iter().filter(|value| !value.is_finite()).count();
    if tensor.floats().chunks(1 << 10).any(|values| strays(values) > 0) {
        return Err(EngineError::NotFinite { graph: signature.name.clone(), tensor: expected.name.clone() });
    }
    Ok(tensor)
}

fn typed(dtype: Dtype, shape: &[usize]) -> String {
    format!("{dtype:?} {shape:?}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What needs ONNX Runtime; none, said so, where no library lies and none must.
    #[cfg(feature = "ort")]
    pub(crate) fn with_library<T, E: fmt::Display>(made: Result<T, E>) -> Option<T> {
        match made {
            Ok(made) => Some(made),
            Err(error) if std::env::var_os("UNIMO_REQUIRE_ORT").is_some() => panic!("{error}"),
            Err(error) => {
                println!("not tested: {error}");
                None
            }
        }
    }

    /// ONNX Runtime on the processor, whose memory it takes for that of a device.
    #[cfg(all(feature = "ort", feature = "tract"))]
    pub(crate) fn ort_with_device(options: &EngineOptions) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(ort::tests::with_device(options)?))
    }

    #[test]
    fn engines_that_are_not_there() {
        let options = |engine, provider| EngineOptions { engine, provider, ..EngineOptions::default() };
        let error = |options| open(&options).err().map(|error| error.to_string());
        let nowhere = Some(PathBuf::from("/nowhere/libonnxruntime.so"));
        let ort = error(EngineOptions { library: nowhere, ..options(EngineKind::Ort, Provider::Cpu) }).unwrap();
        let expected = if cfg!(feature = "ort") {
            "no usable library of ONNX Runtime: --ort-lib names /nowhere/libonnxruntime.so, where there is none"
        } else {
            "this build has no engine ort; built in: "
        };
        assert!(ort.starts_with(expected), "{ort}");
        // What cannot be looked at is not what is not there: a path through a file stands for a folder that may not be entered.
        let inside = std::env::current_exe().unwrap().join("libonnxruntime.so");
        let ort = error(EngineOptions { library: Some(inside), ..options(EngineKind::Ort, Provider::Cpu) }).unwrap();
        assert!(!cfg!(feature = "ort") || ort.contains("which cannot be opened: "), "{ort}");
        let cuda = error(options(EngineKind::Tract, Provider::Cuda)).unwrap();
        let expected = if cfg!(feature = "tract") {
            "engine tract cannot compute on cuda"
        } else {
            "this build has no engine tract; built in: "
        };
        assert!(cuda.starts_with(expected), "{cuda}");
    }

    #[test]
    fn names() {
        assert_eq!("tensorrt".parse(), Ok(Provider::Tensorrt));
        assert_eq!("Tract".parse::<EngineKind>(), Err("Tract is none of tract, ort".to_owned()));
        assert_eq!(EngineKind::Ort.to_string(), "ort");
    }
}
