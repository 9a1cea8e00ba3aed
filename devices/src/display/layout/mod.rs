//! Where caption, picture, latency and temperature go on a screen of any size from 96×16 to 1280×800 and more.
//!
//! The picture is on top, then the caption, then the figures. Small wide screens have no room for that: there the picture is on
//! the left with the figures under it, and the caption on the right. Strips of less than 48 rows have the figures in the last
//! line beside the picture, those of less than 24 rows have none, and those of less than 96 columns have no picture. Sizes of
//! letters follow from the screen alone, so that they do not change with every caption; a caption that is longer than its place
//! scrolls.

mod thumbnail;

use std::fmt::Write;
use std::time::Duration;

use embedded_graphics::geometry::{Point, Size};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::primitives::Rectangle;

pub use self::thumbnail::Thumbnail;
use super::text::{FONTS, Font, readable, wrap};
use super::{Canvas, Colours, Geometry};

/// How long a caption that scrolls stands still at its beginning and at its end.
pub const SCROLL_REST: Duration = Duration::from_millis(2500);
/// How long it takes from a line to the next.
pub const SCROLL_STEP: Duration = Duration::from_millis(800);

/// Characters that most captions have at most, with what is lost where lines break.
const USUAL_CAPTION: u32 = 100;
const FIGURES: Rgb888 = Rgb888::new(170, 170, 170);
const WARM: Rgb888 = Rgb888::new(255, 176, 0);
const HOT: Rgb888 = Rgb888::new(255, 72, 56);
/// Where boards of the Raspberry Pi begin to slow down, and where they must.
const WARM_C: f32 = 70.0;
const HOT_C: f32 = 80.0;

/// What is to be seen.
#[derive(Debug, Clone, Copy, Default)]
pub struct View<'a> {
    /// The caption, or a sentence in its place.
    pub caption: &'a str,
    /// Whether that sentence tells of a fault.
    pub alert: bool,
    /// The picture, made for [`Layout::picture_room`].
    pub thumbnail: Option<&'a Thumbnail>,
    /// Time from the start of the work on a picture to its caption.
    pub latency: Option<Duration>,
    /// The board's temperature.
    pub temperature_c: Option<f32>,
}

/// The places of a screen.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    colours: Colours,
    size: (u32, u32),
    picture: Rectangle,
    caption: Rectangle,
    figures: Rectangle,
    font: Font,
    small: Font,
}

