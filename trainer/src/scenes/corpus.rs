//! Writes scenes as WebDataset shards: `<key>.jpg` or `<key>.png`, and `<key>.json` with captions, graph and questions.

use std::collections::HashSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ImageEncoder, RgbImage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Graph, MAX_OBJECTS, Question, Scene, generate_up_to};
use crate::shards::{ShardReport, ShardWriter, read_shards};

/// Quality of JPEG members: the edges of flat shapes ring visibly below 90.
const JPEG_QUALITY: u8 = 92;

/// How pictures are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PictureFormat {
    /// JPEG of quality 92: some 15 kB a scene.
    Jpg,
    /// PNG, exact: some 100 kB a scene.
    Png,
}

impl PictureFormat {
    /// File extension, without the dot.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Jpg => "jpg",
            Self::Png => "png",
        }
    }

    /// Encodes a picture.
    ///
    /// # Errors
    /// Whatever the encoder reports.
    pub fn encode(self, image: &RgbImage) -> Result<Vec<u8>> {
        let mut bytes = Cursor::new(Vec::new());
        let colour = image::ExtendedColorType::Rgb8;
        match self {
            Self::Jpg => {
                JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).write_image(image, image.width(), image.height(), colour)
            }
            Self::Png => PngEncoder::new(&mut bytes).write_image(image, image.width(), image.height(), colour),
        }
        .with_context(|| format!("cannot encode a picture of {}×{}", image.width(), image.height()))?;
        Ok(bytes.into_inner())
    }
}

/// The `.json` member of a scene.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SceneRecord {
    /// Five captions.
    pub captions: Vec<String>,
    /// Ground truth.
    pub graph: Graph,
    /// Questions with answers.
    pub questions: Vec<Question>,
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct CorpusOptions {
    /// Seed of the corpus.
    pub seed: u64,
    /// Scenes to write.
    pub count: usize,
    /// Most objects of a scene.
    pub max_objects: usize,
    /// How pictures are stored.
    pub format: PictureFormat,
    /// Samples of a shard.
    pub samples_per_shard: usize,
    /// Leaves out scenes whose [`Graph::signature`] occurred before.
    pub distinct: bool,
    /// Signatures to leave out, see [`signatures`].
    pub exclude: HashSet<String>,
}

impl Default for CorpusOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            count: 1000,
            max_objects: MAX_OBJECTS,
            format: PictureFormat::Jpg,
            samples_per_shard: 1000,
            distinct: false,
            exclude: HashSet::new(),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CorpusReport {
    /// Scenes in the shards.
    pub scenes: usize,
    /// Scenes left out because their signature was excluded or occurred before.
    pub left_out: usize,
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
}

/// Scenes that are drawn and encoded at once, in parallel.
const BATCH: u64 = 256;

/// Writes `scenes-0000.tar`, … into a folder. The key of a scene is `scene-<seed>-<index>`.
///
/// # Errors
/// A failed write, or options that leave too few scenes (`distinct` or `exclude` against a small world).
pub fn write_corpus(folder: &Path, options: &CorpusOptions) -> Result<CorpusReport> {
    let mut writer = ShardWriter::create(folder, "scenes", options.samples_per_shard)?;
    let mut seen = options.exclude.clone();
    let mut report = CorpusReport::default();
    let mut next = 0;
    while report.scenes < options.count {
        let left = (options.count - report.scenes) as u64;
        let mut chosen: Vec<(u64, Scene)> = Vec::new();
        for index in next..next + BATCH.min(left) {
            let scene = generate_up_to(options.seed, index, options.max_objects);
            let signature = scene.graph.signature();
            let known = if options.distinct { !seen.insert(signature) } else { seen.contains(&signature) };
            if known {
                report.left_out += 1;
            } else {
                chosen.push((index, scene));
            }
        }
        next += BATCH.min(left);
        if report.left_out > 1000 + 20 * options.count {
            bail!(
                "found only {} of {} scenes that are not excluded: ask for fewer, or allow more objects",
                report.scenes,
                options.count
            );
        }
        let encoded: Vec<(String, Vec<u8>, Vec<u8>)> =
            chosen.into_par_iter().map(|(index, scene)| encode(options, index, scene)).collect::<Result<_>>()?;
        for (key, picture, json) in encoded {
            writer.write(&key, &[(options.format.extension(), &picture), ("json", &json)])?;
            report.scenes += 1;
        }
    }
    report.shards = writer.finish()?;
    Ok(report)
}

