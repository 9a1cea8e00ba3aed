//! Embeddings in 8 bits, with bounds on what that loses.
//!
//! A stored embedding x becomes codes c in −127..=127 and one scale s; a query y becomes codes p of 16 bits and one scale t. Then
//!
//! ```text
//! |x·y − s·t·(c·p)|  ≤  ‖x − s·c‖·‖y‖ + s·‖c‖·‖y − t·p‖        (Cauchy–Schwarz, twice)
//! ```
//!
//! where the first norm is known when the row is quantized and the second when the query is. So every row's product is known to
//! within a small interval from its codes alone, and a search that looks again, at full precision, at the rows whose interval
//! reaches the best ones finds exactly what a search at full precision finds.

use multiversion::multiversion;

/// Rows are padded with zeros to a multiple of so many codes: whole vector registers.
const ALIGNMENT: usize = 64;
/// Largest width for which a product of codes always fits into 32 bits with queries of a useful precision.
pub const MAX_WIDTH: usize = 1 << 15;
/// Largest code of a row.
const ROW_MAX: f32 = 127.0;
/// 2⁻²⁰: more than the handful of f32 roundings by which a bound is computed, relative to its largest term.
const SLACK: f32 = 9.536_743e-7;

/// Codes of a row of so many values.
#[must_use]
pub fn stride(width: usize) -> usize {
    width.next_multiple_of(ALIGNMENT)
}

/// What turns a row's codes back into values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowScale {
    /// Step of a code.
    pub scale: f32,
    /// Upper bound of ‖x − scale·codes‖, and of what f32 arithmetic adds to that in a dot product with a unit vector.
    pub error: f32,
}

/// Quantizes an embedding symmetrically to its largest magnitude, and appends [`stride`] codes (i8 as bytes).
///
/// Nothing where a value is not finite.
pub fn quantize(values: &[f32], codes: &mut Vec<u8>) -> Option<RowScale> {
    if !values.iter().all(|v| v.is_finite()) {
        return None;
    }
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let scale = largest / ROW_MAX;
    let steps = if scale > 0.0 { 1.0 / f64::from(scale) } else { 0.0 };
    let (mut lost, mut squares) = (0f64, 0f64);
    codes.reserve(stride(values.len()));
    for &value in values {
        let value = f64::from(value);
        let code = (value * steps).round().clamp(f64::from(-ROW_MAX), f64::from(ROW_MAX));
        codes.push((code as i8).cast_unsigned());
        let error = value - f64::from(scale) * code;
        lost += error * error;
        squares += value * value;
    }
    codes.resize(codes.len() + stride(values.len()) - values.len(), 0);
    // A dot product of n terms, summed in any order, is off by at most n·2⁻²⁴·‖x‖·‖y‖ and a little.
    let arithmetic = (values.len() + 16) as f64 * f64::from(f32::EPSILON) / 2.0;
    let error = (lost.sqrt() + arithmetic * squares.sqrt()) * (1.0 + 1e-6);
    Some(RowScale { scale, error: (error as f32).next_up() })
}

/// A query, ready to be compared with rows of codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    codes: Vec<i16>,
    scale: f32,
    /// What the query's own rounding, and f32 arithmetic, can add to a product, for each unit of a row's scale.
    per_scale: f32,
    length: f32,
}

/// Upper bounds of a block's products, and the products of codes they come from.
#[derive(Debug, Default)]
pub struct Block {
    dots: Vec<i32>,
    /// `upper[i]` is at least the product of row i with the query.
    pub upper: Vec<f32>,
}

