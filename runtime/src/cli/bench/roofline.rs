//! What share of what the machine can do a caption takes.

use std::time::Duration;

use serde::Serialize;
use unimo::bundle::BundleSource;
use unimo::engine::{EngineOptions, GraphCost};
use unimo::model::{GraphName, Model};
use unimo::roofline::Roof;

use super::super::output::milliseconds;
use super::report::{Row, aligned};

/// How long the machine is measured.
const DURATION: Duration = Duration::from_secs(2);

/// What one thread of this machine can do at most.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Peaks {
    /// 10⁹ floating-point operations a second.
    pub gflops: f64,
    /// 10⁹ bytes a second.
    pub gigabytes: f64,
}

/// How near a graph comes to the roof.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Share {
    pub operations: u64,
    pub bytes: u64,
    /// The least time that the peaks allow.
    pub limit_ms: f64,
    pub measured_ms: f64,
    /// The first as a share of the second.
    pub achieved: f64,
}

/// Both graphs of a caption.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shares {
    /// The `vision` graph: the picture read once.
    pub prefill: Share,
    /// A run of the `decode` graph, against the mean time of the text part for each, beam search included.
    pub decode: Share,
}

/// Measures the machine.
pub fn roof() -> (Roof, Peaks) {
    let roof = Roof::measure(DURATION);
    (roof, Peaks { gflops: roof.operations_per_second / 1e9, gigabytes: roof.bytes_per_second / 1e9 })
}

/// Adds to each row how near it comes to the roof.
pub fn add(rows: &mut [Row], source: &BundleSource, roof: &Roof) -> anyhow::Result<()> {
    for row in rows {
        let options = EngineOptions { precision: Some(row.combination.precision), ..EngineOptions::default() };
        let model = Model::open(source, &options)?;
        let share = |graph, measured_ms| -> anyhow::Result<Share> { Ok(share(model.cost(graph)?, measured_ms, roof)) };
        row.roofline = Some(Shares {
            prefill: share(GraphName::Vision, row.vision_ms.p50)?,
            decode: share(GraphName::Decode, row.step_ms)?,
        });
    }
    Ok(())
}

fn share(cost: GraphCost, measured_ms: f64, roof: &Roof) -> Share {
    let limit_ms = milliseconds(roof.limit(&cost));
    Share { operations: cost.operations, bytes: cost.bytes, limit_ms, measured_ms, achieved: limit_ms / measured_ms }
}

/// A table below the first one.
pub fn table(rows: &[Row], peaks: &Peaks) -> Vec<String> {
    let head = ["engine", "precision", "part", "MFLOP", "MB", "limit ms", "measured ms", "achieved"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for row in rows {
        let Some(Shares { prefill, decode }) = row.roofline else { continue };
        for (part, share) in [("prefill", prefill), ("decode", decode)] {
            cells.push(vec![
                row.combination.engine.to_string(),
                row.combination.weights(),
                part.to_owned(),
                format!("{:.0}", share.operations as f64 / 1e6),
                format!("{:.1}", share.bytes as f64 / 1e6),
                format!("{:.2}", share.limit_ms),
                format!("{:.2}", share.measured_ms),
                format!("{:.0} %", 100.0 * share.achieved),
            ]);
        }
    }
    let mut lines = vec![
        String::new(),
        format!("one thread at most: {:.0} GFLOP/s in 32-bit floats, {:.1} GB/s from memory", peaks.gflops, peaks.gigabytes),
        String::new(),
    ];
    lines.extend(aligned(&cells));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_limit() {
        let roof = Roof { operations_per_second: 1e11, bytes_per_second: 1e10 };
        let share = share(GraphCost { operations: 1_000_000_000, bytes: 10_000_000 }, 12.5, &roof);
        assert!((share.limit_ms - 10.0).abs() < 1e-6 && (share.achieved - 0.8).abs() < 1e-6, "{share:?}");
    }
}
