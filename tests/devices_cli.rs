//! `unimo devices`, and pictures of cameras on the command line: boards are known by what their systems tell, and a camera's
//! fault is exit code 4 and one sentence.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use image::{ImageFormat, Rgb, RgbImage};
use serde::Deserialize;
use unimo_tests::{Run, command, program, program_with_input};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Detected {
    schema: u32,
    board: Option<String>,
    title: Option<String>,
    known_by: Option<serde_json::Value>,
    machine: Machine,
    telemetry: Telemetry,
    hottest_c: Option<f64>,
    power_mw: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Machine {
    model: Option<String>,
    compatible: Vec<String>,
    jetson_linux: Option<String>,
    cores: Option<u32>,
    memory_mib: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Telemetry {
    temperatures: Vec<serde_json::Value>,
    clocks: Vec<serde_json::Value>,
    throttling: Option<serde_json::Value>,
    rails: Vec<serde_json::Value>,
    absent: Vec<String>,
}

fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        let file = folder.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, contents).unwrap();
    }
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_board_is_detected_and_told_how_it_is_doing() {
    let pi = tree(&[
        ("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0"),
        ("proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0"),
        ("proc/meminfo", "MemTotal: 8245248 kB\n"),
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
        ("sys/class/thermal/thermal_zone0/temp", "81250\n"),
        ("sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "a0008\n"),
    ]);
    let run = program("unimo", &["devices", "detect", "--json", "--root", text(pi.path())]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let found: Detected = serde_json::from_value(run.json_lines().remove(0)).unwrap();
    assert_eq!(
        (found.schema, found.board.as_deref(), found.title.as_deref()),
        (1, Some("raspberry-pi-5"), Some("Raspberry Pi 5"))
    );
    assert_eq!(found.known_by, Some(serde_json::json!({ "model": "Raspberry Pi 5 Model B Rev 1.0" })));
    let Machine { model, compatible, jetson_linux, cores, memory_mib } = found.machine;
    assert_eq!((model.as_deref(), jetson_linux, cores), (Some("Raspberry Pi 5 Model B Rev 1.0"), None, None));
    assert_eq!((compatible.len(), memory_mib), (2, Some(8052)));
    assert_eq!((found.hottest_c, found.power_mw), (Some(81.25), None));
    let Telemetry { temperatures, clocks, throttling, rails, absent } = found.telemetry;
    assert_eq!((temperatures.len(), clocks.len(), rails.len(), absent.len()), (1, 0, 0, 2));
    let expected = serde_json::json!({
        "bits": "0xa0008",
        "now": ["soft-temperature-limit"],
        "since_start": ["frequency-capped", "soft-temperature-limit"],
    });
    assert_eq!(throttling, Some(expected));

    let run = program("unimo", &["devices", "detect", "--root", text(pi.path())]);
    for line in [
        "board      Raspberry Pi 5 (raspberry-pi-5), known by its model, Raspberry Pi 5 Model B Rev 1.0",
        "heat       cpu-thermal: 81.2 °C",
        "throttling now: soft temperature limit; since the start: clock capped, soft temperature limit",
        "absent     power rails (no INA3221 monitor)",
    ] {
        assert!(run.stdout.lines().any(|found| found == line), "{line}\n{}", run.stdout);
    }
}

#[test]
fn boards_are_listed_and_shown() {
    let run = program("unimo", &["devices", "list"]);
    let names: Vec<&str> = run.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(run.code == 0 && names.len() >= 10, "{}", run.stdout);
    for name in names {
        let run = program("unimo", &["devices", "show", name, "--json"]);
        let shown = run.json_lines().remove(0);
        assert_eq!((run.code, &shown["schema"], &shown["board"]["name"]), (0, &1.into(), &name.into()), "{shown}");
    }
    let run = program("unimo", &["devices", "show", "jetson-orin-nano"]);
    for part in ["NVIDIA Jetson Orin Nano", "engines    ort on tensorrt, then", "camera     csi://0", "power      VDD_IN"] {
        assert!(run.stdout.contains(part), "{part}\n{}", run.stdout);
    }
    let run = program("unimo", &["devices", "show", "abacus"]);
    assert!(run.code == 2 && run.stderr.contains("there is no board abacus"), "{}", run.stderr);
}

fn jpeg() -> Vec<u8> {
    let picture = RgbImage::from_fn(64, 48, |x, y| Rgb([x as u8 * 3, 90, y as u8 * 4]));
    let mut bytes = Vec::new();
    picture.write_to(&mut std::io::Cursor::new(&mut bytes), ImageFormat::Jpeg).unwrap();
    bytes
}

#[test]
fn a_camera_gives_its_next_picture() {
    let run = program("unimo", &["caption", "--jsonl", "test://scenes?seed=4", "test://scenes?seed=5"]);
    let lines = run.json_lines();
    assert_eq!((run.code, lines.len()), (0, 2), "{}", run.stderr);
    assert_eq!((&lines[0]["source"], &lines[1]["source"]), (&"test://scenes?seed=4".into(), &"test://scenes?seed=5".into()));

    // The same picture as a file and as a stream.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.jpg");
    fs::write(&file, jpeg()).unwrap();
    let of_file = program("unimo", &["embed", "--image", text(&file)]);
    let of_stream = program_with_input("unimo", &["embed", "--image", "pipe://-"], &[jpeg(), jpeg()].concat());
    assert_eq!((of_file.code, of_stream.code), (0, 0), "{}", of_stream.stderr);
    assert_eq!(of_file.stdout, of_stream.stdout);
}

/// Runs `unimo` where no program but those in a folder is found.
fn with_path(folder: &Path, arguments: &[&str]) -> Run {
    let output = command("unimo").args(arguments).env("PATH", folder).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[cfg(unix)]
#[test]
fn a_camera_module_is_read_through_its_program() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("rpicam-vid");
    let install = |body: &str| {
        fs::write(&script, format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let picture = folder.path().join("a.jpg");
    fs::write(&picture, jpeg()).unwrap();
    install(&format!("while cat {}; do sleep 0.1; done", text(&picture)));
    let run = with_path(folder.path(), &["caption", "rpicam://0?size=64x48"]);
    assert!(run.code == 0 && !run.stdout.trim().is_empty() && run.stderr.is_empty(), "{run:?}");

    install("echo 'ERROR: *** no cameras available ***' >&2; exit 255");
    let run = with_path(folder.path(), &["caption", "rpicam://0"]);
    assert_eq!((run.code, run.stdout.as_str()), (4, ""));
    assert_eq!(run.stderr, "error: rpicam://0: rpicam-vid ended with exit status: 255: ERROR: *** no cameras available ***\n");

    let run = with_path(&folder.path().join("nothing"), &["caption", "--jsonl", "csi://0"]);
    assert_eq!(run.code, 4);
    assert_eq!(run.json_lines()[0]["error"], "csi://0: none of these programs is installed: gst-launch-1.0");
}
