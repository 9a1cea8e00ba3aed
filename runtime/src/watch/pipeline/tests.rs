//! The pipeline with a camera and a model that do what a test says, when it says so.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::SystemTime;

use unimo_devices::camera::Fault;

use super::*;
use crate::captioning::Caption;
use crate::model::ModelError;
use crate::watch::sink::FailureKind;

/// A camera's next answer.
enum Step {
    Frame(Frame),
    End,
    Fault,
}

/// A camera that gives what a test sends.
struct Script {
    steps: Receiver<Step>,
    /// Told of each frame once it is in the slot: when the camera is asked for the one behind it.
    placed: Sender<u64>,
    given: Option<u64>,
    stats: CameraStats,
    live: bool,
}

impl Camera for Script {
    fn next(&mut self, timeout: Duration) -> Result<Option<Frame>, CameraError> {
        if let Some(given) = self.given.take() {
            let _ = self.placed.send(given);
        }
        let camera = "script".to_owned();
        match self.steps.recv_timeout(timeout) {
            Ok(Step::Frame(frame)) => {
                self.given = Some(frame.sequence);
                self.stats.frames += 1;
                Ok(Some(frame))
            }
            Ok(Step::Fault) => Err(CameraError::Fault { camera, fault: Fault::Unplugged }),
            Err(RecvTimeoutError::Timeout) => Err(CameraError::Timeout { camera, waited: timeout }),
            Ok(Step::End) | Err(RecvTimeoutError::Disconnected) => Ok(None),
        }
    }

    fn stats(&self) -> CameraStats {
        self.stats
    }

    fn name(&self) -> &str {
        "script"
    }

    fn is_live(&self) -> bool {
        self.live
    }
}

fn script(live: bool) -> (Box<Script>, Sender<Step>, Receiver<u64>) {
    let ((sender, steps), (placed, placements)) = (mpsc::channel(), mpsc::channel());
    (Box::new(Script { steps, placed, given: None, stats: CameraStats::default(), live }), sender, placements)
}

/// A frame of one colour.
fn frame(sequence: u64, colour: [u8; 3]) -> Frame {
    let data = FrameData::Rgb8(colour.repeat(12));
    Frame { data, width: 4, height: 3, sequence, captured: SystemTime::UNIX_EPOCH, source: "script".to_owned() }
}

/// A model that sees the colour of the first pixel: red is the angle of the embedding, in hundredths, all three are the caption.
/// Where it is held, it tells what it looks at and waits.
#[derive(Default)]
struct Eye {
    held: Option<Held>,
}

/// Told of what is looked at, and asked before going on.
type Held = (Sender<[u8; 3]>, Mutex<Receiver<()>>);

struct Glance {
    colour: [u8; 3],
    embedding: [f32; 2],
}

impl Captioner for Eye {
    type Seen = Glance;

    fn see(&self, image: &RgbImage) -> Result<Glance, ModelError> {
        let colour = image.get_pixel(0, 0).0;
        if let Some((looking, go)) = &self.held {
            looking.send(colour).unwrap();
            go.lock().unwrap().recv().unwrap();
        }
        if colour == [66, 66, 6] {
            return Err(ModelError::TooManyWords { asked: 66, most: 6 });
        }
        let angle = f32::from(colour[0]) / 100.0;
        Ok(Glance { colour, embedding: [angle.cos(), angle.sin()] })
    }

    fn embedding<'a>(&self, seen: &'a Glance) -> &'a [f32] {
        &seen.embedding
    }

    fn caption(&self, seen: &Glance) -> Result<Caption, ModelError> {
        Ok(Caption { text: format!("{:?}", seen.colour), tokens: vec![5, 6], score: -0.5, steps: 3 })
    }
}

/// A held model, what it looks at, and what lets it go on.
fn held_eye() -> (Eye, Receiver<[u8; 3]>, Sender<()>) {
    let ((looking, looks), (go, gone)) = (mpsc::channel(), mpsc::channel());
    (Eye { held: Some((looking, Mutex::new(gone))) }, looks, go)
}

