//! How pictures look to retrieval: the classes of their regions and their mean feature, by a backbone or by a detector.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::backbone::{Backbone, CHANNELS, FEATURES};
use crate::detections::{DetectionCache, DetectionFile, RegionShapes};
use crate::features::{FeatureCache, FeatureFile};
use crate::names::Names;
use crate::shards::{self, Damage};

/// Who says what pictures show.
#[derive(Debug, Clone)]
pub enum Seer {
    /// A backbone's file with its classifier: the cells of its grid, computed from the pictures of shards.
    Backbone(PathBuf),
    /// A detector, by tables; images alone are then tables too.
    Detector {
        /// Tables (or folders of them) of the pictures with captions.
        tables: Vec<PathBuf>,
        /// What the tables hold.
        shapes: RegionShapes,
    },
}

/// A picture as it is compared: the classes of its regions, and its mean feature.
pub(super) struct Look {
    pub(super) key: String,
    pub(super) classes: Vec<u32>,
    pub(super) mean: Vec<f32>,
}

/// A [`Seer`] with its files opened.
pub(super) enum Looks<'a> {
    Backbone { backbone: Backbone, folder: &'a Path },
    Detector { cache: DetectionCache<'a>, files: Vec<DetectionFile>, places: Vec<(usize, usize)>, names: Names },
}

impl<'a> Looks<'a> {
    /// Opens what says how pictures look; `folder` is that of the feature cache.
    pub(super) fn open(
        seer: &Seer,
        folder: &'a Path,
        damaged: &mut Vec<Damage>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Self> {
        match seer {
            Seer::Backbone(path) => {
                let backbone = Backbone::load(path)?;
                if !backbone.has_classifier() {
                    bail!("{} has no classifier, by whose classes images are found", path.display());
                }
                Ok(Self::Backbone { backbone, folder })
            }
            Seer::Detector { tables, shapes } => {
                let cache = DetectionCache { folder, shapes: *shapes };
                let mut files = cache.open(tables, progress)?;
                let (mut places, mut names) = (Vec::new(), Names::default());
                for (number, file) in files.iter_mut().enumerate() {
                    damaged.append(&mut file.damaged);
                    for (index, name) in file.names.iter().enumerate() {
                        if names.insert(name.clone(), places.len()).is_none() {
                            places.push((number, index));
                        }
                    }
                }
                Ok(Self::Detector { cache, files, places, names })
            }
        }
    }

    /// Looks of all images alone: of shards, or of tables.
    pub(super) fn of_images(
        &self,
        images: &[PathBuf],
        damaged: &mut Vec<Damage>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Look>> {
        match self {
            Self::Backbone { backbone, folder } => of_shards(backbone, folder, images, damaged, progress),
            Self::Detector { cache, .. } => {
                let mut looks = Vec::new();
                for mut file in cache.open(images, progress)? {
                    damaged.append(&mut file.damaged);
                    let found =
                        (0..file.names.len()).into_par_iter().map(|i| of_detected(&file, i, &file.names[i], cache.shapes));
                    looks.extend(found.collect::<Vec<_>>());
                }
                Ok(looks)
            }
        }
    }

    /// Looks of the pictures of a shard with captions; a picture whose regions are in no table has none.
    pub(super) fn of_pairs(
        &self,
        shard: &Path,
        keys: &[&str],
        damaged: &mut Vec<Damage>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Look>> {
        match self {
            Self::Backbone { backbone, folder } => of_shards(backbone, folder, &[shard.to_path_buf()], damaged, progress),
            Self::Detector { cache, files, places, names } => {
                let found: Vec<(&str, Option<usize>)> = keys.iter().map(|&key| (key, names.find(key))).collect();
                let reason = "its regions are in no table".to_owned();
                let missing = found.iter().filter(|(_, number)| number.is_none());
                damaged.extend(missing.map(|(key, _)| Damage {
                    shard: shard.to_path_buf(),
                    key: (*key).to_owned(),
                    reason: reason.clone(),
                }));
                let look = |&(key, number): &(&str, Option<usize>)| {
                    let (file, index) = places[number?];
                    Some(of_detected(&files[file], index, key, cache.shapes))
                };
                Ok(found.par_iter().filter_map(look).collect())
            }
        }
    }
}

/// Puts what says how pictures look, and the images alone, into a hash.
pub(super) fn update_hash(seer: &Seer, images: &[PathBuf], hash: &mut Sha256) -> Result<()> {
    let readable = |path: &Path| format!("cannot read {}", path.display());
    let files = match seer {
        Seer::Backbone(path) => {
            hash.update(std::fs::read(path).with_context(|| readable(path))?);
            shards::expand(images)?
        }
        Seer::Detector { tables, shapes } => {
            hash.update(format!("{shapes:?}"));
            [crate::detections::expand(images)?, crate::detections::expand(tables)?].concat()
        }
    };
    for file in files {
        let length = std::fs::metadata(&file).with_context(|| readable(&file))?.len();
        hash.update(format!("{} {length}", file.display()));
    }
    Ok(())
}

fn best(row: &[f32]) -> u32 {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class as u32)
}

/// Mean of the first `kept` of `width` values of each region.
fn mean(values: &[f32], width: usize, kept: usize) -> Vec<f32> {
    let regions = (values.len() / width).max(1) as f32;
    let mut mean = vec![0f32; kept];
    for region in values.chunks_exact(width) {
        mean.iter_mut().zip(region).for_each(|(mean, value)| *mean += value / regions);
    }
    mean
}

fn of_detected(file: &DetectionFile, index: usize, key: &str, shapes: RegionShapes) -> Look {
    let record = file.get(index);
    let probabilities: Vec<f32> =
        record.detected.iter().flat_map(|detected| &detected.probabilities).map(|half| half.to_f32()).collect();
    let classes = probabilities.chunks_exact(shapes.classes).map(best).collect();
    Look { key: key.to_owned(), classes, mean: mean(&record.values, shapes.features, shapes.features) }
}

fn of_shards(
    backbone: &Backbone,
    folder: &Path,
    shards: &[PathBuf],
    damaged: &mut Vec<Damage>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Look>> {
    let cache = FeatureCache { folder, backbone, trained_blocks: 0, views: 1 };
    let (files, skipped) = cache.open(shards, progress)?;
    damaged.extend(skipped);
    let of_file = |file: &FeatureFile| {
        let look = |i: usize| {
            let regions = file.get(i, 0);
            let logits = backbone.classify(&regions)?;
            let classes = logits.chunks_exact(crate::backbone::CLASSES).map(best).collect();
            Ok(Look { key: file.keys[i].clone(), classes, mean: mean(&regions, FEATURES, CHANNELS) })
        };
        (0..file.keys.len()).into_par_iter().map(look).collect::<Result<Vec<Look>>>()
    };
    let looks = files.iter().map(of_file).collect::<Result<Vec<_>>>()?;
    Ok(looks.into_iter().flatten().collect())
}
