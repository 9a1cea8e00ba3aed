//! Captions on a serial line.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use unimo_devices::serial::{SerialError, SerialLine};
use unimo_wire::{Caption, Hello, Message, Stats};

use super::{Sink, SinkError};
use crate::watch::{Captioned, Counts};

/// Least time between two messages with counts.
const STATS: Duration = Duration::from_secs(10);
/// Time until a line that was lost is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Sends every caption as a frame of [`unimo_wire`], and counts now and then. A line that was unplugged is opened again.
pub struct SerialSink {
    path: PathBuf,
    baud: u32,
    source: String,
    line: Option<SerialLine>,
    retry: Instant,
    last_stats: Option<Instant>,
    lost: u64,
}

impl SerialSink {
    /// Opens the line and greets the other end; `source` names the camera.
    ///
    /// # Errors
    /// A line that is not there.
    pub fn open(path: &Path, baud: u32, source: &str) -> Result<Self, SerialError> {
        let mut line = SerialLine::open(path, baud)?;
        line.send(&hello(source))?;
        let (path, source) = (path.to_path_buf(), source.to_owned());
        Ok(Self { path, baud, source, line: Some(line), retry: Instant::now(), last_stats: None, lost: 0 })
    }

    fn send(&mut self, message: &Message<'_>) -> Result<(), SinkError> {
        let line = match &mut self.line {
            Some(line) => line,
            closed => {
                if Instant::now() < self.retry {
                    return Ok(());
                }
                self.retry = Instant::now() + RETRY;
                let mut line = SerialLine::open(&self.path, self.baud).map_err(SinkError::device)?;
                line.send(&hello(&self.source)).map_err(SinkError::device)?;
                self.lost = 0;
                closed.insert(line)
            }
        };
        if let Err(error) = line.send(message) {
            (self.line, self.retry) = (None, Instant::now() + RETRY);
            return Err(SinkError::device(error));
        }
        let lost = line.lost();
        if lost > self.lost {
            self.lost = lost;
            return Err(SinkError::device(format!("nobody reads {}: captions are lost", self.path.display())));
        }
        Ok(())
    }

    fn stats(&mut self, counts: &Counts, temperature_c: Option<f32>) -> Result<(), SinkError> {
        self.last_stats = Some(Instant::now());
        self.send(&Message::Stats(Stats {
            frames: counts.camera.frames,
            captioned: counts.captioned,
            unchanged: counts.unchanged(),
            dropped: counts.dropped,
            corrupt: counts.corrupt(),
            reconnects: counts.camera.reconnects,
            stalls: counts.camera.stalls,
            temperature_c,
        }))
    }
}

fn hello(source: &str) -> Message<'_> {
    Message::Hello(Hello { program: env!("CARGO_PKG_VERSION"), source })
}

impl Sink for SerialSink {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        let since_1970 = captioned.captured.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.send(&Message::Caption(Caption {
            sequence: captioned.sequence,
            captured_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            latency_ms: u32::try_from(captioned.times.total().as_millis()).unwrap_or(u32::MAX),
            score: captioned.caption.score,
            text: &captioned.caption.text,
        }))?;
        self.unchanged(&captioned.counts, captioned.temperature_c)
    }

    fn unchanged(&mut self, counts: &Counts, temperature_c: Option<f32>) -> Result<(), SinkError> {
        if self.last_stats.is_some_and(|last| last.elapsed() < STATS) {
            return Ok(());
        }
        self.stats(counts, temperature_c)
    }

    fn finish(&mut self, counts: &Counts) -> Result<(), SinkError> {
        self.stats(counts, None)
    }
}
