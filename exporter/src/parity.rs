//! Output by output: what the runtime's engine computes against what candle computes from the same weights.

use std::fmt;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor as Candle};
use image::RgbImage;
use serde::Serialize;
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{Manifest, Precision, Sizes};
use unimo::captioning::KvPool;
use unimo::engine::{self, EngineOptions, Graph, GraphSource, Tensor};
use unimo::tokenizer::{CLS, PAD, SEP};
use unimo_train::backbone::{FEATURES, GRID};
use unimo_train::model::{Packer, Regions};

use crate::checkpoint::Checkpoint;

/// Largest error allowed, as a share of the output's largest magnitude. Both sides compute in f32 from equal weights; they
/// differ in the order of sums of up to 1292 products over up to 70 layers (measured: up to 4.5e-5), while one bias element
/// changed by 0.05 gives 8e-4, and a wrong operator, padding or mask 1e-1 and more.
pub const TOLERANCE: f64 = 2e-4;
/// Tokens decoded for each picture.
const DECODED: usize = 6;
/// Hypotheses decoded at once: the sample's text, and the same words backwards. From the second word on they change places at
/// every step.
const HYPOTHESES: usize = 2;

/// One output's agreement.
#[derive(Debug, Clone, Serialize)]
pub struct OutputParity {
    /// Graph.
    pub graph: String,
    /// Output.
    pub output: String,
    /// Values compared.
    pub values: usize,
    /// Largest absolute difference.
    pub max_error: f64,
    /// Largest absolute difference as a share of the largest magnitude.
    pub relative_error: f64,
}

/// The agreement of all outputs.
#[derive(Debug, Clone, Serialize)]
pub struct ParityReport {
    /// Pictures and texts compared.
    pub samples: usize,
    /// Largest share that [`Self::holds`] allows.
    pub tolerance: f64,
    /// One entry an output.
    pub outputs: Vec<OutputParity>,
}

impl ParityReport {
    /// Whether every output agrees.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.outputs.iter().all(|output| output.relative_error <= self.tolerance)
    }

    pub(crate) fn note(&mut self, graph: &str, output: &str, got: &[f32], expected: &[f32]) {
        self.note_against(graph, output, got, expected, 1e-6);
    }

    /// Like [`Self::note`], an output's largest magnitude taken for no less than `least`.
    pub(crate) fn note_against(&mut self, graph: &str, output: &str, got: &[f32], expected: &[f32], least: f64) {
        let max = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let mut error = max(&mut got.iter().zip(expected).map(|(g, e)| f64::from((g - e).abs())));
        if got.len() != expected.len() || got.iter().chain(expected).any(|v| !v.is_finite()) {
            error = f64::INFINITY;
        }
        let relative = error / max(&mut expected.iter().map(|v| f64::from(v.abs()))).max(least);
        match self.outputs.iter_mut().find(|o| o.graph == graph && o.output == output) {
            Some(entry) => {
                entry.values += expected.len();
                entry.max_error = entry.max_error.max(error);
                entry.relative_error = entry.relative_error.max(relative);
            }
            None => self.outputs.push(OutputParity {
                graph: graph.to_owned(),
                output: output.to_owned(),
                values: expected.len(),
                max_error: error,
                relative_error: relative,
            }),
        }
    }
}

impl fmt::Display for ParityReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<8} {:<14} {:>10} {:>12} {:>12}", "graph", "output", "values", "max error", "relative")?;
        for o in &self.outputs {
            let verdict = if o.relative_error <= self.tolerance { "" } else { "  FAILS" };
            writeln!(
                f,
                "{:<8} {:<14} {:>10} {:>12.2e} {:>12.2e}{verdict}",
                o.graph, o.output, o.values, o.max_error, o.relative_error
            )?;
        }
        write!(f, "{} samples; tolerance {:.0e} of each output's largest magnitude", self.samples, self.tolerance)
    }
}

