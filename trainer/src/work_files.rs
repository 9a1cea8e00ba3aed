//! Results of long jobs as folders: one file a shard, each whole or absent, and a file that says what all of them were made of.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Name of shard number `number`'s file.
#[must_use]
pub fn file_name(number: usize, shard: &Path) -> String {
    let stem = shard.file_stem().map_or_else(|| "shard".into(), |s| s.to_string_lossy());
    format!("{number:04}-{stem}.jsonl")
}

/// Makes a folder the job's that `about` describes, or refuses it: `name` in it holds that description.
///
/// # Errors
/// A folder that another job has, or that cannot be written.
pub fn claim(folder: &Path, name: &str, about: &impl Serialize) -> Result<()> {
    let text = toml::to_string(about)?;
    let path = folder.join(name);
    match std::fs::read_to_string(&path) {
        Ok(found) if found == text => Ok(()),
        Ok(_) => bail!("{} was made from other data or by other settings; choose another --out", folder.display()),
        Err(_) => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            write_whole(&path, text.as_bytes())
        }
    }
}

/// Writes one JSON object a line.
///
/// # Errors
/// As [`write_whole`].
pub fn write_lines(path: &Path, lines: &[impl Serialize]) -> Result<()> {
    let mut text = String::new();
    for line in lines {
        let _ = writeln!(text, "{}", serde_json::to_string(line)?);
    }
    write_whole(path, text.as_bytes())
}

/// Writes a file that appears under its name only when all of it is on the disk.
///
/// # Errors
/// A full disk, missing rights.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&partial)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads every line of a folder's `.jsonl` files, in the order of their names. `name` and `command` are the description that such
/// a folder holds and the subcommand that makes it.
///
/// # Errors
/// A folder without the description, or a damaged line, by its number.
pub fn read_lines<T: DeserializeOwned>(folder: &Path, name: &str, command: &str) -> Result<Vec<T>> {
    if !folder.join(name).is_file() {
        bail!("{} is no result of `unimo-train {command}`, which makes {name}", folder.display());
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    files.sort();
    let mut lines = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for (number, line) in text.lines().enumerate() {
            lines.push(serde_json::from_str(line).with_context(|| format!("line {} of {}", number + 1, file.display()))?);
        }
    }
    Ok(lines)
}
