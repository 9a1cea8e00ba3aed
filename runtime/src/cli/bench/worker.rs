//! The process of one combination: captions, and what that takes.

use std::fs;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use unimo::engine::EngineOptions;
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};

use super::super::exit::UsageError;
use super::super::output::{Output, milliseconds};
use super::super::pictures::{self, Picture};
use super::{BenchArgs, source};

/// A drawn picture, for who has none.
const SAMPLE: &[u8] = include_bytes!("../../../samples/red-star.png");

/// First line of a worker: printed as soon as the first caption is there.
#[derive(Debug, Serialize, Deserialize)]
pub struct First {
    /// Processor time of the process until then, in milliseconds, where the system tells.
    pub cpu_ms: Option<f64>,
    /// Opening the bundle and preparing its graphs.
    pub load_ms: f64,
}

/// Milliseconds of one caption.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Sample {
    pub decode_image: f64,
    pub vision: f64,
    pub text: f64,
    pub total: f64,
    pub tokens: usize,
    /// Runs of the `decode` graph.
    pub steps: usize,
}

/// Last line of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    pub samples: Vec<Sample>,
    /// The most memory that the process held, in bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

// The process of one combination.

/// Measures the one combination that the arguments name.
pub fn work(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let (&[engine], &[precision], &[form]) = (args.engine.as_slice(), args.precision.as_slice(), args.form.as_slice()) else {
        return Err(UsageError("a worker measures one combination".to_owned()).into());
    };
    let encoded = encoded_pictures(&args.sources)?;
    let options = EngineOptions {
        engine,
        provider: args.provider,
        precision: Some(precision),
        form: Some(form),
        threads: args.threads.get(),
        spinning: args.spin,
        library: args.ort_lib.clone(),
        ..EngineOptions::default()
    };
    let output = Output::new(0);
    let start = Instant::now();
    let model = Model::open(&source(args), &options)?;
    model.load(&[GraphName::Vision, GraphName::Decode])?;
    let load_ms = milliseconds(start.elapsed());
    sample(&model, &encoded[0])?;
    output.json(&First { cpu_ms: processor_time(), load_ms })?;
    let deadline = Instant::now() + Duration::from_secs_f64(f64::from(args.duration) / f64::from(args.rounds));
    let mut samples = Vec::new();
    // Every picture once, however long it takes.
    for picture in encoded.iter().cycle() {
        samples.push(sample(&model, picture)?);
        if samples.len() >= encoded.len() && Instant::now() >= deadline {
            break;
        }
    }
    output.json(&Measured { samples, peak_memory: peak_memory() })?;
    Ok(output.finish())
}

/// The pictures to caption, as they lie in their files.
pub fn encoded_pictures(sources: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
    if sources.is_empty() {
        return Ok(vec![SAMPLE.to_vec()]);
    }
    let read = |picture: Picture| match picture {
        Picture::File(path) => fs::read(&path).with_context(|| format!("cannot read {}", path.display())),
        Picture::Stdin | Picture::Camera(_) => {
            Err(UsageError("pictures to measure with must be files: each process reads them again".to_owned()).into())
        }
    };
    pictures::find(sources)?.into_iter().map(read).collect()
}

fn sample(model: &Model, encoded: &[u8]) -> anyhow::Result<Sample> {
    let start = Instant::now();
    let image = decode(encoded, &DecodeLimits::default())?;
    let decoded = Instant::now();
    let vision = model.see(&image)?;
    let seen = Instant::now();
    let caption = black_box(model.caption(&vision, &model.decode_options())?);
    let done = Instant::now();
    Ok(Sample {
        decode_image: milliseconds(decoded - start),
        vision: milliseconds(seen - decoded),
        text: milliseconds(done - seen),
        total: milliseconds(done - start),
        tokens: caption.tokens.len(),
        steps: caption.steps,
    })
}

/// Processor time of this process in milliseconds: Linux counts it in hundredths of a second.
fn processor_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in brackets may hold anything; `utime` and `stime` are fields 14 and 15, the field after the name is the third.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some((ticks(14)? + ticks(15)?) * 10.0)
}

/// The most memory that this process held, in bytes.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_time_and_memory() {
        let (before, held) = (processor_time().unwrap(), peak_memory().unwrap());
        let block = black_box(vec![1u8; 64 << 20]);
        let start = Instant::now();
        let mut sum = 0u64;
        while start.elapsed() < Duration::from_millis(200) {
            sum += block.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        }
        assert!(black_box(sum) > 0 && processor_time().unwrap() > before);
        assert!(peak_memory().unwrap() >= held.max(64 << 20));
    }
}
