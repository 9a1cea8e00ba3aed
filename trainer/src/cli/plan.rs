//! `unimo-train plan`

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::{Deserialize, Serialize};

use super::Cli;
use super::device::DeviceArgs;
use unimo_train::parallel::require_one_rank;
use unimo_train::work_files;

const EXAMPLES: &str = "Examples:
  # the shipped model, from the data it was made of, or from yours
  unimo-train plan --config trainer/recipes/edge-s.toml --backbone mobilenetv2-imagenet.safetensors --pairs flickr8k/train \\
      --images coco --texts captions-en.txt --dev flickr8k/dev-0000.tar --out runs/edge-s
  # what would be run?
  unimo-train plan … --show

`unimo-train pretrain --config PLAN …` is the same command.

A plan is a list of stages, each a command of unimo-train. OUT/stages.toml says which are done: interrupt it and give the same
command, and it goes on, inside a stage of training at that stage's newest checkpoint.

In a stage's words {out}, {backbone} and {recipes} (the folder of the plan) stand for paths, and {pairs}, {images}, {texts} and {dev}
alone for all paths given.";

/// Run the stages of a plan, from data to a finished model.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Plan (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Backbone file
    #[arg(long, value_name = "FILE")]
    backbone: PathBuf,
    /// Shards (or folders of shards) of pictures with captions
    #[arg(long, num_args = 1.., required = true, value_name = "SHARD")]
    pairs: Vec<PathBuf>,
    /// Shards of pictures without captions
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    images: Vec<PathBuf>,
    /// Text files, one text a line
    #[arg(long, num_args = 1.., value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Development shards
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    dev: Vec<PathBuf>,
    /// Folder of everything that comes out
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Print the commands instead of running them
    #[arg(long)]
    show: bool,
    /// Where stages that run the model compute, and how exactly
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    stages: Vec<Stage>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stage {
    /// For people, and in `stages.toml`.
    name: String,
    /// The words of the command, after `unimo-train`.
    run: Vec<String>,
    /// What it makes. What an interruption left of it is resumed where it is a run with checkpoints, and made anew where not.
    makes: String,
}

/// `stages.toml`: the words of every stage that is done.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Done {
    #[serde(default)]
    stages: BTreeMap<String, Vec<String>>,
}

/// Runs the subcommand.
///
/// # Errors
/// A plan that makes no sense or was changed, and whatever stops a stage.
pub fn run(args: &Args) -> Result<ExitCode> {
    require_one_rank("plan")?;
    let text =
        std::fs::read_to_string(&args.config).with_context(|| format!("cannot read the plan {}", args.config.display()))?;
    let plan: Plan = toml::from_str(&text).with_context(|| format!("in {}", args.config.display()))?;
    let stages = plan.stages.iter().map(|stage| expand(stage, args)).collect::<Result<Vec<_>>>()?;
    // A slip in the last stage is found before the first one runs for hours.
    for (stage, (words, _)) in plan.stages.iter().zip(&stages) {
        parse(stage, words.clone())?;
    }
    if args.show {
        for (words, _) in &stages {
            let device = if computes(words) { args.device.words() } else { Vec::new() };
            println!("unimo-train {}", [words.as_slice(), &device].concat().join(" "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    let path = args.out.join("stages.toml");
    let mut done: Done = match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).with_context(|| format!("in {}", path.display()))?,
        Err(_) => Done::default(),
    };
    for (number, (stage, (words, makes))) in plan.stages.iter().zip(stages).enumerate() {
        match done.stages.get(&stage.name) {
            Some(before) if *before == words => continue,
            Some(_) => bail!("`{}` was done by another command; choose another --out", stage.name),
            None => {}
        }
        eprintln!("stage {} of {}: {}", number + 1, plan.stages.len(), stage.name);
        let mut now = words.clone();
        if computes(&words) {
            now.extend(args.device.words());
        }
        if computes(&words) && makes.join("checkpoints").is_dir() {
            now.push("--resume".to_owned());
        } else if makes.is_dir() {
            std::fs::remove_dir_all(&makes).with_context(|| format!("cannot clear {}", makes.display()))?;
        }
        super::run(parse(stage, now)?).with_context(|| format!("stage `{}`", stage.name))?;
        done.stages.insert(stage.name.clone(), words);
        work_files::write_whole(&path, toml::to_string(&done)?.as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a stage runs the model, which computes where and as exactly as it is told to; trainings among them can be resumed.
fn computes(words: &[String]) -> bool {
    words.first().is_some_and(|first| ["pretrain", "finetune"].contains(&first.as_str()))
        || words.iter().any(|word| word == "--checkpoint")
}

fn parse(stage: &Stage, words: Vec<String>) -> Result<Cli> {
    Cli::try_parse_from(std::iter::once("unimo-train".to_owned()).chain(words))
        .map_err(|error| anyhow::anyhow!("stage `{}`: {error}", stage.name))
}

/// The words of a stage's command, and what it makes.
fn expand(stage: &Stage, args: &Args) -> Result<(Vec<String>, PathBuf)> {
    // A file named without a folder has an empty parent.
    let recipes = args.config.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let one = |word: &str| {
        let places = [("{out}", args.out.as_path()), ("{backbone}", &args.backbone), ("{recipes}", recipes)];
        places.iter().fold(word.to_owned(), |word, (name, path)| word.replace(name, &path.display().to_string()))
    };
    let lists = [("{pairs}", &args.pairs), ("{images}", &args.images), ("{texts}", &args.texts), ("{dev}", &args.dev)];
    let mut words = Vec::new();
    for word in &stage.run {
        match lists.iter().find(|(name, _)| name == word) {
            Some((name, paths)) if paths.is_empty() => {
                let flag = name.trim_matches(['{', '}']);
                // Without texts, say, the flag before them goes too.
                if words.last() != Some(&format!("--{flag}")) {
                    bail!("stage `{}` needs --{flag}", stage.name);
                }
                words.pop();
            }
            Some((_, paths)) => words.extend(paths.iter().map(|path| path.display().to_string())),
            None => words.push(one(word)),
        }
    }
    if stage.run.first().is_some_and(|first| first == "plan") {
        bail!("stage `{}`: a plan does not run plans", stage.name);
    }
    let makes = PathBuf::from(one(&stage.makes));
    // It may be cleared: never anything but what lies below OUT.
    let below = makes.strip_prefix(&args.out).is_ok_and(|rest| {
        rest.components().next().is_some() && rest.components().all(|part| matches!(part, Component::Normal(_)))
    });
    if !below {
        bail!("stage `{}` makes {}, which is not below {}", stage.name, makes.display(), args.out.display());
    }
    Ok((words, makes))
}
