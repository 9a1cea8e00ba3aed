//! Checkpoints: folders that appear under their name only when they are whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::model::Unimo;
use crate::optimizer::AdamW;

/// `state.toml` of a checkpoint: where the run was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Steps done.
    pub step: u64,
    /// Optimiser updates done (steps less those skipped).
    pub updates: u64,
    /// SHA-256 of the recipe, sizes and data that the run was started with.
    pub fingerprint: String,
}

/// What a checkpoint carries beside the model.
#[derive(Debug, Clone)]
pub struct Companions {
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// The backbone's file; nothing where regions are detected.
    pub backbone: Option<Vec<u8>>,
    /// `task.toml` of a model with a head for a downstream task.
    pub task: Option<String>,
    /// `training.toml`: what the model was trained on and how.
    pub training: String,
}

/// Writes `<folder>/step-00000123` and returns its path; a checkpoint of that step that is already there is kept.
///
/// # Errors
/// Failed writes; nothing is left under the final name then.
pub fn save(folder: &Path, model: &Unimo, optimizer: &AdamW, state: &RunState, companions: &Companions) -> Result<PathBuf> {
    let path = folder.join(format!("step-{:08}", state.step));
    if path.exists() {
        return Ok(path);
    }
    let partial = folder.join(format!("step-{:08}.tmp", state.step));
    let write = || -> Result<()> {
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        fs::write(partial.join("model.toml"), toml::to_string(model.config())?)?;
        candle_core::safetensors::save(&model.tensors()?, partial.join("model.safetensors"))?;
        candle_core::safetensors::save(&optimizer.state()?.0, partial.join("optimizer.safetensors"))?;
        fs::copy(&companions.tokenizer, partial.join("tokenizer.json"))?;
        if let Some(backbone) = &companions.backbone {
            fs::write(partial.join("backbone.safetensors"), backbone)?;
        }
        fs::write(partial.join("training.toml"), &companions.training)?;
        if let Some(task) = &companions.task {
            fs::write(partial.join("task.toml"), task)?;
        }
        fs::write(partial.join("state.toml"), toml::to_string(state)?)?;
        for entry in fs::read_dir(&partial)? {
            File::open(entry?.path())?.sync_all()?;
        }
        fs::rename(&partial, &path)?;
        File::open(folder)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write the checkpoint {}", path.display()))?;
    Ok(path)
}

/// Whole checkpoints in a folder, oldest first.
///
/// # Errors
/// A folder that cannot be listed; a missing one holds none.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("step-")) && p.extension().is_none())
        .collect();
    found.sort();
    Ok(found)
}

/// Removes all but the newest `keep` checkpoints.
///
/// # Errors
/// A checkpoint that cannot be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let found = list(folder)?;
    for old in &found[..found.len().saturating_sub(keep)] {
        fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    Ok(())
}

/// Reads a checkpoint's run state.
///
/// # Errors
/// Missing or malformed `state.toml`.
pub fn state(checkpoint: &Path) -> Result<RunState> {
    let path = checkpoint.join("state.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("in {}", path.display()))
}

/// Restores the optimiser from a checkpoint.
///
/// # Errors
/// Missing or misshapen moments.
pub fn restore_optimizer(checkpoint: &Path, optimizer: &mut AdamW, state: &RunState) -> Result<()> {
    let path = checkpoint.join("optimizer.safetensors");
    let tensors =
        candle_core::safetensors::load(&path, &Device::Cpu).with_context(|| format!("cannot read {}", path.display()))?;
    optimizer.restore(&tensors, state.updates)
}

/// Turns `path` into a checkpoint folder: the folder itself, or the newest checkpoint of a run.
///
/// # Errors
/// Neither.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join("model.safetensors").is_file() {
        return Ok(path.to_path_buf());
    }
    match list(&path.join("checkpoints"))?.pop() {
        Some(newest) => Ok(newest),
        None => bail!("{} is neither a checkpoint nor a run with one", path.display()),
    }
}
