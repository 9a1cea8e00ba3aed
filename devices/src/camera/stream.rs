//! A stream of bytes read on a thread of its own, so that waiting for it can end; and the JPEGs in it.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use super::jpeg::JpegSplitter;
use super::recovery::{Link, Received, Shot};
use super::{Fault, FrameData};

/// Bytes of one reading.
const CHUNK: usize = 64 << 10;

/// Bytes as they come from a reader on another thread, which waits when nobody takes them.
pub(super) struct ByteStream {
    chunks: Receiver<io::Result<Vec<u8>>>,
}

/// Bytes that come one after another.
pub(super) trait ByteSource: Send {
    /// The bytes that come within a time.
    fn receive(&mut self, wait: Duration) -> Result<Bytes, Fault>;
}

/// What waiting for bytes gave.
pub(super) enum Bytes {
    Some(Vec<u8>),
    /// None within the time.
    Nothing,
    End,
}

impl ByteStream {
    /// Begins to read. The thread ends with its reader, or when it has bytes that nobody wants any more.
    pub(super) fn new(mut reader: impl Read + Send + 'static) -> Result<Self, Fault> {
        let (sender, chunks) = sync_channel(2);
        let read = move || {
            let mut chunk = vec![0; CHUNK];
            loop {
                let read = match reader.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(length) => Ok(chunk[..length].to_vec()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = read.is_err();
                if sender.send(read).is_err() || failed {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("camera-reader".to_owned()).spawn(read)?;
        Ok(Self { chunks })
    }
}

impl ByteSource for ByteStream {
    fn receive(&mut self, wait: Duration) -> Result<Bytes, Fault> {
        match self.chunks.recv_timeout(wait) {
            Ok(Ok(bytes)) => Ok(Bytes::Some(bytes)),
            Ok(Err(error)) => Err(error.into()),
            Err(RecvTimeoutError::Timeout) => Ok(Bytes::Nothing),
            Err(RecvTimeoutError::Disconnected) => Ok(Bytes::End),
        }
    }
}

/// JPEGs one after another in a stream.
pub(super) struct JpegStream<S> {
    bytes: S,
    splitter: JpegSplitter,
    ended: bool,
}

impl<S: ByteSource> JpegStream<S> {
    pub(super) fn new(bytes: S, max_frame_bytes: usize) -> Self {
        Self { bytes, splitter: JpegSplitter::new(max_frame_bytes), ended: false }
    }
}

impl<S: ByteSource> Link for JpegStream<S> {
    fn receive(&mut self, wait: Duration) -> Result<Received, Fault> {
        let deadline = Instant::now() + wait;
        loop {
            match self.splitter.next() {
                Some(Ok(jpeg)) => {
                    return Ok(Received::Frame(Shot {
                        data: FrameData::Jpeg(jpeg.bytes),
                        width: jpeg.width,
                        height: jpeg.height,
                        captured: SystemTime::now(),
                        number: None,
                        source: None,
                    }));
                }
                Some(Err(damage)) => return Ok(Received::Corrupt(damage.to_string())),
                None if self.ended => return Ok(Received::End),
                None => {}
            }
            match self.bytes.receive(deadline.saturating_duration_since(Instant::now()))? {
                Bytes::Some(bytes) => self.splitter.push(&bytes),
                Bytes::Nothing => return Ok(Received::Nothing),
                Bytes::End => {
                    self.splitter.finish();
                    self.ended = true;
                }
            }
        }
    }
}
