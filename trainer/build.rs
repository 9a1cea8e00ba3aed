//! With the feature `cuda`: compiles the kernels, and writes the doors to CUDA's libraries (see `src/ops/cuda/libraries.rs`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "src/ops/cuda/kernels";
/// Each library's file names, most wanted first, and its functions that are called.
const FUNCTIONS: &str = "src/ops/cuda/libraries.txt";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed={KERNELS}");
    println!("cargo:rerun-if-changed={FUNCTIONS}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    write_doors(&out);
    let nvcc = nvcc();
    for entry in fs::read_dir(KERNELS).into_iter().flatten().flatten() {
        let source = entry.path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            compile(&nvcc, &source, &out);
        }
    }
}

/// The compiler that is named, or that of the CUDA that is named, or the usual one, or that on the path.
fn nvcc() -> PathBuf {
    if let Some(named) = env::var_os("NVCC") {
        return named.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let candidates = homes.chain([PathBuf::from("/usr/local/cuda")]).map(|home| home.join("bin/nvcc"));
    candidates.into_iter().find(|nvcc| nvcc.is_file()).unwrap_or_else(|| "nvcc".into())
}

/// Code for capability 8.0, which the driver makes into that of the device at hand, now and in years to come.
fn compile(nvcc: &Path, source: &Path, out: &Path) {
    let name = source.file_stem().unwrap_or_default();
    let target = out.join(name).with_extension("ptx");
    let done = Command::new(nvcc)
        .args(["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-o"])
        .args([target.as_path(), source])
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "the feature `cuda` needs nvcc of CUDA 12 or 13, and {} does not run ({error}); trainer/gpu/toolchain.sh \
                 fetches one",
                nvcc.display()
            )
        });
    assert!(
        done.status.success(),
        "nvcc does not compile {}:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
}

/// Names of the libraries and their functions, a table, and in it a place for each function with an instruction that jumps there.
fn write_doors(out: &Path) {
    let list = fs::read_to_string(FUNCTIONS).unwrap_or_else(|error| panic!("cannot read {FUNCTIONS}: {error}"));
    let (mut libraries, mut functions) = (Vec::new(), Vec::new());
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix("library ") {
            Some(names) => libraries.push(names.split(' ').map(|name| format!("c\"{name}\"")).collect::<Vec<_>>().join(", ")),
            None => functions.push((libraries.len() - 1, line)),
        }
    }
    let mut text = format!("const LIBRARIES: [&[&CStr]; {}] = [\n", libraries.len());
    for names in &libraries {
        text += &format!("    &[{names}],\n");
    }
    text += &format!("];\nstatic FUNCTIONS: [(usize, &CStr); {}] = [\n", functions.len());
    for (library, name) in &functions {
        text += &format!("    ({library}, c\"{name}\"),\n");
    }
    let count = functions.len();
    text += "];\nconst NOT_THERE: extern \"C\" fn() -> c_int = not_there;\n";
    text += &format!(
        "static TABLE: [AtomicPtr<c_void>; {count}] = [const {{ AtomicPtr::new(NOT_THERE as *mut c_void) }}; {count}];\n"
    );
    text += "std::arch::global_asm!(\n    \".text\",\n";
    for (number, (_, name)) in functions.iter().enumerate() {
        let at = 8 * number;
        let jump = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
            Ok("x86_64") => format!("    \"jmp qword ptr [rip + {{table}} + {at}]\",\n"),
            Ok("aarch64") => {
                format!("    \"adrp x16, {{table}} + {at}\",\n    \"ldr x16, [x16, :lo12:{{table}} + {at}]\",\n    \"br x16\",\n")
            }
            other => panic!("the feature `cuda` is for x86-64 and aarch64, not {other:?}"),
        };
        text += &format!(
            "    \".globl {name}\",\n    \".hidden {name}\",\n    \".type {name}, %function\",\n    \"{name}:\",\n{jump}"
        );
    }
    text += "    table = sym TABLE,\n);\n";
    fs::write(out.join("doors.rs"), text).unwrap_or_else(|error| panic!("cannot write the doors: {error}"));
}
