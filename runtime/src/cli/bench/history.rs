//! `unimo bench compare` and `unimo bench table`: what ledgers say.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
#[cfg(feature = "watch")]
use unimo_devices::display::table::{self, Alignment};

use super::report::markdown;
use crate::cli::exit::NOTHING_FOUND;
use crate::cli::output::{Output, SCHEMA};

const EXAMPLES: &str = "\
Examples:
  unimo bench --duration 60s --ledger ledger.jsonl photo.jpg && unimo bench compare ledger.jsonl
  unimo bench table ledger.jsonl other-boards.jsonl > boards.md
  unimo bench table ledger.jsonl --png boards.png

Rows belong together that agree in machine, bundle, engine, provider, precision and threads. The newest of them is compared with the
median of those before it; a change no larger than the noise, the largest distance of an earlier row from that median, is none. Rows
of a board that was held back (too hot, too little voltage) are shown and never compared with.
";

#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// Tell what changed from a ledger's earlier rows to its newest, beyond their own noise
    #[command(after_help = EXAMPLES)]
    Compare(LedgerArgs),
    /// Print the newest rows of ledgers as a Markdown table
    #[command(after_help = EXAMPLES)]
    Table(TableArgs),
}

#[derive(Debug, Args)]
pub struct LedgerArgs {
    /// Ledgers, as `unimo bench --ledger` writes them
    #[arg(required = true, value_name = "LEDGER")]
    ledgers: Vec<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct TableArgs {
    #[command(flatten)]
    of: LedgerArgs,
    /// Draw the table into this PNG file too
    #[cfg(feature = "watch")]
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
}

/// What is read of a ledger's line; lines of earlier versions lack some of it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
struct Entry {
    date: String,
    version: String,
    commit: Option<String>,
    machine: MachineName,
    bundle: String,
    threads: usize,
    engine: String,
    provider: String,
    precision: String,
    /// Absent in rows of before there was a choice.
    form: Option<String>,
    captions: usize,
    ms: Latency,
    peak_memory: Option<u64>,
    #[serde(default)]
    conditions: Held,
    energy_mj: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
struct MachineName {
    name: Option<String>,
    target: String,
    processors: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
struct Latency {
    p50: f64,
    p90: f64,
    p99: f64,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
struct Held {
    #[serde(default)]
    held_back: Vec<String>,
    end_c: Option<f64>,
}

impl Entry {
    /// Whether both measured the same thing on the same machine.
    fn belongs_to(&self, other: &Self) -> bool {
        let key = |of: &Self| {
            let Self { machine, bundle, engine, provider, precision, form, threads, .. } = of.clone();
            (machine.name, machine.target, machine.processors, bundle, engine, provider, precision, form, threads)
        };
        key(self) == key(other)
    }

    fn is_held_back(&self) -> bool {
        !self.conditions.held_back.is_empty()
    }
}

/// What became of one thing that is measured again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Slower,
    Faster,
    Unchanged,
    /// Fewer than two earlier rows: their noise is not known.
    TooFewRows,
    /// The newest row is of a board that was held back.
    HeldBack,
}

impl Verdict {
    fn words(self) -> &'static str {
        match self {
            Self::Slower => "SLOWER",
            Self::Faster => "faster",
            Self::Unchanged => "unchanged",
            Self::TooFewRows => "too few rows",
            Self::HeldBack => "HELD BACK",
        }
    }
}

#[derive(Debug, Serialize)]
struct Comparison<'a> {
    newest: &'a Entry,
    earlier: usize,
    /// Median of the earlier rows' p50, in ms.
    before_ms: Option<f64>,
    /// The newest p50 less that, as a share of it.
    change: Option<f64>,
    /// Largest distance of an earlier p50 from their median, as a share of it.
    noise: Option<f64>,
    verdict: Verdict,
}

pub fn run(command: &LedgerCommand) -> anyhow::Result<ExitCode> {
    let (LedgerCommand::Compare(args) | LedgerCommand::Table(TableArgs { of: args, .. })) = command;
    let entries = read(&args.ledgers)?;
    if entries.is_empty() {
        eprintln!("there are no rows");
        return Ok(ExitCode::from(NOTHING_FOUND));
    }
    let comparisons = compare(&entries);
    #[cfg(feature = "watch")]
    if let LedgerCommand::Table(TableArgs { png: Some(path), .. }) = command {
        table::draw(&columns(), &boards(&comparisons))?
            .write_png(path)
            .with_context(|| format!("cannot write the picture {}", path.display()))?;
    }
    let output = Output::new(0);
    match command {
        LedgerCommand::Compare(args) if args.json => {
            output.json(&serde_json::json!({ "schema": SCHEMA, "comparisons": comparisons }))?;
        }
        LedgerCommand::Table(args) if args.of.json => {
            let newest: Vec<&Entry> = comparisons.iter().map(|comparison| comparison.newest).collect();
            output.json(&serde_json::json!({ "schema": SCHEMA, "rows": newest }))?;
        }
        LedgerCommand::Compare(_) => table_of_changes(&comparisons).iter().try_for_each(|line| output.line(line))?,
        LedgerCommand::Table(_) => markdown(&BOARDS, boards(&comparisons)).iter().try_for_each(|line| output.line(line))?,
    }
    Ok(output.finish())
}

/// The rows of ledgers, in their order; lines that are none are counted and left out.
fn read(ledgers: &[PathBuf]) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for path in ledgers {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read the ledger {}", path.display()))?;
        let (found, left_out) = parse(&text);
        if left_out > 0 {
            eprintln!("{}: {left_out} lines are no rows of a ledger, and are left out", path.display());
        }
        entries.extend(found);
    }
    // Ledgers of several machines may overlap in time.
    entries.sort_by(|a, b| a.date.cmp(&b.date));
    Ok(entries)
}

