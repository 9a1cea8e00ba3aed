//! The table: percentiles of what the workers measured.

use serde::Serialize;
use unimo::bundle::Bundle;
use unimo::bundle::manifest::Manifest;
use unimo::engine::Provider;

use super::bounds::upper_bound;
use super::conditions::Conditions;
use super::worker::Sample;
use super::{Combination, Round};

/// Percentiles of one part of the way, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// Upper bounds of percentiles with a confidence of 99 %, in milliseconds; nothing where there are too few captions to tell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bounds {
    pub p90: Option<f64>,
    pub p99: Option<f64>,
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub combination: Combination,
    pub captions: usize,
    pub ms: Percentiles,
    /// Of `ms`.
    pub at_most_ms: Bounds,
    pub decode_image_ms: Percentiles,
    pub vision_ms: Percentiles,
    pub text_ms: Percentiles,
    /// Mean time of the text part for each token of the captions written.
    pub token_ms: f64,
    /// Mean time of the text part for each run of the `decode` graph, beam search included.
    pub step_ms: f64,
    pub first_ms: f64,
    pub first_cpu_ms: Option<f64>,
    pub load_ms: f64,
    pub peak_memory: Option<u64>,
    /// Bytes of the graphs and weights in the bundle.
    pub model_bytes: usize,
    /// CIDEr-D from the manifest, where the exporter measured it.
    pub cider: Option<f64>,
    pub conditions: Conditions,
    /// Energy of the whole module for one caption, in mJ, where the board tells its power.
    pub energy_mj: Option<f64>,
    /// How near it comes to what the machine can do, where that was asked for.
    #[cfg(feature = "tract")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roofline: Option<super::roofline::Shares>,
}

/// The row of a combination; nothing where nothing was measured.
pub fn row(bundle: &Bundle, combination: Combination, runs: &[Round], conditions: Conditions) -> Option<Row> {
    let samples: Vec<Sample> = runs.iter().flat_map(|(_, _, measured)| measured.samples.iter().copied()).collect();
    let of = |part: fn(&Sample) -> f64| percentiles(samples.iter().map(part).collect());
    let median = |values| percentiles(values).map(|of| of.p50);
    let manifest = bundle.manifest();
    let (precision, form) = (combination.precision, combination.form);
    let graphs = manifest.graphs.iter().map(|graph| Manifest::form_file(precision, form, &graph.name));
    let weights = manifest.files.keys().filter(|file| file.starts_with(&format!("{precision}/")) && !file.ends_with(".onnx"));
    let mut totals: Vec<f64> = samples.iter().map(|sample| sample.total).collect();
    totals.sort_unstable_by(f64::total_cmp);
    let mean_seconds = totals.iter().sum::<f64>() / 1e3 / totals.len().max(1) as f64;
    let (tokens, steps) = samples.iter().fold((0, 0), |(tokens, steps), s| (tokens + s.tokens, steps + s.steps));
    let text_ms: f64 = samples.iter().map(|sample| sample.text).sum();
    Some(Row {
        combination,
        captions: samples.len(),
        ms: of(|s| s.total)?,
        at_most_ms: Bounds { p90: upper_bound(&totals, 0.9), p99: upper_bound(&totals, 0.99) },
        decode_image_ms: of(|s| s.decode_image)?,
        vision_ms: of(|s| s.vision)?,
        text_ms: of(|s| s.text)?,
        token_ms: text_ms / tokens.max(1) as f64,
        step_ms: text_ms / steps.max(1) as f64,
        first_ms: median(runs.iter().map(|run| run.0).collect())?,
        first_cpu_ms: median(runs.iter().filter_map(|run| run.1.cpu_ms).collect()),
        load_ms: median(runs.iter().map(|run| run.1.load_ms).collect())?,
        peak_memory: runs.iter().filter_map(|run| run.2.peak_memory).max(),
        model_bytes: graphs.chain(weights.cloned()).filter_map(|file| bundle.length(&file)).sum(),
        cider: manifest.figures(precision, form, combination.engine).and_then(|figures| figures.get("cider")).copied(),
        energy_mj: conditions.power_mw.map(|power| power * mean_seconds),
        conditions,
        #[cfg(feature = "tract")]
        roofline: None,
    })
}

/// Nearest-rank percentiles; nothing of no values.
fn percentiles(mut values: Vec<f64>) -> Option<Percentiles> {
    values.sort_unstable_by(f64::total_cmp);
    let rank = |percent: usize| values.get((percent * values.len()).div_ceil(100).max(1) - 1).copied();
    Some(Percentiles { p50: rank(50)?, p90: rank(90)?, p99: rank(99)? })
}

/// A Markdown table, aligned for terminals. A percentile of too few captions to be sure of it has a `~`.
pub fn table(rows: &[Row]) -> Vec<String> {
    let head = [
        "engine",
        "precision",
        "captions",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "image",
        "vision",
        "text",
        "ms/token",
        "first ms",
        "cpu ms",
        "peak MB",
        "model MB",
        "CIDEr",
    ];
    markdown(&head, rows.iter().map(cells).collect())
}

