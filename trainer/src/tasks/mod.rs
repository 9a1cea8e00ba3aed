//! Downstream tasks with one answer to a question, a hypothesis or a text: visual question answering, visual entailment, and the
//! classification and regression tasks of GLUE. One head serves them all; see [`crate::model::Unimo::task_logits`].

pub mod generation;
pub mod tables;
pub mod vqa;

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use unimo::tokenizer::{CLS, SEP, Tokenizer};

use crate::corpus::Corpus;
use crate::metrics::classification;
use crate::model::{Packer, Regions, Unimo};
use crate::ops::Operators;
use crate::vision::Vision;

/// Examples in one forward pass of a prediction.
const BATCH: usize = 50;

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// One of several classes.
    Class,
    /// One of many answers, several of which may be right to a degree.
    Answer,
    /// A number.
    Value,
}

/// How predictions are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Share of right classes.
    Accuracy,
    /// F1 of the class `1`.
    F1,
    /// Matthews' correlation.
    Matthews,
    /// Pearson's correlation.
    Pearson,
    /// Spearman's correlation.
    Spearman,
    /// VQA v2's accuracy.
    VqaAccuracy,
}

/// A task, as a checkpoint keeps it in `task.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// Its name, for people.
    pub name: String,
    /// What is learnt.
    pub goal: Goal,
    /// How it is judged, the leading metric first.
    pub metrics: Vec<Metric>,
    /// Whether examples have a picture.
    pub pictures: bool,
    /// Names of the classes or answers, in the order of the head's outputs; one unnamed output for a value.
    pub classes: Vec<String>,
}

/// What an example's file says is right.
#[derive(Debug, Clone, PartialEq)]
pub enum Label {
    /// A class.
    Class(String),
    /// The answers that people gave.
    Answers(Vec<String>),
    /// A number.
    Value(f64),
}

/// An example as its file has it.
#[derive(Debug, Clone, PartialEq)]
pub struct RawExample {
    /// Its name in the file, or its line.
    pub id: String,
    /// Name of its picture.
    pub image: Option<String>,
    /// One text or two.
    pub texts: Vec<String>,
    /// What is right, where it is known.
    pub label: Option<Label>,
}

/// An example ready for the model.
#[derive(Debug, Clone)]
pub struct Example {
    /// Its picture's number among the corpus's images alone.
    pub image: Option<usize>,
    /// `[CLS] text [SEP]`, or `[CLS] text [SEP] text [SEP]`.
    pub ids: Vec<u32>,
    /// What the head should give: classes or answers with their degree of rightness, or a value.
    pub target: Vec<(u32, f32)>,
}

/// Examples of one task.
pub struct TaskData {
    /// The task.
    pub spec: TaskSpec,
    /// Examples, in the order of the file.
    pub examples: Vec<Example>,
    raw: Vec<RawExample>,
    /// Examples left out because their picture is not there.
    pub without_picture: usize,
}

impl TaskSpec {
    /// The task that training examples define: its classes are those that occur; its answers the `answers` most frequent ones.
    ///
    /// # Errors
    /// Examples without labels, or fewer than two classes.
    pub fn of(name: &str, goal: Goal, metrics: &[Metric], examples: &[RawExample], answers: usize) -> Result<Self> {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for example in examples {
            match &example.label {
                Some(Label::Class(class)) => *counts.entry(class.clone()).or_default() += 1,
                Some(Label::Answers(given)) => {
                    given.iter().for_each(|answer| *counts.entry(vqa::normalise_answer(answer)).or_default() += 1);
                }
                Some(Label::Value(_)) => {}
                None => bail!("example {} has no label to learn from", example.id),
            }
        }
        let mut classes: Vec<(String, usize)> = counts.into_iter().collect();
        match goal {
            Goal::Value => classes = vec![(String::new(), 0)],
            Goal::Class => classes.sort(),
            Goal::Answer => {
                classes.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
                classes.truncate(answers);
            }
        }
        if goal != Goal::Value && classes.len() < 2 {
            bail!("{} classes in the training examples: there is nothing to tell apart", classes.len());
        }
        Ok(Self {
            name: name.to_owned(),
            goal,
            metrics: metrics.to_vec(),
            pictures: examples.iter().any(|example| example.image.is_some()),
            classes: classes.into_iter().map(|(class, _)| class).collect(),
        })
    }
}

