//! Packing images and texts of different lengths into one flat batch, without padding.

use candle_core::{Device, Result, Tensor};

use super::{ModelConfig, RegionStatistics, Unimo};
use crate::ops::{AttentionGroup, AttentionPlan, QueryBlock};

/// Region features of one image, `[regions · region_feature]`, and which regions are hidden from the model.
#[derive(Clone, Copy)]
pub struct Regions<'a> {
    /// Row-major features, as the backbone gives them.
    pub features: &'a [f32],
    /// Regions whose features are zeroed (after standardisation) and left out of the mean that makes `[IMG]`.
    pub masked: &'a [usize],
}

impl<'a> Regions<'a> {
    /// All regions visible.
    #[must_use]
    pub fn visible(features: &'a [f32]) -> Self {
        Self { features, masked: &[] }
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
    pub(super) ids: Tensor,
    /// Position of each text row inside its text.
    pub(super) positions: Tensor,
    /// Standardised, `[images · image_tokens, region_feature]`, `[IMG]`'s mean included; absent without images.
    pub(super) features: Option<Tensor>,
    /// `[images · image_tokens, 5]`.
    pub(super) boxes: Option<Tensor>,
    /// For each packed row, its place in texts ++ images.
    pub(super) order: Tensor,
    /// Who sees whom.
    pub(super) plan: std::sync::Arc<AttentionPlan>,
}

impl PackedBatch {
    /// Number of packed rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.plan.rows()
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
    images: usize,
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
            images: 0,
            origins: Vec::new(),
            plan: AttentionPlan::default(),
        }
    }

    /// An image, and texts that read it from left to right without being read by it (prefix language model). Returns their rows.
    pub fn image_with_captions(&mut self, regions: Regions, captions: &[&[u32]]) -> ImageRows {
        let start = self.origins.len();
        self.push_image(regions);
        let image_tokens = self.config.image_tokens();
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

    fn push_image(&mut self, regions: Regions) {
        let width = self.config.region_feature;
        let count = self.config.regions();
        debug_assert_eq!(regions.features.len(), count * width);
        let mean_at = self.features.len();
        self.features.resize(mean_at + width, 0.0);
        let share = 1.0 / (count - regions.masked.len()).max(1) as f32;
        let standard = self.statistics.standardise(regions.features);
        for (r, feature) in standard.chunks_exact(width).enumerate() {
            if regions.masked.contains(&r) {
                self.features.resize(self.features.len() + width, 0.0);
            } else {
                self.features.extend_from_slice(feature);
                for (mean, value) in self.features[mean_at..mean_at + width].iter_mut().zip(feature) {
                    *mean += value * share;
                }
            }
        }
        for token in 0..=count {
            self.origins.push(Origin::Image((self.images * (count + 1) + token) as u32));
        }
        self.images += 1;
    }

    fn close(&mut self, start: usize, blocks: Vec<QueryBlock>) {
        self.plan.groups.push(AttentionGroup { start, len: self.origins.len() - start, blocks });
    }

    /// Moves the batch to the device.
    ///
    /// # Errors
    /// Those of candle.
    pub fn finish(self, device: &Device) -> Result<PackedBatch> {
        let texts = self.ids.len() as u32;
        let order: Vec<u32> = self
            .origins
            .iter()
            .map(|origin| match origin {
                Origin::Text(i) => *i,
                Origin::Image(i) => texts + i,
            })
            .collect();
        let (mut features, mut boxes) = (None, None);
        if self.images > 0 {
            let rows = self.images * self.config.image_tokens();
            features = Some(Tensor::from_vec(self.features, (rows, self.config.region_feature), device)?);
            let one = region_boxes(self.config.grid);
            boxes = Some(Tensor::from_vec(one.repeat(self.images), (rows, 5), device)?);
        }
        Ok(PackedBatch {
            ids: Tensor::new(self.ids.as_slice(), device)?,
            positions: Tensor::new(self.positions.as_slice(), device)?,
            features,
            boxes,
            order: Tensor::new(order.as_slice(), device)?,
            plan: std::sync::Arc::new(self.plan),
        })
    }
}

/// Boxes of `[IMG]` and of the grid's cells in row-major order, `[1 + grid², 5]`: x1, y1, x2, y2, area, in shares of the image.
#[must_use]
pub fn region_boxes(grid: usize) -> Vec<f32> {
    let side = grid as f32;
    let mut boxes = vec![0.0, 0.0, 1.0, 1.0, 1.0];
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

    /// Standardised rows of one packed image.
    fn rows(model: &Unimo, features: &[f32], masked: &[usize]) -> Vec<Vec<f32>> {
        let mut packer = Packer::new(model);
        packer.image_with_captions(Regions { features, masked }, &[]);
        packer.finish(&Device::Cpu).unwrap().features.unwrap().to_vec2().unwrap()
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
}
