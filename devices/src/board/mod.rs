//! Boards as data: a file of `devices/boards/` says what a board is and how the runtime is best set up on it.

mod detect;

use serde::{Deserialize, Serialize};

pub use self::detect::{Detected, Evidence, Machine, detect};

/// The files of `devices/boards/`, by name.
const FILES: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/boards.rs"));

/// What a board is, and how the runtime is best set up on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// The name of its file, such as `raspberry-pi-5`.
    #[serde(skip_deserializing)]
    pub name: String,
    /// What people call it.
    pub title: String,
    /// Targets that run on it, the best first.
    pub triples: Vec<String>,
    /// What it is known by.
    #[serde(skip_serializing)]
    detect: Detect,
    /// What computes.
    pub processor: Processor,
    /// How to run the model.
    pub run: Run,
    /// Its usual camera.
    pub camera: CameraDefaults,
    /// Its usual display, where it has one.
    pub display: Option<DisplayDefaults>,
    /// Where temperatures, throttling and power are read.
    pub telemetry: Sources,
    /// What is aimed at on this board.
    pub budget: Option<Budget>,
}

/// What a board is known by: any of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Detect {
    /// Parts of the device tree's `model`.
    model: Vec<String>,
    /// Parts of an entry of the device tree's `compatible`.
    compatible: Vec<String>,
    /// The processor's architecture, of a board that stands for all that are not known better.
    architecture: Option<String>,
}

/// What computes on a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// What its cores are called.
    pub cores: Option<String>,
    /// How many cores it has.
    pub count: Option<u32>,
    /// Highest clock, in MHz.
    pub highest_mhz: Option<u32>,
    /// Instruction sets that the engines' kernels make use of.
    pub features: Vec<String>,
    /// Sizes of memory that it is sold with, in MiB.
    #[serde(default)]
    pub memory_mib: Vec<u32>,
    /// Its graphics processor, where engines can compute on it.
    pub gpu: Option<String>,
}

/// How to run the model on a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Engines and their providers, the preferred first.
    pub engines: Vec<Engine>,
    /// Precision of the weights: `f32`, `f16`, `i8` or `i4`.
    pub precision: String,
    /// Threads; all cores where it is not said.
    pub threads: Option<u32>,
}

/// An engine and what it computes on, by the names of the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// `ort` or `tract`.
    pub engine: String,
    /// `cpu`, `cuda`, `tensorrt` or `xnnpack`.
    pub provider: String,
}

/// The usual camera of a board.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CameraDefaults {
    /// Its URI; see [`camera`](crate::camera).
    pub uri: String,
    /// Width and height, in pixels.
    pub size: (u32, u32),
    /// Pictures a second.
    pub fps: Option<f32>,
}

/// The usual display of a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisplayDefaults {
    /// Its URI.
    pub uri: String,
}

/// Where temperatures, throttling and power are read on a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sources {
    /// Types of the thermal zones that tell how hot the processors are, as the kernel names them.
    pub thermal_zones: Vec<String>,
    /// Who tells of throttling.
    pub throttling: ThrottlingSource,
    /// Who measures power.
    pub power: PowerSource,
    /// Rails that together feed the whole module.
    #[serde(default)]
    pub total_rails: Vec<String>,
}

/// Who tells of throttling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThrottlingSource {
    /// Nobody.
    None,
    /// The firmware of a Raspberry Pi.
    RaspberryPiFirmware,
}

/// Who measures power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerSource {
    /// Nobody.
    None,
    /// Monitors of the type INA3221, as on a Jetson.
    Ina3221,
}

/// What is aimed at on a board: targets, not measurements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// From a picture to its caption, in ms, for 9 of 10.
    pub caption_ms: f64,
    /// Most memory that the process holds, in MiB.
    pub memory_mib: u32,
    /// Hottest, in °C, without throttling.
    pub temperature_c: f32,
}

/// A board's file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("devices/boards/{name}.toml: {reason}")]
pub struct BoardError {
    name: String,
    reason: String,
}

impl Board {
    /// The board that a file describes.
    ///
    /// # Errors
    /// Where it is not TOML, a field is missing, or one is not known.
    fn parse(name: &str, text: &str) -> Result<Self, BoardError> {
        let fault = |error: toml::de::Error| BoardError { name: name.to_owned(), reason: error.to_string() };
        Ok(Self { name: name.to_owned(), ..toml::from_str(text).map_err(fault)? })
    }

    /// Whether it stands for all boards of an architecture that are not known better.
    #[must_use]
    pub fn is_generic(&self) -> bool {
        self.detect.architecture.is_some()
    }
}

/// All boards, by name.
///
/// # Errors
/// A board's file that cannot be read: a fault of this program's build.
pub fn all() -> Result<Vec<Board>, BoardError> {
    FILES.iter().map(|(name, text)| Board::parse(name, text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_board_is_whole() {
        let boards = all().unwrap();
        let names: Vec<&str> = boards.iter().map(|board| board.name.as_str()).collect();
        let expected = [
            "generic-aarch64",
            "generic-x86-64",
            "jetson-agx-orin",
            "jetson-nano",
            "jetson-orin-nano",
            "jetson-xavier-nx",
            "raspberry-pi-3b-plus",
            "raspberry-pi-4",
            "raspberry-pi-5",
            "raspberry-pi-zero-2-w",
        ];
        assert_eq!(names, expected);
        for board in &boards {
            let known = |engine: &Engine| {
                ["ort", "tract"].contains(&engine.engine.as_str())
                    && ["cpu", "cuda", "tensorrt", "xnnpack"].contains(&engine.provider.as_str())
            };
            assert!(board.run.engines.iter().all(known), "{board:?}");
            // The engine inside the program is there when no other is.
            let last = board.run.engines.last().unwrap();
            assert_eq!((last.engine.as_str(), last.provider.as_str()), ("tract", "cpu"), "{}", board.name);
            assert!(["f32", "f16", "i8", "i4"].contains(&board.run.precision.as_str()), "{}", board.name);
            assert!(!board.triples.is_empty() && (board.is_generic() || board.budget.is_some()), "{}", board.name);
            let scheme = crate::source::scheme(&board.camera.uri).unwrap().0;
            assert!(crate::camera::is_scheme(scheme), "{}", board.name);
            let threads = board.run.threads.unwrap_or(1);
            assert!(board.processor.count.is_none_or(|count| threads <= count), "{}", board.name);
            assert_eq!(board.telemetry.power == PowerSource::Ina3221, !board.telemetry.total_rails.is_empty(), "{}", board.name);
        }
    }

    #[test]
    fn unknown_and_missing_fields_are_refused() {
        let (_, text) = FILES[0];
        for (from, to, part) in [
            ("title =", "titel =", "unknown field `titel`"),
            ("[camera]", "[camera]\nzoom = 2", "unknown field `zoom`"),
            ("precision = \"i8\"", "", "missing field `precision`"),
            ("power = \"none\"", "power = \"solar\"", "unknown variant `solar`"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Board::parse("odd", &text.replace(from, to)).unwrap_err().to_string();
            assert!(error.starts_with("devices/boards/odd.toml: ") && error.contains(part), "{error}");
        }
    }
}
