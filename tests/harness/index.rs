//! `unimo index`, on galleries of a test's own.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use unimo_train::scenes;

use super::{Run, program};

/// A line of `unimo index add --jsonl`.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedLine {
    /// 1.
    pub schema: u32,
    /// The picture, as it was named.
    pub source: String,
    /// What became of it.
    pub status: Option<String>,
    /// Its caption.
    pub caption: Option<String>,
    /// Why nothing became of it.
    pub error: Option<String>,
}

/// The JSON objects of a text, one a line.
///
/// # Panics
/// Where a line is something else.
#[must_use]
pub fn lines<T: DeserializeOwned>(text: &str) -> Vec<T> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(parse).collect()
}

/// A folder with so many drawn scenes, `p/00.png …`, these pictures, and the path of a gallery to be.
///
/// # Panics
/// Where they cannot be written.
#[must_use]
pub fn scratch(count: u64) -> (TempDir, Vec<String>, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = |path: &Path| path.to_str().expect("temporary folders have plain names").to_owned();
    let pictures = folder.path().join("p");
    fs::create_dir(&pictures).expect("a temporary folder can be written");
    let draw = |index| {
        let file = pictures.join(format!("{index:02}.png"));
        scenes::generate(11, index).draw().save(&file).expect("a temporary folder can be written");
        text(&file)
    };
    let (drawn, gallery) = ((0..count).map(draw).collect(), text(&folder.path().join("g")));
    (folder, drawn, gallery)
}

/// Adds pictures to a gallery.
///
/// # Panics
/// Those of [`program`].
#[must_use]
pub fn add(bundle: &str, gallery: &str, more: &[&str]) -> Run {
    let mut arguments = vec!["index", "add", "--jsonl", "--gallery", gallery, "--bundle", bundle];
    arguments.extend(more);
    program("unimo", &arguments)
}

/// Picture and status, or error, of each line that adding printed.
///
/// # Panics
/// Where a line is something else.
#[must_use]
pub fn statuses(printed: &str) -> Vec<(String, String)> {
    let status = |line: AddedLine| {
        assert_eq!(line.schema, 1);
        (line.source, line.status.or(line.error).expect("a status or an error"))
    };
    lines::<AddedLine>(printed).into_iter().map(status).collect()
}

/// What `unimo index stats` says of a gallery.
///
/// # Panics
/// Where it refuses.
#[must_use]
pub fn stats(gallery: &str) -> serde_json::Value {
    let run = program("unimo", &["index", "stats", "--json", "--gallery", gallery]);
    assert_eq!(run.code, 0, "{run:?}");
    run.json_lines().remove(0)
}

/// The pictures that a gallery holds, in its order.
///
/// # Panics
/// Where it cannot be read.
#[must_use]
pub fn exported(gallery: &str) -> Vec<String> {
    let run = program("unimo", &["index", "export", "--gallery", gallery]);
    assert_eq!(run.code, 0, "{run:?}");
    run.json_lines().iter().map(|line| line["source"].as_str().expect("a name").to_owned()).collect()
}