impl TaskData {
    /// Examples for a model: tokenised, with their pictures found in the corpus. Those without a picture are left out and counted.
    ///
    /// # Errors
    /// No example left.
    pub fn new(spec: &TaskSpec, raw: Vec<RawExample>, corpus: &Corpus, tokenizer: &Tokenizer, positions: usize) -> Result<Self> {
        let numbers: HashMap<&str, u32> = spec.classes.iter().zip(0..).map(|(class, i)| (class.as_str(), i)).collect();
        let (mut examples, mut kept) = (Vec::new(), Vec::new());
        let count = raw.len();
        for example in raw {
            let image = match &example.image {
                Some(name) if spec.pictures => match corpus.image_named(name) {
                    Some(number) => Some(number),
                    None => continue,
                },
                _ => None,
            };
            let target = match &example.label {
                Some(Label::Class(class)) => numbers.get(class.as_str()).map(|&class| vec![(class, 1.0)]).unwrap_or_default(),
                Some(Label::Value(value)) => vec![(0, *value as f32)],
                Some(Label::Answers(given)) => {
                    let mut degrees: Vec<(u32, f32)> = given
                        .iter()
                        .filter_map(|answer| numbers.get(vqa::normalise_answer(answer).as_str()))
                        .map(|&class| (class, vqa::accuracy(&spec.classes[class as usize], given) as f32))
                        .collect();
                    degrees.sort_unstable_by_key(|&(class, _)| class);
                    degrees.dedup();
                    degrees
                }
                None => Vec::new(),
            };
            examples.push(Example { image, ids: ids(tokenizer, &example.texts, positions), target });
            kept.push(example);
        }
        let without_picture = count - examples.len();
        if examples.is_empty() {
            bail!("none of the {count} examples of {} has its picture among --images", spec.name);
        }
        Ok(Self { spec: spec.clone(), examples, raw: kept, without_picture })
    }

    /// Each metric of logits `[examples][classes]`, by the labels of the files.
    ///
    /// # Errors
    /// Examples without labels.
    pub fn score(&self, logits: &[Vec<f32>]) -> Result<Vec<(Metric, f64)>> {
        let best = |row: &Vec<f32>| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i as u32);
        let predicted: Vec<u32> = logits.iter().map(best).collect();
        let numbers: HashMap<&str, u32> = self.spec.classes.iter().zip(0..).map(|(class, i)| (class.as_str(), i)).collect();
        let (mut classes, mut values, mut vqa_sum) = (Vec::new(), Vec::new(), 0.0);
        for (example, answer) in self.raw.iter().zip(&predicted) {
            match example.label.as_ref().with_context(|| format!("example {} has no label", example.id))? {
                // A class that training never saw is predicted by nobody.
                Label::Class(class) => {
                    classes.push(numbers.get(class.as_str()).copied().unwrap_or(self.spec.classes.len() as u32))
                }
                Label::Value(value) => values.push(*value),
                Label::Answers(given) => vqa_sum += vqa::accuracy(&self.spec.classes[*answer as usize], given),
            }
        }
        let found: Vec<f64> = logits.iter().map(|row| f64::from(row[0])).collect();
        let positive = numbers.get("1").copied().unwrap_or(1);
        let score = |metric: &Metric| match metric {
            Metric::Accuracy => classification::accuracy(&predicted, &classes),
            Metric::F1 => classification::f1(&predicted, &classes, positive),
            Metric::Matthews => classification::matthews(&predicted, &classes),
            Metric::Pearson => classification::pearson(&found, &values),
            Metric::Spearman => classification::spearman(&found, &values),
            Metric::VqaAccuracy => vqa_sum / self.raw.len() as f64,
        };
        Ok(self.spec.metrics.iter().map(|metric| (*metric, score(metric))).collect())
    }

    /// What a row of logits says, in the words of the task: a class, an answer, or a number.
    #[must_use]
    pub fn say(&self, logits: &[f32]) -> String {
        if self.spec.goal == Goal::Value {
            return format!("{:.3}", logits[0]);
        }
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i);
        self.spec.classes[best].clone()
    }

    /// Names of the examples, in order.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.raw.iter().map(|example| example.id.as_str())
    }
}

