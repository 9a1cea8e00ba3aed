//! What contrasts are made of: rows of unit length, logarithms of shares of softmax, and the temperature. Each is a kernel or two
//! each way on CUDA devices, where these arrays are small and every kernel that is asked for counts.

use std::collections::HashSet;

use candle_core::{D, Result, Tensor};

use super::on_cuda;

/// Added to the square of a row's length, so that a row of zeros has a gradient.
pub(super) const LEAST_SQUARE: f64 = 1e-12;

/// Rows divided by their lengths, `[n, width]`.
///
/// # Errors
/// A dtype other than f32.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::unit_rows(x));
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + LEAST_SQUARE)?.sqrt()?)
}

/// `factor · Σ ln(share + least)`, a scalar, over the rows of `scores` `[rows, columns]`: the share is what the softmax of a row over the
/// `temperature`, a scalar, gives to the columns whose number is the row's. Rows that no column has the number of are left out. With
/// `least` 0, logarithms of shares are found without the shares, which may be too small for f32.
///
/// # Errors
/// Other numbers of rows or columns, a dtype other than f32.
pub fn log_shares(scores: &Tensor, temperature: &Tensor, numbers: [&[u32]; 2], [least, factor]: [f64; 2]) -> Result<Tensor> {
    let (rows, columns) = scores.dims2()?;
    check([rows, columns], numbers)?;
    on_cuda!(scores.device(), super::cuda::log_shares(scores, temperature, numbers, [least, factor]));
    let known: HashSet<u32> = numbers[1].iter().copied().collect();
    let there: Vec<u32> = (0u32..).zip(numbers[0]).filter(|(_, number)| known.contains(number)).map(|(row, _)| row).collect();
    if there.is_empty() {
        return scores.sum_all()?.affine(0.0, 0.0);
    }
    let mask = |&row: &u32| {
        let number = numbers[0][row as usize];
        numbers[1].iter().map(move |&column| if column == number { 0.0 } else { f32::NEG_INFINITY })
    };
    let mask = Tensor::from_iter(there.iter().flat_map(mask), scores.device())?.reshape((there.len(), columns))?;
    let scores = super::select_rows(scores, &there.into())?.broadcast_div(temperature)?;
    let own = (&scores + mask)?.log_sum_exp(D::Minus1)?;
    let logarithms = (own - scores.log_sum_exp(D::Minus1)?)?;
    let logarithms = if least > 0.0 { (logarithms.exp()? + least)?.log()? } else { logarithms };
    logarithms.sum_all()?.affine(factor, 0.0)
}

/// That rows and columns have numbers.
pub(super) fn check(sizes: [usize; 2], numbers: [&[u32]; 2]) -> Result<()> {
    if sizes != numbers.map(<[u32]>::len) || sizes[0] == 0 {
        candle_core::bail!("log_shares: numbers of {:?} for {sizes:?}", numbers.map(<[u32]>::len));
    }
    Ok(())
}

/// `exp(x)`, but no less than `least` and no more than `most`, where the gradient is 0.
///
/// # Errors
/// A dtype other than f32.
pub fn bounded_exp(x: &Tensor, [least, most]: [f32; 2]) -> Result<Tensor> {
    on_cuda!(x.device(), super::cuda::bounded_exp(x, [least, most]));
    x.exp()?.clamp(least, most)
}
