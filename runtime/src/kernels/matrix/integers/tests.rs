use super::super::{Activation, Matrix, Nibbles, Weights};
use super::*;

fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + seed) * 0.731).sin()).collect()
}

/// ONNX's `DynamicQuantizeLinear` of one row, in 64 bits: levels, scale, zero.
fn dynamic_quantize_linear(x: &[f32]) -> (Vec<i64>, f64, i64) {
    let low = x.iter().fold(0f32, |low, &x| low.min(x));
    let high = x.iter().fold(0f32, |high, &x| high.max(x));
    let scale = (f64::from(high) - f64::from(low)) / 255.0;
    let zero = (-f64::from(low) / scale).round_ties_even().clamp(0.0, 255.0);
    let level = |&x: &f32| ((f64::from(x) / scale).round_ties_even() + zero).clamp(0.0, 255.0) as i64;
    (x.iter().map(level).collect(), scale, zero as i64)
}

#[test]
fn rows_are_rounded_as_dynamic_quantize_linear_does() {
    let wide: Vec<f32> = (0..77).map(|i| (i as f32 - 20.0) * 1.5 + 0.07).collect();
    let positive: Vec<f32> = numbers(33, 2.0).iter().map(|x| x * x + 3.0).collect();
    let negative: Vec<f32> = positive.iter().map(|x| -1e-4 * x).collect();
    for x in [numbers(1, 1.0), numbers(16, 5.0), wide, positive, negative] {
        let (expected, scale, zero) = dynamic_quantize_linear(&x);
        for least in [0, -128] {
            let mut levels = vec![7; x.len()];
            let row = quantize(&x, least, &mut levels);
            let found: Vec<i64> = levels
                .iter()
                .map(|&level| if least == 0 { i64::from(level) } else { i64::from(level.cast_signed()) + 128 })
                .collect();
            assert_eq!((&found, i64::from(row.zero - least)), (&expected, zero), "{x:?}");
            assert!((f64::from(row.scale) - scale).abs() < 1e-6 * scale);
        }
    }
}

#[test]
fn rows_of_one_value_or_none_keep_it() {
    for (x, expected) in [([0.0; 3], 0.0), ([2.5; 3], 2.5), ([-0.3; 3], -0.3)] {
        let mut levels = [9; 3];
        let row = quantize(&x, 0, &mut levels);
        let value = (i32::from(levels[0]) - row.zero) as f32 * row.scale;
        assert!((value - expected).abs() < 1e-6, "{value} {expected}");
    }
}

#[test]
fn weights_are_rounded_by_their_rows_largest_values() {
    let (levels, scales) = round_rows(&[1.27, -0.02, 0.0, 0.0, 0.51, -2.54], 2);
    assert_eq!(levels, [127, -2, 0, 0, 26, -127]);
    assert!((scales[0] - 0.01).abs() < 1e-8 && (scales[2] - 0.02).abs() < 1e-8, "{scales:?}");
    let values = numbers(3 * 37, 4.0);
    let (levels, scales) = round_rows(&values, 37);
    for (i, (level, value)) in levels.iter().zip(&values).enumerate() {
        let scale = scales[i / 37];
        assert!((f32::from(*level) * scale - value).abs() <= 0.501 * scale, "{i}: {level} of {scale} for {value}");
    }
}

/// Every set of instructions of this processor.
fn all() -> Vec<Instructions> {
    let mut all = vec![Instructions::Plain, Instructions::detect()];
    all.dedup();
    all
}

