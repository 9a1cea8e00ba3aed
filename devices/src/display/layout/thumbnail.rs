//! A small picture of a frame.

use crate::display::{Colours, luma};

/// Bayer's matrix of order 4: thresholds of 16 neighbouring pixels, spread as evenly as can be.
const BAYER: [[u8; 4]; 4] = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]];

/// A frame made small: `[height, width, 3]`, red, green and blue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thumbnail {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) pixels: Vec<[u8; 3]>,
}

impl Thumbnail {
    /// Makes a frame small enough for `room` (width and height), its sides in proportion; each pixel is the mean of those that it
    /// stands for. Smaller frames are made larger. For two colours it is dithered.
    ///
    /// A frame whose `pixels`, `[height, width, 3]`, are not as many as its size says becomes an empty thumbnail.
    #[must_use]
    pub fn new(pixels: &[u8], width: u32, height: u32, room: (u32, u32), colours: Colours) -> Self {
        let pixels = pixels.as_chunks::<3>().0;
        let (size, fits) = scaled((width, height), room);
        if !fits || pixels.len() as u64 != u64::from(width) * u64::from(height) {
            return Self { width: 0, height: 0, pixels: Vec::new() };
        }
        let mut small: Vec<[u8; 3]> = Vec::with_capacity(size.0 as usize * size.1 as usize);
        for y in 0..size.1 {
            let rows = span(y, size.1, height);
            small.extend((0..size.0).map(|x| mean(pixels, width as usize, span(x, size.0, width), rows.clone())));
        }
        if colours == Colours::Two {
            dither(&mut small, size.0 as usize);
        }
        Self { width: size.0, height: size.1, pixels: small }
    }
}

/// The size of a picture in a room, and whether there is any picture.
fn scaled((width, height): (u32, u32), room: (u32, u32)) -> ((u32, u32), bool) {
    if width == 0 || height == 0 || room.0 == 0 || room.1 == 0 {
        return ((0, 0), false);
    }
    let part = |a: u32, b: u32, c: u32| ((u64::from(a) * u64::from(b) + u64::from(c) / 2) / u64::from(c)).max(1) as u32;
    let by_width = (room.0, part(height, room.0, width));
    let size = if by_width.1 <= room.1 { by_width } else { (part(width, room.1, height).min(room.0), room.1) };
    (size, true)
}

/// The pixels of a side that pixel `at` of `to` stands for, of `from` in all; at least one.
fn span(at: u32, to: u32, from: u32) -> std::ops::Range<usize> {
    let place = |at: u32| (u64::from(at) * u64::from(from) / u64::from(to)) as usize;
    let start = place(at);
    start..place(at + 1).max(start + 1)
}

fn mean(pixels: &[[u8; 3]], width: usize, columns: std::ops::Range<usize>, rows: std::ops::Range<usize>) -> [u8; 3] {
    let count = (columns.len() * rows.len()) as u32;
    let mut sums = [0u32; 3];
    for y in rows {
        for pixel in &pixels[y * width + columns.start..y * width + columns.end] {
            for (sum, &value) in sums.iter_mut().zip(pixel) {
                *sum += u32::from(value);
            }
        }
    }
    sums.map(|sum| ((sum + count / 2) / count) as u8)
}

/// Makes pixels black or white, so many of them white as they are bright.
fn dither(pixels: &mut [[u8; 3]], width: usize) {
    for (y, row) in pixels.chunks_mut(width).enumerate() {
        for (x, pixel) in row.iter_mut().enumerate() {
            let threshold = u32::from(BAYER[y % 4][x % 4]) * 16 + 8;
            let white = u32::from(luma(pixel[0], pixel[1], pixel[2])) > threshold;
            *pixel = [if white { 255 } else { 0 }; 3];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_stay_in_proportion() {
        let cases = [
            ((640, 480), (40, 64), (40, 30)),
            ((480, 640), (40, 64), (40, 53)),
            ((1920, 1080), (144, 108), (144, 81)),
            ((100, 1000), (40, 40), (4, 40)),
            ((5000, 1), (40, 40), (40, 1)),
            ((10, 8), (40, 40), (40, 32)),
            ((10, 8), (35, 40), (35, 28)),
            ((0, 8), (35, 40), (0, 0)),
            ((8, 8), (0, 40), (0, 0)),
        ];
        for (frame, room, expected) in cases {
            let pixels = vec![7; frame.0 as usize * frame.1 as usize * 3];
            let thumbnail = Thumbnail::new(&pixels, frame.0, frame.1, room, Colours::Many);
            assert_eq!((thumbnail.width, thumbnail.height), expected, "{frame:?} in {room:?}");
            assert_eq!(thumbnail.pixels.len() as u32, expected.0 * expected.1);
            assert!(thumbnail.pixels.iter().all(|pixel| *pixel == [7; 3]));
        }
        let doubled = Thumbnail::new(&[1, 1, 1, 2, 2, 2], 2, 1, (4, 9), Colours::Many);
        assert_eq!(doubled.pixels, [[1; 3], [1; 3], [2; 3], [2; 3], [1; 3], [1; 3], [2; 3], [2; 3]]);
        let cut = Thumbnail::new(&[0; 11], 2, 2, (9, 9), Colours::Many);
        assert!(cut.pixels.is_empty(), "a frame with too few pixels");
    }

    #[test]
    fn pixels_are_means() {
        // 5 × 2 in 2 × 1: columns 0 and 1 against 2, 3 and 4.
        let row = |values: [u8; 5]| values.map(|v| [v, 0, 255 - v]);
        let pixels = [row([0, 10, 100, 110, 120]), row([20, 30, 40, 50, 60])].concat().concat();
        let thumbnail = Thumbnail::new(&pixels, 5, 2, (2, 9), Colours::Many);
        assert_eq!(thumbnail.pixels, [[15, 0, 240], [80, 0, 175]]);
    }

    #[test]
    fn two_colours_keep_the_brightness() {
        for (grey, white) in [(0, 0), (20, 16), (64, 64), (128, 128), (200, 192), (255, 256)] {
            let thumbnail = Thumbnail::new(&[grey; 16 * 16 * 3], 16, 16, (16, 16), Colours::Two);
            let found = thumbnail.pixels.iter().filter(|pixel| **pixel == [255; 3]).count();
            assert!(thumbnail.pixels.iter().all(|pixel| [[0; 3], [255; 3]].contains(pixel)));
            assert!(found.abs_diff(white) <= 16, "{grey}: {found} of 256 white");
        }
    }
}
