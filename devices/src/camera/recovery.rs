//! Losing a source of pictures and finding it again, the same for all kinds of cameras.

use std::time::{Duration, Instant, SystemTime};

use super::{Camera, CameraError, CameraEvent, CameraOptions, CameraStats, Fault, Frame, FrameData};

/// One connection to a source: from opening it to the fault that ends it.
pub(super) trait Link: Send {
    /// What comes within a time, or the fault that ends the connection.
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault>;
}

/// What came over a connection.
#[derive(Debug)]
pub(super) enum Received {
    Frame(Shot),
    /// A picture that is damaged, and how.
    Corrupt(String),
    /// Nothing within the time.
    Nothing,
    /// The source is exhausted.
    End,
}

/// A picture, before it is numbered.
#[derive(Debug)]
pub(super) struct Shot {
    pub(super) data: FrameData,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) captured: SystemTime,
    /// The device's own number for it, where it counts.
    pub(super) number: Option<u64>,
    /// What output calls its source, where that is not the camera.
    pub(super) source: Option<String>,
}

/// Opens connections.
pub(super) trait Connect: Send {
    /// Opens the source.
    fn connect(&mut self) -> Result<Connected, Fault>;

    /// Whether it can be opened more than once.
    fn reopens(&self) -> bool {
        true
    }
}

/// A connection just opened.
pub(super) struct Connected {
    pub(super) link: Box<dyn Link>,
    /// How it was opened, in words.
    pub(super) what: String,
    /// Wishes that were not met: what was wished, what is given.
    pub(super) adjusted: Vec<(String, String)>,
}

/// Waits that double from one failure to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first.min(longest) }
    }

    /// How long to wait now.
    pub(super) fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(self.longest);
        wait
    }

    pub(super) fn reset(&mut self) {
        self.next = self.first.min(self.longest);
    }
}

/// A camera that is opened anew whenever it is lost.
pub(super) struct Recovering<C> {
    name: String,
    connect: C,
    options: CameraOptions,
    link: Option<Box<dyn Link>>,
    backoff: Backoff,
    retry_at: Instant,
    /// How long the source has been listened to in vain.
    silent: Duration,
    stats: CameraStats,
    next_sequence: u64,
    last_number: Option<u64>,
    opened_before: bool,
    ended: bool,
    live: bool,
}

impl<C: Connect> Recovering<C> {
    /// Opens the source for the first time.
    ///
    /// # Errors
    /// Where that fails, unless the options say to wait for the camera and waiting may help.
    pub(super) fn open(name: String, connect: C, options: &CameraOptions) -> Result<Self, CameraError> {
        let mut camera = Self {
            name,
            connect,
            options: options.clone(),
            link: None,
            backoff: Backoff::new(options.first_retry, options.longest_retry),
            retry_at: Instant::now(),
            silent: Duration::ZERO,
            stats: CameraStats::default(),
            next_sequence: 0,
            last_number: None,
            opened_before: false,
            ended: false,
            live: true,
        };
        camera.connect()?;
        Ok(camera)
    }

    /// The same, of pictures that wait for whoever asks.
    pub(super) fn not_live(self) -> Self {
        Self { live: false, ..self }
    }

    fn tell(&self, event: &CameraEvent) {
        self.options.events.tell(&self.name, event);
    }

    fn connect(&mut self) -> Result<(), CameraError> {
        let connected = match self.connect.connect() {
            Ok(connected) => connected,
            Err(fault) => return self.lost(fault),
        };
        self.link = Some(connected.link);
        self.silent = Duration::ZERO;
        self.last_number = None;
        self.stats.reconnects += u64::from(self.opened_before);
        for (wished, given) in connected.adjusted {
            self.tell(&CameraEvent::Adjusted { wished, given });
        }
        self.tell(&CameraEvent::Opened { what: connected.what, again: self.opened_before });
        self.opened_before = true;
        Ok(())
    }

    /// Closes the connection and plans the next attempt, unless the fault is final.
    fn lost(&mut self, fault: Fault) -> Result<(), CameraError> {
        self.link = None;
        let is_final =
            !self.connect.reopens() || (self.stats.frames == 0 && (!self.options.wait_for_camera || fault.is_permanent()));
        if is_final {
            self.ended = true;
            return Err(CameraError::Fault { camera: self.name.clone(), fault });
        }
        let retry_in = self.backoff.wait();
        self.retry_at = Instant::now() + retry_in;
        self.tell(&CameraEvent::Lost { reason: fault.to_string(), retry_in });
        Ok(())
    }

    /// Counts silence; a source that can be opened anew is, once it has been silent for too long.
    fn listened(&mut self, time: Duration) -> Result<(), CameraError> {
        self.silent += time;
        if self.silent < self.options.stall_after {
            return Ok(());
        }
        let silent = std::mem::take(&mut self.silent);
        self.stats.stalls += 1;
        if self.connect.reopens() {
            return self.lost(Fault::Stalled(silent));
        }
        self.tell(&CameraEvent::Silent { silent });
        Ok(())
    }

    fn frame(&mut self, shot: Shot) -> Frame {
        self.backoff.reset();
        self.silent = Duration::ZERO;
        self.stats.frames += 1;
        if let Some(number) = shot.number {
            let skipped = self.last_number.map_or(0, |last| number.saturating_sub(last.saturating_add(1)));
            self.last_number = Some(number);
            if skipped > 0 {
                self.stats.skipped += skipped;
                self.next_sequence += skipped;
                self.tell(&CameraEvent::Skipped { frames: skipped, total: self.stats.skipped });
            }
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        Frame {
            data: shot.data,
            width: shot.width,
            height: shot.height,
            sequence,
            captured: shot.captured,
            source: shot.source.unwrap_or_else(|| self.name.clone()),
        }
    }
}

impl<C: Connect> Camera for Recovering<C> {
    fn next(&mut self, timeout: Duration) -> Result<Option<Frame>, CameraError> {
        let begun = Instant::now();
        let left = || timeout.saturating_sub(begun.elapsed());
        loop {
            if self.ended {
                return Ok(None);
            }
            let Some(link) = &mut self.link else {
                std::thread::sleep(self.retry_at.saturating_duration_since(Instant::now()).min(left()));
                if Instant::now() >= self.retry_at {
                    self.connect()?;
                } else {
                    return Err(CameraError::Timeout { camera: self.name.clone(), waited: begun.elapsed() });
                }
                continue;
            };
            let listening = Instant::now();
            let wait = left().min(self.options.stall_after.saturating_sub(self.silent));
            match link.receive(wait) {
                Ok(Received::Frame(shot)) => return Ok(Some(self.frame(shot))),
                // A source that gives nothing but damaged pictures is as good as silent.
                Ok(Received::Corrupt(reason)) => {
                    self.stats.corrupt += 1;
                    self.tell(&CameraEvent::Corrupt { reason, total: self.stats.corrupt });
                    self.listened(listening.elapsed())?;
                }
                Ok(Received::Nothing) => self.listened(listening.elapsed())?,
                Ok(Received::End) => {
                    self.ended = true;
                    self.link = None;
                    self.tell(&CameraEvent::Ended);
                }
                Err(fault) => self.lost(fault)?,
            }
            if !self.ended && left().is_zero() {
                return Err(CameraError::Timeout { camera: self.name.clone(), waited: begun.elapsed() });
            }
        }
    }

    fn stats(&self) -> CameraStats {
        self.stats
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn is_live(&self) -> bool {
        self.live
    }
}
