//! The rasteriser: shapes by their inside test, anti-aliased by supersampling, on a ground with gradient, texture and noise.

use image::{Rgb, RgbImage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::SIDE;
use super::scene::{Graph, Object, Shape};

/// Samples along each side of a pixel.
const SAMPLES: u32 = 4;

/// Draws a graph; everything that the graph leaves open comes from `seed`.
pub(super) fn draw(graph: &Graph, seed: u64) -> RgbImage {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut canvas = ground(graph, &mut rng);
    for object in &graph.objects {
        paint(&mut canvas, object, &mut rng);
    }
    let grain = rng.random_range(1.0..6.0f32);
    let mut image = RgbImage::new(SIDE, SIDE);
    for (pixel, colour) in image.pixels_mut().zip(&canvas) {
        // The difference of two uniform numbers: bounded, and close enough to a sensor's grain.
        let noise = grain * (rng.random::<f32>() - rng.random::<f32>());
        *pixel = Rgb(colour.map(|c| (c + noise).round().clamp(0.0, 255.0) as u8));
    }
    image
}

type Canvas = Vec<[f32; 3]>;

/// A colour near the nominal one; the shift is too small to make it another colour's neighbour.
fn shade(rgb: [u8; 3], rng: &mut ChaCha8Rng) -> [f32; 3] {
    let light = rng.random_range(-8.0..8.0f32);
    rgb.map(|c| f32::from(c) + light + rng.random_range(-6.0..6.0f32))
}

/// The ground: a linear gradient in a random direction, and a coarse lattice of light interpolated between its knots.
fn ground(graph: &Graph, rng: &mut ChaCha8Rng) -> Canvas {
    let base = shade(graph.background.colour.rgb(), rng);
    let slope = [rng.random_range(-14.0..14.0f32), rng.random_range(-14.0..14.0f32)];
    let depth = rng.random_range(0.0..7.0f32);
    const KNOTS: usize = 9;
    let lattice: Vec<f32> = (0..KNOTS * KNOTS).map(|_| rng.random_range(-1.0..1.0f32)).collect();
    let knots_per_pixel = (KNOTS - 1) as f32 / SIDE as f32;
    let texture = |x: f32, y: f32| {
        let (u, v) = (x * knots_per_pixel, y * knots_per_pixel);
        let (column, row) = (u as usize, v as usize);
        let (fu, fv) = (u.fract(), v.fract());
        let knot = |c: usize, r: usize| lattice[r.min(KNOTS - 1) * KNOTS + c.min(KNOTS - 1)];
        let top = knot(column, row) * (1.0 - fu) + knot(column + 1, row) * fu;
        let bottom = knot(column, row + 1) * (1.0 - fu) + knot(column + 1, row + 1) * fu;
        top * (1.0 - fv) + bottom * fv
    };
    let mut canvas = Canvas::with_capacity((SIDE * SIDE) as usize);
    for y in 0..SIDE {
        for x in 0..SIDE {
            let (x, y) = (x as f32, y as f32);
            let gradient = slope[0] * (x / SIDE as f32 - 0.5) + slope[1] * (y / SIDE as f32 - 0.5);
            let light = 2.0 * gradient + depth * texture(x, y);
            canvas.push(base.map(|c| c + light));
        }
    }
    canvas
}

/// Blends one object over the canvas, lit a little from above.
fn paint(canvas: &mut Canvas, object: &Object, rng: &mut ChaCha8Rng) {
    let colour = shade(object.colour.rgb(), rng);
    let sheen = rng.random_range(0.0..12.0f32);
    let side = SIDE as f32;
    let (centre, radius) = (object.centre.map(|c| c * side), object.radius * side);
    let span = |c: f32| ((c - radius).floor().max(0.0) as u32, ((c + radius).ceil() as u32).min(SIDE - 1));
    let ((left, right), (top, bottom)) = (span(centre[0]), span(centre[1]));
    let (sin, cos) = object.turn.sin_cos();
    for y in top..=bottom {
        for x in left..=right {
            let mut covered = 0;
            for sample in 0..SAMPLES * SAMPLES {
                let offset = |i: u32| (i as f32 + 0.5) / SAMPLES as f32;
                let dx = (x as f32 + offset(sample % SAMPLES) - centre[0]) / radius;
                let dy = (y as f32 + offset(sample / SAMPLES) - centre[1]) / radius;
                covered += u32::from(inside(object.shape, cos * dx + sin * dy, cos * dy - sin * dx));
            }
            let coverage = covered as f32 / (SAMPLES * SAMPLES) as f32;
            let light = -sheen * (y as f32 - centre[1]) / radius;
            let under = &mut canvas[(y * SIDE + x) as usize];
            for (under, over) in under.iter_mut().zip(colour) {
                *under += coverage * (over + light - *under);
            }
        }
    }
}

/// Whether a point lies inside a shape drawn into the unit circle (y downwards).
fn inside(shape: Shape, x: f32, y: f32) -> bool {
    match shape {
        Shape::Circle => x * x + y * y <= 0.92,
        Shape::Square => x.abs().max(y.abs()) <= 0.7,
        Shape::Triangle => {
            // Equilateral, point upwards; the three edges are half a radius from the centre.
            let half = 3.0f32.sqrt() / 2.0;
            y <= 0.5 && half * x - 0.5 * y <= 0.5 && -half * x - 0.5 * y <= 0.5
        }
        Shape::Star => inside_star(x, y),
        Shape::Heart => {
            // (x² + y² − 1)³ = x² y³, y upwards, scaled into the unit circle.
            let (x, y) = (x * 1.26, -y * 1.26 + 0.25);
            let bulge = x * x + y * y - 1.0;
            bulge.powi(3) <= x * x * y.powi(3)
        }
        Shape::Cross => x.abs().min(y.abs()) <= 0.3 && x.abs().max(y.abs()) <= 0.94,
    }
}

/// A five-pointed star, point upwards: folded into half of one point, it is bounded by a single edge.
fn inside_star(x: f32, y: f32) -> bool {
    use std::f32::consts::PI;
    const INNER: f32 = 0.42;
    let sector = PI / 5.0;
    let angle = x.atan2(-y).abs() % (2.0 * sector);
    let angle = angle.min(2.0 * sector - angle);
    let radius = x.hypot(y);
    // From the tip (angle 0, radius 1) to the notch (angle π/5, radius INNER).
    let (px, py) = (radius * angle.cos(), radius * angle.sin());
    let (nx, ny) = (INNER * sector.cos(), INNER * sector.sin());
    (nx - 1.0) * py - ny * (px - 1.0) >= 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::{Colour, Position, Size, generate};

    fn ascii(shape: Shape) -> String {
        let cells = 13;
        let at = |i: usize| (i as f32 + 0.5) / cells as f32 * 2.0 - 1.0;
        let row = |y: usize| (0..cells).map(|x| if inside(shape, at(x), at(y)) { '#' } else { '.' }).collect::<String>();
        (0..cells).map(row).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn shapes_look_like_themselves() {
        let cases = [
            (Shape::Triangle, include_str!("drawings/triangle.txt")),
            (Shape::Star, include_str!("drawings/star.txt")),
            (Shape::Heart, include_str!("drawings/heart.txt")),
            (Shape::Cross, include_str!("drawings/cross.txt")),
            (Shape::Square, include_str!("drawings/square.txt")),
            (Shape::Circle, include_str!("drawings/circle.txt")),
        ];
        for (shape, expected) in cases {
            assert_eq!(ascii(shape), expected.trim_end(), "{shape:?}:\n{}", ascii(shape));
        }
    }

    #[test]
    fn shapes_stay_in_their_circle() {
        for &shape in Shape::ALL {
            for step in 0..360 {
                let (sin, cos) = (step as f32).to_radians().sin_cos();
                assert!(!inside(shape, 1.02 * cos, 1.02 * sin), "{shape:?} at {step}°");
            }
            assert!(inside(shape, 0.0, 0.0));
        }
    }

    #[test]
    fn the_colour_at_an_objects_centre_is_its_own() {
        for index in 0..60 {
            let scene = generate(9, index);
            let image = scene.draw();
            for object in &scene.graph.objects {
                let at = object.centre.map(|c| (c * SIDE as f32) as u32);
                let pixel = image.get_pixel(at[0], at[1]).0;
                let distance =
                    |c: Colour| -> i32 { pixel.iter().zip(c.rgb()).map(|(&a, b)| (i32::from(a) - i32::from(b)).pow(2)).sum() };
                let nearest = Colour::ALL.iter().copied().min_by_key(|&c| distance(c));
                assert_eq!(nearest, Some(object.colour), "{object:?} drawn as {pixel:?}");
            }
        }
    }

    #[test]
    fn edges_are_smooth() {
        let mut graph = generate(1, 0).graph;
        graph.objects = vec![Object {
            shape: Shape::Circle,
            colour: Colour::Black,
            size: Size::Large,
            position: Position::Center,
            centre: [0.5, 0.5],
            radius: 0.2,
            turn: 0.0,
        }];
        graph.background.colour = crate::scenes::Ground::White;
        let image = draw(&graph, 3);
        let between = image.pixels().filter(|p| (80..180).contains(&p.0[0])).count();
        // The edge of a circle of radius 43 px crosses some 250 pixels.
        assert!((60..400).contains(&between), "{between} pixels between black and white");
    }
}
