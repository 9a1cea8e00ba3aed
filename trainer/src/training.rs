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
use crate::tfidf::TfIdfIndex;
use crate::vision::Vision;

/// Newest checkpoints that a run keeps.
const KEPT_CHECKPOINTS: usize = 2;

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
    if job.recipe.batch.match_rewrites > 0 {
        if job.rewrites.is_empty() {
            bail!("the recipe trains on rewritten captions (`match_rewrites`), and none were given with --rewrites");
        }
        for folder in &job.rewrites {
            corpus.add_rewrites(folder, tokenizer, positions)?;
        }
    }
    let batch = &job.recipe.batch;
    if (batch.images_alone > 0 || batch.retrieved_images > 0) && !job.images.is_empty() {
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
    hash.update((corpus.image_count() as u64).to_le_bytes());
    hash.update((corpus.texts.len() as u64).to_le_bytes());
    Ok(hex(&hash.finalize()[..16]))
}

/// Runs (or goes on with) a job and returns its last checkpoint.
///
/// # Errors
/// Unusable input, failed writes, a run that is already there (without `resume`) or is another one (with it).
pub fn run(job: &TrainingJob) -> Result<PathBuf> {
    let device = Device::Cpu;
    let checkpoints = job.run.join("checkpoints");
    let existing = checkpoint::list(&checkpoints)?;
    if !job.resume && !existing.is_empty() {
        bail!("{} already holds a run; go on with --resume, or choose another --out", job.run.display());
    }
    std::fs::create_dir_all(&checkpoints).with_context(|| format!("cannot create {}", checkpoints.display()))?;
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
    let log_path = job.run.join("log.jsonl");
    forget_later_steps(&log_path, step)?;
    std::fs::write(job.run.join("recipe.toml"), toml::to_string(&job.recipe)?)?;

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
        critic: critic.as_ref(),
    };
    let mut companions =
        Companions { tokenizer: job.tokenizer.clone(), backbone: backbone_file, training: training_note(job, &corpus)? };
    let mut trainer = Loop { job, model, optimizer, source, orders: Orders::default(), fingerprint };
    let progress = bar(job.recipe.steps, "{bar:30} step {pos}/{len}  {msg}  {elapsed} gone, {eta} to go").with_position(step);
    let last_step = job.stop_after.map_or(job.recipe.steps, |n| job.recipe.steps.min(step + n));
    let mut last = existing.last().cloned();
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
            last = Some(checkpoint::save(&checkpoints, &trainer.model, &trainer.optimizer, &state, &companions)?);
            checkpoint::prune(&checkpoints, KEPT_CHECKPOINTS)?;
        }
        if !development.pairs.is_empty() && (step.is_multiple_of(job.recipe.evaluate_every) || finished) {
            let scores = evaluation::evaluate(&trainer.model, &vision, &tokenizer, &development, job.recipe.evaluate_images)?;
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
