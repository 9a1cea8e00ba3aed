//! What a percentile of few samples is worth.

/// Confidence of an upper bound.
const CONFIDENCE: f64 = 0.99;

/// A value that `percentile` (0 to 1) of the distribution which the samples come from is at most, with a confidence of 99 %; nothing
/// where there are too few samples to say so.
///
/// It is the early-stopping estimate of MLPerf Inference's single stream: fewer than k of n samples lie above the true percentile
/// with a probability of P(Binomial(n, 1 − percentile) < k); the largest k of which this is below 1 % makes the k-th largest sample
/// the bound. At least one larger sample is asked for, so that a single outlier is never the answer: hence 64 samples for 90 %, 130
/// for 95 % and 662 for 99 %.
pub fn upper_bound(sorted: &[f64], percentile: f64) -> Option<f64> {
    let n = sorted.len();
    let (above, below) = (1.0 - percentile, percentile);
    // P(Binomial(n, above) = 0), and from there each from the one before it.
    let mut probability = below.powi(i32::try_from(n).ok()?);
    let mut fewer_than = probability;
    let mut k = 0;
    while fewer_than <= 1.0 - CONFIDENCE && k < n {
        k += 1;
        probability *= (n - k + 1) as f64 / k as f64 * above / below;
        fewer_than += probability;
    }
    if k < 2 {
        return None;
    }
    sorted.get(n - k).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn least_samples(percentile: f64) -> usize {
        let samples: Vec<f64> = (0..1000).map(f64::from).collect();
        (1..1000).find(|&n| upper_bound(&samples[..n], percentile).is_some()).unwrap()
    }

    #[test]
    fn as_many_samples_are_asked_for_as_by_mlperf() {
        assert_eq!([0.9, 0.95, 0.99].map(least_samples), [64, 130, 662]);
        assert_eq!(upper_bound(&[], 0.9), None);
    }

    #[test]
    fn the_bound_lies_above_the_percentile_in_99_of_100_draws() {
        use rand::{Rng, SeedableRng};
        let mut random = rand::rngs::StdRng::seed_from_u64(5);
        let draws = 4000;
        let mut held = 0;
        for _ in 0..draws {
            let mut samples: Vec<f64> = (0..200).map(|_| random.random()).collect();
            samples.sort_unstable_by(f64::total_cmp);
            // Of uniform samples the percentile is 0.9 itself.
            held += usize::from(upper_bound(&samples, 0.9).unwrap() >= 0.9);
        }
        // At least 99 %, less three standard deviations of the estimate; and not much more, or the bound says little.
        let share = held as f64 / f64::from(draws);
        assert!((0.9853..0.9985).contains(&share), "{share}");
    }
}
