//! Loops written over a fixed number of floats, which compilers turn into vector instructions.

use multiversion::multiversion;

/// Floats that are worked on together: one register of AVX-512, four of NEON.
pub const LANES: usize = 16;

/// Sum of what the lanes hold.
#[inline(always)]
pub fn sum_of_lanes(mut sums: [f32; LANES]) -> f32 {
    // Halves onto each other: in this order it is done in registers.
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// e^x to about 2 ulp for x in [−87, 88], clamped outside (polynomial of Cephes' `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it leaves a number rounded to the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let z = rounded - ROUND;
    let r = x - z * 0.693_359_4 - z * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // Compilers make a branch for each lane of a conversion from float to integer; the bits are there already.
    let power = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    y * f32::from_bits(power.wrapping_add(127) << 23)
}

/// `ln Σ e^x` of finite values; of none, −∞.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub fn log_sum_exp(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for values in whole {
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(values[lane]);
        }
    }
    let largest = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for values in whole {
        for lane in 0..LANES {
            sums[lane] += exp(values[lane] - largest);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += exp(value - largest);
    }
    largest + sum_of_lanes(sums).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_formula() {
        for i in -870..=880 {
            let x = i as f32 / 10.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "{x}: {} {expected}", exp(x));
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(f32::INFINITY)), (exp(-87.0), exp(88.0)));
    }

    #[test]
    fn logarithms_of_sums_are_those_of_the_formula() {
        for count in [1, 7, 16, 37, 4096] {
            for shift in [-300.0, 0.0, 90.0] {
                let values: Vec<f32> = (0..count).map(|i| ((i as f32) * 0.731).sin() * 12.0 + shift).collect();
                let expected =
                    values.iter().map(|x| (f64::from(*x) - f64::from(shift)).exp()).sum::<f64>().ln() + f64::from(shift);
                let found = f64::from(log_sum_exp(&values));
                assert!((found - expected).abs() < 1e-5 * (1.0 + expected.abs() / 8.0), "{count} {shift}: {found} {expected}");
            }
        }
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
    }
}
