//! Weighted averages of checkpoints of one lineage: often better than each of them (Wortsman et al., arXiv 2109.01903).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::Device;

use crate::backbone::Backbone;
use crate::checkpoint::{self, Companions, RunState};
use crate::model::Unimo;
use crate::optimizer::{AdamW, OptimizerConfig};

/// Averages checkpoints (or the newest of runs), each with its share, into the run `out`; gives the new checkpoint. Shares are
/// scaled to a sum of 1. Everything but the weights is the last one's; the optimiser starts anew.
///
/// # Errors
/// Checkpoints of unlike sizes, tokenizers or statistics, shares that make no sense, an `out` that holds a run already.
pub fn average(parts: &[(PathBuf, f64)], out: &Path) -> Result<PathBuf> {
    let total: f64 = parts.iter().map(|(_, share)| share).sum();
    if parts.len() < 2 || parts.iter().any(|(_, share)| *share < 0.0) || !(total > 0.0 && total.is_finite()) {
        bail!("an average needs two checkpoints or more, and shares that are not negative and not all zero");
    }
    let checkpoints = out.join("checkpoints");
    if !checkpoint::list(&checkpoints)?.is_empty() {
        bail!("{} already holds a run; choose another --out", out.display());
    }
    let folders = parts.iter().map(|(path, _)| checkpoint::resolve(path)).collect::<Result<Vec<_>>>()?;
    let models = folders.iter().map(|folder| Unimo::load(folder, &Device::Cpu)).collect::<Result<Vec<_>>>()?;
    let tokenizers = folders.iter().map(|folder| std::fs::read(folder.join("tokenizer.json"))).collect::<Result<Vec<_>, _>>()?;
    let (Some(last), Some(folder)) = (models.last(), folders.last()) else { bail!("no checkpoints") };
    for ((model, tokenizer), other) in models.iter().zip(&tokenizers).zip(&folders) {
        let alike = model.config() == last.config() && model.statistics() == last.statistics();
        if !alike || Some(tokenizer) != tokenizers.last() {
            bail!("{} and {} differ in sizes, tokenizer or statistics", other.display(), folder.display());
        }
    }
    for (name, var) in last.weights() {
        let mut sum = var.as_tensor().zeros_like()?;
        for (model, (_, share)) in models.iter().zip(parts) {
            sum = (sum + model.weights()[name].as_tensor().affine(share / total, 0.0)?)?;
        }
        var.set(&sum)?;
    }
    std::fs::create_dir_all(&checkpoints).with_context(|| format!("cannot create {}", checkpoints.display()))?;
    let note = std::fs::read_to_string(folder.join("training.toml")).unwrap_or_default();
    let mut note: toml::Table = note.parse()?;
    let shares = parts.iter().map(|(_, share)| toml::Value::Float(share / total)).collect();
    note.insert("average_of_checkpoints".to_owned(), toml::Value::Array(shares));
    let companions = Companions {
        tokenizer: folder.join("tokenizer.json"),
        backbone: average_backbones(&folders, &parts.iter().map(|(_, share)| share / total).collect::<Vec<_>>())?,
        task: std::fs::read_to_string(folder.join("task.toml")).ok(),
        training: toml::to_string(&note)?,
    };
    let step = checkpoint::state(folder)?.step;
    let state = RunState { step, updates: 0, fingerprint: "average".to_owned() };
    let optimizer = AdamW::new(OptimizerConfig::default(), last.weights());
    checkpoint::save(&checkpoints, last, &optimizer, &state, &companions)
}

/// The file of the checkpoints' averaged backbones; where they are all the same, that file itself; where regions are detected,
/// nothing.
fn average_backbones(folders: &[PathBuf], shares: &[f64]) -> Result<Option<Vec<u8>>> {
    if folders.iter().all(|folder| !folder.join("backbone.safetensors").exists()) {
        return Ok(None);
    }
    let read = |folder: &PathBuf| {
        let path = folder.join("backbone.safetensors");
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut files = folders.iter().map(read).collect::<Result<Vec<_>>>()?;
    if files.windows(2).all(|two| two[0] == two[1]) {
        return Ok(Some(files.pop().context("no checkpoints")?));
    }
    let backbones = files.iter().map(|bytes| Backbone::from_bytes(bytes)).collect::<Result<Vec<_>>>()?;
    Ok(Some(Backbone::average(&backbones, shares)?.to_bytes()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::random_file;
    use crate::model::ModelConfig;

    fn run(folder: &Path, name: &str, size: ModelConfig, seed: u64) -> PathBuf {
        let tokenizer = folder.join("tokenizer.json");
        std::fs::write(&tokenizer, "{}").unwrap();
        let backbone = Some(random_file(seed).unwrap());
        let model = Unimo::new(size, seed, &Device::Cpu).unwrap();
        let optimizer = AdamW::new(OptimizerConfig::default(), model.weights());
        let companions = Companions { tokenizer, backbone, task: None, training: "data = \"none\"".into() };
        let state = RunState { step: seed, updates: 0, fingerprint: "x".into() };
        let path = folder.join(name);
        std::fs::create_dir_all(path.join("checkpoints")).unwrap();
        checkpoint::save(&path.join("checkpoints"), &model, &optimizer, &state, &companions).unwrap();
        path
    }

    #[test]
    fn weights_are_averaged_by_their_shares() {
        let folder = tempfile::tempdir().unwrap();
        let size = ModelConfig::named("pico").unwrap();
        let (a, b) = (run(folder.path(), "a", size.clone(), 1), run(folder.path(), "b", size.clone(), 2));
        let out = folder.path().join("mean");
        let made = average(&[(a.clone(), 1.0), (b.clone(), 3.0)], &out).unwrap();
        let load = |path: &Path| Unimo::load(&checkpoint::resolve(path).unwrap(), &Device::Cpu).unwrap();
        let (mean, a_model, b_model) = (load(&made), load(&a), load(&b));
        for (name, var) in mean.weights() {
            let values = |model: &Unimo| model.weights()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = values(&a_model).into_iter().zip(values(&b_model)).map(|(a, b)| 0.25 * a + 0.75 * b);
            let found = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(found.into_iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6), "{name}");
        }
        let head = |path: &Path| {
            let folder = checkpoint::resolve(path).unwrap();
            Backbone::load(&folder.join("backbone.safetensors")).unwrap().layer("head").bias[0]
        };
        let expected = 0.25 * head(&a) + 0.75 * head(&b);
        assert!((head(&made) - expected).abs() < 1e-6 && head(&a) != head(&b), "{} is not {expected}", head(&made));
        let refused = |parts: &[(PathBuf, f64)], out: &Path| average(parts, out).unwrap_err().to_string();
        let two = [(a.clone(), 1.0), (b, 1.0)];
        assert!(refused(&two, &out).contains("already holds a run"));
        let other = run(folder.path(), "c", ModelConfig { hidden: 32, ..size }, 3);
        assert!(refused(&[(a.clone(), 1.0), (other, 1.0)], &folder.path().join("d")).contains("differ in sizes"));
        assert!(refused(&[(a.clone(), 1.0)], &folder.path().join("d")).contains("two checkpoints"));
        assert!(refused(&[(a.clone(), 0.0), (a, 0.0)], &folder.path().join("d")).contains("not all zero"));
    }
}
