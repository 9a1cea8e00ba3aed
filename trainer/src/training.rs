//! The training loop: a recipe over a corpus, with checkpoints, a log, and exact resumption.

mod rehearsal;
mod set_up;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use sha2::{Digest, Sha256};

pub use rehearsal::{Rehearsal, rehearse, rehearse_among};
use set_up::{JudgedBy, Ready, set_up};

use crate::checkpoint::{self, RunState};
use crate::device;
use crate::evaluation::{self, Extent};
use crate::model::{Dropout, ModelConfig, Unimo};
use crate::objectives::{Learnt, Losses, Orders, Source, StepBatch, Tally};
use crate::ops::Readings;
#[cfg(feature = "cuda")]
use crate::ops::cuda::layers::Counts;
use crate::optimizer::{AdamW, Update};
use crate::parallel::{self, Alone, Collective, Connected, Passes};
use crate::recipe::Recipe;
use crate::seed;
use crate::tasks::generation::{self, SourceAndTarget};
use crate::tasks::{self, RawExample, TaskSpec};

/// Batches of each thread that wait to be learnt from, beside the one that it is drawing.
const BATCHES_AHEAD: usize = 1;

/// Newest checkpoints that a run keeps.
const KEPT_CHECKPOINTS: usize = 2;

/// Tokens that a text written for evaluation may have.
pub const WRITTEN_TOKENS: usize = 60;

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
    /// Shards of pictures alone; with a model of detected regions, tables of them.
    pub images: Vec<PathBuf>,
    /// Tables of the detected regions of pictures with captions, for a model of such.
    pub regions: Vec<PathBuf>,
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
    /// Keeps of the layers' activations their inputs alone and computes the rest again: less memory for more time.
    pub activation_checkpointing: bool,
    /// Threads that draw and pack batches ahead of the one that is learnt from; 0 for what the device calls for. Batches are the same
    /// whatever their number.
    pub drawing_threads: usize,
    /// Where the arithmetic is done. The data are read and packed on the CPU.
    pub device: Device,
}

