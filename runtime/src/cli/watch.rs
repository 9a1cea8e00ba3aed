//! `unimo watch`.

use std::cell::Cell;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use unimo::model::{GraphName, Model};
use unimo::watch::sink::{DisplaySink, Failures, JsonLines, ModelNames, Saver, SerialSink, Sink, Terminal};
use unimo::watch::{Counts, Ended, ModelCaptioner, Say, Summary, Watch, WatchError, WatchOptions};
use unimo_devices::board::{self, Board};
use unimo_devices::camera::{self, Camera, CameraOptions};
use unimo_devices::telemetry::{Telemetry, Throttling};

use super::ModelArgs;
use super::decode_args::DecodeArgs;
use super::exit::{BAD_INPUT, INTERRUPTED, NO_DEVICE, NOTHING_FOUND, UsageError};

const EXAMPLES: &str = "\
Examples:
  unimo watch v4l2:///dev/video0                          a line whenever the scene changes
  unimo watch rpicam://0 --every 1s --display fb          at most one look a second, on the screen
  unimo watch rpicam://0 --jsonl --gallery g --save shots to search in later
  unimo watch --display auto --engine auto                the board's own camera, screen and engine
  unimo watch pipe://- --serial /dev/ttyUSB0 < stream.mjpeg
  unimo watch holidays/ --gate off --jsonl                every picture of a folder, in turn

Displays:
  fb, fb:///dev/fb0                                       a Linux framebuffer
  ssd1306:///dev/i2c-1?address=0x3c&size=128x64           a small black and white panel on I2C
  st7789:///dev/spidev0.0?dc=25&reset=27&size=240x240     a colour panel on SPI; ili9341:// likewise
  png://out.png?size=320x240                              a picture file, replaced each time
  All take rotate=90, 180 or 270.

A frame that comes while the model is at work takes the place of the one that waits: of a camera the newest frame is captioned,
and late ones are dropped and counted. Pictures of files and folders wait for their turn. The last line on standard error says
what became of the frames. Ends with 130 on SIGINT and SIGTERM, after the captions that are made are put out.
";

/// Caption what a camera sees, as long as it runs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WatchArgs {
    /// A camera, a stream, a folder or a recording [default: the board's camera; see `unimo devices detect`]
    #[arg(value_name = "URI")]
    source: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    decode: DecodeArgs,
    #[command(flatten)]
    when: WhenArgs,
    #[command(flatten)]
    camera: CameraArgs,
    #[command(flatten)]
    sinks: SinkArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "When to look")]
