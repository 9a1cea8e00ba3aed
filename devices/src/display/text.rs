//! Text in cells of one size: fonts, line breaks, and characters that the fonts lack.

use std::ops::Range;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::iso_8859_1::{FONT_5X8, FONT_6X10, FONT_7X13, FONT_8X13, FONT_9X15, FONT_10X20};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::primitives::Rectangle;
use embedded_graphics::text::{Baseline, Text};

use crate::display::Canvas;

/// A font whose dots are squares of `scale` pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Font {
    font: &'static MonoFont<'static>,
    scale: u32,
}

/// From small to large.
pub(super) const FONTS: [Font; 12] = [
    Font { font: &FONT_5X8, scale: 1 },
    Font { font: &FONT_6X10, scale: 1 },
    Font { font: &FONT_7X13, scale: 1 },
    Font { font: &FONT_8X13, scale: 1 },
    Font { font: &FONT_9X15, scale: 1 },
    Font { font: &FONT_10X20, scale: 1 },
    Font { font: &FONT_7X13, scale: 2 },
    Font { font: &FONT_9X15, scale: 2 },
    Font { font: &FONT_10X20, scale: 2 },
    Font { font: &FONT_9X15, scale: 3 },
    Font { font: &FONT_10X20, scale: 3 },
    Font { font: &FONT_10X20, scale: 4 },
];

impl Font {
    /// Pixels of a character and of the space to its neighbours.
    pub(super) fn cell(&self) -> Size {
        (self.font.character_size + Size::new(self.font.character_spacing, 0)) * self.scale
    }

    /// Draws a line of text; characters are those of [`readable`].
    pub(super) fn draw(&self, canvas: &mut Canvas, at: Point, line: &str, colour: Rgb888) {
        let mut dots = Dots { canvas, origin: at, scale: self.scale };
        let style = MonoTextStyle::new(self.font, colour);
        let text = Text::with_baseline(line, Point::zero(), style, Baseline::Top);
        // Neither the canvas nor what scales it can fail.
        let Ok(_) = embedded_graphics::Drawable::draw(&text, &mut dots);
    }
}

/// A canvas seen through a magnifying glass.
struct Dots<'a> {
    canvas: &'a mut Canvas,
    origin: Point,
    scale: u32,
}

impl OriginDimensions for Dots<'_> {
    fn size(&self) -> Size {
        self.canvas.size() / self.scale
    }
}

impl DrawTarget for Dots<'_> {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Self::Error> {
        for Pixel(at, colour) in pixels {
            let dot = Rectangle::new(self.origin + at * self.scale as i32, Size::new_equal(self.scale));
            self.canvas.fill_solid(&dot, colour)?;
        }
        Ok(())
    }
}

/// Breaks a text into lines of at most `columns` characters, between words where that can be; gives their bytes in it.
/// White space at breaks belongs to no line.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<Range<usize>> {
    let mut lines = Vec::new();
    let mut line: Option<(Range<usize>, usize)> = None;
    for word in text.split_whitespace() {
        let start = word.as_ptr().addr() - text.as_ptr().addr();
        let length = word.chars().count();
        match &mut line {
            Some((bytes, used)) if *used + 1 + length <= columns => {
                bytes.end = start + word.len();
                *used += 1 + length;
            }
            _ => {
                lines.extend(line.take().map(|(bytes, _)| bytes));
                line = Some(broken(word, start, length, columns.max(1), &mut lines));
            }
        }
    }
    lines.extend(line.map(|(bytes, _)| bytes));
    lines
}

/// The end of a word that begins a line; pieces of one that is longer than the line become lines of their own.
fn broken(word: &str, start: usize, length: usize, columns: usize, lines: &mut Vec<Range<usize>>) -> (Range<usize>, usize) {
    let (mut from, mut left) = (0, length);
    while left > columns {
        let piece = word[from..].char_indices().nth(columns).map_or(word.len() - from, |(at, _)| at);
        lines.push(start + from..start + from + piece);
        from += piece;
        left -= columns;
    }
    (start + from..start + word.len(), left)
}

/// Letters of the block Latin Extended-A, U+0100 to U+017F, without what the fonts lack.
const LATIN_EXTENDED_A: &[u8; 128] = b"AaAaAaCcCcCcCcDdDdEeEeEeEeEeGgGgGgGgHhHhIiIiIiIiIiIiJjKkkLlLlLlLlLlNnNnNnnNnOoOoOoOoRrRrRrSsSsSsSsTtTtTtUuUuUuUuUuUuWwYyYZzZzZzs";

