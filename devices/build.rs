//! Lists the boards: every file of `boards/` is compiled in, so that adding a board is adding a file.

use std::env::var_os;
use std::fmt::Write;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=boards");
    if let Err(error) = list() {
        println!("cargo::error=cannot list the boards: {error}");
    }
}

fn list() -> Result<(), Box<dyn std::error::Error>> {
    let folder = PathBuf::from(var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?).join("boards");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|ending| ending == "toml"));
    files.sort();
    let mut source = String::from("[\n");
    for file in files {
        let name = file.file_stem().and_then(|name| name.to_str()).ok_or("a file's name is not UTF-8")?;
        // The text itself, not the file's path: the folder of compiled things may outlive this checkout.
        writeln!(source, "    ({name:?}, {:?}),", std::fs::read_to_string(&file)?)?;
    }
    source.push_str("]\n");
    let out = PathBuf::from(var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    Ok(std::fs::write(out.join("boards.rs"), source)?)
}
