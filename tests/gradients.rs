//! Every own operator agrees with finite differences in f64-scale steps and with its composition of candle's differentiable
//! operators, and after one step every parameter has a finite, non-zero gradient.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use unimo_train::ops::{self, AttentionGroup, AttentionPlan, Part, QueryBlock, Targets, reference};

/// Values in about [−1, 1] that repeat from run to run.
fn values(seed: u32, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + 1.0) * (0.731 + seed as f32 * 0.173)).sin()).collect()
}

fn var(seed: u32, shape: &[usize]) -> Var {
    Var::from_vec(values(seed, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// A scalar that weighs every output differently.
fn weigh(y: &Tensor) -> Result<Tensor> {
    let weights = Tensor::from_vec(values(9, y.elem_count()), y.shape(), &Device::Cpu)?;
    (y * weights)?.sum_all()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// An operator composed of candle's differentiable ones.
type Composed<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// Checks `f` and its gradients by its inputs against `g`, the composed form.
fn check_composed(name: &str, inputs: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>, g: &Composed) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let (y, expected) = (f(&tensors).unwrap(), g(&tensors).unwrap());
    assert!(largest_difference(&y, &expected) < 2e-5, "{name}: forward differs by {}", largest_difference(&y, &expected));
    let [gradients, composed] = [y, expected].map(|y| weigh(&y).unwrap().backward().unwrap());
    for (i, input) in inputs.iter().enumerate() {
        let difference = largest_difference(gradients.get(input).unwrap(), composed.get(input).unwrap());
        // Sums of up to a few hundred f32 products of order 1.
        assert!(difference < 1e-4, "{name}: gradient {i} differs by {difference}");
    }
}

/// Checks gradients of `f` by its inputs against central differences and against `g`, the composed form.
fn check(name: &str, inputs: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>, g: Option<&Composed>) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let gradients = weigh(&y).unwrap().backward().unwrap();
    if let Some(g) = g {
        check_composed(name, inputs, &f, g);
    }
    for (i, input) in inputs.iter().enumerate() {
        let gradient = gradients.get(input).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let original = input.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for k in (0..original.len()).step_by(original.len() / 12 + 1) {
            let at = |delta: f32| -> f64 {
                let mut moved = original.clone();
                moved[k] += delta;
                let mut changed = tensors.clone();
                changed[i] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                f64::from(weigh(&f(&changed).unwrap()).unwrap().to_scalar::<f32>().unwrap())
            };
            let h = 1e-2;
            // Fourth-order central difference: truncation below 1e-6 here, so that f32 rounding (about 1e-4) dominates.
            let slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
            let got = f64::from(gradient[k]);
            assert!((slope - got).abs() < 2e-3 * (1.0 + got.abs()), "{name}: input {i}[{k}]: {got} against {slope}");
        }
    }
}

/// An image of 3 rows with two captions, a text, a causal text.
fn plan() -> Arc<AttentionPlan> {
    let block = |rows, context, causal| QueryBlock { rows, context, causal };
    Arc::new(AttentionPlan {
        groups: vec![
            AttentionGroup {
                start: 0,
                len: 8,
                blocks: vec![block(0..3, 0..0, false), block(3..5, 0..3, true), block(5..8, 0..3, true)],
            },
            AttentionGroup { start: 8, len: 4, blocks: vec![block(0..4, 0..0, false)] },
            AttentionGroup { start: 12, len: 3, blocks: vec![block(0..3, 0..0, true)] },
        ],
    })
}

#[test]
fn layer_norm() {
    let inputs = [var(1, &[7, 20]), var(2, &[20]), var(3, &[20])];
    let f = |t: &[Tensor]| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5);
    check("layer_norm", &inputs, f, Some(&|t| reference::layer_norm(&t[0], &t[1], &t[2], 1e-5)));
}

#[test]
fn gelu() {
    let inputs = [Var::from_tensor(&(var(1, &[9, 17]).as_tensor() * 3.0).unwrap()).unwrap()];
    check("gelu", &inputs, |t| ops::gelu(&t[0]), Some(&|t| t[0].gelu_erf()));
}

#[test]
fn linear() {
    let inputs = [var(1, &[5, 6]), var(2, &[4, 6]), var(3, &[4])];
    let f = |t: &[Tensor]| ops::linear(&t[0], &t[1], &t[2]);
    check("linear", &inputs, f, Some(&|t| reference::linear(&t[0], &t[1], &t[2])));
}

#[test]
fn attention_over_images_captions_and_texts() {
    let inputs = [var(1, &[15, 24])];
    let plan = plan();
    check("attention", &inputs, |t| ops::attention(&t[0], &plan, 2, 0.0, 0), Some(&|t| reference::attention(&t[0], &plan, 2)));
}

#[test]
fn attention_with_dropout_has_the_gradient_of_what_it_computed() {
    let plan = plan();
    check("attention with dropout", &[var(1, &[15, 24])], |t| ops::attention(&t[0], &plan, 2, 0.3, 5), None);
}

#[test]
fn dropout_add() {
    let inputs = [var(1, &[6, 11]), var(2, &[6, 11])];
    check("dropout_add", &inputs, |t| ops::dropout_add(&t[0], &t[1], 0.4, 3), None);
}

#[test]
fn tied_cross_entropy() {
    // More rows than one chunk, so that chunks are joined rightly.
    let rows = 300;
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 13).collect();
    let inputs = [var(1, &[rows, 6]), var(2, &[13, 6]), var(3, &[13])];
    // Weights of both signs, and every seventh row without any: what self-critical training asks for.
    let signed: Vec<f32> = (0..rows).map(|i| if i % 7 == 0 { 0.0 } else { (i as f32 * 0.37).sin() * 2.0 }).collect();
    let part = |rows, smoothing, factor| Part { rows, smoothing, factor };
    let parts = vec![part(20, 0.1, 1.5), part(270, 0.0, -0.5), part(10, 0.3, 0.7)];
    for (name, targets) in [
        ("tied_cross_entropy", Targets::of_one(targets.clone(), None, 0.1)),
        ("weighted tied_cross_entropy", Targets::of_one(targets.clone(), Some(signed.clone()), 0.1)),
        ("tied_cross_entropy in parts", Targets { classes: targets.clone(), weights: Some(signed.clone()), parts }),
    ] {
        let f = |t: &[Tensor]| ops::tied_cross_entropy(&t[0], &t[1], &t[2], &targets)?.get(0);
        let g = |t: &[Tensor]| reference::tied_cross_entropy(&t[0], &t[1], &t[2], &targets);
        check(name, &inputs, f, Some(&g));
    }
}