fn encode(options: &CorpusOptions, index: u64, scene: Scene) -> Result<(String, Vec<u8>, Vec<u8>)> {
    let picture = options.format.encode(&scene.draw())?;
    let Scene { captions, graph, questions, .. } = scene;
    let json = serde_json::to_vec(&SceneRecord { captions, graph, questions })?;
    Ok((format!("scene-{}-{index:06}", options.seed), picture, json))
}

/// Reads the scene records of shards, by key, in order. Samples without a scene graph are reported as damaged.
///
/// # Errors
/// As [`read_shards`].
pub fn read_records(shards: &[PathBuf]) -> Result<(Vec<(String, SceneRecord)>, ShardReport)> {
    let mut records = Vec::new();
    let mut foreign = Vec::new();
    let mut report = read_shards(shards, |sample| {
        match serde_json::from_value(sample.json.unwrap_or_default()) {
            Ok(record) => records.push((sample.key, record)),
            Err(error) => foreign.push((sample.key, error)),
        }
        Ok(())
    })?;
    report.samples -= foreign.len();
    report.damaged.extend(foreign.into_iter().map(|(key, error)| crate::shards::Damage {
        shard: shards.first().cloned().unwrap_or_default(),
        key,
        reason: format!("no scene record: {error}"),
    }));
    Ok((records, report))
}

/// The signatures of all scenes in shards, to keep them out of another corpus.
///
/// # Errors
/// As [`read_shards`]; also samples that are not scenes, because a held-out corpus could then overlap unnoticed.
pub fn signatures(shards: &[PathBuf]) -> Result<HashSet<String>> {
    let (records, report) = read_records(shards)?;
    if let Some(damage) = report.damaged.first() {
        bail!("{} in {}: {}", damage.key, damage.shard.display(), damage.reason);
    }
    Ok(records.into_iter().map(|(_, record)| record.graph.signature()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_scenes_share_no_signature() {
        let folder = tempfile::tempdir().unwrap();
        let (train, test) = (folder.path().join("train"), folder.path().join("test"));
        // One object: a small world, where overlap is certain unless it is prevented.
        let options = CorpusOptions { count: 300, max_objects: 1, samples_per_shard: 100, ..CorpusOptions::default() };
        let report = write_corpus(&train, &options).unwrap();
        assert_eq!((report.scenes, report.shards.len()), (300, 3));
        let exclude = signatures(&[train]).unwrap();
        let options = CorpusOptions { seed: 1, count: 200, distinct: true, exclude: exclude.clone(), ..options };
        let report = write_corpus(&test, &options).unwrap();
        assert!(report.left_out > 0);
        let held_out = signatures(&[test]).unwrap();
        assert_eq!(held_out.len(), 200, "a signature occurs twice");
        assert!(held_out.is_disjoint(&exclude));
    }

    #[test]
    fn a_world_that_is_too_small_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let options = CorpusOptions { count: 50_000, max_objects: 1, distinct: true, ..CorpusOptions::default() };
        // Counting is enough here: nothing needs to be drawn to find that the world is exhausted.
        let world: HashSet<String> = (0..60_000).map(|index| generate_up_to(0, index, 1).graph.signature()).collect();
        let options = CorpusOptions { count: 10, exclude: world, ..options };
        let error = write_corpus(folder.path(), &options).unwrap_err().to_string();
        assert!(error.contains("of 10 scenes"), "{error}");
    }
}
