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

    /// Number of tokens behind the `[CLS]` at a row.
    pub(super) fn tokens_behind(&self, row: usize) -> Result<usize> {
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
        self.features.reserve((count + 1) * width);
        self.features.resize(mean_at + width, 0.0);
        let share = 1.0 / (count - masked.len()).max(1) as f32;
        for (r, feature) in values.chunks_exact(width).enumerate() {
            let at = self.features.len();
            if masked.contains(&r) {
                self.features.resize(at + width, 0.0);
                continue;
            }
            self.statistics.push_standardised(feature, &mut self.features);
            let (before, standard) = self.features.split_at_mut(at);
            for (mean, value) in before[mean_at..mean_at + width].iter_mut().zip(standard) {
                *mean += *value * share;
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
                PackedFeatures::Values(ops::from_host(self.features, (rows, self.config.region_feature), device)?)
            } else if self.features.is_empty() {
                let (images, count) = (self.pictures.len(), self.config.regions());
                let seen = self.visible.chunks_exact(count).map(|v| 1.0 / v.iter().sum::<f32>().max(1.0)).collect();
                let visible = self.visible.contains(&0.0).then(|| ops::from_host(self.visible, (images, count, 1), device));
                PackedFeatures::Pictures {
                    of: self.pictures.into(),
                    visible: visible.transpose()?,
                    shares: ops::from_host(seen, (images, 1, 1), device)?,
                }
            } else {
                candle_core::bail!("a batch takes the features of all its images from one place")
            });
            boxes = Some(ops::from_host(self.boxes, (rows, 5), device)?);
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
mod tests;
