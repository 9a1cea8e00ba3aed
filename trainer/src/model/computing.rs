//! How heads and objectives are computed of a pass's hidden states: by candle, operator by operator, or by the kernels for CUDA devices as
//! a whole, with their gradients.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};

use super::Hidden;
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::computations::{self, Computations};
use crate::ops::{self, AtOnce, ByRows, Computation};

/// An array that a computation is given.
pub enum Given {
    /// Rows of the hidden states.
    Rows {
        /// Which.
        ids: Arc<[u32]>,
        /// Where they vary in number from step to step, the part of them that more are made up to, so that shapes repeat.
        parts: Option<usize>,
    },
    /// Matrices of one width, each below the one before.
    Matrices {
        /// At least one. Gradients lead back to those that are tracked.
        all: Vec<Tensor>,
        /// As above.
        parts: Option<usize>,
    },
}

/// Of rows that products are made with: few more are made up.
const OF_PRODUCTS: usize = 64;
/// Of rows that are read and nothing else: that costs little.
const READ: usize = 16;

impl Given {
    /// As many rows in every step.
    #[must_use]
    pub fn rows(rows: &[usize]) -> Self {
        Self::Rows { ids: ids(rows), parts: None }
    }

    /// Rows of which there are more in one step than in another, and which products are made with.
    #[must_use]
    pub fn varying_rows(rows: &[usize]) -> Self {
        Self::Rows { ids: ids(rows), parts: Some(OF_PRODUCTS) }
    }

    /// Rows of which there are more in one step than in another, and which are read and nothing else.
    #[must_use]
    pub fn rows_to_read(rows: &[usize]) -> Self {
        Self::Rows { ids: ids(rows), parts: Some(READ) }
    }

    /// A matrix, of one size in every step.
    #[must_use]
    pub fn matrix(of: &Tensor) -> Self {
        Self::Matrices { all: vec![of.clone()], parts: None }
    }

    /// What belongs to [`Self::varying_rows`], a row to each.
    #[must_use]
    pub fn of_varying_rows(of: &Tensor) -> Self {
        Self::Matrices { all: vec![of.clone()], parts: Some(OF_PRODUCTS) }
    }

    /// By candle.
    fn tensor(&self, hidden: Option<&Hidden>) -> Result<Tensor> {
        match (self, hidden) {
            (Self::Rows { ids, .. }, Some(hidden)) => hidden.rows_of(Arc::clone(ids)),
            (Self::Rows { .. }, None) => candle_core::bail!("rows of no hidden states"),
            (Self::Matrices { all, .. }, _) => match all.as_slice() {
                [one] => Ok(one.clone()),
                all => Tensor::cat(all, 0),
            },
        }
    }
}

fn ids(rows: &[usize]) -> Arc<[u32]> {
    rows.iter().map(|&row| row as u32).collect()
}

/// How something computed leads back.
pub enum Back {
    /// By candle, from a scalar.
    Through(Tensor),
    /// It was gone already.
    Gone(Found),
}

impl From<Tensor> for Back {
    fn from(scalar: Tensor) -> Self {
        Self::Through(scalar)
    }
}

/// Gradients that were found.
#[derive(Default)]
pub struct Found {
    /// By variables, which these are.
    by_variables: Vec<(Tensor, Tensor)>,
    /// By rows of the hidden states.
    pub(super) by_rows: Vec<ByRows>,
    /// Scalars that have the gradients by other tensors.
    carried: Vec<Tensor>,
}

