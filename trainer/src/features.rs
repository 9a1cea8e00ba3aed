//! Cached features: the frozen part of the backbone runs once over every picture and view, not once a pass.
//!
//! One safetensors file a shard: `features`, f16, `[pictures, views, values]`, each row a record ([`Backbone::record`]): the
//! region features, or what enters the first trained block. The metadata hold the pictures' keys and a stamp of what the records
//! were made from (the backbone's layers, shard, views), so that a stale cache is rebuilt, not used.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use image::RgbImage;
use image::imageops;
use memmap2::Mmap;
use rand::Rng;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use sha2::{Digest, Sha256};
use unimo::image::{DecodeLimits, ImagePreparation};

use crate::backbone::{Backbone, record_values};
use crate::ops::kernels::add_assign;
use crate::shards::{self, Damage, ShardReport};

/// Goes into the stamp: raised when views or records are made in another way.
const VERSION: u32 = 3;

/// Views of a picture: 0 as it is, 1 mirrored, then pairs of a random crop (60–100 % of the area, brightness and contrast each
/// changed by up to a fifth) and a mirrored one.
#[must_use]
pub fn view(image: &RgbImage, key: &str, view: usize) -> RgbImage {
    let cropped = if view < 2 {
        image.clone()
    } else {
        let digest = Sha256::digest(key.as_bytes());
        let word = u64::from_le_bytes([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7]]);
        let mut rng = crate::seed::rng(crate::seed::mix(word, view as u64));
        let side = rng.random_range(0.6f32..1.0).sqrt();
        let (w, h) = ((image.width() as f32 * side) as u32, (image.height() as f32 * side) as u32);
        let (w, h) = (w.max(1), h.max(1));
        let (x, y) = (rng.random_range(0..=image.width() - w), rng.random_range(0..=image.height() - h));
        let mut crop = imageops::crop_imm(image, x, y, w, h).to_image();
        let (brightness, contrast) = (rng.random_range(0.8f32..1.2), rng.random_range(0.8f32..1.2));
        let table: Vec<u8> =
            (0..=255u8).map(|v| ((f32::from(v) - 128.0) * contrast + 128.0) * brightness).map(|v| v as u8).collect();
        crop.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
        crop
    };
    if is_mirrored(view) { imageops::flip_horizontal(&cropped) } else { cropped }
}

/// Whether a view shows the picture mirrored: left and right change places in its captions.
#[must_use]
pub fn is_mirrored(view: usize) -> bool {
    view % 2 == 1
}

/// Features of one shard, mapped from the cache.
pub struct FeatureFile {
    map: Mmap,
    offset: usize,
    /// Keys of the pictures, in the shard's order.
    pub keys: Vec<String>,
    /// Views of each picture.
    pub views: usize,
    /// Values of a record.
    values: usize,
}

impl FeatureFile {
    fn open(path: &Path, stamp: &str, values: usize) -> Result<Option<Self>> {
        let Ok(file) = File::open(path) else { return Ok(None) };
        // SAFETY: cache files are written under another name and renamed when whole; nothing rewrites one in place.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        let Ok((_, metadata)) = SafeTensors::read_metadata(&map) else { return Ok(None) };
        let Some(extra) = metadata.metadata() else { return Ok(None) };
        if extra.get("stamp").map(String::as_str) != Some(stamp) {
            return Ok(None);
        }
        let keys: Vec<String> = extra.get("keys").map(|k| serde_json::from_str(k)).transpose()?.unwrap_or_default();
        let Ok(tensors) = SafeTensors::deserialize(&map) else { return Ok(None) };
        let view = tensors.tensor("features")?;
        if view.dtype() != Dtype::F16 || view.shape().len() != 3 || view.shape()[0] != keys.len() || view.shape()[2] != values {
            return Ok(None);
        }
        let views = view.shape()[1];
        let offset = view.data().as_ptr() as usize - map.as_ptr() as usize;
        Ok(Some(Self { map, offset, keys, views, values }))
    }

    /// Record of picture `index` in one of its views (taken modulo the number of views).
    #[must_use]
    pub fn get(&self, index: usize, view: usize) -> Vec<f32> {
        let mut values = vec![0f32; self.values];
        read_halves(self.bytes(index, view), &mut vec![0; self.values], &mut values);
        values
    }

