//! Whether a scene has changed enough to be worth a new caption.
//!
//! Two looks, a cheap one first. Frames whose pixels are those of the last frame that the model has seen, but for the noise of a
//! camera, are not shown to it. Of the others the model makes an embedding, and where that lies within a cosine distance of the
//! last captioned frame's, the caption is not made again. Both compare with a frame that stays, never with the one just before:
//! a change that creeps is noticed when it has become large enough.

use image::RgbImage;

/// Blocks that a frame is divided into.
const COLUMNS: u32 = 32;
const ROWS: u32 = 24;
/// Pixels of a block that are looked at, in each direction.
const SAMPLES: u32 = 8;
/// Largest difference of a block's mean, of 255 levels, that counts as noise. A camera's noise of 5 levels a pixel gives means of
/// 64 pixels a difference of 0.9; among 2304 of them (blocks and colours) four times that is rare.
const NOISE: u32 = 5;

/// The state of both looks.
#[derive(Debug)]
pub struct Gate {
    distance: Option<f32>,
    /// Block sums of the last frame that the model has seen; empty before the first.
    seen: Vec<[u32; 3]>,
    /// Those of the frame at hand.
    now: Vec<[u32; 3]>,
    /// The embedding of the last frame that was captioned; empty before the first.
    captioned: Vec<f32>,
}

impl Gate {
    /// A gate that keeps back frames within a cosine distance, or none.
    #[must_use]
    pub fn new(distance: Option<f32>) -> Self {
        Self { distance, seen: Vec::new(), now: Vec::new(), captioned: Vec::new() }
    }

    /// Whether a frame looks as the last one did that the model has seen. If not, the model is to see it.
    pub fn same_pixels(&mut self, frame: &RgbImage) -> bool {
        if self.distance.is_none() || frame.width() == 0 || frame.height() == 0 {
            return false;
        }
        block_sums(frame, &mut self.now);
        let limit = NOISE * SAMPLES * SAMPLES;
        let is_noise = |(a, b): (&[u32; 3], &[u32; 3])| a.iter().zip(b).all(|(a, b)| a.abs_diff(*b) <= limit);
        let same = self.seen.len() == self.now.len() && self.seen.iter().zip(&self.now).all(is_noise);
        if !same {
            std::mem::swap(&mut self.seen, &mut self.now);
        }
        same
    }

    /// Whether a frame's unit-length embedding is as near to the last captioned one's as the gate allows. If not, the frame is to
    /// be captioned.
    pub fn same_scene(&mut self, embedding: &[f32]) -> bool {
        let Some(limit) = self.distance else { return false };
        if self.captioned.len() == embedding.len() && distance(&self.captioned, embedding) < limit {
            return true;
        }
        self.captioned.clear();
        self.captioned.extend_from_slice(embedding);
        false
    }
}

/// Cosine distance of unit vectors.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    1.0 - a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
}

/// Sums of the sampled pixels of each block.
fn block_sums(frame: &RgbImage, sums: &mut Vec<[u32; 3]>) {
    sums.clear();
    sums.resize((COLUMNS * ROWS) as usize, [0; 3]);
    let (width, height) = (u64::from(frame.width()), u64::from(frame.height()));
    // Samples lie in the middle of equal parts of the side.
    let place = |i: u32, parts: u32, side: u64| ((u64::from(i) * 2 + 1) * side / (u64::from(parts) * 2)) as usize;
    let stride = frame.width() as usize * 3;
    for i in 0..ROWS * SAMPLES {
        let row = &frame.as_raw()[place(i, ROWS * SAMPLES, height) * stride..][..stride];
        let blocks = &mut sums[((i / SAMPLES) * COLUMNS) as usize..][..COLUMNS as usize];
        for j in 0..COLUMNS * SAMPLES {
            let at = place(j, COLUMNS * SAMPLES, width) * 3;
            for (sum, &value) in blocks[(j / SAMPLES) as usize].iter_mut().zip(&row[at..at + 3]) {
                *sum += u32::from(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    /// A room: a gradient with a dark box in it.
    fn room(width: u32, height: u32, box_at: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let inside = x >= box_at && x < box_at + width / 20 && y > height / 2 && y < height / 2 + height / 15;
            if inside { Rgb([20, 20, 30]) } else { Rgb([(x * 200 / width) as u8, 120, (y * 200 / height) as u8]) }
        })
    }

    /// Noise of so many levels either way, different for every seed.
    fn noisy(frame: &RgbImage, levels: i32, seed: u64) -> RgbImage {
        let mut state = seed;
        let mut noisy = frame.clone();
        for value in noisy.as_flat_samples_mut().samples {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let noise = (state >> 33) as i32 % (2 * levels + 1) - levels;
            *value = (i32::from(*value) + noise).clamp(0, 255) as u8;
        }
        noisy
    }

    #[test]
    fn noise_is_no_change() {
        let (mut gate, still) = (Gate::new(Some(0.03)), room(640, 480, 100));
        assert!(!gate.same_pixels(&still), "the first frame is new");
        for seed in 0..20 {
            // Uniform noise of ±8 levels has a standard deviation of 4.9.
            assert!(gate.same_pixels(&noisy(&still, 8, seed)), "{seed}");
        }
    }

    #[test]
    fn a_small_thing_that_moves_is_a_change() {
        // A box of a twentieth of the width moves by its width; by night, all becomes dark; another size is another camera.
        for size in [(640, 480), (1280, 720), (224, 224), (64, 48)] {
            let mut gate = Gate::new(Some(0.03));
            assert!(!gate.same_pixels(&room(size.0, size.1, size.0 / 4)));
            assert!(!gate.same_pixels(&room(size.0, size.1, size.0 / 4 + size.0 / 20)), "{size:?}");
            assert!(gate.same_pixels(&room(size.0, size.1, size.0 / 4 + size.0 / 20)), "{size:?}");
            assert!(!gate.same_pixels(&RgbImage::new(size.0, size.1)));
        }
        // A colour of the same brightness is another colour.
        let mut gate = Gate::new(Some(0.03));
        assert!(!gate.same_pixels(&RgbImage::from_pixel(64, 48, Rgb([100, 100, 100]))));
        assert!(!gate.same_pixels(&RgbImage::from_pixel(64, 48, Rgb([110, 95, 100]))));
    }

    #[test]
    fn a_creeping_change_is_noticed() {
        let mut gate = Gate::new(Some(0.03));
        let grey = |level: u8| RgbImage::from_pixel(64, 48, Rgb([level; 3]));
        let seen: Vec<u8> = (100..=130).filter(|&level| !gate.same_pixels(&grey(level))).collect();
        assert_eq!(seen, [100, 106, 112, 118, 124, 130]);

        let at = |angle: f32| [angle.cos(), angle.sin()];
        let captioned: Vec<u32> = (0..60).filter(|&step| !gate.same_scene(&at(step as f32 * 0.02))).collect();
        // 1 − cos 0.24 is 0.0287, 1 − cos 0.26 is 0.0336.
        assert_eq!(captioned, [0, 13, 26, 39, 52]);
    }

    #[test]
    fn without_a_gate_everything_is_new() {
        let mut gate = Gate::new(None);
        for _ in 0..2 {
            assert!(!gate.same_pixels(&room(64, 48, 3)));
            assert!(!gate.same_scene(&[1.0, 0.0]));
        }
    }
}
