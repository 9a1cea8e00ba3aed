//! Scales of what weights are multiplied with, from the values that occur on real pictures and texts.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use prost::Message;
use tract_onnx::pb::{ModelProto, ValueInfoProto, tensor_shape_proto::dimension, type_proto};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{Dtype, GraphSignature, Precision, Sizes, Symbol, TensorSignature};
use unimo::engine::{self, EngineOptions};

use crate::graph::{OBSERVED, Products, Scales};
use crate::graphs::Graphs;
use crate::parity::Sample;
use crate::walk::{self, Loaded, walk};

/// Which magnitude becomes the largest level; larger ones are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Range {
    /// The largest that occurred. Of the shipped model no output errs more with it than with the others.
    #[default]
    MinMax,
    /// One that 99.99 % of all values stay below.
    Percentile,
    /// The one of least Kullback–Leibler divergence between the distributions before and after (Migacz, "8-bit Inference with
    /// TensorRT", GTC 2017).
    Entropy,
    /// The one of least squared error.
    Mse,
}

impl Range {
    const ALL: [(Self, &'static str); 4] =
        [(Self::MinMax, "minmax"), (Self::Percentile, "percentile"), (Self::Entropy, "entropy"), (Self::Mse, "mse")];
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(range, _)| range == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name).map(|(range, _)| *range);
        found.ok_or_else(|| format!("{name} is none of minmax, percentile, entropy, mse"))
    }
}

/// Share of values that [`Range::Percentile`] keeps.
const KEPT: f64 = 0.9999;
/// Largest level; −128 is left to values that round beyond −127.
const LEVELS: f64 = 127.0;
/// Bins of a histogram.
const BINS: usize = 2048;
/// Fewest bins that [`Range::Entropy`] keeps: the levels of one sign.
const LEAST_BINS: usize = 128;

/// How often magnitudes occurred, in bins of equal width from zero on; the width doubles when a larger one comes.
#[derive(Debug, Clone)]
struct Histogram {
    counts: Vec<f64>,
    width: f64,
    largest: f64,
    /// Zeros say nothing of the range, and would outweigh all else where a ReLU went before.
    zeros: f64,
}

impl Histogram {
    fn new() -> Self {
        Self { counts: vec![0.0; BINS], width: 0.0, largest: 0.0, zeros: 0.0 }
    }

    fn add(&mut self, values: &[f32]) {
        let largest = values.iter().fold(0f64, |largest, value| largest.max(f64::from(value.abs())));
        self.largest = self.largest.max(largest);
        if self.width == 0.0 {
            self.width = largest / BINS as f64;
        }
        while self.width > 0.0 && self.width * (BINS as f64) < largest {
            self.width *= 2.0;
            let merged = |bin: usize| self.counts[2 * bin] + self.counts[2 * bin + 1];
            let halves: Vec<f64> = (0..BINS / 2).map(merged).collect();
            self.counts = halves.into_iter().chain(vec![0.0; BINS / 2]).collect();
        }
        for value in values {
            match f64::from(value.abs()) {
                0.0 => self.zeros += 1.0,
                value => self.counts[((value / self.width) as usize).min(BINS - 1)] += 1.0,
            }
        }
    }

    /// The magnitude that becomes the largest level; 1 where all values were zero.
    fn limit(&self, range: Range) -> f64 {
        if self.largest == 0.0 {
            return 1.0;
        }
        let limit = match range {
            Range::MinMax => self.largest,
            Range::Percentile => self.percentile(),
            Range::Entropy => self.best_edge(|edge| self.divergence(edge)),
            Range::Mse => self.best_edge(|edge| self.squared_error(edge)),
        };
        limit.min(self.largest)
    }

    fn percentile(&self) -> f64 {
        let all = self.zeros + self.counts.iter().sum::<f64>();
        let mut below = self.zeros;
        for (bin, count) in self.counts.iter().enumerate() {
            below += count;
            if below >= KEPT * all {
                return (bin + 1) as f64 * self.width;
            }
        }
        self.largest
    }

    /// The upper edge of a bin at which a cost is least.
    fn best_edge(&self, cost: impl Fn(usize) -> f64) -> f64 {
        let last = self.counts.iter().rposition(|&count| count > 0.0).map_or(BINS, |bin| bin + 1);
        let edges = (LEAST_BINS.min(last)..=last).map(|edge| (edge, cost(edge)));
        let best = edges.reduce(|best, other| if other.1 < best.1 { other } else { best });
        best.map_or(self.largest, |(edge, _)| edge as f64 * self.width)
    }

    /// Sum of squared errors of bins' centres, if `edge` bins are kept.
    fn squared_error(&self, edge: usize) -> f64 {
        let scale = edge as f64 * self.width / LEVELS;
        let error = |(bin, count): (usize, &f64)| {
            let value = (bin as f64 + 0.5) * self.width;
            count * ((value / scale).round().min(LEVELS) * scale - value).powi(2)
        };
        self.counts.iter().enumerate().map(error).sum()
    }

