use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::{command, path};

/// Runs `unimo` as a user who may not write into `folder`, which root always may; `reads` are files that this user must reach.
/// Afterwards the folder can be written again.
///
/// # Panics
/// Where the program cannot be built or started, or rights not be changed.
#[must_use]
pub fn without_rights(folder: &Path, reads: &[&Path], arguments: &[&str]) -> Output {
    let allow =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a file of the test's own");
    allow(folder, 0o555);
    let mut command = command("unimo");
    if fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
        // A copy where everybody may go: the build folder need not be such a place. Another process writes it: a child that another
        // test starts at that moment would inherit a file open for writing here, and the kernel starts no program that is (ETXTBSY).
        let program = folder.with_file_name("unimo");
        let copied = Command::new("cp").args([&path("unimo"), &program]).status().expect("cp can be started");
        assert!(copied.success(), "the folder's own folder can be written");
        for open in [folder.parent().expect("a folder of the test's own"), program.as_path()].iter().chain(reads) {
            allow(open, 0o755);
        }
        command = Command::new(program);
        command.uid(65_534).gid(65_534);
    }
    // That user need not reach the folder of ONNX Runtime either; the engine is not what is tested here.
    let output = command.env("UNIMO_ENGINE", "tract").args(arguments).stdin(Stdio::null()).output();
    allow(folder, 0o755);
    output.expect("a program that was built can be started")
}
