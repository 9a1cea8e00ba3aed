//! The three threads of a watch.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use image::RgbImage;
use unimo_devices::camera::{Camera, CameraError, CameraEvent, CameraStats, EventSink, Frame, FrameData};

use super::gate::Gate;
use super::seldom::Seldom;
use super::sink::{Bad, Failures, Sink, SinkError};
use super::slot::{Slot, Taken};
use super::{Captioned, Captioner, Counts, Ended, FrameError, Say, Summary, Times, WatchError, WatchOptions};
use crate::image::{DecodeLimits, decode};

/// How long the camera is asked for a frame before it is looked whether the watch is over.
const ASK: Duration = Duration::from_millis(200);
/// Pause between sentences about damaged frames.
const PAUSE: Duration = Duration::from_secs(5);
/// Captions that wait for the sinks.
const ROOM: usize = 2;

/// What goes from inference to output.
enum Event {
    Captioned(Box<Captioned>),
    Unchanged(Counts, Option<f32>),
    Bad(Bad),
    /// The camera gives no frames, and why; or gives frames again.
    Fault(Option<String>),
    End(Counts),
}

/// A watch, which may be interrupted from any thread.
pub struct Watch {
    slot: Slot<Frame>,
    interrupted: AtomicBool,
    sender: SyncSender<Event>,
    receiver: Mutex<Option<Receiver<Event>>>,
}

impl Default for Watch {
    fn default() -> Self {
        let (sender, receiver) = sync_channel(ROOM);
        let interrupted = AtomicBool::new(false);
        Self { slot: Slot::default(), interrupted, sender, receiver: Mutex::new(Some(receiver)) }
    }
}

/// What capture has to say to inference.
struct Shared<'a> {
    say: &'a Say,
    stats: Mutex<CameraStats>,
}

