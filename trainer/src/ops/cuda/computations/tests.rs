use candle_core::Var;

use super::super::emulation::{emulated, recording_only};
use super::*;
use crate::ops::{AtOnce, Operators, Part, Targets};

const WIDTH: usize = 6;
const CLASSES: usize = 9;

fn tensor(rows: usize, width: usize, phase: f32) -> Tensor {
    let values = (0..rows * width).map(|i| (i as f32 * 0.7 + phase).sin()).collect();
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Weights and biases of a layer, of classes and of a layer upon texts, those of a norm, and the logarithm of a temperature.
fn weights() -> Vec<Var> {
    let row = |width: usize, phase: f32| tensor(1, width, phase).flatten_all().unwrap();
    let layers = [(WIDTH, WIDTH, 0.0), (CLASSES, WIDTH, 1.0), (WIDTH, 2 * WIDTH, 2.0)];
    let layers =
        layers.into_iter().flat_map(|(outputs, inputs, phase)| [tensor(outputs, inputs, phase), row(outputs, phase + 5.0)]);
    let others = [row(WIDTH, 8.0).affine(0.2, 1.0).unwrap(), row(WIDTH, 9.0), Tensor::new(-0.5f32, &Device::Cpu).unwrap()];
    layers.chain(others).map(|weight| Var::from_tensor(&weight).unwrap()).collect()
}

/// All operators but the cross-modal contrast, of rows of texts that vary in length and of one array more.
struct Everything<'a> {
    weights: &'a [Var],
    counts: Vec<usize>,
    targets: Targets,
    seed: u32,
    rate: f32,
}

impl<'a> Everything<'a> {
    fn new(weights: &'a [Var], counts: &[usize], phase: f32) -> Self {
        let rows: usize = counts.iter().map(|count| 1 + count).sum();
        let part = |rows, smoothing, factor| Part { rows, smoothing, factor };
        let targets = Targets {
            classes: (0..rows as u32).map(|row| (row + phase as u32) % CLASSES as u32).collect(),
            weights: None,
            parts: vec![part(2, 0.1, 0.5), part(rows - 2, 0.0, 2.0)],
        };
        Self { weights, counts: counts.to_vec(), targets, seed: phase as u32, rate: 0.3 }
    }

    /// Rows, another array, and targets of the rows.
    fn arrays(&self, phase: f32) -> [Tensor; 3] {
        let texts = self.counts.len();
        let rows = self.counts.iter().sum::<usize>() + texts;
        [tensor(rows, WIDTH, phase), tensor(texts, WIDTH, phase + 1.0), tensor(rows, WIDTH, phase + 2.0).sqr().unwrap()]
    }
}

impl Computation for Everything<'_> {
    const NAME: &'static str = "everything";

    fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> Result<Vec<O::Array>> {
        let [rows, others, of_rows] = given else { candle_core::bail!("three arrays") };
        let w: Vec<&Tensor> = self.weights.iter().map(Var::as_tensor).collect();
        let texts = self.counts.len();
        let x = on.layer_norm(&on.linear_gelu(rows, w[0], w[1])?, w[6], w[7], 1e-5)?;
        let words = on.tied_cross_entropy(&on.scaled(&x, 0.5)?, w[2], &on.scaled(&on.weight(w[3]), 2.0)?, &self.targets)?;
        // Rows that are read twice, and weights of which two things are made.
        let embedded = on.linear(&on.first_and_mean(rows, &self.counts)?, w[4], w[5])?;
        let dropped = on.linear(&on.dropout(others, self.rate, self.seed)?, w[0], w[1])?;
        let both = on.relu_product(&dropped, &embedded)?;
        let targets = on.constants((0..texts * WIDTH).map(|i| (i % 3) as f32 * 0.5).collect(), (texts, WIDTH))?;
        let unit = on.unit_rows(&on.relu(&embedded)?)?;
        let scores = on.scalar_products(&on.some_rows(&unit, 1..2)?, &unit)?;
        let numbers: Vec<u32> = (0..texts as u32).collect();
        let temperature = on.bounded_exp(w[8], [0.1, 0.9])?;
        Ok(vec![
            words,
            on.squared_error(&both, &targets)?,
            on.binary_cross_entropy(&dropped, &targets)?,
            on.soft_cross_entropy(&embedded, &targets)?,
            // Rows that fill up count nothing here either.
            on.squared_error(&x, of_rows)?,
            on.soft_cross_entropy(&on.linear(&x, w[0], w[1])?, of_rows)?,
            on.log_shares(&scores, &temperature, [&numbers[1..2], &numbers], [0.0, -1.0])?,
        ])
    }
}

