//! Captions files: JSONL, CSV and TSV.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// A line of a JSONL captions file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonLine {
    picture: String,
    captions: Vec<String>,
}

/// A row of a CSV or TSV captions file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    picture: String,
    caption: String,
}

/// Reads the captions of each picture, in the order of the file; blank ones are dropped.
///
/// # Errors
/// A file that cannot be read, has another ending than `.jsonl`, `.csv` or `.tsv`, or a line that does not fit; the message
/// names the line.
pub(super) fn read(path: &Path) -> Result<HashMap<String, Vec<String>>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let lines = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => read_jsonl(file),
        Some("csv") => read_table(csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(file)),
        Some("tsv") => read_table(csv::ReaderBuilder::new().delimiter(b'\t').quoting(false).from_reader(file)),
        _ => bail!("{}: a captions file ends in .jsonl, .csv or .tsv", path.display()),
    };
    let mut captions: HashMap<String, Vec<String>> = HashMap::new();
    for (picture, caption) in lines.with_context(|| format!("cannot read {}", path.display()))? {
        // What a tab, a line break or a run of blanks means in a caption is one blank.
        let caption = caption.split_whitespace().collect::<Vec<_>>().join(" ");
        let list = captions.entry(picture).or_default();
        if !caption.is_empty() {
            list.push(caption);
        }
    }
    Ok(captions)
}

fn read_jsonl(file: File) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("line {}", number + 1))?;
        if line.trim().is_empty() {
            continue;
        }
        let line: JsonLine = serde_json::from_str(&line).with_context(|| format!("line {}", number + 1))?;
        pairs.extend(line.captions.into_iter().map(|caption| (line.picture.clone(), caption)));
    }
    Ok(pairs)
}

fn read_table(mut reader: csv::Reader<File>) -> Result<Vec<(String, String)>> {
    reader.deserialize().map(|row| row.map(|Row { picture, caption }| (picture, caption)).map_err(Into::into)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, content: &str) -> Result<HashMap<String, Vec<String>>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read(&path)
    }

    #[test]
    fn each_format_says_the_same() {
        let cases = [
            ("c.jsonl", "{\"picture\":\"a/b.jpg\",\"captions\":[\"one, \\\"two\\\"\",\" three \"]}\n\n"),
            ("c.csv", "picture,caption\na/b.jpg,\"one, \"\"two\"\"\"\na/b.jpg,three\na/b.jpg,\n"),
            ("c.tsv", "picture\tcaption\na/b.jpg\tone, \"two\"\na/b.jpg\tthree\n"),
        ];
        for (name, content) in cases {
            let captions = parse(name, content).unwrap();
            assert_eq!(captions["a/b.jpg"], ["one, \"two\"", "three"], "{name}");
        }
    }

    #[test]
    fn malformed_files_are_refused_with_their_place() {
        let cases = [
            ("c.jsonl", "{\"picture\":\"a.jpg\",\"captions\":[]}\n{\"picture\":1}\n", "line 2"),
            ("c.jsonl", "{\"picture\":\"a.jpg\",\"captions\":[],\"lang\":\"en\"}\n", "lang"),
            ("c.csv", "picture,text\na.jpg,x\n", "caption"),
            ("c.csv", "picture,caption\na.jpg,x,y\n", "line: 2"),
            ("c.txt", "a.jpg x", ".jsonl, .csv or .tsv"),
        ];
        for (name, content, expected) in cases {
            let error = format!("{:#}", parse(name, content).unwrap_err());
            assert!(error.contains(expected), "{name}: {error}");
        }
    }
}
