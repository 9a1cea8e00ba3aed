//! Captions as JSON, an object a line.

use std::io::Write;

use serde::Serialize;

use super::{Bad, Sink, SinkError, rfc3339};
use crate::watch::Captioned;

/// Version of the JSON.
const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct CaptionLine<'a> {
    schema: u32,
    source: &'a str,
    caption: &'a str,
    score: f32,
    tokens: usize,
    frame: u64,
    captured: String,
    /// Frames dropped since the start because the model or the output was at work.
    dropped: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature_c: Option<f64>,
    ms: Milliseconds,
    engine: &'a str,
    provider: &'a str,
    precision: &'a str,
}

#[derive(Serialize)]
struct Milliseconds {
    decode_image: f64,
    vision: f64,
    text: f64,
    total: f64,
}

#[derive(Serialize)]
struct ErrorLine<'a> {
    schema: u32,
    source: &'a str,
    error: &'a str,
}

/// What every line says about the model.
#[derive(Debug, Clone, Copy)]
pub struct ModelNames {
    /// Its engine.
    pub engine: &'static str,
    /// What the engine computes on.
    pub provider: &'static str,
    /// Its weights.
    pub precision: &'static str,
}

/// A JSON object a caption.
pub struct JsonLines<W> {
    output: W,
    model: ModelNames,
}

impl<W: Write + Send> JsonLines<W> {
    /// Lines go to `output`.
    pub fn new(output: W, model: ModelNames) -> Self {
        Self { output, model }
    }

    fn line(&mut self, object: &impl Serialize) -> Result<(), SinkError> {
        let mut line = serde_json::to_vec(object).map_err(std::io::Error::from)?;
        line.push(b'\n');
        self.output.write_all(&line)?;
        Ok(self.output.flush()?)
    }
}

impl<W: Write + Send> Sink for JsonLines<W> {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        let milliseconds = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let times = &captioned.times;
        let ModelNames { engine, provider, precision } = self.model;
        self.line(&CaptionLine {
            schema: SCHEMA,
            source: &captioned.source,
            caption: &captioned.caption.text,
            score: captioned.caption.score,
            tokens: captioned.caption.tokens.len(),
            frame: captioned.sequence,
            captured: rfc3339(captioned.captured),
            dropped: captioned.counts.dropped,
            // Tenths: a sensor knows no more, and f32 would print digits that it does not have.
            temperature_c: captioned.temperature_c.map(|celsius| (f64::from(celsius) * 10.0).round() / 10.0),
            ms: Milliseconds {
                decode_image: milliseconds(times.decode_image),
                vision: milliseconds(times.vision),
                text: milliseconds(times.text),
                total: milliseconds(times.total()),
            },
            engine,
            provider,
            precision,
        })
    }

    fn bad(&mut self, bad: &Bad) -> Result<(), SinkError> {
        self.line(&ErrorLine { schema: SCHEMA, source: &bad.source, error: &bad.error })
    }
}
