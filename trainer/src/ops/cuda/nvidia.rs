//! The kernels on a CUDA device: on candle's stream, so in order with candle's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as cublas, sys};
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{
    CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, result as driver,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Shape, Storage, Tensor};

use super::Precision;
use super::machine::{Address, Argument, Element, Grid, Kernel, Machine, Product};
use super::operator::Input;
use super::recording::Records;

/// A CUDA device.
#[derive(Clone)]
pub struct Nvidia {
    device: CudaDevice,
    /// How work is recorded, on a machine for such.
    apart: Option<Arc<Apart>>,
}

/// Of a machine whose work is recorded. Other threads use candle's stream meanwhile (sums over ranks; uploads, where the host has no
/// memory for those beside it), and that is none of the recording's business.
struct Apart {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    /// cuBLAS's, whose own would be allocated by the recording.
    workspace: CudaSlice<u8>,
    recording: AtomicBool,
}

/// Bytes of cuBLAS's workspace: what its documents recommend for Hopper, and more than for others ("cublasSetWorkspace").
const WORKSPACE: usize = 32 << 20;

impl Apart {
    /// What kernels are launched on: this one's own stream while it records.
    fn stream(&self, device: &CudaDevice) -> Arc<CudaStream> {
        match self.recording.load(Ordering::Relaxed) {
            true => Arc::clone(&self.stream),
            false => device.cuda_stream(),
        }
    }

    /// Has products asked for where kernels are.
    fn direct(&self, device: &CudaDevice) -> Result<()> {
        let stream = self.stream(device);
        let (workspace, _order) = self.workspace.device_ptr(&stream);
        // SAFETY: handle and stream are alive, and so is the workspace, which is this handle's alone. A change of stream makes cuBLAS
        // forget its workspace.
        unsafe {
            cublas::set_stream(*self.blas.handle(), stream.cu_stream().cast()).map_err(of_blas)?;
            sys::cublasSetWorkspace_v2(*self.blas.handle(), workspace as *mut _, WORKSPACE).result().map_err(of_blas)
        }
    }
}

fn of_blas(error: cublas::CublasError) -> Error {
    Error::Msg(format!("cuBLAS: {error}"))
}

/// A graph, and what it was recorded with. One that is dropped while it runs is freed when it has ended ("cuGraphExecDestroy").
pub struct Recording {
    graph: CudaGraph,
    _apart: Arc<Apart>,
}

// SAFETY: a graph is used by one thread at a time, whoever that is: whoever launches it owns the recording or has locked it.
unsafe impl Send for Recording {}

impl Nvidia {
    pub fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), apart: None }
    }

    pub fn input(&self, operator: &'static str, storage: &CudaStorage, layout: &Layout) -> Result<Input> {
        let Some((start, _)) = layout.contiguous_offsets() else {
            return Err(Error::RequiresContiguous { op: operator });
        };
        if storage.dtype() != candle_core::DType::F32 {
            candle_core::bail!("{operator}: expected f32, got {:?}", storage.dtype());
        }
        let at = self.address(f32::as_cuda_slice(storage)?).after(start);
        Ok(Input { at, shape: layout.shape().clone(), element: Element::F32, wanted: true })
    }

    pub fn storage(&self, values: CudaSlice<f32>) -> CudaStorage {
        f32::wrap_cuda_slice(values, self.device.clone())
    }

    /// A copy of host values, made without waiting for the device.
    fn copied<T: DeviceRepr + 'static>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        // SAFETY: any bits are values of the types that are copied, and all of them are written.
        let mut memory = unsafe { self.device.alloc::<T>(values.len().max(1)) }?;
        self.copy_to(&mut memory, values)?;
        Ok(memory)
    }

    fn copy_to<T: DeviceRepr + 'static>(&self, memory: &mut CudaSlice<T>, values: &[T]) -> Result<()> {
        /// 64 KB: what is copied from the host at one time without it waiting for the device ("Asynchronous Concurrent Execution" of
        /// the CUDA C++ Programming Guide).
        const AT_ONCE: usize = 64 << 10;
        if values.is_empty() || super::uploads::in_order(&self.device, values, memory)? {
            return Ok(());
        }
        let count = AT_ONCE / size_of::<T>();
        for (part, start) in values.chunks(count).zip((0..).step_by(count)) {
            self.device.memcpy_htod(part, &mut memory.slice_mut(start..start + part.len()))?;
        }
        Ok(())
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> Address {
        let stream = self.device.cuda_stream();
        let (pointer, _order) = slice.device_ptr(&stream);
        Address(pointer)
    }
}