    /// Divergence of the kept `edge` bins, all beyond them in the last one, from what is left of them in 128 levels.
    fn divergence(&self, edge: usize) -> f64 {
        let mut reference = self.counts[..edge].to_vec();
        reference[edge - 1] += self.counts[edge..].iter().sum::<f64>();
        let mut levelled = vec![0.0; edge];
        for level in 0..LEAST_BINS {
            let bins = level * edge / LEAST_BINS..((level + 1) * edge / LEAST_BINS).max(level * edge / LEAST_BINS);
            let filled = bins.clone().filter(|&bin| self.counts[bin] > 0.0).count();
            let mean = self.counts[bins.clone()].iter().sum::<f64>() / filled.max(1) as f64;
            bins.filter(|&bin| self.counts[bin] > 0.0).for_each(|bin| levelled[bin] = mean);
        }
        let (all, left) = (reference.iter().sum::<f64>(), levelled.iter().sum::<f64>());
        let term = |(p, q): (&f64, &f64)| match (*p, *q) {
            (0.0, _) => 0.0,
            // What the levels lost altogether counts as the least that a double tells from it.
            (p, q) => p / all * ((p / all) / (q / left).max(1e-12)).ln(),
        };
        reference.iter().zip(&levelled).map(term).sum()
    }
}

/// Scales of all graphs, by their names.
pub type Calibrated = BTreeMap<String, Scales>;

/// Runs the graphs on samples and chooses a scale for everything that an 8-bit weight is multiplied with.
///
/// # Errors
/// No samples, or graphs that cannot be run.
pub fn calibrate(bundle: &Bundle, graphs: &Graphs, precision: Precision, samples: &[Sample], range: Range) -> Result<Calibrated> {
    let mut histograms: BTreeMap<(String, String), Histogram> = BTreeMap::new();
    observe(bundle, graphs, precision, samples, &mut |observed| {
        let key = (observed.graph.to_owned(), observed.weight.to_owned());
        histograms.entry(key).or_insert_with(Histogram::new).add(observed.values);
        Ok(())
    })?;
    let mut calibrated = Calibrated::new();
    for ((graph, weight), histogram) in histograms {
        calibrated.entry(graph).or_default().insert(weight, (histogram.limit(range) / LEVELS) as f32);
    }
    Ok(calibrated)
}

/// What a weight was multiplied with in one run of a graph.
pub(crate) struct Observed<'o> {
    /// The graph.
    pub graph: &'o str,
    /// The weight.
    pub weight: &'o str,
    /// All values, rows one behind the other.
    pub values: &'o [f32],
    /// Values of a row.
    width: usize,
    /// Of the graph's inputs, an additive mask of texts, if it has one.
    mask: Option<&'o [f32]>,
}

impl Observed<'_> {
    /// The rows that are no padding: a text's come last, and its mask says how many there are.
    pub fn rows(&self) -> Vec<&[f32]> {
        let rows = self.values.chunks_exact(self.width.max(1));
        let others = rows.len().saturating_sub(self.mask.map_or(0, <[f32]>::len));
        let seen = |row: usize| self.mask.is_none_or(|mask| row < others || mask[row - others] == 0.0);
        rows.enumerate().filter(|(row, _)| seen(*row)).map(|(_, values)| values).collect()
    }
}

