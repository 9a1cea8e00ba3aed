//! Ranks that exchange over TCP: nothing has to be installed, and sums are made in one order.
//!
//! Every rank is connected with every other one. A thread a connection takes in what comes, so that nobody waits to be heard, and
//! notes the time; another thread sends a sign of life every now and then, whatever the rank is busy with.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wire::{self, Kind};
use super::{Collective, CollectiveError, Launch, rendezvous, share};

/// How often a rank that waits looks whether there is still something to wait for.
const LOOK: Duration = Duration::from_millis(50);

/// The most that a rank which leaves waits for the others to have heard it.
const FAREWELL: Duration = Duration::from_secs(2);

/// A part of an exchange.
struct Part {
    tag: u32,
    bytes: Vec<u8>,
}

/// The connection with another rank.
struct Peer {
    stream: TcpStream,
    writer: Mutex<()>,
    parts: Mutex<Receiver<Part>>,
}

/// What this rank's threads share.
struct Shared {
    peers: Vec<Option<Peer>>,
    /// Milliseconds after `started` at which each rank was last heard.
    heard: Vec<AtomicU64>,
    /// Ranks that have said that they are done.
    done: Vec<AtomicBool>,
    started: Instant,
    patience: Duration,
    /// The first thing that went wrong.
    trouble: Mutex<Option<CollectiveError>>,
    leaving: AtomicBool,
}

/// Ranks connected over TCP.
pub struct TcpRanks {
    rank: usize,
    shared: Arc<Shared>,
    exchange: AtomicU32,
    heart: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn note(&self, trouble: CollectiveError) {
        lock(&self.trouble).get_or_insert(trouble);
    }

    fn trouble(&self) -> Option<CollectiveError> {
        lock(&self.trouble).clone()
    }

