use candle_core::Device;

use super::super::check::networks::{apart, by_result, composed, network, passed, pictures, weights};
use super::super::emulation::{computing_in, emulated, recording_only};
use super::*;

fn of_pictures(seed: u32, count: usize) -> Tensor {
    pictures(seed, count, &Device::Cpu).unwrap()
}

fn assert_near(found: &[Tensor], expected: &[Tensor], precision: Precision, what: &str) {
    assert!(expected.iter().all(|t| t.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0), "{what}: zeros");
    let [error, tolerance] = apart(found, expected, precision).unwrap();
    assert!(error <= tolerance, "{what}: {error}");
}

#[test]
fn passes_that_are_recorded_are_those_of_the_composed_network() {
    for precision in [Precision::F32, Precision::Bf16] {
        for ends_with_sum in [false, true] {
            let vars = weights(&Device::Cpu, precision).unwrap();
            let (network, runs) = (network(&vars, ends_with_sum).unwrap(), Runs::default());
            for pass in 0..4 {
                let x = of_pictures(pass, 3);
                let found = emulated(pass % 3, || computing_in(precision, || passed(&runs, &network, &x))).unwrap();
                let what = format!("{precision:?}, ending with a sum: {ends_with_sum}, pass {pass}");
                assert_eq!(runs.recorded(), usize::from(pass > 0), "{what}");
                let expected = composed(&vars, &network, &x).unwrap();
                assert_near(&found, &expected, precision, &what);
                // As an optimizer moves them: where they lie.
                for (var, gradient) in vars.iter().zip(&expected[1..]) {
                    var.set(&(var.as_tensor() - (gradient * 0.002).unwrap()).unwrap()).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_pass_whose_results_are_gone_is_done_again() {
    let vars = weights(&Device::Cpu, Precision::F32).unwrap();
    let (network, runs) = (network(&vars, false).unwrap(), Runs::default());
    for pass in 0..4 {
        let both = [2 * pass, 2 * pass + 1].map(|seed| of_pictures(seed, 2));
        let [of_first, of_second] = both.each_ref().map(|x| composed(&vars, &network, x).unwrap());
        let [first, second] = both;
        emulated(0, || {
            let (y, forward) = runs.forward(&network, &first).unwrap();
            let (other, of_other) = runs.forward(&network, &second).unwrap();
            assert_near(
                &[&y, &other].map(Tensor::clone),
                &[&of_first[0], &of_second[0]].map(Tensor::clone),
                Precision::F32,
                "results",
            );
            // Twice each: the first time, memory of results is written to.
            for (x, forward, y, expected) in [(&second, &of_other, &other, &of_second), (&first, &forward, &y, &of_first)] {
                for time in 0..2 {
                    let gradients = runs.backward(&network, x, forward, &by_result(y).unwrap()).unwrap();
                    assert_near(&gradients, &expected[1..], Precision::F32, &format!("pass {pass}, time {time}"));
                }
            }
        });
    }
    assert_eq!(runs.recorded(), 1);
}

/// Neither way, or only forward.
#[test]
fn a_machine_that_does_not_record_is_asked_anew_each_time() {
    for recordings in [0, 1] {
        let vars = weights(&Device::Cpu, Precision::F32).unwrap();
        let (network, runs) = (network(&vars, false).unwrap(), Runs::default());
        for pass in 0..4 {
            let x = of_pictures(pass, 2);
            let expected = composed(&vars, &network, &x).unwrap();
            let found = recording_only(recordings, || emulated(0, || passed(&runs, &network, &x))).unwrap();
            assert_near(&found, &expected, Precision::F32, &format!("{recordings} recordings, pass {pass}"));
        }
        assert_eq!(runs.recorded(), 0);
    }
}

#[test]
fn gradients_outlive_the_next_pass() {
    let vars = weights(&Device::Cpu, Precision::F32).unwrap();
    let (network, runs) = (network(&vars, false).unwrap(), Runs::default());
    let of: Vec<_> = (0..5).map(|pass| of_pictures(pass, 2)).collect();
    let found: Vec<_> = emulated(1, || of.iter().map(|x| passed(&runs, &network, x).unwrap()).collect());
    for (x, found) in of.iter().zip(&found) {
        assert_near(found, &composed(&vars, &network, x).unwrap(), Precision::F32, "");
    }
}

#[test]
fn what_was_recorded_of_other_pictures_or_weights_is_not_taken() {
    let [vars, others] = [(), ()].map(|()| weights(&Device::Cpu, Precision::F32).unwrap());
    let [of_vars, of_others] = [&vars, &others].map(|vars| network(vars, false).unwrap());
    let (runs, [two, three]) = (Runs::default(), [(0, 2), (1, 3)].map(|(seed, count)| of_pictures(seed, count)));
    for pass in 0..3 {
        for x in [&two, &three] {
            let found = emulated(0, || passed(&runs, &of_vars, x)).unwrap();
            assert_near(&found, &composed(&vars, &of_vars, x).unwrap(), Precision::F32, "");
        }
        assert_eq!(runs.recorded(), if pass > 0 { 2 } else { 0 });
    }
    // Weights of other values, elsewhere.
    for var in &others {
        var.set(&(var.as_tensor() * 0.9).unwrap()).unwrap();
    }
    let found = emulated(0, || passed(&runs, &of_others, &two)).unwrap();
    assert_near(&found, &composed(&others, &of_others, &two).unwrap(), Precision::F32, "other weights");
    assert_eq!(runs.recorded(), 1, "the one that was used longest ago is left out");
    emulated(0, || {
        let (y, forward) = runs.forward(&of_vars, &three).unwrap();
        let gradient = by_result(&y.narrow(0, 0, 2).unwrap()).unwrap();
        let error = runs.backward(&of_vars, &three, &forward, &gradient).unwrap_err();
        assert!(error.to_string().contains("a gradient of [2, 4, 10] by [3, 4, 10]"), "{error}");
    });
}
