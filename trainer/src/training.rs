//! The training loop: a recipe over a corpus, with checkpoints, a log, and exact resumption.

use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use sha2::{Digest, Sha256};
use unimo::tokenizer::Tokenizer;

use crate::backbone::{Backbone, CHANNELS, FEATURES};
use crate::checkpoint::{self, Companions, RunState};
use crate::corpus::Corpus;
use crate::evaluation;
use crate::features::{FeatureCache, hex};
use crate::model::{Dropout, ModelConfig, RegionStatistics, Unimo};
use crate::objectives::{Critic, Orders, Source, StepBatch, Vocabulary};
use crate::optimizer::AdamW;
use crate::recipe::Recipe;
use crate::seed;
use crate::tasks::generation::{self, SourceAndTarget, WritingData};
use crate::tasks::{self, RawExample, TaskData, TaskSpec};
use crate::tfidf::TfIdfIndex;
use crate::vision::Vision;

/// Newest checkpoints that a run keeps.
const KEPT_CHECKPOINTS: usize = 2;

/// Tokens that a text written for evaluation may have.
pub const WRITTEN_TOKENS: usize = 60;

/// Pictures from which the statistics of the region features are taken.
const STATISTICS_PICTURES: usize = 1000;

/// What to train, on what, and where to put it.
#[derive(Debug, Clone)]
pub struct TrainingJob {
    /// Recipe.
    pub recipe: Recipe,
    /// Sizes of a fresh model; with `init`, the checkpoint's sizes count.
    pub size: ModelConfig,
    /// Checkpoint to start from.
    pub init: Option<PathBuf>,
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Backbone file of a fresh model; with `init`, the checkpoint's own counts, and another one is refused.
    pub backbone: Option<PathBuf>,
    /// Shards of pictures with captions.
    pub pairs: Vec<PathBuf>,
    /// Shards of pictures alone.
    pub images: Vec<PathBuf>,
    /// Files of texts alone.
    pub texts: Vec<PathBuf>,
    /// Folders of rewritten captions.
    pub rewrites: Vec<PathBuf>,
    /// Folders of what was retrieved.
    pub retrieved: Vec<PathBuf>,
    /// Development shards.
    pub development: Vec<PathBuf>,
    /// A downstream task.
    pub task: Option<TaskJob>,
    /// Writing of texts, with development examples behind the training ones.
    pub writing: Option<[Vec<SourceAndTarget>; 2]>,
    /// Folder of the feature cache.
    pub features: PathBuf,
    /// Folder of the run.
    pub run: PathBuf,
    /// Goes on with the run that is there.
    pub resume: bool,
    /// Description and licence of the data, for the checkpoint's `training.toml`.
    pub data_note: String,
    /// Stops after this many steps of this call, as if interrupted after the next checkpoint.
    pub stop_after: Option<u64>,
}

/// A downstream task to be learnt: its examples, and those by which it is judged on the way.
#[derive(Debug, Clone)]
pub struct TaskJob {
    /// The task.
    pub spec: TaskSpec,
    /// Training examples.
    pub train: Vec<RawExample>,
    /// Development examples; may be empty.
    pub development: Vec<RawExample>,
}

