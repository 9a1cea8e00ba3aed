//! How many captions the change gate of `unimo watch` saves, and what it fails to notice.
//!
//! ```text
//! cargo run --release -p unimo-benches --bin gate-saving -- flickr8k/dev-0000.tar
//! ```
//!
//! Streams are made of photographs, since none of a camera is at hand: each is a scene that stays for a while, and halfway a part
//! of another photograph enters it (a quarter of the frame's width, half of its height). Every frame has a sensor's noise (uniform,
//! ±8 of 255 levels) and is compressed as a camera's MJPEG. Three cameras see the scenes: one that stands `still`, one under changing `light` (brightness
//! swings by ±15 % in 20 frames), and one that `sways` (up to 8 of 640 pixels in each direction, anew in every frame).
//!
//! Prints a Markdown table with a row for each gate, a cosine distance: of each camera, the captions made of a scene, of which two are
//! needed, and the share of scenes that got none; of the still one, the share of what enters that got none. Above the table: of each
//! camera the share of frames that differed in pixels and were shown to the model at all.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Parser;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{RgbImage, SubImage};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use unimo::bundle::BundleSource;
use unimo::engine::EngineOptions;
use unimo::image::{DecodeLimits, decode};
use unimo::model::{GraphName, Model};
use unimo::watch::gate::Gate;
use unimo_train::shards::read_shards;

/// Size of a frame.
const WIDTH: u32 = 640;
/// Size of a frame.
const HEIGHT: u32 = 480;
/// Pixels that a camera sways at most, in each direction.
const SWAY: u32 = 8;
/// Levels of noise either way.
const NOISE: i32 = 8;
/// Share by which the brightness swings.
const SWING: f32 = 0.15;
/// Frames of a swing.
const PERIOD: f32 = 20.0;
/// Quality of the frames' compression.
const QUALITY: u8 = 85;
/// What has to be captioned of a scene: it, and what enters.
const NEEDED: usize = 2;

/// Measures what the change gate saves and misses.
#[derive(Debug, Parser)]
struct Args {
    /// Shards (or folders of shards) of photographs
    #[arg(required = true, value_name = "SHARD")]
    shards: Vec<PathBuf>,
    /// Scenes, the first photographs of the shards
    #[arg(long, default_value_t = 100)]
    scenes: usize,
    /// Frames of a scene
    #[arg(long, default_value_t = 20)]
    frames: usize,
    /// Gates that are compared
    #[arg(long, value_delimiter = ',', value_name = "DISTANCES", default_value = "0.01,0.02,0.03,0.05,0.08,0.12,0.2")]
    gates: Vec<f32>,
    /// Bundle to run
    #[arg(long, value_name = "PATH", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/bundle/default.tar"))]
    bundle: PathBuf,
}

#[derive(Clone, Copy, PartialEq)]
enum Camera {
    Still,
    Light,
    Sways,
}

/// What a gate made of a camera's stream.
#[derive(Default)]
struct Outcome {
    captions: usize,
    /// Scenes without a caption before something enters.
    scenes_missed: usize,
    /// Scenes without a caption after it.
    entrants_missed: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.frames >= NEEDED, "--frames {} leaves nothing to be saved", args.frames);
    let mut photographs = Vec::new();
    read_shards(&args.shards, |sample| {
        if photographs.len() < args.scenes {
            photographs.extend(sample.image.and_then(|bytes| decode(&bytes, &DecodeLimits::default()).ok()));
        }
        Ok(())
    })?;
    ensure!(photographs.len() >= 2, "two photographs at least are needed");
    let scenes: Vec<[RgbImage; 2]> = (0..photographs.len())
        .map(|i| {
            let scene = filled(&photographs[i]);
            let other = filled(&photographs[(i + 1) % photographs.len()]);
            let entered = with_entrant(&scene, &other);
            [scene, entered]
        })
        .collect();

    let model = Model::open(&BundleSource::Path(args.bundle.clone()), &EngineOptions::default())?;
    model.load(&[GraphName::Vision])?;
    let cameras = [Camera::Still, Camera::Light, Camera::Sways];
    let mut streams = Vec::new();
    for camera in cameras {
        streams.push(embeddings(&model, &scenes, camera, args.frames)?);
    }
    println!("{} scenes of {} frames; shown to the model because their pixels differ:", scenes.len(), args.frames);
    for (name, stream) in ["still", "light", "sways"].into_iter().zip(&streams) {
        let shown = stream.iter().flatten().filter(|embedding| embedding.is_some()).count();
        println!("{name} {:.0} %", 100.0 * shown as f64 / (scenes.len() * args.frames) as f64);
    }
    println!(
        "\n| gate | still: captions a scene | scenes missed | entrants missed | light: captions | missed | sways: captions | missed |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for gate in args.gates {
        let [still, light, sways] = [0, 1, 2].map(|camera| outcome(&streams[camera], gate));
        let each = |count: usize| format!("{:.1}", count as f64 / scenes.len() as f64);
        let share = |count: usize| format!("{:.0} %", 100.0 * count as f64 / scenes.len() as f64);
        println!(
            "| {gate} | {} | {} | {} | {} | {} | {} | {} |",
            each(still.captions),
            share(still.scenes_missed),
            share(still.entrants_missed),
            each(light.captions),
            share(light.scenes_missed),
            each(sways.captions),
            share(sways.scenes_missed),
        );
    }
    Ok(())
}

