//! Files of classification and regression tasks: SNLI-VE's JSON lines and GLUE's tab-separated tables.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Deserialize;

use super::{Goal, Label, Metric, RawExample};

/// A line of SNLI-VE (`snli_ve_train.jsonl` and so on).
#[derive(Deserialize)]
struct Entailment {
    #[serde(rename = "Flickr30K_ID")]
    image: String,
    #[serde(rename = "sentence2")]
    hypothesis: String,
    gold_label: String,
    #[serde(rename = "pairID", default)]
    id: Option<String>,
}

/// Reads SNLI-VE: a photograph of Flickr30k, a hypothesis, and whether it follows. Lines without agreement (`-`) are left out.
///
/// # Errors
/// A damaged line, by its number.
pub fn read_snli_ve(path: &Path) -> Result<Vec<RawExample>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut examples = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Entailment =
            serde_json::from_str(line).with_context(|| format!("line {} of {}", number + 1, path.display()))?;
        if line.gold_label != "-" {
            examples.push(RawExample {
                id: line.id.unwrap_or_else(|| (number + 1).to_string()),
                image: Some(line.image.trim_end_matches(".jpg").to_owned()),
                texts: vec![line.hypothesis],
                label: Some(Label::Class(line.gold_label)),
            });
        }
    }
    Ok(examples)
}

/// The tasks of GLUE (Wang et al., arXiv 1804.07461) with a training set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Glue {
    /// Linguistic acceptability.
    Cola,
    /// Sentiment.
    #[value(name = "sst-2")]
    Sst2,
    /// Paraphrase of news.
    Mrpc,
    /// Paraphrase of questions.
    Qqp,
    /// Similarity, 0 to 5.
    #[value(name = "sts-b")]
    StsB,
    /// Entailment over genres.
    Mnli,
    /// Whether a sentence answers a question.
    Qnli,
    /// Entailment.
    Rte,
}

/// Names of a table's columns: the texts, and the label.
struct Columns {
    texts: &'static [&'static str],
    label: &'static str,
}

impl Glue {
    fn columns(self) -> Columns {
        match self {
            // A table without a head: source, label, the author's mark, sentence.
            Self::Cola => Columns { texts: &["3"], label: "1" },
            Self::Sst2 => Columns { texts: &["sentence"], label: "label" },
            Self::Mrpc => Columns { texts: &["#1 String", "#2 String"], label: "Quality" },
            Self::Qqp => Columns { texts: &["question1", "question2"], label: "is_duplicate" },
            Self::StsB => Columns { texts: &["sentence1", "sentence2"], label: "score" },
            Self::Mnli => Columns { texts: &["sentence1", "sentence2"], label: "gold_label" },
            Self::Qnli => Columns { texts: &["question", "sentence"], label: "label" },
            Self::Rte => Columns { texts: &["sentence1", "sentence2"], label: "label" },
        }
    }

    /// What is learnt: one of several classes, or a value.
    #[must_use]
    pub fn goal(self) -> Goal {
        if self == Self::StsB { Goal::Value } else { Goal::Class }
    }

