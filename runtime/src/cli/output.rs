//! Machine-readable lines on standard output, and a progress bar that does not get in their way.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::exit;

/// Version of the JSON that the commands print.
pub const SCHEMA: u32 = 1;

/// A source that gave no result.
#[derive(Debug, Serialize)]
pub struct ErrorLine<'a> {
    pub schema: u32,
    #[serde(flatten)]
    pub of: Subject<'a>,
    pub error: &'a str,
}

/// What a line is about.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject<'a> {
    Source(&'a str),
    Text(&'a str),
}

/// Milliseconds, to the microsecond.
pub fn milliseconds(time: std::time::Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Results on standard output and complaints on standard error, around a progress bar where there is a terminal to show it.
pub struct Output {
    bar: ProgressBar,
    /// The exit code of the first failure.
    failed: Option<u8>,
}

impl Output {
    /// Output of a command that will give so many results; one needs no bar.
    pub fn new(results: usize) -> Self {
        let bar = if results > 1 && io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:32} {pos}/{len} {per_sec} {eta} left");
            ProgressBar::new(results as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        } else {
            ProgressBar::hidden()
        };
        Self { bar, failed: None }
    }

    /// Prints a line.
    pub fn line(&self, line: &str) -> io::Result<()> {
        self.bar.suspend(|| writeln!(io::stdout(), "{line}"))
    }

    /// Prints an object on a line.
    pub fn json(&self, object: &impl Serialize) -> anyhow::Result<()> {
        Ok(self.line(&serde_json::to_string(object)?)?)
    }

    /// Notes that a source or text gave no result, and why: as an object on a line (`jsonl`), as an object that is returned for
    /// the document to come (`json`), else in words on standard error.
    pub fn failure(
        &mut self,
        of: Subject<'_>,
        error: &str,
        json: bool,
        jsonl: bool,
    ) -> anyhow::Result<Option<serde_json::Value>> {
        self.failed_with(exit::BAD_INPUT);
        let line = ErrorLine { schema: SCHEMA, of, error };
        if json {
            return Ok(Some(serde_json::to_value(line)?));
        }
        if jsonl {
            self.json(&line)?;
        } else {
            let (Subject::Source(name) | Subject::Text(name)) = of;
            if error.contains(name) {
                self.complain(&format!("error: {error}"));
            } else {
                self.complain(&format!("error: {name}: {error}"));
            }
        }
        Ok(None)
    }

    /// Notes the exit code of a failure that is about to be told; the first one stays.
    pub fn failed_with(&mut self, code: u8) {
        self.failed.get_or_insert(code);
    }

    /// Says something on standard error.
    pub fn complain(&self, sentence: &str) {
        self.bar.suspend(|| eprintln!("{sentence}"));
    }

    /// One result more is out.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// The exit code: that of the first failure, bad input unless told otherwise.
    pub fn finish(self) -> ExitCode {
        self.bar.finish_and_clear();
        ExitCode::from(self.failed.unwrap_or(0))
    }
}
