//! The kernels on the CPU, for tests: compiled as C++ and run a block after another (see `emulation/`). Memory starts as NaN and
//! has guards, so that reading what was never written, and writing outside, show.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use candle_core::{CpuStorage, Device, Error, Layout, Result, Shape, Storage, Tensor};
use libloading::Library;

use super::Precision;
use super::machine::{Address, Argument, Element, Grid, Kernel, Machine, Product};
use super::operator::Input;
use super::recording::Records;
use crate::ops::f32_slice;

thread_local! {
    static ORDER: Cell<Option<u32>> = const { Cell::new(None) };
    static PRECISION: Cell<Option<Precision>> = const { Cell::new(None) };
    static RECORDINGS: Cell<u32> = const { Cell::new(u32::MAX) };
}

/// Runs `f` with machines of this thread that refuse to record after so many recordings.
pub fn recording_only<R>(recordings: u32, f: impl FnOnce() -> R) -> R {
    let before = RECORDINGS.replace(recordings);
    let result = f();
    RECORDINGS.set(before);
    result
}

/// What this thread computes products in, where that is not what the whole process does.
pub fn precision() -> Option<Precision> {
    PRECISION.get()
}

/// Runs `f` with this thread's products computed in that.
pub fn computing_in<R>(precision: Precision, f: impl FnOnce() -> R) -> R {
    let before = PRECISION.replace(Some(precision));
    let result = f();
    PRECISION.set(before);
    result
}

/// Whether this thread's CPU tensors are worked on by the kernels.
pub fn is_on() -> bool {
    ORDER.get().is_some()
}

/// Runs `f` with the kernels at work on this thread's CPU tensors, a block's threads taking turns in `order`: 0 forwards, 1
/// backwards, else mixed up.
pub fn emulated<R>(order: u32, f: impl FnOnce() -> R) -> R {
    let before = ORDER.replace(Some(order));
    let result = f();
    ORDER.set(before);
    result
}

type Launch = unsafe extern "C" fn(*const c_char, *const u32, u32, u32, *mut *mut c_void, u32, u32) -> c_int;
type Failure = unsafe extern "C" fn() -> *const c_char;

struct Program {
    launch: Launch,
    failure: Failure,
    /// One kernel at a time: the emulation's state is global.
    turn: Mutex<()>,
    _library: Library,
}

fn program() -> &'static Program {
    static PROGRAM: OnceLock<Program> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) =
            (Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda/emulation/emulate.cpp"), folder.path().join("kernels.so"));
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        // Fibers leave functions by longjmp, which fortified builds take for a mistake.
        let mut compile = Command::new(&compiler);
        compile.args([
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-U_FORTIFY_SOURCE",
            "-DUNIMO_EMULATED",
            "-shared",
            "-fPIC",
        ]);
        let done = compile.arg("-o").args([&library, &source]).output();
        let done =
            done.unwrap_or_else(|error| panic!("the kernels' tests need a C++ compiler, and {compiler} does not run: {error}"));
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        // SAFETY: the library was compiled from our own source, and the two functions have these types there.
        unsafe {
            let library = Library::new(&library).unwrap();
            let launch = *library.get::<Launch>(b"emulation_launch\0").unwrap();
            let failure = *library.get::<Failure>(b"emulation_failure\0").unwrap();
            Program { launch, failure, turn: Mutex::new(()), _library: library }
        }
    })
}

/// Words in front of and behind an allocation that no kernel may touch.
const GUARD: usize = 64;
const UNTOUCHED: u32 = 0x7fc0_dead;

/// Memory of the emulated device, aligned to sixteen bytes as its widest reads need.
pub struct Values {
    sixteens: Vec<u128>,
    count: usize,
}

impl Values {
    fn new(count: usize, fill: u32) -> Self {
        let mut values = Self { sixteens: vec![0; (2 * GUARD + count).div_ceil(4)], count };
        let words = values.words_mut();
        words.fill(UNTOUCHED);
        words[GUARD..GUARD + count].fill(fill);
        values
    }

