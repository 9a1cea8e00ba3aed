//! What this machine can do at most: the roof under which every graph runs (Williams, Waterman and Patterson, "Roofline", CACM
//! 52(4), 2009).

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::engine::GraphCost;
use crate::kernels::{Activation, Layout, Matrix, Weights};

/// Peaks of one thread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roof {
    /// 32-bit floating-point operations a second, of products of matrices that stay in the cache. Products of bytes can be faster.
    pub operations_per_second: f64,
    /// Bytes read from memory a second, of a block that no cache holds.
    pub bytes_per_second: f64,
}

/// Shapes of the products that are tried, `[rows, inputs, outputs]`: one fits the first cache, the others the second.
const PRODUCTS: [[usize; 3]; 3] = [[32, 128, 32], [48, 256, 64], [96, 256, 256]];
/// Bytes of the block that is read.
const BLOCK: usize = 256 << 20;

impl Roof {
    /// Measures this machine for about so long.
    #[must_use]
    pub fn measure(duration: Duration) -> Self {
        let each = duration / (PRODUCTS.len() as u32 + 1);
        let operations = PRODUCTS.iter().map(|&shape| operations_per_second(shape, each)).fold(0.0, f64::max);
        Self { operations_per_second: operations, bytes_per_second: bytes_per_second(each) }
    }

    /// The least time that a run can take.
    #[must_use]
    pub fn limit(&self, cost: &GraphCost) -> Duration {
        let (arithmetic, memory) =
            (cost.operations as f64 / self.operations_per_second, cost.bytes as f64 / self.bytes_per_second);
        Duration::try_from_secs_f64(arithmetic.max(memory)).unwrap_or(Duration::MAX)
    }
}

/// The best rate of any tenth of the time: what else the machine does meanwhile only slows it.
fn best_rate(duration: Duration, work: f64, mut run: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), 0f64);
    while best == 0.0 || start.elapsed() < duration {
        let (round, mut runs) = (Instant::now(), 0.0);
        while runs == 0.0 || round.elapsed() < duration / 10 {
            run();
            runs += 1.0;
        }
        best = best.max(work * runs / round.elapsed().as_secs_f64());
    }
    best
}

fn operations_per_second([rows, inputs, outputs]: [usize; 3], duration: Duration) -> f64 {
    let weights: Vec<f32> = (0..inputs * outputs).map(|i| (i % 13) as f32 * 0.01).collect();
    let Some(matrix) = Matrix::new(Weights::F32(&weights), [inputs, outputs], false, None) else { return 0.0 };
    let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 11) as f32 * 0.1).collect();
    let mut y = vec![0.0; rows * outputs];
    best_rate(duration, 2.0 * (rows * inputs * outputs) as f64, || {
        let (x, y) = ((black_box(x.as_slice()), Layout::dense(inputs)), (y.as_mut_slice(), Layout::dense(outputs)));
        matrix.multiply(rows, x, None, Activation::None, y);
    })
}

fn bytes_per_second(duration: Duration) -> f64 {
    let block: Vec<u64> = (0..(BLOCK / size_of::<u64>()) as u64).collect();
    best_rate(duration, BLOCK as f64, || {
        let mut sums = [0u64; 32];
        for chunk in black_box(block.as_slice()).as_chunks::<32>().0 {
            sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        }
        black_box(sums);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_roof_is_the_limit() {
        let roof = Roof { operations_per_second: 1e9, bytes_per_second: 1e8 };
        let of = |operations, bytes| roof.limit(&GraphCost { operations, bytes });
        assert_eq!(of(2_000_000, 1), Duration::from_millis(2));
        assert_eq!(of(2_000_000, 500_000), Duration::from_millis(5));
    }

    #[test]
    fn a_machine_has_a_roof() {
        let roof = Roof::measure(Duration::from_millis(200));
        // A millionth of what the slowest board does, and more than any does.
        assert!((1e6..1e14).contains(&roof.operations_per_second), "{roof:?}");
        assert!((1e6..1e14).contains(&roof.bytes_per_second), "{roof:?}");
    }
}