fn bar(length: u64, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// Loads what the job trains on.
fn load_corpus(job: &TrainingJob, tokenizer: &Tokenizer, vision: &Vision, positions: usize) -> Result<(Corpus, Corpus)> {
    let spinner = bar(0, "features: {pos} pictures, {elapsed}");
    let cache =
        |views| FeatureCache { folder: &job.features, backbone: vision.given(), trained_blocks: vision.trained_blocks(), views };
    let progress = |n: u64| spinner.inc(n);
    let mut corpus = Corpus::default();
    corpus.add_pairs(&job.pairs, &cache(job.recipe.views), tokenizer, positions, &progress)?;
    if job.recipe.batch.match_rewrites + job.recipe.batch.match_paraphrases > 0 {
        if job.rewrites.is_empty() {
            bail!(
                "the recipe trains on rewritten captions (`match_rewrites`, `match_paraphrases`), and none were given with --rewrites"
            );
        }
        for folder in &job.rewrites {
            corpus.add_rewrites(folder, tokenizer, positions)?;
        }
    }
    let batch = &job.recipe.batch;
    let of_task = job.task.as_ref().is_some_and(|task| task.spec.pictures);
    if (batch.images_alone > 0 || batch.retrieved_images > 0 || of_task) && !job.images.is_empty() {
        corpus.add_images(&job.images, &cache(job.recipe.views.min(2)), &progress)?;
    }
    if batch.retrieved_pairs > 0 {
        if job.retrieved.is_empty() {
            bail!("the recipe trains on retrieved images and texts (`retrieved_pairs`), and none were given with --retrieved");
        }
        for folder in &job.retrieved {
            corpus.add_retrieved(folder, batch.retrieved_images > 0, tokenizer, positions)?;
        }
    }
    if job.recipe.batch.texts + job.recipe.batch.fragment_texts > 0 {
        for file in &job.texts {
            corpus.add_texts(file, tokenizer, positions)?;
        }
    }
    let mut development = Corpus::default();
    if !job.development.is_empty() {
        development.add_pairs(&job.development, &cache(1), tokenizer, positions, &progress)?;
    }
    spinner.finish_and_clear();
    for damage in corpus.damaged.iter().chain(&development.damaged) {
        eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    let b = &job.recipe.batch;
    corpus.require(b.images > 0, b.images_alone > 0, b.texts + b.fragment_texts > 0)?;
    eprintln!(
        "{} pictures with captions, {} alone, {} texts alone, {} for development; {} records skipped",
        corpus.pairs.len(),
        corpus.image_count(),
        corpus.texts.len(),
        development.pairs.len(),
        corpus.damaged.len() + development.damaged.len()
    );
    Ok((corpus, development))
}

/// Everything that decides the loss curve, hashed: a run resumes only as what it was.
fn fingerprint(job: &TrainingJob, config: &ModelConfig, corpus: &Corpus) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(toml::to_string(&job.recipe)?);
    hash.update(toml::to_string(config)?);
    hash.update(std::fs::read(&job.tokenizer)?);
    for pair in &corpus.pairs {
        hash.update(&pair.key);
    }
    if let Some(task) = &job.task {
        hash.update(toml::to_string(&task.spec)?);
        task.train.iter().for_each(|example| hash.update(&example.id));
    }
    if let Some([train, _]) = &job.writing {
        train.iter().for_each(|example| hash.update(format!("{}\t{}\n", example.source, example.target)));
    }
    hash.update((corpus.image_count() as u64).to_le_bytes());
    hash.update((corpus.texts.len() as u64).to_le_bytes());
    Ok(hex(&hash.finalize()[..16]))
}

/// A job set up: what its steps need, and where it stands.
struct Ready<'a> {
    trainer: Loop<'a>,
    tokenizer: &'a Tokenizer,
    vision: &'a Vision,
    development: &'a Corpus,
    /// Development examples of the downstream task.
    examples: Option<&'a TaskData>,
    /// Development examples of writing.
    to_write: Option<&'a WritingData>,
    companions: Companions,
    step: u64,
}

