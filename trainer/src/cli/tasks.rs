//! Files of downstream tasks on the command line: for `finetune answer|entail|classify` and `eval task`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::device::DeviceArgs;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use unimo::tokenizer::Tokenizer;
use unimo_train::checkpoint;
use unimo_train::corpus::Corpus;
use unimo_train::detections::DetectionCache;
use unimo_train::features::FeatureCache;
use unimo_train::model::Unimo;
use unimo_train::tasks::generation::{self, SourceAndTarget, WritingData};
use unimo_train::tasks::tables::{Glue, read_snli_ve};
use unimo_train::tasks::{self, Goal, Metric, RawExample, TaskData, TaskSpec, vqa};
use unimo_train::training::{TaskJob, WRITTEN_TOKENS};
use unimo_train::vision::Vision;
use unimo_train::work_files;

const VQA: &str = "vqa-v2";
const SNLI_VE: &str = "snli-ve";
const GLUE: &str = "glue-";

/// Files of VQA v2.
#[derive(Debug, clap::Args)]
pub struct AnswerFiles {
    /// Questions, VQA v2's JSON; pictures are found among --images by the number at the end of their key
    #[arg(long, value_name = "FILE")]
    questions: PathBuf,
    /// Their annotations: ten answers to each
    #[arg(long, value_name = "FILE")]
    annotations: PathBuf,
    /// Questions to judge by on the way
    #[arg(long, requires = "dev_annotations", value_name = "FILE")]
    dev_questions: Option<PathBuf>,
    /// Their annotations
    #[arg(long, requires = "dev_questions", value_name = "FILE")]
    dev_annotations: Option<PathBuf>,
    /// Answers that can be given: the most frequent ones of the annotations
    #[arg(long, default_value_t = 3129, value_name = "N")]
    answers: usize,
}

/// Files of a task with one file of examples.
#[derive(Debug, clap::Args)]
pub struct ExampleFiles {
    /// Training examples: SNLI-VE's JSON lines, or a table of GLUE
    #[arg(long, value_name = "FILE")]
    examples: PathBuf,
    /// Examples to judge by on the way
    #[arg(long, value_name = "FILE")]
    dev_examples: Option<PathBuf>,
}

/// Files of sources and targets, line by line.
#[derive(Debug, clap::Args)]
pub struct WritingFiles {
    /// What is read, one text a line
    #[arg(long, value_name = "FILE")]
    sources: PathBuf,
    /// What is to be written of it, line by line
    #[arg(long, value_name = "FILE")]
    targets: PathBuf,
    /// Sources to judge by on the way
    #[arg(long, requires = "dev_targets", value_name = "FILE")]
    dev_sources: Option<PathBuf>,
    /// Their targets
    #[arg(long, requires = "dev_sources", value_name = "FILE")]
    dev_targets: Option<PathBuf>,
}

impl WritingFiles {
    /// Training and development examples.
    ///
    /// # Errors
    /// Files of unlike length.
    pub fn read(&self) -> Result<[Vec<SourceAndTarget>; 2]> {
        let development = match (&self.dev_sources, &self.dev_targets) {
            (Some(sources), Some(targets)) => generation::read(sources, targets)?,
            _ => Vec::new(),
        };
        Ok([generation::read(&self.sources, &self.targets)?, development])
    }
}

impl AnswerFiles {
    /// The job that these files describe.
    ///
    /// # Errors
    /// Files that are not of VQA v2's form.
    pub fn job(&self) -> Result<TaskJob> {
        let train = vqa::read(&self.questions, Some(&self.annotations))?;
        let development = match &self.dev_questions {
            Some(questions) => vqa::read(questions, self.dev_annotations.as_deref())?,
            None => Vec::new(),
        };
        let spec = TaskSpec::of(VQA, Goal::Answer, &[Metric::VqaAccuracy], &train, self.answers)?;
        Ok(TaskJob { spec, train, development })
    }
}