#[test]
fn losses_against_targets() {
    let targets = (var(2, &[4, 7]).as_tensor() * 0.5).unwrap().abs().unwrap();
    let inputs = [var(1, &[4, 7])];
    check("soft_cross_entropy", &inputs, |t| ops::soft_cross_entropy(&t[0], &targets), None);
    check("binary_cross_entropy", &inputs, |t| ops::binary_cross_entropy(&t[0], &targets), None);
    check("squared_error", &inputs, |t| ops::squared_error(&t[0], &targets), None);
    assert!(ops::squared_error(inputs[0].as_tensor(), &targets.t().unwrap()).is_err(), "other shapes");
}

#[test]
fn poolings() {
    check("first_and_mean", &[var(1, &[9, 5])], |t| ops::first_and_mean(&t[0], &[3, 1, 2]), None);
    assert!(ops::first_and_mean(var(1, &[9, 5]).as_tensor(), &[3, 3]).is_err(), "other numbers of rows");
    check("relu_product", &[var(1, &[6, 5]), var(2, &[6, 5])], |t| ops::relu_product(&t[0], &t[1]), None);
}

#[test]
fn depthwise_convolution() {
    let bias = |at: f32| Var::from_tensor(&(var(3, &[5]).as_tensor() + f64::from(at)).unwrap()).unwrap();
    for stride in [1, 2] {
        let f = |t: &[Tensor]| ops::depthwise_relu6(&t[0], &t[1], &t[2], stride);
        let g = |t: &[Tensor]| reference::depthwise_relu6(&t[0], &t[1], &t[2], stride);
        // Far from the ends of ReLU6, where differences mean something; then across both of them.
        let small = Var::from_tensor(&(var(2, &[9, 5]).as_tensor() * 0.2).unwrap()).unwrap();
        check("depthwise_relu6", &[var(1, &[2, 36, 5]), small, bias(3.0)], f, Some(&g));
        for at in [0.0, 6.0] {
            check_composed("depthwise_relu6 at its ends", &[var(1, &[2, 36, 5]), var(2, &[9, 5]), bias(at)], f, &g);
        }
    }
    let [x, weight, bias] = [var(1, &[2, 35, 5]), var(2, &[9, 5]), var(3, &[5])];
    assert!(ops::depthwise_relu6(x.as_tensor(), weight.as_tensor(), bias.as_tensor(), 1).is_err(), "35 pixels are no square");
}

#[test]
fn full_convolution() {
    let (x, weight) = (var(1, &[2, 36, 3]), var(2, &[5, 27]));
    let bias = |at: f32| Var::from_tensor(&(var(3, &[5]).as_tensor() + f64::from(at)).unwrap()).unwrap();
    for stride in [1, 2] {
        let f = |t: &[Tensor]| ops::convolution_relu6(&t[0], &t[1], &t[2], stride);
        let g = |t: &[Tensor]| reference::convolution_relu6(&t[0], &t[1], &t[2], stride);
        let small = Var::from_tensor(&(weight.as_tensor() * 0.1).unwrap()).unwrap();
        check("convolution_relu6", &[x.clone(), small, bias(3.0)], f, Some(&g));
        for at in [0.0, 6.0] {
            check_composed("convolution_relu6 at its ends", &[x.clone(), weight.clone(), bias(at)], f, &g);
        }
    }
    let depthwise = var(2, &[9, 3]);
    assert!(ops::convolution_relu6(x.as_tensor(), depthwise.as_tensor(), bias(0.0).as_tensor(), 1).is_err());
}

#[test]
fn relu6() {
    let inputs = [Var::from_tensor(&((var(1, &[9, 17]).as_tensor() * 5.0).unwrap() + 3.0).unwrap()).unwrap()];
    check_composed("relu6", &inputs, |t| ops::relu6(&t[0]), &|t| reference::relu6(&t[0]));
}

#[test]
fn a_wrong_plan_is_refused() {
    let qkv = var(1, &[15, 24]);
    let mut wrong = (*plan()).clone();
    wrong.groups[0].blocks[1].rows = 4..5;
    assert!(ops::attention(qkv.as_tensor(), &Arc::new(wrong), 2, 0.0, 0).is_err());
    let mut short = (*plan()).clone();
    short.groups.pop();
    assert!(ops::attention(qkv.as_tensor(), &Arc::new(short), 2, 0.0, 0).is_err());
}