/// What sinks were told, in words.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// A sink that notes everything, and fails as it is told to.
struct Notes {
    told: Told,
    fails: Option<fn() -> SinkError>,
}

impl Sink for Notes {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        self.told.note(format!("{} {}", captioned.sequence, captioned.caption.text));
        self.fails.map_or(Ok(()), |fails| Err(fails()))
    }

    fn unchanged(&mut self, counts: &Counts, temperature_c: Option<f32>) -> Result<(), SinkError> {
        self.told.note(format!("unchanged {} {temperature_c:?}", counts.unchanged()));
        Ok(())
    }

    fn bad(&mut self, bad: &Bad) -> Result<(), SinkError> {
        self.told.note(format!("bad {} {}", bad.sequence, bad.error));
        Ok(())
    }

    fn finish(&mut self, counts: &Counts) -> Result<(), SinkError> {
        self.told.note(format!("end {}", counts.captioned));
        Ok(())
    }
}

fn notes() -> (Told, Vec<Box<dyn Sink>>) {
    let told = Told::default();
    (told.clone(), vec![Box::new(Notes { told, fails: None })])
}

fn silent(_: &str) {}

fn options(gate: Option<f32>) -> WatchOptions {
    WatchOptions { gate, ..WatchOptions::default() }
}

/// Watches frames that are all there from the beginning, and wait for their turn.
fn watched(frames: Vec<Frame>, eye: &Eye, options: &WatchOptions) -> (Vec<String>, Summary) {
    let (camera, steps, _placed) = script(false);
    for frame in frames {
        steps.send(Step::Frame(frame)).unwrap();
    }
    drop(steps);
    let (told, sinks) = notes();
    let summary = Watch::default().run(camera, eye, sinks, options, &|| Some(41.5), &silent);
    (told.all(), summary)
}

#[test]
fn the_newest_frame_wins_and_the_others_are_counted() {
    let (camera, steps, placed) = script(true);
    let (eye, looks, go) = held_eye();
    let (told, sinks) = notes();
    let watch = Watch::default();
    thread::scope(|scope| {
        // Dropped where an assertion fails, or the watch would wait for more for ever.
        let (steps, go) = (steps, go);
        let run = scope.spawn(|| watch.run(camera, &eye, sinks, &options(None), &|| None, &silent));
        let give = |sequence: u64| {
            steps.send(Step::Frame(frame(sequence, [sequence as u8; 3]))).unwrap();
            assert_eq!(placed.recv().unwrap(), sequence);
        };
        give(0);
        assert_eq!(looks.recv().unwrap(), [0; 3]);
        // While it looks at the first, four more come.
        (1..=4).for_each(give);
        go.send(()).unwrap();
        assert_eq!(looks.recv().unwrap(), [4; 3], "not the newest");
        give(5);
        go.send(()).unwrap();
        assert_eq!(looks.recv().unwrap(), [5; 3]);
        steps.send(Step::End).unwrap();
        go.send(()).unwrap();
        let summary = run.join().unwrap();
        assert_eq!(summary.ended.unwrap(), Ended::Source);
        let counts = summary.counts;
        assert_eq!((counts.camera.frames, counts.captioned, counts.dropped, counts.between), (6, 3, 3, 0));
    });
    assert_eq!(told.all(), ["0 [0, 0, 0]", "4 [4, 4, 4]", "5 [5, 5, 5]", "end 3"]);
}

#[test]
fn pictures_of_a_folder_wait_for_their_turn() {
    let frames = (0..200).map(|sequence| frame(sequence, [sequence as u8; 3])).collect();
    let (told, summary) = watched(frames, &Eye::default(), &options(None));
    let expected: Vec<String> = (0..200).map(|s| format!("{s} [{s}, {s}, {s}]")).chain(["end 200".to_owned()]).collect();
    assert_eq!(told, expected);
    assert_eq!((summary.counts.dropped, summary.counts.camera.frames), (0, 200));
    assert_eq!(summary.ended.unwrap(), Ended::Source);
}

