//! What is no operator: draws, and AdamW's updates.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};

use super::{Outcome, error, read, values};
use crate::ops::{self, kernels};
use crate::optimizer::{AdamW, OptimizerConfig};

/// Draws are the CPU's, bit by bit.
pub fn draws(device: &Device) -> Result<Vec<Outcome>> {
    let (count, seed, rate) = (70_001, 0x1234_5678, 0.1);
    let x = Tensor::from_vec(values(25, count), count, device)?;
    let got = read(&ops::dropout(&x, rate, seed)?)?;
    let mut expected = values(25, count);
    kernels::dropout_mask(&mut expected, seed, 0, 1.0 - rate);
    let differing = got.iter().zip(&expected).filter(|(got, expected)| got != expected).count();
    Ok(vec![Outcome { name: format!("draws: {count} like the CPU's"), error: differing as f64, tolerance: 0.0 }])
}

/// Three AdamW updates of tensors of several sizes by the gradient of Σ w³, clipped in all but the first; then one that is not
/// finite.
pub fn updates(device: &Device) -> Result<Vec<Outcome>> {
    let sizes = [("a.weight", 3), ("b.bias", 1), ("c.weight", 40_000)];
    let first: Vec<Vec<f32>> = (0..3).map(|i| values(26 + i, sizes[i as usize].1)).collect();
    let mut vars = BTreeMap::new();
    for ((name, count), values) in sizes.iter().zip(&first) {
        vars.insert((*name).to_owned(), Var::from_slice(values, *count, device)?);
    }
    let config = OptimizerConfig { weight_decay: 0.1, clip_norm: 100.0, ..Default::default() };
    let mut optimizer = AdamW::new(config.clone(), &vars);
    let mut wide: Vec<[Vec<f64>; 3]> = first
        .iter()
        .map(|values| [values.iter().map(|v| f64::from(*v)).collect(), vec![0.0; values.len()], vec![0.0; values.len()]])
        .collect();
    let mut outcomes = Vec::new();
    for (step, scale) in [(1, 0.1), (2, 1.0), (3, 1.0)] {
        let loss = |var: &Var| (var.as_tensor() * var.as_tensor().sqr()?)?.sum_all()?.affine(scale, 0.0);
        let losses = vars.values().map(loss).collect::<candle_core::Result<Vec<_>>>()?;
        let report = optimizer.step(&Tensor::stack(&losses, 0)?.sum_all()?.backward()?, 0.01)?.read()?;
        let gradients: Vec<Vec<f64>> = wide.iter().map(|[w, ..]| w.iter().map(|w| 3.0 * scale * w * w).collect()).collect();
        let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        outcomes.push(Outcome {
            name: format!("gradient norm of update {step}"),
            error: (report.gradient_norm - norm).abs() / norm,
            tolerance: 1e-5,
        });
        let clip = (config.clip_norm / norm).min(1.0);
        for (([w, m, v], gradient), (name, _)) in wide.iter_mut().zip(&gradients).zip(sizes) {
            let decay = if name.ends_with("weight") { config.weight_decay } else { 0.0 };
            for i in 0..w.len() {
                let g = gradient[i] * clip;
                m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
                v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
                let (m, v) = (m[i] / (1.0 - config.beta1.powi(step)), v[i] / (1.0 - config.beta2.powi(step)));
                w[i] = w[i] * (1.0 - 0.01 * decay) - 0.01 * m / (v.sqrt() + config.eps);
            }
        }
    }
    let expected: Vec<f64> = wide.iter().flat_map(|[w, ..]| w).copied().collect();
    let weights =
        || -> Result<Vec<f32>> { Ok(vars.values().map(|var| read(var.as_tensor())).collect::<Result<Vec<_>>>()?.concat()) };
    outcomes.push(Outcome { name: "three AdamW updates".to_owned(), error: error(&weights()?, &expected), tolerance: 1e-5 });
    let before = weights()?;
    let infinite = (vars["b.bias"].as_tensor() * f64::INFINITY)?.sum_all()?;
    let skipped = optimizer.step(&infinite.backward()?, 0.01)?.read()?.skipped && optimizer.updates()? == 3;
    let changed = weights()?.iter().zip(&before).filter(|(after, before)| after != before).count();
    outcomes.push(Outcome {
        name: "a gradient that is not finite changes nothing".to_owned(),
        error: changed as f64 + f64::from(u8::from(!skipped)),
        tolerance: 0.0,
    });
    Ok(outcomes)
}
