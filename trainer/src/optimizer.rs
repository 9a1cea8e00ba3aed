//! AdamW with decoupled weight decay, global-norm clipping and moments that are saved and restored.

use std::collections::HashMap;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::ops::kernels::{self, AdamWStep};
use crate::vision;

/// Values a task updates.
const TASK_VALUES: usize = 1 << 16;

/// Optimiser settings (defaults: the paper's).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Share of the peak that the cosine decay ends at.
    pub final_share: f64,
    /// Learning rate of the backbone's trained blocks, as a share of the rest's: what they know already is worth keeping.
    pub backbone_rate: f64,
    /// Decoupled weight decay, off LayerNorm weights, biases and the temperature.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest global norm of the gradient; larger ones are scaled down to it.
    pub clip_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 5e-4,
            warmup_steps: 100,
            final_share: 0.02,
            backbone_rate: 0.1,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-6,
            clip_norm: 1.0,
        }
    }
}

impl OptimizerConfig {
    /// Learning rate of step `step` (from 0) of `total`: linear warm-up, then half a cosine down to `final_share`.
    #[must_use]
    pub fn rate(&self, step: u64, total: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = total.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)
    }
}

/// First and second moment of a variable, where it is worked on.
enum Moments {
    Host(Mutex<(Vec<f32>, Vec<f32>)>),
    /// On a CUDA device; absent before the first update.
    #[cfg(any(feature = "cuda", test))]
    Device(Option<(Tensor, Tensor)>),
}

impl Moments {
    /// Zeros.
    fn of(var: &Var) -> Self {
        #[cfg(any(feature = "cuda", test))]
        if crate::ops::cuda::works_on(var.device()) {
            return Self::Device(None);
        }
        let n = var.elem_count();
        Self::Host(Mutex::new((vec![0f32; n], vec![0f32; n])))
    }

    /// Copies of both, `count` values each.
    fn read(&self, count: usize) -> Result<[Vec<f32>; 2]> {
        match self {
            Self::Host(both) => {
                let (first, second) = &*both.lock().map_err(|_| anyhow::anyhow!("poisoned moments"))?;
                debug_assert_eq!(first.len(), count);
                Ok([first.clone(), second.clone()])
            }
            #[cfg(any(feature = "cuda", test))]
            Self::Device(None) => Ok([vec![0f32; count], vec![0f32; count]]),
            #[cfg(any(feature = "cuda", test))]
            Self::Device(Some((first, second))) => {
                let values = |tensor: &Tensor| -> Result<Vec<f32>> { Ok(tensor.flatten_all()?.to_vec1()?) };
                debug_assert_eq!(first.elem_count(), count);
                Ok([values(first)?, values(second)?])
            }
        }
    }

    /// Takes others, of the variable's shape.
    fn replace(&mut self, [first, second]: [Vec<f32>; 2], var: &Var) -> Result<()> {
        debug_assert_eq!((first.len(), second.len()), (var.elem_count(), var.elem_count()));
        match self {
            Self::Host(both) => *both = Mutex::new((first, second)),
            #[cfg(any(feature = "cuda", test))]
            Self::Device(both) => {
                let tensor = |values| Tensor::from_vec(values, var.shape(), var.device());
                *both = Some((tensor(first)?, tensor(second)?));
            }
        }
        Ok(())
    }
}

/// AdamW over named variables.
pub struct AdamW {
    config: OptimizerConfig,
    /// Updates applied so far, where the host knows.
    updates: u64,
    /// The same on a CUDA device that has made some: the host need not know whether it left one out.
    on_device: Option<Tensor>,
    #[cfg(any(feature = "cuda", test))]
    recorded: crate::ops::cuda::Updates,
    variables: Vec<(String, Var, Moments)>,
}

struct OnHost<'a> {
    moments: &'a Mutex<(Vec<f32>, Vec<f32>)>,
    step: AdamWStep,
}

impl InplaceOp2 for OnHost<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let (Some((w0, w1)), Some((g0, g1))) = (l1.contiguous_offsets(), l2.contiguous_offsets()) else {
            return Err(candle_core::Error::RequiresContiguous { op: "adamw" });
        };
        let (CpuStorage::F32(weights), CpuStorage::F32(gradient)) = (s1, s2) else {
            candle_core::bail!("adamw: expected f32");
        };
        let mut guard = self.moments.lock().map_err(|_| candle_core::Error::Msg("adamw: poisoned".into()))?;
        let (first, second) = &mut *guard;
        weights[w0..w1]
            .par_chunks_mut(TASK_VALUES)
            .zip(gradient[g0..g1].par_chunks(TASK_VALUES))
            .zip(first.par_chunks_mut(TASK_VALUES))
            .zip(second.par_chunks_mut(TASK_VALUES))
            .for_each(|(((w, g), m), v)| kernels::adamw(w, g, m, v, &self.step));
        Ok(())
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Global norm of the gradient, before clipping.
    pub gradient_norm: f64,
    /// Whether the update was left out because the gradient was not finite.
    pub skipped: bool,
}

