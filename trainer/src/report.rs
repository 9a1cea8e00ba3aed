//! A run's log as one HTML file: curves drawn as SVG, the last scores, captions as they changed, the recipe.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use plotters::prelude::*;
use serde_json::Value;

use crate::work_files;

/// Width and height of a chart in pixels.
const SIZE: (u32, u32) = (760, 260);
/// Points of a curve at most: longer ones are averaged.
const POINTS: usize = 300;

/// One curve: a name, and `(step, value)` in the order of the steps.
type Curve = (String, Vec<(f64, f64)>);

/// Writes the report of the run in `folder`.
///
/// # Errors
/// A folder without a log or with an empty one, a failed write.
pub fn write(folder: &Path, out: &Path) -> Result<()> {
    let path = folder.join("log.jsonl");
    let log = std::fs::read_to_string(&path)
        .with_context(|| format!("{} is no run: cannot read {}", folder.display(), path.display()))?;
    let recipe = std::fs::read_to_string(folder.join("recipe.toml")).unwrap_or_default();
    let name = folder.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy());
    work_files::write_whole(out, html(&name, &log, &recipe).with_context(|| format!("in {}", path.display()))?.as_bytes())
}

/// The report of a log, one JSON object a line, and a recipe.
///
/// # Errors
/// A log without a single step.
pub fn html(name: &str, log: &str, recipe: &str) -> Result<String> {
    // A line that was cut by an interruption is left out.
    let entries: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let (judged, steps): (Vec<&Value>, Vec<&Value>) = entries.iter().partition(|entry| entry["development"] == true);
    let Some(last) = steps.last() else { bail!("the log holds no step") };
    let mut page = String::new();
    let sum = |key: &str| steps.iter().filter_map(|entry| entry[key].as_f64()).sum::<f64>();
    let seconds = sum("seconds");
    // Logs of before say nothing of waiting.
    let waited = match last["waited"].is_number() {
        true => format!(", {:.1} % of them waiting for data", 100.0 * sum("waited") / seconds.max(1e-9)),
        false => String::new(),
    };
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title><style>body{{font:15px/1.5 system-ui,sans-serif;\
         max-width:780px;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}td,th{{border-bottom:1px solid #ccc;\
         padding:.2em .7em;text-align:left}}pre{{background:#f4f4f4;padding:1em;overflow:auto}}svg{{max-width:100%;height:auto}}</style>\
         <h1>{0}</h1><p>{1} steps, {2:.0} minutes of computing{waited}.</p>",
        escape(name),
        last["step"],
        seconds / 60.0
    );
    if let Some(scores) = judged.last() {
        page += &table(scores);
    }
    let mut chart = |title: &str, curves: Vec<Curve>| -> Result<()> {
        let curves: Vec<Curve> = curves.into_iter().filter(|(_, points)| points.len() > 1).collect();
        if !curves.is_empty() {
            let _ = write!(page, "<h2>{}</h2>{}", escape(title), draw(&curves)?);
        }
        Ok(())
    };
    let of_steps = |name: &str, read: &dyn Fn(&Value) -> Option<f64>| -> Curve { (name.to_owned(), points(&steps, read)) };
    let of_judged = |name: &str, read: &dyn Fn(&Value) -> Option<f64>| -> Curve { (name.to_owned(), points(&judged, read)) };
    chart("Loss", vec![of_steps("weighted sum", &|e| e["loss"].as_f64())])?;
    let objectives: BTreeMap<&String, ()> =
        steps.iter().filter_map(|e| e["objectives"].as_object()).flat_map(|o| o.keys().map(|key| (key, ()))).collect();
    let each = objectives.keys().map(|&key| of_steps(key, &|e| e["objectives"][key].as_f64()));
    chart("Objectives", each.collect())?;
    chart("Learning rate", vec![of_steps("rate", &|e| e["rate"].as_f64())])?;
    chart("Norm of the gradient", vec![of_steps("before clipping", &|e| e["gradient_norm"].as_f64())])?;
    let throughput = |e: &Value| Some(e["pictures"].as_f64()? / e["seconds"].as_f64()?).filter(|v| v.is_finite());
    chart("Pictures a second", vec![of_steps("pictures with captions", &throughput)])?;
    chart("Reward of drawn captions", vec![of_steps("CIDEr-D", &|e| e["reward"].as_f64())])?;
    chart(
        "Captions of development pictures",
        vec![of_judged("CIDEr-D", &|e| e["cider"].as_f64()), of_judged("BLEU-4", &|e| e["bleu"][3].as_f64())],
    )?;
    let recall = |way: &'static str, at: usize| move |e: &Value| e[way][at].as_f64();
    chart(
        "Recall on development pictures",
        vec![
            of_judged("image to text at 1", &recall("image_to_text", 0)),
            of_judged("image to text at 10", &recall("image_to_text", 2)),
            of_judged("text to image at 1", &recall("text_to_image", 0)),
            of_judged("text to image at 10", &recall("text_to_image", 2)),
        ],
    )?;
    page += &captions(&judged);
    if !recipe.is_empty() {
        let _ = write!(page, "<h2>Recipe</h2><pre>{}</pre>", escape(recipe));
    }
    Ok(page)
}

/// What `read` finds in each entry, by its step; many points are averaged in groups.
fn points(entries: &[&Value], read: &dyn Fn(&Value) -> Option<f64>) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> = entries
        .iter()
        .filter_map(|entry| Some((entry["step"].as_f64()?, read(entry)?)))
        .filter(|(_, value)| value.is_finite())
        .collect();
    let group = all.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    all.chunks(group).map(mean).collect()
}

fn draw(curves: &[Curve]) -> Result<String> {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |values: &mut dyn Iterator<Item = f64>| values.fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
    let (first, last) = range(&mut all().map(|p| p.0));
    let (low, high) = range(&mut all().map(|p| p.1));
    let margin = ((high - low) * 0.05).max(1e-9);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let problem = |error: &dyn std::fmt::Display| anyhow::anyhow!("the chart cannot be drawn: {error}");
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d(first..last, low - margin..high + margin)
            .map_err(|e| problem(&e))?;
        chart.configure_mesh().light_line_style(WHITE).x_desc("step").draw().map_err(|e| problem(&e))?;
        for (i, (name, points)) in curves.iter().enumerate() {
            let colour = Palette99::pick(i).to_rgba();
            let line =
                chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2))).map_err(|e| problem(&e))?;
            line.label(name).legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 14, y)], colour.stroke_width(2)));
        }
        let legend =
            chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.7)).draw();
        legend.map_err(|e| problem(&e))?;
        area.present().map_err(|e| problem(&e))?;
    }
    Ok(svg)
}