/// A photograph that fills a frame and the margin that a camera sways in.
fn filled(photograph: &RgbImage) -> RgbImage {
    let [width, height] = [WIDTH + 2 * SWAY, HEIGHT + 2 * SWAY];
    let scale = (f64::from(width) / f64::from(photograph.width())).max(f64::from(height) / f64::from(photograph.height()));
    let side = |side: u32| (f64::from(side) * scale).ceil() as u32;
    let large = imageops::resize(photograph, side(photograph.width()), side(photograph.height()), FilterType::Triangle);
    crop(&large, (large.width() - width) / 2, (large.height() - height) / 2, width, height).to_image()
}

fn crop(image: &RgbImage, x: u32, y: u32, width: u32, height: u32) -> SubImage<&RgbImage> {
    imageops::crop_imm(image, x, y, width, height)
}

/// A scene that the middle of another has entered, in the middle of its left half.
fn with_entrant(scene: &RgbImage, other: &RgbImage) -> RgbImage {
    let [width, height] = [WIDTH / 4, HEIGHT / 2];
    let entrant = crop(other, (other.width() - width) / 2, (other.height() - height) / 2, width, height);
    let mut entered = scene.clone();
    imageops::replace(&mut entered, &entrant.to_image(), i64::from(WIDTH / 8), i64::from(HEIGHT / 4));
    entered
}

/// Of every frame that the gate shows to the model, the embedding; scene by scene.
fn embeddings(
    model: &Model,
    scenes: &[[RgbImage; 2]],
    camera: Camera,
    frames: usize,
) -> anyhow::Result<Vec<Vec<Option<Vec<f32>>>>> {
    let mut rng = StdRng::seed_from_u64(1);
    // The first look takes no account of the distance.
    let mut gate = Gate::new(Some(0.0));
    let mut stream = Vec::new();
    for (scene, both) in scenes.iter().enumerate() {
        let mut seen = Vec::new();
        for frame in 0..frames {
            let image = &both[usize::from(frame >= frames / 2)];
            let image = captured(image, camera, scene * frames + frame, &mut rng)?;
            seen.push(if gate.same_pixels(&image) { None } else { Some(model.embed_image(&image)?) });
        }
        stream.push(seen);
    }
    Ok(stream)
}

/// The frame of a number, as it comes out of the camera and is decoded.
fn captured(scene: &RgbImage, camera: Camera, number: usize, rng: &mut StdRng) -> anyhow::Result<RgbImage> {
    let [x, y] = [0, 1].map(|_| if camera == Camera::Sways { rng.random_range(0..=2 * SWAY) } else { SWAY });
    let mut frame = crop(scene, x, y, WIDTH, HEIGHT).to_image();
    let mut light = 1.0;
    if camera == Camera::Light {
        light += SWING * (std::f32::consts::TAU * number as f32 / PERIOD).sin();
    }
    for value in frame.as_flat_samples_mut().samples {
        let noise = rng.random_range(-NOISE..=NOISE);
        *value = ((f32::from(*value) * light) as i32 + noise).clamp(0, 255) as u8;
    }
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY).encode_image(&frame)?;
    Ok(decode(&jpeg, &DecodeLimits::default())?)
}

/// What a gate makes of a stream, of which the model has seen some frames.
fn outcome(stream: &[Vec<Option<Vec<f32>>>], distance: f32) -> Outcome {
    let mut gate = Gate::new(Some(distance));
    let mut outcome = Outcome::default();
    for scene in stream {
        let mut captioned = |frames: &[Option<Vec<f32>>]| {
            let seen = frames.iter().flatten();
            seen.filter(|embedding| !gate.same_scene(embedding)).count()
        };
        let (before, after) = scene.split_at(scene.len() / 2);
        let (before, after) = (captioned(before), captioned(after));
        outcome.captions += before + after;
        outcome.scenes_missed += usize::from(before == 0);
        outcome.entrants_missed += usize::from(after == 0);
    }
    outcome
}
