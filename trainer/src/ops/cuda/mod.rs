//! The operators as kernels of our own, for CUDA devices.
//!
//! `operator` makes them candle's; each operator's host side is written once, for any `machine`: a device (`nvidia`), or in tests
//! the CPU, which runs the very same kernels compiled as C++ (`emulation`). Nothing here depends on the timing of threads: sums
//! run in a fixed order, and draws are functions of seed and position, the CPU operators' own.

mod adamw;
mod attention;
mod attention_tables;
pub mod check;
mod convolution;
mod cross_entropy;
mod elementwise;
#[cfg(test)]
pub mod emulation;
mod layer_norm;
#[cfg(feature = "cuda")]
pub mod libraries;
mod linear;
mod machine;
#[cfg(feature = "cuda")]
mod nvidia;
mod operator;
mod rows;

pub use adamw::{DeviceAdamW, Tuned};
pub use attention::attention;
pub use convolution::depthwise_relu6;
pub use cross_entropy::{tied_cross_entropy, tied_cross_entropy_in_chunks};
pub use elementwise::{dropout_add, gelu, relu6};
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_gelu};
pub use rows::select_rows;

use candle_core::Device;

use super::Precision;
use machine::{Address, Machine};

/// Whether the kernels work on this device's tensors.
#[must_use]
pub fn works_on(device: &Device) -> bool {
    #[cfg(test)]
    if emulation::is_on() {
        return true;
    }
    device.is_cuda()
}

/// The arguments of a kernel's `Dropout`: largest draw that keeps a value, and what it is multiplied by then.
fn dropout(keep: f32) -> (u32, f32) {
    (super::kernels::keep_limit(keep), 1.0 / keep)
}

/// Sum over the rows of a row-major matrix of `width` columns.
fn column_sums<M: Machine>(machine: &M, values: Address, rows: usize, width: usize) -> candle_core::Result<M::Values> {
    /// Rows that a thread adds up before their sums are added up in turn.
    const EACH: usize = 128;
    let kernel = machine::Kernel("rows", "column_sums");
    let (mut values, mut rows) = (values, rows);
    let mut sums: Option<M::Values> = None;
    loop {
        let blocks = rows.div_ceil(EACH).max(1);
        let next = machine.allocate(blocks * width)?;
        let grid = machine::Grid { blocks: [width.div_ceil(128), blocks, 1], threads: 128, shared: 0 };
        let arguments = machine::arguments![values, machine.at(&next), rows as u32, width as u32, EACH as u32];
        machine.launch(kernel, grid, arguments)?;
        // What was added up is given back only now that the kernel that reads it was asked for.
        drop(sums.replace(next));
        if blocks == 1 {
            break;
        }
        (values, rows) = (sums.as_ref().map_or(Address::NULL, |sums| machine.at(sums)), blocks);
    }
    sums.ok_or_else(|| candle_core::Error::Msg("no columns to add up".into()))
}