impl ExampleFiles {
    /// The job that these files describe, for SNLI-VE or a task of GLUE.
    ///
    /// # Errors
    /// Files of another form.
    pub fn job(&self, glue: Option<Glue>) -> Result<TaskJob> {
        let name = match glue {
            None => SNLI_VE.to_owned(),
            Some(task) => format!("{GLUE}{}", value_name(task)),
        };
        let train = read(&name, &self.examples)?;
        let development = self.dev_examples.as_deref().map(|path| read(&name, path)).transpose()?.unwrap_or_default();
        let (goal, metrics) = glue.map_or((Goal::Class, [Metric::Accuracy].as_slice()), |task| (task.goal(), task.metrics()));
        Ok(TaskJob { spec: TaskSpec::of(&name, goal, metrics, &train, 0)?, train, development })
    }
}

fn value_name(task: Glue) -> String {
    task.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Reads the examples of the task called `name`.
fn read(name: &str, path: &Path) -> Result<Vec<RawExample>> {
    if name == SNLI_VE {
        return read_snli_ve(path);
    }
    let Some(Ok(task)) = name.strip_prefix(GLUE).map(|name| Glue::from_str(name, true)) else {
        bail!("`{name}` has no file of examples: give --questions and --annotations");
    };
    let (examples, skipped) = task.read(path)?;
    if skipped > 0 {
        eprintln!("{skipped} lines of {} have too few columns and were left out", path.display());
    }
    Ok(examples)
}

const EXAMPLES: &str = "Examples:
  unimo-train eval task --checkpoint runs/vqa --questions v2_val_questions.json --annotations v2_val_annotations.json \\
      --images coco-val --features features
  unimo-train eval task --checkpoint runs/cola --examples dev.tsv --predictions cola.jsonl";

/// How well a checkpoint with a task's head does on examples, and what it says.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct TaskArgs {
    /// Checkpoint (or run) of `finetune answer`, `entail` or `classify`
    #[arg(long, value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// Examples: SNLI-VE's JSON lines, or a table of GLUE
    #[arg(long, required_unless_present = "questions", conflicts_with = "questions", value_name = "FILE")]
    examples: Option<PathBuf>,
    /// Questions of VQA v2
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Their annotations; without them, only --predictions are made
    #[arg(long, requires = "questions", value_name = "FILE")]
    annotations: Option<PathBuf>,
    /// Shards of the pictures, or tables of their detected regions
    #[arg(long, num_args = 1.., value_name = "SHARD")]
    images: Vec<PathBuf>,
    /// Folder of cached region features
    #[arg(long, value_name = "FOLDER", default_value = "features")]
    features: PathBuf,
    /// Where to write what the model says: VQA's result file for questions, else JSON lines
    #[arg(long, value_name = "FILE")]
    predictions: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs `unimo-train eval task`.
///
/// # Errors
/// A checkpoint without a task, unusable examples, failed writes.
pub fn run(args: &TaskArgs) -> Result<ExitCode> {
    let folder = checkpoint::resolve(&args.checkpoint)?;
    let path = folder.join("task.toml");
    let Ok(text) = std::fs::read_to_string(&path) else {
        bail!("{} has no head for a task; `unimo-train finetune answer|entail|classify` make one", folder.display());
    };
    let spec: TaskSpec = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    let raw = match (&args.questions, &args.examples) {
        (Some(questions), _) if spec.name == VQA => vqa::read(questions, args.annotations.as_deref())?,
        (None, Some(examples)) => read(&spec.name, examples)?,
        _ => bail!("{} is of the task {}, which has no --questions", folder.display(), spec.name),
    };
    let device = args.device.open()?;
    let model = Unimo::load(&folder, &device)?;
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
    let vision = Vision::of_checkpoint(&folder, model.config(), &device)?;
    let mut corpus = Corpus::default();
    if spec.pictures {
        if model.config().detects() {
            let cache = DetectionCache { folder: &args.features, shapes: model.config().region_shapes() };
            corpus.add_detected_images(&args.images, &cache, &|_| {})?;
        } else {
            let cache = FeatureCache { folder: &args.features, backbone: vision.given()?, trained_blocks: 0, views: 1 };
            corpus.add_images(&args.images, &cache, &|_| {})?;
        }
        super::data::warn_damaged(&corpus.damaged);
    }
    let labelled = raw.iter().all(|example| example.label.is_some());
    let data = TaskData::new(&spec, raw, &corpus, &tokenizer, model.config().positions)?;
    if data.without_picture > 0 {
        eprintln!("{} examples left out: their pictures are not among --images", data.without_picture);
    }
    let logits = tasks::predict(&model, &vision, &corpus, &data)?;
    if let Some(path) = &args.predictions {
        write_predictions(path, &data, &logits)?;
    }
    if !labelled {
        return Ok(ExitCode::SUCCESS);
    }
    let scores = data.score(&logits)?;
    let mut object = serde_json::json!({ "schema": 1, "task": spec.name, "examples": logits.len() });
    for (metric, score) in &scores {
        let name = serde_json::to_value(metric)?.as_str().unwrap_or_default().to_owned();
        if !args.json {
            println!("{name} {score:.4}");
        }
        object[name] = (*score).into();
    }
    if args.json {
        println!("{object}");
    }
    Ok(ExitCode::SUCCESS)
}

fn write_predictions(path: &Path, data: &TaskData, logits: &[Vec<f32>]) -> Result<()> {
    let said = data.ids().zip(logits).map(|(id, row)| (id, data.say(row)));
    if data.spec.name == VQA {
        let results: Vec<serde_json::Value> = said
            .map(|(id, answer)| Ok(serde_json::json!({ "question_id": id.parse::<u64>()?, "answer": answer })))
            .collect::<Result<_>>()?;
        return work_files::write_whole(path, &serde_json::to_vec(&results)?);
    }
    let lines: Vec<serde_json::Value> = said.map(|(id, answer)| serde_json::json!({ "id": id, "answer": answer })).collect();
    work_files::write_lines(path, &lines)
}

/// How well a checkpoint writes texts of others, and what it writes.
#[derive(Debug, clap::Args)]
pub struct WrittenArgs {
    /// Checkpoint (or run) of `finetune write`
    #[arg(long, value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// What is read, one text a line
    #[arg(long, value_name = "FILE")]
    sources: PathBuf,
    /// What should be written of it, line by line
    #[arg(long, value_name = "FILE")]
    targets: PathBuf,
    /// Where to write what the model says, one text a line
    #[arg(long, value_name = "FILE")]
    predictions: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs `unimo-train eval written`.
///
/// # Errors
/// An unusable checkpoint or files, failed writes.
pub fn run_written(args: &WrittenArgs) -> Result<ExitCode> {
    let folder = checkpoint::resolve(&args.checkpoint)?;
    let model = Unimo::load(&folder, &args.device.open()?)?;
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
    let data = WritingData::new(&generation::read(&args.sources, &args.targets)?, &tokenizer, model.config().positions);
    let written = generation::write(&model, &tokenizer, &data, WRITTEN_TOKENS)?;
    if let Some(path) = &args.predictions {
        work_files::write_whole(path, format!("{}\n", written.join("\n")).as_bytes())?;
    }
    let mut scores = serde_json::to_value(data.score(&written))?;
    if args.json {
        (scores["schema"], scores["texts"]) = (1.into(), written.len().into());
        println!("{scores}");
    } else {
        for (name, score) in scores.as_object().into_iter().flatten() {
            println!("{} {:.4}", name.replace('_', "-"), score.as_f64().unwrap_or(f64::NAN));
        }
    }
    Ok(ExitCode::SUCCESS)
}