impl TrainingJob {
    /// One beside the CPU's own work; a GPU leaves the CPU idle, and would wait for one. None where captions are drawn from the model
    /// as the step before has left it.
    fn drawing_threads(&self) -> usize {
        /// More than these are left for other ranks.
        const MOST: usize = 8;
        if self.recipe.batch.sampled_captions > 0 {
            return 0;
        }
        match (self.drawing_threads, &self.device) {
            (0, Device::Cpu) => 1,
            (0, _) => thread::available_parallelism().map_or(1, |cores| cores.get() / 2).clamp(1, MOST),
            (asked, _) => asked,
        }
    }
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

/// A bar on the terminal of rank 0.
fn bar(ranks: &dyn Collective, length: u64, template: &str) -> ProgressBar {
    if ranks.rank() > 0 || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// Runs (or goes on with) a job and returns its last checkpoint.
///
/// # Errors
/// Unusable input, failed writes, a run that is already there (without `resume`) or is another one (with it).
pub fn run(job: &TrainingJob) -> Result<PathBuf> {
    run_among(&Alone, job)
}

/// Runs (or goes on with) a job together with other ranks, which all call it with the same job and see the same folders. Rank 0
/// alone writes checkpoints and the log; any number of ranks goes on with what another number has begun.
///
/// # Errors
/// As [`run`]; a rank that is gone, or has another job.
pub fn run_among(ranks: &dyn Collective, job: &TrainingJob) -> Result<PathBuf> {
    let ranks = &Connected::new(ranks, &job.device)?;
    parallel::agree(ranks, "recipe", toml::to_string(&job.recipe)?.as_bytes())?;
    parallel::agree(
        ranks,
        "end of this call (--stop-after, --resume)",
        format!("{:?}{}", job.stop_after, job.resume).as_bytes(),
    )?;
    let checkpoints = job.run.join("checkpoints");
    let existing = checkpoint::list(&checkpoints)?;
    if !job.resume && !existing.is_empty() {
        bail!("{} already holds a run; go on with --resume, or choose another --out", job.run.display());
    }
    std::fs::create_dir_all(&checkpoints).with_context(|| format!("cannot create {}", checkpoints.display()))?;
    set_up(job, &existing, ranks, |ready| train(job, &checkpoints, existing.last(), ready))
}

fn train(job: &TrainingJob, checkpoints: &Path, resumed: Option<&PathBuf>, ready: Ready) -> Result<PathBuf> {
    let Ready { trainer, mut optimizer, judged_by, mut companions, step } = ready;
    let (vision, ranks) = (trainer.source.vision, trainer.ranks);
    let log_path = job.run.join("log.jsonl");
    let writes = ranks.rank() == 0;
    if writes {
        forget_later_steps(&log_path, step)?;
        std::fs::write(job.run.join("recipe.toml"), toml::to_string(&job.recipe)?)?;
    }
    let end = job.recipe.last_step();
    let progress = bar(ranks, end, "{bar:30} step {pos}/{len}  {msg}  {elapsed} gone, {eta} to go").with_position(step);
    let last_step = job.stop_after.map_or(end, |n| end.min(step + n));
    let mut last = resumed.cloned();
    trainer.run(step..last_step, &mut optimizer, |optimizer, entry, step| {
        let saves = job.recipe.saves_at(step);
        if saves && ranks.ranks() > 1 {
            parallel::agree(ranks, "set of weights", &trainer.hash_of_weights(optimizer)?)?;
        }
        if !writes {
            return Ok(());
        }
        append(&log_path, &entry)?;
        progress.set_position(step);
        progress.set_message(format!("loss {:.3}", entry["loss"].as_f64().unwrap_or(f64::NAN)));
        if saves {
            let state = RunState { step, updates: optimizer.updates()?, fingerprint: trainer.fingerprint.clone() };
            if vision.trained_blocks() > 0 {
                companions.backbone = Some(vision.current()?.to_bytes()?);
            }
            last = Some(checkpoint::save(checkpoints, &trainer.model, optimizer, &state, &companions)?);
            checkpoint::prune(checkpoints, KEPT_CHECKPOINTS)?;
        }
        if job.recipe.judges_at(step) {
            for (mut entry, said) in judge(&trainer, &judged_by, job.recipe.evaluate_images)? {
                (entry["schema"], entry["step"], entry["development"]) = (json!(1), json!(step), json!(true));
                append(&log_path, &entry)?;
                progress.suspend(|| eprintln!("step {step}: {said}"));
            }
        }
        Ok(())
    })?;
    progress.finish_and_clear();
    // Nobody leaves before rank 0 has written what there was to write.
    ranks.barrier()?;
    if !writes {
        last = checkpoint::list(checkpoints)?.pop().or(last);
    }
    let every = job.recipe.checkpoint_every;
    last.with_context(|| {
        format!("the run ends after step {last_step}, before its first checkpoint: there is one every {every} steps")
    })
}

/// Scores on the development data of each kind that there is: an entry for the log, and a line for people.
fn judge(trainer: &Loop, by: &JudgedBy, images: usize) -> Result<Vec<(serde_json::Value, String)>> {
    let (model, vision) = (&trainer.model, trainer.source.vision);
    let mut found = Vec::new();
    if let Some(examples) = by.examples {
        let scores = examples.score(&tasks::predict(model, vision, trainer.source.corpus, examples)?)?;
        let mut entry = json!({ "examples": examples.examples.len() });
        let mut said = Vec::new();
        for (metric, score) in scores {
            let name = serde_json::to_value(metric)?.as_str().unwrap_or_default().to_owned();
            said.push(format!("{name} {score:.3}"));
            entry[name] = json!(score);
        }
        found.push((entry, format!("{} of {} ({} examples)", said.join(", "), examples.spec.name, examples.examples.len())));
    }
    if let Some(data) = by.to_write {
        let scores = data.score(&generation::write(model, by.tokenizer, data, WRITTEN_TOKENS)?);
        found.push((serde_json::to_value(scores)?, format!("{scores} ({} texts)", data.examples.len())));
    }
    if !by.development.pairs.is_empty() {
        let scores = evaluation::evaluate(model, vision, by.tokenizer, by.development, Extent { images, rerank: None })?;
        found.push((serde_json::to_value(&scores)?, scores.to_string()));
    }
    Ok(found)
}

struct Loop<'a> {
    job: &'a TrainingJob,
    model: Unimo,
    source: Source<'a>,
    fingerprint: String,
    ranks: &'a dyn Collective,
    passes: Passes,
}

/// Seconds that a step's batch took to be drawn and packed, and that the step waited for it.
#[derive(Clone, Copy)]
struct DataSeconds {
    drawn: f64,
    waited: f64,
}

/// A step that a device was asked for.
struct Asked {
    step: u64,
    losses: Losses,
    update: Update,
    /// Temperature, losses and the gradient's norm, those that there are.
    readings: Readings,
    /// What the log is told of it, but for what is not known yet.
    entry: serde_json::Value,
}

impl Loop<'_> {
    /// Learns steps; `after` each, it is given the optimiser, the step's entry for the log, and the number of steps done.
    ///
    /// A GPU is given the next step before the host looks at what became of one, so that it always has something to do; but where
    /// weights are looked at after a step, the next one waits.
    fn run(
        &self,
        steps: Range<u64>,
        optimizer: &mut AdamW,
        mut after: impl FnMut(&mut AdamW, serde_json::Value, u64) -> Result<()>,
    ) -> Result<()> {
        // Ranks hear of each other's losses, which is a step of its own between them.
        let ahead = self.model.device().is_cuda() && self.ranks.ranks() == 1;
        let (began, mut ended, mut asked) = (Instant::now(), Instant::now(), None);
        let mut end = |asked: Asked, optimizer: &mut AdamW| {
            let step = asked.step;
            let mut entry = self.read(asked)?;
            entry["seconds"] = json!(ended.elapsed().as_secs_f64());
            entry["elapsed"] = json!(began.elapsed().as_secs_f64());
            after(optimizer, entry, step + 1)?;
            ended = Instant::now();
            anyhow::Ok(())
        };
        let mut learn = |step: u64, batch: &StepBatch, data: DataSeconds| {
            let this = self.ask(step, batch, data, optimizer)?;
            if let Some(before) = asked.take() {
                end(before, optimizer)?;
            }
            if ahead && !self.job.recipe.saves_at(step + 1) && !self.job.recipe.judges_at(step + 1) {
                asked = Some(this);
                return Ok(());
            }
            end(this, optimizer)
        };
        // Where a step fails, nobody waits for what its device was given: not the threads that draw, nor whoever drops what it is worked with.
        self.each_batch(steps, |step, batch, data| learn(step, &batch, data).inspect_err(|_| self.give_up()))?;
        asked.map_or(Ok(()), |last| end(last, optimizer)).inspect_err(|_| self.give_up())
    }