/// Runs the graphs on samples and tells of everything that an 8-bit weight is multiplied with.
///
/// # Errors
/// No samples, graphs that cannot be run, or what `visit` says.
pub(crate) fn observe(
    bundle: &Bundle,
    graphs: &Graphs,
    precision: Precision,
    samples: &[Sample],
    visit: &mut dyn FnMut(&Observed<'_>) -> Result<()>,
) -> Result<()> {
    if samples.is_empty() {
        bail!("there is no picture with a caption to calibrate on");
    }
    let engine = engine::open(&EngineOptions::default())?;
    let sizes = walk::sizes(bundle.manifest());
    let mut observing = Vec::new();
    for signature in &graphs.signatures {
        let model = graphs.build(signature, Products::Observed).with_context(|| format!("graph {}", signature.name))?;
        let mut fixed = signature.fixed(sizes);
        fixed.outputs.extend(observed(&model, sizes));
        observing.push((fixed, model.encode_to_vec()));
    }
    let loaded = Loaded::over(bundle, precision, &observing, engine.as_ref())?;
    let tokenizer = bundle.tokenizer()?;
    for sample in samples {
        walk(&loaded, bundle.manifest(), &tokenizer, sample, &mut |signature: &GraphSignature, inputs, outputs| {
            // The decoder's mask is one of slots, not of rows.
            let mask = inputs.iter().find(|(name, _)| *name == "mask" && signature.name != "decode");
            for (tensor, values) in signature.outputs.iter().zip(outputs) {
                let Some(weight) = tensor.name.strip_prefix(OBSERVED) else { continue };
                let (width, mask) = (tensor.shape.last().copied().unwrap_or(1), mask.map(|(_, mask)| mask.floats()));
                // What is read of single rows, such as pooled ones, has none of padding.
                let mask = mask.filter(|mask| values.floats().len() >= mask.len() * width);
                visit(&Observed { graph: &signature.name, weight, values: values.floats(), width, mask })?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What a graph lets out beside its own outputs.
fn observed(model: &ModelProto, sizes: Sizes) -> Vec<TensorSignature> {
    let outputs = model.graph.iter().flat_map(|graph| &graph.output);
    outputs.filter(|output| output.name.starts_with(OBSERVED)).filter_map(|output| signature(output, sizes)).collect()
}

fn signature(output: &ValueInfoProto, sizes: Sizes) -> Option<TensorSignature> {
    let type_proto::Value::TensorType(tensor) = output.r#type.as_ref()?.value.as_ref()?;
    let size = |dim: &tract_onnx::pb::tensor_shape_proto::Dimension| match dim.value.as_ref()? {
        dimension::Value::DimValue(size) => usize::try_from(*size).ok(),
        dimension::Value::DimParam(name) => Symbol::ALL.into_iter().find(|s| s.name() == name).map(|s| sizes.of(s)),
    };
    let shape = tensor.shape.as_ref()?.dim.iter().map(size).collect::<Option<_>>()?;
    Some(TensorSignature { name: output.name.clone(), shape, dtype: Dtype::F32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(batches: &[Vec<f32>]) -> Histogram {
        let mut histogram = Histogram::new();
        batches.iter().for_each(|batch| histogram.add(batch));
        histogram
    }

    #[test]
    fn histograms_grow_and_lose_nothing() {
        let histogram = of(&[vec![0.0, 0.25, -0.5], vec![3.0, -1.0], vec![0.125]]);
        assert_eq!((histogram.largest, histogram.zeros, histogram.counts.iter().sum::<f64>()), (3.0, 1.0, 5.0));
        // Doubled from 0.5 until 3 has room: 4.
        assert_eq!(histogram.width, 4.0 / BINS as f64);
        for value in [0.125, 0.25, 1.0, 3.0] {
            assert_eq!(histogram.counts[(value / histogram.width) as usize], 1.0, "{value}");
        }
        // The largest of the first batch belongs to its last bin, whose upper edge it is.
        assert_eq!(histogram.counts[(0.5 / histogram.width) as usize - 1], 1.0);
        assert_eq!(histogram.limit(Range::MinMax), 3.0);
        assert_eq!(of(&[vec![0.0; 3]]).limit(Range::Entropy), 1.0);
    }

    #[test]
    fn outliers_are_clipped_by_all_but_the_largest() {
        // A bell of width 1 (sums of uniform numbers), and one value at 40 of a hundred thousand.
        let uniform =
            |i: u64| (i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 33) as f32 / (1u64 << 31) as f32 - 0.5;
        let mut values: Vec<f32> = (0..100_000u64).map(|i| (0..12).map(|k| uniform(i * 12 + k)).sum()).collect();
        values[7] = 40.0;
        let histogram = of(&[values.clone()]);
        assert_eq!(histogram.limit(Range::MinMax), 40.0);
        let percentile = histogram.limit(Range::Percentile);
        let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let expected = f64::from(sorted[99_989]);
        assert!((percentile - expected).abs() <= 2.0 * histogram.width, "{percentile} {expected}");
        let squares = |limit: f64| -> f64 {
            let scale = limit / 127.0;
            let error = |v: &f32| ((f64::from(*v) / scale).round().clamp(-127.0, 127.0) * scale - f64::from(*v)).powi(2);
            values.iter().map(error).sum()
        };
        // No limit on a finer grid is much better than the one of least squares.
        let (mse, entropy) = (histogram.limit(Range::Mse), histogram.limit(Range::Entropy));
        let least = (1..400).map(|i| squares(f64::from(i) * 0.1)).fold(f64::INFINITY, f64::min);
        assert!(squares(mse) <= 1.02 * least, "{mse}: {} {least}", squares(mse));
        assert!((2.5..10.0).contains(&entropy), "{entropy}");
    }

    #[test]
    fn ranges_are_named() {
        for (range, name) in Range::ALL {
            assert_eq!((name.parse(), range.to_string().as_str()), (Ok(range), name));
        }
        assert_eq!("max".parse::<Range>(), Err("max is none of minmax, percentile, entropy, mse".to_owned()));
    }
}
