//! `unimo bench`: what a caption costs here, for every engine and precision side by side.
//!
//! Every combination runs in a process of its own, so that memory and the first caption are its alone, and in several rounds
//! that take turns, so that a machine that slows down meanwhile slows all of them.

mod bounds;
mod conditions;
mod history;
mod ledger;
mod report;
#[cfg(feature = "tract")]
mod roofline;
mod worker;

use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Serialize;
use unimo::bundle::manifest::{Form, Precision};
use unimo::bundle::{Bundle, BundleSource};
use unimo::engine::{EngineKind, EngineOptions, Provider, preferred_form};
use unimo::image::{DecodeLimits, decode};
use unimo_devices::board;

use self::conditions::Conditions;
use self::history::LedgerCommand;
use self::ledger::{Ledger, Machine, Run};
use self::report::{Row, remarks, row, table};
use self::worker::{First, Measured, encoded_pictures};
use super::exit;
use super::output::{Output, SCHEMA, milliseconds};

const EXAMPLES: &str = "\
Examples:
  unimo bench photo.jpg                           the default bundle on the engines that are here
  unimo bench --bundle all.tar holidays/          every precision of a bundle
  unimo bench --engine tract --assert-p90-ms 900 photo.jpg
  unimo bench --roofline photo.jpg
  unimo bench --duration 60s --ledger ledger.jsonl photo.jpg       adds a line for each row
  unimo bench compare ledger.jsonl                what became slower since

The whole way is timed, from the encoded picture in memory to the text, with the bundle's own decoding. `first` is the wall time
from the start of the process to its first caption, `cpu` the processor time until then (both the median of the rounds), `peak MB`
the most memory held.
A percentile with a `~` is of too few captions to be sure of: 64 are needed for p90, 662 for p99 (a longer --duration). In --json
`at_most_ms` holds the percentiles' upper bounds with a confidence of 99 %, MLPerf's early-stopping estimate. Heat, throttling and, on a
Jetson, energy are told below the table.
A line of the ledger is a JSON object: a row of --json with the date, the machine, and the versions of program and model.
--roofline counts the operations (two for each pair of factors) of matrix products and convolutions, and the bytes of weights as
they are stored, inputs and outputs, of one run of the graphs: `prefill` reads a picture, `decode` reads one word of every hypothesis. The
limit is the time that they take at this machine's peaks, the larger of arithmetic (our own 32-bit kernel on matrices in the cache) and
memory (a block of 256 MB read), both measured with one thread. Achieved is the limit as a share of the measured time: `vision` for
prefill; for decode the text part for each run of the graph, beam search included. Products of bytes may pass the peak of floats, and weights that
stay in the cache that of the memory.
Exit code 6: a p90 is above --assert-p90-ms.
";

/// Measure captioning on every engine and precision that is here
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    ledgers: Option<LedgerCommand>,
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
    /// Weights to run: f32, f16, i8, i4 [default: all of the bundle]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    precision: Vec<Precision>,
    /// Forms of the graphs: expanded, dynamic, static [default: what each engine is fastest with here, and expanded]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    form: Vec<Form>,
    /// Processor threads of one caption
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Let ONNX Runtime's idle threads spin
    #[arg(long)]
    spin: bool,
    /// ONNX Runtime's library, or its folder [default: the first found; see `unimo doctor`]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Time for each combination, in all its rounds: 10, 60s, 5m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = seconds)]
    duration: u32,
    /// Rounds in which the combinations take turns
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Fail where nine of ten captions of a combination do not come within so many milliseconds
    #[arg(long, value_name = "X")]
    assert_p90_ms: Option<f64>,
    /// Add a line for each row to this file
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Measure this machine's peaks too, and say what share of them each row achieves
    #[cfg(feature = "tract")]
    #[arg(long)]
    roofline: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Measure one combination and print its samples; what this command starts for each of them
    #[arg(long, hide = true)]
    worker: bool,
}

/// Seconds of a time like 10, 60s or 5m, up to an hour.
fn seconds(text: &str) -> Result<u32, String> {
    let (number, factor) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let seconds = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    seconds.filter(|seconds| (1..=3600).contains(seconds)).ok_or_else(|| "give 1s to 60m".to_owned())
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
    #[serde(serialize_with = "by_name")]
    form: Form,
}

impl Combination {
    /// Its precision, with the form where that is another than the expanded one.
    fn weights(&self) -> String {
        match self.form {
            Form::Expanded => self.precision.to_string(),
            form => format!("{} {form}", self.precision),
        }
    }
}

fn by_name<S: serde::Serializer>(value: &impl ToString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    match &args.ledgers {
        Some(command) => history::run(command),
        None if args.worker => worker::work(args),
        None => compare(args),
    }
}

fn source(args: &BenchArgs) -> BundleSource {
    args.bundle.clone().map_or(BundleSource::Embedded, BundleSource::Path)
}