    fn give_up(&self) {
        if let Some(devices) = self.ranks.devices() {
            devices.give_up();
        }
    }

    /// Draws and packs the batches of steps, and learns nothing: seconds of each.
    fn draw(&self, steps: Range<u64>) -> Result<Vec<f64>> {
        let mut orders = Orders::default();
        steps.map(|step| Ok(self.batch(step, &mut orders)?.1)).collect()
    }

    /// The batch of a step, and the seconds that it took to be drawn and packed.
    fn batch(&self, step: u64, orders: &mut Orders) -> Result<(StepBatch, f64)> {
        let started = Instant::now();
        let batch = StepBatch::build_own(&self.model, &self.job.recipe, &self.source, orders, step, &self.passes)?;
        Ok((batch, started.elapsed().as_secs_f64()))
    }

    /// Hands on the batches of steps in order, with what each took. Threads of their own draw and pack them, in turns, ahead of the one
    /// that is learnt from; where there are none, this one does.
    fn each_batch(&self, steps: Range<u64>, mut hand_on: impl FnMut(u64, StepBatch, DataSeconds) -> Result<()>) -> Result<()> {
        let threads = self.job.drawing_threads();
        if threads == 0 {
            let mut orders = Orders::default();
            for step in steps {
                let (batch, drawn) = self.batch(step, &mut orders)?;
                hand_on(step, batch, DataSeconds { drawn, waited: drawn })?;
            }
            return Ok(());
        }
        thread::scope(|scope| {
            let spawn = |first: usize| {
                let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
                let own = steps.clone().skip(first).step_by(threads);
                scope.spawn(move || {
                    let mut orders = Orders::default();
                    for step in own {
                        let batch = self.batch(step, &mut orders);
                        let failed = batch.is_err();
                        // Nobody listens any more once a step has failed.
                        if sender.send(batch).is_err() || failed {
                            break;
                        }
                    }
                });
                receiver
            };
            // Owned here, so that they are dropped, and the threads end, before the scope waits for these.
            let receivers: Vec<_> = (0..threads).map(spawn).collect();
            for (step, receiver) in steps.clone().zip(receivers.iter().cycle()) {
                let started = Instant::now();
                let (batch, drawn) = receiver.recv().context("the thread that draws batches has ended")??;
                hand_on(step, batch, DataSeconds { drawn, waited: started.elapsed().as_secs_f64() })?;
            }
            Ok(())
        })
    }

