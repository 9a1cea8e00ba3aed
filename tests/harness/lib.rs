//! What the end-to-end tests share: the programs, built once, and how to run them.

pub mod index;
mod onnx_runtime;
pub mod reference;
#[cfg(unix)]
mod rights;

use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;

pub use onnx_runtime::ort_is_there;
#[cfg(unix)]
pub use rights::without_rights;

/// What a program did.
#[derive(Debug)]
pub struct Run {
    /// Exit code; −1 where a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// The JSON objects on standard output, one a line.
    ///
    /// # Panics
    /// Where a line is no JSON.
    #[must_use]
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}\n{}", self.stderr));
        self.stdout.lines().map(parse).collect()
    }
}

/// Runs one of this workspace's programs to its end, with nothing on standard input.
///
/// # Panics
/// Where it cannot be built or started, or prints what is no UTF-8.
#[must_use]
pub fn program(name: &str, arguments: &[&str]) -> Run {
    program_with_input(name, arguments, &[])
}

/// Runs one of this workspace's programs to its end, with so many bytes on standard input.
///
/// # Panics
/// Those of [`program`].
#[must_use]
pub fn program_with_input(name: &str, arguments: &[&str], input: &[u8]) -> Run {
    let mut child = command(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut stdin = child.stdin.take().expect("piped");
    let output = thread::scope(|scope| {
        // A program that does not read its input closes it early; that is its right.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().expect("a child that was started can be waited for")
    });
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    Run { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// One of this workspace's programs, to be given arguments and started. Where `UNIMO_PROGRAM` names another `unimo`, one built for
/// a board, it is that; `UNIMO_RUNNER` then holds the words that run it here, as in `qemu-aarch64 -L /usr/aarch64-linux-gnu`.
///
/// # Panics
/// Where it cannot be built.
#[must_use]
pub fn command(name: &str) -> Command {
    let Some(other) = env::var_os("UNIMO_PROGRAM").filter(|_| name == "unimo") else {
        return Command::new(path(name));
    };
    let runner = env::var("UNIMO_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace();
    let Some(emulator) = words.next() else {
        return Command::new(other);
    };
    let mut command = Command::new(emulator);
    command.args(words).arg(other);
    command
}

/// The engine that the programs run on unless a test says otherwise: the one that `UNIMO_ENGINE` names, as for every user.
#[must_use]
pub fn engine() -> String {
    env::var("UNIMO_ENGINE").unwrap_or_else(|_| "tract".to_owned())
}

/// Where a program lies; all are built at the first call, in the profile of the tests.
///
/// # Panics
/// Where they cannot be built.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        // target/<profile>/deps/<test>-<hash>
        let test = env::current_exe().expect("a running test has a path");
        let folder = test.parent().and_then(|deps| deps.parent()).expect("tests lie in target/<profile>/deps").to_path_buf();
        let mut build = Command::new(env!("CARGO"));
        // All targets, so that features are those of `cargo test --workspace` and nothing is compiled twice.
        build.args(["build", "--quiet", "--workspace", "--all-targets"]);
        if folder.file_name().is_some_and(|profile| profile == "release") {
            build.arg("--release");
        }
        let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo starts");
        assert!(built.success(), "the programs do not build");
        folder
    });
    folder.join(format!("{name}{}", env::consts::EXE_SUFFIX))
}