const FACTORS: [f32; 7] = [1.0, 0.25, -0.5, 2.0, 0.75, 0.5, 0.125];

/// What is computed, and gradients by both arrays and by the weights.
type Results = (Vec<Vec<f32>>, Vec<Vec<f32>>);

/// By candle.
fn composed(everything: &Everything, [rows, others, of_rows]: &[Tensor; 3]) -> Results {
    let given = [rows, others].map(|tensor| Var::from_tensor(tensor).unwrap());
    let [rows, others] = given.each_ref().map(|var| var.as_tensor().clone());
    let outputs = everything.compute(&AtOnce(&Device::Cpu), &[rows, others, of_rows.clone()]).unwrap();
    let terms = outputs.iter().zip(FACTORS).map(|(output, factor)| {
        let loss = if output.rank() == 0 { output.clone() } else { output.get(0).unwrap() };
        loss.affine(f64::from(factor), 0.0).unwrap()
    });
    let all = terms.reduce(|sum, term| (sum + term).unwrap()).unwrap().backward().unwrap();
    let gradients = given.iter().chain(everything.weights).map(|var| flat(all.get(var).unwrap()));
    (outputs.iter().map(flat).collect(), gradients.collect())
}

fn at_once(computations: &Computations, everything: &Everything, [rows, others, of_rows]: &[Tensor; 3]) -> Results {
    let below = others.narrow(0, 1, others.dim(0).unwrap() - 1).unwrap();
    let (rows, others, of_rows) = ([rows.clone()], [others.narrow(0, 0, 1).unwrap(), below], [of_rows.clone()]);
    let given = [(&rows[..], Some(8), true), (&others, None, true), (&of_rows, Some(8), false)];
    let given = given.map(|(all, parts, wanted)| Given::Matrices { all, parts, wanted });
    let found = computations.at_once(everything, &given, &FACTORS, &Device::Cpu).unwrap();
    let by_weight = |var: &Var| {
        let (_, gradient) = found.by_weights.iter().find(|(weight, _)| weight.id() == var.id()).unwrap();
        flat(gradient)
    };
    assert!(found.by_given[2].is_none());
    let by_given = found.by_given[..2].iter().map(|by| flat(by.as_ref().unwrap()));
    let gradients = by_given.chain(everything.weights.iter().map(by_weight)).collect();
    (found.outputs.iter().map(flat).collect(), gradients)
}

fn assert_near(found: &Results, expected: &Results) {
    for (what, found, expected) in [("output", &found.0, &expected.0), ("gradient", &found.1, &expected.1)] {
        assert_eq!(found.len(), expected.len());
        for (number, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.len(), expected.len(), "{what} {number}");
            let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
            assert!(off < 1e-5, "{what} {number}: {found:?} is not {expected:?}");
        }
    }
}

/// Texts of 40 to 37 tokens and firsts, which are filled up to 48.
const COUNTS: [[usize; 3]; 4] = [[30, 1, 6], [28, 1, 6], [30, 2, 5], [27, 1, 6]];

