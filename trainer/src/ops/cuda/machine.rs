//! What the operators need of a machine that runs their kernels: a CUDA device or, in tests, its emulation on the CPU.

use candle_core::{Result, Shape, Tensor};

use super::Precision;
use super::operator::Input;

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

/// What the values of an array are stored as. Kernels compute in f32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32 bits.
    F32,
    /// Rounded to 8 bits of mantissa, two in each 32 bits.
    Bf16,
}

impl Element {
    /// What activations are stored as where products are computed so.
    pub fn of(precision: Precision) -> Self {
        match precision {
            Precision::Bf16 => Self::Bf16,
            Precision::F32 | Precision::Tf32 => Self::F32,
        }
    }

    /// 32-bit values that so many of these take.
    pub fn words(self, count: usize) -> usize {
        match self {
            Self::F32 => count,
            Self::Bf16 => count.div_ceil(2),
        }
    }

    /// The place `count` of these behind an address.
    pub fn after(self, address: Address, count: usize) -> Address {
        match self {
            Self::F32 => address.after(count),
            Self::Bf16 => Address(address.0 + 2 * count as u64),
        }
    }
}

/// A kernel: the file of `kernels/` that holds it, and its name.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(pub &'static str, pub &'static str);

impl Kernel {
    /// The one of two that works on such an array: the first on f32, the second on bf16.
    pub fn on(element: Element, file: &'static str, names: [&'static str; 2]) -> Self {
        Self(file, names[usize::from(element == Element::Bf16)])
    }
}

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
/// Blocks along y, or z, that a device takes.
const MOST_ALONG_Y: usize = (1 << 16) - 1;

impl Grid {
    /// A thread for each of `count` values; a kernel that walks in steps of the grid takes any number.
    pub fn each(count: usize) -> Self {
        Self { blocks: [count.div_ceil(THREADS).clamp(1, 1 << 16), 1, 1], threads: THREADS, shared: 0 }
    }

    /// A thread for every eight columns of every row.
    pub fn each_few(rows: usize, width: usize) -> Self {
        Self { blocks: [(rows * width.div_ceil(8)).div_ceil(THREADS).max(1), 1, 1], threads: THREADS, shared: 0 }
    }

    /// For `column_sums`, whose blocks leave a row of sums each; the rows that a block takes: all, if that does not take a thread long,
    /// and else as many as leave rows for one more such sum; and the spans of eight columns that it takes: few of them where it takes all
    /// rows, so that there are more blocks.
    pub fn summing(rows: usize, width: usize) -> (Self, usize, usize) {
        /// Rows that a thread adds up, and how few and how many they may be.
        const MANY: usize = 48;
        const FEWEST: usize = 8;
        const MOST: usize = 64;
        let all = width.div_ceil(8).max(1);
        let turns = |spans: usize| THREADS / all.min(spans);
        let (spans, each) = match rows {
            _ if rows <= MANY * turns(8) => (8, rows.max(1)),
            _ => (WARP, rows.div_ceil(MANY * turns(WARP)).clamp(FEWEST * turns(WARP), MOST * turns(WARP))),
        };
        let blocks = [all.div_ceil(spans), rows.div_ceil(each).max(1), 1];
        (Self { blocks, threads: THREADS, shared: 8 * THREADS }, each, spans)
    }

    /// For kernels whose threads walk down a few columns of a matrix each (`Columns` of the kernels), and the rows that each takes:
    /// many where there are many, because those that sum leave a row for each block, and few where the device would be idle.
    pub fn columns(rows: usize, width: usize) -> (Self, usize) {
        /// Columns of a thread: `FEW` of the kernels.
        const FEW: usize = 8;
        /// Warps that are enough work for a large device.
        const ENOUGH: usize = 2048;
        let spans = width.div_ceil(FEW).max(1);
        let threads = spans.next_multiple_of(WARP).min(128);
        let each = match rows {
            ..=64 => rows.max(1),
            // No more blocks along y than a device takes.
            _ => (rows * spans.div_ceil(WARP) / ENOUGH).clamp(16, 64).max(rows.div_ceil(MOST_ALONG_Y)),
        };
        let blocks = [spans.div_ceil(threads), rows.div_ceil(each).max(1), 1];
        (Self { blocks, threads, shared: 0 }, each)
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

/// `c[m, n] (+)= a[m, k] · b[k, n]`, all row-major.
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
    /// From one row of the result to the next, in values.
    pub stride: usize,
    /// What the result is stored as; it is summed up in f32.
    pub of_result: Element,
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
            strides: [self.b.stride, self.a.stride, self.stride],
        }
    }
}

