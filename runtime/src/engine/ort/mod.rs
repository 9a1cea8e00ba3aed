//! [ONNX Runtime](https://onnxruntime.ai), a shared library that is found and loaded when this engine is first opened.

mod cache;
mod library;
#[cfg(feature = "tract")]
mod operators;

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use ort::ep::{self, ExecutionProvider, ExecutionProviderDispatch};
use ort::logging::LogLevel;
use ort::memory::AllocationDevice;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue, SessionOutputs};
use ort::value::{Outlet, Shape, Tensor as OrtTensor, TensorElementType, TensorRef};

use self::cache::{Cached, Caching, Running};
#[cfg(feature = "tract")]
use self::operators::{Operators, Rewritten};
use super::tensor::Native;
use super::{CachedGraph, Engine, EngineError, EngineKind, EngineOptions, Graph, GraphSource, Provider, Tensor};
use super::{check_names, checked_output, ordered_inputs, shape_error};
use crate::bundle::SharedBytes;
use crate::bundle::manifest::{Dtype, GraphSignature, Sizes, Symbol, TensorSignature, WEIGHTS};

/// The library, once it is loaded; a process has one.
struct Loaded {
    environment: Environment,
    path: PathBuf,
}

static LOADED: OnceLock<Loaded> = OnceLock::new();
/// Held while the library is looked for, so that it is loaded once.
static LOADING: Mutex<()> = Mutex::new(());

/// Inputs that the same tensor is given to in many runs: a picture's keys and values at every step of its captions, its regions
/// with every text that is matched.
const GIVEN_AGAIN: [&str; 3] = ["prefix_keys", "prefix_values", "regions"];

/// What is known of the library that this engine runs on.
#[derive(Debug, Clone)]
pub struct OrtLibrary {
    /// The file that was loaded.
    pub path: PathBuf,
    /// What it says about its build.
    pub build: String,
    /// Providers that it was built with.
    pub providers: Vec<Provider>,
}

/// Loads ONNX Runtime, if it is not loaded yet, and tells about it: the library named, or the one in `ORT_DYLIB_PATH`, or the
/// first in the program's folder, the system's and those of installed Python packages.
///
/// # Errors
/// Where none is found, or the one found cannot be loaded or is too old.
pub fn ort_library(named: Option<&Path>) -> Result<OrtLibrary, EngineError> {
    let loaded = loaded(named)?;
    let has = |provider: &Provider| match provider {
        Provider::Cpu => true,
        Provider::Cuda => ep::CUDA::is_available().unwrap_or(false),
        Provider::Tensorrt => ep::TensorRT::is_available().unwrap_or(false),
        Provider::Xnnpack => ep::XNNPACK::is_available().unwrap_or(false),
    };
    let all = [Provider::Cpu, Provider::Cuda, Provider::Tensorrt, Provider::Xnnpack];
    Ok(OrtLibrary {
        path: loaded.path.clone(),
        build: ort::info().trim_start_matches("ORT Build Info: ").to_owned(),
        providers: all.into_iter().filter(has).collect(),
    })
}

fn loaded(named: Option<&Path>) -> Result<&'static Loaded, EngineError> {
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    // The library of a process cannot be changed; what is named must still be there, and may be the folder it lies in.
    if let Some(loaded) = LOADED.get() {
        return match named.map(|named| find(Some(named))).transpose()? {
            Some(found) if !same_file(&found, &loaded.path) => Err(EngineError::Library {
                reason: format!("{} is loaded already, {} cannot be", loaded.path.display(), found.display()),
            }),
            _ => Ok(loaded),
        };
    }
    let path = find(named)?;
    let refused = |reason: String| EngineError::Library { reason };
    let builder = ort::init_from(&path).map_err(|error| refused(format!("{}: {}", path.display(), unloadable(&error))))?;
    let environment = builder.with_name("unimo").with_telemetry(false).build().map_err(|error| refused(error.to_string()))?;
    environment.set_log_level(LogLevel::Fatal);
    Ok(LOADED.get_or_init(|| Loaded { environment, path }))
}

/// Why a library does not load; of most failures only the system's loader knows.
fn unloadable(error: &ort::LoadDynamicError) -> String {
    let loader = match error {
        ort::LoadDynamicError::Dlopen { error, .. } => error.source(),
        _ => None,
    };
    loader.map_or_else(|| error.to_string(), ToString::to_string)
}

