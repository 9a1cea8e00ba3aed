//! What the cameras' tests share: JPEGs that are right in their markers and hold no picture to speak of, and a record of events.

use std::sync::{Arc, Mutex};

use super::{CameraEvent, CameraOptions, EventSink};

/// A JPEG of a size, with a thumbnail in its metadata, restart markers, stuffed zeros and two scans; `tag` makes it its own.
pub(super) fn jpeg(width: u16, height: u16, tag: u8) -> Vec<u8> {
    let ([w1, w2], [h1, h2]) = (width.to_be_bytes(), height.to_be_bytes());
    let thumbnail = [0xFF, 0xD8, 0xFF, 0xC0, 0, 8, 8, 0, 2, 0, 2, 0, 0xFF, 0xDA, 0, 2, 1, 0xFF, 0xD9];
    let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xE1, 0, 2 + thumbnail.len() as u8];
    bytes.extend(thumbnail);
    bytes.extend([0xFF, 0xC4, 0, 3, 9, 0xFF, 0xFF, 0xC0, 0, 11, 8, h1, h2, w1, w2, 1, 1, 0x11, 0]);
    bytes.extend([0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0, tag, 0xFF, 0x00, 0xD9, 0xFF, 0xD3, 7, 0xFF, 0x00]);
    bytes.extend([0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0, 5, 0xFF, 0xFF, 0xD9]);
    bytes
}

/// What happened to cameras, in words.
#[derive(Debug, Clone, Default)]
pub(super) struct Record(Arc<Mutex<Vec<String>>>);

impl Record {
    pub(super) fn sink(&self) -> EventSink {
        let record = self.0.clone();
        EventSink::new(move |camera, event: &CameraEvent| record.lock().unwrap().push(format!("{camera}: {event}")))
    }

    pub(super) fn options(&self) -> CameraOptions {
        CameraOptions { events: self.sink(), ..CameraOptions::default() }
    }

    pub(super) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// How many lines have a part.
    pub(super) fn count(&self, part: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(part)).count()
    }
}
