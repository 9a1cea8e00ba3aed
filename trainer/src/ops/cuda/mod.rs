//! The operators as kernels of our own, for CUDA devices.
//!
//! `operator` makes them candle's; each operator's host side is written once, for any `machine`: a device (`nvidia`), or in tests
//! the CPU, which runs the very same kernels compiled as C++ (`emulation`). Nothing here depends on the timing of threads: sums
//! run in a fixed order, and draws are functions of seed and position, the CPU operators' own.

mod adamw;
mod attention;
mod attention_tables;
pub mod check;
pub mod computations;
mod contrast;
mod convolution;
mod cross_entropy;
mod cross_modal;
#[cfg(feature = "cuda")]
pub mod downloads;
mod elementwise;
#[cfg(test)]
pub mod emulation;
mod gathering;
mod layer_norm;
pub mod layers;
#[cfg(feature = "cuda")]
pub mod libraries;
mod linear;
mod losses;
mod machine;
pub mod network;
#[cfg(feature = "cuda")]
mod nvidia;
mod operator;
mod pooling;
mod recording;
mod rows;
#[cfg(feature = "cuda")]
pub mod uploads;

pub use adamw::{DeviceAdamW, Tuned, Updates};
pub use attention::attention;
pub use contrast::{bounded_exp, log_shares, unit_rows};
pub use convolution::{depthwise_relu6, patches};
pub use cross_entropy::{tied_cross_entropy, tied_cross_entropy_in_chunks};
pub use elementwise::{dropout, dropout_add, gelu, relu, relu6};
pub use layer_norm::{dropout_add_layer_norm, layer_norm};
pub use linear::{linear, linear_gelu, scalar_products};
pub use losses::{binary_cross_entropy, soft_cross_entropy, squared_error};
pub use machine::Element;
#[cfg(feature = "cuda")]
pub use nvidia::{from_host, load_kernels, zero};
pub use pooling::{first_and_mean, relu_product};
pub use rows::{pack_rows, select_rows};

use candle_core::{Device, Result};

use super::Precision;
use machine::{Address, Grid, Kernel, Machine, arguments};

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
fn draws(keep: f32) -> (u32, f32) {
    (super::kernels::keep_limit(keep), 1.0 / keep)
}

/// Sum over the rows of a row-major matrix of `width` columns, in f32.
fn column_sums<M: Machine>(machine: &M, values: Address, element: Element, rows: usize, width: usize) -> Result<M::Values> {
    let (first, blocks) = partial_column_sums(machine, values, element, rows, width)?;
    all_column_sums(machine, first, blocks, width)
}

/// What is left to add up of sums of columns: one row.
fn all_column_sums<M: Machine>(machine: &M, mut sums: M::Values, mut rows: usize, width: usize) -> Result<M::Values> {
    while rows > 1 {
        let (next, left) = partial_column_sums(machine, machine.at(&sums), Element::F32, rows, width)?;
        // What was added up is given back only now that the kernel that reads it was asked for.
        (sums, rows) = (next, left);
    }
    Ok(sums)
}

/// Rows of sums, of some of the rows each, and how many.
fn partial_column_sums<M: Machine>(
    machine: &M,
    values: Address,
    element: Element,
    rows: usize,
    width: usize,
) -> Result<(M::Values, usize)> {
    let (grid, each, spans) = Grid::summing(rows, width);
    let sums = machine.allocate(grid.blocks[1] * width)?;
    let arguments = arguments![values, machine.at(&sums), rows as u32, width as u32, each as u32, spans as u32];
    machine.launch(Kernel::on(element, "rows", ["column_sums", "column_sums_bf16"]), grid, arguments)?;
    Ok((sums, grid.blocks[1]))
}

/// Makes every row of `to` `[rows, width]` that one.
fn fill_rows<M: Machine>(machine: &M, row: Address, to: Address, element: Element, rows: usize, width: usize) -> Result<()> {
    let (grid, each) = Grid::columns(rows, width);
    let arguments = arguments![row, to, rows as u32, width as u32, each as u32];
    machine.launch(Kernel::on(element, "elementwise", ["fill_rows", "fill_rows_bf16"]), grid, arguments)
}

/// Copies f32 values.
fn copy<M: Machine>(machine: &M, from: Address, to: Address, count: usize) -> Result<()> {
    fill_rows(machine, from, to, Element::F32, 1, count)
}

/// f32 values as bf16.
fn rounded<M: Machine>(machine: &M, at: Address, count: usize) -> Result<M::Values> {
    let rounded = machine.allocate(Element::Bf16.words(count))?;
    round_to(machine, at, machine.at(&rounded), count)?;
    Ok(rounded)
}

fn round_to<M: Machine>(machine: &M, from: Address, to: Address, count: usize) -> Result<()> {
    machine.launch(Kernel("elementwise", "to_bf16"), Grid::each(count.div_ceil(8)), arguments![from, to, count])
}

/// bf16 values as f32.
fn widened<M: Machine>(machine: &M, at: Address, count: usize) -> Result<M::Values> {
    let wide = machine.allocate(count)?;
    widen_to(machine, at, machine.at(&wide), count)?;
    Ok(wide)
}

fn widen_to<M: Machine>(machine: &M, from: Address, to: Address, count: usize) -> Result<()> {
    machine.launch(Kernel("elementwise", "to_f32"), Grid::each(count.div_ceil(8)), arguments![from, to, count])
}