    fn words(&self) -> &[u32] {
        // SAFETY: the same memory, which any u32 may lie in.
        unsafe { std::slice::from_raw_parts(self.sixteens.as_ptr().cast(), 4 * self.sixteens.len()) }
    }

    fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.sixteens.as_mut_ptr().cast(), 4 * self.sixteens.len()) }
    }

    fn address(&self) -> Address {
        Address(self.sixteens.as_ptr() as u64).after(GUARD)
    }

    /// The first `count` values.
    pub fn to_vec(&self, count: usize) -> Vec<f32> {
        assert!(count <= self.count);
        self.words()[GUARD..GUARD + count].iter().map(|&word| f32::from_bits(word)).collect()
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        let (before, behind) = (&self.words()[..GUARD], &self.words()[GUARD + self.count..]);
        let whole = before.iter().chain(behind).all(|&word| word == UNTOUCHED);
        assert!(whole || std::thread::panicking(), "a kernel wrote outside its memory");
    }
}

/// What was asked of the machine.
pub enum Call {
    /// A kernel.
    Kernel(Kernel, Grid, Vec<Argument>),
    /// A matrix product.
    Product(Product),
    /// So much memory whose values are of no use any more.
    Forgotten(Address, usize),
}

/// The emulated device.
#[derive(Clone)]
pub struct Emulated {
    order: u32,
    /// What is recorded, of a machine and its clones, while it is.
    recorded: Arc<Mutex<Option<Vec<Call>>>>,
}

impl Emulated {
    /// With the order of threads that this thread has asked for.
    pub fn on_this_thread() -> Self {
        Self { order: ORDER.get().unwrap_or(0), recorded: Arc::default() }
    }

    fn recorded(&self) -> MutexGuard<'_, Option<Vec<Call>>> {
        self.recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Where a CPU tensor lies.
    pub fn input(operator: &'static str, storage: &CpuStorage, layout: &Layout) -> Result<Input> {
        let at = Address(f32_slice(operator, storage, layout)?.as_ptr() as u64);
        Ok(Input { at, shape: layout.shape().clone(), element: Element::F32, wanted: true })
    }
}

impl Machine for Emulated {
    type Values = Values;
    type Words = Values;