/// Gradients of the sum of all that leads back, by variables. By rows of the hidden states, those that were found are given back.
///
/// # Errors
/// Those of candle.
pub fn gradients_of<'a>(backs: Vec<Back>, by: impl IntoIterator<Item = &'a Var>) -> Result<(GradStore, Vec<ByRows>)> {
    let (mut through, mut by_variables, mut by_rows) = (Vec::new(), Vec::new(), Vec::new());
    for back in backs {
        match back {
            Back::Through(scalar) => through.push(scalar),
            Back::Gone(found) => {
                through.extend(found.carried);
                by_variables.extend(found.by_variables);
                by_rows.extend(found.by_rows);
            }
        }
    }
    let by: Vec<&Var> = by.into_iter().collect();
    let sum = through.into_iter().map(Ok).reduce(|sum, scalar| sum? + scalar?).transpose()?;
    let mut all = sum.map_or_else(|| Ok(GradStore::default()), |sum| ops::gradients(sum, by.iter().copied()))?;
    for (variable, gradient) in by_variables.into_iter().filter(|(variable, _)| by.iter().any(|var| var.id() == variable.id())) {
        ops::add_gradient(&mut all, &variable, gradient)?;
    }
    Ok((all, by_rows))
}

/// Losses that were computed.
pub struct Losses {
    /// What the computation gave, as constants.
    pub outputs: Vec<Tensor>,
    /// How their sum leads back.
    pub back: Back,
}

/// What leads back from something that the kernels have computed.
pub struct Pending {
    #[cfg(any(feature = "cuda", test))]
    of: (Arc<Computations>, computations::Pending, Vec<Origin>),
}

/// What a given array was made of.
#[cfg(any(feature = "cuda", test))]
enum Origin {
    Rows(Arc<[u32]>),
    Matrices(Vec<Tensor>),
}

/// Where it is done.
#[derive(Default)]
pub struct Computing {
    #[cfg(any(feature = "cuda", test))]
    computations: Arc<Computations>,
}

impl Computing {
    /// Computes losses, and how the sum of them leads back, each as many times as its factor says. An output with several values is the
    /// loss of the first one.
    ///
    /// # Errors
    /// Another number of factors than of losses, rows without hidden states, and those of the computation.
    pub fn losses<C: Computation>(
        &self,
        computation: &C,
        (hidden, given): (Option<&Hidden>, &[Given]),
        factors: &[f64],
        device: &Device,
    ) -> Result<Losses> {
        #[cfg(any(feature = "cuda", test))]
        if ops::cuda::works_on(device) {
            let (origins, factors) = (origins(hidden, given)?, factors.iter().map(|&factor| factor as f32).collect::<Vec<_>>());
            let computed =
                with_arrays(hidden, &origins, given, |given| self.computations.at_once(computation, given, &factors, device))?;
            let (outputs, found) = told(computed, origins)?;
            return Ok(Losses { outputs, back: Back::Gone(found) });
        }
        let arrays = given.iter().map(|given| given.tensor(hidden)).collect::<Result<Vec<_>>>()?;
        let outputs = computation.compute(&AtOnce(device), &arrays)?;
        if outputs.len() != factors.len() {
            candle_core::bail!("{}: {} losses and {} factors", C::NAME, outputs.len(), factors.len());
        }
        let mut sum = None;
        for (output, &factor) in outputs.iter().zip(factors) {
            let loss = if output.rank() == 0 { output.clone() } else { output.get(0)? };
            let term = if factor == 1.0 { loss } else { loss.affine(factor, 0.0)? };
            sum = Some(match sum {
                Some(so_far) => (so_far + term)?,
                None => term,
            });
        }
        let Some(sum) = sum else { candle_core::bail!("{}: no losses", C::NAME) };
        Ok(Losses { outputs: outputs.iter().map(Tensor::detach).collect(), back: Back::Through(sum) })
    }

    /// Computes something. What comes of it is tracked, or leads back by what is given with it.
    ///
    /// # Errors
    /// Rows without hidden states, and those of the computation.
    pub fn forward<C: Computation>(
        &self,
        computation: &C,
        (hidden, given): (Option<&Hidden>, &[Given]),
        device: &Device,
    ) -> Result<(Vec<Tensor>, Option<Pending>)> {
        #[cfg(any(feature = "cuda", test))]
        if ops::cuda::works_on(device) {
            let origins = origins(hidden, given)?;
            let (outputs, pending) =
                with_arrays(hidden, &origins, given, |given| self.computations.forward(computation, given, device))?;
            return Ok((outputs, Some(Pending { of: (Arc::clone(&self.computations), pending, origins) })));
        }
        let arrays = given.iter().map(|given| given.tensor(hidden)).collect::<Result<Vec<_>>>()?;
        Ok((computation.compute(&AtOnce(device), &arrays)?, None))
    }

