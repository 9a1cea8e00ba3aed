//! Matrix products of factors rounded to bf16, with sums in f32, on processors with Intel's Advanced Matrix Extensions.
//!
//! Such a processor multiplies two tiles, 16 rows of 32 numbers each, in sixteen cycles: some fifteen times as fast as vectors of f32.
//! Both factors are rounded and laid out as tiles first. (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
//! chapter 18.)

use std::cell::Cell;

use rayon::prelude::*;

use super::{Matrix, Product};

/// Rows and columns of a tile of sums.
const SIDE: usize = 16;
/// Numbers of `k` that a tile of a factor holds; pairs of them lie in one word.
const DEPTH: usize = 32;
/// Rows and columns of the result that are worked on together: two tiles each way.
const BLOCK: usize = 2 * SIDE;
/// Tiles along `k` between two visits of the result: those of a panel of `a` stay in the second-level cache.
const STEPS: usize = 32;

/// A tile of a factor: [`SIDE`] rows of pairs of bf16.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[u32; SIDE]; SIDE]);

const EMPTY: Tile = Tile([[0; SIDE]; SIDE]);

/// What multiplies panels: `c (+)= a · b` over so many steps, each of two tiles of `a` and two of `b`; 32 rows and columns of `c`,
/// whose rows are so many values apart.
trait Engine: Copy + Send + Sync {
    fn run<R>(self, work: impl FnOnce() -> R) -> R;

    fn multiply(self, a: &[Tile], b: &[Tile], accumulate: bool, c: &mut [f32], stride: usize);
}

thread_local! {
    /// Memory for panels, kept from product to product.
    static PANELS: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
    static SHARED: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// [`sgemm`](super::sgemm) with both factors rounded to bf16; `false` where this processor, or its system, cannot do so.
pub fn multiply(size: Product, a: Matrix, b: Matrix, c: &mut [f32], c_stride: usize) -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(amx) = processor::Amx::get() {
        product(amx, size, a, b, c, c_stride);
        return true;
    }
    let _ = (size, a, b, c, c_stride);
    false
}

/// Whether [`multiply`] can be used.
#[must_use]
pub fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return processor::Amx::get().is_some();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return false;
}

fn product<E: Engine>(engine: E, size: Product, a: Matrix, b: Matrix, c: &mut [f32], c_stride: usize) {
    let Product { m, n, k, accumulate, parallel } = size;
    assert!(a.holds(m, k) && b.holds(k, n), "operand outside its slice");
    if m == 0 || n == 0 {
        return;
    }
    let c = &mut c[..(m - 1) * c_stride + n];
    if k == 0 && !accumulate {
        c.chunks_mut(c_stride).for_each(|row| row[..n].fill(0.0));
    }
    let rows = Factor { along: a.row_stride, deep: a.column_stride, values: a.values, lines: m, depth: k };
    let columns = Factor { along: b.column_stride, deep: b.row_stride, values: b.values, lines: n, depth: k };
    for first in (0..k).step_by(STEPS * DEPTH) {
        let steps = (k - first).min(STEPS * DEPTH).div_ceil(DEPTH);
        let accumulate = accumulate || first > 0;
        let mut packed = SHARED.take();
        packed.resize(n.div_ceil(BLOCK) * 2 * steps, EMPTY);
        let fill = |(panel, tiles): (usize, &mut [Tile])| pack(&columns, true, [panel * BLOCK, first], tiles);
        if parallel {
            packed.par_chunks_exact_mut(2 * steps).enumerate().for_each(fill);
        } else {
            packed.chunks_exact_mut(2 * steps).enumerate().for_each(fill);
        }
        let rows_of = |(panel, c): (usize, &mut [f32])| {
            let mut left = PANELS.take();
            left.resize(2 * steps, EMPTY);
            pack(&rows, false, [panel * BLOCK, first], &mut left);
            engine.run(|| {
                for (panel, right) in packed.chunks_exact(2 * steps).enumerate() {
                    let column = panel * BLOCK;
                    block(engine, &left, right, accumulate, &mut c[column..], c_stride, (n - column).min(BLOCK));
                }
            });
            PANELS.set(left);
        };
        if parallel {
            c.par_chunks_mut(BLOCK * c_stride).enumerate().for_each(rows_of);
        } else {
            c.chunks_mut(BLOCK * c_stride).enumerate().for_each(rows_of);
        }
        SHARED.set(packed);
    }
}