/// A text in the characters that the fonts have (ISO 8859-1): typographic signs become their plain likes, letters lose accents
/// that are not there, what is left is `?`. The text stays as long as it was, but for marks that stand on other letters, which
/// vanish, and `…`, which becomes three dots.
pub(super) fn readable(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' | '\u{a1}'..='\u{ff}' => plain.push(c),
            '\u{2018}' | '\u{2019}' | '\u{201a}' | '\u{2032}' => plain.push('\''),
            '\u{201c}'..='\u{201e}' | '\u{2033}' => plain.push('"'),
            '\u{2010}'..='\u{2015}' | '\u{2212}' => plain.push('-'),
            '\u{2022}' => plain.push('\u{b7}'),
            '\u{2026}' => plain.push_str("..."),
            '\u{100}'..='\u{17f}' => plain.push(char::from(LATIN_EXTENDED_A[c as usize - 0x100])),
            '\u{300}'..='\u{36f}' | '\u{200b}'..='\u{200d}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' => {}
            c if c.is_whitespace() || c.is_control() => plain.push(' '),
            _ => plain.push('?'),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::display::canvas::art;

    fn lines(text: &str, columns: usize) -> Vec<&str> {
        wrap(text, columns).into_iter().map(|line| &text[line]).collect()
    }

    #[test]
    fn lines_break_between_words() {
        let cases: [(&str, usize, &[&str]); 10] = [
            ("a small blue heart at the top", 10, &["a small", "blue heart", "at the top"]),
            ("a small blue heart at the top", 29, &["a small blue heart at the top"]),
            ("a small blue heart at the top", 28, &["a small blue heart at the", "top"]),
            ("  spaces \n do not  count ", 9, &["spaces \n do", "not  count"]),
            ("unbelievably", 5, &["unbel", "ievab", "ly"]),
            ("an unbelievably odd", 5, &["an", "unbel", "ievab", "ly", "odd"]),
            ("ünübertroffen gut", 6, &["ünüber", "troffe", "n gut"]),
            ("abc", 1, &["a", "b", "c"]),
            ("abc", 0, &["a", "b", "c"]),
            (" \t ", 5, &[]),
        ];
        for (text, columns, expected) in cases {
            let found = lines(text, columns);
            if text.contains('\n') {
                // Spaces inside a line are kept: widths are counted in words and one space between.
                assert_eq!(found.len(), expected.len(), "{found:?}");
                continue;
            }
            assert_eq!(found, expected, "{text:?} in {columns}");
        }
    }

    #[test]
    fn foreign_characters_become_plain_ones() {
        let cases = [
            ("caf\u{e9} \u{df} \u{b0}", "caf\u{e9} \u{df} \u{b0}"),
            ("\u{201c}it\u{2019}s\u{201d} \u{2014} so\u{2026}", "\"it's\" - so..."),
            ("P\u{159}\u{ed}li\u{161} \u{17b}\u{f3}\u{142}\u{107}", "P\u{159}\u{ed}li\u{161} Z\u{f3}lc"),
            ("e\u{301}\u{200b}a", "ea"),
            ("\u{72ac} \u{1f415}", "? ?"),
            ("a\tb\u{7f}c\u{a0}d", "a b c d"),
        ];
        for (text, expected) in cases {
            let expected = expected.replace('\u{159}', "r").replace('\u{161}', "s");
            assert_eq!(readable(text), expected, "{text:?}");
        }
        // First, last and some in the middle of the block, after their Unicode names.
        for (c, plain) in
            [('\u{100}', 'A'), ('\u{11f}', 'g'), ('\u{138}', 'k'), ('\u{149}', 'n'), ('\u{153}', 'o'), ('\u{17f}', 's')]
        {
            assert_eq!(readable(&c.to_string()), plain.to_string());
        }
    }

    #[test]
    fn fonts_grow_and_dots_are_squares() {
        let heights: Vec<u32> = FONTS.iter().map(|font| font.cell().height).collect();
        assert!(heights.is_sorted(), "{heights:?}");
        let draw = |font: Font| {
            let mut canvas = Canvas::new(font.cell().width, font.cell().height);
            font.draw(&mut canvas, Point::zero(), "\u{e9}", Rgb888::new(255, 255, 255));
            art(&canvas)
        };
        let small = draw(FONTS[2]);
        let double: String = small
            .lines()
            .flat_map(|line| {
                let row: String = line.chars().flat_map(|dot| [dot, dot]).chain(['\n']).collect();
                [row.clone(), row]
            })
            .collect();
        assert!(small.contains('#'));
        assert_eq!(draw(FONTS[6]), double);
    }
}