fn parse(text: &str) -> (Vec<Entry>, usize) {
    let lines = || text.lines().filter(|line| !line.trim().is_empty());
    let entries: Vec<Entry> = lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let left_out = lines().count() - entries.len();
    (entries, left_out)
}

/// One comparison for each thing that is measured, in the order of their first rows.
fn compare(entries: &[Entry]) -> Vec<Comparison<'_>> {
    let mut groups: Vec<Vec<&Entry>> = Vec::new();
    for entry in entries {
        match groups.iter_mut().find(|group| group[0].belongs_to(entry)) {
            Some(group) => group.push(entry),
            None => groups.push(vec![entry]),
        }
    }
    groups.iter().filter_map(|group| comparison(group)).collect()
}

fn comparison<'a>(group: &[&'a Entry]) -> Option<Comparison<'a>> {
    let (&newest, earlier) = group.split_last()?;
    let mut earlier: Vec<f64> = earlier.iter().filter(|entry| !entry.is_held_back()).map(|entry| entry.ms.p50).collect();
    earlier.sort_unstable_by(f64::total_cmp);
    let before_ms = median(&earlier);
    let share = |ms: f64| before_ms.filter(|&before| before > 0.0).map(|before| ms / before - 1.0);
    let change = share(newest.ms.p50);
    let noise = earlier.iter().filter_map(|&ms| share(ms)).map(f64::abs).reduce(f64::max).filter(|_| earlier.len() > 1);
    let verdict = match (change, noise) {
        _ if newest.is_held_back() => Verdict::HeldBack,
        (Some(change), Some(noise)) if change.abs() <= noise => Verdict::Unchanged,
        (Some(change), Some(_)) if change > 0.0 => Verdict::Slower,
        (Some(_), Some(_)) => Verdict::Faster,
        _ => Verdict::TooFewRows,
    };
    Some(Comparison { newest, earlier: earlier.len(), before_ms, change, noise, verdict })
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[middle - 1], upper) })
}

fn what(entry: &Entry) -> Vec<String> {
    let Entry { machine, engine, provider, precision, form, threads, .. } = entry;
    let name = machine.name.clone().unwrap_or_else(|| machine.target.clone());
    // A provider other than the processor is part of the engine's name, as in the table of `unimo bench`.
    let engine = if provider == "cpu" { engine.clone() } else { format!("{engine} {provider}") };
    let weights = match form.as_deref() {
        None | Some("expanded") => precision.clone(),
        Some(form) => format!("{precision} {form}"),
    };
    vec![name, engine, weights, threads.to_string(), entry.bundle.chars().take(8).collect()]
}

const WHAT: [&str; 5] = ["machine", "engine", "precision", "threads", "bundle"];

fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "-".to_owned())
}

fn table_of_changes(comparisons: &[Comparison<'_>]) -> Vec<String> {
    let percent = |share: Option<f64>| or_dash(share.map(|share| format!("{:+.1} %", 100.0 * share)));
    let line = |comparison: &Comparison<'_>| {
        let Comparison { newest, earlier, before_ms, change, noise, verdict } = comparison;
        let mut cells = what(newest);
        cells.push(earlier.to_string());
        cells.push(or_dash(before_ms.map(|ms| format!("{ms:.1}"))));
        cells.push(format!("{:.1}", newest.ms.p50));
        cells.push(percent(*change));
        cells.push(or_dash(noise.map(|noise| format!("{:.1} %", 100.0 * noise))));
        cells.push(verdict.words().to_owned());
        cells
    };
    let head: Vec<&str> = [&WHAT[..], &["rows before", "p50 ms before", "p50 ms", "change", "noise", "verdict"]].concat();
    markdown(&head, comparisons.iter().map(line).collect())
}