    /// Sum of those rows of `width` values of a record that are `shown`, each asked for in turn, and how many they are.
    #[must_use]
    pub fn sum(&self, index: usize, view: usize, width: usize, mut shown: impl FnMut() -> bool) -> (Vec<f32>, usize) {
        let (mut sum, mut count) = (vec![0f32; width], 0);
        let (mut bits, mut row) = (vec![0u16; width], vec![0f32; width]);
        for bytes in self.bytes(index, view).chunks_exact(2 * width) {
            if shown() {
                read_halves(bytes, &mut bits, &mut row);
                add_assign(&mut sum, &row);
                count += 1;
            }
        }
        (sum, count)
    }

    fn bytes(&self, index: usize, view: usize) -> &[u8] {
        let bytes = self.values * 2;
        let start = self.offset + (index * self.views + view % self.views) * bytes;
        &self.map[start..start + bytes]
    }
}

/// Reads 16-bit floats; `bits` is room for as many.
pub(crate) fn read_halves(bytes: &[u8], bits: &mut [u16], values: &mut [f32]) {
    bits.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(bits, b)| *bits = u16::from_le_bytes([b[0], b[1]]));
    bits.reinterpret_cast::<f16>().convert_to_f32_slice(values);
}

/// Makes and finds cached features.
pub struct FeatureCache<'a> {
    /// Folder of the cache files.
    pub folder: &'a Path,
    /// The network that makes records.
    pub backbone: &'a Backbone,
    /// How many of its last blocks are still to be trained.
    pub trained_blocks: usize,
    /// Views of each picture.
    pub views: usize,
}