/// One block of the result, of up to [`BLOCK`] rows (those that `c` has) and so many columns.
fn block<E: Engine>(engine: E, a: &[Tile], b: &[Tile], accumulate: bool, c: &mut [f32], stride: usize, columns: usize) {
    if columns == BLOCK && c.len() >= (BLOCK - 1) * stride + BLOCK {
        return engine.multiply(a, b, accumulate, c, stride);
    }
    let mut sums = [0f32; BLOCK * BLOCK];
    if accumulate {
        for (sums, c) in sums.chunks_exact_mut(BLOCK).zip(c.chunks(stride)) {
            sums[..columns].copy_from_slice(&c[..columns]);
        }
    }
    engine.multiply(a, b, accumulate, &mut sums, BLOCK);
    for (sums, c) in sums.chunks_exact(BLOCK).zip(c.chunks_mut(stride)) {
        c[..columns].copy_from_slice(&sums[..columns]);
    }
}

/// A factor as lines (rows of the left one, columns of the right one) of numbers along `k`.
#[derive(Clone, Copy)]
struct Factor<'a> {
    values: &'a [f32],
    /// From a line to the next.
    along: usize,
    /// From a number to the next of its line.
    deep: usize,
    lines: usize,
    depth: usize,
}

/// Lays out [`BLOCK`] lines, two tiles for each step along `k`, zeros where there are none: a line in each row of a tile or, of
/// the right factor, in each column.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn pack(factor: &Factor, right: bool, [line, first]: [usize; 2], tiles: &mut [Tile]) {
    let Factor { values, along, deep, lines, depth } = *factor;
    for (step, tiles) in tiles.chunks_exact_mut(2).enumerate() {
        let k = first + step * DEPTH;
        for (half, tile) in tiles.iter_mut().enumerate() {
            let line = line + half * SIDE;
            // What the factor has of this tile; the rest of it is zeros.
            let (there, deeper) = (lines.saturating_sub(line).min(SIDE), depth.saturating_sub(k).min(DEPTH));
            // Where lines are neighbours, a pair of numbers of each fills a row; else a row is filled by one of them.
            let turned = along == 1;
            if turned {
                for (pair, row) in tile.0.iter_mut().enumerate() {
                    let numbers = |odd: usize| {
                        let at = k + 2 * pair + odd;
                        if there > 0 && at < k + deeper {
                            padded::<SIDE>(&values[at * deep + line..][..there])
                        } else {
                            [0.0; SIDE]
                        }
                    };
                    let (even, odd) = (numbers(0), numbers(1));
                    for lane in 0..SIDE {
                        row[lane] = rounded(even[lane]) | rounded(odd[lane]) << 16;
                    }
                }
            } else {
                for (i, row) in tile.0.iter_mut().enumerate() {
                    let numbers = if i >= there {
                        [0.0; DEPTH]
                    } else if deep == 1 {
                        padded::<DEPTH>(&values[(line + i) * along + k..][..deeper])
                    } else {
                        std::array::from_fn(|d| if d < deeper { values[(line + i) * along + (k + d) * deep] } else { 0.0 })
                    };
                    for lane in 0..SIDE {
                        row[lane] = rounded(numbers[2 * lane]) | rounded(numbers[2 * lane + 1]) << 16;
                    }
                }
            }
            if turned != right {
                transpose(&mut tile.0);
            }
        }
    }
}

/// The numbers, and zeros after them.
#[inline(always)]
fn padded<const N: usize>(numbers: &[f32]) -> [f32; N] {
    if let Ok(whole) = numbers.try_into() {
        return whole;
    }
    let mut padded = [0.0; N];
    for (padded, number) in padded.iter_mut().zip(numbers) {
        *padded = *number;
    }
    padded
}

