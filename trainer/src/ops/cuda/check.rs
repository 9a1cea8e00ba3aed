//! What proves the kernels: every operator, forward and backward, against a plain f64 computation, and training steps against the
//! CPU's. `unimo-train gpu` runs it on a device, the tests on the emulation.

mod cases;
mod computed;
mod formulas;
pub(super) mod networks;
mod steps;
mod updates;

use std::borrow::Borrow;
use std::fmt;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};

pub use networks::recorded_passes;
pub use steps::{Extent, Steps, first_steps};

/// How far something was from what it should have been.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was checked.
    pub name: String,
    /// Largest difference, in units of the largest value that was expected (of 1, if that is smaller).
    pub error: f64,
    /// Largest error that is right.
    pub tolerance: f64,
}

impl Outcome {
    /// Of what did not run at all.
    #[must_use]
    pub fn failed(what: &str, why: &anyhow::Error) -> Self {
        Self { name: format!("{what}: {why:#}"), error: f64::INFINITY, tolerance: 0.0 }
    }

    /// Whether it is right. What is not a number is not.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.holds() { "ok" } else { "WRONG" };
        write!(f, "{verdict:5}  {:44} error {:.1e} of {:.1e}", self.name, self.error, self.tolerance)
    }
}

type Run<'a> = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor> + 'a>;
type Formula<'a> = Box<dyn Fn(&[Vec<f64>]) -> Vec<f64> + 'a>;

/// An operator, its inputs, and what it should compute.
struct Case<'a> {
    name: String,
    /// Shape and values of each input.
    inputs: Vec<(Vec<usize>, Vec<f32>)>,
    run: Run<'a>,
    /// The result's values, in f64, of the inputs'.
    formula: Formula<'a>,
    /// Largest errors of result and gradients.
    tolerance: [f64; 2],
}

/// Values in [−1, 1] that repeat from run to run.
fn values(seed: u32, count: usize) -> Vec<f32> {
    let draw = |i: u32| f64::from(crate::seed::mix(u64::from(seed), u64::from(i)) as u32) / f64::from(u32::MAX);
    (0..count as u32).map(|i| (2.0 * draw(i) - 1.0) as f32).collect()
}

/// Largest difference, as [`Outcome::error`] has it; infinite where a value is not finite.
fn error(got: &[f32], expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(1f64, |most, value| most.max(value.abs()));
    let differences = got.iter().zip(expected).map(|(got, expected)| (f64::from(*got) - expected).abs());
    match got.len() == expected.len() && got.iter().all(|value| value.is_finite()) {
        true => differences.fold(0f64, f64::max) / largest,
        false => f64::INFINITY,
    }
}

fn read(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

impl Case<'_> {
    /// What the formula gives, and how that changes with some of the values.
    fn wanted(&self) -> Wanted {
        /// Values of an input whose gradient is compared, spread over it; the last one is always among them.
        const COMPARED: usize = 120;
        let wide: Vec<Vec<f64>> = self.inputs.iter().map(|(_, values)| values.iter().map(|v| f64::from(*v)).collect()).collect();
        let results = (self.formula)(&wide);
        let shares = values(99, results.len());
        let weighed = |inputs: &[Vec<f64>]| -> f64 {
            (self.formula)(inputs).iter().zip(&shares).map(|(y, share)| y * f64::from(*share)).sum()
        };
        let slope = |input: usize, place: usize| {
            let at = |delta: f64| {
                let mut moved = wide.clone();
                moved[input][place] += delta;
                weighed(&moved)
            };
            (at(1e-5) - at(-1e-5)) / 2e-5
        };
        let slopes = wide.iter().enumerate().map(|(input, values)| {
            let step = (values.len() / COMPARED).max(1) | 1;
            let places = (0..values.len()).step_by(step).chain([values.len() - 1]);
            places.map(|place| (place, slope(input, place))).collect()
        });
        Wanted { slopes: slopes.collect(), results, shares }
    }

    /// Compares the result with the formula's, and the gradients with its differences.
    fn check(&self, wanted: &Wanted, device: &Device) -> Result<Vec<Outcome>> {
        let vars = self.inputs.iter().map(|(shape, values)| Var::from_slice(values, shape.as_slice(), device));
        let vars = vars.collect::<candle_core::Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = (self.run)(&tensors)?;
        let error_of_result = error(&read(&y)?, &wanted.results);
        let mut outcomes = vec![Outcome { name: self.name.clone(), error: error_of_result, tolerance: self.tolerance[0] }];
        let loss = (&y * Tensor::from_slice(&wanted.shares, y.shape(), device)?)?.sum_all()?;
        let gradients = loss.backward()?;
        for (i, (var, slopes)) in vars.iter().zip(&wanted.slopes).enumerate() {
            let name = format!("{}, gradient {}", self.name, i + 1);
            let Some(gradient) = gradients.get(var) else { anyhow::bail!("{name} is missing") };
            let all = read(gradient)?;
            let (got, expected): (Vec<f32>, Vec<f64>) = slopes.iter().map(|&(place, slope)| (all[place], slope)).unzip();
            let mut error = error(&got, &expected);
            if all.iter().any(|value| !value.is_finite()) {
                error = f64::INFINITY;
            }
            outcomes.push(Outcome { name, error, tolerance: self.tolerance[1] });
        }
        Ok(outcomes)
    }
}