impl FeatureCache<'_> {
    /// The features of every shard, computed where the cache lacks them. `progress` is called with the number of pictures done.
    ///
    /// # Errors
    /// Shards or cache that cannot be read or written. Damaged pictures are reported, not errors.
    pub fn open(&self, shards: &[PathBuf], progress: &dyn Fn(u64)) -> Result<(Vec<FeatureFile>, Vec<Damage>)> {
        std::fs::create_dir_all(self.folder).with_context(|| format!("cannot create {}", self.folder.display()))?;
        let (mut files, mut damaged) = (Vec::new(), Vec::new());
        let (values, made_by) = (record_values(self.trained_blocks), hex(&self.backbone.record_hash(self.trained_blocks)));
        for shard in shards::expand(shards)? {
            let size = std::fs::metadata(&shard)?.len();
            let name = shard.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let digest = Sha256::digest(
                format!("{VERSION} {} {size} {made_by} views {} of {values}", shard.display(), self.views).as_bytes(),
            );
            let stamp = hex(&digest[..8]);
            let path = self.folder.join(format!("{name}-{stamp}.safetensors"));
            let file = match FeatureFile::open(&path, &stamp, values)? {
                Some(file) => file,
                None => {
                    damaged.extend(self.compute(&shard, &path, &stamp, progress)?.damaged);
                    match FeatureFile::open(&path, &stamp, values)? {
                        Some(file) => file,
                        None => bail!("{} cannot be read back", path.display()),
                    }
                }
            };
            progress(0);
            files.push(file);
        }
        Ok((files, damaged))
    }

    fn compute(&self, shard: &Path, path: &Path, stamp: &str, progress: &dyn Fn(u64)) -> Result<ShardReport> {
        let mut pictures = Vec::new();
        let mut report = shards::read_shards(&[shard.to_path_buf()], |sample| {
            if let Some(bytes) = sample.image {
                pictures.push((sample.key, bytes));
            }
            Ok(())
        })?;
        let preparation = ImagePreparation::default();
        let (mut keys, mut data) = (Vec::new(), Vec::<u8>::new());
        for batch in pictures.chunks(64) {
            let made: Vec<Result<Vec<u8>>> =
                batch.par_iter().map(|(key, bytes)| self.picture(key, bytes, &preparation)).collect();
            for ((key, _), features) in batch.iter().zip(made) {
                match features {
                    Ok(mut features) => {
                        keys.push(key.clone());
                        data.append(&mut features);
                    }
                    Err(error) => {
                        report.damaged.push(Damage { shard: shard.to_path_buf(), key: key.clone(), reason: format!("{error:#}") })
                    }
                }
            }
            progress(batch.len() as u64);
        }
        let view = TensorView::new(Dtype::F16, vec![keys.len(), self.views, record_values(self.trained_blocks)], &data)?;
        let metadata =
            HashMap::from([("stamp".to_owned(), stamp.to_owned()), ("keys".to_owned(), serde_json::to_string(&keys)?)]);
        let partial = path.with_extension("tmp");
        safetensors::serialize_to_file([("features", view)], Some(metadata), &partial)
            .with_context(|| format!("cannot write {}", partial.display()))?;
        std::fs::rename(&partial, path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(report)
    }

    fn picture(&self, key: &str, bytes: &[u8], preparation: &ImagePreparation) -> Result<Vec<u8>> {
        let image = unimo::image::decode(bytes, &DecodeLimits::default())?;
        let mut data = Vec::with_capacity(self.views * record_values(self.trained_blocks) * 2);
        for v in 0..self.views {
            let record = self.backbone.record(&preparation.tensor(&view(&image, key, v)), self.trained_blocks)?;
            let mut halves = vec![f16::ZERO; record.len()];
            halves.convert_from_f32_slice(&record);
            data.extend(halves.iter().flat_map(|h| h.to_le_bytes()));
        }
        Ok(data)
    }
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::random_file;
    use crate::scenes::{CorpusOptions, generate, write_corpus};

    #[test]
    fn views_are_the_picture_its_mirror_image_and_crops_that_differ() {
        let picture = generate(7, 1).draw();
        assert_eq!(view(&picture, "k", 0), picture);
        assert_eq!(view(&picture, "k", 1), imageops::flip_horizontal(&picture));
        let crops: Vec<RgbImage> = (2..6).map(|v| view(&picture, "k", v)).collect();
        for (i, crop) in crops.iter().enumerate() {
            let share = f64::from(crop.width() * crop.height()) / f64::from(picture.width() * picture.height());
            assert!((0.58..=1.0).contains(&share), "{share}");
            assert_eq!(*crop, view(&picture, "k", i + 2), "a view changes from call to call");
            assert!(crops[..i].iter().all(|other| other != crop) && view(&picture, "other", i + 2) != *crop);
        }
    }

    #[test]
    fn a_cache_of_other_layers_views_or_a_broken_one_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let shards = [folder.path().join("scenes")];
        write_corpus(&shards[0], &CorpusOptions { seed: 5, count: 3, ..Default::default() }).unwrap();
        let backbone = Backbone::from_bytes(&random_file(1).unwrap()).unwrap();
        let features = folder.path().join("features");
        let open = |backbone: &Backbone, trained_blocks, views| {
            let made = std::cell::Cell::new(0);
            let cache = FeatureCache { folder: &features, backbone, trained_blocks, views };
            let (mut files, _) = cache.open(&shards, &|n| made.set(made.get() + n)).unwrap();
            (files.remove(0), made.get())
        };
        let (file, made) = open(&backbone, 0, 2);
        assert_eq!((file.keys.len(), file.views, made), (3, 2, 3));
        assert_eq!(open(&backbone, 0, 2).1, 0);
        // Other views, and what enters the last two blocks instead of the regions.
        assert_eq!((open(&backbone, 0, 1).1, open(&backbone, 2, 2).1), (3, 3));
        let mut other = backbone.clone();
        let mut head = other.layer("head").clone();
        head.bias[0] += 1.0;
        other.set_layer("head", head);
        // The regions are others then; what enters the last blocks is not.
        assert_eq!((open(&other, 0, 2).1, open(&other, 2, 2).1), (3, 0));
        // Records lose no more than 16 bits do.
        let (record, _) = open(&backbone, 2, 2);
        let scene = unimo::image::decode(&first_picture(&shards), &DecodeLimits::default()).unwrap();
        let exact = backbone.record(&ImagePreparation::default().tensor(&scene), 2).unwrap();
        assert!(record.get(0, 0).iter().zip(&exact).all(|(a, b)| (a - b).abs() <= 1e-3 * b.abs() + 1e-4));
        // A file cut in the middle is not read, but made anew.
        for entry in std::fs::read_dir(&features).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
        assert_eq!(open(&backbone, 0, 2).1, 3);
    }

    fn first_picture(shards: &[PathBuf]) -> Vec<u8> {
        let mut first = None;
        shards::read_shards(shards, |sample| {
            first = first.take().or(sample.image);
            Ok(())
        })
        .unwrap();
        first.unwrap()
    }
}
