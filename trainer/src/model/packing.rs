//! Packing images and texts of different lengths into one flat batch, without padding.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::{ModelConfig, RegionStatistics, Unimo};
use crate::ops::{self, AttentionGroup, AttentionPlan, QueryBlock};
use crate::regions::Record;

/// Where the region features of a packed image come from.
#[derive(Clone, Copy)]
pub enum Features<'a> {
    /// Row-major values `[regions · region_feature]`, as the backbone gives them.
    Values(&'a [f32]),
    /// Picture of this number among those that [`Unimo::forward`] is given.
    Picture(usize),
}

/// Region features of one image, and which regions are hidden from the model.
#[derive(Clone, Copy)]
pub struct Regions<'a> {
    /// Features.
    pub features: Features<'a>,
    /// Boxes of detected regions, `[regions, 5]`: x1, y1, x2, y2, area, in shares of the picture; nothing for the cells of the grid.
    pub boxes: Option<&'a [f32]>,
    /// Regions whose features are zeroed (after standardisation) and left out of the mean that makes `[IMG]`.
    pub masked: &'a [usize],
}

impl<'a> Regions<'a> {
    /// All cells of the grid visible.
    #[must_use]
    pub fn visible(features: &'a [f32]) -> Self {
        Self::masked(features, &[])
    }

    /// Some cells of the grid hidden.
    #[must_use]
    pub fn masked(features: &'a [f32], masked: &'a [usize]) -> Self {
        Self { features: Features::Values(features), boxes: None, masked }
    }

    /// Those of a picture, cells or detected, some hidden.
    #[must_use]
    pub fn of(record: &'a Record, masked: &'a [usize]) -> Self {
        Self { features: Features::Values(&record.values), boxes: record.boxes(), masked }
    }
}

/// Rows of an image and of the captions that share it.
#[derive(Debug, Clone)]
pub struct ImageRows {
    /// Row of `[IMG]`; region `r` follows at `image + 1 + r`.
    pub image: usize,
    /// First row (`[CLS]`) of each text.
    pub texts: Vec<usize>,
}

/// A batch ready for the model.
pub struct PackedBatch {
    /// Token of each text row, in order of appending.
    pub(super) ids: Arc<[u32]>,
    /// Position of each text row inside its text.
    pub(super) positions: Arc<[u32]>,
    /// Features of the image rows; absent without images.
    pub(super) features: Option<PackedFeatures>,
    /// `[image rows, 5]`.
    pub(super) boxes: Option<Tensor>,
    /// For each packed row, its place in texts ++ images.
    pub(super) order: Arc<[u32]>,
    /// Who sees whom.
    pub(super) plan: Arc<AttentionPlan>,
}

impl PackedBatch {
    /// Number of packed rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.plan.rows()
    }

    /// Number of rows that are `[IMG]` or a region.
    #[must_use]
    pub fn image_rows(&self) -> usize {
        self.rows() - self.ids.len()
    }

    /// Features of the `[IMG]`s at `rows`, `[n, region_feature]`: the means of the regions that are visible there.
    pub(super) fn means(&self, features: &ImageFeatures, rows: &[usize]) -> Result<Tensor> {
        let (texts, images) = (self.ids.len(), features.means.as_ref().map(|means| means.dim(0)).transpose()?);
        // The images of a step's pictures are grids, all of as many rows.
        let tokens = images.map_or(1, |images| self.image_rows() / images);
        let place = |&row: &usize| match self.order.get(row).and_then(|&place| (place as usize).checked_sub(texts)) {
            Some(place) => Ok((place / tokens) as u32),
            None => candle_core::bail!("row {row} is not an image's"),
        };
        let places = rows.iter().map(place).collect::<Result<_>>()?;
        ops::select_rows(features.means.as_ref().unwrap_or(&features.rows), &places)
    }

    /// Means of the hidden states `[rows, hidden]` of the texts whose `[CLS]`s lie at `rows`, without those: `[n, hidden]`.
    pub(super) fn means_of_tokens(&self, hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let counts = rows.iter().map(|&row| self.tokens_behind(row)).collect::<Result<Vec<usize>>>()?;
        let longest = counts.iter().copied().max().unwrap_or(0);
        // As many rows of every text; what is filled up counts nothing.
        let (mut places, mut shares) = (Vec::new(), Vec::new());
        for (&row, &count) in rows.iter().zip(&counts) {
            places.extend((1..=longest).map(|i| (row + i.min(count)) as u32));
            shares.extend((1..=longest).map(|i| if i <= count { 1.0 / count as f32 } else { 0.0 }));
        }
        let shares = Tensor::from_vec(shares, (rows.len(), longest, 1), hidden.device())?;
        let tokens = ops::select_rows(hidden, &places.into())?.reshape((rows.len(), longest, hidden.dim(1)?))?;
        tokens.broadcast_mul(&shares)?.sum(1)
    }

    /// Number of tokens behind the `[CLS]` at a row.
    fn tokens_behind(&self, row: usize) -> Result<usize> {
        let place = self.order.get(row).map(|&place| place as usize);
        let Some(first) = place.filter(|&place| self.positions.get(place) == Some(&0)) else {
            candle_core::bail!("row {row} is not a text's first");
        };
        match self.positions[first + 1..].iter().take_while(|&&position| position > 0).count() {
            0 => candle_core::bail!("the text at row {row} has no token behind its first"),
            count => Ok(count),
        }
    }

    /// Pairs of rows of which one attends to the other, in one layer.
    #[must_use]
    pub fn attended(&self) -> usize {
        let of_block = |block: &QueryBlock| {
            let own = block.rows.len();
            own * block.context.len() + if block.causal { own * (own + 1) / 2 } else { own * own }
        };
        self.plan.groups.iter().flat_map(|group| &group.blocks).map(of_block).sum()
    }
}