/// A picture and a text to compare on.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Picture.
    pub image: RgbImage,
    /// Text.
    pub text: String,
}

struct Session<'a> {
    manifest: &'a Manifest,
    graphs: Vec<(String, Box<dyn Graph>)>,
    sizes: Sizes,
    checkpoint: &'a Checkpoint,
    report: ParityReport,
}

/// Compares the graphs of one precision in a bundle with the checkpoint's candle model (whose weights must be rounded alike).
///
/// # Errors
/// A graph that cannot be loaded or run. Disagreement is in the report, not an error.
pub fn compare(bundle: &Bundle, precision: Precision, checkpoint: &Checkpoint, samples: &[Sample]) -> Result<ParityReport> {
    let engine = engine::open(&EngineOptions::default())?;
    let mut graphs = Vec::new();
    let sizes = Sizes::of_beam(HYPOTHESES, bundle.manifest().model.max_text);
    for signature in &bundle.manifest().graphs {
        let onnx = bundle.read(&Manifest::graph_file(precision, &signature.name))?;
        let fixed = signature.fixed(sizes);
        let external = |location: &str| bundle.share(&format!("{precision}/{location}")).ok();
        let source = GraphSource { signature: &fixed, sizes, onnx, external: &external };
        graphs.push((fixed.name.clone(), engine.load(&source)?));
    }
    let report = ParityReport { samples: samples.len(), tolerance: TOLERANCE, outputs: Vec::new() };
    let mut session = Session { manifest: bundle.manifest(), graphs, sizes, checkpoint, report };
    for sample in samples {
        session.sample(sample)?;
    }
    Ok(session.report)
}

