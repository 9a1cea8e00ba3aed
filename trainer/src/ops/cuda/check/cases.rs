//! The operators' cases: shapes that leave tiles, warps and pieces partly filled.

use std::sync::Arc;

use candle_core::Tensor;

use super::super::{
    Element, attention, depthwise_relu6, dropout_add_layer_norm, linear, linear_gelu, pack_rows, patches, relu6,
    tied_cross_entropy_in_chunks,
};
use super::{Case, formulas, values};
use crate::ops::kernels::Plane;
use crate::ops::{self, AttentionGroup, AttentionPlan, Part, Precision, QueryBlock, Targets};

/// Of sums of up to a few hundred products of order 1 in f32, in another order.
const F32: [f64; 2] = [2e-5, 5e-5];
/// Of the same with factors rounded to eight bits of mantissa, each off by up to 1/512.
const BF16: [f64; 2] = [1e-2, 2e-2];

/// Of the same with ten bits, which may be cut off, each factor then off by up to 1/1024.
const TF32: [f64; 2] = [4e-3, 8e-3];

fn tolerance(element: Element) -> [f64; 2] {
    match element {
        Element::F32 => F32,
        Element::Bf16 => BF16,
    }
}

fn input(seed: u32, shape: &[usize], factor: f32) -> (Vec<usize>, Vec<f32>) {
    (shape.to_vec(), values(seed, shape.iter().product()).into_iter().map(|v| v * factor).collect())
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// Every case.
pub fn all() -> Vec<Case<'static>> {
    let mut cases = Vec::new();
    cases.extend(norms());
    cases.extend(alone());
    cases.extend(contrasts());
    cases.extend(products());
    cases.extend(losses());
    cases.extend(targeted());
    cases.extend(poolings());
    cases.extend(attentions());
    cases.extend(convolutions());
    cases
}

fn norms() -> Vec<Case<'static>> {
    const EPS: f32 = 1e-5;
    let eps = f64::from(EPS);
    let alone = |rows: usize, width: usize| Case {
        name: format!("LayerNorm of {rows} rows of {width}"),
        inputs: vec![input(1, &[rows, width], 2.0), input(2, &[width], 1.0), input(3, &[width], 1.0)],
        run: Box::new(|t| ops::layer_norm(&t[0], &t[1], &t[2], EPS)),
        formula: Box::new(move |v| formulas::layer_norm(&v[0], &v[1], &v[2], eps)),
        tolerance: F32,
    };
    let sum = |width: usize, element: Element| {
        let (rows, rate, seed) = (9, 0.3, 77);
        Case {
            name: format!("LayerNorm of a residual sum with dropout, {width} wide, stored in {element:?}"),
            inputs: vec![
                input(4, &[rows, width], 2.0),
                input(5, &[rows, width], 2.0),
                input(6, &[width], 1.0),
                input(7, &[width], 1.0),
            ],
            run: Box::new(move |t| dropout_add_layer_norm((&t[0], &t[1]), (rate, seed), &[&t[2], &t[3]], EPS, element)),
            formula: Box::new(move |v| {
                let dropped = times(&v[1], &formulas::mask(v[1].len(), seed, 1.0 - rate));
                formulas::layer_norm(&plus(&v[0], &dropped), &v[2], &v[3], eps)
            }),
            tolerance: tolerance(element),
        }
    };
    let of_product = |rows: usize, width: usize, element: Element| {
        let (rate, seed) = (0.2, 78);
        let shapes: [&[usize]; 5] = [&[rows, width], &[rows, width], &[width], &[width], &[width]];
        Case {
            name: format!("LayerNorm of a residual sum with a product's bias, {width} wide, stored in {element:?}"),
            inputs: shapes.iter().zip(4..).map(|(shape, seed)| input(seed, shape, 1.5)).collect(),
            run: Box::new(move |t| dropout_add_layer_norm((&t[0], &t[1]), (rate, seed), &[&t[2], &t[3], &t[4]], EPS, element)),
            formula: Box::new(move |v| {
                let product = plus(&v[1], &v[4].repeat(rows));
                let dropped = times(&product, &formulas::mask(product.len(), seed, 1.0 - rate));
                formulas::layer_norm(&plus(&v[0], &dropped), &v[2], &v[3], eps)
            }),
            tolerance: tolerance(element),
        }
    };
    vec![
        // More rows than a block of the backward pass takes.
        alone(70, 20),
        // So wide that a block has fewer warps.
        alone(3, 1600),
        sum(52, Element::F32),
        sum(52, Element::Bf16),
        // More than all lanes take at one time, and the last one takes less.
        sum(292, Element::Bf16),
        of_product(21, 40, Element::F32),
        // Rows that warps hold, of one to four steps; with and without a bias, and the last step whole or not.
        of_product(21, 40, Element::Bf16),
        sum(296, Element::Bf16),
        of_product(70, 768, Element::Bf16),
        of_product(5, 1000, Element::Bf16),
    ]
}