/// Standardised features of a batch's image rows.
pub(super) struct ImageFeatures {
    /// Those of all, `[image rows, region_feature]`, `[IMG]`'s mean included.
    pub(super) rows: Tensor,
    /// Those of the `[IMG]`s alone, `[images, region_feature]`, where gradients flow through them.
    means: Option<Tensor>,
}

/// Features of a batch's image rows.
pub(super) enum PackedFeatures {
    /// Standardised, `[image rows, region_feature]`, `[IMG]`'s mean included.
    Values(Tensor),
    /// To be taken from the pictures that the forward pass is given.
    Pictures {
        /// Picture of each image.
        of: Arc<[u32]>,
        /// 1 for each region that is seen and 0 for each masked one, `[images, regions, 1]`; absent where all are seen.
        visible: Option<Tensor>,
        /// One divided by the number of visible regions, `[images, 1, 1]`.
        shares: Tensor,
    },
}

impl PackedFeatures {
    /// Standardised features of the image rows. `pictures` is `[pictures, regions, region_feature]`, as the backbone gives them;
    /// gradients flow into it.
    pub(super) fn standardised(&self, pictures: Option<&Tensor>, statistics: &RegionStatistics) -> Result<ImageFeatures> {
        let (of, visible, shares) = match (self, pictures) {
            (Self::Values(values), None) => return Ok(ImageFeatures { rows: values.clone(), means: None }),
            (Self::Pictures { of, visible, shares }, Some(_)) => (of, visible, shares),
            _ => candle_core::bail!("a batch packed by picture, and it alone, is run with the pictures' features"),
        };
        let Some(pictures) = pictures else { candle_core::bail!("no pictures") };
        let mean = Tensor::new(statistics.mean.as_slice(), pictures.device())?;
        let deviation = Tensor::new(statistics.deviation.as_slice(), pictures.device())?;
        let standard = pictures.broadcast_sub(&mean)?.broadcast_div(&deviation)?;
        let (_, count, width) = standard.dims3()?;
        let mut regions = ops::select_rows(&standard.flatten(1, 2)?, of)?.reshape((of.len(), count, width))?;
        if let Some(visible) = visible {
            regions = regions.broadcast_mul(visible)?;
        }
        let means = regions.sum_keepdim(1)?.broadcast_mul(shares)?;
        let rows = Tensor::cat(&[&means, &regions], 1)?.flatten(0, 1)?;
        Ok(ImageFeatures { rows, means: Some(means.squeeze(1)?) })
    }
}

/// Where a packed row's embedding comes from.
enum Origin {
    Text(u32),
    Image(u32),
}

/// Collects groups of rows; see [`PackedBatch`].
pub struct Packer<'a> {
    config: &'a ModelConfig,
    statistics: &'a RegionStatistics,
    ids: Vec<u32>,
    positions: Vec<u32>,
    features: Vec<f32>,
    boxes: Vec<f32>,
    grid_boxes: Vec<f32>,
    pictures: Vec<u32>,
    visible: Vec<f32>,
    origins: Vec<Origin>,
    plan: AttentionPlan,
}

