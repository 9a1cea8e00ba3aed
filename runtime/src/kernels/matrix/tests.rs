use super::*;

fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + seed) * 0.731).sin()).collect()
}

/// The product in 64 bits.
fn expected(x: &[f32], w: &dyn Fn(usize, usize) -> f32, bias: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f64> {
    let row = |x: &[f32]| -> Vec<f64> {
        let sum = |n: usize| (0..inputs).map(|k| f64::from(x[k]) * f64::from(w(k, n))).sum::<f64>();
        (0..outputs).map(|n| f64::from(bias[n]) + sum(n)).collect()
    };
    x.chunks_exact(inputs).flat_map(row).collect()
}

fn near(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        // Sums of at most 70 products of size 1 in f32.
        assert!((f64::from(*f) - e).abs() < 2e-5, "{i}: {f} {e}");
    }
}

#[test]
fn products_of_every_shape_and_form() {
    for rows in [1, 2, 3, 5, 12, 13, 29] {
        for [inputs, outputs] in [[1, 1], [7, 16], [33, 40], [64, 31], [16, 48]] {
            let (x, w, bias) = (numbers(rows * inputs, 0.0), numbers(inputs * outputs, 9.0), numbers(outputs, 3.0));
            let turned: Vec<f32> =
                (0..outputs).flat_map(|n| (0..inputs).map(move |k| (k, n))).map(|(k, n)| w[k * outputs + n]).collect();
            for (weights, transposed) in [(&w, false), (&turned, true)] {
                let matrix = Matrix::new(Weights::F32(weights), [inputs, outputs], transposed, Some(&bias)).unwrap();
                let mut y = vec![9.0; rows * outputs];
                matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
                near(&y, &expected(&x, &|k, n| w[k * outputs + n], &bias, [inputs, outputs]));
            }
            let levels: Vec<i8> = w.iter().map(|v| (v * 127.0) as i8).collect();
            let scales: Vec<f32> = (0..outputs).map(|n| 0.001 * (n + 1) as f32 / outputs as f32).collect();
            let matrix = Matrix::new(Weights::I8(&levels, &scales), [inputs, outputs], false, Some(&bias)).unwrap();
            let mut y = vec![9.0; rows * outputs];
            matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
            near(&y, &expected(&x, &|k, n| f32::from(levels[k * outputs + n]) * scales[n], &bias, [inputs, outputs]));
        }
    }
}

#[test]
fn four_bit_blocks_are_multiplied_as_floats() {
    for rows in [1, 3, 13] {
        for [inputs, outputs] in [[32, 1], [64, 31], [32, 33], [64, 80]] {
            let (x, bias) = (numbers(rows * inputs, 0.0), numbers(outputs, 3.0));
            let levels: Vec<u8> = (0..inputs * outputs / 2).map(|i| (i * 37 + i / 7) as u8).collect();
            let scales: Vec<f32> = numbers(inputs * outputs / BLOCK, 4.0).iter().map(|v| v / 8.0).collect();
            let matrix = Matrix::new(Weights::I4(&levels, &scales), [inputs, outputs], false, Some(&bias)).unwrap();
            let mut y = vec![9.0; rows * outputs];
            matrix.multiply(rows, (&x, Layout::dense(inputs)), None, Activation::None, (&mut y, Layout::dense(outputs)));
            let value = |k: usize, n: usize| {
                let (byte, at) = (levels[(n * inputs + k) / 2], n * inputs + k);
                (f32::from(if k.is_multiple_of(2) { byte & 15 } else { byte >> 4 }) - 8.0) * scales[at / 32]
            };
            near(&y, &expected(&x, &value, &bias, [inputs, outputs]));
        }
    }
}