impl Watch {
    /// Ends the watch: frames that nobody has looked at are thrown away, captions that are made are still put out.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        self.slot.abort();
    }

    /// Tells `say` what happens to the camera, and sinks that it is lost or back.
    #[must_use]
    pub fn camera_events(self: &Arc<Self>, say: Arc<Say>) -> EventSink {
        let (watch, seldom) = (Arc::downgrade(self), Mutex::new(Seldom::new(PAUSE)));
        EventSink::new(move |camera, event| {
            let fault = match event {
                CameraEvent::Ended | CameraEvent::Opened { again: false, .. } => return,
                CameraEvent::Opened { again: true, .. } => Some(None),
                CameraEvent::Lost { .. } | CameraEvent::Silent { .. } => Some(Some(format!("{camera}: {event}"))),
                CameraEvent::Adjusted { .. } => None,
                // They hold their total: those in between need no sentence.
                CameraEvent::Corrupt { .. } | CameraEvent::Skipped { .. } => {
                    let mut seldom = seldom.lock().unwrap_or_else(PoisonError::into_inner);
                    if seldom.ask(Instant::now()).is_none() {
                        return;
                    }
                    None
                }
            };
            say(&format!("{camera}: {event}"));
            if let (Some(fault), Some(watch)) = (fault, watch.upgrade()) {
                // Where there is no room, captions are on their way, which say more.
                let _ = watch.sender.try_send(Event::Fault(fault));
            }
        })
    }

    /// Watches until something ends it. `temperature` is asked after every look; `say` is told what goes wrong with frames and
    /// sinks. A watch runs once.
    pub fn run<C: Captioner>(
        &self,
        camera: Box<dyn Camera>,
        captioner: &C,
        sinks: Vec<Box<dyn Sink>>,
        options: &WatchOptions,
        temperature: &dyn Fn() -> Option<f32>,
        say: &Say,
    ) -> Summary {
        let began = Instant::now();
        let shared = Shared { say, stats: Mutex::default() };
        let live = camera.is_live();
        let in_turn = options.in_turn || !live;
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread::scope(|scope| {
            let output = scope.spawn(|| self.output(receiver, sinks, say));
            let capture = scope.spawn(|| self.capture(camera, in_turn, &shared));
            // Whatever happens here, the other threads are to hear of the end.
            let _guard = Unwinding(self);
            let mut inference = Inference {
                watch: self,
                captioner,
                options,
                temperature,
                shared: &shared,
                gate: Gate::new(options.gate),
                counts: Counts::default(),
                live,
                seldom: Seldom::new(PAUSE),
            };
            let looked = inference.run(began);
            self.slot.abort();
            let captured = join(capture);
            let counts = inference.counts_now();
            let _ = self.sender.send(Event::End(counts));
            let (failures, written) = join(output);
            // What broke first: the output ends everything, a camera's fault only what is behind it.
            let ended = written.and_then(|()| {
                let ended = looked?;
                if ended == Ended::Source { captured.map(|()| ended).map_err(WatchError::from) } else { Ok(ended) }
            });
            Summary { counts, elapsed: began.elapsed(), failures, ended }
        })
    }

    /// Takes frames into the slot until there are no more, or nobody wants them.
    fn capture(&self, mut camera: Box<dyn Camera>, in_turn: bool, shared: &Shared<'_>) -> Result<(), CameraError> {
        let result = loop {
            let next = camera.next(ASK);
            *shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = camera.stats();
            let wanted = match next {
                Ok(Some(frame)) if in_turn => self.slot.put_in_turn(frame),
                Ok(Some(frame)) => self.slot.put(frame),
                Ok(None) => break Ok(()),
                Err(error) if error.is_timeout() => !self.slot.is_closed(),
                Err(error) => break Err(error),
            };
            if !wanted {
                break Ok(());
            }
        };
        self.slot.close();
        result
    }

    /// Hands events to the sinks. A sink that fails is told of and counted; only the output itself failing ends the watch.
    fn output(
        &self,
        receiver: Option<Receiver<Event>>,
        mut sinks: Vec<Box<dyn Sink>>,
        say: &Say,
    ) -> (Failures, Result<(), WatchError>) {
        let mut failures = Failures::default();
        for event in receiver.into_iter().flatten() {
            for sink in &mut sinks {
                let result = match &event {
                    Event::Captioned(captioned) => sink.captioned(captioned),
                    Event::Unchanged(counts, temperature) => sink.unchanged(counts, *temperature),
                    Event::Bad(bad) => sink.bad(bad),
                    Event::Fault(fault) => sink.camera_fault(fault.as_deref()),
                    Event::End(counts) => sink.finish(counts),
                };
                match result {
                    Ok(()) => {}
                    Err(SinkError::Output(error)) => {
                        self.slot.abort();
                        return (failures, Err(WatchError::Output(error)));
                    }
                    Err(SinkError::Failed { kind, sentence }) => failures.note(kind, &sentence, say),
                }
            }
            if matches!(event, Event::End(_)) {
                break;
            }
        }
        (failures, Ok(()))
    }
}

/// Ends the other threads of a watch where this one panics.
struct Unwinding<'a>(&'a Watch);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.slot.abort();
            let _ = self.0.sender.send(Event::End(Counts::default()));
        }
    }
}

/// A thread's result, or its panic.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

struct Inference<'a, C> {
    watch: &'a Watch,
    captioner: &'a C,
    options: &'a WatchOptions,
    temperature: &'a dyn Fn() -> Option<f32>,
    shared: &'a Shared<'a>,
    gate: Gate,
    counts: Counts,
    live: bool,
    seldom: Seldom,
}