/// Loads everything that the steps of a job need, at the newest of its `existing` checkpoints, and hands it to `work`. Nothing is
/// written but the feature cache.
fn set_up<R>(job: &TrainingJob, existing: &[PathBuf], work: impl FnOnce(Ready) -> Result<R>) -> Result<R> {
    let device = Device::Cpu;
    let tokenizer = Tokenizer::from_file(&job.tokenizer)?;
    let backbone_file = backbone_file(job, existing.last())?;
    let vision = Vision::new(Backbone::from_bytes(&backbone_file)?, job.recipe.trained_blocks, &device)?;

    let mut model = initial_model(job, existing.last(), &tokenizer, &device)?;
    if model.config().region_feature != FEATURES {
        bail!("the backbone makes {FEATURES} features of a region, the model takes {}", model.config().region_feature);
    }
    let (corpus, development) = load_corpus(job, &tokenizer, &vision, model.config().positions.min(48))?;
    if existing.is_empty() && job.init.is_none() {
        let regions = vision.regions(corpus.sampled_records(STATISTICS_PICTURES).collect())?;
        let mut statistics = RegionStatistics::of(FEATURES, regions.into_iter());
        statistics.emphasise(CHANNELS..FEATURES, model.config().colour_emphasis as f32);
        model.set_statistics(statistics)?;
    }
    let mut task = None;
    if let Some(of_job) = &job.task {
        let classes = of_job.spec.classes.len();
        if existing.is_empty() {
            model = model.with_task(classes, seed::mix(job.recipe.seed, 0x7a5c))?;
        }
        let data = |raw: &[RawExample]| -> Result<Option<TaskData>> {
            if raw.is_empty() {
                return Ok(None);
            }
            let data = TaskData::new(&of_job.spec, raw.to_vec(), &corpus, &tokenizer, model.config().positions)?;
            if data.without_picture > 0 {
                eprintln!("{} of {} examples left out: their pictures are not among --images", data.without_picture, raw.len());
            }
            Ok(Some(data))
        };
        task = Some((data(&of_job.train)?.context("the task has no training examples")?, data(&of_job.development)?));
    } else if job.recipe.batch.task_examples > 0 && job.writing.is_none() {
        bail!("the recipe learns a downstream task (`task_examples`), and none was given");
    }
    let positions = model.config().positions;
    let writing = job.writing.as_ref().map(|both| both.each_ref().map(|raw| WritingData::new(raw, &tokenizer, positions)));
    let fingerprint = fingerprint(job, model.config(), &corpus)?;
    let mut optimizer = AdamW::new(job.recipe.optimizer.clone(), model.weights().iter().chain(vision.weights()));
    let mut step = 0;
    if let Some(last) = existing.last() {
        let state = checkpoint::state(last)?;
        if state.fingerprint != fingerprint {
            bail!("{} is a run of another recipe, tokenizer or data; start a new one with another --out", job.run.display());
        }
        checkpoint::restore_optimizer(last, &mut optimizer, &state)?;
        step = state.step;
        eprintln!("going on after step {step}");
    }

    let texts: Vec<&[u32]> = corpus.pairs.iter().flat_map(|p| p.captions.iter().map(Vec::as_slice)).collect();
    let first_text: Vec<usize> = corpus
        .pairs
        .iter()
        .scan(0, |next, p| {
            let first = *next;
            *next += p.captions.len();
            Some(first)
        })
        .collect();
    let image_of: Vec<u32> = corpus.pairs.iter().enumerate().flat_map(|(i, p)| vec![i as u32; p.captions.len()]).collect();
    let tfidf = (job.recipe.batch.match_images > 0).then(|| TfIdfIndex::new(&texts, image_of));
    let critic = (job.recipe.batch.sampled_captions > 0).then(|| Critic::new(&corpus, &tokenizer));
    let source = Source {
        corpus: &corpus,
        tfidf: tfidf.as_ref(),
        first_text: &first_text,
        vision: &vision,
        vocabulary: &Vocabulary::of(&tokenizer),
        task: task.as_ref().map(|(train, _)| train),
        writing: writing.as_ref().map(|[train, _]| train),
        critic: critic.as_ref(),
    };
    let companions = Companions {
        tokenizer: job.tokenizer.clone(),
        backbone: backbone_file,
        task: job.task.as_ref().map(|task| toml::to_string(&task.spec)).transpose()?,
        training: training_note(job, &corpus)?,
    };
    let trainer = Loop { job, model, optimizer, source, orders: Orders::default(), fingerprint };
    let examples = task.as_ref().and_then(|(_, development)| development.as_ref());
    let to_write = writing.as_ref().map(|[_, development]| development).filter(|data| !data.examples.is_empty());
    work(Ready {
        trainer,
        tokenizer: &tokenizer,
        vision: &vision,
        development: &development,
        examples,
        to_write,
        companions,
        step,
    })
}