impl<'a> Packer<'a> {
    /// An empty batch.
    #[must_use]
    pub fn new(model: &'a Unimo) -> Self {
        Self {
            config: model.config(),
            statistics: model.statistics(),
            ids: Vec::new(),
            positions: Vec::new(),
            features: Vec::new(),
            boxes: Vec::new(),
            grid_boxes: region_boxes(model.config().grid),
            pictures: Vec::new(),
            visible: Vec::new(),
            origins: Vec::new(),
            plan: AttentionPlan::default(),
        }
    }

    /// An image, and texts that read it from left to right without being read by it (prefix language model). Returns their rows.
    pub fn image_with_captions(&mut self, regions: Regions, captions: &[&[u32]]) -> ImageRows {
        let start = self.origins.len();
        let image_tokens = self.push_image(regions);
        let mut blocks = vec![QueryBlock { rows: 0..image_tokens, context: 0..0, causal: false }];
        let mut texts = Vec::with_capacity(captions.len());
        for ids in captions {
            let first = self.origins.len();
            self.push_text(ids);
            blocks.push(QueryBlock { rows: first - start..first - start + ids.len(), context: 0..image_tokens, causal: true });
            texts.push(first);
        }
        self.close(start, blocks);
        ImageRows { image: start, texts }
    }

    /// A target that is written from left to right, reading a source that sees itself only: a text, after an image or alone.
    /// Returns the first row of the target.
    pub fn target_after(&mut self, regions: Option<Regions>, source: &[u32], target: &[u32]) -> usize {
        let start = self.origins.len();
        if let Some(regions) = regions {
            self.push_image(regions);
        }
        self.push_text(source);
        let first = self.origins.len();
        self.push_text(target);
        let (seen, end) = (first - start, self.origins.len() - start);
        let source = QueryBlock { rows: 0..seen, context: 0..0, causal: false };
        self.close(start, vec![source, QueryBlock { rows: seen..end, context: 0..seen, causal: true }]);
        first
    }

    /// An image and a text that see each other fully.
    pub fn pair(&mut self, regions: Regions, ids: &[u32]) -> ImageRows {
        let start = self.origins.len();
        self.push_image(regions);
        let text = self.origins.len();
        self.push_text(ids);
        let rows = 0..self.origins.len() - start;
        self.close(start, vec![QueryBlock { rows, context: 0..0, causal: false }]);
        ImageRows { image: start, texts: vec![text] }
    }

    /// A text alone. Returns its first row.
    pub fn text(&mut self, ids: &[u32], causal: bool) -> usize {
        let start = self.origins.len();
        self.push_text(ids);
        self.close(start, vec![QueryBlock { rows: 0..ids.len(), context: 0..0, causal }]);
        start
    }

    fn push_text(&mut self, ids: &[u32]) {
        for (position, &id) in ids.iter().enumerate() {
            self.origins.push(Origin::Text(self.ids.len() as u32));
            self.ids.push(id);
            self.positions.push(position as u32);
        }
    }

    /// Appends `[IMG]` and the regions of an image, and gives the number of rows.
    fn push_image(&mut self, regions: Regions) -> usize {
        let first = self.boxes.len() / 5;
        match regions.boxes {
            Some(boxes) => {
                self.boxes.extend(WHOLE_IMAGE);
                self.boxes.extend_from_slice(boxes);
            }
            None => self.boxes.extend_from_slice(&self.grid_boxes),
        }
        let tokens = self.boxes.len() / 5 - first;
        match regions.features {
            Features::Values(values) => self.push_values(values, tokens - 1, regions.masked),
            Features::Picture(picture) => {
                self.pictures.push(picture as u32);
                let first = self.visible.len();
                self.visible.resize(first + tokens - 1, 1.0);
                regions.masked.iter().for_each(|&region| self.visible[first + region] = 0.0);
            }
        }
        self.origins.extend((first..first + tokens).map(|row| Origin::Image(row as u32)));
        tokens
    }

    fn push_values(&mut self, values: &[f32], count: usize, masked: &[usize]) {
        let width = self.config.region_feature;
        debug_assert_eq!(values.len(), count * width);
        let mean_at = self.features.len();
        self.features.resize(mean_at + width, 0.0);
        let share = 1.0 / (count - masked.len()).max(1) as f32;
        let standard = self.statistics.standardise(values);
        for (r, feature) in standard.chunks_exact(width).enumerate() {
            if masked.contains(&r) {
                self.features.resize(self.features.len() + width, 0.0);
            } else {
                self.features.extend_from_slice(feature);
                for (mean, value) in self.features[mean_at..mean_at + width].iter_mut().zip(feature) {
                    *mean += value * share;
                }
            }
        }
    }

