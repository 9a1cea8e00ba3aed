//! Which board this is: by the device tree, `/etc/nv_tegra_release` and `/proc/cpuinfo`.

use std::path::Path;

use serde::Serialize;

use super::{Board, BoardError, Detect};

/// What the system tells about the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// `model` of the device tree, or the line of that name in `/proc/cpuinfo`.
    pub model: Option<String>,
    /// `compatible` of the device tree, the most particular first.
    pub compatible: Vec<String>,
    /// Version of Jetson Linux, such as `35.4.1`.
    pub jetson_linux: Option<String>,
    /// Cores that are switched on.
    pub cores: Option<usize>,
    /// Instruction sets of the processor, as the kernel names them.
    #[serde(skip)]
    pub features: Vec<String>,
    /// Memory that the kernel has, in MiB.
    pub memory_mib: Option<u64>,
}

/// What a board was known by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Its model's name.
    Model(String),
    /// An entry of the device tree's `compatible`.
    Compatible(String),
    /// Nothing but its architecture.
    Architecture(String),
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Model(model) => write!(f, "its model, {model}"),
            Self::Compatible(entry) => write!(f, "its device tree, {entry}"),
            Self::Architecture(architecture) => write!(f, "its architecture alone, {architecture}"),
        }
    }
}

/// A board and how it was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Detected {
    /// The board, and what it was known by; `None` where no file describes such a machine.
    pub board: Option<(Board, Evidence)>,
    /// What the system tells.
    pub machine: Machine,
}

/// Finds out which board this is, from the files under `root`; `architecture` is the processor's, as in
/// [`std::env::consts::ARCH`].
///
/// # Errors
/// A board's file that cannot be read: a fault of this program's build. Files of the system that are not there are none.
pub fn detect(root: &Path, architecture: &str) -> Result<Detected, BoardError> {
    let machine = Machine::read(root);
    Ok(Detected { board: find(super::all()?, &machine, architecture), machine })
}

fn find(boards: Vec<Board>, machine: &Machine, architecture: &str) -> Option<(Board, Evidence)> {
    let found = boards.into_iter().filter_map(|board| Some((evidence(&board, machine, architecture)?, board)));
    found.min_by_key(|((rank, _), _)| *rank).map(|((_, evidence), board)| (board, evidence))
}

/// Why a machine is such a board, and how weak a reason that is.
fn evidence(board: &Board, machine: &Machine, architecture: &str) -> Option<(u8, Evidence)> {
    let Detect { model: names, compatible: parts, architecture: any } = &board.detect;
    // The name before the number: boards of a family share entries of the device tree.
    if let Some(model) = machine.model.as_ref().filter(|model| names.iter().any(|name| holds_words(model, name))) {
        return Some((0, Evidence::Model(model.clone())));
    }
    if let Some(entry) = machine.compatible.iter().find(|entry| parts.iter().any(|part| entry.contains(part))) {
        return Some((1, Evidence::Compatible(entry.clone())));
    }
    let any = any.as_ref().filter(|any| *any == architecture)?;
    Some((2, Evidence::Architecture(any.clone())))
}

/// Whether a text holds a part that does not end within a word: a Pi 4 is no Pi 400.
fn holds_words(text: &str, part: &str) -> bool {
    text.match_indices(part).any(|(at, _)| {
        let next = text[at + part.len()..].chars().next();
        next.is_none_or(|next| !next.is_alphanumeric())
    })
}

impl Machine {
    /// Reads what the system tells, from the files under `root`.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let read = |path: &str| std::fs::read(root.join(path)).unwrap_or_default();
        let text = |path: &str| String::from_utf8_lossy(&read(path)).into_owned();
        // Texts of a device tree end in a zero.
        let tree = |name: &str| -> Vec<String> {
            let bytes = read(&format!("proc/device-tree/{name}"));
            let texts = bytes.split(|byte| *byte == 0).filter(|text| !text.is_empty());
            texts.map(|text| String::from_utf8_lossy(text).trim().to_owned()).collect()
        };
        let processor = text("proc/cpuinfo");
        let value = |name: &str| {
            processor.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            })
        };
        let cores = processor.lines().filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "processor")).count();
        let features = value("Features").or_else(|| value("flags")).unwrap_or_default();
        let memory = text("proc/meminfo");
        let memory_kib =
            memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            model: tree("model").into_iter().next().or_else(|| value("Model")),
            compatible: tree("compatible"),
            jetson_linux: jetson_linux(&text("etc/nv_tegra_release")),
            cores: (cores > 0).then_some(cores),
            features: features.split_whitespace().map(str::to_owned).collect(),
            memory_mib: memory_kib.map(|kib| kib / 1024),
        }
    }
}

