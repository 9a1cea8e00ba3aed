//! [NCCL](https://docs.nvidia.com/deeplearning/nccl/), a library that is looked for when ranks with devices of their own start: the
//! five functions that sums take, without a version of it to build against.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libloading::Library;

use super::Collective;

/// File names, the first that there is.
pub const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclUniqueId` of nccl.h: what the ranks of a communicator have in common.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; 128]);

type Handle = *mut c_void;
/// `ncclFloat32` and `ncclSum` of nccl.h.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The library.
pub struct Nccl {
    unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    join: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// What the functions lie in.
    _library: Library,
}

impl Nccl {
    /// Opens the library of a name or path.
    ///
    /// # Errors
    /// None there, or one that lacks a function.
    pub fn open(path: &Path) -> Result<Self> {
        // SAFETY: NCCL's library does nothing when it is loaded; the functions have these types in nccl.h of version 2.
        unsafe {
            let library = Library::new(path)?;
            Ok(Self {
                unique_id: *library.get(b"ncclGetUniqueId\0")?,
                join: *library.get(b"ncclCommInitRank\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                destroy: *library.get(b"ncclCommDestroy\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                error: *library.get(b"ncclGetErrorString\0")?,
                _library: library,
            })
        }
    }

    /// Opens the library where the system finds it.
    ///
    /// # Errors
    /// As [`Nccl::open`].
    pub fn find() -> Result<Self> {
        let mut last = anyhow!("it has no name");
        for name in NAMES {
            match Self::open(Path::new(name)) {
                Ok(found) => return Ok(found),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn check(&self, doing: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: gives a C string that is never freed, for any number.
        let says = unsafe { CStr::from_ptr((self.error)(code)) };
        bail!("NCCL cannot {doing}: {}", says.to_string_lossy())
    }
}

/// A way between the devices of all ranks.
pub struct Communicator {
    nccl: Arc<Nccl>,
    handle: Handle,
    /// It is destroyed or aborted already.
    ended: AtomicBool,
}

/// How often a rank that waits for NCCL asks how the others are.
const LOOK: Duration = Duration::from_millis(50);

// SAFETY: NCCL's communicators may be used by any thread, by one at a time; sums are the only use, and the ranks make them in the
// order of their steps.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Joins the other ranks, which all call this. `prepare` makes a thread's current device that of this rank.
    ///
    /// # Errors
    /// What NCCL says; a rank that is gone, or that does not come within the patience.
    pub fn join(
        nccl: Arc<Nccl>,
        ranks: &dyn Collective,
        patience: Duration,
        prepare: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let mut id = Id([0; 128]);
        let mut made = Ok(());
        if ranks.rank() == 0 {
            // SAFETY: writes an id.
            made = nccl.check("make an id", unsafe { (nccl.unique_id)(&raw mut id) });
        }
        let own: Vec<u8> = if made.is_ok() { id.0.iter().map(|byte| byte.to_ne_bytes()[0]).collect() } else { Vec::new() };
        // Nobody waits in NCCL for a rank 0 that has failed.
        let all = ranks.broadcast(0, &own)?;
        made?;
        if all.len() != id.0.len() {
            bail!("NCCL of rank 0 cannot make an id");
        }
        for (own, brought) in id.0.iter_mut().zip(all) {
            *own = c_char::from_ne_bytes([brought]);
        }
        let (count, rank) = (c_int::try_from(ranks.ranks())?, c_int::try_from(ranks.rank())?);
        // NCCL returns when all ranks have come, and never where one cannot: that call is left to a thread that ends with the program then.
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let joined = prepare().and_then(|()| Self::enter(nccl, count, id, rank));
            // Nobody listens any more where a rank was given up.
            let _ = sender.send(joined);
        });
        let started = Instant::now();
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(joined) => return joined,
                Err(RecvTimeoutError::Disconnected) => bail!("NCCL cannot join the ranks' devices"),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(trouble) = ranks.trouble() {
                return Err(trouble.into());
            }
            if started.elapsed() > patience {
                bail!("the ranks' devices did not come together within {} s", patience.as_secs());
            }
        }
    }

    fn enter(nccl: Arc<Nccl>, count: c_int, id: Id, rank: c_int) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle; every rank of these calls it with the same id.
        let code = unsafe { (nccl.join)(&raw mut handle, count, id, rank) };
        nccl.check("join the ranks' devices", code)?;
        Ok(Self { nccl, handle, ended: AtomicBool::new(false) })
    }

    /// Starts, on a stream, to replace values by their sums over all ranks, which all do so in the same order.
    ///
    /// # Errors
    /// What NCCL says.
    ///
    /// # Safety
    /// `address` is that of `count` f32 values on this rank's device, which nobody uses until the stream has come so far; `stream` is
    /// a stream of that device.
    pub unsafe fn sum(&self, address: u64, count: usize, stream: *mut c_void) -> Result<()> {
        if self.ended.load(Ordering::Relaxed) {
            bail!("the sums of the ranks' devices were given up");
        }
        let at = address as *mut c_void;
        // SAFETY: the caller's.
        let code = unsafe { (self.nccl.all_reduce)(at.cast_const(), at, count, FLOAT32, SUM, self.handle, stream) };
        self.nccl.check("sum over the ranks", code)
    }

    /// Ends what was started and will not end by itself. Before anything that a device's work is waited for in, such as the end of a
    /// cuBLAS handle.
    pub fn give_up(&self) {
        self.end(self.nccl.abort);
    }

    fn end(&self, by: unsafe extern "C" fn(Handle) -> c_int) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            // SAFETY: a communicator that is not used again.
            unsafe { by(self.handle) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.end(self.nccl.destroy);
    }
}

/// The library where there is one.
///
/// # Errors
/// Why there is none, in a sentence.
pub fn find() -> Result<Arc<Nccl>> {
    Nccl::find().map(Arc::new).with_context(|| format!("{} was not found", NAMES[0]))
}

#[cfg(test)]
pub(super) mod testing {
    use std::process::Command;
    use std::sync::OnceLock;

    use candle_core::{CpuStorage, Storage, Tensor};

    use super::*;
    use crate::parallel::devices::DeviceSums;

    /// A stand-in for the library, compiled from `reference/nccl.cpp`: ranks are threads here, and the host's memory the devices'.
    pub fn stand_in() -> Arc<Nccl> {
        static LIBRARY: OnceLock<Arc<Nccl>> = OnceLock::new();
        let open = || {
            let folder = tempfile::tempdir().unwrap();
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/parallel/reference/nccl.cpp");
            let library = folder.path().join("libnccl.so");
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
            let mut compile = Command::new(&compiler);
            compile
                .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-o"])
                .args([&library, &source])
                .args(["-ldl", "-lrt"]);
            let done = compile.output().unwrap_or_else(|error| panic!("this test needs a C++ compiler, {compiler}: {error}"));
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Arc::new(Nccl::open(&library).unwrap())
        };
        LIBRARY.get_or_init(open).clone()
    }

    /// Sums of CPU tensors through the stand-in.
    pub struct OnHost(pub Communicator);

    impl DeviceSums for OnHost {
        fn start(&self, values: &[Tensor]) -> Result<()> {
            for tensor in values {
                let (storage, layout) = tensor.storage_and_layout();
                let (start, end) = layout.contiguous_offsets().unwrap();
                let Storage::Cpu(CpuStorage::F32(values)) = &*storage else { bail!("not on the host") };
                // SAFETY: values of that number, in memory that the tensor alone has.
                unsafe { self.0.sum(values[start..].as_ptr() as u64, end - start, std::ptr::null_mut()) }?;
            }
            Ok(())
        }

        fn join(&self) -> Result<()> {
            Ok(())
        }

        fn wait(&self, _: &dyn Collective) -> Result<()> {
            Ok(())
        }

        fn give_up(&self) {
            self.0.give_up();
        }
    }

    /// Joins the ranks, which are threads.
    pub fn join(ranks: &dyn Collective) -> Result<Communicator> {
        Communicator::join(stand_in(), ranks, Duration::from_secs(60), || Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{among, each, launches};
    use super::testing::{join, stand_in};
    use super::*;

    #[test]
    fn values_become_sums_in_place_on_every_rank() {
        let got = among(3, |ranks| {
            let communicator = join(ranks).unwrap();
            let mut sums = Vec::new();
            for round in 0..2 {
                let mut values = [1.0f32, 10.0, 100.0].map(|value| value * (ranks.rank() + 1 + round) as f32);
                // SAFETY: three values of this thread; the stand-in is done when it returns.
                unsafe { communicator.sum(values.as_mut_ptr() as u64, 3, std::ptr::null_mut()) }.unwrap();
                sums.push(values);
            }
            sums
        });
        assert_eq!(got, vec![vec![[6.0, 60.0, 600.0], [9.0, 90.0, 900.0]]; 3]);
    }

    /// Rank 1 has no device that NCCL could join; rank 0 waits in NCCL for it, and hears of it.
    #[test]
    fn a_rank_that_cannot_join_is_not_waited_for() {
        let patience = Duration::from_secs(30);
        let told = each(&launches(2), patience, |ranks| {
            let (first, began) = (ranks.rank() == 0, Instant::now());
            let prepare = move || if first { Ok(()) } else { Err(anyhow!("the device has fallen off the bus")) };
            let error = Communicator::join(stand_in(), &ranks, patience, prepare).err().unwrap().to_string();
            ranks.leave(Some(&error));
            assert!(began.elapsed() < patience);
            error
        });
        let told: Vec<String> = told.into_iter().map(Result::unwrap).collect();
        assert_eq!(told, ["rank 1 stopped: the device has fallen off the bus", "the device has fallen off the bus"]);
    }

    #[test]
    fn there_are_no_sums_once_they_were_given_up() {
        let told = among(2, |ranks| {
            let communicator = join(ranks).unwrap();
            communicator.give_up();
            let mut values = [1.0f32];
            // SAFETY: a value of this thread.
            unsafe { communicator.sum(values.as_mut_ptr() as u64, 1, std::ptr::null_mut()) }.unwrap_err().to_string()
        });
        assert_eq!(told, ["the sums of the ranks' devices were given up"; 2]);
    }

    #[test]
    fn what_the_library_says_is_told() {
        let told = among(2, |ranks| {
            let communicator = join(ranks).unwrap();
            // SAFETY: no values; the stand-in refuses that before it looks at the address.
            let error = unsafe { communicator.sum(0, 0, std::ptr::null_mut()) }.unwrap_err().to_string();
            communicator.give_up();
            error
        });
        assert_eq!(told, ["NCCL cannot sum over the ranks: invalid argument"; 2]);
        // This machine may have one.
        if let Err(error) = find() {
            assert!(format!("{error:#}").starts_with("libnccl.so.2 was not found: "), "{error:#}");
        }
        let error = format!("{:#}", Nccl::open(Path::new("libnccl-that-is-not-there.so")).err().unwrap());
        assert!(error.contains("libnccl-that-is-not-there.so"), "{error}");
    }
}