    fn close(&mut self, start: usize, blocks: Vec<QueryBlock>) {
        self.plan.groups.push(AttentionGroup { start, len: self.origins.len() - start, blocks });
    }

    /// Moves the batch to the device.
    ///
    /// # Errors
    /// Images given by value and images given by picture in one batch, and those of candle.
    pub fn finish(self, device: &Device) -> Result<PackedBatch> {
        let texts = self.ids.len() as u32;
        let order: Arc<[u32]> = self
            .origins
            .iter()
            .map(|origin| match origin {
                Origin::Text(i) => *i,
                Origin::Image(i) => texts + i,
            })
            .collect();
        let (mut features, mut boxes) = (None, None);
        if !self.boxes.is_empty() {
            let rows = self.boxes.len() / 5;
            features = Some(if self.pictures.is_empty() {
                PackedFeatures::Values(Tensor::from_vec(self.features, (rows, self.config.region_feature), device)?)
            } else if self.features.is_empty() {
                let (images, count) = (self.pictures.len(), self.config.regions());
                let seen = self.visible.chunks_exact(count).map(|v| 1.0 / v.iter().sum::<f32>().max(1.0)).collect();
                let visible = self.visible.contains(&0.0).then(|| Tensor::from_vec(self.visible, (images, count, 1), device));
                PackedFeatures::Pictures {
                    of: self.pictures.into(),
                    visible: visible.transpose()?,
                    shares: Tensor::from_vec(seen, (images, 1, 1), device)?,
                }
            } else {
                candle_core::bail!("a batch takes the features of all its images from one place")
            });
            boxes = Some(Tensor::from_vec(self.boxes, (rows, 5), device)?);
        }
        Ok(PackedBatch {
            ids: self.ids.into(),
            positions: self.positions.into(),
            features,
            boxes,
            order,
            plan: Arc::new(self.plan),
        })
    }
}

/// Box of `[IMG]`.
pub(super) const WHOLE_IMAGE: [f32; 5] = [0.0, 0.0, 1.0, 1.0, 1.0];