/// What contrasts are made of.
fn contrasts() -> Vec<Case<'static>> {
    // More than a warp's lanes, and more than a block's threads, take at one time; rows that fill no block.
    let unit = Case {
        name: "rows of unit length".to_owned(),
        inputs: vec![input(65, &[9, 70], 2.0)],
        run: Box::new(|t| ops::unit_rows(&t[0])),
        formula: Box::new(|v| formulas::unit_rows(&v[0], 70)),
        tolerance: F32,
    };
    let bounded = Case {
        name: "exponentials within bounds".to_owned(),
        inputs: vec![input(67, &[300], 3.0)],
        run: Box::new(|t| ops::bounded_exp(&t[0], [0.2, 4.0])),
        formula: Box::new(|v| v[0].iter().map(|x| x.exp().clamp(f64::from(0.2f32), 4.0)).collect()),
        tolerance: F32,
    };
    let shares = |name: &'static str, columns: u32, [least, factor]: [f64; 2]| {
        // Row 3 has no column of its own, row 1 has many.
        let numbers = [vec![2, 5, 9, 11, 2], (0..columns).map(|i| [5, 2, 5, 9, 7][i as usize % 5]).collect::<Vec<u32>>()];
        let asked = numbers.clone();
        Case {
            name: format!("logarithms of shares of {columns} columns, {name}"),
            inputs: vec![input(68, &[5, columns as usize], 0.5), (vec![], vec![0.2])],
            run: Box::new(move |t| ops::log_shares(&t[0], &t[1], [&asked[0], &asked[1]], [least, factor])),
            formula: Box::new(move |v| formulas::log_shares(&v[0], v[1][0], [&numbers[0], &numbers[1]], [least, factor])),
            tolerance: F32,
        }
    };
    let (bare, added) = (shares("bare", 70, [0.0, -0.1]), shares("with something added", 300, [0.05, -0.5]));
    vec![unit, bounded, bare, added]
}

