//! The JSON lines that `unimo` writes, and how they find their references.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// The schema of the lines that this reads.
const SCHEMA: u32 = 1;

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// A line of `unimo caption --jsonl`.
#[derive(Debug, Deserialize)]
pub(super) struct CaptionLine {
    pub(super) source: String,
    pub(super) caption: Option<String>,
    pub(super) error: Option<String>,
}

/// A line of `unimo embed --jsonl`.
#[derive(Debug, Deserialize)]
pub(super) struct EmbeddingLine {
    pub(super) source: Option<String>,
    pub(super) text: Option<String>,
    pub(super) embedding: Option<Vec<f32>>,
    pub(super) error: Option<String>,
}

/// Reads JSON lines of schema 1; blank lines are passed over.
///
/// # Errors
/// A file that cannot be read, or a line that is not an object of schema 1 with the fields asked for; the message names it.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut lines = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let place = || format!("line {} of {}", number + 1, path.display());
        let line = line.with_context(place)?;
        if line.trim().is_empty() {
            continue;
        }
        let Versioned { schema } = serde_json::from_str(&line).with_context(place)?;
        if schema != SCHEMA {
            bail!("{} has schema {schema}, this program reads schema {SCHEMA}", place());
        }
        lines.push(serde_json::from_str(&line).with_context(place)?);
    }
    Ok(lines)
}

/// Finds the sample that a source belongs to: the longest end of its path, less the extension, that is a key.
pub(super) struct Keys<'a>(HashMap<&'a str, usize>);

impl<'a> Keys<'a> {
    /// Numbers keys by their position.
    ///
    /// # Errors
    /// A key that occurs twice: a prediction for it could not be told apart.
    pub(super) fn new(keys: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut map = HashMap::new();
        for (index, key) in keys.enumerate() {
            if map.insert(key, index).is_some() {
                bail!("the references hold the key `{key}` twice");
            }
        }
        Ok(Self(map))
    }

    pub(super) fn find(&self, source: &str) -> Option<usize> {
        let path = source.strip_prefix("file://").unwrap_or(source);
        let file_at = path.rfind('/').map_or(0, |slash| slash + 1);
        let stem = path[file_at..].rfind('.').map_or(path, |dot| &path[..file_at + dot]);
        let ends = std::iter::once(0).chain(stem.match_indices('/').map(|(slash, _)| slash + 1));
        ends.into_iter().find_map(|start| self.0.get(&stem[start..]).copied())
    }
}

/// Lines put beside the references that they belong to.
pub(super) struct Matched<T> {
    /// One entry for each reference: what was found, or why nothing was.
    pub(super) found: Vec<Result<T, String>>,
    /// Sources that belong to no reference.
    pub(super) extra: Vec<String>,
}

impl<T> Matched<T> {
    /// Puts `(source, value or error)` beside the references.
    ///
    /// # Errors
    /// Two lines for the same reference.
    pub(super) fn new(keys: &Keys, lines: impl Iterator<Item = (String, Result<T, String>)>) -> Result<Self> {
        let mut found: Vec<Option<Result<T, String>>> = (0..keys.0.len()).map(|_| None).collect();
        let mut extra = Vec::new();
        for (source, value) in lines {
            match keys.find(&source) {
                None => extra.push(source),
                Some(index) if found[index].is_some() => bail!("{source}: there is another line for the same picture"),
                Some(index) => found[index] = Some(value),
            }
        }
        let found = found.into_iter().map(|f| f.unwrap_or_else(|| Err("no line for it".into()))).collect();
        Ok(Self { found, extra })
    }

    /// Tells on stderr what is missing and what is left over; gives the keys of what is missing.
    ///
    /// # Errors
    /// Something is missing that must not be.
    pub(super) fn check(&self, keys: &[String], allow_missing: bool) -> Result<Vec<String>> {
        let missing: Vec<(&String, &String)> =
            keys.iter().zip(&self.found).filter_map(|(key, f)| f.as_ref().err().map(|reason| (key, reason))).collect();
        for (key, reason) in &missing {
            eprintln!("missing: {key}: {reason}");
        }
        for source in &self.extra {
            eprintln!("not in the references, left out: {source}");
        }
        if missing.len() == keys.len() {
            bail!("not one of the {} references has a line: do the files belong together?", keys.len());
        }
        if !missing.is_empty() && !allow_missing {
            bail!("{} of {} references have no line; --allow-missing scores the others", missing.len(), keys.len());
        }
        Ok(missing.into_iter().map(|(key, _)| key.clone()).collect())
    }
}

/// Keys and captions of the references, in order; damaged records are told on stderr.
///
/// # Errors
/// Shards that cannot be read, or that hold no captioned sample.
pub(super) fn references(shards: &[PathBuf]) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let (mut keys, mut captions) = (Vec::new(), Vec::new());
    let report = unimo_train::shards::read_shards(shards, |sample| {
        if !sample.captions.is_empty() {
            keys.push(sample.key);
            captions.push(sample.captions);
        }
        Ok(())
    })?;
    for damage in &report.damaged {
        eprintln!("skipped `{}` of {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    if keys.is_empty() {
        bail!("the references hold no captions");
    }
    Ok((keys, captions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_find_their_keys() {
        let keys = Keys::new(["a", "dogs/a", "b_1"].into_iter()).unwrap();
        for (source, expected) in [
            ("a.jpg", Some(0)),
            ("/tmp/x.y/a.jpg", Some(0)),
            ("out/dogs/a.png", Some(1)),
            ("dogs/a.png", Some(1)),
            ("file:///data/b_1.webp", Some(2)),
            ("b_1", Some(2)),
            ("xa.jpg", None),
            ("", None),
        ] {
            assert_eq!(keys.find(source), expected, "{source}");
        }
        assert!(Keys::new(["a", "a"].into_iter()).is_err());
    }
}