impl Query {
    /// Quantizes a query to 16 bits, or as many as leave a product of codes within 32.
    ///
    /// Nothing where a value is not finite, all are 0, or there are more than [`MAX_WIDTH`].
    #[must_use]
    pub fn new(values: &[f32]) -> Option<Self> {
        let wide = |v: &f32| f64::from(*v);
        let largest = values.iter().map(wide).fold(0.0, |largest: f64, v| largest.max(v.abs()));
        let sum: f64 = values.iter().map(|v| wide(v).abs()).sum();
        if values.len() > MAX_WIDTH || !sum.is_finite() || (largest as f32) < f32::MIN_POSITIVE {
            return None;
        }
        // Rounding adds at most one half to each magnitude.
        let room = f64::from(i32::MAX) / f64::from(ROW_MAX) - values.len() as f64;
        let most = (room * largest / sum).floor().min(f64::from(i16::MAX));
        let scale = (largest / most) as f32;
        let mut codes: Vec<i16> = values.iter().map(|v| (wide(v) / largest * most).round() as i16).collect();
        let lost: f64 = values.iter().zip(&codes).map(|(v, &p)| (wide(v) - f64::from(scale) * f64::from(p)).powi(2)).sum();
        let length = values.iter().map(|v| wide(v).powi(2)).sum::<f64>().sqrt();
        // ‖codes‖ of a row is at most 127·√width.
        let longest = f64::from(ROW_MAX) * (values.len() as f64).sqrt();
        let per_scale = longest * (lost.sqrt() + f64::from(SLACK) * length);
        codes.resize(stride(values.len()), 0);
        Some(Self {
            codes,
            scale,
            per_scale: (per_scale as f32).next_up(),
            length: ((length * (1.0 + f64::from(SLACK))) as f32).next_up(),
        })
    }

    /// Bounds the products of a block of rows: their codes, `[rows, stride]`, their scales and errors. Gives whether any bound is
    /// at least `threshold`, or is no number.
    pub fn bound(&self, codes: &[u8], scales: &[[u8; 4]], errors: &[[u8; 4]], threshold: f32, block: &mut Block) -> bool {
        block.dots.resize(scales.len(), 0);
        block.upper.resize(scales.len(), 0.0);
        dots(&self.codes, codes, &mut block.dots);
        upper_bounds([self.scale, self.per_scale, self.length], &block.dots, scales, errors, threshold, &mut block.upper)
    }

    /// The lower bound of the product of row `i` of the block that was bounded last.
    #[must_use]
    pub fn lower(&self, block: &Block, i: usize, row: RowScale) -> f32 {
        row.scale * (self.scale * block.dots[i] as f32 - self.per_scale) - row.error * self.length
    }

    /// The product of a row as its codes alone tell it.
    #[must_use]
    pub fn approximate(&self, codes: &[u8], row: RowScale) -> f32 {
        let mut dot = [0];
        dots(&self.codes, codes, &mut dot);
        row.scale * self.scale * dot[0] as f32
    }
}