fn alone() -> Vec<Case<'static>> {
    const ORDER: [u32; 7] = [4, 0, 5, 1, 2, 6, 3];
    let (rate, seed) = (0.25, 5);
    let ids: Arc<[u32]> = [4, 1, 4, 0, 4, 1, 6].into();
    let chosen = Arc::clone(&ids);
    vec![
        Case {
            name: "ReLU".to_owned(),
            inputs: vec![input(9, &[300], 2.0)],
            run: Box::new(|t| ops::relu(&t[0])),
            formula: Box::new(|v| v[0].iter().map(|x| x.max(0.0)).collect()),
            tolerance: F32,
        },
        Case {
            name: "GELU".to_owned(),
            inputs: vec![input(8, &[9, 37], 4.0)],
            run: Box::new(|t| ops::gelu(&t[0])),
            formula: Box::new(|v| formulas::gelu(&v[0])),
            tolerance: F32,
        },
        Case {
            name: "ReLU6".to_owned(),
            inputs: vec![input(9, &[5, 41], 9.0)],
            run: Box::new(|t| ops::relu6(&t[0])),
            formula: Box::new(|v| formulas::relu6(&v[0])),
            tolerance: F32,
        },
        Case {
            name: "dropout and residual".to_owned(),
            inputs: vec![input(10, &[7, 45], 1.0), input(11, &[7, 45], 1.0)],
            run: Box::new(move |t| ops::dropout_add(&t[0], &t[1], rate, seed)),
            formula: Box::new(move |v| plus(&v[0], &times(&v[1], &formulas::mask(v[1].len(), seed, 1.0 - rate)))),
            tolerance: F32,
        },
        Case {
            name: "embeddings (rows chosen repeatedly)".to_owned(),
            inputs: vec![input(12, &[8, 70], 1.0)],
            run: Box::new(move |t| ops::select_rows(&t[0], &chosen)),
            formula: Box::new(move |v| ids.iter().flat_map(|&id| v[0][id as usize * 70..][..70].to_vec()).collect()),
            tolerance: F32,
        },
        Case {
            name: "rows of two arrays packed, with dropout".to_owned(),
            inputs: vec![input(69, &[4, 69], 1.0), input(70, &[3, 69], 1.0)],
            run: Box::new(move |t| pack_rows([&t[0], &t[1]], &ORDER, (rate, seed))),
            formula: Box::new(move |v| {
                let both = [&v[0][..], &v[1]].concat();
                let packed: Vec<f64> = ORDER.iter().flat_map(|&row| both[row as usize * 69..][..69].to_vec()).collect();
                times(&packed, &formulas::mask(packed.len(), seed, 1.0 - rate))
            }),
            tolerance: F32,
        },
    ]
}

fn products() -> Vec<Case<'static>> {
    let inputs = || vec![input(13, &[150, 36], 1.0), input(14, &[24, 36], 1.0), input(15, &[24], 1.0)];
    let of = |precision: Precision, element: Element, tolerance| {
        let stored = format!("in {precision:?}, stored in {element:?}");
        [
            Case {
                name: format!("linear {stored}"),
                inputs: inputs(),
                run: Box::new(move |t| linear(&t[0], &t[1], &t[2], precision, element)),
                formula: Box::new(|v| formulas::linear(&v[0], &v[1], &v[2])),
                tolerance,
            },
            Case {
                name: format!("linear, bias and GELU {stored}"),
                inputs: inputs(),
                run: Box::new(move |t| linear_gelu(&t[0], &t[1], &t[2], precision, element)),
                formula: Box::new(|v| formulas::gelu(&formulas::linear(&v[0], &v[1], &v[2]))),
                tolerance,
            },
        ]
    };
    let all = [
        of(Precision::F32, Element::F32, F32),
        of(Precision::Tf32, Element::F32, TF32),
        of(Precision::Bf16, Element::F32, BF16),
        of(Precision::Bf16, Element::Bf16, BF16),
    ];
    // So many rows that sums of their columns are left by several blocks, and more columns than such a block has in the end.
    let long = Case {
        name: "linear of 1600 rows".to_owned(),
        inputs: vec![input(16, &[1600, 2], 1.0), input(17, &[72, 2], 1.0), input(18, &[72], 1.0)],
        run: Box::new(|t| linear(&t[0], &t[1], &t[2], Precision::F32, Element::F32)),
        formula: Box::new(|v| formulas::linear(&v[0], &v[1], &v[2])),
        // Sums of as many.
        tolerance: [F32[0], 2e-4],
    };
    let alone = Case {
        name: "scalar products".to_owned(),
        inputs: inputs()[..2].to_vec(),
        run: Box::new(|t| ops::scalar_products(&t[0], &t[1])),
        formula: Box::new(|v| formulas::linear(&v[0], &v[1], &[0.0; 24])),
        tolerance: F32,
    };
    all.into_iter().flatten().chain([alone, long]).collect()
}

