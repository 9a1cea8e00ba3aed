//! `unimo search`.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use unimo::gallery::{Filter, Gallery, Hit, Method, Time};
use unimo::image::{DecodeLimits, read};
use unimo::model::Model;
use unimo::reranking;

use super::ModelArgs;
use super::exit::{NOTHING_FOUND, UsageError};
use super::index::{GalleryArgs, stored_name};
use super::output::SCHEMA;
use super::pictures;
use super::texts::cut_warning;

/// Pictures that --rerank looks at again, for each one asked for.
const RERANKED: usize = 4;

const EXAMPLES: &str = "\
Examples:
  unimo search 'a dog on the beach' --gallery holidays.gallery
  unimo search --image dog.jpg --gallery holidays.gallery -k 3
  unimo search 'a red circle' --gallery g --since 2026-11-01 --source /camera/front --json
  unimo search 'two children' --gallery g --rerank      looks again at the best ones, and takes longer

The number before a picture is the cosine of its embedding and the query's. With --rerank, four times as many pictures as are asked
for are read again, and ordered by the cosine together with how likely the model is to caption each with the words; the number is
then the probability that this picture is meant, if one of those is (- where it cannot be read any more). --json has the cosine as
`score`, the probability as `match`.";

/// Find pictures in a gallery by words or by a picture
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SearchArgs {
    /// What to look for, in words
    #[arg(required_unless_present = "image", conflicts_with = "image")]
    words: Option<String>,
    /// A picture to find others like it
    #[arg(long, value_name = "PICTURE")]
    image: Option<String>,
    #[command(flatten)]
    gallery: GalleryArgs,
    /// Pictures to find
    #[arg(short = 'k', default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
    /// Not before this time (2026-11-23, a day in UTC, or 2026-11-23T14:05:00Z)
    #[arg(long, value_name = "TIME")]
    since: Option<Time>,
    /// Not after this time, or this day
    #[arg(long, value_name = "TIME", value_parser = Time::last_of)]
    until: Option<Time>,
    /// Pictures whose path begins with this one
    #[arg(long, value_name = "PREFIX")]
    source: Option<String>,
    /// Read the best pictures again, and order them by how likely the words are as the caption of each
    #[arg(long, conflicts_with = "image")]
    rerank: bool,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A picture found, and with --rerank how probably it is the one meant: `None` where it cannot be read any more.
struct Found {
    hit: Hit,
    matching: Option<Option<f32>>,
}

/// One of the `results` of `--json`.
#[derive(Debug, Serialize)]
struct ResultLine<'a> {
    source: &'a str,
    score: f32,
    #[serde(rename = "match", skip_serializing_if = "Option::is_none")]
    matching: Option<Option<f32>>,
    caption: Option<&'a str>,
    time: String,
}

pub fn run(args: &SearchArgs) -> anyhow::Result<ExitCode> {
    // The search index may have to be written.
    #[cfg(unix)]
    super::index::survive_file_size_limit()?;
    let gallery = Gallery::open(&args.gallery.gallery)?;
    let model = args.model.open()?;
    gallery.require_bundle(model.bundle_id())?;
    let query = query(args, &model)?;
    let filter = Filter { since: args.since, until: args.until, source: args.source.as_deref().map(stored_name).transpose()? };
    let count = usize::from(args.count);
    let reranked = args.words.as_ref().filter(|_| args.rerank);
    let found = gallery.find(&query, &filter, if reranked.is_some() { RERANKED * count } else { count })?;
    if let Method::ScanWithoutIndex(reason) = &found.method {
        eprintln!("every embedding was read, which takes longer: {reason}");
    }
    let mut found = match reranked {
        Some(words) => rerank(&model, words, found.hits)?,
        None => found.hits.into_iter().map(|hit| Found { hit, matching: None }).collect(),
    };
    found.truncate(count);
    print(&found, args.json)?;
    Ok(ExitCode::from(if found.is_empty() { NOTHING_FOUND } else { 0 }))
}

fn query(args: &SearchArgs, model: &Model) -> anyhow::Result<Vec<f32>> {
    if let Some(words) = &args.words {
        if words.trim().is_empty() {
            return Err(UsageError("there are no words to look for".to_owned()).into());
        }
        if let Some(warning) = cut_warning(model, words) {
            eprintln!("{warning}");
        }
        return Ok(model.embed_text(words)?);
    }
    let image = args.image.clone().unwrap_or_default();
    let found = unimo_devices::source::pictures(std::slice::from_ref(&image))?;
    let [picture] = found.as_slice() else {
        return Err(UsageError(format!("{image} has {} pictures, search takes one", found.len())).into());
    };
    Ok(model.embed_image(&pictures::load(picture)?)?)
}

/// Orders pictures by how likely the words are as the caption of each, together with the cosine. Those that cannot be read any
/// more keep their order behind the others, and are named.
fn rerank(model: &Model, words: &str, hits: Vec<Hit>) -> anyhow::Result<Vec<Found>> {
    let (mut read_again, mut gone) = (Vec::with_capacity(hits.len()), Vec::new());
    for hit in hits {
        match read(hit.source.as_ref(), &DecodeLimits::default()) {
            Ok(image) => {
                let log_likelihood = model.log_likelihood(&model.see(&image)?, words)?;
                read_again.push((reranking::score(log_likelihood, hit.score), hit));
            }
            Err(error) => {
                eprintln!("not reranked: {error}");
                gone.push(Found { hit, matching: Some(None) });
            }
        }
    }
    read_again.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let (scores, hits): (Vec<f32>, Vec<Hit>) = read_again.into_iter().unzip();
    let probabilities = reranking::probabilities(&scores);
    let found = hits.into_iter().zip(probabilities).map(|(hit, probability)| Found { hit, matching: Some(Some(probability)) });
    Ok(found.chain(gone).collect())
}

fn print(found: &[Found], json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let line = |Found { hit, matching }: &Found| {
            serde_json::json!(ResultLine {
                source: &hit.source,
                score: hit.score,
                matching: *matching,
                caption: hit.caption.as_deref(),
                time: hit.time.to_string(),
            })
        };
        let results: Vec<serde_json::Value> = found.iter().map(line).collect();
        return writeln!(out, "{}", serde_json::json!({ "schema": SCHEMA, "results": results }));
    }
    for Found { hit, matching } in found {
        // What the list is ordered by.
        match matching.unwrap_or(Some(hit.score)) {
            Some(score) => write!(out, "{score:.3}  {}", hit.source)?,
            None => write!(out, "    -  {}", hit.source)?,
        }
        match &hit.caption {
            Some(caption) => writeln!(out, "  {caption}")?,
            None => writeln!(out)?,
        }
    }
    Ok(())
}