fn compare(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    // What cannot be read or run is said before an hour of measuring.
    for picture in encoded_pictures(&args.sources)? {
        decode(&picture, &DecodeLimits::default())?;
    }
    let mut ledger = args.ledger.as_deref().map(Ledger::open).transpose()?;
    let bundle = Bundle::open(&source(args))?;
    let precisions = if args.precision.is_empty() { bundle.manifest().precisions.clone() } else { args.precision.clone() };
    precisions.iter().try_for_each(|&precision| bundle.precision(Some(precision)).map(drop))?;
    let mut combinations = Vec::new();
    for engine in engines(args)? {
        let provider = if engine == EngineKind::Tract { Provider::Cpu } else { args.provider };
        for &precision in &precisions {
            let forms = forms(args, &bundle, engine, provider, precision)?;
            combinations.extend(forms.into_iter().map(|form| Combination { engine, provider, precision, form }));
        }
    }
    let output = Output::new(combinations.len() * args.rounds as usize);
    let root = Path::new("/");
    let board = board::detect(root, std::env::consts::ARCH)?.board.map(|(board, _)| board);
    let mut runs: Vec<(Vec<Round>, Conditions)> = combinations.iter().map(|_| Default::default()).collect();
    for _ in 0..args.rounds {
        for (combination, (runs, conditions)) in combinations.iter().zip(&mut runs) {
            let (run, later) = Conditions::during(root, board.as_ref(), || round(args, combination));
            runs.push(run.with_context(|| format!("{} in {}", combination.engine, combination.weights()))?);
            *conditions = std::mem::take(conditions).then(later);
            output.advance();
        }
    }
    let measured = combinations.into_iter().zip(runs);
    #[cfg_attr(not(feature = "tract"), allow(unused_mut))]
    let mut rows: Vec<Row> =
        measured.filter_map(|(combination, (runs, conditions))| row(&bundle, combination, &runs, conditions)).collect();
    #[cfg(feature = "tract")]
    let peaks = match args.roofline {
        true => {
            let (roof, peaks) = roofline::roof();
            roofline::add(&mut rows, &source(args), &roof)?;
            Some(peaks)
        }
        false => None,
    };
    #[cfg(not(feature = "tract"))]
    let peaks: Option<()> = None;
    if let Some(ledger) = &mut ledger {
        let run = Run {
            date: ledger::now(),
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("UNIMO_COMMIT"),
            machine: Machine::this(),
            bundle: bundle.id(),
            model: &bundle.manifest().model.name,
            threads: args.threads.get(),
            rounds: args.rounds,
        };
        ledger.add(&run, &rows)?;
    }
    if args.json {
        let mut document = serde_json::json!({
            "schema": SCHEMA, "bundle": bundle.id(), "threads": args.threads, "rounds": args.rounds, "results": rows,
        });
        if let Some(peaks) = peaks {
            document["peaks"] = serde_json::json!(peaks);
        }
        output.json(&document)?;
    } else {
        table(&rows).iter().chain(&remarks(&rows)).try_for_each(|line| output.line(line))?;
        #[cfg(feature = "tract")]
        if let Some(peaks) = &peaks {
            roofline::table(&rows, peaks).iter().try_for_each(|line| output.line(line))?;
        }
    }
    let slow = |row: &&Row| args.assert_p90_ms.is_some_and(|limit| row.ms.p90 > limit);
    if let (Some(row), Some(limit)) = (rows.iter().find(slow), args.assert_p90_ms) {
        let (engine, weights) = (row.combination.engine, row.combination.weights());
        eprintln!("error: nine of ten captions of {engine} in {weights} come within {:.1} ms, not within {limit}", row.ms.p90);
        return Ok(ExitCode::from(exit::BUDGET_MISSED));
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

/// The forms to measure: those asked for that the engine runs, or else the one that it takes by itself, and the expanded one.
fn forms(
    args: &BenchArgs,
    bundle: &Bundle,
    engine: EngineKind,
    provider: Provider,
    precision: Precision,
) -> anyhow::Result<Vec<Form>> {
    let present = bundle.manifest().forms(precision);
    if args.form.is_empty() {
        let own = preferred_form(&EngineOptions { engine, provider, ..EngineOptions::default() }, &present)?;
        return Ok(if own == Form::Expanded { vec![own] } else { vec![own, Form::Expanded] });
    }
    let can = |form: Form| preferred_form(&EngineOptions { engine, form: Some(form), ..EngineOptions::default() }, &present);
    let runs = |form: &Form| present.contains(form) && can(*form).is_ok();
    let forms: Vec<Form> = args.form.iter().copied().filter(runs).collect();
    for form in args.form.iter().filter(|form| !runs(form)) {
        let why = if present.contains(form) { "does not run it" } else { "has no such graphs in this bundle" };
        eprintln!("{engine} in {precision}: the {form} form is left out, {engine} {why}");
    }
    Ok(forms)
}

/// Milliseconds to a worker's first caption, and what it measured.
type Round = (f64, First, Measured);

/// Starts a worker; gives the milliseconds to its first caption and what it measured.
fn round(args: &BenchArgs, combination: &Combination) -> anyhow::Result<Round> {
    let mut command = Command::new(std::env::current_exe().context("this program cannot find itself")?);
    command.args(["bench", "--worker", "--engine", combination.engine.name(), "--provider", combination.provider.name()]);
    command.args(["--precision", combination.precision.name(), "--form", combination.form.name()]);
    command.args(["--threads", &args.threads.to_string()]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        for (text, expected) in [("10", Some(10)), ("60s", Some(60)), ("5m", Some(300)), ("60m", Some(3600))] {
            assert_eq!(seconds(text).ok(), expected);
        }
        for text in ["0", "0s", "61m", "3601", "m", "", "-1", "1.5s", "4294967295m", "1h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
