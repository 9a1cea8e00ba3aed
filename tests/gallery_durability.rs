//! Promise: what `unimo index add` has acknowledged is on the disk whatever happens next: kill -9, a full disk, another writer.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use unimo_tests::index::{add, exported, scratch, stats, statuses};
use unimo_tests::{command, program};

/// A bundle of random weights: it sees little, but the same every time.
static BUNDLE: LazyLock<String> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gallery_durability");
    unimo_export::sample::random_bundle(&folder, 5).unwrap().to_str().unwrap().to_owned()
});

/// What a run that did not end well must have left: all it acknowledged, in a sound file, that the rest can be added to.
fn check_survivors(gallery: &str, acknowledged: &[(String, String)], pictures: &[String]) {
    let run = program("unimo", &["index", "verify", "--gallery", gallery]);
    assert_eq!(run.code, 0, "{run:?}");
    let stored = exported(gallery);
    for (source, status) in acknowledged {
        assert_eq!(status, "added");
        assert!(stored.contains(source), "{source} was acknowledged and is gone");
    }
    let names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    let again = add(&BUNDLE, gallery, &names);
    assert_eq!(again.code, 0, "{again:?}");
    for (source, status) in statuses(&again.stdout) {
        assert_eq!(status == "unchanged", stored.contains(&source), "{source}: {status}");
    }
    assert_eq!(stats(gallery)["images"], pictures.len());
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
    for after in [0, 1, 6] {
        let (_folder, pictures, gallery) = scratch(16);
        let mut child = command("unimo")
            .args(["index", "add", "--jsonl", "--gallery", &gallery, "--bundle", &BUNDLE])
            .args(&pictures)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut printed = String::new();
        for _ in 0..after {
            output.read_line(&mut printed).unwrap();
        }
        if after == 0 {
            // While the file is being made.
            while !Path::new(&gallery).exists() && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "it was done before it could be killed");
        output.read_to_string(&mut printed).unwrap();
        // A last line may have been cut in two; only whole ones acknowledge.
        let whole = printed.rfind('\n').map_or("", |end| &printed[..end]);
        let acknowledged = statuses(whole);
        assert!(acknowledged.len() >= after && acknowledged.len() < pictures.len());
        if after == 0 {
            assert_eq!(add(&BUNDLE, &gallery, &[&pictures[0]]).code, 0, "an unfinished gallery is begun again");
        }
        check_survivors(&gallery, &acknowledged, &pictures);
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_said_and_loses_nothing() {
    let (_folder, pictures, gallery) = scratch(16);
    // No file may grow beyond 120 blocks of 512 or 1024 bytes, as the shell counts.
    let unimo = command("unimo");
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 120; exec \"$0\" \"$@\""])
        .arg(unimo.get_program())
        .args(unimo.get_args())
        .args(["index", "add", "--jsonl", "--gallery", &gallery, "--bundle", &BUNDLE])
        .args(&pictures)
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(3), "{stdout}{stderr}");
    assert!(stderr.contains("everything acknowledged before is stored") && stderr.lines().count() == 1, "{stderr}");
    let acknowledged = statuses(&stdout);
    assert!((1..pictures.len()).contains(&acknowledged.len()), "{}", acknowledged.len());
    check_survivors(&gallery, &acknowledged, &pictures);
}

#[test]
fn nothing_is_acknowledged_before_it_is_stored() {
    let (_folder, pictures, gallery) = scratch(2);
    assert_eq!(add(&BUNDLE, &gallery, &["--no-captions", &pictures[0]]).code, 0);
    // While this transaction lasts, nobody else's can.
    let other = rusqlite::Connection::open(&gallery).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut child = command("unimo")
        .args(["index", "add", "--jsonl", "--no-captions", "--gallery", &gallery, "--bundle", &BUNDLE, &pictures[1]])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    child.kill().unwrap();
    child.wait().unwrap();
    let mut printed = String::new();
    child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert_eq!(printed, "");
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(exported(&gallery), pictures[..1]);
}