#[test]
fn a_live_stream_can_be_captioned_in_turn_too() {
    let (camera, steps, _placed) = script(true);
    (0..50).for_each(|sequence| steps.send(Step::Frame(frame(sequence, [sequence as u8; 3]))).unwrap());
    drop(steps);
    let (_, sinks) = notes();
    let in_turn = WatchOptions { in_turn: true, ..WatchOptions::default() };
    let counts = Watch::default().run(camera, &Eye::default(), sinks, &in_turn, &|| None, &silent).counts;
    assert_eq!((counts.captioned, counts.dropped), (50, 0));
}

#[test]
fn what_has_not_changed_is_not_captioned() {
    let (eye, looks, go) = held_eye();
    // The model need not wait; it only tells what it has seen.
    (0..9).for_each(|_| go.send(()).unwrap());
    let colours = [
        [10, 0, 0],
        [10, 0, 0],  // the same
        [12, 3, 0],  // noise
        [20, 40, 0], // other pixels; cos of 0.1 is 0.995: the same scene
        [20, 42, 0], // noise, compared with the frame before
        [35, 0, 0],  // cos of 0.25 is 0.969: another scene
        [35, 0, 0],
    ];
    let frames = colours.into_iter().zip(0..).map(|(colour, sequence)| frame(sequence, colour)).collect();
    let (told, summary) = watched(frames, &eye, &options(Some(0.03)));
    let expected = [
        "0 [10, 0, 0]",
        "unchanged 1 Some(41.5)",
        "unchanged 2 Some(41.5)",
        "unchanged 3 Some(41.5)",
        "unchanged 4 Some(41.5)",
        "5 [35, 0, 0]",
        "unchanged 5 Some(41.5)",
        "end 2",
    ];
    assert_eq!(told, expected);
    assert_eq!(looks.try_iter().collect::<Vec<_>>(), [[10, 0, 0], [20, 40, 0], [35, 0, 0]]);
    let Counts { captioned, same_pixels, same_scene, .. } = summary.counts;
    assert_eq!((captioned, same_pixels, same_scene), (2, 4, 1));
}

#[test]
fn it_ends_after_so_many_looks() {
    let frames = |count: u64| (0..count).map(|sequence| frame(sequence, [10 * (sequence / 2) as u8; 3])).collect();
    for (limit, captions) in [(1, 1), (3, 2), (4, 2)] {
        let limited = WatchOptions { frames: Some(limit), ..options(Some(0.001)) };
        let (told, summary) = watched(frames(9), &Eye::default(), &limited);
        assert_eq!((summary.ended.unwrap(), summary.counts.looks()), (Ended::Frames, limit));
        assert_eq!(told.last().unwrap(), &format!("end {captions}"), "{limit}: {told:?}");
    }
    let limited = WatchOptions { frames: Some(99), ..options(None) };
    assert_eq!(watched(frames(9), &Eye::default(), &limited).1.ended.unwrap(), Ended::Source);
}

#[test]
fn looks_are_as_far_apart_as_asked_for() {
    let every = Duration::from_millis(30);
    let frames = (0..4).map(|sequence| frame(sequence, [sequence as u8 * 20; 3])).collect();
    let rare = WatchOptions { every: Some(every), ..options(None) };
    let (told, summary) = watched(frames, &Eye::default(), &rare);
    assert_eq!(told.len(), 5);
    assert!(summary.elapsed >= every * 3, "{:?}", summary.elapsed);

    // No rest behind the last look: this would take an hour.
    let once = WatchOptions { every: Some(Duration::from_secs(3600)), frames: Some(1), ..options(None) };
    let (_, summary) = watched(vec![frame(0, [1; 3]), frame(1, [2; 3])], &Eye::default(), &once);
    assert_eq!(summary.ended.unwrap(), Ended::Frames);
    // Nor behind a source that has ended.
    let rare = WatchOptions { every: Some(Duration::from_secs(3600)), ..options(None) };
    let (_, summary) = watched(vec![frame(0, [1; 3])], &Eye::default(), &rare);
    assert_eq!(summary.ended.unwrap(), Ended::Source);
}