/// Runs (or goes on with) a job and returns its last checkpoint.
///
/// # Errors
/// Unusable input, failed writes, a run that is already there (without `resume`) or is another one (with it).
pub fn run(job: &TrainingJob) -> Result<PathBuf> {
    let checkpoints = job.run.join("checkpoints");
    let existing = checkpoint::list(&checkpoints)?;
    if !job.resume && !existing.is_empty() {
        bail!("{} already holds a run; go on with --resume, or choose another --out", job.run.display());
    }
    std::fs::create_dir_all(&checkpoints).with_context(|| format!("cannot create {}", checkpoints.display()))?;
    set_up(job, &existing, |ready| train(job, &checkpoints, existing.last(), ready))
}

fn train(job: &TrainingJob, checkpoints: &Path, resumed: Option<&PathBuf>, ready: Ready) -> Result<PathBuf> {
    let Ready { mut trainer, tokenizer, vision, development, examples, to_write, mut companions, mut step } = ready;
    let log_path = job.run.join("log.jsonl");
    forget_later_steps(&log_path, step)?;
    std::fs::write(job.run.join("recipe.toml"), toml::to_string(&job.recipe)?)?;
    let progress = bar(job.recipe.steps, "{bar:30} step {pos}/{len}  {msg}  {elapsed} gone, {eta} to go").with_position(step);
    let last_step = job.stop_after.map_or(job.recipe.steps, |n| job.recipe.steps.min(step + n));
    let mut last = resumed.cloned();
    while step < last_step {
        let entry = trainer.step(step)?;
        step += 1;
        append(&log_path, &entry)?;
        progress.set_position(step);
        progress.set_message(format!("loss {:.3}", entry["loss"].as_f64().unwrap_or(f64::NAN)));
        let finished = step == job.recipe.steps;
        if step.is_multiple_of(job.recipe.checkpoint_every) || finished {
            let state = RunState { step, updates: trainer.optimizer.updates(), fingerprint: trainer.fingerprint.clone() };
            if vision.trained_blocks() > 0 {
                companions.backbone = vision.current()?.to_bytes()?;
            }
            last = Some(checkpoint::save(checkpoints, &trainer.model, &trainer.optimizer, &state, &companions)?);
            checkpoint::prune(checkpoints, KEPT_CHECKPOINTS)?;
        }
        if let (Some(examples), true) = (examples, step.is_multiple_of(job.recipe.evaluate_every) || finished) {
            let scores = examples.score(&tasks::predict(&trainer.model, vision, trainer.source.corpus, examples)?)?;
            let mut entry = json!({ "schema": 1, "step": step, "development": true, "examples": examples.examples.len() });
            let mut said = Vec::new();
            for (metric, score) in scores {
                let name = serde_json::to_value(metric)?.as_str().unwrap_or_default().to_owned();
                said.push(format!("{name} {score:.3}"));
                entry[name] = json!(score);
            }
            append(&log_path, &entry)?;
            progress.suspend(|| {
                eprintln!("step {step}: {} of {} ({} examples)", said.join(", "), examples.spec.name, examples.examples.len())
            });
        }
        if let (Some(data), true) = (to_write, step.is_multiple_of(job.recipe.evaluate_every) || finished) {
            let scores = data.score(&generation::write(&trainer.model, tokenizer, data, WRITTEN_TOKENS)?);
            let mut entry = serde_json::to_value(scores)?;
            (entry["schema"], entry["step"], entry["development"]) = (json!(1), json!(step), json!(true));
            append(&log_path, &entry)?;
            progress.suspend(|| eprintln!("step {step}: {scores:?} ({} texts)", data.examples.len()));
        }
        if !development.pairs.is_empty() && (step.is_multiple_of(job.recipe.evaluate_every) || finished) {
            let scores = evaluation::evaluate(&trainer.model, vision, tokenizer, development, job.recipe.evaluate_images)?;
            let mut entry = serde_json::to_value(&scores)?;
            entry["schema"] = json!(1);
            entry["step"] = json!(step);
            entry["development"] = json!(true);
            append(&log_path, &entry)?;
            progress.suspend(|| eprintln!("step {step}: {scores}"));
        }
    }
    progress.finish_and_clear();
    last.context("no step was run")
}