#[test]
fn threads_share_the_outputs() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let (rows, inputs, outputs) = (5, 320, 333);
    let (x, w, bias) = (numbers(rows * inputs, 0.0), numbers(inputs * outputs, 9.0), numbers(outputs, 3.0));
    let matrix = Matrix::new(Weights::F32(&w), [inputs, outputs], false, Some(&bias)).unwrap();
    let levels: Vec<i8> = w.iter().map(|v| (v * 127.0) as i8).collect();
    let integers = Matrix::new(Weights::Integers(&levels, &bias), [inputs, outputs], false, Some(&bias)).unwrap();
    let nibbles: Vec<u8> = (0..inputs * outputs / 2).map(|i| (i * 37) as u8).collect();
    let blocks = numbers(inputs * outputs / BLOCK, 1.0);
    let four = |weights| Matrix::new(weights, [inputs, outputs], false, Some(&bias)).unwrap();
    let (floats, levels) = (four(Weights::I4(&nibbles, &blocks)), four(Weights::FourBitIntegers(&nibbles, &blocks)));
    for matrix in [matrix, integers, floats, levels] {
        let (from, to) = (Layout::dense(inputs), Layout { start: 2, width: 2, line: 900, step: 400 });
        let mut alone = vec![7.0; 2 + 3 * 900];
        let mut shared = alone.clone();
        matrix.multiply_shared(rows, (&x, from), Activation::Gelu, (&mut alone, to));
        pool.install(|| matrix.multiply_shared(rows, (&x, from), Activation::Gelu, (&mut shared, to)));
        assert_eq!(alone, shared);
        assert_ne!(alone[2 + 1800 + 332], 7.0);
    }
}

#[test]
fn rows_lie_where_layouts_say_and_are_added_to() {
    let (inputs, outputs) = (3, 5);
    let (x, w, add) = (numbers(24, 0.0), numbers(15, 9.0), numbers(40, 5.0));
    let matrix = Matrix::new(Weights::F32(&w), [inputs, outputs], false, None).unwrap();
    // Four rows in two lines of two.
    let from = Layout { start: 1, width: 2, line: 11, step: 4 };
    let onto = Layout { start: 2, width: 2, line: 18, step: 7 };
    let mut y = vec![7.0; 40];
    matrix.multiply(4, (&x, from), Some((&add, onto)), Activation::Relu6, (&mut y, onto));
    for row in 0..4 {
        let (a, b) = (1 + row / 2 * 11 + row % 2 * 4, 2 + row / 2 * 18 + row % 2 * 7);
        for n in 0..outputs {
            let sum: f32 = (0..inputs).map(|k| x[a + k] * w[k * outputs + n]).sum();
            assert!((y[b + n] - (sum + add[b + n]).clamp(0.0, 6.0)).abs() < 1e-6);
        }
    }
    assert_eq!((y[0], y[1], y[7], y[8], y[14]), (7.0, 7.0, 7.0, 7.0, 7.0));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    assert!(Matrix::new(Weights::F32(&[0.0; 5]), [2, 3], false, None).is_none());
    assert!(Matrix::new(Weights::F32(&[0.0; 6]), [2, 3], false, Some(&[0.0; 2])).is_none());
    assert!(Matrix::new(Weights::I8(&[0; 6], &[0.0; 2]), [2, 3], false, None).is_none());
    assert!(Matrix::new(Weights::F32(&[]), [0, 3], false, None).is_none());
    assert!(Matrix::new(Weights::F32(&[]), [usize::MAX, 3], false, None).is_none());
    assert!(Matrix::new(Weights::I4(&[0; 48], &[0.0; 3]), [32, 3], false, None).is_some());
    for (bytes, scales, inputs) in [(47, 3, 32), (48, 2, 32), (48, 3, 16), (24, 3, 16), (0, 0, 0)] {
        let (levels, scales) = (vec![0; bytes], vec![0.0; scales]);
        for weights in [Weights::I4(&levels, &scales), Weights::FourBitIntegers(&levels, &scales)] {
            assert!(Matrix::new(weights, [inputs, 3], false, None).is_none(), "{bytes} {inputs}");
        }
    }
    let (levels, scales) = ([1; 65_537], [1.0]);
    assert!(Matrix::new(Weights::Integers(&levels[1..], &scales), [65_536, 1], false, None).is_some());
    assert!(Matrix::new(Weights::Integers(&levels, &scales), [65_537, 1], false, None).is_none());
}