#[inline(always)]
fn transpose(words: &mut [[u32; SIDE]; SIDE]) {
    let from = *words;
    for (i, row) in words.iter_mut().enumerate() {
        for (j, word) in row.iter_mut().enumerate() {
            *word = from[j][i];
        }
    }
}

/// The nearest bf16's bits, the even one of two; of no number, no number.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fc0 } else { nearest }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod processor {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::OnceLock;

    use super::{BLOCK, Engine, Tile};

    /// Shapes of the tiles, as `ldtilecfg` reads them: eight of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Proof that this process may use the tiles.
    #[derive(Debug, Clone, Copy)]
    pub struct Amx(());

    impl Amx {
        pub fn get() -> Option<Self> {
            static FOUND: OnceLock<Option<Amx>> = OnceLock::new();
            *FOUND.get_or_init(|| (in_processor() && permitted()).then_some(Self(())))
        }
    }

    fn in_processor() -> bool {
        /// AMX-BF16 and AMX-TILE in EDX of leaf 7.
        const NEEDED: u32 = 1 << 22 | 1 << 24;
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED
    }

    /// Linux gives a process the tiles' registers when it asks.
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: this request takes a number and touches no memory of this process.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    impl Engine for Amx {
        fn run<R>(self, work: impl FnOnce() -> R) -> R {
            // SAFETY: the process may use the tiles; the configuration is 64 bytes, and valid for palette 1.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, preserves_flags, readonly)) };
            let made = work();
            // SAFETY: as above. What the tiles held is of no use any more, and need not be kept when threads are switched.
            unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
            made
        }

        #[inline(always)]
        fn multiply(self, a: &[Tile], b: &[Tile], accumulate: bool, c: &mut [f32], stride: usize) {
            assert!(a.len() == b.len() && !a.is_empty() && a.len().is_multiple_of(2));
            assert!(stride >= BLOCK && c.len() >= (BLOCK - 1) * stride + BLOCK);
            // SAFETY: tiles are configured as 16 rows of 64 bytes: `a` and `b` hold two of them for each step, and the four of `c` lie
            // within it, by the assertions.
            unsafe {
                asm!(
                    "test {accumulate:e}, {accumulate:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{c} + {stride}]",
                    "tileloadd tmm1, [{c} + {stride} + 64]",
                    "tileloadd tmm2, [{below} + {stride}]",
                    "tileloadd tmm3, [{below} + {stride} + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm4, [{a} + {row}]",
                    "tileloadd tmm6, [{b} + {row}]",
                    "tileloadd tmm7, [{b} + {row} + 1024]",
                    "tileloadd tmm5, [{a} + {row} + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 2048",
                    "add {b}, 2048",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c} + {stride}], tmm0",
                    "tilestored [{c} + {stride} + 64], tmm1",
                    "tilestored [{below} + {stride}], tmm2",
                    "tilestored [{below} + {stride} + 64], tmm3",
                    a = inout(reg) a.as_ptr() => _,
                    b = inout(reg) b.as_ptr() => _,
                    steps = inout(reg) a.len() / 2 => _,
                    c = in(reg) c.as_mut_ptr(),
                    below = in(reg) c[super::SIDE * stride..].as_mut_ptr(),
                    stride = in(reg) stride * size_of::<f32>(),
                    row = in(reg) 64usize,
                    accumulate = in(reg) u32::from(accumulate),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the instructions do, in loops.
    #[derive(Clone, Copy)]
    struct Loops;

    impl Engine for Loops {
        fn run<R>(self, work: impl FnOnce() -> R) -> R {
            work()
        }

        fn multiply(self, a: &[Tile], b: &[Tile], accumulate: bool, c: &mut [f32], stride: usize) {
            let low = |word: u32| f32::from_bits(word << 16);
            let high = |word: u32| f32::from_bits(word & 0xffff_0000);
            for i in 0..BLOCK {
                for j in 0..BLOCK {
                    let sum = &mut c[i * stride + j];
                    *sum = if accumulate { *sum } else { 0.0 };
                    for (a, b) in a.chunks_exact(2).zip(b.chunks_exact(2)) {
                        for pair in 0..SIDE {
                            let (a, b) = (a[i / SIDE].0[i % SIDE][pair], b[j / SIDE].0[pair][j % SIDE]);
                            *sum += low(a) * low(b) + high(a) * high(b);
                        }
                    }
                }
            }
        }
    }

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i * 2_654_435_761 + seed * 40_503) >> 7) % 4001) as f32 / 2000.0 - 1.0).collect()
    }

    fn bf16(x: f32) -> f64 {
        f64::from(f32::from_bits(rounded(x) << 16))
    }

    /// Every way that a factor may lie, sizes on and beside the tiles' edges, sums begun and gone on with.
    fn products_are_those_of_the_formula<E: Engine>(engine: E) {
        let sizes = [(1, 1, 1), (16, 16, 32), (32, 32, 64), (33, 31, 65), (5, 70, 40), (64, 96, 1100), (100, 7, 2049), (2, 3, 0)];
        for (case, (m, n, k)) in sizes.into_iter().enumerate() {
            for way in 0..16 {
                let [a_turned, b_turned, accumulate, parallel] = [way & 1, way & 2, way & 4, way & 8].map(|bit| bit > 0);
                let (a_width, b_width) = (if a_turned { m } else { k } + case % 3, if b_turned { k } else { n } + case % 2);
                let a_values = numbers(if a_turned { k } else { m } * a_width, 1);
                let b_values = numbers(if b_turned { n } else { k } * b_width, 2);
                let matrix = |values, width, turned| {
                    let matrix = Matrix::rows(values, width);
                    if turned { matrix.transposed() } else { matrix }
                };
                let (a, b) = (matrix(&a_values, a_width, a_turned), matrix(&b_values, b_width, b_turned));
                let stride = n + 5;
                let before = numbers(m * stride, 3);
                let mut c = before.clone();
                product(engine, Product { m, n, k, accumulate, parallel }, a, b, &mut c, stride);
                for i in 0..m {
                    for j in 0..stride {
                        let begun = f64::from(before[i * stride + j]);
                        let at = |matrix: Matrix, i: usize, j: usize| {
                            bf16(matrix.values[i * matrix.row_stride + j * matrix.column_stride])
                        };
                        let sum: f64 = (0..k).map(|t| at(a, i, t) * if j < n { at(b, t, j) } else { 0.0 }).sum();
                        let expected = if j >= n || accumulate { begun + sum } else { sum };
                        let found = f64::from(c[i * stride + j]);
                        assert!(
                            (found - expected).abs() < 1e-5 * (10.0 + expected.abs()),
                            "{m} {n} {k} {way} at {i},{j}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_are_laid_out_as_the_instructions_read_them() {
        products_are_those_of_the_formula(Loops);
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_processor_multiplies_as_the_formula_says() {
        match processor::Amx::get() {
            Some(amx) => products_are_those_of_the_formula(amx),
            None => eprintln!("no AMX here: its instructions were not tested"),
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_even() {
        for (x, bits) in [
            (1.0, 0x3f80),
            (-2.5, 0xc020),
            (1.0 + 0.5 / 128.0, 0x3f80), // Halfway, to the even one below.
            (1.0 + 1.5 / 128.0, 0x3f82), // Halfway, to the even one above.
            (1.004, 0x3f81),
            (f32::MAX, 0x7f80),
            (f32::INFINITY, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
            (f32::NAN, 0x7fc0),
            (f32::from_bits(0xffff_ffff), 0x7fc0),
        ] {
            assert_eq!(rounded(x), bits, "{x}");
        }
        let mut c = [0.0];
        let one = Product { m: 1, n: 1, k: 2, accumulate: false, parallel: false };
        product(Loops, one, Matrix::rows(&[1.0, f32::NAN], 2), Matrix::rows(&[1.0, 1.0], 1), &mut c, 1);
        assert!(c[0].is_nan());
    }
}
