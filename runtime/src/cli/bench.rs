//! `unimo bench`: what a caption costs here, for every engine and precision side by side.
//!
//! Every combination runs in a process of its own, so that memory and the first caption are its alone, and in several rounds
//! that take turns, so that a machine that slows down meanwhile slows all of them.

use std::fs;
use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use unimo::bundle::manifest::{Manifest, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::{EngineKind, EngineOptions, Provider};
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};

use super::exit::{self, UsageError};
use super::output::{Output, SCHEMA, milliseconds};
use super::pictures::{self, Picture};

const EXAMPLES: &str = "\
Examples:
  unimo bench photo.jpg                           the default bundle on the engines that are here
  unimo bench --bundle all.tar holidays/          every precision of a bundle
  unimo bench --engine tract --assert-p90-ms 900 photo.jpg
  unimo bench --json --duration 60 photo.jpg > this-board.json

The whole way is timed, from the encoded picture in memory to the text, with the bundle's own decoding. `first` is the wall time
from the start of the process to its first caption, `cpu` the processor time until then (both the median of the rounds), `peak MB`
the most memory held.
Exit code 1: a p90 is above --assert-p90-ms.
";

/// Measure captioning on every engine and precision that is here
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// Pictures (JPEG, PNG, WebP) or folders of them, captioned in turn [default: a drawn one inside this program]
    #[arg(value_name = "PICTURE")]
    sources: Vec<String>,
    /// Bundle to run, a folder or a .tar [default: the one inside this program]
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// Engines: tract, ort [default: all that are here]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    engine: Vec<EngineKind>,
    /// What ONNX Runtime computes on: cpu, cuda, tensorrt, xnnpack; tract always computes on cpu
    #[arg(long, value_name = "NAME", default_value_t)]
    provider: Provider,
    /// Weights to run: f32, f16, i8 [default: all of the bundle]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    precision: Vec<Precision>,
    /// Processor threads of one caption
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Let ONNX Runtime's idle threads spin
    #[arg(long)]
    spin: bool,
    /// ONNX Runtime's library, or its folder [default: the first found; see `unimo doctor`]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Seconds for each combination, in all its rounds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u32).range(1..=3600))]
    duration: u32,
    /// Rounds in which the combinations take turns
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Fail where nine of ten captions of a combination do not come within so many milliseconds
    #[arg(long, value_name = "X")]
    assert_p90_ms: Option<f64>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Measure one combination and print its samples; what this command starts for each of them
    #[arg(long, hide = true)]
    worker: bool,
}

/// A drawn picture, for who has none.
const SAMPLE: &[u8] = include_bytes!("../../samples/red-circle.png");

/// First line of a worker: printed as soon as the first caption is there.
#[derive(Debug, Serialize, Deserialize)]
struct First {
    /// Processor time of the process until then, in milliseconds, where the system tells.
    cpu_ms: Option<f64>,
    /// Opening the bundle and preparing its graphs.
    load_ms: f64,
}

/// Milliseconds of one caption.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Sample {
    decode_image: f64,
    vision: f64,
    text: f64,
    total: f64,
    tokens: usize,
}

/// Last line of a worker.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    samples: Vec<Sample>,
    /// The most memory that the process held, in bytes, where the system tells.
    peak_memory: Option<u64>,
}

/// What a combination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Combination {
    #[serde(serialize_with = "by_name")]
    engine: EngineKind,
    #[serde(serialize_with = "by_name")]
    provider: Provider,
    #[serde(serialize_with = "by_name")]
    precision: Precision,
}

fn by_name<S: serde::Serializer>(value: &impl ToString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

/// Percentiles of one part of the way, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Percentiles {
    p50: f64,
    p90: f64,
    p99: f64,
}

/// A row of the table.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    combination: Combination,
    captions: usize,
    ms: Percentiles,
    decode_image_ms: Percentiles,
    vision_ms: Percentiles,
    text_ms: Percentiles,
    /// Mean time of the text part for each token of the captions written.
    token_ms: f64,
    first_ms: f64,
    first_cpu_ms: Option<f64>,
    load_ms: f64,
    peak_memory: Option<u64>,
    /// Bytes of the graphs and weights in the bundle.
    model_bytes: usize,
    /// CIDEr-D from the manifest, where the exporter measured it.
    cider: Option<f64>,
}

pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    if args.worker { work(args) } else { compare(args) }
}

// The process of one combination.