fn same_file(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().ok().is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

fn find(named: Option<&Path>) -> Result<PathBuf, EngineError> {
    let variable = std::env::var_os(library::VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    let named = named.map(|path| ("--ort-lib", path.to_path_buf())).or(variable.map(|path| (library::VARIABLE, path)));
    if let Some((by, path)) = named {
        let because = |reason: String| EngineError::Library { reason: format!("{by} names {}, {reason}", path.display()) };
        // A folder is as good as the library in it; one that may not be entered is not one that is not there.
        let found = match std::fs::metadata(&path) {
            Ok(kind) if kind.is_dir() => library::newest_in(&path),
            Ok(kind) => kind.is_file().then(|| path.clone()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(because(format!("which cannot be opened: {error}"))),
        };
        return found.and_then(|path| path.canonicalize().ok()).ok_or_else(|| because("where there is none".to_owned()));
    }
    let folders = library::folders();
    folders.iter().find_map(|folder| library::newest_in(folder)).ok_or_else(|| EngineError::Library {
        reason: format!(
            "none found in the program's folder, the system's or a Python package's; install one (`pip install onnxruntime`, or \
             the board's package) or name it with --ort-lib or {}",
            library::VARIABLE
        ),
    })
}

/// ONNX Runtime with its options.
pub(super) struct Ort {
    environment: Environment,
    options: EngineOptions,
    /// Memory of its own that the provider computes in.
    device: Option<AllocationDevice<'static>>,
    /// What our kernels share their work in; none for one thread: the caller's.
    #[cfg(feature = "tract")]
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Ort {
    pub(super) fn new(options: &EngineOptions) -> Result<Self, EngineError> {
        let environment = loaded(options.library.as_deref())?.environment.clone();
        let has = ort_library(None)?.providers.contains(&options.provider);
        if !has {
            return Err(EngineError::Provider { engine: EngineKind::Ort, provider: options.provider });
        }
        Ok(Self {
            environment,
            options: options.clone(),
            device: device(options.provider),
            #[cfg(feature = "tract")]
            pool: super::pool(options.threads)?,
        })
    }

    /// What ONNX Runtime is given: the graph with operators of ours, where they run on what the provider computes on and there is
    /// something for them to do, or as the bundle has it.
    fn file(&self, source: &GraphSource<'_>) -> Result<File, EngineError> {
        #[cfg(feature = "tract")]
        if self.options.provider == Provider::Cpu
            && self.options.rewriting
            && let Some(Rewritten { onnx, operators }) = Rewritten::of(source)?
        {
            return Ok(File { onnx, weights: None, operators: Some(operators) });
        }
        Ok(File {
            onnx: source.onnx.to_vec(),
            weights: (source.external)(WEIGHTS),
            #[cfg(feature = "tract")]
            operators: None,
        })
    }
}

impl Engine for Ort {
    fn load(&self, source: &GraphSource<'_>) -> Result<Box<dyn Graph>, EngineError> {
        let file = self.file(source)?;
        let program = |signature: GraphSignature, file: File| Program {
            environment: self.environment.clone(),
            options: self.options.clone(),
            sizes: source.sizes,
            signature,
            file,
        };
        let cached = self.device.as_ref().and_then(|device| {
            let caching = Caching::of(source.signature)?;
            let extended = File { onnx: caching.extend(&file.onnx), ..file.clone() };
            let program = program(caching.extended.clone(), extended);
            // TensorRT may do as it likes with what it reads before it has written.
            let in_place = self.options.provider != Provider::Tensorrt;
            Some(Arc::new(Cached { program, caching, device: device.clone(), in_place, idle: Mutex::default() }))
        });
        let graph = OrtGraph {
            plain: program(source.signature.clone(), file),
            sessions: Mutex::default(),
            device: self.device.clone(),
            cached,
            #[cfg(feature = "tract")]
            pool: self.pool.clone(),
        };
        // A session that is made now tells what is wrong with the graph now. On a device, keys and values are asked for first.
        match &graph.cached {
            Some(cached) => cached.give_back(cached.take()?),
            None => graph.give_back(graph.plain.session()?),
        }
        Ok(Box::new(graph))
    }
}

fn names(outlets: &[Outlet]) -> Vec<&str> {
    outlets.iter().map(Outlet::name).collect()
}

fn element_type(dtype: Dtype) -> TensorElementType {
    match dtype {
        Dtype::F32 => TensorElementType::Float32,
        Dtype::I64 => TensorElementType::Int64,
    }
}

/// What sessions are made of.
struct Program {
    environment: Environment,
    options: EngineOptions,
    signature: GraphSignature,
    sizes: Sizes,
    file: File,
}

/// A graph as ONNX Runtime is given it.
#[derive(Clone)]
struct File {
    onnx: Vec<u8>,
    /// Where its weights lie in the bundle, if not in itself; a session copies of them what it keeps.
    weights: Option<SharedBytes>,
    /// Those of ours that it has.
    #[cfg(feature = "tract")]
    operators: Option<Operators>,
}

impl Program {
    /// A new session, with inputs and outputs as the signature says.
    fn session(&self) -> Result<Session, EngineError> {
        let signature = &self.signature;
        let refused = |error: ort::Error| EngineError::Load { graph: signature.name.clone(), reason: one_line(&error) };
        let session = self.build().map_err(refused)?;
        check_names(signature, &names(session.inputs()), &names(session.outputs()))?;
        for (kind, outlets, expected) in
            [("input", session.inputs(), &signature.inputs), ("output", session.outputs(), &signature.outputs)]
        {
            for (outlet, expected) in outlets.iter().zip(expected) {
                let (element, shape) = (outlet.dtype().tensor_type(), outlet.dtype().tensor_shape());
                let same = shape.is_some_and(|shape| shape.iter().map(|&d| d as usize).eq(expected.shape.iter().copied()));
                if element != Some(element_type(expected.dtype)) || !same {
                    return Err(shape_error(signature, kind, expected, outlet.dtype().to_string()));
                }
            }
        }
        Ok(session)
    }

    fn build(&self) -> ort::Result<Session> {
        let mut builder = Session::builder(&self.environment)?
            .with_log_level(LogLevel::Fatal)?
            .with_intra_threads(self.options.threads.max(1))?
            .with_inter_threads(1)?
            .with_intra_op_spinning(self.options.spinning)?
            // 8-bit weights are expanded, as tract's are. Left to itself, ONNX Runtime would quantize what they are multiplied
            // with as well: half a percent off, and 1.0 to 1.4 times the time (measured with 1.32, one thread, AVX-512).
            .with_quant_qdq(false)?;
        if !self.options.rewriting {
            // Not less: where the scales of 4-bit weights are no constants yet, `MatMulNBits` of 1.32 that multiplies in integers
            // gives something else.
            builder = builder.with_optimization_level(GraphOptimizationLevel::Level1)?;
        }
        for symbol in Symbol::ALL {
            builder = builder.with_dimension_override(symbol.name(), self.sizes.of(symbol) as i64)?;
        }
        if let Some(provider) = provider(&self.options) {
            builder = builder.with_execution_providers([provider.error_on_failure()])?;
        }
        #[cfg(feature = "tract")]
        if let Some(operators) = &self.file.operators {
            builder = builder.with_operators(operators.domain()?)?;
        }
        if let Some(weights) = &self.file.weights {
            // ONNX Runtime takes them in memory that is counted; this copy goes with the builder.
            builder = builder.with_external_initializer_file_in_memory(WEIGHTS, Arc::from(&**weights))?;
        }
        builder.commit_from_memory(&self.file.onnx)
    }

    fn failed(&self, error: &ort::Error) -> EngineError {
        EngineError::Run { graph: self.signature.name.clone(), reason: one_line(error) }
    }
}

struct OrtGraph {
    plain: Program,
    /// Idle sessions: a session runs for one thread at a time, and each thread that finds none makes one more.
    sessions: Mutex<Vec<Session>>,
    /// Memory of its own that the provider computes in.
    device: Option<AllocationDevice<'static>>,
    /// The graph with its past kept there.
    cached: Option<Arc<Cached>>,
    /// What our kernels share their work in.
    #[cfg(feature = "tract")]
    pool: Option<Arc<rayon::ThreadPool>>,
}

/// A tensor's copy in a provider's own memory, to which nothing is written.
#[derive(Debug)]
struct OnDevice(OrtTensor<f32>);

impl OnDevice {
    /// The copy of an input that is given again; made at the first run.
    fn of(device: &AllocationDevice<'static>, name: &str, tensor: &Tensor) -> ort::Result<Option<Arc<Self>>> {
        let copy = |tensor: &Tensor| Ok(Self(floats(tensor)?.to(device.clone(), 0)?));
        GIVEN_AGAIN.contains(&name).then(|| tensor.native(copy)).transpose()
    }
}

impl Native for OnDevice {
    fn write(&mut self, _: &dyn Fn(&mut [f32])) -> bool {
        false
    }
}

impl OrtGraph {
    /// A session that was given back, or a new one.
    fn session(&self) -> Result<Session, EngineError> {
        let idle = self.sessions.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(|| self.plain.session(), Ok)
    }

    fn give_back(&self, session: Session) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).push(session);
    }

    fn run_on(&self, session: &mut Session, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError> {
        let signature = &self.plain.signature;
        let failed = |error: ort::Error| self.plain.failed(&error);
        let tensors = ordered_inputs(signature, inputs)?;
        let names = || signature.inputs.iter().map(|input| input.name.as_str());
        let copy = |(name, tensor)| self.device.as_ref().map_or(Ok(None), |device| OnDevice::of(device, name, tensor));
        let copies = names().zip(tensors.iter().copied()).map(copy).collect::<ort::Result<Vec<_>>>().map_err(failed)?;
        // Views: nothing is copied on the way in, however large the cache; by a provider with memory of its own, what it has not yet.
        let named = names().zip(tensors.iter().zip(&copies)).map(|(name, (tensor, copy))| {
            let copy = copy.as_ref().map(|copy| SessionInputValue::from(&copy.0));
            Ok((name, copy.map_or_else(|| view(tensor), Ok)?))
        });
        let named: Vec<(&str, SessionInputValue)> = named.collect::<ort::Result<_>>().map_err(failed)?;
        let outputs = session.run(named).map_err(failed)?;
        signature.outputs.iter().enumerate().map(|(index, expected)| output(&outputs, signature, index, expected)).collect()
    }
}

/// An output of a run, copied for the host.
fn output(
    outputs: &SessionOutputs<'_>,
    signature: &GraphSignature,
    index: usize,
    expected: &TensorSignature,
) -> Result<Tensor, EngineError> {
    let failed = |error: ort::Error| EngineError::Run { graph: signature.name.clone(), reason: one_line(&error) };
    let value = outputs.get(&expected.name).ok_or_else(|| shape_error(signature, "output", expected, "missing".to_owned()))?;
    let sizes = |shape: &Shape| -> Vec<usize> { shape.iter().map(|&d| d as usize).collect() };
    let (shape, tensor) = match expected.dtype {
        Dtype::F32 => {
            let (shape, data) = value.try_extract_tensor::<f32>().map_err(failed)?;
            (sizes(shape), Tensor::f32(&sizes(shape), data.to_vec()))
        }
        Dtype::I64 => {
            let (shape, data) = value.try_extract_tensor::<i64>().map_err(failed)?;
            (sizes(shape), Tensor::i64(&sizes(shape), data.to_vec()))
        }
    };
    checked_output(signature, index, &shape, tensor)
}

impl Graph for OrtGraph {
    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError> {
        let mut session = self.session()?;
        let run = || {
            let outputs = self.run_on(&mut session, inputs);
            self.give_back(session);
            outputs
        };
        // Nodes are run in the thread that runs the graph, and our kernels share their work among the threads of its pool.
        #[cfg(feature = "tract")]
        if let Some(pool) = &self.pool {
            return pool.install(run);
        }
        run()
    }

    fn cached(&self) -> Result<Option<Box<dyn CachedGraph>>, EngineError> {
        let running = self.cached.as_ref().map(|cached| Running::new(cached.clone()));
        Ok(running.transpose()?.map(|running| Box::new(running) as Box<dyn CachedGraph>))
    }
}

/// A tensor's own copy in the host's memory.
fn floats(tensor: &Tensor) -> ort::Result<OrtTensor<f32>> {
    OrtTensor::from_array((tensor.shape(), tensor.floats().to_vec()))
}

fn view(tensor: &Tensor) -> ort::Result<SessionInputValue<'_>> {
    Ok(match tensor.dtype() {
        Dtype::F32 => TensorRef::from_array_view((tensor.shape(), tensor.floats()))?.into(),
        Dtype::I64 => TensorRef::from_array_view((tensor.shape(), tensor.integers()))?.into(),
    })
}

fn device(provider: Provider) -> Option<AllocationDevice<'static>> {
    matches!(provider, Provider::Cuda | Provider::Tensorrt).then_some(AllocationDevice::CUDA)
}

fn provider(options: &EngineOptions) -> Option<ExecutionProviderDispatch> {
    match options.provider {
        Provider::Cpu => None,
        Provider::Cuda => Some(ep::CUDA::default().build()),
        Provider::Xnnpack => {
            let threads = std::num::NonZeroUsize::new(options.threads.max(1));
            Some(threads.map_or_else(ep::XNNPACK::default, |n| ep::XNNPACK::default().with_intra_op_num_threads(n)).build())
        }
        Provider::Tensorrt => {
            // TensorRT builds an engine for minutes; it names what it keeps by the graph and its own version.
            let tensorrt = ep::TensorRT::default();
            Some(
                match tensorrt_cache() {
                    Some(folder) => {
                        let folder = folder.to_string_lossy().into_owned();
                        tensorrt
                            .with_engine_cache(true)
                            .with_engine_cache_path(&folder)
                            .with_timing_cache(true)
                            .with_timing_cache_path(&folder)
                    }
                    None => tensorrt,
                }
                .build(),
            )
        }
    }
}

/// The folder for what TensorRT builds, which takes minutes at the first time; none where it cannot be made.
#[must_use]
pub fn tensorrt_cache() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?.join("unimo/tensorrt");
    std::fs::create_dir_all(&folder).ok().map(|()| folder)
}

fn one_line(error: &ort::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(all(test, feature = "tract"))]
pub(super) mod tests;
