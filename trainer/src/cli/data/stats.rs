//! `unimo-train data stats`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use unimo::image::{DecodeLimits, decode};
use unimo_train::metrics::tokenise;
use unimo_train::shards::{Damage, Sample, expand, read_shards};

/// Arguments of `data stats`.
#[derive(Debug, Args)]
#[command(after_help = "\
A record is damaged when its shard is cut there, its JSON cannot be read or its picture cannot be decoded. Damaged records
are listed, and the exit code is then 3; training skips them.

Examples:
  unimo-train data stats scenes/train
  unimo-train data stats flickr8k/*.tar --json")]
pub struct StatsArgs {
    /// Shards, or folders of shards
    #[arg(required = true, value_name = "SHARDS")]
    shards: Vec<PathBuf>,
    /// Do not decode pictures: faster, but a damaged one goes unseen
    #[arg(long)]
    quick: bool,
    /// Words of the vocabulary to list, most frequent first
    #[arg(long, value_name = "N", default_value_t = 20)]
    words: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct DamagedRecord {
    shard: PathBuf,
    key: String,
    reason: String,
}

impl From<Damage> for DamagedRecord {
    fn from(Damage { shard, key, reason }: Damage) -> Self {
        Self { shard, key, reason }
    }
}

/// What shards hold.
#[derive(Debug, Default, Serialize)]
struct Stats {
    schema: u32,
    shards: usize,
    samples: usize,
    /// Samples with picture and captions, with a picture alone, with captions alone.
    pairs: usize,
    pictures_alone: usize,
    texts_alone: usize,
    /// Samples whose key occurred before.
    repeated_keys: usize,
    captions: usize,
    distinct_captions: usize,
    /// Captions for each number of captions of a sample.
    captions_per_sample: BTreeMap<usize, usize>,
    /// Captions for each length in words (PTB-like, punctuation dropped).
    caption_lengths: BTreeMap<usize, usize>,
    /// Pictures for each size, `widthxheight`; empty with `--quick`.
    picture_sizes: BTreeMap<String, usize>,
    /// Different words, and how many of them occur once.
    vocabulary: usize,
    words_seen_once: usize,
    frequent_words: Vec<(String, usize)>,
    damaged: Vec<DamagedRecord>,
}

pub(super) fn run(args: &StatsArgs) -> Result<ExitCode> {
    let stats = collect(args)?;
    for damage in &stats.damaged {
        eprintln!("damaged: `{}` of {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    if args.json {
        println!("{}", serde_json::to_string(&stats)?);
    } else {
        print(&stats);
    }
    Ok(if stats.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(super::BAD_INPUT) })
}

fn collect(args: &StatsArgs) -> Result<Stats> {
    let mut stats = Stats { schema: 1, ..Stats::default() };
    let mut keys = HashSet::new();
    let mut captions = HashSet::new();
    let mut words: HashMap<String, usize> = HashMap::new();
    for shard in expand(&args.shards)? {
        stats.shards += 1;
        let mut undecodable = Vec::new();
        let report = read_shards(std::slice::from_ref(&shard), |sample| {
            if let Some(bytes) = sample.image.as_ref().filter(|_| !args.quick) {
                match decode(bytes, &DecodeLimits::default()) {
                    Ok(image) => *stats.picture_sizes.entry(format!("{}x{}", image.width(), image.height())).or_default() += 1,
                    Err(error) => {
                        undecodable.push(DamagedRecord { shard: shard.clone(), key: sample.key, reason: error.to_string() });
                        return Ok(());
                    }
                }
            }
            stats.repeated_keys += usize::from(!keys.insert(sample.key.clone()));
            count(&mut stats, &mut words, &sample);
            captions.extend(sample.captions);
            Ok(())
        })?;
        stats.samples += report.samples - undecodable.len();
        stats.damaged.extend(report.damaged.into_iter().map(DamagedRecord::from).chain(undecodable));
    }
    stats.distinct_captions = captions.len();
    stats.vocabulary = words.len();
    stats.words_seen_once = words.values().filter(|&&n| n == 1).count();
    let mut words: Vec<(String, usize)> = words.into_iter().collect();
    words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    words.truncate(args.words);
    stats.frequent_words = words;
    Ok(stats)
}

fn count(stats: &mut Stats, words: &mut HashMap<String, usize>, sample: &Sample) {
    match (sample.image.is_some(), sample.captions.is_empty()) {
        (true, false) => stats.pairs += 1,
        (true, true) => stats.pictures_alone += 1,
        (false, _) => stats.texts_alone += 1,
    }
    *stats.captions_per_sample.entry(sample.captions.len()).or_default() += 1;
    for caption in &sample.captions {
        let tokens = tokenise(caption);
        stats.captions += 1;
        *stats.caption_lengths.entry(tokens.len()).or_default() += 1;
        for token in tokens {
            *words.entry(token).or_default() += 1;
        }
    }
}

fn print(stats: &Stats) {
    println!("{} shards, {} samples", stats.shards, stats.samples);
    println!("  {} pictures with captions, {} alone, {} texts alone", stats.pairs, stats.pictures_alone, stats.texts_alone);
    println!("  {} captions, {} different", stats.captions, stats.distinct_captions);
    if stats.repeated_keys > 0 {
        println!("  {} samples repeat the key of another", stats.repeated_keys);
    }
    for (size, pictures) in &stats.picture_sizes {
        println!("  {pictures} pictures of {size} pixels");
    }
    if stats.captions > 0 {
        println!("captions by length in words");
        histogram(&stats.caption_lengths);
        println!("vocabulary of {} words, {} of them seen once; the most frequent:", stats.vocabulary, stats.words_seen_once);
        let words: Vec<String> = stats.frequent_words.iter().map(|(word, n)| format!("{word} {n}")).collect();
        println!("  {}", words.join(", "));
    }
    println!("{} damaged records", stats.damaged.len());
}

/// One bar for each length, the longest of them forty characters.
fn histogram(lengths: &BTreeMap<usize, usize>) {
    let most = lengths.values().copied().max().unwrap_or(1);
    for (length, captions) in lengths {
        println!("  {length:>3} {captions:>7} {}", "#".repeat((40 * captions).div_ceil(most)));
    }
}
