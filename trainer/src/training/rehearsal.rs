//! What a job would cost, told by a few of its steps.

use std::fmt;

use anyhow::Result;

use super::TrainingJob;
use super::set_up::set_up;
use crate::checkpoint;
use crate::parallel::{self, Alone, Collective, Connected};

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
    /// Seconds of those that a step waited for its data.
    pub waited: f64,
    /// Seconds that drawing and packing the data took, beside the step before.
    pub drawn: f64,
    /// Threads that did so, each batches of its own.
    pub drawing_threads: usize,
    /// Seconds of the same with nothing beside it.
    pub drawn_alone: f64,
    /// Processor seconds of a step, all threads together, where the system tells.
    pub cpu_seconds: Option<f64>,
    /// The largest memory of the process so far, in bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Steps of a rehearsal; the first is not timed.
const REHEARSED_STEPS: u64 = 6;

/// Runs the first steps of a job (or of what is left of it) and throws them away. Nothing is written but the feature cache.
///
/// # Errors
/// As [`super::run`], but that a run which is already there is gone on with.
pub fn rehearse(job: &TrainingJob) -> Result<Rehearsal> {
    rehearse_among(&Alone, job)
}

/// As [`rehearse`], together with other ranks; memory and processor seconds are this one's.
///
/// # Errors
/// As [`super::run_among`].
pub fn rehearse_among(ranks: &dyn Collective, job: &TrainingJob) -> Result<Rehearsal> {
    let ranks = &Connected::new(ranks, &job.device)?;
    parallel::agree(ranks, "recipe", toml::to_string(&job.recipe)?.as_bytes())?;
    let existing = checkpoint::list(&job.run.join("checkpoints"))?;
    set_up(job, &existing, ranks, |mut ready| {
        let (of_model, of_backbone) = (ready.trainer.model.trained(), ready.trainer.source.vision.weights().values());
        let parameters = [of_model.map(|(_, var)| var.elem_count()).sum(), of_backbone.map(|var| var.elem_count()).sum()];
        let steps = ready.step..ready.step + REHEARSED_STEPS;
        let drawn_alone = median(ready.trainer.draw(steps.clone())?);
        let (mut entries, mut spent) = (Vec::new(), Vec::new());
        ready.trainer.run(steps, &mut ready.optimizer, |_, entry, _| {
            entries.push(entry);
            spent.push(cpu_seconds());
            Ok(())
        })?;
        let of = |key: &str| entries.iter().map(|entry| entry[key].as_f64().unwrap_or(0.0)).collect::<Vec<f64>>();
        let median = |key: &str| median(of(key));
        let (first, last) = (spent[0], spent[spent.len() - 1]);
        Ok(Rehearsal {
            parameters,
            steps: [ready.step, job.recipe.last_step()],
            pictures: job.recipe.batch.images,
            rows: of("rows").into_iter().fold(0.0, f64::max) as usize,
            operations: of("operations").into_iter().fold(0.0, f64::max),
            seconds: median("seconds"),
            waited: median("waited"),
            drawn: median("drawn"),
            drawing_threads: job.drawing_threads(),
            drawn_alone,
            cpu_seconds: first.zip(last).map(|(first, last)| (last - first) / (spent.len() - 1) as f64),
            peak_memory: peak_memory(),
        })
    })
}

/// The median of what steps took, but for the first, which is not timed.
fn median(steps: Vec<f64>) -> f64 {
    let mut timed: Vec<f64> = steps.into_iter().skip(1).collect();
    timed.sort_by(f64::total_cmp);
    timed.get(timed.len() / 2).copied().unwrap_or_default()
}

/// Processor seconds of this process so far, where `/proc` tells them; to a hundredth.
fn cpu_seconds() -> Option<f64> {
    /// Clock ticks of a second in `/proc`, on every Linux.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in brackets, may hold spaces; times in user and kernel mode are the 12th and 13th words behind it.
    let mut words = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || words.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS)
}

/// The largest memory of this process so far, where `/proc` tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

impl fmt::Display for Rehearsal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [model, backbone] = self.parameters.map(|count| count as f64 / 1e6);
        writeln!(f, "parameters   {model:.2} M of the model and {backbone:.2} M of the backbone are trained")?;
        let giga = self.operations / 1e9;
        write!(f, "a step       {} pictures with captions, {} rows, {giga:.0} GFLOP", self.pictures, self.rows)?;
        if self.pictures > 0 {
            write!(f, " ({:.1} a picture)", giga / self.pictures as f64)?;
        }
        write!(f, "\ntime         {:.2} s a step, {:.3} of them waiting for data", self.seconds, self.waited)?;
        write!(f, " that took {:.3} s to be drawn", self.drawn)?;
        if self.drawing_threads > 1 {
            write!(f, " by each of {} threads", self.drawing_threads)?;
        }
        if let Some(seconds) = self.cpu_seconds {
            write!(f, "; {seconds:.2} processor seconds")?;
        }
        writeln!(f, "; {:.0} GFLOP/s", giga / self.seconds)?;
        if self.pictures > 0 {
            let rate = |seconds: f64| self.pictures as f64 / seconds;
            let (alone, learnt) = (rate(self.drawn_alone), rate(self.seconds - self.waited));
            writeln!(
                f,
                "data         {alone:.0} pictures a second are drawn and packed by a thread alone, {learnt:.1} can be learnt from"
            )?;
        }
        match self.peak_memory {
            Some(bytes) => writeln!(f, "memory       {:.1} GB at most", bytes as f64 / 1e9)?,
            None => writeln!(f, "memory       not known on this system")?,
        }
        let left = self.steps[1].saturating_sub(self.steps[0]);
        let minutes = (left as f64 * self.seconds / 60.0).ceil() as u64;
        write!(f, "to the end   {left} steps, {} h {:02} min without evaluations", minutes / 60, minutes % 60)
    }
}
