//! `test://scenes`: drawn pictures that move, for trying things without a camera.
//!
//! Coloured shapes on a plain ground, such as the default bundle was trained on too. The same seed gives the same pictures on
//! every machine: only operations that IEEE 754 fixes to the bit are used.

use std::time::{Duration, Instant, SystemTime};

use super::recovery::{Connect, Connected, Link, Received, Recovering, Shot};
use super::uri::CameraUri;
use super::{Camera, CameraError, CameraOptions, Fault, FrameData};

/// Width and height unless wished otherwise.
const SIDE: u32 = 224;
const FPS: f32 = 10.0;
/// Pictures of one scene, before the next one.
const SCENE_FRAMES: u64 = 30;
/// Samples along each side of a pixel.
const SAMPLES: u32 = 3;

/// Opens the drawn scenes.
pub(super) fn open(mut uri: CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let options = CameraOptions { stall_after: Duration::MAX, ..uri.wishes(options)? };
    let seed = uri.take_number("seed")?.unwrap_or(0);
    let count = uri.take_number("count")?;
    let scene_frames = uri.take_number("change")?.unwrap_or(SCENE_FRAMES);
    uri.finish()?;
    if uri.place() != "scenes" {
        return Err(uri.bad("the only test pictures are test://scenes"));
    }
    if scene_frames == 0 {
        return Err(uri.bad("change=0: a scene has at least 1 picture"));
    }
    let (width, height) = options.size.unwrap_or((SIDE, SIDE));
    let interval = Duration::from_secs_f32(1.0 / options.fps.unwrap_or(FPS));
    let scenes = Scenes { seed, width, height, scene_frames, count, interval, next: 0, due: Instant::now() };
    Ok(Box::new(Recovering::open(uri.name(), Source(Some(scenes)), &options)?))
}

struct Source(Option<Scenes>);

impl Connect for Source {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let scenes = self.0.take().ok_or(Fault::Closed)?;
        let what = format!("drawn scenes, {}x{}", scenes.width, scenes.height);
        Ok(Connected { link: Box::new(scenes), what, adjusted: Vec::new() })
    }

    fn reopens(&self) -> bool {
        false
    }
}

struct Scenes {
    seed: u64,
    width: u32,
    height: u32,
    scene_frames: u64,
    count: Option<u64>,
    interval: Duration,
    next: u64,
    due: Instant,
}

impl Link for Scenes {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        if self.count.is_some_and(|count| self.next >= count) {
            return Ok(Received::End);
        }
        let until_due = self.due.saturating_duration_since(Instant::now());
        std::thread::sleep(until_due.min(wait));
        if until_due > wait {
            return Ok(Received::Nothing);
        }
        self.due = (self.due + self.interval).max(Instant::now());
        let (scene, step) = (self.next / self.scene_frames, self.next % self.scene_frames);
        self.next += 1;
        Ok(Received::Frame(Shot {
            data: FrameData::Rgb8(Scene::new(self.seed, scene).draw(step, self.width, self.height)),
            width: self.width,
            height: self.height,
            captured: SystemTime::now(),
            number: None,
            source: None,
        }))
    }
}

/// A generator of numbers by lot: SplitMix64 (Steele, Lea and Flood, 2014).
struct Lot(u64);