/// What a job would cost, by a few of its steps.
#[derive(Debug, Clone)]
pub struct Rehearsal {
    /// Trained parameters of the model, and of the backbone.
    pub parameters: [usize; 2],
    /// Steps done before, and in all.
    pub steps: [u64; 2],
    /// Pictures with captions, and packed rows, of a step.
    pub pictures: usize,
    /// Packed rows of a step.
    pub rows: usize,
    /// Floating-point operations of a step's matrix products, forward and backward.
    pub operations: f64,
    /// Seconds of a step, measured.
    pub seconds: f64,
    /// The largest memory of the process so far, in bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Steps of a rehearsal; the first is not timed.
const REHEARSED_STEPS: u64 = 4;

/// Runs the first steps of a job (or of what is left of it) and throws them away. Nothing is written but the feature cache.
///
/// # Errors
/// As [`run`], but that a run which is already there is gone on with.
pub fn rehearse(job: &TrainingJob) -> Result<Rehearsal> {
    let existing = checkpoint::list(&job.run.join("checkpoints"))?;
    set_up(job, &existing, |mut ready| {
        let counts = |weights: &std::collections::BTreeMap<String, candle_core::Var>| {
            weights.values().map(|var| var.elem_count()).sum::<usize>()
        };
        let parameters = [counts(ready.trainer.model.weights()), counts(ready.vision.weights())];
        let (mut seconds, mut rows, mut operations) = (Vec::new(), 0, 0.0);
        for step in ready.step..ready.step + REHEARSED_STEPS {
            let entry = ready.trainer.step(step)?;
            let number = |key: &str| entry[key].as_f64().unwrap_or(0.0);
            seconds.push(number("seconds"));
            rows = rows.max(number("rows") as usize);
            operations = number("operations").max(operations);
        }
        let timed = &mut seconds[1..];
        timed.sort_by(f64::total_cmp);
        Ok(Rehearsal {
            parameters,
            steps: [ready.step, job.recipe.steps],
            pictures: job.recipe.batch.images,
            rows,
            operations,
            seconds: timed[timed.len() / 2],
            peak_memory: peak_memory(),
        })
    })
}

/// The largest memory of this process so far, where `/proc` tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

impl std::fmt::Display for Rehearsal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [model, backbone] = self.parameters.map(|count| count as f64 / 1e6);
        writeln!(f, "parameters   {model:.2} M of the model and {backbone:.2} M of the backbone are trained")?;
        let giga = self.operations / 1e9;
        write!(f, "a step       {} pictures with captions, {} rows, {giga:.0} GFLOP", self.pictures, self.rows)?;
        if self.pictures > 0 {
            write!(f, " ({:.1} a picture)", giga / self.pictures as f64)?;
        }
        writeln!(f, "\ntime         {:.2} s a step, {:.0} GFLOP/s", self.seconds, giga / self.seconds)?;
        match self.peak_memory {
            Some(bytes) => writeln!(f, "memory       {:.1} GB at most", bytes as f64 / 1e9)?,
            None => writeln!(f, "memory       not known on this system")?,
        }
        let left = self.steps[1].saturating_sub(self.steps[0]);
        let minutes = (left as f64 * self.seconds / 60.0).ceil() as u64;
        write!(f, "to the end   {left} steps, {} h {:02} min without evaluations", minutes / 60, minutes % 60)
    }
}

fn initial_model(job: &TrainingJob, resumed: Option<&PathBuf>, tokenizer: &Tokenizer, device: &Device) -> Result<Unimo> {
    let model = match resumed.or(job.init.as_ref()) {
        Some(path) => Unimo::load(&checkpoint::resolve(path)?, device)?,
        None => {
            let size = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..job.size.clone() };
            Unimo::new(size, job.recipe.seed, device)?
        }
    };
    if model.config().vocabulary != tokenizer.vocabulary_size() {
        bail!("the tokenizer has {} tokens, the model {}", tokenizer.vocabulary_size(), model.config().vocabulary);
    }
    Ok(model)
}

