//! `unimo-train eval scenes`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use unimo_train::scenes::{check_caption, read_records};

use super::captions::captions_of;
use super::lines::{Keys, Matched, read};

/// Exit code for a threshold that was not reached.
const BUDGET_MISSED: u8 = 6;

/// Arguments of `eval scenes`.
#[derive(Debug, Args)]
#[command(after_help = "\
A caption is right when it names exactly the shapes of the scene, each once and with its colour. It is free of false claims
when sizes, places, relations and background that it mentions are true as well.

Exit codes: 0 done, 2 usage, 3 captions are missing or files do not belong together, 6 fewer are right than --min-right.

Example:
  unimo-train data scenes --out scenes/dev --count 100 --seed 2
  unimo-train data unpack scenes/dev --out dev
  unimo caption --jsonl dev > captions.jsonl
  unimo-train eval scenes --references scenes/dev --predictions captions.jsonl --min-right 0.9")]
pub struct ScenesArgs {
    /// Shards that `data scenes` wrote, or folders of them
    #[arg(long, required = true, num_args = 1.., value_name = "SHARDS")]
    references: Vec<PathBuf>,
    /// What `unimo caption --jsonl` wrote
    #[arg(long, value_name = "FILE")]
    predictions: PathBuf,
    /// Exit with code 6 when a smaller share of the captions is right
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    min_right: f64,
    /// Score the captions that are there when others are missing
    #[arg(long)]
    allow_missing: bool,
    /// List wrong captions on stderr
    #[arg(long)]
    explain: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ScenesArgs) -> Result<ExitCode> {
    let (records, report) = read_records(&args.references)?;
    for damage in &report.damaged {
        eprintln!("skipped `{}` of {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    if records.is_empty() {
        bail!("the references hold no scenes; `unimo-train data scenes` makes some");
    }
    let keys: Vec<String> = records.iter().map(|(key, _)| key.clone()).collect();
    let index = Keys::new(keys.iter().map(String::as_str))?;
    let matched = Matched::new(&index, captions_of(read(&args.predictions)?))?;
    let missing = matched.check(&keys, args.allow_missing)?;
    let (mut captions, mut right, mut true_throughout) = (0usize, 0usize, 0usize);
    for ((key, record), caption) in records.iter().zip(&matched.found) {
        let Ok(caption) = caption else { continue };
        let check = check_caption(&record.graph, caption);
        captions += 1;
        right += usize::from(check.is_right());
        true_throughout += usize::from(check.is_right() && check.false_claims.is_empty());
        if args.explain && !check.is_right() {
            eprintln!("{key}: “{caption}”, where it is “{}”", record.captions[0]);
        }
    }
    let share = |n: usize| n as f64 / captions as f64;
    if args.json {
        let object = serde_json::json!({
            "schema": 1, "captions": captions, "missing": missing, "extra": matched.extra.len(),
            "right": share(right), "true_throughout": share(true_throughout),
        });
        println!("{object}");
    } else {
        println!("{captions} captions, {} missing, {} left out", missing.len(), matched.extra.len());
        println!("right objects and colours     {:>6.1} %", 100.0 * share(right));
        println!("and no false claim besides    {:>6.1} %", 100.0 * share(true_throughout));
    }
    if share(right) < args.min_right {
        eprintln!("fewer than {:.1} % of the captions are right", 100.0 * args.min_right);
        return Ok(ExitCode::from(BUDGET_MISSED));
    }
    Ok(ExitCode::SUCCESS)
}
