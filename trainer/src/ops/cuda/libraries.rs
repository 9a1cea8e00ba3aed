//! CUDA's libraries, opened when the program starts instead of being demanded by the system's loader: a build with the
//! feature `cuda` starts on a machine without them, says what is missing if a device is asked for, and trains on its CPU.
//!
//! Every function of the libraries that this program may call has a door of its name here, an instruction that jumps through a
//! table. The linker takes the doors for the libraries' functions, so that the program does not name the libraries. The table
//! is filled before `main`, ahead of the constructors that CUDA's compiler adds; a function that was not found gives an error.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

unsafe extern "C" {
    fn dlopen(name: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// `RTLD_NOW | RTLD_GLOBAL`
const NOW_AND_GLOBAL: c_int = 0x102;

// Made by build.rs from `libraries.txt`: `LIBRARIES` (file names to try, of each), `FUNCTIONS` (number of the
// library, and name), the table, and the doors.
include!(concat!(env!("OUT_DIR"), "/doors.rs"));

/// What a call to a missing function gives: no success of any library's.
extern "C" fn not_there() -> c_int {
    /// `CUDA_ERROR_NOT_FOUND`, and no `…_SUCCESS` elsewhere.
    const NOT_FOUND: c_int = 500;
    NOT_FOUND
}

/// First name of the library that was not found.
static MISSING: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn fill_table() {
    let mut opened = [std::ptr::null_mut::<c_void>(); LIBRARIES.len()];
    for (library, names) in opened.iter_mut().zip(LIBRARIES) {
        for name in names {
            if library.is_null() {
                // SAFETY: a C string; CUDA's libraries may be opened at any time.
                *library = unsafe { dlopen(name.as_ptr(), NOW_AND_GLOBAL) };
            }
        }
        if library.is_null() {
            // Without one of them the others are of no use, and they are large.
            MISSING.store(names[0].as_ptr().cast_mut(), Ordering::Relaxed);
            break;
        }
    }
    for (slot, (library, name)) in TABLE.iter().zip(&FUNCTIONS) {
        let mut function = std::ptr::null_mut();
        if !opened[*library].is_null() {
            // SAFETY: an open library and a C string.
            function = unsafe { dlsym(opened[*library], name.as_ptr()) };
        }
        if !function.is_null() {
            slot.store(function, Ordering::Relaxed);
        }
    }
}

/// Runs before the constructors without a number.
#[used]
#[unsafe(link_section = ".init_array.00101")]
static FILL_TABLE: extern "C" fn() = fill_table;

/// A library that is needed and was not found.
#[must_use]
pub fn missing() -> Option<String> {
    let name = MISSING.load(Ordering::Relaxed);
    // SAFETY: null, or one of the names above, which end in a zero.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}
