//! Differentiable operators with hand-written backward passes, fused for the CPU and, in builds with the feature `cuda`, as
//! kernels for CUDA devices.
//!
//! candle 0.11's own `layer_norm` and `softmax_last_dim` cut the gradient without a word, and its differentiable forms cost
//! several times as much as these. Every operator here is checked against finite differences and against a composition of
//! candle's differentiable operators ([`reference`](mod@reference)).

mod attention;
mod computation;
mod contrast;
mod convolution;
mod cross_entropy;
mod cross_modal;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
mod elementwise;
mod gradients;
pub mod kernels;
mod linear;
mod losses;
pub mod network;
mod pooling;
mod precision;
mod readings;
pub mod reference;
mod rows;

pub use attention::{AttentionGroup, AttentionPlan, QueryBlock, attention};
pub use computation::{AtOnce, Computation, Operators};
pub use contrast::{bounded_exp, log_shares, unit_rows};
pub use convolution::{convolution_relu6, depthwise_relu6, pointwise_relu6};
pub use cross_entropy::{Part, Targets, tied_cross_entropy};
pub use cross_modal::{Relations, Scores, cross_modal};
pub use elementwise::{dropout, dropout_add, dropout_add_layer_norm, gelu, layer_norm, relu6};
pub use gradients::gradients;
pub(crate) use gradients::{add_gradient, carrying};
pub use linear::{linear, linear_gelu, scalar_products};
pub use losses::{binary_cross_entropy, soft_cross_entropy, squared_error};
pub use pooling::{first_and_mean, relu, relu_product};
pub use precision::{Precision, precision, set_precision};
pub use readings::Readings;
pub use rows::select_rows;

use std::sync::Arc;

use candle_core::{CpuStorage, Device, Error, Layout, Result, Shape, Storage, Tensor};

/// Gives what the kernels make where the device is theirs.
macro_rules! on_cuda {
    ($device:expr, $made:expr) => {
        #[cfg(any(feature = "cuda", test))]
        if $crate::ops::cuda::works_on($device) {
            return $made;
        }
    };
}
use on_cuda;

/// The gradient by rows of a matrix: which rows, and `[their number, width]`.
pub type ByRows = (Arc<[u32]>, Tensor);

/// Host values on a device, for constants of a step: what goes to a GPU goes in parts that no host waits for, or as [`ahead`] has it.
///
/// # Errors
/// Another number of values than the shape has, and those of candle.
pub fn from_host(values: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return cuda::from_host(&values, &shape.into(), cuda);
    }
    Tensor::from_vec(values, shape.into(), device)
}

/// Uploads to a GPU that go beside what it computes (see [`ahead`]). Tensors that were made by them may be used on it between
/// [`Ahead::join`] and the end of this, which therefore comes before theirs.
#[derive(Default)]
pub struct Ahead {
    #[cfg(feature = "cuda")]
    uploads: Option<cuda::uploads::Ahead>,
}

impl Ahead {
    /// Has what the device computes from now on wait for the uploads. The host does not.
    ///
    /// # Errors
    /// What the driver says.
    pub fn join(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(uploads) = &self.uploads {
            uploads.join()?;
        }
        Ok(())
    }
}

/// Runs `work`; what it puts on a GPU with [`from_host`] goes there beside what is computed.
///
/// # Errors
/// Those of `work`, and what the driver says.
pub fn ahead<T, E: From<Error>>(
    device: &Device,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Ahead), E> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        let (made, uploads) = cuda::uploads::ahead(cuda, work)?;
        return Ok((made, Ahead { uploads: Some(uploads) }));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    Ok((work()?, Ahead::default()))
}

/// Work per rayon task, in values: small enough to balance, large enough to amortise the hand-over.
const TASK_VALUES: usize = 1 << 16;

fn f32_slice<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::RequiresContiguous { op });
    };
    match storage {
        CpuStorage::F32(values) => Ok(&values[start..end]),
        other => Err(Error::Msg(format!("{op}: expected f32, got {:?}", candle_core::backend::BackendStorage::dtype(other)))),
    }
}

/// Runs `f` on the values of f32 CPU tensors.
fn with_values<const N: usize, R>(op: &'static str, tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let tensors = tensors.into_iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let stored: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut values: [&[f32]; N] = [&[]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(&stored) {
        match &**storage {
            Storage::Cpu(cpu) => *values = f32_slice(op, cpu, layout)?,
            _ => return Err(Error::Msg(format!("{op}: expected a CPU tensor"))),
        }
    }
    Ok(f(values))
}

fn rows_per_task(width: usize) -> usize {
    (TASK_VALUES / width.max(1)).max(1)
}