/// The backbone's file: that of the checkpoint to go on with or to start from, else the job's.
fn backbone_file(job: &TrainingJob, resumed: Option<&PathBuf>) -> Result<Vec<u8>> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read the backbone {}", path.display()));
    let given = job.backbone.as_deref().map(read).transpose()?;
    if let Some(resumed) = resumed {
        return read(&resumed.join("backbone.safetensors"));
    }
    let Some(init) = &job.init else {
        return given.context("a fresh model needs a backbone: give --backbone");
    };
    let own = read(&checkpoint::resolve(init)?.join("backbone.safetensors"))?;
    if given.is_some_and(|given| given != own) {
        bail!("{} has a backbone of its own, which is not the one given; leave --backbone out", init.display());
    }
    Ok(own)
}

struct Loop<'a> {
    job: &'a TrainingJob,
    model: Unimo,
    optimizer: AdamW,
    source: Source<'a>,
    orders: Orders,
    fingerprint: String,
}

impl Loop<'_> {
    fn step(&mut self, step: u64) -> Result<serde_json::Value> {
        let started = Instant::now();
        let recipe = &self.job.recipe;
        let batch = StepBatch::build(&self.model, recipe, &self.source, &mut self.orders, step)?;
        let dropout = Dropout { rate: self.model.config().dropout as f32, seed: seed::mix(recipe.seed ^ 0xd409, step) };
        let learnt = batch.learn(&self.model, recipe, &self.source, dropout)?;
        let objectives: serde_json::Map<_, _> =
            learnt.losses.iter().map(|(name, loss)| ((*name).to_owned(), json!(loss))).collect();
        let rate = recipe.optimizer.rate(step, recipe.steps);
        let report = self.optimizer.step(&learnt.gradients, rate)?;
        if report.skipped {
            eprintln!("step {}: the gradient is not finite; the update was left out", step + 1);
        }
        Ok(json!({
            "schema": 1,
            "step": step + 1,
            "loss": learnt.total,
            "objectives": objectives,
            "rate": rate,
            "gradient_norm": report.gradient_norm,
            "skipped": report.skipped,
            "temperature": self.model.temperature()?.to_scalar::<f32>()?,
            "rows": batch.rows(),
            "operations": batch.operations(&self.model, self.source.vision),
            "pictures": batch.pictures,
            "reward": batch.reward(),
            "seconds": started.elapsed().as_secs_f64(),
        }))
    }
}

fn append(path: &Path, entry: &serde_json::Value) -> Result<()> {
    let mut file =
        OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("cannot open {}", path.display()))?;
    writeln!(file, "{entry}").with_context(|| format!("cannot write {}", path.display()))
}

/// Drops log lines of steps after `step`: a resumed run writes them again. A line cut by a crash goes too.
fn forget_later_steps(path: &Path, step: u64) -> Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    let kept: String = text
        .lines()
        .filter(|line| {
            serde_json::from_str::<serde_json::Value>(line).is_ok_and(|v| v["step"].as_u64().is_some_and(|s| s <= step))
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let partial = path.with_extension("tmp");
    std::fs::write(&partial, kept)?;
    std::fs::rename(&partial, path).with_context(|| format!("cannot rewrite {}", path.display()))
}

fn training_note(job: &TrainingJob, corpus: &Corpus) -> Result<String> {
    let mut note = toml::Table::new();
    let mut put = |key: &str, value: toml::Value| note.insert(key.to_owned(), value);
    put("data", job.data_note.clone().into());
    put("pairs", (corpus.pairs.len() as i64).into());
    put("images_alone", (corpus.image_count() as i64).into());
    put("texts_alone", (corpus.texts.len() as i64).into());
    put("steps", (job.recipe.steps as i64).into());
    put("images_per_step", (job.recipe.batch.images as i64).into());
    if let Some(init) = &job.init {
        let folder = checkpoint::resolve(init)?;
        let before = std::fs::read_to_string(folder.join("training.toml")).unwrap_or_default();
        put("initialised_from", toml::Value::Table(before.parse().unwrap_or_default()));
    }
    Ok(toml::to_string(&note)?)
}
