//! A table as a picture: black on white, in letters of one width, with a rule below its head.

use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{Point, Size};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::primitives::Rectangle;

use super::Canvas;
use super::text::{FONTS, Font, readable};

/// Where the cells of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alignment {
    /// Words begin at the left.
    Left,
    /// Numbers end at the right, digit below digit.
    Right,
}

/// The table does not fit a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a table of {rows} rows would be a picture of {width} × {height} pixels, which is too large")]
pub struct TooLarge {
    /// Rows, without the head.
    pub rows: usize,
    /// Pixels from left to right.
    pub width: u64,
    /// Pixels from top to bottom.
    pub height: u64,
}

/// 10 × 20 pixels a character.
const FONT: Font = FONTS[5];
/// Pixels around the table.
const MARGIN: u64 = 20;
/// Pixels from a row to the next.
const ROW: u64 = 28;
/// Characters between columns.
const GAP: usize = 2;
/// The rule below the head: pixels of its height, and its colour.
const RULE: u32 = 2;
/// Characters of a cell; longer ones are cut.
const LONGEST: usize = 48;
/// 192 MB of pixels.
const MOST_PIXELS: u64 = 1 << 26;

/// Draws a table; a row that has fewer cells than the head is filled up with empty ones, further cells are left out.
///
/// # Errors
/// A picture of more than 2²⁶ pixels.
pub fn draw(head: &[(&str, Alignment)], rows: &[Vec<String>]) -> Result<Canvas, TooLarge> {
    let names: Vec<String> = head.iter().map(|(name, _)| cell(name)).collect();
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| (0..head.len()).map(|column| row.get(column).map_or_else(String::new, |text| cell(text))).collect())
        .collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| rows.iter().chain([&names]).map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let characters = widths.iter().sum::<usize>() + GAP * head.len().saturating_sub(1);
    let letter = FONT.cell();
    let (width, height) = (2 * MARGIN + characters as u64 * u64::from(letter.width), 2 * MARGIN + (rows.len() as u64 + 1) * ROW);
    if width.saturating_mul(height) > MOST_PIXELS {
        return Err(TooLarge { rows: rows.len(), width, height });
    }
    // Neither side is longer than there are pixels.
    let (wide, high) = (width as u32, height as u32);
    let mut canvas = Canvas::new(wide, high);
    let all = Rectangle::new(Point::zero(), Size::new(wide, high));
    // A canvas cannot fail.
    let Ok(()) = canvas.fill_solid(&all, Rgb888::WHITE);
    let (left, inside) = (MARGIN as i32, wide - 2 * MARGIN as u32);
    let rule = Rectangle::new(Point::new(left, (MARGIN + ROW) as i32 - 2 * RULE as i32), Size::new(inside, RULE));
    let Ok(()) = canvas.fill_solid(&rule, Rgb888::BLACK);
    let mut top = MARGIN as i32;
    for row in [&names].into_iter().chain(&rows) {
        let mut at = 0;
        for ((text, &(_, alignment)), &width) in row.iter().zip(head).zip(&widths) {
            let before = if alignment == Alignment::Right { width - text.chars().count() } else { 0 };
            let x = left + (at + before) as i32 * letter.width as i32;
            FONT.draw(&mut canvas, Point::new(x, top), text, Rgb888::BLACK);
            at += width + GAP;
        }
        top += ROW as i32;
    }
    Ok(canvas)
}