/// The first time asked for, then recorded, whatever the lengths and values; bit by bit what is asked for where nothing is recorded.
#[test]
fn recorded_computations_are_those_of_candle() {
    let weights = weights();
    let run = |recordings: u32| {
        recording_only(recordings, || {
            emulated(1, || {
                let computations = Computations::default();
                let all: Vec<Results> = (0u8..)
                    .zip(COUNTS)
                    .map(|(time, counts)| {
                        let everything = Everything::new(&weights, &counts, f32::from(time));
                        let arrays = everything.arrays(f32::from(time));
                        at_once(&computations, &everything, &arrays)
                    })
                    .collect();
                (all, computations.counts())
            })
        })
    };
    let (found, counts) = run(u32::MAX);
    assert_eq!(counts, Counts { passes: 4, replayed: 3, recordings: 1 });
    for ((time, counts), found) in (0u8..).zip(COUNTS).zip(&found) {
        let everything = Everything::new(&weights, &counts, f32::from(time));
        assert_near(found, &composed(&everything, &everything.arrays(f32::from(time))));
    }
    let (asked, counts) = run(0);
    assert_eq!(counts, Counts { passes: 4, replayed: 0, recordings: 0 });
    assert_eq!(asked, found);
}

/// What a recording has for good is told apart: another rate, another number of parts, weights elsewhere.
#[test]
fn what_is_put_down_otherwise_is_another_computation() {
    let (weights, elsewhere) = (weights(), weights());
    elsewhere[4].set(&tensor(WIDTH, 2 * WIDTH, 7.0)).unwrap();
    emulated(0, || {
        let computations = Computations::default();
        let everything = || Everything::new(&weights, &COUNTS[0], 0.0);
        let arrays = everything().arrays(0.0);
        let mut parts = everything();
        let last = parts.targets.parts.pop().unwrap();
        parts.targets.parts.extend([Part { rows: 5, ..last }, Part { rows: last.rows - 5, ..last }]);
        let others = Everything { weights: &elsewhere, ..everything() };
        let variants = [everything(), Everything { rate: 0.1, ..everything() }, parts, others, everything()];
        for _ in 0..2 {
            for variant in &variants {
                assert_near(&at_once(&computations, variant, &arrays), &composed(variant, &arrays));
            }
        }
        // The last one is the first again.
        assert_eq!(computations.counts(), Counts { passes: 10, replayed: 6, recordings: 4 });
    });
}

/// Memory grows with the largest; what was recorded before is recorded again on it.
#[test]
fn a_larger_computation_begins_with_new_memory() {
    let weights = weights();
    emulated(0, || {
        let computations = Computations::default();
        let (small, large) = (Everything::new(&weights, &[3, 2], 0.0), Everything::new(&weights, &COUNTS[0], 1.0));
        let run = |of: &Everything, expected: [u64; 2]| {
            let arrays = of.arrays(2.0);
            assert_near(&at_once(&computations, of, &arrays), &composed(of, &arrays));
            let Counts { replayed, recordings, .. } = computations.counts();
            assert_eq!([replayed, recordings], expected);
        };
        run(&small, [0, 0]);
        run(&small, [1, 1]);
        run(&large, [1, 1]);
        run(&small, [2, 2]);
        run(&large, [3, 3]);
        run(&small, [4, 3]);
    });
}

/// Embeddings of rows by a weight.
struct Embedded<'a>(&'a [Var]);

impl Computation for Embedded<'_> {
    const NAME: &'static str = "embedded";

    fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> Result<Vec<O::Array>> {
        given.iter().map(|rows| on.unit_rows(&on.linear(rows, &self.0[0], &self.0[1])?)).collect()
    }
}