/// `[CLS] text [SEP]` or `[CLS] text [SEP] text [SEP]`; what is too long is cut from the longer text.
fn ids(tokenizer: &Tokenizer, texts: &[String], positions: usize) -> Vec<u32> {
    let mut parts: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode(text, positions)).collect();
    let room = positions.saturating_sub(1 + parts.len());
    while parts.iter().map(Vec::len).sum::<usize>() > room {
        if let Some(longest) = parts.iter_mut().max_by_key(|part| part.len()) {
            longest.pop();
        }
    }
    let mut ids = vec![CLS];
    for part in parts {
        ids.extend(part);
        ids.push(SEP);
    }
    ids
}

/// Logits of every example, `[examples][classes]`, without dropout.
///
/// # Errors
/// Those of candle.
pub fn predict(model: &Unimo, vision: &Vision, corpus: &Corpus, data: &TaskData) -> Result<Vec<Vec<f32>>> {
    let mut logits = Vec::new();
    for batch in data.examples.chunks(BATCH) {
        let records = batch.iter().filter_map(|example| example.image).map(|image| corpus.image_record(image, 0)).collect();
        let regions = vision.regions(records)?;
        let mut packer = Packer::new(model);
        let (mut images, mut texts) = (Vec::new(), Vec::new());
        let mut seen = regions.iter();
        for example in batch {
            match example.image.and_then(|_| seen.next()) {
                Some(record) => {
                    let rows = packer.pair(Regions::of(record, &[]), &example.ids);
                    images.push(rows.image);
                    texts.push(rows.texts[0]);
                }
                None => texts.push(packer.text(&example.ids, false)),
            }
        }
        let hidden = model.evaluate(&packer.finish(model.device())?)?;
        let images = (!images.is_empty()).then(|| hidden.rows(&images)).transpose()?;
        logits.extend(model.task_logits(&model.at_once(), images.as_ref(), &hidden.rows(&texts)?)?.to_vec2::<f32>()?);
    }
    Ok(logits)
}

