//! Ranks that exchange over TCP: nothing has to be installed, and sums are made in one order.
//!
//! Every rank is connected with every other one. A thread a connection takes in what comes, so that nobody waits to be heard, and
//! notes the time; another thread sends a sign of life every now and then, whatever the rank is busy with.

mod peers;

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use self::peers::{Peer, Shared, lock};
use super::wire::{self, Kind};
use super::{Collective, CollectiveError, Launch, rendezvous, share};

/// How often a rank that waits looks whether there is still something to wait for.
const LOOK: Duration = Duration::from_millis(50);

/// The most that a rank which leaves waits for the others to have heard it.
const FAREWELL: Duration = Duration::from_secs(2);

/// Ranks connected over TCP.
pub struct TcpRanks {
    rank: usize,
    shared: Arc<Shared>,
    exchange: AtomicU32,
    heart: Option<JoinHandle<()>>,
}

impl TcpRanks {
    /// Meets the other ranks of a launch; `patience` is how long one may take to come, and later how long it may be silent.
    ///
    /// # Errors
    /// Ranks that do not come, strangers at their place, an address that cannot be used.
    pub fn join(launch: &Launch, patience: Duration) -> Result<Self, CollectiveError> {
        let met = rendezvous::meet(launch, patience)?;
        let (mut peers, mut listeners) = (Vec::new(), Vec::new());
        for (rank, stream) in met.into_iter().enumerate() {
            let Some(stream) = stream else {
                peers.push(None);
                continue;
            };
            let prepare = || -> io::Result<TcpStream> {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(Some(patience))?;
                stream.try_clone()
            };
            let from = prepare().map_err(|error| CollectiveError::Gone { rank, why: error.to_string() })?;
            let (sender, parts) = channel();
            listeners.push((rank, from, sender));
            peers.push(Some(Peer { stream, writer: Mutex::new(()), parts: Mutex::new(parts) }));
        }
        let shared = Arc::new(Shared {
            heard: peers.iter().map(|_| AtomicU64::new(0)).collect(),
            done: peers.iter().map(|_| AtomicBool::new(false)).collect(),
            peers,
            started: Instant::now(),
            patience,
            trouble: Mutex::new(None),
            leaving: AtomicBool::new(false),
        });
        for (rank, from, parts) in listeners {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.listen(rank, from, &parts));
        }
        let beating = Arc::clone(&shared);
        let heart = Some(thread::spawn(move || beating.beat()));
        Ok(Self { rank: launch.rank, shared, exchange: AtomicU32::new(0), heart })
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        // Each begins with the rank after it, so that not all send to the same one first.
        let ranks = self.ranks();
        (1..ranks).map(move |after| (self.rank + after) % ranks)
    }

    /// Tag of the next exchange, of which each part of a rank's is one.
    fn next(&self) -> u32 {
        self.exchange.fetch_add(1, Ordering::Relaxed)
    }

    fn peer(&self, rank: usize) -> Result<&Peer, CollectiveError> {
        self.shared.peers[rank].as_ref().ok_or(CollectiveError::OutOfStep { rank })
    }

    fn send(&self, to: usize, tag: u32, bytes: &[u8]) -> Result<(), CollectiveError> {
        let peer = self.peer(to)?;
        let sent = {
            let _turn = lock(&peer.writer);
            wire::write(&mut &peer.stream, Kind::Data, tag, bytes)
        };
        sent.map_err(|error| {
            self.shared.trouble().unwrap_or_else(|| match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    CollectiveError::Silent { rank: to, seconds: self.shared.patience.as_secs() }
                }
                _ => CollectiveError::Gone { rank: to, why: format!("its connection broke off ({error})") },
            })
        })
    }

    fn receive(&self, from: usize, tag: u32) -> Result<Vec<u8>, CollectiveError> {
        let parts = lock(&self.peer(from)?.parts);
        loop {
            // Looked at before what has come: what a rank sent before it went counts.
            let end = self.shared.trouble().or_else(|| {
                let done = self.shared.done[from].load(Ordering::Acquire) || self.shared.leaving.load(Ordering::Acquire);
                done.then_some(CollectiveError::Ended { rank: from })
            });
            match (parts.recv_timeout(if end.is_some() { Duration::ZERO } else { LOOK }), end) {
                (Ok(part), _) if part.tag == tag => return Ok(part.bytes),
                (Ok(_), _) => return Err(CollectiveError::OutOfStep { rank: from }),
                (Err(_), Some(end)) => return Err(end),
                (Err(_), None) => {}
            }
        }
    }
}