struct WhenArgs {
    /// Least time from one look to the next, as in 500ms, 1s, 2m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    every: Option<Duration>,
    /// End after so many looks at frames
    #[arg(long, value_name = "N")]
    frames: Option<NonZeroU64>,
    /// End after the first look
    #[arg(long, conflicts_with = "frames")]
    once: bool,
    /// End after so long
    #[arg(long, value_name = "TIME", value_parser = duration)]
    duration: Option<Duration>,
    /// Cosine distance to the last captioned frame under which a frame has nothing new; off captions every frame
    #[arg(long, value_name = "DISTANCE", default_value = "0.03", value_parser = gate)]
    gate: Gate,
    /// Caption every frame of a stream in turn, however late, instead of the newest
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Camera")]
struct CameraArgs {
    /// Width and height to ask the camera for
    #[arg(long, value_name = "WxH", value_parser = size)]
    size: Option<(u32, u32)>,
    /// Frames a second to ask the camera for
    #[arg(long, value_name = "N")]
    fps: Option<f32>,
    /// Wait for a camera that is not there, or busy
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Where captions go")]
struct SinkArgs {
    /// Print one JSON object a caption, instead of words
    #[arg(long)]
    jsonl: bool,
    /// Store embeddings and captions in a gallery
    #[cfg(feature = "gallery")]
    #[arg(long, value_name = "FILE")]
    gallery: Option<PathBuf>,
    /// Save captioned frames into a folder
    #[arg(long, value_name = "FOLDER")]
    save: Option<PathBuf>,
    /// Show captions on a display; auto is the board's
    #[arg(long, value_name = "URI")]
    display: Vec<String>,
    /// Send captions over a serial device or pipe, in frames that devices/wire describes
    #[arg(long, value_name = "PATH")]
    serial: Vec<PathBuf>,
    /// Speed of serial devices
    #[arg(long, value_name = "N", default_value_t = 115_200)]
    baud: u32,
}

/// What `--gate` says.
#[derive(Debug, Clone, Copy)]
struct Gate(Option<f32>);

fn gate(text: &str) -> Result<Gate, String> {
    if text == "off" {
        return Ok(Gate(None));
    }
    let distance: Option<f32> = text.parse().ok().filter(|distance| (0.0..=2.0).contains(distance));
    distance.map(|distance| Gate(Some(distance))).ok_or_else(|| "say off, or a distance from 0 to 2".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<jiff::SignedDuration>().ok().and_then(|duration| duration.try_into().ok());
    duration.filter(|duration: &Duration| !duration.is_zero()).ok_or_else(|| "say a time, as in 500ms, 1s, 2m or 1h".to_owned())
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let parse = || {
        let (width, height) = text.split_once('x')?;
        Some((width.parse().ok()?, height.parse().ok()?))
    };
    parse().filter(|&(width, height)| width > 0 && height > 0).ok_or_else(|| "say width and height, as in 640x480".to_owned())
}

pub fn run(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    let say: Arc<Say> = Arc::new(|sentence: &str| eprintln!("{sentence}"));
    let watch = Arc::new(Watch::default());
    interrupt_on_signals(&watch)?;
    // What is not there is found out before the model is loaded.
    let board = board_here()?;
    let source = source(args, board.as_ref())?;
    let camera = open_camera(args, &source, &watch, &say)?;
    let mut sinks = open_devices(&args.sinks, board.as_ref(), camera.name(), &say)?;
    let model = args.model.open()?;
    let options = args.decode.options(&model)?;
    model.load(&[GraphName::Vision, GraphName::Decode])?;
    sinks.extend(open_storage(&args.sinks, &model)?);
    sinks.push(lines(args.sinks.jsonl, &model));

    let when = &args.when;
    let frames = if when.once { Some(1) } else { when.frames.map(NonZeroU64::get) };
    let options_of_watch =
        WatchOptions { every: when.every, frames, duration: when.duration, gate: when.gate.0, in_turn: when.all };
    let live = camera.is_live();
    let thermometer = Thermometer::new(&say);
    let captioner = ModelCaptioner { model: &model, options };
    let summary = watch.run(camera, &captioner, sinks, &options_of_watch, &|| thermometer.read(), &*say);
    finish(&source.uri, live, summary)
}

/// This board, if its file is more than what all of an architecture have in common.
fn board_here() -> anyhow::Result<Option<Board>> {
    let found = board::detect(Path::new("/"), std::env::consts::ARCH)?.board;
    Ok(found.map(|(board, _)| board).filter(|board| !board.is_generic()))
}

/// What is watched, and how.
#[derive(Debug, PartialEq)]
struct Source {
    uri: String,
    size: Option<(u32, u32)>,
    fps: Option<f32>,
}

/// What the command line names, or the board's camera with what its file says of it.
fn source(args: &WatchArgs, board: Option<&Board>) -> Result<Source, UsageError> {
    let CameraArgs { size, fps, .. } = args.camera;
    if let Some(uri) = &args.source {
        return Ok(Source { uri: uri.clone(), size, fps });
    }
    let camera = &board.ok_or_else(|| no_board("say what to watch"))?.camera;
    Ok(Source { uri: camera.uri.clone(), size: size.or(Some(camera.size)), fps: fps.or(camera.fps) })
}

fn no_board(wish: &str) -> UsageError {
    UsageError(format!("this is no board that `unimo devices list` knows: {wish}"))
}

/// The board's temperature, read at most once a second: a look may take less.
struct Thermometer {
    zones: Vec<String>,
    last: Cell<Option<(Instant, Option<f32>)>>,
    throttled: Cell<bool>,
    say: Arc<Say>,
}

impl Thermometer {
    fn new(say: &Arc<Say>) -> Self {
        let detected = board::detect(Path::new("/"), std::env::consts::ARCH).ok();
        let zones = detected.and_then(|detected| detected.board).map(|(board, _)| board.telemetry.thermal_zones);
        Self { zones: zones.unwrap_or_default(), last: Cell::new(None), throttled: Cell::new(false), say: say.clone() }
    }

    fn read(&self) -> Option<f32> {
        if let Some((at, celsius)) = self.last.get()
            && at.elapsed() < Duration::from_secs(1)
        {
            return celsius;
        }
        let telemetry = Telemetry::read(Path::new("/"));
        let causes = telemetry.throttling.map(Throttling::now).unwrap_or_default();
        let words = causes.iter().map(|cause| cause.words()).collect::<Vec<_>>().join(", ");
        let throttled = !words.is_empty();
        if self.throttled.replace(throttled) != throttled {
            (self.say)(&if throttled {
                format!("the board is held back: {words}")
            } else {
                "the board is held back no more".to_owned()
            });
        }
        let celsius = telemetry.hottest_c(&self.zones).map(|celsius| celsius as f32);
        self.last.set(Some((Instant::now(), celsius)));
        celsius
    }
}

/// Lets the first signal end the watch, and a second one the program.
fn interrupt_on_signals(watch: &Arc<Watch>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let watch = watch.clone();
    thread::spawn(move || {
        let mut interrupted = false;
        for _ in signals.forever() {
            if interrupted {
                std::process::exit(INTERRUPTED.into());
            }
            interrupted = true;
            watch.interrupt();
        }
    });
    Ok(())
}

fn open_camera(args: &WatchArgs, source: &Source, watch: &Arc<Watch>, say: &Arc<Say>) -> anyhow::Result<Box<dyn Camera>> {
    let &Source { ref uri, size, fps } = source;
    let (wait_for_camera, events) = (args.camera.wait, watch.camera_events(say.clone()));
    Ok(camera::open(uri, &CameraOptions { size, fps, wait_for_camera, events, ..CameraOptions::default() })?)
}

/// A display as the command line names it, or the board's.
fn display<'a>(uri: &'a str, board: Option<&'a Board>) -> Result<&'a str, UsageError> {
    if uri != "auto" {
        return Ok(uri);
    }
    let board = board.ok_or_else(|| no_board("say which display"))?;
    let display = board.display.as_ref().ok_or_else(|| UsageError(format!("{}: no display is known of it", board.title)))?;
    Ok(&display.uri)
}

fn open_devices(args: &SinkArgs, board: Option<&Board>, camera: &str, say: &Arc<Say>) -> anyhow::Result<Vec<Box<dyn Sink>>> {
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    for uri in &args.display {
        let uri = display(uri, board)?;
        sinks.push(Box::new(DisplaySink::open(uri, &format!("waiting for {camera}"), say.clone())?));
    }
    for path in &args.serial {
        sinks.push(Box::new(SerialSink::open(path, args.baud, camera)?));
    }
    Ok(sinks)
}

fn open_storage(args: &SinkArgs, model: &Model) -> anyhow::Result<Option<Box<dyn Sink>>> {
    let saver = args
        .save
        .as_deref()
        .map(|folder| Saver::new(folder).with_context(|| format!("cannot save frames into {}", folder.display())));
    let saver = saver.transpose()?;
    #[cfg(feature = "gallery")]
    if let Some(path) = &args.gallery {
        let gallery = unimo::gallery::Gallery::open_or_create(path, model.bundle_id(), model.manifest().model.embedding)?;
        return Ok(Some(Box::new(unimo::watch::sink::GallerySink::new(gallery, saver))));
    }
    #[cfg(not(feature = "gallery"))]
    let _ = model;
    Ok(saver.map(|saver| Box::new(saver) as Box<dyn Sink>))
}

fn lines(jsonl: bool, model: &Model) -> Box<dyn Sink> {
    if !jsonl {
        return Box::new(Terminal::new(io::stdout(), io::stderr()));
    }
    let options = model.options();
    let names =
        ModelNames { engine: options.engine.name(), provider: options.provider.name(), precision: model.precision().name() };
    Box::new(JsonLines::new(io::stdout(), names))
}

/// Says how the watch went, and gives the exit code.
fn finish(source: &str, live: bool, summary: Summary) -> anyhow::Result<ExitCode> {
    let Summary { counts, elapsed, failures, ended } = summary;
    eprintln!("watched {source} for {:.1} s: {counts}", elapsed.as_secs_f64());
    let Failures { device, storage, .. } = failures;
    if device + storage > 0 {
        eprintln!("{storage} failures of storage, {device} of displays and serial lines");
    }
    let ended = ended.map_err(parts)?;
    Ok(ExitCode::from(match ended {
        Ended::Interrupted => INTERRUPTED,
        _ if device > 0 => NO_DEVICE,
        _ if storage > 0 => BAD_INPUT,
        // A camera's damaged frames are the way of the world, a damaged file is not.
        _ if !live && counts.corrupt() > 0 => BAD_INPUT,
        Ended::Source if nothing_seen(&counts) => NOTHING_FOUND,
        _ => 0,
    }))
}

/// An error as the one of its part, which has an exit code of its own.
fn parts(error: WatchError) -> anyhow::Error {
    match error {
        WatchError::Camera(error) => error.into(),
        WatchError::Model(error) => error.into(),
        WatchError::Output(error) => anyhow::Error::new(error).context("cannot write the output"),
    }
}

fn nothing_seen(counts: &Counts) -> bool {
    counts.looks() == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_is_the_boards() {
        let of = |words: &[&str]| {
            #[derive(Debug, clap::Parser)]
            struct Line {
                #[command(flatten)]
                args: WatchArgs,
            }
            <Line as clap::Parser>::parse_from([&["watch"], words].concat()).args
        };
        let pi = board::all().unwrap().into_iter().find(|board| board.name == "raspberry-pi-4").unwrap();
        let camera = |uri: &str, size, fps| Ok(Source { uri: uri.to_owned(), size, fps });
        let cases = [
            (vec![], Some(&pi), camera("rpicam://0", Some((640, 480)), Some(10.0))),
            (vec!["--size", "320x240", "--fps", "2"], Some(&pi), camera("rpicam://0", Some((320, 240)), Some(2.0))),
            (vec!["pipe://-"], Some(&pi), camera("pipe://-", None, None)),
            (vec!["pipe://-"], None, camera("pipe://-", None, None)),
            (vec![], None, Err("this is no board that `unimo devices list` knows: say what to watch".to_owned())),
        ];
        for (words, board, expected) in cases {
            assert_eq!(source(&of(&words), board).map_err(|error| error.0), expected, "{words:?}");
        }
        assert_eq!(display("auto", Some(&pi)).unwrap(), "fb:///dev/fb0");
        assert_eq!(display("png://a.png", None).unwrap(), "png://a.png");
        assert!(display("auto", None).unwrap_err().0.ends_with("say which display"));
    }

    #[test]
    fn wishes_in_words() {
        for (text, milliseconds) in [("500ms", 500), ("1s", 1000), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "1", "0s", "-1s", "soon"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(gate("off").map(|gate| gate.0), Ok(None));
        assert_eq!(gate("0.1").map(|gate| gate.0), Ok(Some(0.1)));
        assert!(gate("-1").is_err() && gate("nan").is_err() && gate("on").is_err());
        assert_eq!(size("640x480"), Ok((640, 480)));
        assert!(size("640").is_err() && size("0x4").is_err());
    }
}