/// An update that was asked for; on a CUDA device, it may still be going on.
#[must_use]
pub struct Update(Norm);

enum Norm {
    Known(f64),
    /// `[1]`
    #[cfg(any(feature = "cuda", test))]
    OnDevice(Tensor),
}

impl Update {
    /// Where the gradient's norm is computed, `[1]`, if that is on a device.
    #[must_use]
    pub fn array(&self) -> Option<&Tensor> {
        match &self.0 {
            Norm::Known(_) => None,
            #[cfg(any(feature = "cuda", test))]
            Norm::OnDevice(norm) => Some(norm),
        }
    }

    /// What was done, where the norm on the device came to that.
    #[must_use]
    pub fn told(&self, on_device: Option<f32>) -> StepReport {
        let gradient_norm = match (&self.0, on_device) {
            (Norm::Known(norm), _) => *norm,
            #[cfg(any(feature = "cuda", test))]
            (Norm::OnDevice(_), norm) => norm.map_or(f64::NAN, f64::from),
        };
        StepReport { gradient_norm, skipped: !gradient_norm.is_finite() }
    }

    /// What was done, once it is done.
    ///
    /// # Errors
    /// Those of candle.
    pub fn read(&self) -> Result<StepReport> {
        let norm = self.array().map(|norm| norm.squeeze(0)?.to_scalar()).transpose()?;
        Ok(self.told(norm))
    }
}