/// What a case should give.
struct Wanted {
    results: Vec<f64>,
    /// How often each result counts in the sum that gradients are of: every one differently.
    shares: Vec<f32>,
    /// Of each input, some of its values, and how that sum changes with them.
    slopes: Vec<Vec<(usize, f64)>>,
}

/// Checks every operator on a device; each outcome is told as soon as it is there. An operator that does not run at all is wrong, and no
/// reason not to check the others.
pub fn operators(device: &Device, tell: impl FnMut(&Outcome)) -> Vec<Outcome> {
    let cases = cases::all().into_iter().map(|case| {
        let wanted = case.wanted();
        (case, wanted)
    });
    operators_of(cases, device, tell)
}

fn operators_of<'a, C: Borrow<Case<'a>>, W: Borrow<Wanted>>(
    cases: impl IntoIterator<Item = (C, W)>,
    device: &Device,
    tell: impl FnMut(&Outcome),
) -> Vec<Outcome> {
    let cases = cases.into_iter().map(|(case, wanted)| {
        let case: &Case = case.borrow();
        (case.name.clone(), case.check(wanted.borrow(), device))
    });
    let others = [
        ("draws", updates::draws as fn(&Device) -> Result<Vec<Outcome>>),
        ("AdamW", updates::updates),
        ("the cross-modal contrast", computed::cross_modal),
    ];
    let others = others.into_iter().map(|(name, check)| (name.to_owned(), check(device)));
    cases
        .chain(others)
        .flat_map(|(name, made)| made.unwrap_or_else(|error| vec![Outcome::failed(&name, &error)]))
        .inspect(tell)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::emulation::{computing_in, emulated};
    use super::*;
    use crate::ops::Precision;

    /// In three orders of a block's threads: what depends on the order lacks a barrier.
    #[test]
    fn every_kernel_agrees_with_its_formula() {
        let all: Vec<_> = cases::all().into_iter().map(|case| (case.wanted(), case)).collect();
        for order in 0..3 {
            let cases = all.iter().map(|(wanted, case)| (case, wanted));
            let outcomes = emulated(order, || operators_of(cases, &Device::Cpu, |_| ()));
            let wrong: Vec<String> = outcomes.iter().filter(|outcome| !outcome.holds()).map(ToString::to_string).collect();
            assert!(wrong.is_empty(), "order {order}:\n{}", wrong.join("\n"));
        }
    }

    #[test]
    fn recorded_passes_are_those_of_the_cpu() {
        for precision in [Precision::F32, Precision::Bf16] {
            let outcomes = emulated(1, || computing_in(precision, || recorded_passes(&Device::Cpu, precision))).unwrap();
            outcomes.iter().for_each(|outcome| println!("{outcome}"));
            assert!(outcomes.iter().all(Outcome::holds));
        }
    }

    #[test]
    fn steps_of_training_on_the_kernels_are_those_on_the_cpu() {
        let steps = || first_steps(&Extent::small(), &Device::Cpu);
        let expected = steps().unwrap();
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            let got = emulated(2, || computing_in(precision, steps)).unwrap();
            let outcomes = got.compare(&expected, precision);
            outcomes.iter().for_each(|outcome| println!("{outcome}"));
            assert!(outcomes.iter().all(Outcome::holds));
        }
    }
}
