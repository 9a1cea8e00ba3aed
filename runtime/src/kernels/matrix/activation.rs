//! What is done to sums before they are stored.

use multiversion::multiversion;

use crate::lanes::exp;

/// What is done to each sum before it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x · ½ · (1 + erf(x/√2))`.
    Gelu,
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn gelu_all(values: &mut [f32]) {
    for value in values {
        *value = gelu(*value);
    }
}

/// GELU by the error function to an absolute error below 2e-7 (Abramowitz & Stegun 7.1.26).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let erf = (1.0 - p * exp(-a * a)).copysign(x);
    0.5 * x * (1.0 + erf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_is_that_of_the_error_function() {
        // scipy.special.erf: x, x/2·(1 + erf(x/√2)).
        for (x, expected) in [
            (-6.0, -5.919_527e-9),
            (-3.0, -0.004_049_694),
            (-1.0, -0.158_655_25),
            (0.0, 0.0),
            (0.5, 0.345_731_23),
            (2.0, 1.954_499_7),
        ] {
            assert!((gelu(x) - expected).abs() < 1e-6, "{x}: {} {expected}", gelu(x));
        }
    }
}