impl AdamW {
    /// Zero moments for every variable.
    #[must_use]
    pub fn new<'a>(config: OptimizerConfig, weights: impl IntoIterator<Item = (&'a String, &'a Var)>) -> Self {
        let variables = weights.into_iter().map(|(name, var)| (name.clone(), var.clone(), Moments::of(var))).collect();
        Self {
            config,
            updates: 0,
            on_device: None,
            #[cfg(any(feature = "cuda", test))]
            recorded: crate::ops::cuda::Updates::default(),
            variables,
        }
    }

    /// Updates applied so far.
    ///
    /// # Errors
    /// Those of candle.
    pub fn updates(&self) -> Result<u64> {
        match &self.on_device {
            Some(progress) => Ok(progress.get(0)?.to_scalar::<f32>()? as u64),
            None => Ok(self.updates),
        }
    }

    /// One update with learning rate `rate`. A gradient that is not finite changes nothing. No host waits for a CUDA device.
    ///
    /// # Errors
    /// Those of candle.
    pub fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<Update> {
        #[cfg(any(feature = "cuda", test))]
        if self.variables.iter().any(|(_, _, moments)| matches!(moments, Moments::Device(_))) {
            return self.step_on_device(gradients, rate);
        }
        let mut square = 0f64;
        for (_, var, _) in &self.variables {
            if let Some(g) = gradients.get(var) {
                square += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let gradient_norm = square.sqrt();
        if !gradient_norm.is_finite() {
            return Ok(Update(Norm::Known(gradient_norm)));
        }
        self.updates += 1;
        let clip_norm = self.config.clip_norm;
        let gradient_scale = if gradient_norm > clip_norm { clip_norm / gradient_norm } else { 1.0 };
        for (name, var, moments) in &self.variables {
            let (Some(gradient), Moments::Host(moments)) = (gradients.get(var), moments) else { continue };
            let step = AdamWStep { gradient_scale: gradient_scale as f32, ..self.update_of(name, rate, self.updates) };
            var.as_tensor().inplace_op2(&gradient.contiguous()?, &OnHost { moments, step })?;
        }
        Ok(Update(Norm::Known(gradient_norm)))
    }

    /// The scalars of variable `name`'s update number `updates` (from 1), without clipping.
    fn update_of(&self, name: &str, rate: f64, updates: u64) -> AdamWStep {
        let (c, t) = (&self.config, updates as i32);
        AdamWStep {
            rate: if name.starts_with(vision::PREFIX) { (rate * c.backbone_rate) as f32 } else { rate as f32 },
            decay: if is_decayed(name) { c.weight_decay as f32 } else { 0.0 },
            beta1: c.beta1 as f32,
            beta2: c.beta2 as f32,
            eps: c.eps as f32,
            correction1: (1.0 / (1.0 - c.beta1.powi(t))) as f32,
            correction2: (1.0 / (1.0 - c.beta2.powi(t))) as f32,
            gradient_scale: 1.0,
        }
    }

    /// The same on a CUDA device, all variables at once: the norm is found, clipping decided, and updates are counted, there.
    #[cfg(any(feature = "cuda", test))]
    fn step_on_device(&mut self, gradients: &GradStore, rate: f64) -> Result<Update> {
        use crate::ops::cuda::{DeviceAdamW, Tuned};
        let Some(device) = self.variables.first().map(|(_, var, _)| var.device().clone()) else {
            return Ok(Update(Norm::Known(0.0)));
        };
        for (_, var, moments) in &mut self.variables {
            if let Moments::Device(both @ None) = moments {
                *both = Some((var.as_tensor().zeros_like()?, var.as_tensor().zeros_like()?));
            }
        }
        let progress = match self.on_device.take() {
            Some(progress) => progress,
            None => Tensor::new(&[self.updates as f32, 0.0, 0.0], &device)?,
        };
        self.on_device = Some(progress.clone());
        let mut tuned = Vec::new();
        for (name, var, moments) in &self.variables {
            if let (Some(gradient), Moments::Device(Some(both))) = (gradients.get(var), moments) {
                tuned.push((name, var, gradient.contiguous()?, both));
            }
        }
        let tensors = tuned.iter().map(|(name, weights, gradient, (first, second))| {
            let AdamWStep { rate, decay, .. } = self.update_of(name, rate, 1);
            Tuned { weights, first, second, gradient, rate, decay }
        });
        let (tensors, clip_norm) = (tensors.collect(), self.config.clip_norm as f32);
        let update = DeviceAdamW { tensors, clip_norm, progress: &progress, step: self.update_of("", rate, 1) };
        Ok(Update(Norm::OnDevice(update.update(&self.recorded, &device)?)))
    }

    /// The moments as tensors `<weight>.first` and `<weight>.second`, and the number of updates.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<(HashMap<String, Tensor>, u64)> {
        let mut tensors = HashMap::new();
        for (name, var, moments) in &self.variables {
            for (kind, values) in ["first", "second"].into_iter().zip(moments.read(var.elem_count())?) {
                tensors.insert(format!("{name}.{kind}"), Tensor::from_vec(values, var.shape(), &candle_core::Device::Cpu)?);
            }
        }
        Ok((tensors, self.updates()?))
    }

    /// Restores what [`AdamW::state`] gave.
    ///
    /// # Errors
    /// A missing or misshapen moment.
    pub fn restore(&mut self, tensors: &HashMap<String, Tensor>, updates: u64) -> Result<()> {
        for (name, var, moments) in &mut self.variables {
            let read = |kind: &str| -> Result<Vec<f32>> {
                let key = format!("{name}.{kind}");
                let tensor = tensors.get(&key).with_context(|| format!("the optimizer state lacks `{key}`"))?;
                if tensor.shape() != var.shape() {
                    bail!("the optimizer state's `{key}` is {:?}, not {:?}", tensor.shape(), var.shape());
                }
                Ok(tensor.flatten_all()?.to_vec1()?)
            };
            moments.replace([read("first")?, read("second")?], var)?;
        }
        (self.updates, self.on_device) = (updates, None);
        Ok(())
    }
}