impl Lot {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// From `least` to `most`.
    fn between(&mut self, least: f32, most: f32) -> f32 {
        least + (most - least) * ((self.next() >> 40) as f32 / 16_777_216.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Circle,
    Square,
    Triangle,
    Heart,
    Cross,
}

const SHAPES: [Shape; 5] = [Shape::Circle, Shape::Square, Shape::Triangle, Shape::Heart, Shape::Cross];

/// Red, orange, yellow, green, blue, purple, black and white.
const COLOURS: [[u8; 3]; 8] =
    [[214, 30, 36], [246, 134, 16], [248, 222, 32], [34, 150, 58], [32, 74, 206], [132, 44, 160], [20, 20, 22], [246, 246, 246]];

/// White, gray, black, beige, pink and brown.
const GROUNDS: [[u8; 3]; 6] = [[236, 236, 234], [140, 142, 146], [26, 26, 28], [222, 200, 160], [244, 176, 196], [112, 74, 46]];

/// Least distance of a shape's colour from the ground's, squared.
const LEAST_CONTRAST: i32 = 95 * 95;

impl Shape {
    /// Whether a point lies inside the shape, drawn into the unit circle, y downwards.
    fn holds(self, x: f32, y: f32) -> bool {
        match self {
            Self::Circle => x * x + y * y <= 0.92,
            Self::Square => x.abs().max(y.abs()) <= 0.7,
            Self::Triangle => y <= 0.5 && 0.866 * x.abs() - 0.5 * y <= 0.5,
            Self::Heart => {
                // (x² + y² − 1)³ ≤ x² y³, y upwards, scaled into the unit circle.
                let (x, y) = (x * 1.26, 0.25 - y * 1.26);
                let bulge = x * x + y * y - 1.0;
                bulge * bulge * bulge <= x * x * y * y * y
            }
            Self::Cross => x.abs().min(y.abs()) <= 0.3 && x.abs().max(y.abs()) <= 0.94,
        }
    }
}

/// A shape that goes to and fro. Lengths are shares of the picture's shorter side, the origin is its centre.
#[derive(Debug, Clone, PartialEq)]
struct Object {
    shape: Shape,
    colour: [u8; 3],
    centre: [f32; 2],
    radius: f32,
    /// How far it goes from its centre, to both sides.
    sway: [f32; 2],
}

#[derive(Debug, Clone, PartialEq)]
struct Scene {
    ground: [u8; 3],
    objects: Vec<Object>,
}

impl Scene {
    /// The scene of a number: one object in the middle, or two side by side.
    fn new(seed: u64, number: u64) -> Self {
        let mut lot = Lot(seed ^ number.wrapping_mul(0xD134_2543_DE82_EF95));
        let ground = GROUNDS[lot.below(GROUNDS.len())];
        let colours: Vec<[u8; 3]> = COLOURS.into_iter().filter(|colour| distance(*colour, ground) >= LEAST_CONTRAST).collect();
        let count = 1 + lot.below(2);
        let (shape, colour) = (lot.below(SHAPES.len()), lot.below(colours.len()));
        let objects = (0..count).map(|index| {
            let side = if index == 0 { -1.0 } else { 1.0 };
            Object {
                // Two objects differ in both.
                shape: SHAPES[(shape + index) % SHAPES.len()],
                colour: colours[(colour + index) % colours.len()],
                centre: [if count == 1 { 0.0 } else { 0.25 * side }, lot.between(-0.1, 0.1)],
                radius: if count == 1 { lot.between(0.18, 0.28) } else { lot.between(0.13, 0.18) },
                sway: [lot.between(-0.05, 0.05), lot.between(-0.05, 0.05)],
            }
        });
        let objects = objects.collect();
        Self { ground, objects }
    }

    /// Red, green and blue bytes, `[height, width, 3]`, of the picture at a step of the movement.
    fn draw(&self, step: u64, width: u32, height: u32) -> Vec<u8> {
        let mut rgb = self.ground.repeat(width as usize * height as usize);
        // To one side, back, and to the other side, in 40 steps.
        let phase = (step % 40) as f32 / 10.0;
        let way = if phase < 1.0 {
            phase
        } else if phase < 3.0 {
            2.0 - phase
        } else {
            phase - 4.0
        };
        let side = width.min(height) as f32;
        for object in &self.objects {
            let x = width as f32 / 2.0 + side * (object.centre[0] + way * object.sway[0]);
            let y = height as f32 / 2.0 + side * (object.centre[1] + way * object.sway[1]);
            paint(&mut rgb, (width, height), object, [x, y], (side * object.radius).max(1.0));
        }
        rgb
    }
}

fn distance(a: [u8; 3], b: [u8; 3]) -> i32 {
    a.into_iter().zip(b).map(|(a, b)| (i32::from(a) - i32::from(b)) * (i32::from(a) - i32::from(b))).sum()
}

/// Draws an object with smooth edges; centre and radius are in pixels.
fn paint(rgb: &mut [u8], (width, height): (u32, u32), object: &Object, centre: [f32; 2], radius: f32) {
    let span = |centre: f32, end: u32| {
        let from = (centre - radius).max(0.0) as u32;
        from.min(end)..((centre + radius) as u32 + 1).min(end)
    };
    for row in span(centre[1], height) {
        for column in span(centre[0], width) {
            let samples = (0..SAMPLES * SAMPLES).filter(|sample| {
                let offset = |index: u32| (index as f32 + 0.5) / SAMPLES as f32;
                let x = (column as f32 + offset(sample % SAMPLES) - centre[0]) / radius;
                let y = (row as f32 + offset(sample / SAMPLES) - centre[1]) / radius;
                object.shape.holds(x, y)
            });
            let covered = samples.count() as u32;
            let at = (row as usize * width as usize + column as usize) * 3;
            for (under, over) in rgb[at..at + 3].iter_mut().zip(object.colour) {
                let (all, part) = (SAMPLES * SAMPLES, covered * u32::from(over));
                *under = ((part + (all - covered) * u32::from(*under) + all / 2) / all) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn frames(uri: &str) -> Vec<Vec<u8>> {
        let mut camera = super::super::open(uri, &CameraOptions::default()).unwrap();
        let frames = std::iter::from_fn(|| camera.next(SOON).unwrap());
        frames.map(|frame| frame.data.bytes().to_vec()).collect()
    }

    /// A scene in characters: the index of each colour.
    fn ascii(scene: &Scene, step: u64, side: u32) -> String {
        let rgb = scene.draw(step, side, side);
        let rows = rgb.chunks(side as usize * 3).map(|row| {
            let cell = |pixel: &[u8]| if distance([pixel[0], pixel[1], pixel[2]], scene.ground) > 3000 { '#' } else { '.' };
            row.chunks(3).map(cell).collect::<String>()
        });
        rows.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_same_seed_gives_the_same_pictures() {
        let uri = "test://scenes?size=64x48&fps=1000&count=22&change=20&seed=";
        let (seven, again, eight) = (frames(&format!("{uri}7")), frames(&format!("{uri}7")), frames(&format!("{uri}8")));
        assert_eq!(seven.len(), 22);
        assert!(seven == again && seven != eight && seven.iter().all(|frame| frame.len() == 64 * 48 * 3));
        // Moves within a scene, and changes more from one scene to the next.
        let changed = |a: &[u8], b: &[u8]| a.chunks(3).zip(b.chunks(3)).filter(|(a, b)| a != b).count();
        let (move_by, change) = (changed(&seven[0], &seven[10]), changed(&seven[19], &seven[20]));
        assert!(move_by > 0 && change > 5 * move_by, "{move_by} {change}");
    }

    #[test]
    fn pictures_come_at_their_rate_and_waiting_is_no_stall() {
        let options = CameraOptions { stall_after: Duration::from_millis(1), ..CameraOptions::default() };
        let mut camera = super::super::open("test://scenes?size=8x8&fps=4", &options).unwrap();
        assert!(camera.next(SOON).unwrap().is_some());
        assert!(camera.next(Duration::from_millis(2)).unwrap_err().is_timeout());
        assert!(camera.next(SOON).unwrap().is_some());
        assert_eq!((camera.stats().frames, camera.stats().stalls), (2, 0));
    }

    #[test]
    fn shapes_look_like_themselves() {
        let object = |shape, x: f32| Object { shape, colour: [255; 3], centre: [x, 0.0], radius: 0.25, sway: [0.25, 0.0] };
        let scene = Scene { ground: [0; 3], objects: vec![object(Shape::Heart, -0.25), object(Shape::Cross, 0.25)] };
        let expected = "\
....................
....................
....................
....................
....................
.............####...
.########....####...
##########...####...
####################
####################
####################
.########.##########
..######.....####...
...####......####...
....##.......####...
....................
....................
....................
....................
....................";
        let drawn = ascii(&scene, 0, 20);
        assert_eq!(drawn, expected, "\n{drawn}");
        assert_ne!(ascii(&scene, 10, 20), expected);
    }

    #[test]
    fn objects_stand_out_and_stay_inside() {
        for number in 0..200 {
            let scene = Scene::new(3, number);
            assert!((1..=2).contains(&scene.objects.len()));
            for object in &scene.objects {
                assert!(distance(object.colour, scene.ground) >= LEAST_CONTRAST, "{scene:?}");
                for axis in 0..2 {
                    assert!(object.centre[axis].abs() + object.sway[axis].abs() + object.radius < 0.5, "{scene:?}");
                }
            }
        }
    }

    #[test]
    fn wishes_that_cannot_be_met() {
        for (uri, part) in [
            ("test://card", "test://scenes"),
            ("test://scenes?change=0", "at least 1"),
            ("test://scenes?seed=x", "seed=x"),
            ("test://scenes?colour=red", "does not know the wish colour"),
        ] {
            let error = super::super::open(uri, &CameraOptions::default()).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