/// What is written in a cell.
fn cell(text: &str) -> String {
    let text = readable(text);
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST - 3).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use embedded_graphics::Drawable;
    use embedded_graphics::mono_font::MonoTextStyle;
    use embedded_graphics::mono_font::iso_8859_1::FONT_10X20;
    use embedded_graphics::text::{Baseline, Text};

    use super::Alignment::{Left, Right};
    use super::*;

    /// The pixels of a character's place, as whether they are dark.
    fn dark(canvas: &Canvas, left: u32, top: u32) -> Vec<bool> {
        let rows = (top..top + 20).map(|y| &canvas.row(y)[left as usize..left as usize + 10]);
        rows.flatten().map(|&colour| colour == [0; 3]).collect()
    }

    /// Reads a line of a picture by the font's own letters.
    fn read(canvas: &Canvas, top: u32) -> String {
        let mut letters = HashMap::new();
        for c in (' '..='~').chain(['°']) {
            let mut drawn = Canvas::new(10, 20);
            let style = MonoTextStyle::new(&FONT_10X20, Rgb888::WHITE);
            Text::with_baseline(&c.to_string(), Point::zero(), style, Baseline::Top).draw(&mut drawn).unwrap();
            let pixels: Vec<bool> = drawn.colours().map(|colour| colour != [0; 3]).collect();
            assert_eq!(letters.insert(pixels, c), None, "{c}");
        }
        (20..canvas.width() - 20).step_by(10).map(|left| letters[&dark(canvas, left, top)]).collect()
    }

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        rows.iter().map(|row| row.iter().map(|&text| text.to_owned()).collect()).collect()
    }

    #[test]
    fn words_stand_at_the_left_and_numbers_at_the_right() {
        let head = [("machine", Left), ("p50 ms", Right), ("°C", Right), ("date", Left)];
        let body = rows(&[&["Raspberry Pi 5", "512.3", "61", "2026-11-25"], &["a “PC”", "~9.1", "-", "2026"]]);
        let canvas = draw(&head, &body).unwrap();
        assert_eq!((canvas.width(), canvas.height()), (40 + 38 * 10, 40 + 3 * 28));
        let lines = [20, 48, 76].map(|top| read(&canvas, top));
        assert_eq!(lines[1], "Raspberry Pi 5   512.3  61  2026-11-25");
        assert_eq!(lines[2], "a \"PC\"            ~9.1   -  2026      ");

        let ruled: Vec<u32> = (0..canvas.height()).filter(|&y| canvas.row(y)[20..400].iter().all(|&c| c == [0; 3])).collect();
        assert_eq!(ruled, [44, 45]);
        assert_eq!(lines[0], "machine         p50 ms  °C  date      ");
        // Nothing but black and white, and nothing in the margins.
        for y in 0..canvas.height() {
            for (x, &colour) in canvas.row(y).iter().enumerate() {
                let is_inside = (20..400).contains(&x) && (20..104).contains(&y);
                assert!(colour == [255; 3] || (colour == [0; 3] && is_inside), "{x} {y}: {colour:?}");
            }
        }
    }

    #[test]
    fn cells_are_cut_and_filled_up() {
        let long = "x".repeat(49);
        let canvas = draw(&[("a", Left), ("b", Right)], &rows(&[&[&long], &["1", "2", "3"]])).unwrap();
        assert_eq!(read(&canvas, 48), format!("{}...   ", "x".repeat(45)));
        assert_eq!(read(&canvas, 76), format!("1{}2", " ".repeat(49)));
        let canvas = draw(&[("a", Left)], &rows(&[&[&long[1..]]])).unwrap();
        assert_eq!(read(&canvas, 48), long[1..]);
    }

    #[test]
    fn a_picture_has_an_end() {
        let of = |count: usize| draw(&[("a", Left)], &vec![vec![String::new()]; count]);
        assert_eq!(of(0).map(|canvas| (canvas.width(), canvas.height())), Ok((50, 68)));
        // 50 · (68 + 28 · rows) ≤ 2²⁶
        assert!(of(47_932).is_ok());
        let error = of(47_933).unwrap_err();
        assert_eq!(error, TooLarge { rows: 47_933, width: 50, height: 1_342_192 });
        assert_eq!(error.to_string(), "a table of 47933 rows would be a picture of 50 × 1342192 pixels, which is too large");
    }
}
