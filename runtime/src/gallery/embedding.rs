//! Embeddings as they are stored: 32-bit floats, little-endian, of unit length.

/// Largest difference of an embedding's length from 1: f32 rounding of 256 squares, generously.
const UNIT_TOLERANCE: f32 = 1e-3;

/// The floats of a stored embedding.
pub(super) fn values(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))
}

/// Euclidean length; NaN where a value is.
pub(super) fn length(values: impl Iterator<Item = f32>) -> f32 {
    values.map(|v| v * v).sum::<f32>().sqrt()
}

pub(super) fn is_unit(length: f32) -> bool {
    (length - 1.0).abs() <= UNIT_TOLERANCE
}

/// Dot product in 16 running sums, which compilers turn into vector instructions.
pub(super) fn dot(query: &[f32], stored: &[u8]) -> f32 {
    let (queries, query_rest) = query.as_chunks::<16>();
    let (rows, row_rest) = stored.as_chunks::<64>();
    let mut sums = [0f32; 16];
    for (q, s) in queries.iter().zip(rows) {
        for ((sum, q), s) in sums.iter_mut().zip(q).zip(s.as_chunks::<4>().0) {
            *sum += q * f32::from_le_bytes(*s);
        }
    }
    sums.iter().sum::<f32>() + query_rest.iter().zip(values(row_rest)).map(|(q, s)| q * s).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_products_of_every_width() {
        for width in [1, 15, 16, 17, 64, 250] {
            let a: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..width).map(|i| (i as f32 * 1.3).cos()).collect();
            let bytes: Vec<u8> = b.iter().flat_map(|v| v.to_le_bytes()).collect();
            let expected: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &bytes)) - expected).abs() < 1e-4, "{width}");
        }
    }
}
