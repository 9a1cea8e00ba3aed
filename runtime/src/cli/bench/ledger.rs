//! The ledger: a file of measurements that grows a line for each row of each run, so that boards and versions can be compared.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use super::super::output::SCHEMA;
use super::report::Row;

/// A ledger that is open to be added to.
pub struct Ledger {
    file: File,
    whole_lines: bool,
}

/// Where something was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The board's or processor's name, where the system tells it.
    pub name: Option<String>,
    /// Architecture and system.
    pub target: String,
    /// Processors.
    pub processors: usize,
    /// Bytes of memory, where the system tells.
    pub memory: Option<u64>,
}

/// What all rows of a run have in common.
#[derive(Debug, Serialize)]
pub struct Run<'a> {
    /// When it ended: RFC 3339, UTC.
    pub date: String,
    /// This program's.
    pub version: &'a str,
    /// The commit that it was built of, where the build was told (`UNIMO_COMMIT`).
    pub commit: Option<&'a str>,
    pub machine: Machine,
    pub bundle: &'a str,
    pub model: &'a str,
    pub threads: usize,
    pub rounds: u32,
}

/// A line of the ledger.
#[derive(Serialize)]
struct Line<'a> {
    schema: u32,
    #[serde(flatten)]
    run: &'a Run<'a>,
    #[serde(flatten)]
    row: &'a Row,
}

impl Ledger {
    /// Opens a ledger or begins one; before anything is measured, so that nothing is measured in vain.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> std::io::Result<Self> {
            let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
            // A line that was cut short stays by itself.
            let mut last = [b'\n'];
            if file.metadata()?.len() > 0 {
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
            }
            Ok(Self { file, whole_lines: last == [b'\n'] })
        };
        open().with_context(|| format!("cannot write the ledger {}", path.display()))
    }

    /// Adds a line for each row, at once: other processes may add theirs.
    pub fn add(&mut self, run: &Run<'_>, rows: &[Row]) -> anyhow::Result<()> {
        let mut text = String::from(if self.whole_lines { "" } else { "\n" });
        for row in rows {
            text.push_str(&serde_json::to_string(&Line { schema: SCHEMA, run, row })?);
            text.push('\n');
        }
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()).context("cannot write the ledger")
    }
}

/// The time, to the second.
pub fn now() -> String {
    let seconds = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let board = read("/proc/device-tree/model").map(|name| name.trim_matches(['\0', '\n', ' ']).to_owned());
        let processor = || named(&read("/proc/cpuinfo")?, "model name").map(str::to_owned);
        let memory = || named(&read("/proc/meminfo")?, "MemTotal")?.strip_suffix("kB")?.trim().parse::<u64>().ok();
        Self {
            name: board.or_else(processor),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            processors: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            memory: memory().map(|kilobytes| 1024 * kilobytes),
        }
    }
}

/// The value of the first line `name: value`.
fn named<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let of = |line: &'a str| Some(line.strip_prefix(name)?.trim_start().strip_prefix(':')?.trim());
    text.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_tells() {
        let text = "processor\t: 0\nmodel name\t: Cortex-A76\nmodel name : other\nMemTotal:        8000 kB\n";
        assert_eq!(named(text, "model name"), Some("Cortex-A76"));
        assert_eq!(named(text, "MemTotal"), Some("8000 kB"));
        assert_eq!(named(text, "model"), None);
        assert!(Machine::this().processors > 0);
        assert!(now().ends_with('Z') && now().len() == "2026-11-24T12:00:00Z".len(), "{}", now());
    }

    #[test]
    fn a_line_that_was_cut_short_spoils_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        std::fs::write(&path, "{\"schema\":1}\n{\"sch").unwrap();
        let machine = Machine { name: None, target: "t".into(), processors: 1, memory: None };
        let run = Run { date: now(), version: "1", commit: None, machine, bundle: "b", model: "m", threads: 1, rounds: 1 };
        for _ in 0..2 {
            Ledger::open(&path).unwrap().add(&run, &[]).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"schema\":1}\n{\"sch\n");
        assert!(Ledger::open(folder.path()).is_err());
    }
}