/// Host values on a CUDA device (see [`from_host`](crate::ops::from_host)).
pub fn from_host(values: &[f32], shape: &Shape, device: &CudaDevice) -> Result<Tensor> {
    if values.len() != shape.elem_count() {
        candle_core::bail!("{} values for {shape:?}", values.len());
    }
    if let Some(made) = super::uploads::from_host(values, shape) {
        return made;
    }
    let machine = Nvidia::new(device);
    machine.tensor(machine.copied(values)?, shape)
}

/// Has the driver take some of the kernels, to see that it can.
pub fn load_kernels(device: &CudaDevice) -> Result<()> {
    device.get_or_load_custom_func("column_sums", "rows", ptx("rows")?).map(drop)
}

/// A zero.
pub fn zero(device: &CudaDevice) -> Result<CudaStorage> {
    let machine = Nvidia::new(device);
    Ok(machine.storage(machine.zeros(1)?))
}

/// What nvcc made of a file of `kernels/`.
fn ptx(file: &str) -> Result<&'static str> {
    macro_rules! embedded {
        ($($name:literal),*) => {
            match file {
                $($name => include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),)*
                _ => candle_core::bail!("there are no kernels named {file}"),
            }
        };
    }
    Ok(embedded!(
        "adamw",
        "attention",
        "attention_bf16",
        "convolution",
        "cross_entropy",
        "cross_modal",
        "elementwise",
        "layer_norm",
        "losses",
        "rows"
    ))
}

impl Machine for Nvidia {
    type Values = CudaSlice<f32>;
    type Words = CudaSlice<u32>;