/// Runs kernels one after another, in the order in which they were asked for.
pub trait Machine: Clone + 'static {
    /// f32 values in its memory; given back when dropped, after the kernels that were asked for before.
    type Values: Send + 'static;
    /// 32-bit words in its memory.
    type Words: Send + 'static;

    /// Where a contiguous f32 tensor of this machine lies.
    fn place(&self, operator: &'static str, tensor: &Tensor) -> Result<Input>;
    /// f32 values as a tensor.
    fn tensor(&self, values: Self::Values, shape: &Shape) -> Result<Tensor>;
    /// Memory with nothing in particular in it.
    fn allocate(&self, count: usize) -> Result<Self::Values>;
    /// Memory full of zeros.
    fn zeros(&self, count: usize) -> Result<Self::Values>;
    /// Words copied from the host, which need not be kept.
    fn upload(&self, words: &[u32]) -> Result<Self::Words>;
    /// Copies other words, as many, to where these lie, after the kernels that were asked for before.
    fn overwrite(&self, words: &mut Self::Words, with: &[u32]) -> Result<()>;
    /// Where values lie.
    fn at(&self, values: &Self::Values) -> Address;
    /// Where words lie.
    fn words_at(&self, words: &Self::Words) -> Address;
    /// Asks for a kernel. Its addresses have to lie in memory of this machine that is large enough for it.
    fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument]) -> Result<()>;
    /// Asks for a matrix product, under the same condition.
    fn multiply(&self, product: &Product) -> Result<()>;

    /// Tells that what lies in `count` 32-bit values is of no use any more; where memory is watched, it is written over.
    fn forget(&self, _at: Address, _count: usize) -> Result<()> {
        Ok(())
    }
}

/// An argument list, each of its own type.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$($crate::ops::cuda::machine::Argument::from($argument)),*] };
}
pub(super) use arguments;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_all_walked_and_sums_of_them_end_soon() {
        for (rows, width) in
            [(0, 8), (1, 1), (64, 768), (65, 36), (6_000, 256), (20_000, 3_072), (200_000, 2_304), (5_000_000, 32)]
        {
            let (Grid { blocks, threads, .. }, each) = Grid::columns(rows, width);
            assert!(threads % WARP == 0 && threads * 8 * blocks[0] >= width && each * blocks[1] >= rows, "{rows} of {width}");
            assert!(blocks[1] <= MOST_ALONG_Y, "{rows} of {width}: {blocks:?}");
            let (mut left, mut passes) = (rows, 0);
            while left > 1 {
                let (Grid { blocks, threads, .. }, each, spans) = Grid::summing(left, width);
                assert!(spans * 8 * blocks[0] >= width && threads == 256 && each * blocks[1] >= left, "{left} of {width}");
                assert!(blocks[1] <= MOST_ALONG_Y, "{left} of {width}: {blocks:?}");
                (left, passes) = (blocks[1], passes + 1);
            }
            assert!(passes <= 2, "{rows} of {width}: {passes} passes");
        }
    }

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
            stride: 5,
            of_result: Element::F32,
            accumulate: false,
            precision: Precision::F32,
        };
        let rows = |stride| Matrix::rows(Address::NULL, stride);
        for (a, b, transposed, strides) in [
            (rows(3), rows(4), [false, false], [4, 3, 5]),
            (rows(2).t(), rows(4), [false, true], [4, 2, 5]),
            (rows(3), rows(3).t(), [true, false], [3, 3, 5]),
        ] {
            assert_eq!(product(a, b).column_major(), ColumnMajor { transposed, sizes: [4, 2, 3], strides });
        }
    }
}
