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

    /// See [`Camera::settling`].
    fn settling(&self) -> Duration {
        Duration::ZERO
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

    fn settling(&self) -> Duration {
        self.connect.settling()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::samples::Record;
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// What a connection gives, one after another; it is then silent.
    struct Script(VecDeque<Result<Received, Fault>>);

    impl Link for Script {
        fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
            self.0.pop_front().unwrap_or_else(|| {
                std::thread::sleep(wait);
                Ok(Received::Nothing)
            })
        }
    }

    /// Connections, one an attempt; then there is nobody.
    struct Scripts(VecDeque<Result<Vec<Result<Received, Fault>>, Fault>>);

    impl Connect for Scripts {
        fn connect(&mut self) -> Result<Connected, Fault> {
            let script = self.0.pop_front().unwrap_or_else(|| Err(Fault::Missing("nobody".to_owned())))?;
            Ok(Connected { link: Box::new(Script(script.into())), what: "scripted".to_owned(), adjusted: Vec::new() })
        }
    }

    fn frame(number: u64) -> Result<Received, Fault> {
        Ok(Received::Frame(Shot {
            data: FrameData::Jpeg(Vec::new()),
            width: 1,
            height: 1,
            captured: SystemTime::UNIX_EPOCH,
            number: Some(number),
            source: None,
        }))
    }

    fn corrupt() -> Result<Received, Fault> {
        Ok(Received::Corrupt("torn".to_owned()))
    }

    fn open(
        scripts: Vec<Result<Vec<Result<Received, Fault>>, Fault>>,
        options: &CameraOptions,
    ) -> Result<Recovering<Scripts>, CameraError> {
        Recovering::open("cam".to_owned(), Scripts(scripts.into()), options)
    }

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew() {
        let (first, longest) = (Duration::from_millis(250), Duration::from_millis(1500));
        let mut backoff = Backoff::new(first, longest);
        let waits: Vec<u128> = (0..5).map(|_| backoff.wait().as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 1500, 1500]);
        backoff.reset();
        assert_eq!(backoff.wait(), first);
        assert_eq!(Backoff::new(longest, first).wait(), first);
    }

    #[test]
    fn attempts_are_made_when_they_are_due_and_not_before() {
        let record = Record::default();
        let options = CameraOptions { first_retry: Duration::from_millis(80), ..record.options() };
        let scripts = vec![Ok(vec![frame(0), Err(Fault::Closed)]), Err(Fault::Busy), Ok(vec![frame(0)])];
        let mut camera = open(scripts, &options).unwrap();
        assert!(camera.next(SOON).unwrap().is_some());
        let begun = Instant::now();
        // Closed; the first attempt is not due within this time.
        assert!(camera.next(Duration::from_millis(1)).unwrap_err().is_timeout());
        assert_eq!(record.count("busy"), 0);
        assert!(camera.next(SOON).unwrap().is_some());
        assert!(begun.elapsed() >= Duration::from_millis(80 + 160), "{:?}", begun.elapsed());
        let expected = [
            "cam: open, scripted",
            "cam: the server closed the connection; next attempt in 0.1 s",
            "cam: busy: another program is using it; next attempt in 0.2 s",
            "cam: open again, scripted",
        ];
        assert_eq!(record.lines(), expected);
        assert_eq!(camera.stats(), CameraStats { frames: 2, reconnects: 1, ..CameraStats::default() });
    }

    #[test]
    fn waits_begin_anew_with_every_picture() {
        let record = Record::default();
        let options = CameraOptions { first_retry: Duration::from_millis(100), ..record.options() };
        let lost = || Ok(vec![frame(0), Err(Fault::Closed)]);
        let mut camera = open(vec![lost(), Err(Fault::Closed), lost(), Ok(vec![frame(0)])], &options).unwrap();
        assert!((0..3).all(|_| camera.next(SOON).unwrap().is_some()));
        let waits: Vec<String> = record.lines().iter().filter_map(|line| Some(line.split_once("in ")?.1.to_owned())).collect();
        assert_eq!(waits, ["0.1 s", "0.2 s", "0.1 s"], "{:?}", record.lines());
    }

    #[test]
    fn nothing_but_damaged_pictures_is_as_good_as_silence() {
        let record = Record::default();
        let (stall_after, first_retry) = (Duration::from_millis(50), Duration::from_millis(1));
        let options = CameraOptions { stall_after, first_retry, ..record.options() };
        let torn = || (0..10).map(|_| corrupt());
        let scripts = vec![Ok(torn().chain([frame(0)]).chain(torn()).collect()), Ok(vec![frame(0)])];
        let mut camera = open(scripts, &options).unwrap();
        assert!(camera.next(SOON).unwrap().is_some() && camera.next(SOON).unwrap().is_some());
        assert_eq!(camera.stats(), CameraStats { frames: 2, corrupt: 20, stalls: 1, reconnects: 1, skipped: 0 });

        /// Never silent, and never whole.
        struct Torn;
        impl Link for Torn {
            fn receive(&mut self, _: Duration) -> Result<Received, Fault> {
                std::thread::sleep(Duration::from_millis(5));
                corrupt()
            }
        }
        struct Tearing(u32);
        impl Connect for Tearing {
            fn connect(&mut self) -> Result<Connected, Fault> {
                self.0 += 1;
                let link: Box<dyn Link> = match self.0 {
                    1 => Box::new(Script([frame(0)].into())),
                    2 => Box::new(Torn),
                    _ => Box::new(Script([frame(1)].into())),
                };
                Ok(Connected { link, what: String::new(), adjusted: Vec::new() })
            }
        }
        let mut camera = Recovering::open("cam".to_owned(), Tearing(0), &options).unwrap();
        assert!(camera.next(SOON).unwrap().is_some() && camera.next(SOON).unwrap().is_some());
        assert_eq!((camera.stats().stalls, camera.stats().reconnects), (2, 2), "{:?}", camera.stats());
        assert!(camera.stats().corrupt >= 2, "{:?}", camera.stats());
    }

    #[test]
    fn pictures_are_numbered_through() {
        let record = Record::default();
        let options = CameraOptions { first_retry: Duration::from_millis(1), ..record.options() };
        // The device counts from the start again once it is opened again; a number that goes back skips none.
        let first = [7, 8, 11].into_iter().map(frame).chain([Err(Fault::Unplugged)]).collect();
        let second = [0, 2, 1].into_iter().map(frame).chain([Err(Fault::Unplugged)]).collect();
        let third = vec![frame(20)];
        let mut camera = open(vec![Ok(first), Ok(second), Ok(third)], &options).unwrap();
        let sequences: Vec<u64> = (0..7).map(|_| camera.next(SOON).unwrap().unwrap().sequence).collect();
        assert_eq!(sequences, [0, 1, 4, 5, 7, 8, 9]);
        assert_eq!(camera.stats().skipped, 3);
        assert_eq!(record.count("the device skipped 2 (2 so far)"), 1);
    }

    #[test]
    fn a_camera_that_never_gave_a_picture_is_given_up_unless_waited_for() {
        let error = open(vec![Err(Fault::Busy)], &CameraOptions::default()).err().unwrap();
        assert_eq!(error.to_string(), "cam: busy: another program is using it");
        let mut camera = open(vec![Ok(vec![Err(Fault::Closed)])], &CameraOptions::default()).unwrap();
        assert!(matches!(camera.next(SOON), Err(CameraError::Fault { fault: Fault::Closed, .. })));

        let wait_for_camera = true;
        let options = CameraOptions { wait_for_camera, first_retry: Duration::from_millis(1), ..CameraOptions::default() };
        let scripts = vec![Err(Fault::Busy), Ok(vec![Err(Fault::Closed)]), Ok(vec![frame(0)])];
        let mut camera = open(scripts, &options).unwrap();
        assert!(camera.next(SOON).unwrap().is_some());
        // What waiting cannot help is said at once all the same.
        assert!(open(vec![Err(Fault::Unsupported("no".to_owned()))], &options).is_err());
    }
}
