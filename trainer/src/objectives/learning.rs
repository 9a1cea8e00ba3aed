//! What the passes of a step add up to: losses and gradients.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::chunk::{Counted, Encoded, KINDS, Term};
use super::tally::sum_losses;
use crate::model::Unimo;
use crate::ops;
use crate::parallel::Collective;
use crate::vision::Vision;

/// What a step taught.
pub struct Learnt {
    /// Losses.
    pub losses: Losses,
    /// Gradients of the weighted sum.
    pub gradients: GradStore,
}

/// A step's losses, where they were computed: to read them means to wait for the device.
pub struct Losses {
    of: Vec<Counted>,
    /// Values of these, `[parts]`; nothing where there are none.
    values: Option<Tensor>,
}

impl Losses {
    /// The weighted sum of the losses, and every objective's unweighted loss, by name, of all ranks together. Objectives without
    /// samples are absent.
    ///
    /// # Errors
    /// Those of candle; a rank that is gone.
    pub fn read(&self, ranks: &dyn Collective) -> Result<(f64, Vec<(&'static str, f64)>)> {
        if let Some(devices) = ranks.devices() {
            devices.wait()?;
        }
        let values = self.values.as_ref().map(Tensor::to_vec1::<f32>).transpose()?.unwrap_or_default();
        let (mut total, mut losses) = (0.0, Vec::<(&str, f64)>::new());
        for (&Counted { name, weight, share }, value) in self.of.iter().zip(values) {
            let value = f64::from(value) * share;
            total += weight * value;
            match losses.iter_mut().find(|(known, _)| *known == name) {
                Some((_, so_far)) => *so_far += value,
                None => losses.push((name, value)),
            }
        }
        if ranks.ranks() == 1 {
            return Ok((total, losses));
        }
        sum_losses(ranks, total, &losses)
    }
}

/// Gradients by what passes encode, which these carry back pass by pass.
#[derive(Default)]
pub(super) struct Carrying {
    gradients: [Option<Tensor>; KINDS],
    /// Rows of each that are done.
    at: [usize; KINDS],
}

impl Carrying {
    pub(super) fn of(gradients: [Option<Tensor>; KINDS]) -> Self {
        Self { gradients, at: [0; KINDS] }
    }

    /// Scalars that have these gradients by what the next pass has encoded.
    pub(super) fn next(&mut self, encoded: Encoded) -> Result<Vec<Tensor>> {
        let mut carried = Vec::new();
        for (kind, tensor) in encoded.tensors.into_iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            let (start, count) = (self.at[kind], tensor.dim(0)?);
            self.at[kind] += count;
            if let Some(gradient) = &self.gradients[kind] {
                carried.push(ops::carrying(&tensor, &gradient.narrow(0, start, count)?)?);
            }
        }
        Ok(carried)
    }
}

/// Sums of a step's passes.
pub(super) struct Learning {
    /// What is trained.
    pub(super) by: Vec<Var>,
    /// Objectives' parts in the loss, and their values.
    counted: Vec<Counted>,
    values: Vec<Tensor>,
    pub(super) gradients: Option<GradStore>,
}

impl Learning {
    /// Nothing yet, of what is to change the weights of `model` and `vision` that are trained.
    pub(super) fn of(model: &Unimo, vision: &Vision) -> Self {
        let by = model.trained().map(|(_, var)| var).chain(vision.weights().values()).cloned().collect();
        Self { by, counted: Vec::new(), values: Vec::new(), gradients: None }
    }

    /// Takes losses, and what is carried for the contrasts of all passes, and adds the gradients of their sum by what is trained,
    /// which `backward` takes.
    pub(super) fn add(
        &mut self,
        terms: Vec<Term>,
        carried: Vec<Tensor>,
        backward: impl FnOnce(Vec<Tensor>, &[Var]) -> candle_core::Result<GradStore>,
    ) -> Result<()> {
        let mut losses = carried;
        for Term { of, values, sum } in terms {
            self.counted.extend(of);
            self.values.push(values.flatten_all()?);
            losses.push(sum);
        }
        if losses.is_empty() {
            return Ok(());
        }
        let gradients = backward(losses, &self.by)?;
        self.add_gradients(gradients)
    }

    /// Adds gradients.
    pub(super) fn add_gradients(&mut self, gradients: GradStore) -> Result<()> {
        match &mut self.gradients {
            Some(so_far) => so_far.extend(gradients)?,
            None => self.gradients = Some(gradients),
        }
        Ok(())
    }

    /// The losses so far.
    pub(super) fn losses(&self) -> candle_core::Result<Losses> {
        let values = (!self.values.is_empty()).then(|| Tensor::cat(&self.values, 0)).transpose()?;
        Ok(Losses { of: self.counted.clone(), values })
    }
}
