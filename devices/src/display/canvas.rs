//! A picture in memory to draw on.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{Dimensions, OriginDimensions, Point, Size};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::primitives::Rectangle;

/// Pixels of red, green and blue, `[height, width, 3]`, black at first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canvas {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Canvas {
    /// A black canvas.
    #[must_use]
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![0; width as usize * height as usize * 3] }
    }

    /// Pixels from left to right.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels from top to bottom.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// All pixels, `[height, width, 3]`.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Makes all pixels black.
    pub fn clear_black(&mut self) {
        self.pixels.fill(0);
    }

    /// The colours of the pixels, row by row.
    pub(super) fn colours(&self) -> impl Iterator<Item = [u8; 3]> {
        self.pixels.as_chunks::<3>().0.iter().copied()
    }

    /// The pixels of a row.
    pub(super) fn row(&self, y: u32) -> &[[u8; 3]] {
        let width = self.width as usize;
        &self.pixels.as_chunks::<3>().0[y as usize * width..][..width]
    }

    pub(super) fn row_mut(&mut self, y: u32) -> &mut [[u8; 3]] {
        let width = self.width as usize;
        &mut self.pixels.as_chunks_mut::<3>().0[y as usize * width..][..width]
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(Point { x, y }, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
                && x < self.width
                && y < self.height
            {
                self.row_mut(y)[x as usize] = [colour.r(), colour.g(), colour.b()];
            }
        }
        Ok(())
    }

    fn fill_solid(&mut self, area: &Rectangle, colour: Rgb888) -> Result<(), Infallible> {
        let area = area.intersection(&self.bounding_box());
        // What is left of the area lies inside: its corner is not negative.
        let (left, top) = (area.top_left.x.unsigned_abs(), area.top_left.y.unsigned_abs());
        for y in top..top + area.size.height {
            self.row_mut(y)[left as usize..][..area.size.width as usize].fill([colour.r(), colour.g(), colour.b()]);
        }
        Ok(())
    }
}

/// A drawing as lines of text, which a test can show: `#` where the pixel is bright, `.` where it is not.
#[cfg(test)]
pub(super) fn art(canvas: &Canvas) -> String {
    let mut art = String::new();
    for y in 0..canvas.height {
        art.extend(canvas.row(y).iter().map(|&colour| if super::is_bright(colour) { '#' } else { '.' }));
        art.push('\n');
    }
    art
}

#[cfg(test)]
mod tests {
    use embedded_graphics::prelude::*;
    use embedded_graphics::primitives::{Circle, PrimitiveStyle};

    use super::*;

    #[test]
    fn drawings_are_clipped() {
        let mut canvas = Canvas::new(6, 4);
        Circle::new(Point::new(-2, -2), 6).into_styled(PrimitiveStyle::with_fill(Rgb888::WHITE)).draw(&mut canvas).unwrap();
        Rectangle::new(Point::new(4, 2), Size::new(9, 9))
            .into_styled(PrimitiveStyle::with_fill(Rgb888::GREEN))
            .draw(&mut canvas)
            .unwrap();
        canvas.fill_solid(&Rectangle::new(Point::new(-9, -9), Size::new(5, 5)), Rgb888::WHITE).unwrap();
        assert_eq!(art(&canvas), "####..\n####..\n######\n###.##\n");
        assert_eq!(canvas.row(3)[5], [0, 255, 0]);
        for (x, y) in [(6, 0), (-1, 1), (5, 4), (0, -1)] {
            Pixel(Point::new(x, y), Rgb888::WHITE).draw(&mut canvas).unwrap();
        }
        Pixel(Point::new(5, 0), Rgb888::WHITE).draw(&mut canvas).unwrap();
        assert_eq!(art(&canvas), "####.#\n####..\n######\n###.##\n");
        canvas.clear_black();
        assert_eq!(canvas, Canvas::new(6, 4));
    }
}
