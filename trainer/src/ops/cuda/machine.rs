//! What the operators need of a machine that runs their kernels: a CUDA device or, in tests, its emulation on the CPU.

use candle_core::Result;

use super::Precision;

/// A place in a machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// What a kernel takes for something that is absent.
    pub const NULL: Self = Self(0);

    /// The place `values` 32-bit values on.
    pub fn after(self, values: usize) -> Self {
        Self(self.0 + 4 * values as u64)
    }
}

/// A kernel: the file of `kernels/` that holds it, and its name.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(pub &'static str, pub &'static str);

/// An argument, of exactly the width that the kernel's parameter has.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// A pointer.
    Address(Address),
    /// `size_t`
    Size(u64),
    /// `uint32_t`
    Word(u32),
    /// `float`
    Float(f32),
}

impl From<Address> for Argument {
    fn from(address: Address) -> Self {
        Self::Address(address)
    }
}

impl From<usize> for Argument {
    fn from(size: usize) -> Self {
        Self::Size(size as u64)
    }
}

impl From<u32> for Argument {
    fn from(word: u32) -> Self {
        Self::Word(word)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// How a kernel is spread over the machine.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks along x, y and z.
    pub blocks: [usize; 3],
    /// Threads of a block, a multiple of 32.
    pub threads: usize,
    /// 32-bit values of shared memory that a block has.
    pub shared: usize,
}

/// Threads of a block where nothing asks for another number.
pub const THREADS: usize = 256;
/// Threads of a warp.
pub const WARP: usize = 32;

impl Grid {
    /// A thread for each of `count` values; a kernel that walks in steps of the grid takes any number.
    pub fn each(count: usize) -> Self {
        Self { blocks: [count.div_ceil(THREADS).clamp(1, 1 << 16), 1, 1], threads: THREADS, shared: 0 }
    }

    /// Blocks along x, of 256 threads that add up together.
    pub fn reducing(blocks: usize) -> Self {
        Self { blocks: [blocks, 1, 1], threads: THREADS, shared: THREADS / WARP }
    }
}

/// A row-major matrix, perhaps to be read as its transpose.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// First value.
    pub address: Address,
    /// From one row to the next, in values.
    pub stride: usize,
    /// The matrix meant is the transpose of the one that lies there.
    pub transposed: bool,
}

impl Matrix {
    /// Rows of `stride` values.
    pub fn rows(address: Address, stride: usize) -> Self {
        Self { address, stride, transposed: false }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `c[m, n] (+)= a[m, k] · b[k, n]`, all row-major; `c` has rows of `n` values, in f32.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// Left factor.
    pub a: Matrix,
    /// Right factor.
    pub b: Matrix,
    /// Result.
    pub c: Address,
    /// Adds to the result instead of overwriting it.
    pub accumulate: bool,
    /// What the factors are rounded to; for bf16 they already lie there as such, two in each 32 bits.
    pub precision: Precision,
}

/// A product as BLAS takes it, whose matrices are column-major: the transposed result is the product of the transposed factors in
/// the other order, and a row-major matrix is, read column by column, its own transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnMajor {
    /// Whether the first factor (our `b`) and the second (our `a`) are to be transposed.
    pub transposed: [bool; 2],
    /// Rows of the result, its columns, and what is summed over.
    pub sizes: [usize; 3],
    /// From one column to the next: first factor, second factor, result.
    pub strides: [usize; 3],
}

impl Product {
    /// As BLAS takes it.
    pub fn column_major(&self) -> ColumnMajor {
        ColumnMajor {
            transposed: [self.b.transposed, self.a.transposed],
            sizes: [self.n, self.m, self.k],
            strides: [self.b.stride, self.a.stride, self.n],
        }
    }
}

/// Runs kernels one after another, in the order in which they were asked for.
pub trait Machine {
    /// f32 values in its memory; given back when dropped, after the kernels that were asked for before.
    type Values: Send + 'static;
    /// 32-bit words in its memory.
    type Words: Send + 'static;

    /// Memory with nothing in particular in it.
    fn allocate(&self, count: usize) -> Result<Self::Values>;
    /// Memory full of zeros.
    fn zeros(&self, count: usize) -> Result<Self::Values>;
    /// Words copied from the host, which need not be kept.
    fn upload(&self, words: &[u32]) -> Result<Self::Words>;
    /// Where values lie.
    fn at(&self, values: &Self::Values) -> Address;
    /// Where words lie.
    fn words_at(&self, words: &Self::Words) -> Address;
    /// Asks for a kernel. Its addresses have to lie in memory of this machine that is large enough for it.
    fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument]) -> Result<()>;
    /// Asks for a matrix product, under the same condition.
    fn multiply(&self, product: &Product) -> Result<()>;
}

/// An argument list, each of its own type.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$($crate::ops::cuda::machine::Argument::from($argument)),*] };
}
pub(super) use arguments;

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked by hand: A is 2×3, B 3×4, stored as they are and as their transposes.
    #[test]
    fn row_major_products_are_told_to_blas_in_columns() {
        let product = |a: Matrix, b: Matrix| Product {
            m: 2,
            n: 4,
            k: 3,
            a,
            b,
            c: Address::NULL,
            accumulate: false,
            precision: Precision::F32,
        };
        let rows = |stride| Matrix::rows(Address::NULL, stride);
        for (a, b, transposed, strides) in [
            (rows(3), rows(4), [false, false], [4, 3, 4]),
            (rows(2).t(), rows(4), [false, true], [4, 2, 4]),
            (rows(3), rows(3).t(), [true, false], [3, 3, 4]),
        ] {
            assert_eq!(product(a, b).column_major(), ColumnMajor { transposed, sizes: [4, 2, 3], strides });
        }
    }
}
