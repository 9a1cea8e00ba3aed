//! What the passes of a step add up to: losses and gradients.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::chunk::{Counted, Encoded, JOINT, KINDS, Term};
use super::tally::sum_losses;
use crate::model::{Back, Unimo};
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

/// A step's losses, where they are computed.
pub struct Losses {
    of: Vec<Counted>,
    /// Values of these, `[parts]`; nothing where there are none.
    values: Option<Tensor>,
}

impl Losses {
    /// Where they are, `[losses]`, if there are any.
    #[must_use]
    pub fn array(&self) -> Option<&Tensor> {
        self.values.as_ref()
    }

    /// The weighted sum of the losses that have these values, and every objective's unweighted loss, by name, of all ranks together.
    /// Objectives without samples are absent.
    ///
    /// # Errors
    /// A rank that is gone.
    pub fn told(&self, values: &[f32], ranks: &dyn Collective) -> Result<(f64, Vec<(&'static str, f64)>)> {
        let (mut total, mut losses) = (0.0, Vec::<(&str, f64)>::new());
        for (&Counted { name, weight, share }, value) in self.of.iter().zip(values) {
            let value = f64::from(*value) * share;
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

    /// What leads these gradients back from what the next pass has encoded.
    pub(super) fn next(&mut self, Encoded { tensors, pending }: Encoded) -> Result<Vec<Back>> {
        let (mut backs, mut by_outputs) = (Vec::new(), Vec::new());
        for (kind, tensor) in tensors.into_iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            let (start, count) = (self.at[kind], tensor.dim(0)?);
            self.at[kind] += count;
            let gradient = self.gradients[kind].as_ref().map(|gradient| gradient.narrow(0, start, count)).transpose()?;
            match (&pending, gradient) {
                (Some(_), Some(gradient)) if kind == JOINT => by_outputs.push(Some(gradient.unsqueeze(1)?)),
                (Some(_), gradient) => by_outputs.push(gradient),
                (None, Some(gradient)) => backs.push(Back::Through(ops::carrying(&tensor, &gradient)?)),
                (None, None) => {}
            }
        }
        if let Some(pending) = pending.filter(|_| by_outputs.iter().any(Option::is_some)) {
            backs.push(Back::Gone(pending.backward(&by_outputs)?));
        }
        Ok(backs)
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
        carried: Vec<Back>,
        backward: impl FnOnce(Vec<Back>, &[Var]) -> candle_core::Result<GradStore>,
    ) -> Result<()> {
        let mut backs = carried;
        for Term { of, values, back } in terms {
            self.counted.extend(of);
            for value in values {
                self.values.push(value.flatten_all()?);
            }
            backs.push(back);
        }
        if backs.is_empty() {
            return Ok(());
        }
        let gradients = backward(backs, &self.by)?;
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