    /// The metrics that GLUE reports.
    #[must_use]
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            Self::Cola => &[Metric::Matthews],
            Self::Mrpc | Self::Qqp => &[Metric::Accuracy, Metric::F1],
            Self::StsB => &[Metric::Pearson, Metric::Spearman],
            _ => &[Metric::Accuracy],
        }
    }

    /// Reads one of the task's `.tsv` files. Lines with too few columns are left out and counted.
    ///
    /// # Errors
    /// A table without the task's columns, a value that is no number.
    pub fn read(self, path: &Path) -> Result<(Vec<RawExample>, usize)> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let Columns { texts, label } = self.columns();
        // Quotation marks are plain characters in these tables, line breaks always end a line.
        let mut lines = text.lines().enumerate();
        let head: Vec<&str> = match self {
            Self::Cola => vec!["0", "1", "2", "3"],
            _ => lines.next().map(|(_, line)| line.trim_start_matches('\u{feff}').split('\t').collect()).unwrap_or_default(),
        };
        let column = |name: &str| {
            head.iter().position(|h| *h == name).with_context(|| format!("{} has no column `{name}`", path.display()))
        };
        let texts = texts.iter().map(|name| column(name)).collect::<Result<Vec<_>>>()?;
        // Test files have no labels.
        let label = column(label).ok();
        let (mut examples, mut skipped) = (Vec::new(), 0);
        for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
            let fields: Vec<&str> = line.split('\t').collect();
            let wanted = texts.iter().chain(&label).max().copied().unwrap_or(0);
            if fields.len() <= wanted {
                skipped += 1;
                continue;
            }
            let label = match label.map(|at| fields[at].trim()) {
                None => None,
                Some(found) if self.goal() == Goal::Value => {
                    let value: f64 =
                        found.parse().with_context(|| format!("line {} of {}: `{found}`", number + 1, path.display()))?;
                    if !value.is_finite() {
                        bail!("line {} of {}: `{found}` is no score", number + 1, path.display());
                    }
                    Some(Label::Value(value))
                }
                Some(found) => Some(Label::Class(found.to_owned())),
            };
            let texts = texts.iter().map(|&at| fields[at].to_owned()).collect();
            examples.push(RawExample { id: (number + 1).to_string(), image: None, texts, label });
        }
        Ok((examples, skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(task: Glue, text: &str) -> Result<(Vec<RawExample>, usize)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.tsv");
        std::fs::write(&path, text).unwrap();
        task.read(&path)
    }

    fn class(name: &str) -> Option<Label> {
        Some(Label::Class(name.into()))
    }

    #[test]
    fn tables_are_read_by_their_columns() {
        let (found, skipped) = read(Glue::Cola, "gj04\t1\t\tThe dog \"ran.\nbad line\nx\t0\t*\tran dog the\n").unwrap();
        assert_eq!((found.len(), skipped), (2, 1));
        assert_eq!((found[0].texts[0].as_str(), &found[0].label), ("The dog \"ran.", &class("1")));
        let (found, _) = read(Glue::Mnli, "index\tsentence2\tsentence1\tgold_label\n0\tB\tA\tneutral\n").unwrap();
        assert_eq!(
            (found[0].texts.as_slice(), &found[0].label),
            (["A".to_owned(), "B".to_owned()].as_slice(), &class("neutral"))
        );
        let (found, _) = read(Glue::StsB, "sentence1\tsentence2\tscore\na\tb\t3.800\n").unwrap();
        assert_eq!(found[0].label, Some(Label::Value(3.8)));
        let (found, _) = read(Glue::Sst2, "index\tsentence\n0\tgood\n").unwrap();
        assert_eq!(found[0].label, None);
        let error = |task, text| format!("{:#}", read(task, text).unwrap_err());
        assert!(error(Glue::Rte, "a\tb\n1\t2\n").contains("no column `sentence1`"));
        assert!(error(Glue::StsB, "sentence1\tsentence2\tscore\na\tb\tgood\n").contains("line 2"));
    }

    #[test]
    fn entailment_is_read_without_what_people_disagree_about() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snli_ve.jsonl");
        let line = |label: &str| {
            format!(r#"{{"Flickr30K_ID": "123.jpg", "sentence2": "A man.", "gold_label": "{label}", "pairID": "p"}}"#)
        };
        std::fs::write(&path, format!("{}\n{}\n", line("entailment"), line("-"))).unwrap();
        let found = read_snli_ve(&path).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].image.as_deref(), &found[0].label), (Some("123"), &class("entailment")));
        std::fs::write(&path, "{}\n").unwrap();
        assert!(format!("{:#}", read_snli_ve(&path).unwrap_err()).contains("line 1"));
    }
}
