//! Drawings: small ones as text, large ones as pictures.

use std::fs;
use std::path::Path;

use super::*;
use crate::display::Display;
use crate::display::canvas::art;
use crate::display::png::{self, PngFile};

const CAPTION: &str = "a brown dog runs through the grass with a ball in its mouth";

/// A frame with a bright disc on a ground that grows lighter to the right.
fn frame(width: u32, height: u32) -> Vec<u8> {
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            let (dx, dy) = (x.abs_diff(width / 3), y.abs_diff(height / 2));
            let inside = dx * dx + dy * dy < (height / 3) * (height / 3);
            pixels.extend(if inside { [255, 230, 40] } else { [(x * 90 / width) as u8, 40, (x * 160 / width) as u8] });
        }
    }
    pixels
}

fn drawn(width: u32, height: u32, colours: Colours, caption: &str, above: usize) -> Canvas {
    let layout = Layout::new(Geometry { width, height, colours });
    let thumbnail = layout.thumbnail(&frame(320, 240), 320, 240);
    let view = View {
        caption,
        alert: false,
        thumbnail: Some(&thumbnail),
        latency: Some(Duration::from_millis(132)),
        temperature_c: Some(48.4),
    };
    let mut canvas = layout.canvas();
    layout.draw(&mut canvas, &view, above);
    canvas
}

/// Compares with a drawing in `drawings/`; with `UNIMO_DRAW` set in the environment it is drawn anew, to be looked at.
fn compare(name: &str, canvas: &Canvas, colours: Colours) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/display/layout/drawings").join(name);
    let again = std::env::var_os("UNIMO_DRAW").is_some();
    if name.ends_with(".txt") {
        let found = art(canvas);
        if again {
            fs::write(&path, &found).unwrap();
        }
        assert!(fs::read_to_string(&path).unwrap() == found, "{name} is not\n{found}");
        return;
    }
    let geometry = Geometry { width: canvas.width(), height: canvas.height(), colours };
    if again {
        PngFile::new(&path, geometry).unwrap().present(canvas).unwrap();
    }
    let (_, width, height, pixels) = png::read(&path);
    assert_eq!((width, height), (canvas.width(), canvas.height()), "{name}");
    let different = pixels.iter().zip(canvas.pixels()).filter(|(a, b)| a != b).count();
    assert_eq!(different, 0, "values of {name} that differ");
}

#[test]
fn small_screens_are_as_drawn() {
    compare("128x64.txt", &drawn(128, 64, Colours::Two, CAPTION, 0), Colours::Two);
    compare("128x32.txt", &drawn(128, 32, Colours::Two, "a small blue heart at the top", 0), Colours::Two);
    compare("96x16.txt", &drawn(96, 16, Colours::Two, "two dogs", 0), Colours::Two);
}

#[test]
fn large_screens_are_as_drawn() {
    for (width, height) in [(240, 240), (240, 320), (320, 240), (1280, 800)] {
        compare(&format!("{width}x{height}.png"), &drawn(width, height, Colours::Many, CAPTION, 0), Colours::Many);
    }
}

#[test]
fn places_lie_inside_the_screen_and_apart() {
    let sizes = [
        (96, 16),
        (128, 32),
        (64, 32),
        (64, 48),
        (72, 40),
        (128, 64),
        (128, 128),
        (160, 80),
        (135, 240),
        (240, 135),
        (240, 240),
        (240, 320),
        (320, 240),
        (320, 480),
        (480, 320),
        (640, 480),
        (800, 480),
        (1024, 600),
        (1280, 720),
        (1280, 800),
        (1920, 1080),
    ];
    for (width, height) in sizes {
        let layout = Layout::new(Geometry { width, height, colours: Colours::Many });
        let screen = Rectangle::new(Point::zero(), Size::new(width, height));
        let places = [layout.picture, layout.caption, layout.figures];
        for (i, place) in places.iter().enumerate().filter(|(_, place)| place.size.width > 0 && place.size.height > 0) {
            assert_eq!(screen.intersection(place).size, place.size, "{width}x{height}: {place:?}");
            for other in &places[i + 1..] {
                let common = place.intersection(other).size;
                assert!(common.width == 0 || common.height == 0, "{width}x{height}: {place:?} {other:?}");
            }
        }
        assert!(layout.columns() >= 7 && layout.rows() >= 1, "{width}x{height}: {} × {}", layout.columns(), layout.rows());
        if width >= 128 && height >= 64 {
            assert_eq!(layout.hidden_lines(CAPTION), 0, "{width}x{height}: a usual caption scrolls");
        }
        // Figures are there from 24 rows on, whatever the temperature is.
        if height >= 24 {
            let view = View { latency: Some(Duration::from_secs(100)), temperature_c: Some(-10.0), ..View::default() };
            let mut canvas = layout.canvas();
            layout.draw(&mut canvas, &view, 0);
            assert!(canvas.pixels().iter().any(|&value| value > 0), "{width}x{height}: no figures");
        }
    }
}