    fn place(&self, operator: &'static str, tensor: &Tensor) -> Result<Input> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) => Ok(Input { wanted: tensor.track_op(), ..Self::input(operator, cpu, layout)? }),
            _ => candle_core::bail!("{operator}: expected a CPU tensor"),
        }
    }

    fn tensor(&self, values: Values, shape: &Shape) -> Result<Tensor> {
        Tensor::from_vec(values.to_vec(shape.elem_count()), shape, &Device::Cpu)
    }

    fn allocate(&self, count: usize) -> Result<Values> {
        Ok(Values::new(count, f32::NAN.to_bits()))
    }

    fn zeros(&self, count: usize) -> Result<Values> {
        Ok(Values::new(count, 0))
    }

    fn upload(&self, words: &[u32]) -> Result<Values> {
        assert!(self.recorded().is_none(), "an upload would be done once and not recorded");
        let mut memory = Values::new(words.len(), 0);
        memory.words_mut()[GUARD..GUARD + words.len()].copy_from_slice(words);
        Ok(memory)
    }

    fn overwrite(&self, words: &mut Values, with: &[u32]) -> Result<()> {
        assert!(self.recorded().is_none(), "an upload would be done once and not recorded");
        assert_eq!(words.count, with.len());
        words.words_mut()[GUARD..GUARD + with.len()].copy_from_slice(with);
        Ok(())
    }

    fn at(&self, values: &Values) -> Address {
        values.address()
    }

    fn words_at(&self, words: &Values) -> Address {
        words.address()
    }

    fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument]) -> Result<()> {
        if let Some(recorded) = &mut *self.recorded() {
            recorded.push(Call::Kernel(kernel, grid, arguments.to_vec()));
            return Ok(());
        }
        let Kernel(file, name) = kernel;
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(Address(pointer)) => std::ptr::from_ref(pointer).cast_mut().cast(),
                Argument::Size(size) => std::ptr::from_ref(size).cast_mut().cast(),
                Argument::Word(word) => std::ptr::from_ref(word).cast_mut().cast(),
                Argument::Float(value) => std::ptr::from_ref(value).cast_mut().cast(),
            })
            .collect();
        let (program, blocks) = (program(), grid.blocks.map(|blocks| blocks as u32));
        let called = CString::new(name).map_err(Error::wrap)?;
        let _turn = program.turn.lock().unwrap();
        // SAFETY: the pointers hold for the call, and the kernel reads as many of them as it has parameters, which it checks.
        let failed = unsafe {
            (program.launch)(
                called.as_ptr(),
                blocks.as_ptr(),
                grid.threads as u32,
                4 * grid.shared as u32,
                pointers.as_mut_ptr(),
                pointers.len() as u32,
                self.order,
            )
        };
        if failed != 0 {
            // SAFETY: a string of the library's, which lives on.
            let why = unsafe { CStr::from_ptr((program.failure)()) }.to_string_lossy();
            candle_core::bail!("{name} of {file}.cu: {why}");
        }
        Ok(())
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        if let Some(recorded) = &mut *self.recorded() {
            recorded.push(Call::Product(*product));
            return Ok(());
        }
        let call = product.column_major();
        let ([rows, columns, inner], [first, second, stride]) = (call.sizes, call.strides);
        let value = |element: Element, address: Address, i: usize| -> f64 {
            // SAFETY: inside the caller's memory, as a device would have it.
            unsafe {
                match element {
                    Element::Bf16 => (*(address.0 as *const half::bf16).add(i)).to_f64(),
                    Element::F32 => f64::from(*(address.0 as *const f32).add(i)),
                }
            }
        };
        // TF32 has ten bits of mantissa; tensor cores may leave the others unread.
        let read = |address: Address, i: usize| match (product.precision, value(Element::of(product.precision), address, i)) {
            (Precision::Tf32, value) => f64::from(f32::from_bits((value as f32).to_bits() & !0x1fff)),
            (_, value) => value,
        };
        let place = |transposed: bool, stride: usize, row: usize, column: usize| match transposed {
            true => row * stride + column,
            false => column * stride + row,
        };
        for column in 0..columns {
            for row in 0..rows {
                let term = |k: usize| {
                    read(product.b.address, place(call.transposed[0], first, row, k))
                        * read(product.a.address, place(call.transposed[1], second, k, column))
                };
                let sum: f64 = (0..inner).map(term).sum();
                let place = column * stride + row;
                let sum = if product.accumulate { sum + value(product.of_result, product.c, place) } else { sum };
                // SAFETY: as above.
                unsafe {
                    match product.of_result {
                        Element::Bf16 => *(product.c.0 as *mut half::bf16).add(place) = half::bf16::from_f64(sum),
                        Element::F32 => *(product.c.0 as *mut f32).add(place) = sum as f32,
                    }
                }
            }
        }
        Ok(())
    }

    fn forget(&self, at: Address, count: usize) -> Result<()> {
        if let Some(recorded) = &mut *self.recorded() {
            recorded.push(Call::Forgotten(at, count));
            return Ok(());
        }
        // SAFETY: as a kernel's, the caller's memory.
        unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u32, count) }.fill(f32::NAN.to_bits());
        Ok(())
    }
}

impl Records for Emulated {
    type Recording = Vec<Call>;

    fn apart(&self) -> Result<Self> {
        Ok(Self { order: self.order, recorded: Arc::default() })
    }

    fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Call>)> {
        match RECORDINGS.get().checked_sub(1) {
            Some(left) => RECORDINGS.set(left),
            None => candle_core::bail!("this machine does not record"),
        }
        let before = self.recorded().replace(Vec::new());
        assert!(before.is_none(), "a recording inside another");
        let made = work();
        let calls = self.recorded().take().unwrap_or_default();
        Ok((made?, calls))
    }

    fn replay(&self, calls: &Vec<Call>) -> Result<()> {
        calls.iter().try_for_each(|call| match call {
            Call::Kernel(kernel, grid, arguments) => self.launch(*kernel, *grid, arguments),
            Call::Product(product) => self.multiply(product),
            Call::Forgotten(at, count) => self.forget(*at, *count),
        })
    }
}