/// Boxes of `[IMG]` and of the grid's cells in row-major order, `[1 + grid², 5]`: x1, y1, x2, y2, area, in shares of the image.
#[must_use]
pub fn region_boxes(grid: usize) -> Vec<f32> {
    let side = grid as f32;
    let mut boxes = WHOLE_IMAGE.to_vec();
    for row in 0..grid {
        for column in 0..grid {
            let (x, y) = (column as f32, row as f32);
            boxes.extend([x / side, y / side, (x + 1.0) / side, (y + 1.0) / side, 1.0 / (side * side)]);
        }
    }
    boxes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dropout;
    use crate::regions::Detected;

    /// Standardised rows of one packed image.
    fn rows(model: &Unimo, features: &[f32], masked: &[usize]) -> Vec<Vec<f32>> {
        let mut packer = Packer::new(model);
        packer.image_with_captions(Regions::masked(features, masked), &[]);
        let features = packer.finish(&Device::Cpu).unwrap().features.unwrap();
        features.standardised(None, model.statistics()).unwrap().rows.to_vec2().unwrap()
    }

    #[test]
    fn what_a_masked_region_holds_reaches_no_row() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.set_statistics(RegionStatistics { mean: vec![1.0, 2.0, 3.0], deviation: vec![0.5, 1.0, 2.0] }).unwrap();
        let features: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let mut changed = features.clone();
        changed[3..6].fill(1e3);

        let seen = rows(&model, &features, &[1]);
        assert_eq!(seen, rows(&model, &changed, &[1]));
        assert_ne!(rows(&model, &features, &[]), rows(&model, &changed, &[]));
        assert_eq!(seen[2], [0.0; 3]);
        // Regions 0, 2 and 3 are visible: [IMG] is their mean, and theirs alone.
        assert_eq!(seen[1], [-2.0, -1.0, -0.5]);
        let mean: Vec<f32> = (0..3).map(|i| (seen[1][i] + seen[3][i] + seen[4][i]) / 3.0).collect();
        assert!(seen[0].iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} is not {mean:?}", seen[0]);
    }

    #[test]
    fn the_image_of_detected_regions_is_their_mean_in_the_whole_picture() {
        let config = ModelConfig { grid: 0, detected_regions: 3, region_feature: 2, ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let boxes = vec![0.1, 0.2, 0.3, 0.4, 0.04, 0.0, 0.5, 1.0, 1.0, 0.5];
        let detected = Some(Detected { boxes: boxes.clone(), probabilities: Vec::new() });
        let record = Record { values: vec![1.0, 2.0, 5.0, 8.0], detected };
        let mut packer = Packer::new(&model);
        packer.pair(Regions::of(&record, &[]), &[0, 2]);
        packer.pair(Regions::of(&record, &[0]), &[0, 2]);
        let batch = packer.finish(&Device::Cpu).unwrap();
        let expected = [WHOLE_IMAGE.to_vec(), boxes].concat();
        assert_eq!(batch.boxes.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [expected.clone(), expected].concat());
        let rows = batch.features.unwrap().standardised(None, model.statistics()).unwrap().rows.to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[3.0, 5.0], [1.0, 2.0], [5.0, 8.0], [5.0, 8.0], [0.0, 0.0], [5.0, 8.0]]);
    }

    #[test]
    fn features_of_a_step_are_packed_like_values() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let mut model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        model.set_statistics(RegionStatistics { mean: vec![1.0, 2.0, 3.0], deviation: vec![0.5, 1.0, 2.0] }).unwrap();
        let values: Vec<f32> = (0..24).map(|v| (v as f32).cos()).collect();
        let pictures = Tensor::from_slice(&values, (2, 4, 3), &Device::Cpu).unwrap();
        // The second picture twice, once with a region masked, before the first.
        let images: [(usize, &[usize]); 3] = [(1, &[]), (1, &[2]), (0, &[])];
        let (mut by_value, mut by_picture) = (Packer::new(&model), Packer::new(&model));
        for (picture, masked) in images {
            by_value.image_with_captions(Regions::masked(&values[picture * 12..(picture + 1) * 12], masked), &[]);
            by_picture.image_with_captions(Regions { features: Features::Picture(picture), boxes: None, masked }, &[]);
        }
        let rows = |packer: Packer, pictures: Option<&Tensor>| {
            let features = packer.finish(&Device::Cpu).unwrap().features.unwrap();
            features.standardised(pictures, model.statistics()).unwrap().rows.to_vec2::<f32>().unwrap()
        };
        let expected = rows(by_value, None);
        let got = rows(by_picture, Some(&pictures));
        assert_eq!(expected.len(), 15);
        for (a, b) in expected.iter().flatten().zip(got.iter().flatten()) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    /// Hidden states of a source and a target packed together, and the row at which the target starts.
    fn source_and_target(model: &Unimo, with_image: bool, source: &[u32], target: &[u32]) -> (Vec<Vec<f32>>, usize) {
        let features: Vec<f32> = (0..12).map(|v| (v as f32).sin()).collect();
        let mut packer = Packer::new(model);
        let first = packer.target_after(with_image.then(|| Regions::visible(&features)), source, target);
        let hidden = model.evaluate(&packer.finish(&Device::Cpu).unwrap()).unwrap();
        (hidden.to_vec2().unwrap(), first)
    }

    #[test]
    fn a_target_reads_its_source_and_its_own_past_and_the_source_reads_neither_future_nor_target() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        for with_image in [false, true] {
            let (plain, first) = source_and_target(&model, with_image, &[0, 9, 2], &[0, 7, 8, 2]);
            assert_eq!((first, plain.len()), (if with_image { 8 } else { 3 }, first + 4));
            let (other, _) = source_and_target(&model, with_image, &[0, 9, 2], &[0, 7, 5, 2]);
            for row in 0..plain.len() {
                assert_eq!(near(&plain[row], &other[row]), row < first + 2, "row {row} of a changed target");
            }
            let (other, _) = source_and_target(&model, with_image, &[0, 6, 2], &[0, 7, 8, 2]);
            assert!((0..plain.len()).all(|row| !near(&plain[row], &other[row])), "a changed source is not read everywhere");
        }
    }

    #[test]
    fn a_batch_of_pictures_needs_them() {
        let config = ModelConfig { grid: 2, region_feature: 3, ..ModelConfig::named("pico").unwrap() };
        let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
        let mut packer = Packer::new(&model);
        packer.image_with_captions(Regions { features: Features::Picture(0), boxes: None, masked: &[] }, &[]);
        let batch = packer.finish(&Device::Cpu).unwrap();
        assert!(model.forward(&batch, None, Dropout::OFF).is_err());
    }
}