impl<C: Captioner> Inference<'_, C> {
    fn run(&mut self, began: Instant) -> Result<Ended, WatchError> {
        let deadline = self.options.duration.map(|duration| began + duration);
        loop {
            if self.options.frames.is_some_and(|frames| self.counts.looks() >= frames) {
                return Ok(Ended::Frames);
            }
            let frame = match self.watch.slot.take(deadline) {
                Taken::Item(frame) => frame,
                Taken::TimeUp => return Ok(Ended::Duration),
                Taken::Closed if self.watch.interrupted.load(Ordering::SeqCst) => return Ok(Ended::Interrupted),
                Taken::Closed => return Ok(Ended::Source),
            };
            let start = Instant::now();
            if deadline.is_some_and(|deadline| start >= deadline) {
                return Ok(Ended::Duration);
            }
            if self.look(frame, start)?.is_break() {
                return Ok(Ended::Output);
            }
            if let Some(every) = self.options.every
                && self.options.frames.is_none_or(|frames| self.counts.looks() < frames)
            {
                let due = start + every;
                self.watch.slot.rest(deadline.map_or(due, |deadline| due.min(deadline)));
            }
        }
    }

    fn look(&mut self, frame: Frame, start: Instant) -> Result<ControlFlow<()>, WatchError> {
        let Frame { data, width, height, sequence, captured, source } = frame;
        let (image, encoded) = match unpack(data, width, height) {
            Ok(unpacked) => unpacked,
            Err(error) => return Ok(self.bad(source, sequence, &error)),
        };
        if self.gate.same_pixels(&image) {
            self.counts.same_pixels += 1;
            return Ok(self.unchanged());
        }
        let decoded = Instant::now();
        let vision = self.captioner.see(&image)?;
        let seen = Instant::now();
        if self.gate.same_scene(self.captioner.embedding(&vision)) {
            self.counts.same_scene += 1;
            return Ok(self.unchanged());
        }
        let caption = self.captioner.caption(&vision)?;
        let times = Times { decode_image: decoded - start, vision: seen - decoded, text: seen.elapsed() };
        self.counts.captioned += 1;
        let embedding = self.captioner.embedding(&vision).to_vec();
        let (counts, live, temperature_c) = (self.counts_now(), self.live, (self.temperature)());
        let captioned =
            Captioned { source, live, sequence, captured, encoded, image, embedding, caption, times, counts, temperature_c };
        Ok(self.send(Event::Captioned(Box::new(captioned))))
    }

    fn unchanged(&self) -> ControlFlow<()> {
        self.send(Event::Unchanged(self.counts_now(), (self.temperature)()))
    }

    /// A damaged frame of a camera is one of many; a damaged file is told of each time, by the sinks.
    fn bad(&mut self, source: String, sequence: u64, error: &FrameError) -> ControlFlow<()> {
        self.counts.undecodable += 1;
        if !self.live {
            return self.send(Event::Bad(Bad { source, sequence, error: error.to_string() }));
        }
        if let Some(held) = self.seldom.ask(Instant::now()) {
            let more = if held > 0 { format!(" ({held} more since the last one)") } else { String::new() };
            (self.shared.say)(&format!("{source}: frame {sequence} cannot be decoded: {error}{more}"));
        }
        ControlFlow::Continue(())
    }

    fn send(&self, event: Event) -> ControlFlow<()> {
        // The output only goes away by itself when it cannot be written.
        if self.watch.sender.send(event).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn counts_now(&self) -> Counts {
        let camera = *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let passed_over = self.watch.slot.passed_over();
        Counts { camera, dropped: passed_over.late, between: passed_over.early, ..self.counts }
    }
}

/// The pixels of a frame, and the file it came as.
fn unpack(data: FrameData, width: u32, height: u32) -> Result<(RgbImage, Option<Vec<u8>>), FrameError> {
    match data {
        FrameData::Jpeg(bytes) | FrameData::Encoded(bytes) => Ok((decode(&bytes, &DecodeLimits::default())?, Some(bytes))),
        FrameData::Rgb8(pixels) => {
            let bytes = pixels.len();
            let image = RgbImage::from_raw(width, height, pixels);
            // More bytes than pixels are as wrong as fewer.
            let image =
                image.filter(|image| image.as_raw().len() == bytes && u64::from(width) * u64::from(height) * 3 == bytes as u64);
            image.map(|image| (image, None)).ok_or(FrameError::Size { bytes, width, height })
        }
    }
}

#[cfg(test)]
mod tests;