/// A gradient by one of two outputs, later; the other's is zeros. Taken back once, and not after another computation.
#[test]
fn what_is_taken_back_later_has_candles_gradients() {
    let weights = weights();
    let (weights, rows) = (&weights[..2], [tensor(4, WIDTH, 0.0), tensor(3, WIDTH, 1.0)]);
    let by = tensor(4, WIDTH, 2.0);
    let vars = rows.each_ref().map(|rows| Var::from_tensor(rows).unwrap());
    let outputs = Embedded(weights).compute(&AtOnce(&Device::Cpu), &vars.each_ref().map(|var| var.as_tensor().clone())).unwrap();
    let all = (&outputs[0] * &by).unwrap().sum_all().unwrap().backward().unwrap();
    let near = |found: &Tensor, expected: &Tensor| {
        let off = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-6, "off by {off}");
    };
    emulated(0, || {
        let computations = Computations::default();
        let rows = rows.clone().map(|rows| [rows]);
        let forward = || {
            let given = rows.each_ref().map(|all| Given::Matrices { all, parts: None, wanted: true });
            computations.forward(&Embedded(weights), &given, &Device::Cpu).unwrap()
        };
        for time in 0..3 {
            let (found, pending) = forward();
            outputs.iter().zip(&found).for_each(|(expected, found)| near(found, expected));
            let found = computations.backward(&pending, &[Some(by.clone()), None]).unwrap();
            near(found.by_given[0].as_ref().unwrap(), all.get(&vars[0]).unwrap());
            near(found.by_given[1].as_ref().unwrap(), &rows[1][0].zeros_like().unwrap());
            for (weight, gradient) in &found.by_weights {
                near(gradient, all.get(weight).unwrap());
            }
            assert_eq!(found.by_weights.len(), 2);
            assert_eq!(computations.counts().replayed, time);
        }
        // After a mistake it begins anew.
        let told =
            |pending: &Pending, by: &[Option<Tensor>]| computations.backward(pending, by).map(|_| ()).unwrap_err().to_string();
        let pending = forward().1;
        computations.backward(&pending, &[None, None]).unwrap();
        assert!(told(&pending, &[None, None]).starts_with("embedded: another computation came in between"));
        let overtaken = forward().1;
        forward();
        assert!(told(&overtaken, &[None, None]).starts_with("embedded: another computation came in between"));
        let of_another_shape = told(&forward().1, &[Some(rows[1][0].clone()), None]);
        assert!(of_another_shape.contains("a gradient of [3, 6] by [4, 6]"), "{of_another_shape}");
        assert!(told(&forward().1, &[None]).starts_with("embedded: 1 gradients by 2 outputs"));
    });
}

/// Nothing that is trained was read: there are values and no gradients.
#[test]
fn what_leads_nowhere_has_no_gradients() {
    let (rows, weights) = ([tensor(4, WIDTH, 0.0)], weights());
    let constants: Vec<Var> = weights[..2].to_vec();
    struct Constant<'a>(&'a [Var]);
    impl Computation for Constant<'_> {
        const NAME: &'static str = "constant";

        fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> Result<Vec<O::Array>> {
            let [weight, bias] = [&self.0[0], &self.0[1]].map(|var| var.as_detached_tensor());
            let targets = on.constants(vec![0.5; 4 * WIDTH], (4, WIDTH))?;
            Ok(vec![on.squared_error(&on.linear(&given[0], &weight, &bias)?, &targets)?])
        }
    }
    emulated(0, || {
        let computations = Computations::default();
        for _ in 0..3 {
            let given = [Given::Matrices { all: &rows, parts: None, wanted: false }];
            let found = computations.at_once(&Constant(&constants), &given, &[1.0], &Device::Cpu).unwrap();
            assert!(found.by_weights.is_empty() && found.by_given.iter().all(Option::is_none));
            assert!(found.outputs[0].to_scalar::<f32>().unwrap() > 0.0);
        }
        assert_eq!(computations.counts().replayed, 2);
    });
}

/// Rows that only fill up are neither compared nor given away.
#[test]
fn rows_that_fill_up_are_no_result() {
    struct Rows(bool);
    impl Computation for Rows {
        const NAME: &'static str = "rows";

        fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> Result<Vec<O::Array>> {
            let unit = on.unit_rows(&given[0])?;
            Ok(vec![if self.0 { on.scalar_products(&unit, &unit)? } else { unit }])
        }
    }
    let rows = [tensor(33, WIDTH, 0.0)];
    emulated(0, || {
        let computations = Computations::default();
        let run = |parts: Option<usize>, compared: bool| {
            let given = [Given::Matrices { all: &rows, parts, wanted: true }];
            computations.forward(&Rows(compared), &given, &Device::Cpu).map(|_| ())
        };
        for (compared, expected) in [(true, "33 of 48 rows count"), (false, "rows that only fill up")] {
            let error = run(Some(8), compared).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            run(None, compared).unwrap();
        }
    });
}