fn losses() -> Vec<Case<'static>> {
    let part = |rows, smoothing, factor| Part { rows, smoothing, factor };
    let of = |name: &'static str, classes: usize, weighted: bool, parts: &[Part], precision: Precision, tolerance| {
        let rows = parts.iter().map(|part| part.rows).sum();
        let own: Vec<u32> = (0..rows as u32).map(|row| row * 29 % classes as u32).collect();
        let targets = Targets { classes: own, weights: weighted.then(|| values(20, rows)), parts: parts.to_vec() };
        let asked = targets.clone();
        Case {
            name: format!("cross-entropy, {name}"),
            inputs: vec![input(16, &[rows, 18], 1.0), input(17, &[classes, 18], 1.0), input(18, &[classes], 1.0)],
            // Chunks of four rows: three of them, the last one smaller.
            run: Box::new(move |t| {
                let inputs = [&t[0], &t[1], &t[2]];
                tied_cross_entropy_in_chunks(inputs, &asked, precision, 4)?.get(0)
            }),
            formula: Box::new(move |v| {
                let (logits, mut first, mut sum) = (formulas::linear(&v[0], &v[1], &v[2]), 0, 0.0);
                for &Part { rows, smoothing, factor } in &targets.parts {
                    let own = first..first + rows;
                    let weights = targets.weights.as_ref().map(|weights| &weights[own.clone()]);
                    let logits = &logits[own.start * classes..own.end * classes];
                    let mean = formulas::cross_entropy(logits, &targets.classes[own.clone()], weights, f64::from(smoothing));
                    sum += f64::from(factor) * mean;
                    first = own.end;
                }
                vec![sum]
            }),
            tolerance,
        }
    };
    vec![
        of("smoothed", 301, false, &[part(11, 0.1, 1.0)], Precision::F32, F32),
        of("weighted", 40, true, &[part(11, 0.0, 1.0)], Precision::F32, F32),
        of("three means", 40, true, &[part(3, 0.1, 0.5), part(6, 0.0, -1.5), part(2, 0.2, 2.0)], Precision::F32, F32),
        of("smoothed, in bf16", 301, false, &[part(11, 0.1, 1.0)], Precision::Bf16, BF16),
        // More than twice what a block's threads take at one time.
        of("of many classes", 4_203, false, &[part(5, 0.1, 1.0)], Precision::F32, F32),
    ]
}

/// Losses against given targets: more columns than a block has threads, and fewer than a warp has.
fn targeted() -> Vec<Case<'static>> {
    type Run = fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>;
    type OfRow = fn(&[f64], &[f64]) -> f64;
    let soft: OfRow = |x, y| -times(&formulas::log_softmax(x, x.len()), y).iter().sum::<f64>();
    let binary: OfRow = |x, y| x.iter().zip(y).map(|(x, y)| (1.0 + x.exp()).ln() - x * y).sum();
    let squared: OfRow = |x, y| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / x.len() as f64;
    let of = |name: &str, width: usize, run: Run, of_row: OfRow| {
        let (rows, targets) = (5, values(75, 5 * width).into_iter().map(f32::abs).collect::<Vec<f32>>());
        let wide: Vec<f64> = targets.iter().map(|&target| f64::from(target)).collect();
        Case {
            name: format!("{name}, {width} columns"),
            inputs: vec![input(76, &[rows, width], 3.0)],
            run: Box::new(move |t| run(&t[0], &Tensor::from_slice(&targets, (rows, width), t[0].device())?)),
            formula: Box::new(move |v| {
                let of_rows = v[0].chunks_exact(width).zip(wide.chunks_exact(width));
                vec![of_rows.map(|(x, y)| of_row(x, y)).sum::<f64>() / rows as f64]
            }),
            tolerance: F32,
        }
    };
    let both = |name: &str, run: Run, of_row: OfRow| [300, 1].map(|width| of(name, width, run, of_row));
    [
        both("cross-entropy with degrees of classes", ops::soft_cross_entropy, soft),
        both("binary cross-entropy", ops::binary_cross_entropy, binary),
        both("squared error", ops::squared_error, squared),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn poolings() -> Vec<Case<'static>> {
    const WIDTH: usize = 21;
    const COUNTS: [usize; 3] = [4, 1, 30];
    let rows = COUNTS.iter().map(|count| 1 + count).sum();
    vec![
        Case {
            name: "first rows beside means of the others".to_owned(),
            inputs: vec![input(77, &[rows, WIDTH], 1.0)],
            run: Box::new(|t| ops::first_and_mean(&t[0], &COUNTS)),
            formula: Box::new(|v| {
                let (mut y, mut rows) = (Vec::new(), v[0].chunks_exact(WIDTH));
                for count in COUNTS {
                    y.extend_from_slice(rows.next().unwrap_or_default());
                    let others = rows.by_ref().take(count).fold(vec![0.0; WIDTH], |sum, row| plus(&sum, row));
                    y.extend(others.iter().map(|sum| sum / count as f64));
                }
                y
            }),
            tolerance: F32,
        },
        Case {
            name: "products of ReLUs".to_owned(),
            inputs: vec![input(78, &[7, 45], 1.0), input(79, &[7, 45], 1.0)],
            run: Box::new(|t| ops::relu_product(&t[0], &t[1])),
            formula: Box::new(|v| v[0].iter().zip(&v[1]).map(|(a, b)| a.max(0.0) * b.max(0.0)).collect()),
            tolerance: F32,
        },
    ]
}