#[test]
fn it_ends_when_the_time_is_over() {
    let duration = Duration::from_millis(40);
    let limited = WatchOptions { duration: Some(duration), every: Some(Duration::from_secs(3600)), ..options(None) };
    for frames in [0, 1] {
        let (camera, steps, _placed) = script(true);
        (0..frames).for_each(|sequence| steps.send(Step::Frame(frame(sequence, [9; 3]))).unwrap());
        let (_, sinks) = notes();
        let summary = Watch::default().run(camera, &Eye::default(), sinks, &limited, &|| None, &silent);
        assert_eq!(summary.ended.unwrap(), Ended::Duration);
        assert!(summary.elapsed >= duration);
        assert_eq!(summary.counts.captioned, frames);
    }
}

#[test]
fn an_interruption_keeps_what_is_begun() {
    let (camera, steps, placed) = script(true);
    let (eye, looks, go) = held_eye();
    let (told, sinks) = notes();
    let watch = Watch::default();
    thread::scope(|scope| {
        // Dropped where an assertion fails, or the watch would wait for more for ever.
        let (steps, go) = (steps, go);
        let run = scope.spawn(|| watch.run(camera, &eye, sinks, &options(None), &|| None, &silent));
        for sequence in [0, 1] {
            steps.send(Step::Frame(frame(sequence, [sequence as u8; 3]))).unwrap();
            assert_eq!(placed.recv().unwrap(), sequence);
            if sequence == 0 {
                looks.recv().unwrap();
            }
        }
        watch.interrupt();
        go.send(()).unwrap();
        let summary = run.join().unwrap();
        assert_eq!(summary.ended.unwrap(), Ended::Interrupted);
        assert!(looks.try_recv().is_err(), "the second frame is looked at");
    });
    assert_eq!(told.all(), ["0 [0, 0, 0]", "end 1"]);
}

#[test]
fn an_interruption_reaches_whoever_waits() {
    // For a camera that gives nothing; for the next look, an hour away; for the slot, with the next picture of a folder.
    let hour = WatchOptions { every: Some(Duration::from_secs(3600)), ..options(None) };
    for (live, frames, options) in [(true, 0, options(None)), (true, 1, hour.clone()), (false, 5, hour)] {
        let (camera, steps, _placed) = script(live);
        (0..frames).for_each(|sequence| steps.send(Step::Frame(frame(sequence, [9; 3]))).unwrap());
        let (told, sinks) = notes();
        let watch = Watch::default();
        thread::scope(|scope| {
            let run = scope.spawn(|| watch.run(camera, &Eye::default(), sinks, &options, &|| None, &silent));
            while frames > 0 && told.all().is_empty() {
                thread::yield_now();
            }
            watch.interrupt();
            assert_eq!(run.join().unwrap().ended.unwrap(), Ended::Interrupted);
        });
    }
}

