//! Captions on a screen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use unimo_devices::display::layout::{Layout, SCROLL_STEP, Thumbnail, View, scrolled};
use unimo_devices::display::{self, Canvas, Display, DisplayError};

use super::{Sink, SinkError};
use crate::watch::slot::{Slot, Taken};
use crate::watch::{Captioned, Counts, Say};

/// How long after a failure a screen is opened again; doubled each time, up to [`LONGEST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What the screen is to show.
#[derive(Debug, Clone, Default)]
struct Shown {
    caption: String,
    alert: bool,
    thumbnail: Option<Arc<Thumbnail>>,
    latency: Option<Duration>,
    temperature_c: Option<f32>,
}

/// Shows the last caption on a screen. A thread of its own draws, so that a slow panel holds nobody up and long captions scroll;
/// a screen that fails is opened again.
pub struct DisplaySink {
    layout: Layout,
    slot: Arc<Slot<Shown>>,
    thread: Option<JoinHandle<()>>,
    failures: Arc<AtomicU64>,
    shown: Shown,
    /// The last caption, to come back to after a fault of the camera.
    caption: String,
}

impl DisplaySink {
    /// Opens the screen that a URI names and shows a greeting; `say` is told when it fails and when it is back.
    ///
    /// # Errors
    /// A screen that is not there.
    pub fn open(uri: &str, greeting: &str, say: Arc<Say>) -> Result<Self, DisplayError> {
        let mut display = display::open(uri)?;
        let layout = Layout::new(display.geometry());
        let shown = Shown { caption: greeting.to_owned(), ..Shown::default() };
        let mut canvas = layout.canvas();
        layout.draw(&mut canvas, &view(&shown), 0);
        display.present(&canvas)?;
        let slot = Arc::new(Slot::default());
        let failures = Arc::new(AtomicU64::new(0));
        let screen = Screen {
            uri: uri.to_owned(),
            display: Some(display),
            layout: layout.clone(),
            canvas,
            retry: FIRST_RETRY,
            failures: failures.clone(),
            say,
        };
        let thread = thread::spawn({
            let (slot, shown) = (slot.clone(), shown.clone());
            move || screen.run(&slot, shown)
        });
        Ok(Self { layout, slot, thread: Some(thread), failures, caption: shown.caption.clone(), shown })
    }

    fn show(&mut self) {
        self.slot.put(self.shown.clone());
    }
}

impl Sink for DisplaySink {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        let image = &captioned.image;
        self.caption.clone_from(&captioned.caption.text);
        self.shown = Shown {
            caption: self.caption.clone(),
            alert: false,
            thumbnail: Some(Arc::new(self.layout.thumbnail(image.as_raw(), image.width(), image.height()))),
            latency: Some(captioned.times.total()),
            temperature_c: captioned.temperature_c,
        };
        self.show();
        Ok(())
    }

    fn unchanged(&mut self, _: &Counts, temperature_c: Option<f32>) -> Result<(), SinkError> {
        let degrees = |celsius: Option<f32>| celsius.map(f32::round);
        if degrees(self.shown.temperature_c) != degrees(temperature_c) || self.shown.alert {
            self.shown.temperature_c = temperature_c;
            self.shown.caption.clone_from(&self.caption);
            self.shown.alert = false;
            self.show();
        }
        Ok(())
    }

    fn camera_fault(&mut self, fault: Option<&str>) -> Result<(), SinkError> {
        self.shown.alert = fault.is_some();
        fault.unwrap_or(&self.caption).clone_into(&mut self.shown.caption);
        self.show();
        Ok(())
    }

    fn finish(&mut self, _: &Counts) -> Result<(), SinkError> {
        self.slot.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            return Err(SinkError::device("the thread that draws has failed"));
        }
        match self.failures.load(Ordering::SeqCst) {
            0 => Ok(()),
            failures => Err(SinkError::device(format!("{failures} pictures could not be shown on the display"))),
        }
    }
}

impl Drop for DisplaySink {
    fn drop(&mut self) {
        // The thread ends by itself; a watch that was cut short does not wait for it.
        self.slot.close();
    }
}

/// The screen, on its thread.
struct Screen {
    uri: String,
    display: Option<Box<dyn Display>>,
    layout: Layout,
    canvas: Canvas,
    retry: Duration,
    failures: Arc<AtomicU64>,
    say: Arc<Say>,
}

impl Screen {
    fn run(mut self, slot: &Slot<Shown>, mut shown: Shown) {
        let mut since = Instant::now();
        let mut above = 0;
        let mut try_again: Option<Instant> = None;
        loop {
            let hidden = self.layout.hidden_lines(&shown.caption);
            // A caption that scrolls is looked at twice a step, so that it moves evenly.
            let scroll = (hidden > 0).then(|| Instant::now() + SCROLL_STEP / 2);
            let until = [scroll, try_again].into_iter().flatten().min();
            let changed = match slot.take(until) {
                Taken::Item(next) => {
                    if next.caption != shown.caption {
                        since = Instant::now();
                    }
                    shown = next;
                    true
                }
                Taken::TimeUp => false,
                Taken::Closed => return,
            };
            let hidden = self.layout.hidden_lines(&shown.caption);
            let lines = scrolled(hidden, since.elapsed());
            let due = try_again.is_some_and(|at| Instant::now() >= at);
            if !(changed || due || lines != above) {
                continue;
            }
            above = lines;
            if try_again.is_some() && !due {
                self.failures.fetch_add(u64::from(changed), Ordering::SeqCst);
                continue;
            }
            try_again = self.draw(&shown, above).then_some(Instant::now() + self.retry);
        }
    }

    /// Draws; says whether that failed.
    fn draw(&mut self, shown: &Shown, above: usize) -> bool {
        self.layout.draw(&mut self.canvas, &view(shown), above);
        let was_lost = self.display.is_none();
        let result = match &mut self.display {
            Some(display) => display.present(&self.canvas),
            None => display::open(&self.uri).and_then(|mut display| {
                display.present(&self.canvas)?;
                self.display = Some(display);
                Ok(())
            }),
        };
        match result {
            Ok(()) => {
                if was_lost {
                    (self.say)(&format!("the display {} is back", self.uri));
                }
                self.retry = FIRST_RETRY;
                false
            }
            Err(error) => {
                self.failures.fetch_add(1, Ordering::SeqCst);
                if was_lost {
                    self.retry = (self.retry * 2).min(LONGEST_RETRY);
                } else {
                    (self.say)(&error.to_string());
                }
                self.display = None;
                true
            }
        }
    }
}

fn view(shown: &Shown) -> View<'_> {
    View {
        caption: &shown.caption,
        alert: shown.alert,
        thumbnail: shown.thumbnail.as_deref(),
        latency: shown.latency,
        temperature_c: shown.temperature_c,
    }
}
