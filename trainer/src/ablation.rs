//! Ablations: variants of one recipe, each trained with several seeds on the same data, and one table of what came out.
//!
//! Every run is an ordinary, resumable one; a run that has ended is not trained again, so that an interrupted ablation goes on and
//! a new variant costs its own runs only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::model::ModelConfig;
use crate::recipe::Recipe;
use crate::training::{self, TrainingJob};
use crate::work_files;

/// A plan, as TOML.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What is being asked, for the head of the table.
    pub title: String,
    /// Model size: a preset's name or a file.
    pub size: String,
    /// Seeds; each variant is trained with every one.
    pub seeds: Vec<u64>,
    /// The recipe from which the variants differ.
    pub recipe: toml::Table,
    /// Variants, the whole recipe first.
    pub variants: Vec<Variant>,
}

/// What one variant changes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Its name in the table.
    pub name: String,
    /// Keys of the recipe that are other here; tables are merged.
    #[serde(default)]
    pub change: toml::Table,
}

/// Scores of one run, taken from the end of its log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunScores {
    /// CIDEr-D of greedy captions.
    pub cider: f64,
    /// BLEU-1 to BLEU-4.
    pub bleu: [f64; 4],
    /// Image→text recall at 1, 5, 10.
    pub image_to_text: [f64; 3],
    /// Text→image recall at 1, 5, 10.
    pub text_to_image: [f64; 3],
}