#[test]
fn long_captions_scroll() {
    let long = format!("{CAPTION} while {CAPTION} and {CAPTION}");
    let layout = Layout::new(Geometry { width: 128, height: 64, colours: Colours::Two });
    let hidden = layout.hidden_lines(&long);
    assert!(hidden > 3, "{hidden}");
    let canvas = |above| drawn(128, 64, Colours::Two, &long, above);
    // The picture and the figures stay, and the words move up by a line of 10 pixels.
    let right = |canvas: &Canvas| art(canvas).lines().map(|line| line[42..].to_owned()).collect::<Vec<_>>();
    let left = |canvas: &Canvas| art(canvas).lines().map(|line| line[..42].to_owned()).collect::<Vec<_>>();
    for above in 0..hidden {
        let (before, after) = (canvas(above), canvas(above + 1));
        assert_eq!(left(&before), left(&after));
        assert_eq!(right(&before)[10..60], right(&after)[..50], "{above}");
        assert_ne!(right(&before), right(&after));
    }
    let last = canvas(hidden);
    assert_eq!(right(&last)[50..60], right(&drawn(128, 64, Colours::Two, "mouth", 0))[..10]);
}

#[test]
fn everything_stays_in_its_place_and_nothing_old_is_left() {
    let long = format!("{CAPTION} while {CAPTION} and {CAPTION} and {CAPTION}");
    for (width, height) in [(128, 32), (320, 240), (240, 320), (640, 480)] {
        let layout = Layout::new(Geometry { width, height, colours: Colours::Many });
        let with = |caption| View { caption, latency: Some(Duration::from_millis(132)), ..View::default() };
        let inside = |canvas: &Canvas, place: Rectangle| {
            let Point { x, y } = place.top_left;
            let rows = (y as u32..y as u32 + place.size.height).map(|y| canvas.row(y));
            rows.map(|row| row[x as usize..x as usize + place.size.width as usize].to_vec()).collect::<Vec<_>>()
        };
        let mut canvas = layout.canvas();
        layout.draw(&mut canvas, &with(""), 0);
        let figures = inside(&canvas, layout.figures);
        layout.draw(&mut canvas, &with(&long), 0);
        assert!(layout.hidden_lines(&long) > 0 && inside(&canvas, layout.figures) == figures, "{width}x{height}");
        layout.draw(&mut canvas, &View::default(), 0);
        assert_eq!(canvas, layout.canvas(), "{width}x{height}");
    }
}

#[test]
fn scrolling_rests_at_both_ends() {
    let milliseconds = Duration::from_millis;
    let cases = [
        (0, 99_999, 0),
        (3, 0, 0),
        (3, 2499, 0),
        (3, 2500, 1),
        (3, 3299, 1),
        (3, 3300, 2),
        (3, 4100, 3),
        (3, 6599, 3),
        (3, 6600, 0),
        (3, 6600 * 1000 + 2500, 1),
        (1, 2500, 1),
        (1, 4999, 1),
        (1, 5000, 0),
    ];
    for (hidden, at, expected) in cases {
        assert_eq!(scrolled(hidden, milliseconds(at)), expected, "{hidden} lines at {at} ms");
    }
}

#[test]
fn heat_and_faults_have_colours() {
    let layout = Layout::new(Geometry { width: 320, height: 240, colours: Colours::Many });
    let colours = |view: &View<'_>| {
        let mut canvas = layout.canvas();
        layout.draw(&mut canvas, view, 0);
        let mut colours: Vec<[u8; 3]> = canvas.colours().filter(|colour| *colour != [0; 3]).collect();
        colours.sort_unstable();
        colours.dedup();
        colours
    };
    let plain = |colour: Rgb888| [colour.r(), colour.g(), colour.b()];
    let warm = |celsius| View { temperature_c: Some(celsius), ..View::default() };
    assert_eq!(colours(&warm(69.9)), [plain(FIGURES)]);
    assert_eq!(colours(&warm(70.0)), [plain(WARM)]);
    assert_eq!(colours(&warm(85.0)), [plain(HOT)]);
    assert_eq!(colours(&View { caption: "words", ..View::default() }), [[255; 3]]);
    assert_eq!(colours(&View { caption: "no camera", alert: true, ..View::default() }), [plain(WARM)]);
    // On two colours HOT would be too dark to be seen.
    let two = Layout::new(Geometry { width: 128, height: 64, colours: Colours::Two });
    let mut canvas = two.canvas();
    two.draw(&mut canvas, &warm(90.0), 0);
    assert!(canvas.colours().all(|colour| colour == [0; 3] || colour == [255; 3]));
    assert!(art(&canvas).contains('#'));
}

#[test]
fn latencies_in_words() {
    let cases = [(0, "0ms"), (132, "132ms"), (9999, "9999ms"), (10_000, "10s"), (61_500, "61s")];
    for (milliseconds, expected) in cases {
        assert_eq!(in_words(Duration::from_millis(milliseconds)), expected);
    }
}