fn work(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let (&[engine], &[precision]) = (args.engine.as_slice(), args.precision.as_slice()) else {
        return Err(UsageError("a worker measures one combination".to_owned()).into());
    };
    let encoded = encoded_pictures(&args.sources)?;
    let options = EngineOptions {
        engine,
        provider: args.provider,
        precision: Some(precision),
        threads: args.threads.get(),
        spinning: args.spin,
        library: args.ort_lib.clone(),
    };
    let output = Output::new(0);
    let start = Instant::now();
    let model = Model::open(&source(args), &options)?;
    model.load(&[GraphName::Vision, GraphName::Decode])?;
    let load_ms = milliseconds(start.elapsed());
    sample(&model, &encoded[0])?;
    output.json(&First { cpu_ms: processor_time(), load_ms })?;
    let deadline = Instant::now() + Duration::from_secs_f64(f64::from(args.duration) / f64::from(args.rounds));
    let mut samples = Vec::new();
    // Every picture once, however long it takes.
    for picture in encoded.iter().cycle() {
        samples.push(sample(&model, picture)?);
        if samples.len() >= encoded.len() && Instant::now() >= deadline {
            break;
        }
    }
    output.json(&Measured { samples, peak_memory: peak_memory() })?;
    Ok(output.finish())
}

fn encoded_pictures(sources: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
    if sources.is_empty() {
        return Ok(vec![SAMPLE.to_vec()]);
    }
    let read = |picture: Picture| match picture {
        Picture::File(path) => fs::read(&path).with_context(|| format!("cannot read {}", path.display())),
        Picture::Stdin | Picture::Camera(_) => {
            Err(UsageError("pictures to measure with must be files: each process reads them again".to_owned()).into())
        }
    };
    pictures::find(sources)?.into_iter().map(read).collect()
}

fn sample(model: &Model, encoded: &[u8]) -> anyhow::Result<Sample> {
    let start = Instant::now();
    let image = decode(encoded, &DecodeLimits::default())?;
    let decoded = Instant::now();
    let vision = model.see(&image)?;
    let seen = Instant::now();
    let caption = black_box(model.caption(&vision, &model.decode_options())?);
    let done = Instant::now();
    Ok(Sample {
        decode_image: milliseconds(decoded - start),
        vision: milliseconds(seen - decoded),
        text: milliseconds(done - seen),
        total: milliseconds(done - start),
        tokens: caption.tokens.len(),
    })
}

/// Processor time of this process in milliseconds: Linux counts it in hundredths of a second.
fn processor_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in brackets may hold anything; `utime` and `stime` are fields 14 and 15, the field after the name is the third.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some((ticks(14)? + ticks(15)?) * 10.0)
}

/// The most memory that this process held, in bytes.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

// The process that compares.

fn source(args: &BenchArgs) -> BundleSource {
    args.bundle.clone().map_or(BundleSource::Embedded, BundleSource::Path)
}

fn compare(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    // What cannot be read or run is said before an hour of measuring.
    for picture in encoded_pictures(&args.sources)? {
        decode(&picture, &DecodeLimits::default())?;
    }
    let bundle = Bundle::open(&source(args))?;
    let precisions = if args.precision.is_empty() { bundle.manifest().precisions.clone() } else { args.precision.clone() };
    precisions.iter().try_for_each(|&precision| bundle.precision(Some(precision)).map(drop))?;
    let mut combinations = Vec::new();
    for engine in engines(args)? {
        let provider = if engine == EngineKind::Tract { Provider::Cpu } else { args.provider };
        combinations.extend(precisions.iter().map(|&precision| Combination { engine, provider, precision }));
    }
    let output = Output::new(combinations.len() * args.rounds as usize);
    let mut runs: Vec<Vec<(f64, First, Measured)>> = combinations.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.rounds {
        for (combination, runs) in combinations.iter().zip(&mut runs) {
            let run = round(args, combination);
            runs.push(run.with_context(|| format!("{} in {}", combination.engine, combination.precision))?);
            output.advance();
        }
    }
    let rows: Vec<Row> =
        combinations.into_iter().zip(runs).filter_map(|(combination, runs)| row(&bundle, combination, &runs)).collect();
    if args.json {
        output.json(&serde_json::json!({
            "schema": SCHEMA, "bundle": bundle.id(), "threads": args.threads, "rounds": args.rounds, "results": rows,
        }))?;
    } else {
        table(&rows).iter().try_for_each(|line| output.line(line))?;
    }
    let slow = |row: &&Row| args.assert_p90_ms.is_some_and(|limit| row.ms.p90 > limit);
    if let (Some(row), Some(limit)) = (rows.iter().find(slow), args.assert_p90_ms) {
        let Combination { engine, precision, .. } = row.combination;
        eprintln!("error: nine of ten captions of {engine} in {precision} come within {:.1} ms, not within {limit}", row.ms.p90);
        return Ok(ExitCode::from(exit::NOTHING_FOUND));
    }
    Ok(output.finish())
}