#[test]
fn every_set_of_instructions_gives_the_sums_of_the_formula() {
    for instructions in all() {
        for rows in [1, 2, 3, 5, 12, 13, 29] {
            for [inputs, outputs] in [[1, 1], [7, 16], [33, 40], [64, 31], [16, 96]] {
                let (x, bias) = (numbers(rows * inputs, 0.0), numbers(outputs, 3.0));
                let mut levels: Vec<i8> = numbers(inputs * outputs, 9.0).iter().map(|v| (v * 127.0) as i8).collect();
                levels[0] = -128;
                let turned: Vec<i8> =
                    (0..outputs).flat_map(|n| (0..inputs).map(move |k| (k, n))).map(|(k, n)| levels[k * outputs + n]).collect();
                let scales: Vec<f32> = (0..outputs).map(|n| 0.01 * (n + 1) as f32 / outputs as f32).collect();
                let mut expected = Vec::new();
                for x in x.chunks_exact(inputs) {
                    let (row, scale, zero) = dynamic_quantize_linear(x);
                    for n in 0..outputs {
                        let sum: i64 = (0..inputs).map(|k| (row[k] - zero) * i64::from(levels[k * outputs + n])).sum();
                        expected.push(sum as f64 * scale * f64::from(scales[n]) + f64::from(bias[n]));
                    }
                }
                for (levels, transposed) in [(&levels, false), (&turned, true)] {
                    let shape = [inputs, outputs];
                    let mut matrix = Matrix::new(Weights::Integers(levels, &scales), shape, transposed, Some(&bias)).unwrap();
                    let panels = Panels::with(instructions, levels, shape, transposed).unwrap();
                    matrix.width = panels.width();
                    let whole = outputs.next_multiple_of(matrix.width);
                    matrix.bias.resize(whole, 0.0);
                    matrix.scales.as_mut().unwrap().resize(whole, 0.0);
                    matrix.panels = super::super::Panels::Integers(panels);
                    let mut y = vec![9.0; rows * outputs];
                    let (from, to) = (Layout::dense(inputs), Layout::dense(outputs));
                    matrix.multiply(rows, (&x, from), None, Activation::None, (&mut y, to));
                    for (found, expected) in y.iter().zip(&expected) {
                        let near = (f64::from(*found) - expected).abs() < 2e-6 * expected.abs().max(1.0);
                        assert!(near, "{instructions:?} {rows} {shape:?}: {found} {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_the_largest_levels_fit() {
    let (inputs, outputs) = (MOST_INPUTS, 3);
    let levels = [vec![-128i8; inputs], vec![127; inputs], vec![1; inputs]].concat();
    // All but the first value are the largest: levels of 255, zero at 0.
    let mut x = vec![255.0; inputs];
    x[0] = 0.0;
    for instructions in all() {
        let panels = Panels::with(instructions, &levels, [inputs, outputs], true).unwrap();
        let mut matrix = Matrix::new(Weights::Integers(&levels, &[1.0; 3]), [inputs, outputs], true, None).unwrap();
        matrix.width = panels.width();
        matrix.bias.resize(matrix.width, 0.0);
        matrix.scales = Some(vec![1.0; matrix.width]);
        matrix.panels = super::super::Panels::Integers(panels);
        let mut y = [0.0; 3];
        matrix.multiply(1, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
        let sum = 255.0 * (inputs - 1) as f32;
        assert_eq!(y, [-128.0 * sum, 127.0 * sum, sum], "{instructions:?}");
    }
}

/// 4-bit levels `[outputs, inputs]` of every kind, and scales of both signs.
fn blocks([inputs, outputs]: [usize; 2]) -> (Vec<u8>, Vec<f32>) {
    let levels = (0..inputs * outputs / 2).map(|i| (i * 37 + i / 7) as u8).collect();
    (levels, numbers(inputs * outputs / super::super::BLOCK, 4.0))
}

#[test]
fn four_bit_blocks_give_the_sums_of_the_formula() {
    for instructions in all() {
        for rows in [1, 2, 3, 5, 6, 7, 13] {
            for [inputs, outputs] in [[32, 1], [64, 16], [96, 40], [32, 31], [256, 96]] {
                let (x, bias) = (numbers(rows * inputs, 0.0), numbers(outputs, 3.0));
                let (levels, scales) = blocks([inputs, outputs]);
                let level = |n: usize, k: usize| {
                    let byte = levels[(n * inputs + k) / 2];
                    i64::from(if k.is_multiple_of(2) { byte & 15 } else { byte >> 4 }) - 8
                };
                let shape = [inputs, outputs];
                let mut matrix = Matrix::new(Weights::FourBitIntegers(&levels, &scales), shape, false, Some(&bias)).unwrap();
                let panels = Blocks::with(instructions, Nibbles::new(&levels, &scales, shape).unwrap());
                matrix.width = panels.width();
                matrix.bias.resize(outputs.next_multiple_of(matrix.width), 0.0);
                matrix.panels = super::super::Panels::Blocks(panels);
                let mut y = vec![9.0; rows * outputs];
                matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
                for (x, y) in x.chunks_exact(inputs).zip(y.chunks_exact(outputs)) {
                    let (row, scale, zero) = dynamic_quantize_linear(x);
                    for (n, found) in y.iter().enumerate() {
                        let block = |b: usize| -> f64 {
                            let sum: i64 = (b * 32..b * 32 + 32).map(|k| (row[k] - zero) * level(n, k)).sum();
                            sum as f64 * f64::from(scales[n * inputs / 32 + b])
                        };
                        let expected = (0..inputs / 32).map(block).sum::<f64>() * scale + f64::from(bias[n]);
                        // Sums of floats of up to 2 000 a block, of which the zero's share is taken away again.
                        let near = (f64::from(*found) - expected).abs() < 2e-4;
                        assert!(near, "{instructions:?} {rows} {shape:?} {n}: {found} {expected}");
                    }
                }
            }
        }
    }
}