fn is_decayed(name: &str) -> bool {
    name.ends_with(".weight") && !name.ends_with("norm.weight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::collections::BTreeMap;

    /// Values of `reference/adamw.py`: f(w) = Σ w³, three steps.
    #[test]
    fn three_steps_agree_with_the_reference() {
        let var = Var::from_vec(vec![1.0f32, -2.0, 0.5], 3, &Device::Cpu).unwrap();
        let weights = BTreeMap::from([("a.weight".to_owned(), var.clone())]);
        let config = OptimizerConfig { weight_decay: 0.1, clip_norm: 1e9, ..Default::default() };
        let mut optimizer = AdamW::new(config, &weights);
        for _ in 0..3 {
            let loss = var.as_tensor().powf(3.0).unwrap().sum_all().unwrap();
            let _ = optimizer.step(&loss.backward().unwrap(), 0.01).unwrap();
        }
        let got = var.as_tensor().to_vec1::<f32>().unwrap();
        for (got, expected) in got.iter().zip(ADAMW_EXPECTED) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    const ADAMW_EXPECTED: [f32; 3] = [0.967_052_5, -2.023_982, 0.468_573_2];

    #[test]
    fn the_backbone_learns_at_its_own_rate() {
        let var = |value: f32| Var::from_vec(vec![value], 1, &Device::Cpu).unwrap();
        let weights = BTreeMap::from(["a.bias", "backbone.head.bias"].map(|name| (name.to_owned(), var(1.0))));
        let config = OptimizerConfig { backbone_rate: 0.25, ..Default::default() };
        let mut optimizer = AdamW::new(config, &weights);
        let loss = weights.values().map(|v| v.as_tensor().sum_all().unwrap()).reduce(|a, b| (a + b).unwrap()).unwrap();
        let _ = optimizer.step(&loss.backward().unwrap(), 0.01).unwrap();
        // Adam's first step is the learning rate itself.
        for (name, expected) in [("a.bias", 0.99), ("backbone.head.bias", 0.9975)] {
            let got = weights[name].as_tensor().to_vec1::<f32>().unwrap()[0];
            assert!((got - expected).abs() < 1e-5, "{name}: {got}");
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let var = Var::from_vec(vec![1.0f32], 1, &Device::Cpu).unwrap();
        let mut optimizer = AdamW::new(OptimizerConfig::default(), &BTreeMap::from([("a.weight".to_owned(), var.clone())]));
        let loss = (var.as_tensor() * f64::INFINITY).unwrap().sum_all().unwrap();
        assert!(optimizer.step(&loss.backward().unwrap(), 0.1).unwrap().read().unwrap().skipped);
        assert_eq!(var.as_tensor().to_vec1::<f32>().unwrap(), [1.0]);
        assert_eq!(optimizer.updates().unwrap(), 0);
    }

    /// Three updates on the CPU alone; or the first one or two of them on the kernels, and the others after the moments were saved
    /// and restored.
    #[test]
    fn moments_move_between_devices() {
        use crate::ops::cuda::emulation::emulated;
        let run = |on_kernels: [bool; 3]| {
            let var = Var::from_vec(vec![1.0f32, -2.0, 0.5], 3, &Device::Cpu).unwrap();
            let weights = BTreeMap::from([("a.weight".to_owned(), var.clone())]);
            let mut state = None;
            for on_kernels in on_kernels {
                let mut step = || {
                    let mut optimizer = AdamW::new(OptimizerConfig::default(), &weights);
                    if let Some((moments, updates)) = &state {
                        optimizer.restore(moments, *updates).unwrap();
                    }
                    let loss = var.as_tensor().powf(3.0).unwrap().sum_all().unwrap();
                    let _ = optimizer.step(&loss.backward().unwrap(), 0.01).unwrap();
                    state = Some(optimizer.state().unwrap());
                };
                if on_kernels { emulated(0, step) } else { step() }
            }
            var.as_tensor().to_vec1::<f32>().unwrap()
        };
        let expected = run([false; 3]);
        for on_kernels in [[true; 3], [true, false, false], [false, true, true], [true, true, false]] {
            let got = run(on_kernels);
            assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{on_kernels:?}: {got:?} {expected:?}");
        }
    }

    /// With other gradients at other places each time; and where the machine does not record.
    #[test]
    fn updates_that_are_replayed_are_those_that_are_asked_for() {
        use crate::ops::cuda::emulation::{emulated, recording_only};
        let run = |recordings: u32| {
            let values = (0..40_000).map(|i| (i as f32 * 0.7).sin()).collect();
            let var = Var::from_vec(values, 40_000, &Device::Cpu).unwrap();
            let weights = BTreeMap::from([("a.weight".to_owned(), var.clone())]);
            let step = |optimizer: &mut AdamW, number: u32| {
                let loss = var.as_tensor().powf(f64::from(number % 3) + 2.0).unwrap().sum_all().unwrap();
                optimizer.step(&loss.backward().unwrap(), 0.01 / f64::from(number + 1)).unwrap().read().unwrap().gradient_norm
            };
            let steps = || {
                let mut optimizer = AdamW::new(OptimizerConfig::default(), &weights);
                let norms: Vec<f64> = (0..4).map(|number| step(&mut optimizer, number)).collect();
                (norms, optimizer.recorded.replayed())
            };
            let (norms, replayed) = recording_only(recordings, || emulated(0, steps));
            (norms, var.as_tensor().to_vec1::<f32>().unwrap(), replayed)
        };
        let (replayed, asked) = (run(u32::MAX), run(0));
        assert_eq!((replayed.2, asked.2), (3, 0));
        assert!(replayed.0 == asked.0 && replayed.1 == asked.1);
        assert!(replayed.0.windows(2).all(|pair| pair[0] != pair[1]), "{:?}", replayed.0);
    }

    #[test]
    fn the_rate_warms_up_and_decays() {
        let c = OptimizerConfig { learning_rate: 1.0, warmup_steps: 10, final_share: 0.1, ..Default::default() };
        for (step, expected) in [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1), (500, 0.1)] {
            assert!((c.rate(step, 100) - expected).abs() < 1e-9, "step {step}");
        }
    }
}