/// Columns of the table: name, and how it is read off a run's scores.
type Column = (&'static str, fn(&RunScores) -> f64);

const COLUMNS: [Column; 6] = [
    ("CIDEr-D", |s| 100.0 * s.cider),
    ("BLEU-4", |s| 100.0 * s.bleu[3]),
    ("i→t R@1", |s| 100.0 * s.image_to_text[0]),
    ("i→t R@10", |s| 100.0 * s.image_to_text[2]),
    ("t→i R@1", |s| 100.0 * s.text_to_image[0]),
    ("t→i R@10", |s| 100.0 * s.text_to_image[2]),
];

impl Plan {
    /// Reads and checks a plan.
    ///
    /// # Errors
    /// Malformed TOML, unknown keys, variants whose recipes make no sense, names used twice, fewer than two seeds.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the plan {}", path.display()))?;
        Self::from_toml(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses and checks a plan.
    ///
    /// # Errors
    /// As [`Plan::from_file`].
    pub fn from_toml(text: &str) -> Result<Self> {
        let plan: Self = toml::from_str(text)?;
        if plan.seeds.len() < 2 {
            bail!("a spread needs at least two seeds");
        }
        for (i, variant) in plan.variants.iter().enumerate() {
            plan.recipe_of(variant, plan.seeds[0]).with_context(|| format!("variant `{}`", variant.name))?;
            if plan.variants[..i].iter().any(|other| folder_name(&other.name) == folder_name(&variant.name)) {
                bail!("two variants are called `{}`", variant.name);
            }
        }
        if plan.variants.is_empty() {
            bail!("the plan has no variants");
        }
        Ok(plan)
    }

    /// The recipe of a variant with a seed.
    ///
    /// # Errors
    /// A recipe that makes no sense.
    pub fn recipe_of(&self, variant: &Variant, seed: u64) -> Result<Recipe> {
        let mut recipe = self.recipe.clone();
        merge(&mut recipe, &variant.change);
        recipe.insert("seed".to_owned(), toml::Value::Integer(i64::try_from(seed)?));
        Recipe::from_toml(&toml::to_string(&recipe)?)
    }
}

/// Puts `change` over `base`, table by table.
fn merge(base: &mut toml::Table, change: &toml::Table) {
    for (key, value) in change {
        match (base.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(change)) => merge(inner, change),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A variant's name as that of a folder.
fn folder_name(name: &str) -> String {
    let kept = name.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect::<String>();
    kept.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

/// Trains what is not yet there and writes `table.md` and `scores.toml` into `out`, anew after every run. `job` brings the data;
/// its recipe, size and folder are the plan's.
///
/// # Errors
/// Unusable data, failed writes, development shards missing.
pub fn ablate(plan: &Plan, job: &TrainingJob, out: &Path) -> Result<String> {
    if job.development.is_empty() {
        bail!("an ablation is judged on development shards: give --dev");
    }
    let mut scores: BTreeMap<usize, Vec<RunScores>> = BTreeMap::new();
    let mut table = String::new();
    // Seed by seed, so that an unfinished ablation compares all variants already.
    for &seed in &plan.seeds {
        for (number, variant) in plan.variants.iter().enumerate() {
            let run = out.join(folder_name(&variant.name)).join(format!("seed-{seed}"));
            let recipe = plan.recipe_of(variant, seed)?;
            let found = match finished(&run, &recipe)? {
                Some(found) => found,
                None => {
                    eprintln!("{}, seed {seed}", variant.name);
                    train(plan, variant, seed, job, &run)?;
                    finished(&run, &recipe)?.with_context(|| format!("{} has no scores", run.display()))?
                }
            };
            scores.entry(number).or_default().push(found);
            table = render(plan, &scores);
            std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
            work_files::write_whole(&out.join("table.md"), table.as_bytes())?;
            let by_name: BTreeMap<&str, &Vec<RunScores>> =
                scores.iter().map(|(number, runs)| (plan.variants[*number].name.as_str(), runs)).collect();
            work_files::write_whole(&out.join("scores.toml"), toml::to_string(&by_name)?.as_bytes())?;
        }
    }
    Ok(table)
}

fn train(plan: &Plan, variant: &Variant, seed: u64, job: &TrainingJob, run: &Path) -> Result<PathBuf> {
    let recipe = plan.recipe_of(variant, seed)?;
    let resume = !checkpoint::list(&run.join("checkpoints"))?.is_empty();
    training::run(&TrainingJob { recipe, size: ModelConfig::named(&plan.size)?, run: run.to_path_buf(), resume, ..job.clone() })
}

/// Scores of a run by this recipe that has reached its last step.
fn finished(run: &Path, recipe: &Recipe) -> Result<Option<RunScores>> {
    let (Ok(log), Ok(ran)) = (std::fs::read_to_string(run.join("log.jsonl")), Recipe::from_file(&run.join("recipe.toml"))) else {
        return Ok(None);
    };
    if ran != *recipe {
        bail!("{} was run by another recipe than the plan's; choose another --out", run.display());
    }
    let mut entries = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let last = entries.rfind(|entry| entry["development"] == true && entry["step"] == recipe.last_step());
    last.map(serde_json::from_value).transpose().with_context(|| format!("in the log of {}", run.display()))
}

/// Mean and sample standard deviation; the latter is 0 of one value.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, if values.len() > 1 { (square / (n - 1.0)).sqrt() } else { 0.0 })
}

/// A Markdown table of means and standard deviations.
fn render(plan: &Plan, scores: &BTreeMap<usize, Vec<RunScores>>) -> String {
    let mut text =
        format!("{}\n\nMean ± standard deviation over runs with other seeds, in per cent.\n\n| variant | runs |", plan.title);
    COLUMNS.iter().for_each(|(name, _)| {
        let _ = write!(text, " {name} |");
    });
    let _ = writeln!(text, "\n|---|---|{}", "---|".repeat(COLUMNS.len()));
    for (number, runs) in scores {
        let _ = write!(text, "| {} | {} |", plan.variants[*number].name, runs.len());
        for (_, read) in COLUMNS {
            let (mean, deviation) = spread(&runs.iter().map(read).collect::<Vec<_>>());
            let _ = write!(text, " {mean:.1} ± {deviation:.1} |");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = "
title = 'What does the contrast bring?'
size = 'pico'
seeds = [1, 2]
[recipe]
steps = 3
[recipe.batch]
images = 4
captions = 1
contrast_captions = 1
[[variants]]
name = 'all'
[[variants]]
name = 'without the contrast'
change = { batch = { contrast_captions = 0 }, weights = { contrast = 0.0 } }
";

    #[test]
    fn variants_change_what_they_name_and_nothing_else() {
        let plan = Plan::from_toml(PLAN).unwrap();
        let whole = plan.recipe_of(&plan.variants[0], 7).unwrap();
        let without = plan.recipe_of(&plan.variants[1], 7).unwrap();
        assert_eq!((whole.seed, whole.batch.contrast_captions, without.batch.contrast_captions), (7, 1, 0));
        let mut expected = whole.clone();
        expected.batch.contrast_captions = 0;
        expected.weights.contrast = 0.0;
        assert_eq!(without, expected);
    }

    #[test]
    fn plans_that_make_no_sense_are_refused() {
        for (from, to, says) in [
            ("seeds = [1, 2]", "seeds = [1]", "two seeds"),
            ("'without the contrast'", "'All'", "two variants"),
            ("contrast_captions = 0 }", "wings = 1 }", "wings"),
        ] {
            assert!(PLAN.contains(from));
            let error = format!("{:#}", Plan::from_toml(&PLAN.replace(from, to)).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn the_plan_that_comes_with_the_program_is_sound() {
        let plan = Plan::from_toml(include_str!("../recipes/ablation.toml")).unwrap();
        assert!(plan.seeds.len() >= 3 && plan.variants.len() >= 6);
    }

    #[test]
    fn spreads_are_those_of_the_textbook() {
        assert_eq!(spread(&[2.0]), (2.0, 0.0));
        let (mean, deviation) = spread(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        // Squares sum to 32; 32 / 7.
        assert!((mean - 5.0).abs() < 1e-12 && (deviation - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
    }
}