#[test]
fn output_that_nobody_reads_ends_the_watch() {
    // The camera is there for ever: only the output can end this.
    let (camera, steps, _placed) = script(false);
    (0..20).for_each(|sequence| steps.send(Step::Frame(frame(sequence, [sequence as u8; 3]))).unwrap());
    let told = Told::default();
    let fails: fn() -> SinkError = || SinkError::Output(io::ErrorKind::BrokenPipe.into());
    let sinks: Vec<Box<dyn Sink>> = vec![Box::new(Notes { told: told.clone(), fails: Some(fails) })];
    let summary = Watch::default().run(camera, &Eye::default(), sinks, &options(None), &|| None, &silent);
    assert!(matches!(summary.ended, Err(WatchError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe));
    assert_eq!(told.all(), ["0 [0, 0, 0]"]);
    drop(steps);
}

#[test]
fn sinks_that_fail_are_counted_and_the_others_go_on() {
    let (camera, steps, _placed) = script(false);
    (0..3).for_each(|sequence| steps.send(Step::Frame(frame(sequence, [sequence as u8; 3]))).unwrap());
    drop(steps);
    let (first, second) = (Told::default(), Told::default());
    let fails: fn() -> SinkError = || SinkError::Failed { kind: FailureKind::Storage, sentence: "the disk is full".to_owned() };
    let sinks: Vec<Box<dyn Sink>> =
        vec![Box::new(Notes { told: first, fails: Some(fails) }), Box::new(Notes { told: second.clone(), fails: None })];
    let said = Arc::new(Mutex::new(Vec::new()));
    let say = {
        let said = said.clone();
        move |sentence: &str| said.lock().unwrap().push(sentence.to_owned())
    };
    let summary = Watch::default().run(camera, &Eye::default(), sinks, &options(None), &|| None, &say);
    assert_eq!((summary.failures.storage, summary.failures.device), (3, 0));
    assert_eq!(second.all().len(), 4);
    assert_eq!(*said.lock().unwrap(), ["the disk is full"], "once, not three times");
}

#[test]
fn faults_of_camera_and_model_end_it_with_their_reason() {
    let (camera, steps, _placed) = script(true);
    steps.send(Step::Frame(frame(0, [1; 3]))).unwrap();
    steps.send(Step::Fault).unwrap();
    let (told, sinks) = notes();
    let summary = Watch::default().run(camera, &Eye::default(), sinks, &options(None), &|| None, &silent);
    assert_eq!(summary.ended.unwrap_err().to_string(), "script: it was unplugged");
    assert_eq!(told.all(), ["0 [1, 1, 1]", "end 1"], "what came before the fault is captioned");

    let (told, summary) = watched(vec![frame(0, [1; 3]), frame(1, [66, 66, 6])], &Eye::default(), &options(None));
    assert!(summary.ended.unwrap_err().to_string().contains("66 were asked for"));
    assert_eq!(told, ["0 [1, 1, 1]", "end 1"]);
}

#[test]
fn frames_that_cannot_be_decoded() {
    let broken = |sequence| {
        let data = if sequence % 2 == 0 { FrameData::Jpeg(vec![0xFF, 0xD8, 0xFF, 0xE0]) } else { FrameData::Rgb8(vec![0; 35]) };
        Frame { data, ..frame(sequence, [0; 3]) }
    };
    // Files are told of each time.
    let (told, summary) = watched(vec![broken(0), frame(1, [7; 3]), broken(3)], &Eye::default(), &options(None));
    assert_eq!(told, ["bad 0 the JPEG file is cut short", "1 [7, 7, 7]", "bad 3 35 bytes are no picture of 4x3 pixels", "end 1"]);
    assert_eq!((summary.counts.undecodable, summary.counts.corrupt()), (2, 2));

    // Of a camera's, one in a while.
    let (camera, steps, _placed) = script(true);
    (0..40).for_each(|sequence| steps.send(Step::Frame(broken(sequence))).unwrap());
    drop(steps);
    let said = Arc::new(Mutex::new(Vec::new()));
    let say = {
        let said = said.clone();
        move |sentence: &str| said.lock().unwrap().push(sentence.to_owned())
    };
    let (told, sinks) = notes();
    let in_turn = WatchOptions { in_turn: true, ..WatchOptions::default() };
    let summary = Watch::default().run(camera, &Eye::default(), sinks, &in_turn, &|| None, &say);
    assert_eq!(summary.counts.undecodable, 40);
    assert_eq!(*said.lock().unwrap(), ["script: frame 0 cannot be decoded: the JPEG file is cut short"]);
    assert_eq!(told.all(), ["end 0"]);
}

#[test]
fn encoded_frames_keep_their_file() {
    let mut png = Vec::new();
    let image = RgbImage::from_pixel(5, 4, image::Rgb([9, 8, 7]));
    image.write_to(&mut io::Cursor::new(&mut png), image::ImageFormat::Png).unwrap();
    let (pixels, file) = unpack(FrameData::Encoded(png.clone()), 0, 0).unwrap();
    assert_eq!((pixels, file), (image.clone(), Some(png)));
    let (pixels, file) = unpack(FrameData::Rgb8(image.as_raw().clone()), 5, 4).unwrap();
    assert_eq!((pixels, file), (image, None));
}