    /// Asks for all that a step is: on a GPU, nothing of it is waited for.
    fn ask(&self, step: u64, batch: &StepBatch, data: DataSeconds, optimizer: &mut AdamW) -> Result<Asked> {
        let recipe = &self.job.recipe;
        let rate = recipe.dropout.unwrap_or(self.model.config().dropout) as f32;
        let mut dropout = Dropout::of(rate, seed::mix(recipe.seed ^ 0xd409, step));
        dropout.features = recipe.feature_dropout.map_or(rate, |share| share as f32);
        let whole = Tally::of(batch, &self.model, self.source.vision).over(self.ranks)?;
        let Learnt { losses, gradients } = batch.learn(&self.model, recipe, &self.source, dropout, &whole, self.ranks)?;
        let learning_rate = recipe.optimizer.rate(step, recipe.steps);
        let update = optimizer.step(&gradients, learning_rate)?;
        let arrays = [Some(self.model.temperature()?), losses.array().cloned(), update.array().cloned()];
        let readings = Readings::of(arrays.into_iter().flatten().collect())?;
        let mut entry = json!({
            "schema": 1,
            "step": step + 1,
            "rate": learning_rate,
            "rows": whole.rows,
            "operations": whole.operations,
            "pictures": batch.pictures,
            "reward": whole.reward(),
            "waited": data.waited,
            "drawn": data.drawn,
        });
        #[cfg(feature = "cuda")]
        if self.model.device().is_cuda() {
            let told = |of: Counts| json!({"passes": of.passes, "replayed": of.replayed, "recorded": of.recordings});
            entry["graphs"] = told(self.model.passes_through_layers());
            entry["graphs"]["objectives"] = told(self.model.computing().counts());
        }
        if self.ranks.ranks() > 1 {
            entry["ranks"] = json!(self.ranks.ranks());
        }
        Ok(Asked { step, losses, update, readings, entry })
    }

    /// Waits for a step, and completes its entry for the log.
    fn read(&self, asked: Asked) -> Result<serde_json::Value> {
        let Asked { step, losses, update, readings, mut entry } = asked;
        if let Some(devices) = self.ranks.devices() {
            devices.wait(self.ranks)?;
        }
        let mut values = readings.read()?.into_iter();
        let temperature = values.next().context("the temperature was not read")?[0];
        let of_losses = losses.array().and_then(|_| values.next()).unwrap_or_default();
        let (total, losses) = losses.told(&of_losses, self.ranks)?;
        let report = update.told(update.array().and_then(|_| values.next()).map(|norm| norm[0]));
        if report.skipped && self.ranks.rank() == 0 {
            eprintln!("step {}: the gradient is not finite; the update was left out", step + 1);
        }
        let objectives: serde_json::Map<_, _> = losses.iter().map(|(name, loss)| ((*name).to_owned(), json!(loss))).collect();
        entry["loss"] = json!(total);
        entry["objectives"] = json!(objectives);
        entry["gradient_norm"] = json!(report.gradient_norm);
        entry["skipped"] = json!(report.skipped);
        entry["temperature"] = json!(temperature);
        entry["device_memory"] = json!(device::memory_in_use(self.model.device()));
        Ok(entry)
    }

    /// Hash of everything that a step changes.
    fn hash_of_weights(&self, optimizer: &AdamW) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        let mut put = |tensor: &Tensor| -> Result<()> {
            tensor.flatten_all()?.to_vec1::<f32>()?.iter().for_each(|value| hash.update(value.to_le_bytes()));
            Ok(())
        };
        for var in self.model.weights().values().chain(self.source.vision.weights().values()) {
            put(var.as_tensor())?;
        }
        let (moments, updates) = optimizer.state()?;
        for (_, moment) in moments.into_iter().collect::<BTreeMap<_, _>>() {
            put(&moment)?;
        }
        hash.update(updates.to_le_bytes());
        Ok(hash.finalize().to_vec())
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