/// The head of the table of boards.
const BOARDS: [&str; 14] = [
    "machine",
    "engine",
    "precision",
    "threads",
    "bundle",
    "captions",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "peak MB",
    "mJ",
    "°C",
    "date",
    "version",
];

/// The cells of the table of boards.
fn boards(comparisons: &[Comparison<'_>]) -> Vec<Vec<String>> {
    let line = |comparison: &Comparison<'_>| {
        let newest = comparison.newest;
        let mut cells = what(newest);
        cells.push(newest.captions.to_string());
        cells.extend([newest.ms.p50, newest.ms.p90, newest.ms.p99].map(|ms| format!("{ms:.1}")));
        cells.push(or_dash(newest.peak_memory.map(|bytes| format!("{:.0}", bytes as f64 / 1e6))));
        cells.push(or_dash(newest.energy_mj.map(|energy| format!("{energy:.0}"))));
        let heat = newest.conditions.end_c.map(|celsius| format!("{celsius:.0}"));
        cells.push(if newest.is_held_back() { "HELD BACK".to_owned() } else { or_dash(heat) });
        cells.push(newest.date.chars().take(10).collect());
        cells.push(newest.commit.clone().unwrap_or_else(|| newest.version.clone()));
        cells
    };
    comparisons.iter().map(line).collect()
}