/// The engines asked for, which must all be here, or else those that are.
fn engines(args: &BenchArgs) -> anyhow::Result<Vec<EngineKind>> {
    let open = |engine| {
        let provider = if engine == EngineKind::Tract { Provider::Cpu } else { args.provider };
        let options = EngineOptions { engine, provider, library: args.ort_lib.clone(), ..EngineOptions::default() };
        unimo::engine::open(&options).map(|_| engine)
    };
    if !args.engine.is_empty() {
        return Ok(args.engine.iter().map(|&engine| open(engine)).collect::<Result<_, _>>()?);
    }
    let (usable, errors): (Vec<_>, Vec<_>) = [EngineKind::Tract, EngineKind::Ort]
        .map(|engine| open(engine).map_err(|error| (engine, error)))
        .into_iter()
        .partition(Result::is_ok);
    for (engine, error) in errors.into_iter().filter_map(Result::err) {
        eprintln!("{engine} is left out: {error}");
    }
    ensure!(!usable.is_empty(), "no engine can be used");
    Ok(usable.into_iter().flatten().collect())
}

/// Starts a worker; gives the milliseconds to its first caption and what it measured.
fn round(args: &BenchArgs, combination: &Combination) -> anyhow::Result<(f64, First, Measured)> {
    let mut command = Command::new(std::env::current_exe().context("this program cannot find itself")?);
    command.args(["bench", "--worker", "--engine", combination.engine.name(), "--provider", combination.provider.name()]);
    command.args(["--precision", combination.precision.name(), "--threads", &args.threads.to_string()]);
    command.args(["--duration", &args.duration.to_string(), "--rounds", &args.rounds.to_string()]);
    command.args(args.spin.then_some("--spin"));
    for (option, path) in [("--bundle", &args.bundle), ("--ort-lib", &args.ort_lib)] {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    }
    command.arg("--").args(&args.sources);
    let start = Instant::now();
    let mut worker = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start another process")?;
    let stdout = worker.stdout.take().context("a worker has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut next = || lines.next().transpose().map(Option::unwrap_or_default);
    let first = next()?;
    let first_ms = milliseconds(start.elapsed());
    let measured = next()?;
    let status = worker.wait()?;
    if !status.success() {
        bail!("the measuring process ended with {status}");
    }
    Ok((first_ms, serde_json::from_str(&first)?, serde_json::from_str(&measured)?))
}

/// The row of a combination; nothing where nothing was measured.
fn row(bundle: &Bundle, combination: Combination, runs: &[(f64, First, Measured)]) -> Option<Row> {
    let samples: Vec<Sample> = runs.iter().flat_map(|(_, _, measured)| measured.samples.iter().copied()).collect();
    let of = |part: fn(&Sample) -> f64| percentiles(samples.iter().map(part).collect());
    let median = |values| percentiles(values).map(|of| of.p50);
    let manifest = bundle.manifest();
    let precision = combination.precision;
    let graphs = manifest.graphs.iter().map(|graph| Manifest::graph_file(precision, &graph.name));
    let weights = manifest.files.keys().filter(|file| file.starts_with(&format!("{precision}/")) && !file.ends_with(".onnx"));
    let tokens: usize = samples.iter().map(|sample| sample.tokens).sum();
    Some(Row {
        combination,
        captions: samples.len(),
        ms: of(|s| s.total)?,
        decode_image_ms: of(|s| s.decode_image)?,
        vision_ms: of(|s| s.vision)?,
        text_ms: of(|s| s.text)?,
        token_ms: samples.iter().map(|s| s.text).sum::<f64>() / tokens.max(1) as f64,
        first_ms: median(runs.iter().map(|run| run.0).collect())?,
        first_cpu_ms: median(runs.iter().filter_map(|run| run.1.cpu_ms).collect()),
        load_ms: median(runs.iter().map(|run| run.1.load_ms).collect())?,
        peak_memory: runs.iter().filter_map(|run| run.2.peak_memory).max(),
        model_bytes: graphs.chain(weights.cloned()).filter_map(|file| bundle.length(&file)).sum(),
        cider: manifest.quality.get(precision.name()).and_then(|figures| figures.get("cider")).copied(),
    })
}

/// Nearest-rank percentiles; nothing of no values.
fn percentiles(mut values: Vec<f64>) -> Option<Percentiles> {
    values.sort_unstable_by(f64::total_cmp);
    let rank = |percent: usize| values.get((percent * values.len()).div_ceil(100).max(1) - 1).copied();
    Some(Percentiles { p50: rank(50)?, p90: rank(90)?, p99: rank(99)? })
}

/// A Markdown table, aligned for terminals.
fn table(rows: &[Row]) -> Vec<String> {
    let head = "engine precision captions p50_ms p90_ms p99_ms image vision text ms/token first_ms cpu_ms peak_MB model_MB CIDEr";
    let mut cells: Vec<Vec<String>> = vec![head.split(' ').map(|name| name.replace('_', " ")).collect()];
    for row in rows {
        let Combination { engine, provider, precision } = row.combination;
        let engine = if provider == Provider::Cpu { engine.to_string() } else { format!("{engine} {provider}") };
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let mut line = vec![engine, precision.to_string(), row.captions.to_string()];
        let Percentiles { p50, p90, p99 } = row.ms;
        let parts = [row.decode_image_ms.p50, row.vision_ms.p50, row.text_ms.p50];
        line.extend([p50, p90, p99].into_iter().chain(parts).map(|ms| format!("{ms:.1}")));
        line.push(format!("{:.2}", row.token_ms));
        line.push(format!("{:.0}", row.first_ms));
        line.push(or_dash(row.first_cpu_ms.map(|ms| format!("{ms:.0}"))));
        line.push(or_dash(row.peak_memory.map(|bytes| format!("{:.0}", bytes as f64 / 1e6))));
        line.push(format!("{:.1}", row.model_bytes as f64 / 1e6));
        line.push(or_dash(row.cider.map(|cider| format!("{cider:.3}"))));
        cells.push(line);
    }
    let widths: Vec<usize> =
        (0..cells[0].len()).map(|column| cells.iter().map(|line| line[column].len()).max().unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}")).collect();
        format!("| {} |", padded.join(" | "))
    };
    let mut lines: Vec<String> = cells.iter().map(line).collect();
    let rule: Vec<String> = widths.iter().map(|&width| format!("{}:", "-".repeat(width - 1))).collect();
    lines.insert(1, format!("| {} |", rule.join(" | ")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let of = |values: &[f64]| percentiles(values.to_vec()).map(|p| [p.p50, p.p90, p.p99]);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7.0]), Some([7.0; 3]));
        assert_eq!(of(&[3.0, 1.0, 2.0, 4.0]), Some([2.0, 4.0, 4.0]));
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(of(&hundred), Some([50.0, 90.0, 99.0]));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_time_and_memory() {
        let (before, held) = (processor_time().unwrap(), peak_memory().unwrap());
        let block = black_box(vec![1u8; 64 << 20]);
        let start = Instant::now();
        let mut sum = 0u64;
        while start.elapsed() < Duration::from_millis(200) {
            sum += block.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        }
        assert!(black_box(sum) > 0 && processor_time().unwrap() > before);
        assert!(peak_memory().unwrap() >= held.max(64 << 20));
    }

    #[test]
    fn the_table_is_aligned() {
        let p = Percentiles { p50: 12.34, p90: 100.0, p99: 101.0 };
        let row = Row {
            combination: Combination { engine: EngineKind::Ort, provider: Provider::Cuda, precision: Precision::I8 },
            captions: 9,
            ms: p,
            decode_image_ms: p,
            vision_ms: p,
            text_ms: p,
            token_ms: 1.239,
            first_ms: 250.4,
            first_cpu_ms: None,
            load_ms: 1.0,
            peak_memory: Some(99_600_000),
            model_bytes: 8_140_000,
            cider: Some(0.4821),
        };
        let lines = table(&[row]);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{lines:#?}");
        let cells: Vec<&str> = lines[2].trim_matches('|').split('|').map(str::trim).collect();
        let expected =
            ["ort cuda", "i8", "9", "12.3", "100.0", "101.0", "12.3", "12.3", "12.3", "1.24", "250", "-", "100", "8.1", "0.482"];
        assert_eq!(cells, expected);
    }
}