/// An image of 35 regions with captions that read it, one of 70, a source with its target, a bidirectional text, a causal text, a
/// single row.
fn plan() -> Arc<AttentionPlan> {
    let block = |rows, context, causal| QueryBlock { rows, context, causal };
    let groups = vec![
        (73, vec![block(0..35, 0..0, false), block(35..53, 0..35, true), block(53..73, 0..35, true)]),
        (90, vec![block(0..70, 0..0, false), block(70..90, 0..70, true)]),
        (12, vec![block(0..7, 0..0, false), block(7..12, 2..5, true)]),
        (33, vec![block(0..33, 0..0, false)]),
        (40, vec![block(0..40, 0..0, true)]),
        (1, vec![block(0..1, 0..0, false)]),
    ];
    let mut start = 0;
    let groups = groups.into_iter().map(|(len, blocks)| {
        start += len;
        AttentionGroup { start: start - len, len, blocks }
    });
    Arc::new(AttentionPlan { groups: groups.collect() })
}

fn attentions() -> Vec<Case<'static>> {
    let of = |name: &str, depth: usize, rate: f32, element: Element| {
        let (plan, heads, seed) = (plan(), 2, 31);
        let asked = Arc::clone(&plan);
        Case {
            name: format!("attention{name}, heads of {depth}"),
            inputs: vec![input(21, &[plan.rows(), 3 * heads * depth], 1.5)],
            run: Box::new(move |t| attention((&t[0], None), &asked, heads, (rate, seed), element)),
            formula: Box::new(move |v| formulas::attention(&v[0], &plan, heads, 1.0 - rate, seed)),
            tolerance: tolerance(element),
        }
    };
    let with_bias = |depth: usize, element: Element| {
        let (plan, heads, rate, seed) = (plan(), 2, 0.1, 33);
        let asked = Arc::clone(&plan);
        let stored = format!("stored in {element:?}");
        Case {
            name: format!("attention that adds the bias, heads of {depth}, {stored}"),
            inputs: vec![input(25, &[plan.rows(), 3 * heads * depth], 1.2), input(26, &[3 * heads * depth], 1.0)],
            run: Box::new(move |t| attention((&t[0], Some(&t[1])), &asked, heads, (rate, seed), element)),
            formula: Box::new(move |v| {
                let qkv = plus(&v[0], &v[1].repeat(plan.rows()));
                formulas::attention(&qkv, &plan, heads, 1.0 - rate, seed)
            }),
            tolerance: tolerance(element),
        }
    };
    vec![
        with_bias(20, Element::F32),
        with_bias(24, Element::Bf16),
        with_bias(32, Element::Bf16),
        with_bias(64, Element::Bf16),
        of("", 20, 0.0, Element::F32),
        of(" with dropout", 20, 0.2, Element::F32),
        of(" with dropout", 72, 0.1, Element::F32),
        of(" in bf16", 64, 0.0, Element::Bf16),
        of(" in bf16 with dropout", 64, 0.1, Element::Bf16),
        of(" in bf16 with dropout", 32, 0.2, Element::Bf16),
        // No tensor core's kernel is made for these.
        of(" in bf16 with dropout", 24, 0.2, Element::Bf16),
    ]
}

