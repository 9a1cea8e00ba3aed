//! The connections with the other ranks: what comes in over them, and signs of life.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::super::CollectiveError;
use super::super::wire::{self, Kind};

/// A part of an exchange.
pub(super) struct Part {
    pub(super) tag: u32,
    pub(super) bytes: Vec<u8>,
}

/// The connection with another rank.
pub(super) struct Peer {
    pub(super) stream: TcpStream,
    pub(super) writer: Mutex<()>,
    pub(super) parts: Mutex<Receiver<Part>>,
}

/// What this rank's threads share.
pub(super) struct Shared {
    pub(super) peers: Vec<Option<Peer>>,
    /// Milliseconds after `started` at which each rank was last heard.
    pub(super) heard: Vec<AtomicU64>,
    /// Ranks that have said that they are done.
    pub(super) done: Vec<AtomicBool>,
    pub(super) started: Instant,
    pub(super) patience: Duration,
    /// The first thing that went wrong.
    pub(super) trouble: Mutex<Option<CollectiveError>>,
    pub(super) leaving: AtomicBool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn note(&self, trouble: CollectiveError) {
        lock(&self.trouble).get_or_insert(trouble);
    }

    pub(super) fn trouble(&self) -> Option<CollectiveError> {
        lock(&self.trouble).clone()
    }

    /// Takes in what a rank sends until it leaves or is gone.
    pub(super) fn listen(&self, rank: usize, mut from: TcpStream, parts: &Sender<Part>) {
        let gone = |why: &str| {
            if !self.leaving.load(Ordering::Relaxed) {
                self.note(CollectiveError::Gone { rank, why: why.to_owned() });
            }
        };
        loop {
            match wire::read(&mut from) {
                Ok(Some(frame)) => {
                    self.heard[rank].store(self.now(), Ordering::Relaxed);
                    match frame.kind {
                        // Nobody takes parts any more once this rank is being dropped.
                        Kind::Data => drop(parts.send(Part { tag: frame.tag, bytes: frame.bytes })),
                        Kind::Beat => {}
                        Kind::Left if frame.bytes.is_empty() => self.done[rank].store(true, Ordering::Release),
                        Kind::Left => {
                            self.note(CollectiveError::Stopped(String::from_utf8_lossy(&frame.bytes).into_owned()));
                            return;
                        }
                        _ => return gone("it sent what is no part of an exchange"),
                    }
                }
                Ok(None) if self.done[rank].load(Ordering::Acquire) => return,
                Ok(None) => return gone("its connection was closed"),
                Err(_) if self.done[rank].load(Ordering::Acquire) => return,
                Err(error) => return gone(&format!("its connection broke off ({error})")),
            }
        }
    }

    /// Sends signs of life, and looks for those of others.
    pub(super) fn beat(&self) {
        let pause = (self.patience / 5).min(Duration::from_secs(1));
        while !self.leaving.load(Ordering::Relaxed) {
            for (rank, peer) in self.peers.iter().enumerate() {
                let Some(peer) = peer else { continue };
                if self.done[rank].load(Ordering::Relaxed) {
                    continue;
                }
                // Whoever is being sent something hears of this rank anyway. What cannot be sent is the listener's to report.
                if let Ok(_turn) = peer.writer.try_lock() {
                    drop(wire::write(&mut &peer.stream, Kind::Beat, 0, &[]));
                }
                let silent = self.now().saturating_sub(self.heard[rank].load(Ordering::Relaxed));
                if silent > self.patience.as_millis() as u64 {
                    self.note(CollectiveError::Silent { rank, seconds: self.patience.as_secs() });
                }
            }
            thread::park_timeout(pause);
        }
    }
}