    /// Takes in what a rank sends until it leaves or is gone.
    fn listen(&self, rank: usize, mut from: TcpStream, parts: &Sender<Part>) {
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
    fn beat(&self) {
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
mod tests {
    use std::net::TcpListener;

    use super::super::testing::{each, launches};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Values of unlike sizes, so that sums in another order differ.
    fn value(rank: usize, at: usize) -> f32 {
        ((rank * 7919 + at * 104_729) as f32 * 0.37).sin() * 10f32.powi(((rank + at) % 5) as i32)
    }

    #[test]
    fn sums_are_those_of_the_ranks_in_order_on_every_rank() {
        for ranks in [1, 2, 3, 4] {
            // Nothing, less than a rank each, odd sizes, more than a frame goes out in one piece.
            for count in [0, 1, 3, 1001, 70_001] {
                let own = |rank| (0..count).map(|at| value(rank, at)).collect::<Vec<f32>>();
                let got = each(&launches(ranks), PATIENCE, |ranks| {
                    let mut values = own(ranks.rank());
                    ranks.all_reduce(&mut values).unwrap();
                    ranks.barrier().unwrap();
                    ranks.leave(None);
                    values
                });
                let mut expected = own(0);
                for rank in 1..ranks {
                    expected.iter_mut().zip(own(rank)).for_each(|(sum, value)| *sum += value);
                }
                for (rank, values) in got.into_iter().enumerate() {
                    assert!(values.unwrap() == expected, "rank {rank} of {ranks}, {count} values");
                }
            }
        }
    }

    #[test]
    fn everybody_gathers_what_all_bring_and_hears_what_one_says() {
        for ranks in [1, 2, 3, 4] {
            let got = each(&launches(ranks), PATIENCE, |ranks| {
                // As many bytes as the rank's number: rank 0 brings none.
                let own = vec![ranks.rank() as u8; ranks.rank()];
                let mut heard = Vec::new();
                for _ in 0..50 {
                    heard = vec![ranks.all_gather(&own).unwrap()];
                    for from in 0..ranks.ranks() {
                        heard.push(vec![ranks.broadcast(from, &own).unwrap()]);
                    }
                }
                ranks.barrier().unwrap();
                ranks.leave(None);
                heard
            });
            let all: Vec<Vec<u8>> = (0..ranks).map(|rank| vec![rank as u8; rank]).collect();
            let expected: Vec<Vec<Vec<u8>>> =
                std::iter::once(all.clone()).chain(all.iter().map(|one| vec![one.clone()])).collect();
            assert!(got.into_iter().all(|heard| heard.unwrap() == expected));
        }
    }

    /// Trouble that the ranks in `watched` have once rank 2 of 3 does `leaves` instead of a second exchange.
    fn trouble(patience: Duration, leaves: impl Fn(TcpRanks) + Sync) -> Vec<CollectiveError> {
        let results = each(&launches(3), patience, |ranks| {
            ranks.barrier().unwrap();
            if ranks.rank() == 2 {
                leaves(ranks);
                return None;
            }
            let trouble = ranks.all_reduce(&mut [1.0; 9]).unwrap_err();
            ranks.leave(Some(&trouble.to_string()));
            Some(trouble)
        });
        results.into_iter().filter_map(Result::unwrap).collect()
    }

    #[test]
    fn when_a_rank_is_gone_the_others_say_so_and_stop() {
        let killed = trouble(PATIENCE, |ranks| {
            // What the kernel does to the sockets of a killed process.
            for peer in ranks.shared.peers.iter().flatten() {
                peer.stream.shutdown(Shutdown::Both).unwrap();
            }
            thread::sleep(Duration::from_millis(300));
        });
        assert_eq!(killed.len(), 2);
        // A rank either sees it itself or is told so by the other.
        for told in killed.iter().map(ToString::to_string) {
            assert!(told.contains("rank 2 is gone: its connection"), "{told}");
        }
        let failed = trouble(PATIENCE, |ranks| ranks.leave(Some("the disk is full")));
        assert!(failed.iter().all(|told| told.to_string() == "rank 2 stopped: the disk is full"), "{failed:?}");
        let ended = trouble(PATIENCE, |ranks| ranks.leave(None));
        assert!(ended.contains(&CollectiveError::Ended { rank: 2 }), "{ended:?}");
        let other_step = trouble(PATIENCE, |ranks| {
            ranks.next();
            drop(ranks.all_gather(&[]));
        });
        assert!(other_step.contains(&CollectiveError::OutOfStep { rank: 2 }), "{other_step:?}");
    }

    #[test]
    fn a_rank_that_falls_silent_is_given_up_and_one_that_is_busy_is_waited_for() {
        let busy = each(&launches(2), Duration::from_secs(2), |ranks| {
            if ranks.rank() == 1 {
                thread::sleep(Duration::from_secs(4));
            }
            let all = ranks.all_gather(&[5]).unwrap();
            ranks.leave(None);
            all
        });
        assert!(busy.into_iter().all(|all| all.unwrap() == [[5], [5]]));
        let silent = trouble(Duration::from_secs(2), |ranks| {
            // A stopped process keeps its connections and sends no sign of life.
            let turns: Vec<_> = ranks.shared.peers.iter().flatten().map(|peer| lock(&peer.writer)).collect();
            thread::sleep(Duration::from_secs(5));
            drop(turns);
        });
        for told in silent.iter().map(ToString::to_string) {
            assert!(told.contains("rank 2 has been silent for 2 s"), "{told}");
        }
        assert_eq!(silent.len(), 2);
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_after_a_while() {
        let launches = launches(3);
        let short = Duration::from_secs(1);
        let told = |which: &[usize]| -> Vec<String> {
            let some: Vec<Launch> = which.iter().map(|&rank| launches[rank].clone()).collect();
            each(&some, short, drop).into_iter().map(|joined| joined.unwrap_err().to_string()).collect()
        };
        let place = format!("127.0.0.1:{}", launches[0].port);
        assert_eq!(told(&[0]), [format!("ranks 1, 2 did not come to {place} within 1 s")]);
        assert_eq!(told(&[1]), [format!("rank 0 did not come to {place} within 1 s")]);
        let both = told(&[0, 1]);
        assert_eq!(both[0], format!("rank 2 did not come to {place} within 1 s"));
        assert!(both[1].contains("did not come") || both[1].contains("rank 0 is gone"), "{both:?}");
    }

    #[test]
    fn strangers_are_let_go_and_wrong_ranks_are_refused() {
        // A browser, somebody who says nothing at all and a rank of another version, before the true rank comes.
        let pair = launches(2);
        let all = thread::scope(|scope| {
            let first = scope.spawn(|| TcpRanks::join(&pair[0], PATIENCE).map(|ranks| ranks.all_gather(&[1]).unwrap()));
            thread::sleep(Duration::from_millis(200));
            let mut browser = TcpStream::connect(("127.0.0.1", pair[0].port)).unwrap();
            std::io::Write::write_all(&mut browser, b"GET / HTTP/1.1\r\n\r\n").unwrap();
            drop(TcpStream::connect(("127.0.0.1", pair[0].port)).unwrap());
            // A rank of another version.
            let mut older = TcpStream::connect(("127.0.0.1", pair[0].port)).unwrap();
            std::io::Write::write_all(&mut older, b"unimo-ranks  0\r\n").unwrap();
            let hello = br#"{"job":"test","rank":1,"ranks":2,"port":0}"#;
            wire::write(&mut older, Kind::Hello, 0, hello).unwrap();
            let answer = wire::read(&mut older).unwrap().unwrap();
            assert!(answer.kind == Kind::Refused && answer.bytes.ends_with(b"different versions of this program"));
            let second = scope.spawn(|| TcpRanks::join(&pair[1], PATIENCE).map(|ranks| ranks.all_gather(&[2]).unwrap()));
            [first.join().unwrap(), second.join().unwrap()]
        });
        assert!(all.into_iter().all(|all| all.unwrap() == [[1], [2]]));

        let told = |change: fn(&mut Launch)| -> Vec<String> {
            let mut launches = launches(2);
            change(&mut launches[1]);
            let joined = each(&launches, Duration::from_secs(1), drop);
            joined.into_iter().map(|joined| joined.unwrap_err().to_string()).collect()
        };
        let other_job = told(|launch| launch.job = "other".into());
        assert!(other_job[0].contains("rank 1 did not come") && other_job[1].contains("another job"), "{other_job:?}");
        let more = told(|launch| launch.ranks = 3);
        assert!(more.iter().all(|told| told == "rank 1 counts 3 ranks, rank 0 2"), "{more:?}");
        let mut thrice = launches(3);
        thrice[2].rank = 1;
        let twice = each(&thrice, Duration::from_secs(1), drop);
        let twice: Vec<String> = twice.into_iter().map(|joined| joined.unwrap_err().to_string()).collect();
        assert_eq!(twice[0], "two processes say that they are rank 1");
        assert!(twice[1..].contains(&twice[0]), "{twice:?}");
    }

    #[test]
    fn an_address_in_use_is_told() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let launch = Launch { rank: 0, ranks: 2, host: "127.0.0.1".into(), port, job: String::new() };
        let told = TcpRanks::join(&launch, PATIENCE).err().unwrap().to_string();
        assert!(told.starts_with(&format!("cannot wait for the other ranks at 127.0.0.1:{port}: ")), "{told}");
    }
}