/// Loss of logits `[n, classes]` against the examples' targets: cross-entropy of classes, the sum of binary cross-entropies of
/// answers, or the squared error of values, of which an example has one; the mean over examples.
///
/// # Errors
/// Those of the operators.
pub fn task_loss<O: Operators>(
    on: &O,
    logits: &O::Array,
    classes: usize,
    goal: Goal,
    targets: &[&[(u32, f32)]],
) -> candle_core::Result<O::Array> {
    let mut dense = vec![0f32; targets.len() * classes];
    for (row, target) in targets.iter().enumerate() {
        target.iter().for_each(|&(class, degree)| dense[row * classes + class as usize] = degree);
    }
    let dense = on.constants(dense, (targets.len(), classes))?;
    match goal {
        Goal::Class => on.soft_cross_entropy(logits, &dense),
        Goal::Value => on.squared_error(logits, &dense),
        Goal::Answer => on.binary_cross_entropy(logits, &dense),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::AtOnce;
    use candle_core::{Device, Var};

    fn example(id: &str, label: Label) -> RawExample {
        RawExample { id: id.into(), image: None, texts: vec!["a".into()], label: Some(label) }
    }

    #[test]
    fn classes_are_those_of_the_training_examples() {
        let classes = |names: &[&str]| names.iter().map(|n| example(n, Label::Class((*n).into()))).collect::<Vec<_>>();
        let of = |examples: &[RawExample], goal| TaskSpec::of("t", goal, &[], examples, 2).map(|spec| spec.classes);
        assert_eq!(of(&classes(&["no", "yes", "maybe", "no"]), Goal::Class).unwrap(), ["maybe", "no", "yes"]);
        assert!(of(&classes(&["no"]), Goal::Class).is_err());
        assert_eq!(of(&[example("1", Label::Value(2.0))], Goal::Value).unwrap(), [""]);
        let answers =
            [["yes", "Yes", "no"], ["two", "2", "no"]].map(|a| example("q", Label::Answers(a.map(str::to_owned).to_vec())));
        // yes, 2 and no twice each; the first two by name.
        assert_eq!(of(&answers, Goal::Answer).unwrap(), ["2", "no"]);
        assert!(of(&[RawExample { label: None, ..example("x", Label::Value(0.0)) }], Goal::Class).is_err());
    }

    #[test]
    fn a_class_that_training_never_saw_is_never_right() {
        let label = |name: &str| example(name, Label::Class(name.into()));
        let metrics = [Metric::Accuracy, Metric::Matthews];
        let spec = TaskSpec::of("t", Goal::Class, &metrics, &[label("0"), label("1")], 0).unwrap();
        let raw = vec![label("0"), label("1"), label("new"), label("1")];
        let data = TaskData { spec, examples: Vec::new(), raw, without_picture: 0 };
        let logits = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]].map(|row| row.to_vec());
        let scores = data.score(&logits).unwrap();
        assert_eq!(scores[0], (Metric::Accuracy, 0.75));
        assert!(scores[1].1 > 0.5 && scores[1].1 < 1.0, "{scores:?}");
    }

    /// Direct f64 evaluation of each loss, and central differences.
    #[test]
    fn losses_agree_with_their_formulas() {
        let z = [[0.3f32, -1.2, 2.0], [0.0, 0.7, -0.4]];
        let targets: [&[(u32, f32)]; 2] = [&[(2, 1.0)], &[(0, 0.9), (1, 0.3)]];
        let formula = |goal: Goal, z: &[[f64; 3]; 2], (columns, targets): (usize, &[&[(u32, f32)]; 2])| -> f64 {
            let row = |(z, target): (&[f64; 3], &&[(u32, f32)])| {
                let y = |c: usize| target.iter().find(|(class, _)| *class == c as u32).map_or(0.0, |(_, d)| f64::from(*d));
                let total: f64 = z.iter().map(|v| v.exp()).sum();
                (0..columns)
                    .map(|c| match goal {
                        Goal::Class => -y(c) * (z[c].exp() / total).ln(),
                        Goal::Value => (z[c] - y(c)).powi(2),
                        Goal::Answer => {
                            let p = 1.0 / (1.0 + (-z[c]).exp());
                            -y(c) * p.ln() - (1.0 - y(c)) * (1.0 - p).ln()
                        }
                    })
                    .sum::<f64>()
            };
            z.iter().zip(targets).map(row).sum::<f64>() / 2.0
        };
        let value: [&[(u32, f32)]; 2] = [&[(0, 0.4)], &[(0, 0.9)]];
        for (goal, columns, targets) in [(Goal::Class, 3, targets), (Goal::Answer, 3, targets), (Goal::Value, 1, value)] {
            let var = Var::new(&z, &Device::Cpu).unwrap();
            let logits = var.narrow(1, 0, columns).unwrap();
            let loss = task_loss(&AtOnce(&Device::Cpu), &logits, columns, goal, &targets).unwrap();
            let exact = z.map(|row| row.map(f64::from));
            let got = f64::from(loss.to_scalar::<f32>().unwrap());
            assert!((got - formula(goal, &exact, (columns, &targets))).abs() < 1e-5, "{goal:?}: {got}");
            let gradient = loss.backward().unwrap().get(&var).unwrap().to_vec2::<f32>().unwrap();
            for (row, column) in [(0, 0), (0, 2), (1, 1)].into_iter().filter(|(_, column)| *column < columns) {
                let at = |delta: f64| {
                    let mut moved = exact;
                    moved[row][column] += delta;
                    formula(goal, &moved, (columns, &targets))
                };
                let slope = (at(1e-4) - at(-1e-4)) / 2e-4;
                assert!((slope - f64::from(gradient[row][column])).abs() < 1e-4, "{goal:?} {row} {column}: {slope}");
            }
        }
    }
}