/// The version in a line such as `# R35 (release), REVISION: 4.1, GCID: …`.
fn jetson_linux(release: &str) -> Option<String> {
    let line = release.lines().next()?.strip_prefix("# R")?;
    let (major, rest) = line.split_once(' ')?;
    let revision = rest.split("REVISION: ").nth(1)?.split(',').next()?.trim();
    let numbers = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.');
    (numbers(major) && numbers(revision)).then(|| format!("{major}.{revision}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A recorded machine: its architecture, `model` and `compatible` of its device tree, and other files.
    struct Case {
        architecture: &'static str,
        model: &'static str,
        compatible: &'static str,
        files: &'static [(&'static str, &'static str)],
        board: Option<&'static str>,
        evidence: &'static str,
        jetson_linux: Option<&'static str>,
        cores: Option<usize>,
        memory_mib: Option<u64>,
    }

    const UNKNOWN: Case = Case {
        architecture: "aarch64",
        model: "",
        compatible: "",
        files: &[],
        board: None,
        evidence: "",
        jetson_linux: None,
        cores: None,
        memory_mib: None,
    };

    /// `/proc/cpuinfo` of a Raspberry Pi 4 (Raspberry Pi OS 11, 64 bits), two of its four cores left out.
    const PI_4_CPUINFO: &str = "\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

processor\t: 1
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

Hardware\t: BCM2835
Revision\t: c03115
Serial\t\t: 10000000abcdef01
Model\t\t: Raspberry Pi 4 Model B Rev 1.5
";

    /// Contents as these boards' owners published them (forums, bug reports and device trees): Raspberry Pi's and NVIDIA's
    /// `model`, the `compatible` of `bcm27*-rpi-*.dts` and `tegra*-p*.dts`, and `/etc/nv_tegra_release` of Jetson Linux.
    const CASES: &[Case] = &[
        Case {
            model: "Raspberry Pi Zero 2 W Rev 1.0\0",
            compatible: "raspberrypi,model-zero-2-w\0brcm,bcm2837\0",
            files: &[("proc/meminfo", "MemTotal:         437064 kB\nMemFree:           37952 kB\n")],
            board: Some("raspberry-pi-zero-2-w"),
            evidence: "its model, Raspberry Pi Zero 2 W Rev 1.0",
            memory_mib: Some(426),
            ..UNKNOWN
        },
        Case {
            // Raspberry Pi OS with 32 bits.
            architecture: "arm",
            model: "Raspberry Pi 3 Model B Plus Rev 1.3\0",
            compatible: "raspberrypi,3-model-b-plus\0brcm,bcm2837\0",
            board: Some("raspberry-pi-3b-plus"),
            evidence: "its model, Raspberry Pi 3 Model B Plus Rev 1.3",
            ..UNKNOWN
        },
        Case {
            // A container without the device tree.
            files: &[("proc/cpuinfo", PI_4_CPUINFO)],
            board: Some("raspberry-pi-4"),
            evidence: "its model, Raspberry Pi 4 Model B Rev 1.5",
            cores: Some(2),
            ..UNKNOWN
        },
        Case {
            model: "Raspberry Pi 5 Model B Rev 1.0\0",
            compatible: "raspberrypi,5-model-b\0brcm,bcm2712\0",
            board: Some("raspberry-pi-5"),
            evidence: "its model, Raspberry Pi 5 Model B Rev 1.0",
            ..UNKNOWN
        },
        Case {
            // A board of the family that no file describes.
            model: "Raspberry Pi 400 Rev 1.0\0",
            compatible: "raspberrypi,400\0brcm,bcm2711\0",
            board: Some("generic-aarch64"),
            evidence: "its architecture alone, aarch64",
            ..UNKNOWN
        },
        Case {
            model: "Raspberry Pi 500 Rev 1.0\0",
            compatible: "raspberrypi,500\0brcm,bcm2712\0",
            board: Some("generic-aarch64"),
            evidence: "its architecture alone, aarch64",
            ..UNKNOWN
        },
        Case {
            model: "NVIDIA Jetson Nano Developer Kit\0",
            compatible: "nvidia,p3450-0000\0nvidia,jetson-nano\0nvidia,tegra210\0",
            files: &[(
                "etc/nv_tegra_release",
                "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: Sat Feb 19 17:05:08 UTC 2022\n",
            )],
            board: Some("jetson-nano"),
            evidence: "its model, NVIDIA Jetson Nano Developer Kit",
            jetson_linux: Some("32.7.1"),
            ..UNKNOWN
        },
        Case {
            // The module on another maker's carrier board.
            model: "Acme Vision Carrier\0",
            compatible: "nvidia,p3509-0000+p3668-0001\0nvidia,tegra194\0",
            files: &[(
                "etc/nv_tegra_release",
                "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 19:57:35 UTC 2023\n",
            )],
            board: Some("jetson-xavier-nx"),
            evidence: "its device tree, nvidia,p3509-0000+p3668-0001",
            jetson_linux: Some("35.4.1"),
            ..UNKNOWN
        },
        Case {
            model: "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            compatible: "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
            files: &[("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")],
            board: Some("jetson-orin-nano"),
            evidence: "its model, NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            jetson_linux: Some("36.4.3"),
            ..UNKNOWN
        },
        Case {
            model: "NVIDIA Jetson AGX Orin Developer Kit\0",
            compatible: "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
            board: Some("jetson-agx-orin"),
            evidence: "its model, NVIDIA Jetson AGX Orin Developer Kit",
            ..UNKNOWN
        },
        Case {
            // The emulated board.
            model: "linux,dummy-virt\0",
            compatible: "linux,dummy-virt\0",
            board: Some("generic-aarch64"),
            evidence: "its architecture alone, aarch64",
            ..UNKNOWN
        },
        Case {
            architecture: "x86_64",
            files: &[
                ("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 avx2 fma\n\nprocessor\t: 1\n"),
                ("proc/meminfo", "nonsense\n"),
                ("etc/nv_tegra_release", "# Rolling\n"),
            ],
            board: Some("generic-x86-64"),
            evidence: "its architecture alone, x86_64",
            cores: Some(2),
            ..UNKNOWN
        },
        Case { architecture: "riscv64", ..UNKNOWN },
    ];

    #[test]
    fn recorded_machines_are_known() {
        for case in CASES {
            let folder = tempfile::tempdir().unwrap();
            let write = |path: &str, contents: &str| {
                let path = folder.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, contents).unwrap();
            };
            if !case.model.is_empty() {
                write("proc/device-tree/model", case.model);
                write("proc/device-tree/compatible", case.compatible);
            }
            for (path, contents) in case.files {
                write(path, contents);
            }
            let found = detect(folder.path(), case.architecture).unwrap();
            let board = found.board.as_ref().map(|(board, evidence)| (board.name.as_str(), evidence.to_string()));
            assert_eq!(board, case.board.map(|board| (board, case.evidence.to_owned())), "{}", case.model);
            let machine = found.machine;
            assert_eq!(machine.jetson_linux.as_deref(), case.jetson_linux, "{}", case.model);
            assert_eq!((machine.cores, machine.memory_mib), (case.cores, case.memory_mib), "{}", case.model);
        }
    }

    #[test]
    fn features_of_the_processor() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("proc")).unwrap();
        std::fs::write(folder.path().join("proc/cpuinfo"), PI_4_CPUINFO).unwrap();
        assert_eq!(Machine::read(folder.path()).features, ["fp", "asimd", "evtstrm", "crc32", "cpuid"]);
        std::fs::write(folder.path().join("proc/cpuinfo"), "processor\t: 0\nflags\t\t: fpu sse2 avx2\n").unwrap();
        assert_eq!(Machine::read(folder.path()).features, ["fpu", "sse2", "avx2"]);
    }

    #[test]
    fn versions_of_jetson_linux() {
        let cases = [
            ("# R35 (release), REVISION: 4.1, GCID: 1", Some("35.4.1")),
            ("# R36 (release), REVISION: 4.3", Some("36.4.3")),
            ("# R35 (release), REVISION: next, GCID: 1", None),
            ("# Rx (release), REVISION: 4.1, GCID: 1", None),
            ("# R35 (release), GCID: 1", None),
            ("R35 (release), REVISION: 4.1", None),
            ("", None),
        ];
        for (release, expected) in cases {
            assert_eq!(jetson_linux(release).as_deref(), expected, "{release}");
        }
    }
}
