//! `unimo doctor`: what this program can run here, and what is missing, in words.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use unimo::bundle::{Bundle, BundleSource};

use super::devices;
use super::output::{Output, SCHEMA};

const EXAMPLES: &str = "\
Examples:
  unimo doctor
  unimo doctor --ort-lib /opt/onnxruntime/lib
  ORT_DYLIB_PATH=libonnxruntime.so.1.32.0 unimo doctor --json";

/// Say what this program can run here, and what is missing
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// Bundle to look at, a folder or a .tar [default: the one inside this program]
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// ONNX Runtime's library, or its folder [default: the first found]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// All that is found out.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    version: &'static str,
    target: String,
    threads: usize,
    processor: Vec<&'static str>,
    board: String,
    bundle: BundleReport,
    engines: Vec<EngineReport>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum BundleReport {
    Found { model: String, id: String, precisions: Vec<String> },
    Unusable { error: String },
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum EngineReport {
    Usable {
        engine: &'static str,
        library: Option<PathBuf>,
        build: Option<String>,
        providers: Vec<&'static str>,
        missing: Vec<&'static str>,
    },
    Unusable {
        engine: &'static str,
        error: String,
    },
}

pub fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let report = Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        processor: processor(),
        board: devices::one_line(Path::new("/"))?,
        bundle: bundle(args),
        engines: vec![tract(), ort(args)],
    };
    let output = Output::new(0);
    if args.json {
        output.json(&report)?;
    } else {
        lines(&report).iter().try_for_each(|line| output.line(line))?;
    }
    Ok(output.finish())
}

/// Instruction sets that the engines' kernels ask for, of those that this processor has.
fn processor() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: [(&str, bool); 0] = [];
    found.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

fn bundle(args: &DoctorArgs) -> BundleReport {
    let source = args.bundle.clone().map_or(BundleSource::Embedded, BundleSource::Path);
    match Bundle::open(&source) {
        Ok(bundle) => BundleReport::Found {
            model: bundle.manifest().model.name.clone(),
            id: bundle.id().to_owned(),
            precisions: bundle.manifest().precisions.iter().map(ToString::to_string).collect(),
        },
        Err(error) => BundleReport::Unusable { error: error.to_string() },
    }
}

fn tract() -> EngineReport {
    if cfg!(feature = "tract") {
        EngineReport::Usable { engine: "tract", library: None, build: None, providers: vec!["cpu"], missing: Vec::new() }
    } else {
        EngineReport::Unusable { engine: "tract", error: "this program was built without it".to_owned() }
    }
}

#[cfg(feature = "ort")]
fn ort(args: &DoctorArgs) -> EngineReport {
    use unimo::engine::{Provider, ort_library};

    match ort_library(args.ort_lib.as_deref()) {
        Ok(library) => {
            let all = [Provider::Cpu, Provider::Xnnpack, Provider::Cuda, Provider::Tensorrt];
            let (providers, missing): (Vec<Provider>, Vec<Provider>) =
                all.into_iter().partition(|provider| library.providers.contains(provider));
            EngineReport::Usable {
                engine: "ort",
                library: Some(library.path),
                build: Some(library.build),
                providers: providers.into_iter().map(Provider::name).collect(),
                missing: missing.into_iter().map(Provider::name).collect(),
            }
        }
        Err(error) => EngineReport::Unusable { engine: "ort", error: error.to_string() },
    }
}

#[cfg(not(feature = "ort"))]
fn ort(_: &DoctorArgs) -> EngineReport {
    EngineReport::Unusable { engine: "ort", error: "this program was built without it".to_owned() }
}

fn lines(report: &Report) -> Vec<String> {
    let processor = if report.processor.is_empty() { String::new() } else { format!(", {}", report.processor.join(" ")) };
    let mut lines = vec![format!("unimo {} on {}, {} threads{processor}", report.version, report.target, report.threads)];
    lines.push(format!("board    {}", report.board));
    lines.push(match &report.bundle {
        BundleReport::Found { model, id, precisions } => {
            format!("bundle   {model} in {}, {}", precisions.join(", "), id.chars().take(12).collect::<String>())
        }
        BundleReport::Unusable { error } => format!("bundle   NOT USABLE: {error}"),
    });
    for engine in &report.engines {
        match engine {
            EngineReport::Usable { engine, library, build, providers, missing } => {
                let inside = if library.is_none() { "inside this program; " } else { "" };
                lines.push(format!("{engine:<8} {inside}computes on {}", providers.join(", ")));
                lines.extend(library.iter().map(|path| format!("         library {}", path.display())));
                lines.extend(build.iter().map(|build| format!("         build {build}")));
                if !missing.is_empty() {
                    lines.push(format!("         built without {}", missing.join(", ")));
                }
            }
            EngineReport::Unusable { engine, error } => lines.push(format!("{engine:<8} NOT USABLE: {error}")),
        }
    }
    lines
}