impl Collective for TcpRanks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.shared.peers.len()
    }

    /// Each rank adds up its own share of the values, from all ranks in their order, and sends the sums to all: a reduce-scatter
    /// and an all-gather, which send what a ring sends, in two rounds instead of 2(n − 1).
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let ranks = self.ranks();
        let (parts, sums) = (self.next(), self.next());
        for to in self.others() {
            self.send(to, parts, &to_bytes(&values[share(values.len(), to, ranks)]))?;
        }
        let own = share(values.len(), self.rank, ranks);
        let mut sum: Vec<f32> = Vec::new();
        for from in 0..ranks {
            let of_rank = if from == self.rank {
                values[own.clone()].to_vec()
            } else {
                from_bytes(&self.receive(from, parts)?, own.len()).ok_or(CollectiveError::OutOfStep { rank: from })?
            };
            if from == 0 {
                sum = of_rank;
            } else {
                sum.iter_mut().zip(of_rank).for_each(|(sum, value)| *sum += value);
            }
        }
        let bytes = to_bytes(&sum);
        for to in self.others() {
            self.send(to, sums, &bytes)?;
        }
        values[own].copy_from_slice(&sum);
        for from in self.others() {
            let place = share(values.len(), from, ranks);
            let sums = from_bytes(&self.receive(from, sums)?, place.len()).ok_or(CollectiveError::OutOfStep { rank: from })?;
            values[place].copy_from_slice(&sums);
        }
        Ok(())
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let tag = self.next();
        for to in self.others() {
            self.send(to, tag, own)?;
        }
        (0..self.ranks()).map(|from| if from == self.rank { Ok(own.to_vec()) } else { self.receive(from, tag) }).collect()
    }

    fn broadcast(&self, from: usize, own: &[u8]) -> Result<Vec<u8>, CollectiveError> {
        let tag = self.next();
        if from != self.rank {
            return self.receive(from, tag);
        }
        for to in self.others() {
            self.send(to, tag, own)?;
        }
        Ok(own.to_vec())
    }

    fn trouble(&self) -> Option<CollectiveError> {
        self.shared.trouble()
    }

    fn leave(&self, trouble: Option<&str>) {
        if self.shared.leaving.swap(true, Ordering::AcqRel) {
            return;
        }
        let word = match (trouble, self.shared.trouble()) {
            (None, _) => String::new(),
            // What one rank stopped for goes on as it is.
            (Some(_), Some(CollectiveError::Stopped(word))) => word,
            (Some(trouble), _) => format!("rank {} stopped: {trouble}", self.rank),
        };
        for peer in self.shared.peers.iter().flatten() {
            let _turn = lock(&peer.writer);
            // Whoever is gone already needs no farewell.
            drop(wire::write(&mut &peer.stream, Kind::Left, 0, word.as_bytes()));
            drop(peer.stream.shutdown(Shutdown::Write));
        }
        if let Some(heart) = &self.heart {
            heart.thread().unpark();
        }
    }
}

impl Drop for TcpRanks {
    fn drop(&mut self) {
        self.leave(Some("it ended early"));
        // Closed before the others have heard it, the connection could be reset and the word be lost.
        let deadline = Instant::now() + FAREWELL;
        for peer in self.shared.peers.iter().flatten() {
            let parts = lock(&peer.parts);
            while Instant::now() < deadline {
                if matches!(parts.recv_timeout(Duration::from_millis(20)), Err(RecvTimeoutError::Disconnected)) {
                    break;
                }
            }
            drop(peer.stream.shutdown(Shutdown::Both));
        }
        if let Some(heart) = self.heart.take() {
            // It does nothing that could panic.
            drop(heart.join());
        }
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
    bytes
}

fn from_bytes(bytes: &[u8], count: usize) -> Option<Vec<f32>> {
    let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    (bytes.len() == count * 4).then(|| bytes.chunks_exact(4).map(value).collect())
}

#[cfg(test)]
mod tests;
