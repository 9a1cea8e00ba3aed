//! Mean and deviation of the region features, by which they are standardised before anything else sees them.

/// One mean and one deviation for every region feature.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionStatistics {
    /// Means, `[region_feature]`.
    pub mean: Vec<f32>,
    /// Standard deviations, `[region_feature]`, none of them near zero.
    pub deviation: Vec<f32>,
}

/// Deviations below this share of their average are raised to it, lest a feature that is hardly ever there shouts when it is.
const LEAST_DEVIATION: f64 = 0.1;

impl RegionStatistics {
    /// Leaves features as they are.
    #[must_use]
    pub fn identity(width: usize) -> Self {
        Self { mean: vec![0.0; width], deviation: vec![1.0; width] }
    }

    /// Statistics over regions: each item is row-major `[n, width]`. Without regions, the identity.
    pub fn of(width: usize, pictures: impl Iterator<Item = Vec<f32>>) -> Self {
        let (mut count, mut sums, mut squares) = (0usize, vec![0f64; width], vec![0f64; width]);
        for picture in pictures {
            for region in picture.chunks_exact(width) {
                count += 1;
                for ((sum, square), &value) in sums.iter_mut().zip(&mut squares).zip(region) {
                    *sum += f64::from(value);
                    *square += f64::from(value) * f64::from(value);
                }
            }
        }
        if count == 0 {
            return Self::identity(width);
        }
        let n = count as f64;
        let deviation: Vec<f64> = sums.iter().zip(&squares).map(|(s, q)| (q / n - (s / n).powi(2)).max(0.0).sqrt()).collect();
        let least = (LEAST_DEVIATION * deviation.iter().sum::<f64>() / width as f64).max(1e-6);
        Self {
            mean: sums.iter().map(|s| (s / n) as f32).collect(),
            deviation: deviation.iter().map(|d| d.max(least) as f32).collect(),
        }
    }

    /// Makes some features `factor` times as large as the others after standardisation.
    pub fn emphasise(&mut self, features: std::ops::Range<usize>, factor: f32) {
        for deviation in &mut self.deviation[features] {
            *deviation /= factor;
        }
    }

    /// `(feature − mean) / deviation`, row-major `[n, region_feature]`.
    #[must_use]
    pub fn standardise(&self, features: &[f32]) -> Vec<f32> {
        let mut standard = Vec::with_capacity(features.len());
        features.chunks_exact(self.mean.len()).for_each(|row| self.push_standardised(row, &mut standard));
        standard
    }

    /// Appends the standardised features of one region.
    pub fn push_standardised(&self, region: &[f32], to: &mut Vec<f32>) {
        to.extend(region.iter().zip(self.mean.iter().zip(&self.deviation)).map(|(x, (m, d))| (x - m) / d));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standardised_features_have_mean_zero_and_deviation_one() {
        let pictures = [vec![1.0, 10.0, 7.0, 3.0, 30.0, 7.0], vec![5.0, 50.0, 7.0]];
        let statistics = RegionStatistics::of(3, pictures.iter().cloned());
        assert_eq!(statistics.mean, [3.0, 30.0, 7.0]);
        let standard: Vec<f32> = pictures.iter().flat_map(|p| statistics.standardise(p)).collect();
        for feature in 0..2 {
            let column: Vec<f32> = standard.iter().skip(feature).step_by(3).copied().collect();
            assert!(column.iter().sum::<f32>().abs() < 1e-6);
            assert!((column.iter().map(|v| v * v).sum::<f32>() / 3.0 - 1.0).abs() < 1e-6, "{column:?}");
        }
        // The third never changes: it becomes zero, not infinite.
        assert!(standard.iter().skip(2).step_by(3).all(|&v| v == 0.0));

        let mut loud = statistics.clone();
        loud.emphasise(1..2, 4.0);
        for (quiet, loud) in standard.chunks_exact(3).zip(loud.standardise(&pictures[0]).chunks_exact(3)) {
            assert_eq!(loud, [quiet[0], 4.0 * quiet[1], quiet[2]]);
        }
    }
}