fn cells(row: &Row) -> Vec<String> {
    let Combination { engine, provider, .. } = row.combination;
    let engine = if provider == Provider::Cpu { engine.to_string() } else { format!("{engine} {provider}") };
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let mut line = vec![engine, row.combination.weights(), row.captions.to_string()];
    let Percentiles { p50, p90, p99 } = row.ms;
    let sure = |bound: Option<f64>| if bound.is_some() { "" } else { "~" };
    line.push(format!("{p50:.1}"));
    line.push(format!("{}{p90:.1}", sure(row.at_most_ms.p90)));
    line.push(format!("{}{p99:.1}", sure(row.at_most_ms.p99)));
    line.extend([row.decode_image_ms.p50, row.vision_ms.p50, row.text_ms.p50].map(|ms| format!("{ms:.1}")));
    line.push(format!("{:.2}", row.token_ms));
    line.push(format!("{:.0}", row.first_ms));
    line.push(or_dash(row.first_cpu_ms.map(|ms| format!("{ms:.0}"))));
    line.push(or_dash(row.peak_memory.map(|bytes| format!("{:.0}", bytes as f64 / 1e6))));
    line.push(format!("{:.1}", row.model_bytes as f64 / 1e6));
    line.push(or_dash(row.cider.map(|cider| format!("{cider:.3}"))));
    line
}

/// What else there is to say of rows: heat, energy, and what held the board back.
pub fn remarks(rows: &[Row]) -> Vec<String> {
    let mut remarks = Vec::new();
    for row in rows {
        let (engine, weights) = (row.combination.engine, row.combination.weights());
        let Conditions { start_c, end_c, ref held_back, power_mw, .. } = row.conditions;
        if let (Some(start), Some(end)) = (start_c, end_c) {
            remarks.push(format!("{engine} in {weights}: {start:.1} °C at the start, {end:.1} °C at the end"));
        }
        if let (Some(energy), Some(power)) = (row.energy_mj, power_mw) {
            remarks.push(format!("{engine} in {weights}: {energy:.0} mJ a caption, {:.1} W", power / 1e3));
        }
        if !held_back.is_empty() {
            remarks.push(format!("{engine} in {weights}: THE BOARD WAS HELD BACK: {}", held_back.join(", ")));
        }
    }
    remarks
}

/// A Markdown table of cells, aligned for terminals; every row has as many cells as there are heads.
pub fn markdown(head: &[&str], rows: Vec<Vec<String>>) -> Vec<String> {
    let mut cells: Vec<Vec<String>> = vec![head.iter().map(|&name| name.to_owned()).collect()];
    cells.extend(rows);
    aligned(&cells)
}

/// Cells as a Markdown table, the first line its head.
pub fn aligned(cells: &[Vec<String>]) -> Vec<String> {
    let length = |cell: &String| cell.chars().count();
    let widths: Vec<usize> =
        (0..cells[0].len()).map(|column| cells.iter().map(|line| length(&line[column])).max().unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}")).collect();
        format!("| {} |", padded.join(" | "))
    };
    let mut lines: Vec<String> = cells.iter().map(line).collect();
    let rule: Vec<String> = widths.iter().map(|&width| format!("{}:", "-".repeat(width - 1))).collect();
    lines.insert(1, format!("| {} |", rule.join(" | ")));
    lines
}

#[cfg(test)]
mod tests {
    use unimo::bundle::manifest::{Form, Precision};
    use unimo::engine::EngineKind;

    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let of = |values: &[f64]| percentiles(values.to_vec()).map(|p| [p.p50, p.p90, p.p99]);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7.0]), Some([7.0; 3]));
        assert_eq!(of(&[3.0, 1.0, 2.0, 4.0]), Some([2.0, 4.0, 4.0]));
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(of(&hundred), Some([50.0, 90.0, 99.0]));
    }

    #[test]
    fn the_table_is_aligned() {
        let p = Percentiles { p50: 12.34, p90: 100.0, p99: 101.0 };
        let row = Row {
            combination: Combination {
                engine: EngineKind::Ort,
                provider: Provider::Cuda,
                precision: Precision::I8,
                form: Form::Dynamic,
            },
            captions: 9,
            ms: p,
            at_most_ms: Bounds { p90: Some(101.0), p99: None },
            decode_image_ms: p,
            vision_ms: p,
            text_ms: p,
            token_ms: 1.239,
            step_ms: 1.0,
            first_ms: 250.4,
            first_cpu_ms: None,
            load_ms: 1.0,
            peak_memory: Some(99_600_000),
            model_bytes: 8_140_000,
            cider: Some(0.4821),
            conditions: Conditions { held_back: vec!["throttled"], ..Conditions::default() },
            energy_mj: None,
            #[cfg(feature = "tract")]
            roofline: None,
        };
        let rows = [row];
        assert_eq!(remarks(&rows), ["ort in i8 dynamic: THE BOARD WAS HELD BACK: throttled"]);
        let lines = table(&rows);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{lines:#?}");
        let cells: Vec<&str> = lines[2].trim_matches('|').split('|').map(str::trim).collect();
        let expected = [
            "ort cuda",
            "i8 dynamic",
            "9",
            "12.3",
            "100.0",
            "~101.0",
            "12.3",
            "12.3",
            "12.3",
            "1.24",
            "250",
            "-",
            "100",
            "8.1",
            "0.482",
        ];
        assert_eq!(cells, expected);
    }
}