/// The scores of one judgement.
fn table(scores: &Value) -> String {
    let mut rows = String::new();
    let mut row = |name: &str, value: String| {
        let _ = write!(rows, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(&value));
    };
    let percent = |v: &Value| v.as_f64().map_or_else(|| "–".to_owned(), |v| format!("{:.1}", 100.0 * v));
    row("step", scores["step"].to_string());
    for (key, value) in scores.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("schema" | "step" | "development" | "samples", _) => {}
            ("image_to_text" | "text_to_image", Value::Array(at)) => {
                let name = key.replace('_', " ");
                row(&format!("{name}, R@1 / 5 / 10, %"), at.iter().map(percent).collect::<Vec<_>>().join(" / "));
            }
            ("bleu", Value::Array(at)) => row("BLEU-1 to BLEU-4, %", at.iter().map(percent).collect::<Vec<_>>().join(" / ")),
            (_, Value::Number(number)) => {
                row(key, number.as_f64().map_or_else(String::new, |v| format!("{}", (v * 1e4).round() / 1e4)))
            }
            _ => {}
        }
    }
    format!("<h2>Last scores</h2><table>{rows}</table>")
}

/// Captions of the same development pictures, judgement by judgement.
fn captions(judged: &[&Value]) -> String {
    let mut by_picture: BTreeMap<&str, Vec<(u64, &str)>> = BTreeMap::new();
    for entry in judged {
        for sample in entry["samples"].as_array().into_iter().flatten() {
            if let (Some(key), Some(caption)) = (sample[0].as_str(), sample[1].as_str()) {
                by_picture.entry(key).or_default().push((entry["step"].as_u64().unwrap_or(0), caption));
            }
        }
    }
    let mut text = String::new();
    for (key, said) in by_picture {
        let _ = write!(text, "<h3>{}</h3><table>", escape(key));
        for (step, caption) in said {
            let _ = write!(text, "<tr><th>{step}</th><td>{}</td></tr>", escape(caption));
        }
        text += "</table>";
    }
    if text.is_empty() { text } else { format!("<h2>Captions</h2>{text}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f64) -> String {
        format!(
            r#"{{"step":{step},"loss":{loss},"objectives":{{"caption":{loss},"contrast":1.5}},"rate":0.1,"seconds":2.0,"waited":0.125,"pictures":48}}"#
        )
    }

    #[test]
    fn a_report_shows_what_the_log_holds() {
        let judged = r#"{"development":true,"step":2,"cider":0.25,"bleu":[0.5,0.3,0.2,0.125],"image_to_text":[0.1,0.2,0.3],
            "text_to_image":[0.05,0.2,0.3],"samples":[["k<1>","a <b> & c"]]}"#
            .replace('\n', "");
        let log = [step(1, 3.0), step(2, 2.0), judged, "{\"step\": 3, \"lo".into()].join("\n");
        let page = html("a & b", &log, "steps = 2\n").unwrap();
        for wanted in [
            "<h1>a &amp; b</h1>",
            "<p>2 steps, 0 minutes of computing, 6.2 % of them waiting for data.",
            "BLEU-1 to BLEU-4, %</th><td>50.0 / 30.0 / 20.0 / 12.5",
            "image to text, R@1 / 5 / 10, %</th><td>10.0 / 20.0 / 30.0",
            "<h3>k&lt;1&gt;</h3>",
            "<td>a &lt;b&gt; &amp; c</td>",
            "<pre>steps = 2",
            "contrast",
        ] {
            assert!(page.contains(wanted), "no {wanted} in {page}");
        }
        // Loss, objectives, rate and throughput have two points; the single judgement makes no curve.
        assert_eq!(page.matches("<svg").count(), 4);
        // Each curve is drawn thick, and once more in its legend.
        assert_eq!(page.matches("stroke-width=\"2\"").count(), 10);
        assert!(html("x", "{\"development\":true}\n", "").is_err());
    }

    #[test]
    fn long_curves_are_averaged_and_keep_their_mean() {
        let entries: Vec<Value> = (1..=1000).map(|i| serde_json::json!({ "step": i, "loss": i * i })).collect();
        let found = points(&entries.iter().collect::<Vec<_>>(), &|e| e["loss"].as_f64());
        assert_eq!(found.len(), 250);
        assert_eq!(found[0], (2.5, (1.0 + 4.0 + 9.0 + 16.0) / 4.0));
    }
}
