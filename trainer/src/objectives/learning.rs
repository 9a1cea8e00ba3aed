//! What the passes of a step add up to: losses and gradients.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::chunk::{Encoded, KINDS, Term};
use crate::model::Unimo;
use crate::vision::Vision;

/// What a step taught.
pub struct Learnt {
    /// The weighted sum of the losses.
    pub total: f64,
    /// Every objective's unweighted loss, by name. Objectives without samples are absent.
    pub losses: Vec<(&'static str, f64)>,
    /// Gradients of the weighted sum.
    pub gradients: GradStore,
}

/// Gradients by what passes encode, which these carry back pass by pass.
pub(super) struct Carrying {
    pub(super) gradients: [Option<Tensor>; KINDS],
    /// Rows of each that are done.
    pub(super) at: [usize; KINDS],
}

impl Carrying {
    /// What has these gradients by what the next pass has encoded.
    pub(super) fn next(&mut self, encoded: Encoded) -> Result<Option<Tensor>> {
        let mut carried: Option<Tensor> = None;
        for (kind, tensor) in encoded.tensors.into_iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            let (start, count) = (self.at[kind], tensor.dim(0)?);
            self.at[kind] += count;
            let Some(gradient) = &self.gradients[kind] else { continue };
            let product = (tensor * gradient.narrow(0, start, count)?)?.sum_all()?;
            carried = Some(match carried {
                Some(sum) => (sum + product)?,
                None => product,
            });
        }
        Ok(carried)
    }
}

/// Sums of a step's passes.
pub(super) struct Learning {
    /// What is trained.
    pub(super) by: Vec<Var>,
    /// Objective, weight, share and value of losses. Read at the end, all at once: to read one means to wait for the device.
    terms: Vec<(&'static str, f64, f64, Tensor)>,
    /// Objective, weight and value of those that are numbers already.
    known: Vec<(&'static str, f64, f64)>,
    pub(super) gradients: Option<GradStore>,
}

impl Learning {
    /// Nothing yet, of what is to change the weights of `model` and `vision` that are trained.
    pub(super) fn of(model: &Unimo, vision: &Vision) -> Self {
        let by = model.trained().map(|(_, var)| var).chain(vision.weights().values()).cloned().collect();
        Self { by, terms: Vec::new(), known: Vec::new(), gradients: None }
    }

    /// Takes losses, and what is carried for the contrasts of all passes, and adds the gradients of their sum by what is trained,
    /// which `backward` takes.
    pub(super) fn add(
        &mut self,
        terms: Vec<Term>,
        carried: Option<Tensor>,
        backward: impl FnOnce(Tensor, &[Var]) -> candle_core::Result<GradStore>,
    ) -> Result<()> {
        let mut sum = carried;
        for Term { name, weight, share, loss } in terms {
            self.terms.push((name, weight, share, loss.detach()));
            let weighted = loss.affine(weight * share, 0.0)?;
            sum = Some(match sum {
                Some(sum) => (sum + weighted)?,
                None => weighted,
            });
        }
        let Some(sum) = sum else { return Ok(()) };
        let gradients = backward(sum, &self.by)?;
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

    pub(super) fn note(&mut self, name: &'static str, weight: f64, value: f64) {
        self.known.push((name, weight, value));
    }

    /// The weighted sum of the losses, and each objective's.
    pub(super) fn losses(&self) -> Result<(f64, Vec<(&'static str, f64)>)> {
        let mut values = self.known.clone();
        if !self.terms.is_empty() {
            let tensors = self.terms.iter().map(|(.., loss)| loss).collect::<Vec<_>>();
            let read = Tensor::stack(&tensors, 0)?.to_vec1::<f32>()?;
            let terms = self.terms.iter().zip(read);
            values.extend(terms.map(|(&(name, weight, share, _), value)| (name, weight, f64::from(value) * share)));
        }
        let (mut total, mut losses) = (0.0, Vec::<(&str, f64)>::new());
        for (name, weight, value) in values {
            total += weight * value;
            match losses.iter_mut().find(|(known, _)| *known == name) {
                Some((_, so_far)) => *so_far += value,
                None => losses.push((name, value)),
            }
        }
        Ok((total, losses))
    }

    pub(super) fn finish(self) -> Result<Learnt> {
        let (total, losses) = self.losses()?;
        let gradients = self.gradients.context("the step has no objective")?;
        Ok(Learnt { total, losses, gradients })
    }
}