fn convolutions() -> Vec<Case<'static>> {
    let of = |stride: usize| {
        let plane = Plane { side: 6, stride, channels: 10 };
        Case {
            name: format!("depthwise convolution with ReLU6, stride {stride}"),
            inputs: vec![input(22, &[5, 36, 10], 2.0), input(23, &[9, 10], 1.0), input(24, &[10], 1.0)],
            run: Box::new(move |t| ops::depthwise_relu6(&t[0], &t[1], &t[2], stride)),
            formula: Box::new(move |v| formulas::depthwise_relu6(&v[0], &v[1], &v[2], plane)),
            tolerance: F32,
        }
    };
    let full = |stride: usize| {
        let plane = Plane { side: 6, stride, channels: 3 };
        Case {
            name: format!("3×3 convolution with ReLU6, stride {stride}"),
            inputs: vec![input(25, &[4, 36, 3], 2.0), input(26, &[10, 27], 1.0), input(27, &[10], 1.0)],
            run: Box::new(move |t| ops::convolution_relu6(&t[0], &t[1], &t[2], stride)),
            formula: Box::new(move |v| formulas::convolution_relu6(&v[0], &v[1], &v[2], plane)),
            tolerance: F32,
        }
    };
    // Far from where ReLU6 cuts off: sums between 0.5 and 4, which bf16 does not carry over its edges.
    let within = |shape: &[usize], seed: u32, [least, most]: [f32; 2]| {
        let (shape, drawn) = input(seed, shape, 1.0);
        (shape, drawn.into_iter().map(|v| least + (most - least) * (v + 1.0) / 2.0).collect())
    };
    let stored = |stride: usize| {
        let plane = Plane { side: 4, stride, channels: 16 };
        Case {
            name: format!("depthwise convolution with ReLU6 in bf16, stride {stride}"),
            inputs: vec![within(&[5, 16, 16], 60, [0.0, 1.0]), within(&[9, 16], 61, [0.0, 0.3]), within(&[16], 62, [0.5, 1.0])],
            run: Box::new(move |t| depthwise_relu6(&t[0], &t[1], &t[2], plane, Element::Bf16)),
            formula: Box::new(move |v| formulas::depthwise_relu6(&v[0], &v[1], &v[2], plane)),
            tolerance: BF16,
        }
    };
    let seen = |stride: usize| {
        let plane = Plane { side: 4, stride, channels: 3 };
        Case {
            name: format!("what a 3×3 convolution sees in bf16, stride {stride}"),
            inputs: vec![input(63, &[2, 16, 3], 1.0)],
            run: Box::new(move |t| patches(&t[0], plane, Element::Bf16)),
            formula: Box::new(move |v| formulas::patches(&v[0], plane)),
            tolerance: BF16,
        }
    };
    let cut = Case {
        name: "ReLU6 in bf16".to_owned(),
        inputs: vec![within(&[37], 64, [0.5, 5.5])],
        run: Box::new(|t| relu6(&t[0], Element::Bf16)),
        formula: Box::new(|v| formulas::relu6(&v[0])),
        tolerance: BF16,
    };
    vec![of(1), of(2), full(1), full(2), stored(1), stored(2), seen(1), seen(2), cut]
}