impl Layout {
    /// The places of a screen.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let Geometry { width, height, colours } = geometry;
        let gap = (width.min(height) / 32).clamp(2, 16);
        let small = FONTS[match height {
            0..120 => 0,
            120..240 => 1,
            240..400 => 4,
            400..600 => 5,
            _ => 8,
        }];
        let line = small.cell().height;
        let area =
            |x: u32, y: u32, width: u32, height: u32| Rectangle::new(Point::new(x as i32, y as i32), Size::new(width, height));
        let (picture, caption, figures, font);
        if height < 48 || width < 96 {
            // What the picture leaves is for words; where that would be too little, there is no picture.
            let left = if width < 96 { 0 } else { height * 4 / 3 + gap };
            let (right, rows) = (width.saturating_sub(left), if height < 24 { 0 } else { line });
            picture = area(0, 0, left.saturating_sub(gap), height);
            caption = area(left, 0, right, height - rows);
            figures = area(left, height - rows, right, rows);
            font = font_beside(caption.size);
        } else if height < 160 && width * 4 >= height * 5 {
            let left = width * if width < 200 { 5 } else { 7 } / 16;
            let top = (left * 3 / 4).min(height - line);
            picture = area(0, 0, left, top);
            caption = area(left + gap, 0, width - left - gap, height);
            figures = area(0, top, left, height - top);
            font = font_beside(caption.size);
        } else {
            let margin = if width < 400 { 0 } else { gap };
            let inside = width - 2 * margin;
            font = font_below(inside);
            let cell = font.cell();
            let lines = USUAL_CAPTION.div_ceil((inside / cell.width).max(1)).min(height * 2 / 5 / cell.height).max(1);
            let bottom = height - line;
            let middle = bottom - lines * cell.height;
            picture = area(0, 0, width, middle.saturating_sub(gap));
            caption = area(margin, middle, inside, bottom - middle);
            figures = area(margin, bottom, inside, line);
        }
        Self { colours, size: (width, height), picture, caption, figures, font, small }
    }

    /// Width and height of the picture's place, to make a [`Thumbnail`] for.
    #[must_use]
    pub fn picture_room(&self) -> (u32, u32) {
        (self.picture.size.width, self.picture.size.height)
    }

    /// A thumbnail of a frame, `[height, width, 3]`, for this screen.
    #[must_use]
    pub fn thumbnail(&self, pixels: &[u8], width: u32, height: u32) -> Thumbnail {
        Thumbnail::new(pixels, width, height, self.picture_room(), self.colours)
    }

    /// A black canvas of the screen's size.
    #[must_use]
    pub fn canvas(&self) -> Canvas {
        Canvas::new(self.size.0, self.size.1)
    }

    /// Lines that a caption has beyond those that are seen at once: 0 where it does not scroll.
    #[must_use]
    pub fn hidden_lines(&self, caption: &str) -> usize {
        wrap(&readable(caption), self.columns()).len().saturating_sub(self.rows())
    }

    /// Draws over all of the canvas; of a caption that scrolls, the first `above` lines are passed over.
    pub fn draw(&self, canvas: &mut Canvas, view: &View<'_>, above: usize) {
        canvas.clear_black();
        if let Some(thumbnail) = view.thumbnail {
            self.draw_picture(canvas, thumbnail);
        }
        self.draw_caption(canvas, view, above);
        self.draw_figures(canvas, view);
    }

    fn columns(&self) -> usize {
        (self.caption.size.width / self.font.cell().width) as usize
    }

    fn rows(&self) -> usize {
        (self.caption.size.height / self.font.cell().height) as usize
    }

    fn draw_picture(&self, canvas: &mut Canvas, thumbnail: &Thumbnail) {
        let (x, y) = (self.picture.top_left.x.unsigned_abs(), self.picture.top_left.y.unsigned_abs());
        let (width, height) = self.picture_room();
        // One for another screen is cut.
        let (wide, tall) = (thumbnail.width.min(width), thumbnail.height.min(height));
        let (left, top) = ((x + (width - wide) / 2) as usize, y + (height - tall) / 2);
        let rows = thumbnail.pixels.chunks(thumbnail.width.max(1) as usize);
        for (y, row) in (top..top + tall).zip(rows) {
            canvas.row_mut(y)[left..left + wide as usize].copy_from_slice(&row[..wide as usize]);
        }
    }

    fn draw_caption(&self, canvas: &mut Canvas, view: &View<'_>, above: usize) {
        let caption = readable(view.caption);
        let colour = if view.alert { self.colour(WARM) } else { Rgb888::WHITE };
        let lines = wrap(&caption, self.columns());
        let mut at = self.caption.top_left;
        for line in lines.into_iter().skip(above).take(self.rows()) {
            self.font.draw(canvas, at, &caption[line], colour);
            at.y += self.font.cell().height as i32;
        }
    }

    fn draw_figures(&self, canvas: &mut Canvas, view: &View<'_>) {
        let Size { width, height } = self.small.cell();
        let (columns, rows) = (self.figures.size.width / width, self.figures.size.height / height);
        let latency = view.latency.map(|latency| (in_words(latency), FIGURES));
        let temperature = view.temperature_c.map(|celsius| (format!("{celsius:.0}\u{b0}C"), heat(celsius)));
        // Side by side where they fit, else one under the other.
        let (mut row, mut used) = (0, 0);
        for (words, colour) in latency.into_iter().chain(temperature) {
            let length = words.chars().count() as u32;
            if used > 0 && used + 2 + length > columns {
                (row, used) = (row + 1, 0);
            }
            let left = if used > 0 { used + 2 } else { 0 };
            if row >= rows || left + length > columns {
                continue;
            }
            let at = self.figures.top_left + Size::new(left * width, row * height);
            self.small.draw(canvas, at, &words, self.colour(colour));
            used = left + length;
        }
    }

    /// On a screen of two colours everything that is written is white.
    fn colour(&self, colour: Rgb888) -> Rgb888 {
        match self.colours {
            Colours::Two => Rgb888::WHITE,
            Colours::Many => colour,
        }
    }
}

/// The largest font that leaves lines of some length across the screen.
fn font_below(width: u32) -> Font {
    let columns = match width {
        0..200 => 20,
        200..400 => 24,
        _ => 34,
    };
    *FONTS.iter().rev().find(|font| width / font.cell().width >= columns).unwrap_or(&FONTS[0])
}

/// The largest font in which a usual caption has room beside the picture.
fn font_beside(place: Size) -> Font {
    let holds = |font: &&Font| {
        let (columns, rows) = (place.width / font.cell().width, place.height / font.cell().height);
        columns >= 14 && columns * rows >= USUAL_CAPTION * 4 / 5
    };
    *FONTS.iter().rev().find(holds).unwrap_or(&FONTS[0])
}

fn heat(celsius: f32) -> Rgb888 {
    if celsius >= HOT_C {
        HOT
    } else if celsius >= WARM_C {
        WARM
    } else {
        FIGURES
    }
}

fn in_words(latency: Duration) -> String {
    let mut words = String::new();
    let milliseconds = latency.as_millis();
    // Writing to a string does not fail.
    let _ = if milliseconds < 10_000 { write!(words, "{milliseconds}ms") } else { write!(words, "{}s", latency.as_secs()) };
    words
}

/// How many lines of a caption have scrolled out at a time after it appeared: it rests at the beginning, moves line by line, rests
/// at the end, and begins again.
#[must_use]
pub fn scrolled(hidden_lines: usize, since: Duration) -> usize {
    let steps = u32::try_from(hidden_lines).unwrap_or(u32::MAX);
    let cycle = SCROLL_REST.saturating_mul(2).saturating_add(SCROLL_STEP.saturating_mul(steps.saturating_sub(1)));
    if steps == 0 {
        return 0;
    }
    let at = Duration::from_nanos((since.as_nanos() % cycle.as_nanos()) as u64);
    match at.checked_sub(SCROLL_REST) {
        None => 0,
        Some(moving) => hidden_lines.min(1 + (moving.as_nanos() / SCROLL_STEP.as_nanos()) as usize),
    }
}

#[cfg(test)]
mod tests;
