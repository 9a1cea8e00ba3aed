//! How ranks find each other: all come to rank 0, are told where the others listen, and connect to each of them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::wire::{self, Kind, MAGIC, PROGRAM};
use super::{CollectiveError, Launch};

/// Pause between two attempts to reach rank 0, and between two looks for somebody who has come.
const PAUSE: Duration = Duration::from_millis(20);

/// How long somebody who has come may take to say who he is.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// Who comes.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    job: String,
    rank: usize,
    ranks: usize,
    /// Where it listens for ranks above it; 0 where it does not.
    port: u16,
}

/// A connection to every other rank, by rank; nothing at one's own place.
pub(super) fn meet(launch: &Launch, patience: Duration) -> Result<Vec<Option<TcpStream>>, CollectiveError> {
    let deadline = Instant::now() + patience;
    let place = format!("{}:{}", launch.host, launch.port);
    let waiting = Waiting { launch, patience, deadline, place };
    if launch.rank == 0 { waiting.as_first() } else { waiting.as_other() }
}

struct Waiting<'a> {
    launch: &'a Launch,
    patience: Duration,
    deadline: Instant,
    place: String,
}

impl Waiting<'_> {
    fn as_first(&self) -> Result<Vec<Option<TcpStream>>, CollectiveError> {
        let listener = self.listen()?;
        let mut met: Vec<Option<TcpStream>> = (0..self.launch.ranks).map(|_| None).collect();
        let mut table = vec![String::new(); self.launch.ranks];
        self.receive(&listener, 1, &mut met, |hello, from| {
            table[hello.rank] = SocketAddr::new(from.ip(), hello.port).to_string();
        })?;
        let bytes = serde_json::to_vec(&table).map_err(|error| CollectiveError::Address(error.to_string()))?;
        for (rank, stream) in met.iter_mut().enumerate() {
            if let Some(stream) = stream {
                wire::write(stream, Kind::Table, 0, &bytes).map_err(|error| gone(rank, &error))?;
            }
        }
        Ok(met)
    }

    fn as_other(&self) -> Result<Vec<Option<TcpStream>>, CollectiveError> {
        let mut first = self.reach_first()?;
        let address = |error: io::Error| CollectiveError::Address(format!("cannot listen for other ranks: {error}"));
        let listener = TcpListener::bind((first.local_addr().map_err(address)?.ip(), 0)).map_err(address)?;
        self.introduce(&mut first, listener.local_addr().map_err(address)?.port()).map_err(|error| gone(0, &error))?;
        let left = self.deadline.saturating_duration_since(Instant::now()).max(PAUSE);
        first.set_read_timeout(Some(left)).map_err(|error| gone(0, &error))?;
        let table: Vec<String> = match wire::read(&mut first) {
            Ok(Some(frame)) if frame.kind == Kind::Table => serde_json::from_slice(&frame.bytes).unwrap_or_default(),
            Ok(Some(frame)) if frame.kind == Kind::Refused => {
                return Err(CollectiveError::Refused(String::from_utf8_lossy(&frame.bytes).into_owned()));
            }
            Ok(Some(_)) => return Err(self.stranger()),
            Ok(None) => return Err(CollectiveError::Gone { rank: 0, why: "it closed the connection".into() }),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(self.stranger()),
            Err(error) if is_timeout(&error) => {
                let who = "one of the other ranks".to_owned();
                return Err(CollectiveError::Missing { who, place: self.place.clone(), seconds: self.patience.as_secs() });
            }
            Err(error) => return Err(gone(0, &error)),
        };
        if table.len() != self.launch.ranks {
            return Err(self.stranger());
        }
        let mut met: Vec<Option<TcpStream>> = (0..self.launch.ranks).map(|_| None).collect();
        for (rank, place) in table.iter().enumerate().take(self.launch.rank).skip(1) {
            let reach = || -> io::Result<TcpStream> {
                let at: SocketAddr = place.parse().map_err(|_| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
                let left = self.deadline.saturating_duration_since(Instant::now()).max(PAUSE);
                let mut stream = TcpStream::connect_timeout(&at, left)?;
                self.introduce(&mut stream, 0)?;
                Ok(stream)
            };
            met[rank] = Some(reach().map_err(|error| CollectiveError::Gone { rank, why: format!("{place}: {error}") })?);
        }
        met[0] = Some(first);
        self.receive(&listener, self.launch.rank + 1, &mut met, |_, _| ())?;
        Ok(met)
    }

    /// Listens where the others will come: at the address itself, or, where this host does not know it as its own, at all.
    fn listen(&self) -> Result<TcpListener, CollectiveError> {
        let port = self.launch.port;
        let refused =
            |error: io::Error| CollectiveError::Address(format!("cannot wait for the other ranks at {}: {error}", self.place));
        let address = self.addresses().map_err(refused)?;
        match TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                TcpListener::bind(("0.0.0.0", port)).map_err(refused)
            }
            other => other.map_err(refused),
        }
    }

    fn addresses(&self) -> io::Result<SocketAddr> {
        let mut found = (self.launch.host.as_str(), self.launch.port).to_socket_addrs()?;
        found.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address"))
    }

    /// Connects to rank 0, which may not be there yet.
    fn reach_first(&self) -> Result<TcpStream, CollectiveError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let attempt = self.addresses().and_then(|address| TcpStream::connect_timeout(&address, left.max(PAUSE)));
            match attempt {
                // A port that nobody listens at can be given to the very connection that looks for it.
                Ok(stream) if stream.local_addr().ok() != stream.peer_addr().ok() => return Ok(stream),
                _ if left.is_zero() => {
                    let seconds = self.patience.as_secs();
                    return Err(CollectiveError::Missing { who: "rank 0".into(), place: self.place.clone(), seconds });
                }
                _ => thread::sleep(PAUSE),
            }
        }
    }

    fn introduce(&self, to: &mut TcpStream, port: u16) -> io::Result<()> {
        let Launch { rank, ranks, job, .. } = self.launch;
        let hello = Hello { job: job.clone(), rank: *rank, ranks: *ranks, port };
        to.set_nodelay(true)?;
        to.write_all(&MAGIC)?;
        wire::write(to, Kind::Hello, 0, &serde_json::to_vec(&hello)?)
    }

    /// Takes in all ranks from `first` on that have not been met.
    fn receive(
        &self,
        listener: &TcpListener,
        first: usize,
        met: &mut [Option<TcpStream>],
        mut note: impl FnMut(&Hello, SocketAddr),
    ) -> Result<(), CollectiveError> {
        let failed = |error: io::Error| CollectiveError::Address(format!("cannot wait for the other ranks: {error}"));
        listener.set_nonblocking(true).map_err(failed)?;
        while met[first..].iter().any(Option::is_none) {
            let (mut stream, from) = match listener.accept() {
                Ok(come) => come,
                Err(_) if Instant::now() < self.deadline => {
                    thread::sleep(PAUSE);
                    continue;
                }
                Err(_) => {
                    let missing = (first..met.len()).filter(|&rank| met[rank].is_none());
                    let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                    let who = format!("{} {}", if missing.len() == 1 { "rank" } else { "ranks" }, missing.join(", "));
                    return Err(CollectiveError::Missing { who, place: self.place.clone(), seconds: self.patience.as_secs() });
                }
            };
            // Whoever is no rank, a health check or a browser, is let go without a word.
            let Some(hello) = listen_to(&mut stream) else { continue };
            let refusal = self.refusal(&hello, first, met);
            if let Some((sentence, fatal)) = refusal {
                // The refused rank may be gone already.
                drop(wire::write(&mut stream, Kind::Refused, 0, sentence.as_bytes()));
                if fatal {
                    return Err(CollectiveError::Refused(sentence));
                }
                continue;
            }
            note(&hello, from);
            met[hello.rank] = Some(stream);
        }
        Ok(())
    }

    /// Why somebody cannot be taken in, and whether that ends this job too.
    fn refusal(&self, hello: &Hello, first: usize, met: &[Option<TcpStream>]) -> Option<(String, bool)> {
        let Launch { rank: own, ranks, job, .. } = self.launch;
        if hello.job != *job {
            let sentence = format!("rank {own} at {} waits for another job, `{job}`, not `{}`", self.place, hello.job);
            return Some((sentence, false));
        }
        if hello.ranks != *ranks {
            return Some((format!("rank {} counts {} ranks, rank {own} {ranks}", hello.rank, hello.ranks), true));
        }
        if hello.rank < first || hello.rank >= *ranks || met[hello.rank].is_some() {
            return Some((format!("two processes say that they are rank {}", hello.rank), true));
        }
        None
    }

    fn stranger(&self) -> CollectiveError {
        CollectiveError::Address(format!("what listens at {} is not rank 0 of this program", self.place))
    }
}

/// Who somebody says that he is.
fn listen_to(stream: &mut TcpStream) -> Option<Hello> {
    stream.set_nonblocking(false).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(INTRODUCTION)).ok()?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic).ok()?;
    if magic != MAGIC {
        if magic.starts_with(PROGRAM) {
            let sentence = b"the ranks are of different versions of this program";
            // It may be gone already.
            drop(wire::write(stream, Kind::Refused, 0, sentence));
        }
        return None;
    }
    let frame = wire::read(stream).ok()??;
    if frame.kind != Kind::Hello {
        return None;
    }
    serde_json::from_slice(&frame.bytes).ok()
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn gone(rank: usize, error: &io::Error) -> CollectiveError {
    CollectiveError::Gone { rank, why: error.to_string() }
}