    /// How many computations there were on the kernels, and how many as recordings.
    #[cfg(any(feature = "cuda", test))]
    #[must_use]
    pub fn counts(&self) -> ops::cuda::layers::Counts {
        self.computations.counts()
    }
}

impl Pending {
    /// Gradients, of those by all that was computed; where there is none, it is zeros. No other computation of this kind may have come in
    /// between.
    ///
    /// # Errors
    /// Gradients of another number or of other shapes, a computation in between, and those of candle.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(unused_variables, reason = "there is nothing to lead back"))]
    pub fn backward(self, by_outputs: &[Option<Tensor>]) -> Result<Found> {
        #[cfg(any(feature = "cuda", test))]
        {
            let (computations, pending, origins) = self.of;
            let by_outputs = by_outputs.iter().map(|by| by.as_ref().map(Tensor::contiguous).transpose());
            Ok(told(computations.backward(&pending, &by_outputs.collect::<Result<Vec<_>>>()?)?, origins)?.1)
        }
        #[cfg(not(any(feature = "cuda", test)))]
        Ok(Found::default())
    }
}

/// Where gradients by given arrays lead to. Rows of hidden states that lead nowhere are matrices.
#[cfg(any(feature = "cuda", test))]
fn origins(hidden: Option<&Hidden>, given: &[Given]) -> Result<Vec<Origin>> {
    let origin = |given: &Given| match given {
        Given::Rows { ids, .. } if hidden.and_then(Hidden::pass).is_some() => Ok(Origin::Rows(Arc::clone(ids))),
        Given::Matrices { all, .. } => Ok(Origin::Matrices(all.iter().map(Tensor::contiguous).collect::<Result<_>>()?)),
        Given::Rows { .. } => Ok(Origin::Matrices(vec![given.tensor(hidden)?])),
    };
    given.iter().map(origin).collect()
}

/// Calls something with the arrays as the kernels take them.
#[cfg(any(feature = "cuda", test))]
fn with_arrays<R>(
    hidden: Option<&Hidden>,
    origins: &[Origin],
    given: &[Given],
    call: impl FnOnce(&[computations::Given]) -> Result<R>,
) -> Result<R> {
    let mut arrays = Vec::new();
    for (origin, given) in origins.iter().zip(given) {
        let (Given::Rows { parts, .. } | Given::Matrices { parts, .. }) = *given;
        arrays.push(match (origin, hidden.and_then(Hidden::pass)) {
            (Origin::Rows(ids), Some((runs, pass))) => computations::Given::Rows { runs, pass, ids, parts },
            (Origin::Matrices(all), _) => computations::Given::Matrices { all, parts, wanted: all.iter().any(Tensor::track_op) },
            (Origin::Rows(_), None) => candle_core::bail!("rows of no hidden states"),
        });
    }
    call(&arrays)
}

/// What was computed, and gradients by what it began with.
#[cfg(any(feature = "cuda", test))]
fn told(computed: computations::Found, origins: Vec<Origin>) -> Result<(Vec<Tensor>, Found)> {
    let computations::Found { outputs, by_weights, by_given } = computed;
    let mut found = Found { by_variables: by_weights, ..Found::default() };
    for (origin, gradient) in origins.into_iter().zip(by_given) {
        let Some(gradient) = gradient else { continue };
        match origin {
            Origin::Rows(ids) => found.by_rows.push((ids, gradient)),
            Origin::Matrices(all) => {
                let mut first = 0;
                for matrix in all {
                    let rows = matrix.dim(0)?;
                    let own = gradient.narrow(0, first, rows)?;
                    first += rows;
                    match (matrix.is_variable(), matrix.track_op()) {
                        (true, _) => found.by_variables.push((matrix, own)),
                        (false, true) => found.carried.push(ops::carrying(&matrix, &own)?),
                        (false, false) => {}
                    }
                }
            }
        }
    }
    Ok((outputs, found))
}
