//! `unimo-train rewrite`

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use unimo::tokenizer::Tokenizer;
use unimo_train::checkpoint;
use unimo_train::corpus::Corpus;
use unimo_train::features::FeatureCache;
use unimo_train::model::Unimo;
use unimo_train::rewriting::{Counts, RewriteJob, SceneGraph, nearest_captions, rewrite};
use unimo_train::vision::Vision;

use super::device::DeviceArgs;

const EXAMPLES: &str = "Examples:
  unimo-train rewrite --pairs flickr8k/train scenes/train --out rewrites
  # what a model takes for right, for recipes with `match_sentences`
  unimo-train rewrite --pairs flickr8k/train --checkpoint runs/caption --features features --word 0 --phrase 0 --sentence 16 \\
      --out nearest
  unimo-train rewrite --show 'a brown dog runs through the tall grass'

The folder holds one file for each shard, with one JSON object for each picture:
{\"key\": …, \"captions\": [{\"caption\": …, \"word\": […], \"phrase\": […], \"sentence\": […]}, …]}. A run that was interrupted
goes on when it is given the same arguments: finished files are kept.";

/// Make negatives of captions: words and phrases replaced by others of their kind, and captions that read alike.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Shards (or folders of shards) of pictures with captions
    #[arg(long, num_args = 1.., required_unless_present = "show", value_name = "SHARD")]
    pairs: Vec<PathBuf>,
    /// Folder for the result
    #[arg(long, required_unless_present = "show", value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Negatives of each caption with one word replaced
    #[arg(long, default_value_t = 4, value_name = "N")]
    word: usize,
    /// Negatives of each caption with a noun phrase or two words replaced
    #[arg(long, default_value_t = 4, value_name = "N")]
    phrase: usize,
    /// Captions of other pictures that read most alike, or, with --checkpoint, are nearest to the picture
    #[arg(long, default_value_t = 4, value_name = "N")]
    sentence: usize,
    /// Paraphrases of captions, JSON lines {"caption": …, "paraphrases": […]}: back-translations, for example
    #[arg(long, value_name = "FILE")]
    paraphrases: Option<PathBuf>,
    /// Seed of the draws
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Checkpoint (or run) by whose embeddings the captions of other pictures are found
    #[arg(long, value_name = "FOLDER", requires = "features")]
    checkpoint: Option<PathBuf>,
    /// Folder of cached region features
    #[arg(long, value_name = "FOLDER", requires = "checkpoint")]
    features: Option<PathBuf>,
    /// Views of each picture that the cache has, or is to have, as in the recipe that will use it; the first is embedded
    #[arg(long, default_value_t = 6, value_name = "N")]
    views: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the scene graph of one caption, and do nothing else
    #[arg(long, value_name = "CAPTION", conflicts_with_all = ["pairs", "out"])]
    show: Option<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// Unusable input or failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(caption) = &args.show {
        show(&SceneGraph::of(caption));
        return Ok(ExitCode::SUCCESS);
    }
    let sentences = match (&args.checkpoint, &args.features) {
        (Some(checkpoint), Some(features)) => Some(nearest(args, checkpoint, features)?),
        _ => None,
    };
    let job = RewriteJob {
        pairs: args.pairs.clone(),
        out: args.out.clone().unwrap_or_default(),
        counts: Counts { word: args.word, phrase: args.phrase, sentence: args.sentence },
        seed: args.seed,
        paraphrases: args.paraphrases.clone(),
        sentences,
    };
    let bar = if std::io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{spinner} {pos} captions, {per_sec}, {elapsed} gone")?);
    let report = rewrite(&job, &|n| bar.inc(n))?;
    bar.finish_and_clear();
    for damage in &report.damaged {
        eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    let [word, phrase, sentence] = report.negatives;
    println!(
        "{}: {} files written, {} kept; {} captions, {word} negatives by word, {phrase} by phrase, {sentence} by sentence; \
         {} captions offer no word to replace",
        job.out.display(),
        report.written,
        report.kept,
        report.captions,
        report.barren
    );
    Ok(ExitCode::SUCCESS)
}

/// Captions nearest to each picture, as many as all its captions are dealt.
fn nearest(args: &Args, checkpoint: &Path, features: &Path) -> Result<HashMap<String, Vec<String>>> {
    let folder = checkpoint::resolve(checkpoint)?;
    let device = args.device.open()?;
    let model = Unimo::load(&folder, &device)?;
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
    let vision = Vision::of_checkpoint(&folder, model.config(), &device)?;
    let cache = FeatureCache { folder: features, backbone: vision.given()?, trained_blocks: 0, views: args.views };
    let mut corpus = Corpus::default();
    corpus.add_pairs(&args.pairs, &cache, &tokenizer, model.config().positions, &|_| {})?;
    super::data::warn_damaged(&corpus.damaged);
    let most = corpus.pairs.iter().map(|pair| pair.references.len()).max().unwrap_or(0);
    nearest_captions(&model, &vision, &corpus, most * args.sentence)
}

fn show(graph: &SceneGraph) {
    let word = |w: usize| graph.words[w].text.as_str();
    for object in &graph.objects {
        let attributes: Vec<&str> = object.attributes.iter().map(|&a| word(a)).collect();
        println!("object    {}  {}", word(object.head), attributes.join(" "));
    }
    for relation in &graph.relations {
        let end = |o: usize| word(graph.objects[o].head);
        println!("relation  {} — {} — {}", end(relation.subject), graph.predicate(relation), end(relation.object));
    }
}
