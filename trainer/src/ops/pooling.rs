//! What texts and pairs are read off hidden states by. Each is a kernel each way on CUDA devices, where these arrays are small and every
//! kernel that is asked for counts.

use candle_core::{Result, Tensor};

use super::on_cuda;

/// Of texts that lie one behind the other in `x` `[rows, width]`, each of a first row and `counts` more: the first row beside the mean of
/// the others, `[texts, 2 · width]`.
///
/// # Errors
/// Other numbers of rows, a text of one row, no text, a dtype other than f32.
pub fn first_and_mean(x: &Tensor, counts: &[usize]) -> Result<Tensor> {
    check(counts, x.dims2()?.0)?;
    on_cuda!(x.device(), super::cuda::first_and_mean(x, counts));
    // As many rows of every text; what is filled up counts nothing.
    let longest = counts.iter().copied().max().unwrap_or(0);
    let (mut firsts, mut places, mut shares, mut row) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for &count in counts {
        firsts.push(row as u32);
        places.extend((1..=longest).map(|i| (row + i.min(count)) as u32));
        shares.extend((1..=longest).map(|i| if i <= count { 1.0 / count as f32 } else { 0.0 }));
        row += 1 + count;
    }
    let shares = Tensor::from_vec(shares, (counts.len(), longest, 1), x.device())?;
    let others = super::select_rows(x, &places.into())?.reshape((counts.len(), longest, x.dim(1)?))?;
    Tensor::cat(&[super::select_rows(x, &firsts.into())?, others.broadcast_mul(&shares)?.sum(1)?], 1)
}

/// That there are rows for so many texts.
pub(super) fn check(counts: &[usize], rows: usize) -> Result<()> {
    let all: usize = counts.iter().map(|count| 1 + count).sum();
    if rows != all || counts.is_empty() || counts.contains(&0) {
        candle_core::bail!("first_and_mean: {} texts of {all} rows, {rows} rows given", counts.len());
    }
    Ok(())
}

/// `max(x, 0)`.
///
/// # Errors
/// A dtype other than f32.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::relu(x));
    x.relu()
}

/// `max(a, 0) · max(b, 0)`, of two arrays of one shape.
///
/// # Errors
/// Other shapes, a dtype other than f32.
pub fn relu_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() {
        candle_core::bail!("relu_product: {:?} and {:?}", a.shape(), b.shape());
    }
    on_cuda!(a.device(), super::cuda::relu_product(a, b));
    a.relu()? * b.relu()?
}
