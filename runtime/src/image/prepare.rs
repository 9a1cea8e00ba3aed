//! From a picture to the tensor that the model reads.

use ::image::RgbImage;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};

/// How a picture is resampled to the model's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeFilter {
    /// The nearest pixel.
    Nearest,
    /// Linear, widened by the reduction factor (no aliasing).
    Triangle,
    /// Cubic, Catmull–Rom.
    CatmullRom,
    /// Lanczos with three lobes.
    Lanczos3,
}

impl ResizeFilter {
    fn algorithm(self) -> ResizeAlg {
        match self {
            Self::Nearest => ResizeAlg::Nearest,
            Self::Triangle => ResizeAlg::Convolution(FilterType::Bilinear),
            Self::CatmullRom => ResizeAlg::Convolution(FilterType::CatmullRom),
            Self::Lanczos3 => ResizeAlg::Convolution(FilterType::Lanczos3),
        }
    }
}

/// How a picture becomes the model's input: `(pixel - mean) / std` with pixels in 0..=255, layout `[3, height, width]`, RGB.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagePreparation {
    /// Width of the tensor in pixels.
    pub width: u32,
    /// Height of the tensor in pixels.
    pub height: u32,
    /// Resampling filter.
    pub filter: ResizeFilter,
    /// Subtracted from each channel, in 0..=255.
    pub mean: [f32; 3],
    /// Divides each channel, in 0..=255.
    pub std: [f32; 3],
}

impl Default for ImagePreparation {
    /// 224×224, triangle filter, values in [−1, 1]: what the MobileNetV2 backbone was trained on.
    fn default() -> Self {
        Self { width: 224, height: 224, filter: ResizeFilter::Triangle, mean: [127.5; 3], std: [127.5; 3] }
    }
}

impl ImagePreparation {
    /// The tensor `[3, height, width]` of a picture, squashed (not cropped) to size.
    ///
    /// A picture that already has the size is not resampled. The filters work in fixed point, so every board computes the
    /// same bytes. A picture without pixels, which [`decode`](super::decode) never returns, gives a black one.
    #[must_use]
    pub fn tensor(&self, image: &RgbImage) -> Vec<f32> {
        let plane = self.width as usize * self.height as usize;
        let resized;
        let pixels: &[u8] = if image.dimensions() == (self.width, self.height) {
            image.as_raw()
        } else {
            resized = self.resize(image).unwrap_or_else(|| vec![0; 3 * plane]);
            &resized
        };
        let mut tensor = vec![0.0; 3 * plane];
        for (channel, values) in tensor.chunks_exact_mut(plane.max(1)).enumerate() {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            for (value, pixel) in values.iter_mut().zip(pixels.chunks_exact(3)) {
                *value = (f32::from(pixel[channel]) - mean) / std;
            }
        }
        tensor
    }

    /// RGB bytes at the model's size; `None` where either picture has no pixels.
    fn resize(&self, image: &RgbImage) -> Option<Vec<u8>> {
        let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3).ok()?;
        let mut target = Image::new(self.width, self.height, PixelType::U8x3);
        let options = ResizeOptions::new().resize_alg(self.filter.algorithm());
        Resizer::new().resize(&source, &mut target, &options).ok()?;
        Some(target.into_vec())
    }
}

#[cfg(test)]
mod tests {
    use ::image::Rgb;

    use super::*;

    /// Left half red, right half blue, with enough texture for the JPEG scan to have a length.
    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let noise = (x * 7 + y * 13) as u8 % 24;
            if x < width / 2 { Rgb([220, noise, noise]) } else { Rgb([noise, noise, 220]) }
        })
    }

    #[test]
    fn exact_size_is_not_resampled() {
        let image = picture(16, 8);
        let preparation =
            ImagePreparation { width: 16, height: 8, filter: ResizeFilter::Lanczos3, mean: [0.0; 3], std: [1.0; 3] };
        let tensor = preparation.tensor(&image);
        for (x, y, pixel) in image.enumerate_pixels() {
            for c in 0..3 {
                let value = tensor[c * 128 + (y * 16 + x) as usize];
                assert_eq!(value, f32::from(pixel.0[c]), "({x}, {y}, {c})");
            }
        }
    }

    #[test]
    fn squashes_and_normalises() {
        let preparation = ImagePreparation::default();
        let tensor = preparation.tensor(&picture(640, 100));
        assert_eq!(tensor.len(), 3 * 224 * 224);
        assert!(tensor.iter().all(|v| (-1.0..=1.0).contains(v)));
        let at = |c: usize, y: usize, x: usize| tensor[c * 224 * 224 + y * 224 + x];
        // 220 / 127.5 - 1; the flat red channel keeps its value under any normalised filter.
        let red = 220.0 / 127.5 - 1.0;
        assert!((at(0, 112, 20) - red).abs() < 1e-6);
        assert!((at(2, 112, 200) - red).abs() < 1e-6);
        assert!(at(2, 112, 20) < -0.8);
    }

    #[test]
    fn averages_when_shrinking() {
        // A one-pixel checkerboard becomes mid-grey under every filter with support, not one of its two colours.
        let board = RgbImage::from_fn(64, 64, |x, y| Rgb([if (x + y) % 2 == 0 { 255 } else { 0 }; 3]));
        for filter in [ResizeFilter::Triangle, ResizeFilter::CatmullRom, ResizeFilter::Lanczos3] {
            let preparation = ImagePreparation { width: 8, height: 8, filter, ..ImagePreparation::default() };
            for value in preparation.tensor(&board) {
                assert!(value.abs() < 0.02, "{filter:?}: {value}");
            }
        }
    }
}