    fn place(&self, operator: &'static str, tensor: &Tensor) -> Result<Input> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            candle_core::bail!("{operator}: expected a tensor on the CUDA device");
        };
        Ok(Input { wanted: tensor.track_op(), ..self.input(operator, storage, layout)? })
    }

    fn tensor(&self, values: CudaSlice<f32>, shape: &Shape) -> Result<Tensor> {
        Ok(Tensor::from_storage(Storage::Cuda(self.storage(values)), shape, BackpropOp::none(), false))
    }

    fn allocate(&self, count: usize) -> Result<CudaSlice<f32>> {
        // SAFETY: any bits are f32 values, and every operator writes what it allocates before it reads it.
        unsafe { self.device.alloc::<f32>(count.max(1)) }
    }

    fn zeros(&self, count: usize) -> Result<CudaSlice<f32>> {
        self.device.alloc_zeros::<f32>(count.max(1))
    }

    fn upload(&self, words: &[u32]) -> Result<CudaSlice<u32>> {
        self.copied(words)
    }

    fn overwrite(&self, words: &mut CudaSlice<u32>, with: &[u32]) -> Result<()> {
        if words.len() != with.len().max(1) {
            candle_core::bail!("{} words where {} lie", with.len(), words.len());
        }
        self.copy_to(words, with)
    }

    fn at(&self, values: &CudaSlice<f32>) -> Address {
        self.address(values)
    }

    fn words_at(&self, words: &CudaSlice<u32>) -> Address {
        self.address(words)
    }

    fn launch(&self, Kernel(file, name): Kernel, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let function = self.device.get_or_load_custom_func(name, file, ptx(file)?)?;
        let stream = self.apart.as_ref().map_or_else(|| self.device.cuda_stream(), |apart| apart.stream(&self.device));
        let mut call = stream.launch_builder(&function);
        for argument in arguments {
            match argument {
                Argument::Address(Address(pointer)) => call.arg(pointer),
                Argument::Size(size) => call.arg(size),
                Argument::Word(word) => call.arg(word),
                Argument::Float(value) => call.arg(value),
            };
        }
        let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
        let shape = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (grid.threads as u32, 1, 1),
            shared_mem_bytes: 4 * grid.shared as u32,
        };
        // SAFETY: number and widths of the arguments are those of the kernel (tests run the same calls on the emulation, which
        // checks them), and the caller answers for the addresses.
        unsafe { call.launch(shape) }.w()?;
        Ok(())
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        let call = product.column_major();
        let [transpose_first, transpose_second] = call.transposed.map(|transposed| match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        });
        let [rows, columns, inner] = call.sizes.map(|size| size as i32);
        let [first, second, result] = call.strides.map(|stride| stride as i32);
        let (of_factors, compute) = match product.precision {
            Precision::Bf16 => (sys::cudaDataType::CUDA_R_16BF, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            Precision::F32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            Precision::Tf32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32),
        };
        let of_result = match product.of_result {
            Element::F32 => sys::cudaDataType::CUDA_R_32F,
            Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let (alpha, beta) = (1f32, if product.accumulate { 1f32 } else { 0f32 });
        let blas = self.device.cublas_handle();
        let handle = self.apart.as_ref().map_or_else(|| *blas.handle(), |apart| *apart.blas.handle());
        // SAFETY: sizes and strides describe matrices inside the caller's memory; the scalars live until the call returns, and
        // cuBLAS reads them on the host before that.
        unsafe {
            cublas::gemm_ex(
                handle,
                transpose_first,
                transpose_second,
                rows,
                columns,
                inner,
                (&raw const alpha).cast(),
                product.b.address.0 as *const _,
                of_factors,
                first,
                product.a.address.0 as *const _,
                of_factors,
                second,
                (&raw const beta).cast(),
                product.c.0 as *mut _,
                of_result,
                result,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|error| Error::Msg(format!("matrix product of {:?}: {error}", call.sizes)))
    }
}

impl Records for Nvidia {
    type Recording = Recording;

    fn apart(&self) -> Result<Self> {
        let stream = self.device.cuda_stream();
        let own = stream.context().new_stream().w()?;
        let blas = CudaBlas::new(Arc::clone(&stream)).map_err(of_blas)?;
        // SAFETY: cuBLAS reads nothing there that it has not written.
        let workspace = unsafe { self.device.alloc::<u8>(WORKSPACE) }?;
        let apart = Apart { stream: own, blas, workspace, recording: AtomicBool::new(false) };
        apart.direct(&self.device)?;
        Ok(Self { device: self.device.clone(), apart: Some(Arc::new(apart)) })
    }

    fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Recording)> {
        let Some(apart) = &self.apart else { candle_core::bail!("this machine's work is not recorded") };
        let captured = || {
            apart.direct(&self.device)?;
            // Other threads go on as they like, and this one allocates on candle's stream.
            apart.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).w()?;
            let made = work();
            // Ended whatever has happened, and of what has happened the first mistake is told.
            let graph = apart.stream.end_capture(CUgraphInstantiate_flags(0));
            let made = made?;
            let Some(graph) = graph.w()? else { candle_core::bail!("the driver gave no graph") };
            Ok((made, Recording { graph, _apart: Arc::clone(apart) }))
        };
        apart.recording.store(true, Ordering::Relaxed);
        let recorded = captured();
        apart.recording.store(false, Ordering::Relaxed);
        apart.direct(&self.device)?;
        recorded
    }

    fn replay(&self, recording: &Recording) -> Result<()> {
        let stream = self.device.cuda_stream();
        let launch = || -> std::result::Result<(), DriverError> {
            stream.context().bind_to_thread()?;
            // SAFETY: graph and stream are alive; what the graph works on belongs to whoever has recorded it.
            unsafe { driver::graph::launch(recording.graph.cu_graph_exec(), stream.cu_stream()) }
        };
        launch().w()
    }
}