/// The columns of the table of boards in a picture.
#[cfg(feature = "watch")]
fn columns() -> [(&'static str, Alignment); 14] {
    BOARDS.map(|name| match name {
        "machine" | "engine" | "precision" | "bundle" | "date" | "version" => (name, Alignment::Left),
        _ => (name, Alignment::Right),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(day: usize, p50: f64) -> Entry {
        let machine = MachineName { name: Some("board".into()), target: "t".into(), processors: 4 };
        Entry {
            date: format!("2026-11-{day:02}T00:00:00Z"),
            version: "1".into(),
            commit: None,
            machine,
            bundle: "b".into(),
            threads: 1,
            engine: "tract".into(),
            provider: "cpu".into(),
            precision: "i8".into(),
            form: None,
            captions: 100,
            ms: Latency { p50, p90: p50, p99: p50 },
            peak_memory: None,
            conditions: Held::default(),
            energy_mj: None,
        }
    }

    #[test]
    fn a_change_is_one_beyond_the_noise_of_the_earlier_rows() {
        let cases: [(&[f64], Verdict); 7] = [
            (&[10.0], Verdict::TooFewRows),
            (&[10.0, 20.0], Verdict::TooFewRows),
            (&[10.0, 11.0, 11.0], Verdict::Unchanged),
            (&[10.0, 10.4, 10.1, 10.3], Verdict::Unchanged),
            (&[10.0, 10.4, 10.1, 11.0], Verdict::Slower),
            (&[10.0, 10.4, 10.1, 9.0], Verdict::Faster),
            (&[10.0, 10.0, 10.0, 10.001], Verdict::Slower),
        ];
        for (p50, verdict) in cases {
            let entries: Vec<Entry> = p50.iter().enumerate().map(|(day, &ms)| entry(day + 1, ms)).collect();
            let [comparison] = compare(&entries).try_into().unwrap();
            assert_eq!(comparison.verdict, verdict, "{p50:?}: {comparison:?}");
        }
        let entries: Vec<Entry> = [10.0, 10.4, 10.1, 11.0].iter().enumerate().map(|(day, &ms)| entry(day + 1, ms)).collect();
        let [Comparison { before_ms, change, noise, .. }] = compare(&entries).try_into().unwrap();
        assert_eq!(before_ms, Some(10.1));
        assert!((change.unwrap() - 0.0891).abs() < 1e-4 && (noise.unwrap() - 0.0297).abs() < 1e-4);
    }

    #[test]
    fn a_board_that_was_held_back_is_no_measure() {
        let held_back = |mut entry: Entry| {
            entry.conditions.held_back = vec!["throttled".into()];
            entry
        };
        let rows = [entry(1, 10.0), held_back(entry(2, 30.0)), entry(3, 10.2), entry(4, 10.1)];
        let [comparison] = compare(&rows).try_into().unwrap();
        assert_eq!((comparison.earlier, comparison.verdict), (2, Verdict::Unchanged));
        let rows = [entry(1, 10.0), entry(2, 10.2), held_back(entry(3, 30.0))];
        let [comparison] = compare(&rows).try_into().unwrap();
        assert_eq!(comparison.verdict, Verdict::HeldBack);
        assert!(boards(&[comparison])[0].contains(&"HELD BACK".to_owned()));
    }

    #[test]
    fn only_like_rows_are_compared() {
        let other = |change: fn(&mut Entry)| {
            let mut entry = entry(2, 99.0);
            change(&mut entry);
            entry
        };
        let changes: [fn(&mut Entry); 8] = [
            |e| e.machine.name = None,
            |e| e.machine.processors = 2,
            |e| e.bundle = "c".into(),
            |e| e.engine = "ort".into(),
            |e| e.provider = "cuda".into(),
            |e| e.precision = "f32".into(),
            |e| e.form = Some("dynamic".into()),
            |e| e.threads = 4,
        ];
        for change in changes {
            assert_eq!(compare(&[entry(1, 10.0), other(change)]).len(), 2);
        }
        assert_eq!(compare(&[entry(1, 10.0), other(|e| e.version = "2".into())]).len(), 1);
    }

    #[test]
    fn lines_of_this_and_of_earlier_versions_are_read() {
        let line = r#"{"schema":1,"date":"2026-11-24T12:00:00Z","version":"0.1.0","machine":{"name":null,"target":"x86_64-linux","processors":2,"memory":null},"bundle":"abc","model":"m","threads":1,"rounds":3,"engine":"tract","provider":"cpu","precision":"i8","captions":9,"ms":{"p50":1.0,"p90":2.0,"p99":3.0},"peak_memory":null}"#;
        let (entries, left_out) = parse(&format!("{line}\n\n{{\"sch\n{line}\n"));
        assert_eq!((entries.len(), left_out), (2, 1));
        assert_eq!((entries[0].commit.as_ref(), entries[0].is_held_back()), (None, false));
    }

    #[test]
    fn boards_have_a_cell_for_every_head() {
        let mut row = entry(24, 41.26);
        row.peak_memory = Some(74_600_000);
        row.conditions.end_c = Some(61.4);
        row.energy_mj = Some(1234.4);
        row.commit = Some("abc".into());
        let entries = [row];
        let cells = boards(&compare(&entries));
        let expected = "board|tract|i8|1|b|100|41.3|41.3|41.3|75|1234|61|2026-11-24|abc";
        assert_eq!(cells.iter().map(|row| row.join("|")).collect::<Vec<_>>(), [expected]);
        assert_eq!(cells[0].len(), BOARDS.len());
    }

    #[cfg(feature = "watch")]
    #[test]
    fn a_table_is_drawn_into_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let (ledger, png) = (folder.path().join("ledger"), folder.path().join("boards.png"));
        fs::write(&ledger, serde_json::to_string(&entry(24, 41.26)).unwrap()).unwrap();
        let table = |png: &std::path::Path| {
            let of = LedgerArgs { ledgers: vec![ledger.clone()], json: false };
            run(&LedgerCommand::Table(TableArgs { of, png: Some(png.to_owned()) }))
        };
        table(&png).unwrap();
        let picture = image::open(&png).unwrap().into_rgb8();
        // Letters of 10 × 20 in rows of 28; 109 characters: those of the longest cells, and two between columns.
        let widths = [7, 6, 9, 7, 6, 8, 6, 6, 6, 7, 2, 2, 10, 7];
        assert_eq!(picture.dimensions(), (40 + 10 * (widths.iter().sum::<u32>() + 2 * 13), 40 + 2 * 28));
        // The first column is words, whose last place is empty; the fourth numbers, whose first place is.
        let ink = |character: u32, row: u32| {
            let (left, top) = (20 + 10 * character, 20 + 28 * row);
            (left..left + 10).any(|x| (top..top + 20).any(|y| picture.get_pixel(x, y).0 == [0; 3]))
        };
        assert_eq!([0, 4, 5, 6].map(|character| ink(character, 1)), [true, true, false, false]);
        let threads = 7 + 2 + 6 + 2 + 9 + 2;
        assert_eq!([0, 5, 6].map(|character| ink(threads + character, 1)), [false, false, true]);

        let error = table(&folder.path().join("nowhere/boards.png")).unwrap_err();
        let said = crate::cli::exit::sentence(&error);
        assert!(said.starts_with("cannot write the picture ") && said.contains("No such file"), "{said}");
    }
}
