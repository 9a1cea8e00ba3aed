//! Rows chosen from a matrix.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::on_cuda;

/// Rows `ids` of `table` `[rows, width]`, in that order, `[ids, width]`; a row may be chosen often.
///
/// # Errors
/// A row out of range, or a dtype other than f32.
pub fn select_rows(table: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    on_cuda!(table.device(), super::cuda::select_rows(table, ids));
    table.index_select(&Tensor::new(&**ids, table.device())?, 0)
}