/// Products of a query's codes with rows of codes. At one row of 256 in 9 ns (AVX-512) or 10 (AVX2) this waits for memory.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx512vnni+avx2+fma",
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma",
    "x86_64+avx2+fma"
))]
fn dots(query: &[i16], rows: &[u8], products: &mut [i32]) {
    for (row, product) in rows.chunks_exact(query.len()).zip(products) {
        *product = row.iter().zip(query).map(|(&c, &q)| i32::from(c.cast_signed()) * i32::from(q)).sum();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn upper_bounds(
    [query_scale, per_scale, length]: [f32; 3],
    dots: &[i32],
    scales: &[[u8; 4]],
    errors: &[[u8; 4]],
    threshold: f32,
    upper: &mut [f32],
) -> bool {
    let mut any = false;
    for (((upper, &dot), &scale), &error) in upper.iter_mut().zip(dots).zip(scales).zip(errors) {
        let (scale, error) = (f32::from_le_bytes(scale), f32::from_le_bytes(error));
        *upper = scale * (query_scale * dot as f32 + per_scale) + error * length;
        any |= !below(*upper, threshold);
    }
    any
}

/// Whether a bound rules its row out. One that is no number (of a row with values near the largest f32) does not.
#[inline(always)]
#[must_use]
pub fn below(upper: f32, threshold: f32) -> bool {
    upper < threshold
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn exact(x: &[f32], y: &[f32]) -> f64 {
        x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    }

    /// The interval of each row's product, and the product.
    fn intervals(rows: &[Vec<f32>], y: &[f32]) -> Vec<(f32, f64, f32)> {
        let query = Query::new(y).unwrap();
        let (mut codes, mut scales, mut errors, mut parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            let part = quantize(row, &mut codes).unwrap();
            scales.push(part.scale.to_le_bytes());
            errors.push(part.error.to_le_bytes());
            parts.push(part);
        }
        let mut block = Block::default();
        query.bound(&codes, &scales, &errors, f32::INFINITY, &mut block);
        let row = |(i, row): (usize, &Vec<f32>)| (query.lower(&block, i, parts[i]), exact(row, y), block.upper[i]);
        rows.iter().enumerate().map(row).collect()
    }

    #[test]
    fn every_product_lies_within_its_bounds_and_they_are_close() {
        let mut rng = StdRng::seed_from_u64(7);
        for width in [1, 3, 40, 63, 64, 65, 256, 1000] {
            let mut vector = |kind: usize| -> Vec<f32> {
                let value = |i: usize, rng: &mut StdRng| match kind {
                    // Dense; one large value among small ones; equal magnitudes; lengths far from 1.
                    0 => rng.random_range(-1.0..1.0f32),
                    1 => {
                        if i == 0 {
                            1.0
                        } else {
                            rng.random_range(-1e-4..1e-4)
                        }
                    }
                    2 => {
                        if rng.random() {
                            0.5
                        } else {
                            -0.5
                        }
                    }
                    _ => rng.random_range(-1e6..1e6f32),
                };
                (0..width).map(|i| value(i, &mut rng)).collect()
            };
            let rows: Vec<Vec<f32>> = (0..200).map(|i| vector(i % 4)).collect();
            for query in [vector(0), vector(1), vector(2), vector(3), rows[0].clone(), rows[1].clone()] {
                let norm = |v: &[f32]| exact(v, v).sqrt();
                for ((lower, product, upper), row) in intervals(&rows, &query).into_iter().zip(&rows) {
                    assert!(f64::from(lower) <= product && product <= f64::from(upper), "{lower} {product} {upper}");
                    // Half a step for each value at worst, of steps of 1/127 of the largest; to and fro.
                    let largest = row.iter().fold(0f32, |l, v| l.max(v.abs()));
                    let most = f64::from(largest) / 127.0 * (width as f64).sqrt() * norm(&query) * 1.1;
                    assert!(f64::from(upper - lower) < most, "{width}: {} {most}", upper - lower);
                }
            }
        }
    }

    #[test]
    fn the_largest_products_of_codes_fit() {
        for width in [256, 1 << 12, MAX_WIDTH] {
            let flat = vec![0.5; width];
            let (lower, product, upper) = intervals(std::slice::from_ref(&flat), &flat)[0];
            assert!(f64::from(lower) <= product && product <= f64::from(upper), "{width}: {lower} {product} {upper}");
        }
    }

    #[test]
    fn what_has_no_direction_or_no_numbers_is_refused() {
        for values in [vec![], vec![0.0; 4], vec![1.0, f32::NAN], vec![f32::INFINITY, 1.0], vec![1.0; MAX_WIDTH + 1]] {
            assert_eq!(Query::new(&values), None);
        }
        let mut codes = Vec::new();
        assert_eq!(quantize(&[1.0, f32::NAN], &mut codes), None);
        assert_eq!(quantize(&[f32::NEG_INFINITY], &mut codes), None);
        assert!(codes.is_empty());
        let zero = quantize(&[0.0; 3], &mut codes).unwrap();
        assert_eq!((zero.scale, codes), (0.0, vec![0; stride(3)]));
    }

    #[test]
    fn a_bound_that_is_no_number_rules_nothing_out() {
        let huge = vec![f32::MAX; 64];
        let query = Query::new(&huge).unwrap();
        let mut codes = Vec::new();
        let row = quantize(&huge, &mut codes).unwrap();
        let mut block = Block::default();
        assert!(query.bound(&codes, &[row.scale.to_le_bytes()], &[row.error.to_le_bytes()], f32::MAX, &mut block));
        assert!(!below(block.upper[0], f32::MAX));
    }
}
