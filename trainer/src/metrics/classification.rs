//! Metrics of classification and regression, as GLUE reports them.

/// Share of the predictions that are right; 0 of none.
#[must_use]
pub fn accuracy(predicted: &[u32], truth: &[u32]) -> f64 {
    share(predicted.iter().zip(truth).filter(|(p, t)| p == t).count() as f64, predicted.len() as f64)
}

/// F1 of class `positive`; 0 where nothing is right.
#[must_use]
pub fn f1(predicted: &[u32], truth: &[u32], positive: u32) -> f64 {
    let [right, wrong, missed] = [(true, true), (true, false), (false, true)]
        .map(|cell| predicted.iter().zip(truth).filter(|(p, t)| (**p == positive, **t == positive) == cell).count() as f64);
    share(2.0 * right, 2.0 * right + wrong + missed)
}

/// Matthews' correlation of two classes, or of several (Gorodkin 2004); 0 where one side says always the same.
#[must_use]
pub fn matthews(predicted: &[u32], truth: &[u32]) -> f64 {
    let classes = predicted.iter().chain(truth).max().map_or(0, |&m| m + 1);
    let n = predicted.len() as f64;
    let right = predicted.iter().zip(truth).filter(|(p, t)| p == t).count() as f64;
    let count = |values: &[u32], class| values.iter().filter(|&&v| v == class).count() as f64;
    let counts: Vec<(f64, f64)> = (0..classes).map(|class| (count(predicted, class), count(truth, class))).collect();
    let product = |f: fn(&(f64, f64)) -> f64| counts.iter().map(f).sum::<f64>();
    let covariance = right * n - product(|(p, t)| p * t);
    let spread = (n * n - product(|(p, _)| p * p)) * (n * n - product(|(_, t)| t * t));
    if spread > 0.0 { covariance / spread.sqrt() } else { 0.0 }
}

/// Pearson's correlation; 0 where one side does not vary.
#[must_use]
pub fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| f(a - mean_a, b - mean_b)).sum::<f64>();
    let spread = sum(&|a, _| a * a) * sum(&|_, b| b * b);
    if spread > 0.0 { sum(&|a, b| a * b) / spread.sqrt() } else { 0.0 }
}

/// Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank.
#[must_use]
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    pearson(&ranks(a), &ranks(b))
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let of = |v: &f64| {
        let below = values.iter().filter(|other| *other < v).count();
        let equal = values.iter().filter(|other| *other == v).count();
        below as f64 + (equal as f64 + 1.0) / 2.0
    };
    values.iter().map(of).collect()
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        classes: Vec<Classes>,
        values: Vec<Values>,
    }

    #[derive(Deserialize)]
    struct Classes {
        predicted: Vec<u32>,
        truth: Vec<u32>,
        accuracy: f64,
        f1: f64,
        matthews: f64,
    }

    #[derive(Deserialize)]
    struct Values {
        a: Vec<f64>,
        b: Vec<f64>,
        pearson: f64,
        spearman: f64,
    }

    #[test]
    fn metrics_agree_with_scikit_learn_and_scipy() {
        let golden: Golden = serde_json::from_str(include_str!("reference/classification_golden.json")).unwrap();
        assert!(golden.classes.len() >= 4 && golden.values.len() >= 3);
        let near = |got: f64, expected: f64, what: &str| assert!((got - expected).abs() < 1e-9, "{what}: {got}, not {expected}");
        for c in &golden.classes {
            near(accuracy(&c.predicted, &c.truth), c.accuracy, "accuracy");
            near(f1(&c.predicted, &c.truth, 1), c.f1, "F1");
            near(matthews(&c.predicted, &c.truth), c.matthews, "Matthews");
        }
        // The class that counts is the one that is named.
        let exchanged = |classes: &[u32]| classes.iter().map(|&c| 1 - c.min(1)).collect::<Vec<_>>();
        let binary = golden.classes.iter().filter(|c| c.predicted.iter().chain(&c.truth).all(|&class| class < 2));
        for c in binary.clone() {
            near(f1(&exchanged(&c.predicted), &exchanged(&c.truth), 0), c.f1, "F1 of the other class");
        }
        assert!(binary.count() >= 2);
        for v in &golden.values {
            near(pearson(&v.a, &v.b), v.pearson, "Pearson");
            near(spearman(&v.a, &v.b), v.spearman, "Spearman");
        }
        // Where the references warn and give NaN or 0, these give 0.
        assert_eq!((pearson(&[1.0, 1.0], &[0.0, 2.0]), matthews(&[1, 1], &[0, 1]), f1(&[0, 0], &[0, 0], 1)), (0.0, 0.0, 0.0));
        assert_eq!(accuracy(&[], &[]), 0.0);
    }
}
