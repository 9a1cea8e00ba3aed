//! Hidden states of a pass, of which objectives read a few rows.

use std::sync::Arc;
#[cfg(any(feature = "cuda", test))]
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor};
#[cfg(any(feature = "cuda", test))]
use candle_core::{Var, backprop::GradStore};

use crate::ops;
#[cfg(any(feature = "cuda", test))]
use crate::ops::{
    ByRows,
    cuda::layers::{Forward, Runs},
};

/// Hidden states, `[rows, hidden]`.
pub struct Hidden(States);

enum States {
    Whole(Tensor),
    #[cfg(any(feature = "cuda", test))]
    InKernels(Box<InKernels>),
}

impl From<Tensor> for Hidden {
    fn from(states: Tensor) -> Self {
        Self(States::Whole(states))
    }
}

impl Hidden {
    /// Those of a pass in kernels, which stay where it left them.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn of_pass(runs: &Arc<Runs>, pass: Forward) -> Result<Self> {
        if !pass.leads_back() {
            return Ok(runs.all_rows(&pass)?.into());
        }
        Ok(Self(States::InKernels(Box::new(InKernels { runs: Arc::clone(runs), pass, chosen: Mutex::default() }))))
    }

    /// Rows of them, `[chosen, hidden]`.
    ///
    /// # Errors
    /// A row out of range.
    pub fn rows(&self, rows: &[usize]) -> Result<Tensor> {
        self.rows_of(rows.iter().map(|&row| row as u32).collect())
    }

    pub(super) fn rows_of(&self, ids: Arc<[u32]>) -> Result<Tensor> {
        match &self.0 {
            States::Whole(states) => ops::select_rows(states, &ids),
            #[cfg(any(feature = "cuda", test))]
            States::InKernels(pass) => pass.rows(ids),
        }
    }

    /// All of them, as constants.
    ///
    /// # Errors
    /// Those of candle.
    pub fn constants(&self) -> Result<Tensor> {
        match &self.0 {
            States::Whole(states) => Ok(states.detach()),
            #[cfg(any(feature = "cuda", test))]
            States::InKernels(pass) => pass.runs.all_rows(&pass.pass),
        }
    }

    /// Whether a gradient by them leads anywhere.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        match &self.0 {
            States::Whole(states) => states.track_op(),
            #[cfg(any(feature = "cuda", test))]
            States::InKernels(_) => true,
        }
    }

    /// Whether candle keeps nothing that they were computed of.
    #[cfg(test)]
    pub(super) fn is_leaf(&self) -> bool {
        match &self.0 {
            States::Whole(states) => states.is_variable(),
            States::InKernels(_) => true,
        }
    }

    /// The pass that they are of, where they are in the kernels' memory.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn pass(&self) -> Option<(&Runs, &Forward)> {
        match &self.0 {
            States::Whole(_) => None,
            States::InKernels(pass) => Some((&pass.runs, &pass.pass)),
        }
    }

    /// What the kernels have left.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn in_kernels(self) -> Option<InKernels> {
        match self.0 {
            States::Whole(_) => None,
            States::InKernels(pass) => Some(*pass),
        }
    }
}

/// A pass in kernels. The rows that were read are leaves to candle, so that no gradient by all rows is made but by the kernels, once.
#[cfg(any(feature = "cuda", test))]
pub(super) struct InKernels {
    runs: Arc<Runs>,
    pub(super) pass: Forward,
    chosen: Mutex<Vec<(Arc<[u32]>, Var)>>,
}

#[cfg(any(feature = "cuda", test))]
impl InKernels {
    fn rows(&self, ids: Arc<[u32]>) -> Result<Tensor> {
        let leaf = Var::from_tensor(&self.runs.rows(&self.pass, &ids)?)?;
        let rows = leaf.as_tensor().clone();
        self.chosen.lock().unwrap_or_else(PoisonError::into_inner).push((ids, leaf));
        Ok(rows)
    }

    /// What gradients are to be taken by.
    pub(super) fn leaves(&self) -> Vec<Var> {
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        chosen.iter().map(|(_, leaf)| leaf.clone()).collect()
    }

    /// Takes out the gradients by the leaves.
    pub(super) fn gradients(&self, all: &mut GradStore) -> Result<Vec<ByRows>> {
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let found = chosen.iter().filter_map(|(ids, leaf)| Some((Arc::clone(ids), all.remove(leaf)?)));
        found.map(|(ids, gradient)| Ok((ids, gradient.contiguous()?))).collect()
    }
}