impl Session<'_> {
    fn run(&self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
        let (_, graph) = self.graphs.iter().find(|(name, _)| name == graph).with_context(|| format!("no graph `{graph}`"))?;
        Ok(graph.run(inputs)?)
    }

    fn sample(&mut self, sample: &Sample) -> Result<()> {
        let checkpoint = self.checkpoint;
        let model = &checkpoint.model;
        let image = &self.manifest.image;
        let pixels = image.tensor(&sample.image);
        let regions = checkpoint.backbone.forward(&pixels)?;
        let encoded = model.encode_image(&Candle::from_slice(&regions, (1, GRID * GRID, FEATURES), &Device::Cpu)?)?;
        let embedding = model.embed_image(&encoded)?;

        let shape = [1, 3, image.height as usize, image.width as usize];
        let seen = self.run("vision", &[("pixels", &tensor(&shape, pixels)?)])?;
        for (got, (name, expected)) in seen.iter().zip([
            ("embedding", flat(&embedding)?),
            ("prefix_keys", flat(&Candle::cat(&encoded.keys, 0)?)?),
            ("prefix_values", flat(&Candle::cat(&encoded.values, 0)?)?),
            ("regions", regions.clone()),
        ]) {
            self.report.note("vision", name, got.floats(), &expected);
        }

        let words = checkpoint.tokenizer.encode(&sample.text, self.manifest.model.max_text - 2);
        self.decode(&words, &seen[1], &seen[2], &encoded.keys, &encoded.values)?;
        let ids: Vec<u32> = [CLS].into_iter().chain(words).chain([SEP]).collect();
        self.text_and_match(&ids, &regions)
    }

    fn decode(
        &mut self,
        words: &[u32],
        prefix_keys: &Tensor,
        prefix_values: &Tensor,
        keys: &[Candle],
        values: &[Candle],
    ) -> Result<()> {
        let mut pool = KvPool::new(&self.manifest.model, self.sizes);
        let forwards: Vec<u32> = [CLS].iter().chain(words).copied().take(DECODED).collect();
        let backwards = [CLS].into_iter().chain(forwards[1..].iter().rev().copied());
        // candle reads each text by itself, with keys and values of its own.
        let mut texts =
            [(forwards.clone(), keys.to_vec(), values.to_vec()), (backwards.collect(), keys.to_vec(), values.to_vec())];
        for position in 0..forwards.len() {
            if position > 1 {
                texts.swap(0, 1);
            }
            // Both begin as one.
            let parents = if position == 1 { [0, 0] } else { [1, 0] };
            let read = if position == 0 { 1 } else { HYPOTHESES };
            pool.branch(parents.into_iter().take(read));
            let tokens = texts.iter().map(|(tokens, ..)| i64::from(tokens[position])).collect();
            let inputs = [
                ("tokens", &Tensor::i64(&[HYPOTHESES], tokens).context("a token for each hypothesis")?),
                ("position", &Tensor::i64(&[1], vec![position as i64]).context("a single number")?),
                ("prefix_keys", prefix_keys),
                ("prefix_values", prefix_values),
            ];
            let got = self.run("decode", &[&inputs[..], &pool.inputs()[..]].concat())?;
            for (row, (tokens, keys, values)) in texts.iter_mut().enumerate() {
                let step = self.checkpoint.model.decode_step(&[tokens[position]], position, keys, values)?;
                (*keys, *values) = (step.keys, step.values);
                for (index, expected) in [flat(&step.logits)?, newest(keys)?, newest(values)?].iter().enumerate() {
                    let name = ["logits", "new_keys", "new_values"][index];
                    self.report.note("decode", name, &of_row(&got[index], row), expected);
                }
            }
            pool.store(&got[1], &got[2], read);
        }
        Ok(())
    }

    fn text_and_match(&mut self, ids: &[u32], regions: &[f32]) -> Result<()> {
        let m = &self.manifest.model;
        let model = &self.checkpoint.model;
        let mut packer = Packer::new(model);
        let alone = packer.text(ids, false);
        let pair = packer.pair(Regions::visible(regions), ids);
        let batch = packer.finish(&Device::Cpu)?;
        let hidden = model.evaluate(&batch)?;
        let embedding = model.text_embedding(&batch, &hidden, &[alone])?;
        let logit = model.match_logits(&model.at_once(), &hidden.rows(&[pair.image])?, &hidden.rows(&pair.texts)?)?;

        let padding = m.max_text - ids.len();
        let padded = ids.iter().copied().chain(vec![PAD; padding]).map(i64::from).collect();
        let mask = ids.iter().map(|_| 0.0).chain(vec![-1e4; padding]).collect();
        let padded = Tensor::i64(&[1, m.max_text], padded).context("padded ids")?;
        let mask = tensor(&[1, m.max_text], mask)?;
        let got = self.run("text", &[("ids", &padded), ("mask", &mask)])?;
        self.report.note("text", "embedding", got[0].floats(), &flat(&embedding)?);
        let regions = tensor(&[1, m.image_tokens - 1, m.region_feature], regions.to_vec())?;
        let got = self.run("match", &[("regions", &regions), ("ids", &padded), ("mask", &mask)])?;
        self.report.note("match", "score", got[0].floats(), &flat(&logit)?);
        Ok(())
    }
}

/// The last row of every layer's keys or values.
fn newest(layers: &[Candle]) -> Result<Vec<f32>> {
    let rows = layers.iter().map(|l| l.narrow(2, l.dim(2)? - 1, 1)).collect::<candle_core::Result<Vec<_>>>()?;
    flat(&Candle::cat(&rows, 0)?)
}

/// What belongs to one hypothesis in an output `[…, hypotheses, width]`.
fn of_row(output: &Tensor, row: usize) -> Vec<f32> {
    let width = output.shape().last().copied().unwrap_or(1);
    output.floats().chunks_exact(HYPOTHESES * width).flat_map(|rows| &rows[row * width..][..width]).copied().collect()
}

fn tensor(shape: &[usize], values: Vec<f32>) -> Result<Tensor> {
    Tensor::f32(shape, values).with_context(|| format!("values do not fill {shape:?}"))
}

fn flat(tensor: &Candle) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
