//! Where ONNX Runtime's shared library is looked for.

use std::env;
use std::path::{Path, PathBuf};

/// The variable that names the library, as in other programs on ONNX Runtime.
pub(super) const VARIABLE: &str = "ORT_DYLIB_PATH";

/// Folders that are searched, in order: the program's own, those of the system, and those into which `pip install onnxruntime`
/// (or NVIDIA's wheels for Jetson) puts it.
pub(super) fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf())).into_iter().collect();
    let home = env::var_os("HOME").map(PathBuf::from);
    let triple = format!("{}-{}-gnu", env::consts::ARCH, env::consts::OS);
    for prefix in ["/usr/local", "/opt/onnxruntime", "/usr"] {
        folders.extend([
            format!("{prefix}/lib").into(),
            format!("{prefix}/lib/{triple}").into(),
            format!("{prefix}/lib64").into(),
        ]);
    }
    folders.extend(home.iter().map(|home| home.join(".local/lib")));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let prefixes = environments.chain(home.map(|home| home.join(".local"))).chain(["/usr/local".into(), "/usr".into()]);
    prefixes.for_each(|prefix| folders.extend(of_python(&prefix)));
    folders
}

/// Folders below `prefix` that hold the library of an installed Python package.
fn of_python(prefix: &Path) -> Vec<PathBuf> {
    let pythons = |lib: &str| std::fs::read_dir(prefix.join(lib)).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_python = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"));
    let mut found: Vec<PathBuf> = pythons("lib").chain(pythons("lib64")).filter(is_python).collect();
    // By number: Python 3.11 is newer than 3.9.
    let minor = |path: &PathBuf| path.to_str()?.rsplit_once("python3.")?.1.parse::<u32>().ok();
    found.sort_by_key(minor);
    let packages =
        |python: PathBuf| ["site-packages", "dist-packages"].map(|packages| python.join(packages).join("onnxruntime/capi"));
    found.into_iter().rev().flat_map(packages).filter(|folder| folder.is_dir()).collect()
}

/// The newest library in a folder.
pub(super) fn newest_in(folder: &Path) -> Option<PathBuf> {
    let bare = format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let versioned = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        // libonnxruntime.so.1.32.0 on Linux, libonnxruntime.1.32.0.dylib on macOS; the providers' libraries have other names.
        let rest = match name.strip_prefix(&bare) {
            Some(rest) => rest,
            None => name.strip_prefix("libonnxruntime.")?.strip_suffix(".dylib")?,
        };
        let numbers: Option<Vec<u32>> = rest.split('.').filter(|part| !part.is_empty()).map(|part| part.parse().ok()).collect();
        Some((numbers?, path))
    };
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    Some(files.filter_map(versioned).max()?.1)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_newest_library_is_taken_and_nothing_that_looks_like_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["libonnxruntime_providers_shared.so", "libonnxruntime.so.old", "onnxruntime.txt"] {
            fs::write(path(name), "").unwrap();
        }
        fs::create_dir(path("libonnxruntime.so.99")).unwrap();
        assert_eq!(newest_in(folder.path()), None);
        for (name, newest) in [
            ("libonnxruntime.so", "libonnxruntime.so"),
            ("libonnxruntime.so.1.9.0", "libonnxruntime.so.1.9.0"),
            ("libonnxruntime.so.1.32.0", "libonnxruntime.so.1.32.0"),
            ("libonnxruntime.so.1.4.2", "libonnxruntime.so.1.32.0"),
        ] {
            fs::write(path(name), "").unwrap();
            assert_eq!(newest_in(folder.path()), Some(path(newest)), "after {name}");
        }
        assert_eq!(newest_in(&path("none")), None);
    }

    #[test]
    fn python_packages_are_found_newest_python_first() {
        let prefix = tempfile::tempdir().unwrap();
        let folder =
            |python: &str, packages: &str| prefix.path().join("lib").join(python).join(packages).join("onnxruntime/capi");
        for path in [folder("python3.11", "dist-packages"), folder("python3.9", "site-packages"), folder("ruby", "site-packages")]
        {
            fs::create_dir_all(path).unwrap();
        }
        let found = of_python(prefix.path());
        assert_eq!(found, [folder("python3.11", "dist-packages"), folder("python3.9", "site-packages")]);
    }
}
