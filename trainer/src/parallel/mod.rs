//! Data-parallel training: several processes, the *ranks*, share out every step (see `trainer/PARALLEL.md`).
//!
//! A launcher (torchrun, srun, mpirun) starts them and says by the environment which is which ([`Launch`]). They exchange what a
//! step needs through a [`Collective`]: what the step holds, the embeddings that its contrasts compare ([`sums`]), the
//! gradients ([`gradients`]). Every rank draws its own part of one plan, and makes the same update of the same weights.

mod devices;
pub mod gradients;
mod launch;
#[cfg(any(feature = "nccl", test))]
mod nccl;
mod rendezvous;
pub mod sums;
mod tcp;
mod wire;

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

pub use devices::{Connected, DeviceSums, local_rank};
pub use launch::{Launch, LaunchError};
pub use tcp::TcpRanks;

use crate::recipe::BatchConfig;

/// Variable that says for how many seconds ranks wait for one that does not come, or is silent.
pub const PATIENCE: &str = "UNIMO_RANKS_TIMEOUT";

/// Seconds, where the variable says nothing.
const DEFAULT_PATIENCE: u64 = 120;

/// Why ranks cannot go on together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// Rank 0 cannot be waited for, or not be reached.
    #[error("{0}")]
    Address(String),
    /// Ranks that did not come.
    #[error("{who} did not come to {place} within {seconds} s")]
    Missing {
        /// Which ranks.
        who: String,
        /// Where they were waited for.
        place: String,
        /// For how long.
        seconds: u64,
    },
    /// A rank that does not belong here.
    #[error("{0}")]
    Refused(String),
    /// A connection that broke off: the process was killed, or its host is gone.
    #[error("rank {rank} is gone: {why}")]
    Gone {
        /// Which.
        rank: usize,
        /// What the connection says.
        why: String,
    },
    /// A process that was stopped, or a network that was cut.
    #[error("rank {rank} has been silent for {seconds} s")]
    Silent {
        /// Which.
        rank: usize,
        /// For how long.
        seconds: u64,
    },
    /// A rank that stopped because of an error of its own.
    #[error("{0}")]
    Stopped(String),
    /// A rank that ended, as if there were nothing more to do.
    #[error("rank {rank} has ended its run, and this one has not")]
    Ended {
        /// Which.
        rank: usize,
    },
    /// A rank that exchanges something else.
    #[error("rank {rank} exchanges something else than this one: they do not run the same steps")]
    OutOfStep {
        /// Which.
        rank: usize,
    },
}

/// Exchange between the ranks of a job. All of them make the same calls in the same order; results are the same, bit for bit, on
/// every rank and in every run.
///
/// A call fails, on every rank, once one of them is gone.
pub trait Collective: Send + Sync {
    /// This process's number.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Replaces values by their sums over all ranks, added up in the ranks' order.
    ///
    /// # Errors
    /// A rank that is gone, or brings another number of values.
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// What every rank brings, in the ranks' order; lengths may differ.
    ///
    /// # Errors
    /// A rank that is gone.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// What rank `from` brings.
    ///
    /// # Errors
    /// A rank that is gone.
    fn broadcast(&self, from: usize, own: &[u8]) -> Result<Vec<u8>, CollectiveError>;

    /// Returns once all ranks have called it.
    ///
    /// # Errors
    /// A rank that is gone.
    fn barrier(&self) -> Result<(), CollectiveError> {
        self.all_gather(&[]).map(drop)
    }

    /// The way from device memory to device memory, where there is one.
    fn devices(&self) -> Option<&dyn DeviceSums> {
        None
    }

    /// Why the next call will fail, where that is known already.
    fn trouble(&self) -> Option<CollectiveError> {
        None
    }

    /// Tells the others that this rank makes no more calls: because all is done, or because of `trouble`.
    fn leave(&self, trouble: Option<&str>);
}

/// The only rank.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![own.to_vec()])
    }

    fn broadcast(&self, _: usize, own: &[u8]) -> Result<Vec<u8>, CollectiveError> {
        Ok(own.to_vec())
    }

    fn leave(&self, _: Option<&str>) {}
}

/// Does work as the rank that the environment says this process is, together with the others.
///
/// # Errors
/// The work's; an environment that makes no sense, ranks that do not come or are of another program.
pub fn as_launched<T>(work: impl FnOnce(&dyn Collective) -> Result<T>) -> Result<T> {
    let Some(launch) = Launch::from_environment(&|name| std::env::var(name).ok())? else {
        return work(&Alone);
    };
    let ranks = TcpRanks::join(&launch, patience()?)?;
    let result = agree(&ranks, "program (unimo-train)", &program()?).and_then(|()| work(&ranks));
    match &result {
        Ok(_) => ranks.leave(None),
        Err(error) => ranks.leave(Some(&format!("{error:#}"))),
    }
    result
}

/// For how long ranks wait for one that is silent.
fn patience() -> Result<Duration> {
    let seconds = match std::env::var(PATIENCE) {
        Ok(value) => value.parse().ok().filter(|s| *s > 0).with_context(|| format!("{PATIENCE} is `{value}`, not seconds"))?,
        Err(_) => DEFAULT_PATIENCE,
    };
    Ok(Duration::from_secs(seconds))
}

/// Refuses to do, several times beside itself, what one process does.
///
/// # Errors
/// A launcher's environment that speaks of more than one rank, or makes no sense.
pub fn require_one_rank(command: &str) -> Result<()> {
    match Launch::from_environment(&|name| std::env::var(name).ok())? {
        Some(launch) => bail!("`{command}` is one process, and a launcher started {}: start it without one", launch.ranks),
        None => Ok(()),
    }
}

/// Version and content of the running program: weights are the same everywhere only if it is the same program that computes them.
fn program() -> Result<Vec<u8>> {
    let path = std::env::current_exe().context("cannot find the running program")?;
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(bytes);
    Ok(hash.finalize().to_vec())
}

/// Refuses, on every rank and with the same words, ranks that bring something else than rank 0.
///
/// # Errors
/// Such a rank, or one that is gone.
pub fn agree(ranks: &dyn Collective, what: &str, own: &[u8]) -> Result<()> {
    let all = ranks.all_gather(own)?;
    match all.iter().position(|brought| *brought != all[0]) {
        Some(other) => bail!("rank {other} has another {what} than rank 0"),
        None => Ok(()),
    }
}

/// Does work on rank 0 first, and then on the others: they find done what it leaves in folders that they share.
///
/// # Errors
/// The work's, and a rank that is gone.
pub fn first_rank_first<T>(ranks: &dyn Collective, work: impl FnOnce() -> Result<T>) -> Result<T> {
    if ranks.rank() > 0 {
        ranks.barrier()?;
        return work();
    }
    let done = work()?;
    ranks.barrier()?;
    Ok(done)
}

/// The passes that a step is cut into, and those of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passes {
    /// How many there are, on all ranks together.
    pub count: usize,
    /// This rank's.
    pub own: Range<usize>,
}

impl Passes {
    /// Those of a step on one rank.
    #[must_use]
    pub fn all(batch: &BatchConfig) -> Self {
        Self { count: batch.chunks, own: 0..batch.chunks }
    }

    /// A rank's. As many as the recipe's `chunks` say, shared out, or where these are fewer than ranks, one for each.
    ///
    /// # Errors
    /// More ranks than the step has samples of any kind.
    pub fn of_rank(batch: &BatchConfig, ranks: &dyn Collective) -> Result<Self> {
        let texts = batch.texts + batch.fragment_texts;
        let most = [batch.images, batch.contrast_pairs, batch.task_examples, texts, batch.images_alone];
        let most = most.into_iter().max().unwrap_or(0);
        if ranks.ranks() > 1 && ranks.ranks() > most {
            bail!("a step of {most} samples cannot be shared out among {} ranks", ranks.ranks());
        }
        let count = batch.chunks.max(ranks.ranks());
        Ok(Self { count, own: share(count, ranks.rank(), ranks.ranks()) })
    }

    /// The part of `0..samples` that falls to these passes together.
    #[must_use]
    pub fn own_share(&self, samples: usize) -> Range<usize> {
        samples * self.own.start / self.count..samples * self.own.end / self.count
    }
}

/// The part of `0..count` that falls to part `part` of `parts`.
#[must_use]
pub fn share(count: usize, part: usize, parts: usize) -> Range<usize> {
    count * part / parts..count * (part + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::testing::among;
    use super::*;

    #[test]
    fn one_rank_has_what_it_brings() {
        let mut values = [1.5, -2.0];
        Alone.all_reduce(&mut values).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        assert_eq!((Alone.all_gather(&[7]).unwrap(), Alone.broadcast(0, &[8]).unwrap()), (vec![vec![7]], vec![8]));
        Alone.barrier().unwrap();
        agree(&Alone, "recipe", b"any").unwrap();
    }

    #[test]
    fn parts_share_out_everything() {
        for (count, parts) in [(48, 1), (48, 5), (3, 4), (0, 2)] {
            let all: Vec<usize> = (0..parts).flat_map(|part| share(count, part, parts)).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn passes_are_those_of_the_recipe_where_there_are_enough_for_all_ranks() {
        let batch = |chunks: usize| {
            let text = format!("steps = 1\n[batch]\nimages = 8\ncaptions = 1\nchunks = {chunks}\n");
            crate::recipe::Recipe::from_toml(&text).unwrap().batch
        };
        assert_eq!(Passes::of_rank(&batch(5), &Alone).unwrap(), Passes::all(&batch(5)));
        for (chunks, expected) in [(1, [0..1, 1..2, 2..3]), (3, [0..1, 1..2, 2..3]), (5, [0..1, 1..3, 3..5])] {
            let got = among(3, |ranks| Passes::of_rank(&batch(chunks), ranks).unwrap());
            let count = chunks.max(3);
            assert_eq!(got, expected.map(|own| Passes { count, own }), "{chunks}");
        }
        let mut few = batch(1);
        few.images = 2;
        let told = among(3, |ranks| Passes::of_rank(&few, ranks).unwrap_err().to_string());
        assert_eq!(told[0], "a step of 2 samples cannot be shared out among 3 ranks");
    }

    #[test]
    fn what_one_rank_has_differently_all_ranks_are_told() {
        let told = among(3, |ranks| {
            agree(ranks, "recipe", b"same").unwrap();
            agree(ranks, "recipe", &[u8::from(ranks.rank() == 2)]).unwrap_err().to_string()
        });
        assert_eq!(told, ["rank 2 has another recipe than rank 0"; 3]);
    }
}

/// Threads as ranks, for the tests of this module.
#[cfg(test)]
pub(crate) mod testing {
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::nccl::testing::{OnHost, join};
    use super::{Collective, CollectiveError, DeviceSums, Launch, TcpRanks};

    /// A way between the ranks' devices, which are host memory.
    pub fn between_devices(ranks: &dyn Collective) -> Box<dyn DeviceSums> {
        Box::new(OnHost(join(ranks).unwrap()))
    }

    /// Launches of as many ranks on this host.
    pub fn launches(ranks: usize) -> Vec<Launch> {
        // Free a moment ago, and the kernel gives out others first.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let launch = |rank| Launch { rank, ranks, host: "127.0.0.1".into(), port, job: "test".into() };
        (0..ranks).map(launch).collect()
    }

    /// What the work of every launched rank gives, each in a thread of its own.
    pub fn each<T: Send>(
        launches: &[Launch],
        patience: Duration,
        work: impl Fn(TcpRanks) -> T + Sync,
    ) -> Vec<Result<T, CollectiveError>> {
        thread::scope(|scope| {
            let start = |launch| {
                let work = &work;
                scope.spawn(move || TcpRanks::join(launch, patience).map(work))
            };
            let running: Vec<_> = launches.iter().map(start).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// What the work of each of as many ranks gives.
    pub fn among<T: Send>(ranks: usize, work: impl Fn(&dyn Collective) -> T + Sync) -> Vec<T> {
        let work = |ranks: TcpRanks| {
            let result = work(&ranks);
            ranks.barrier().unwrap();
            ranks.leave(None);
            result
        };
        each(&launches(ranks), Duration::from_secs(30), work).into_iter().map(Result::unwrap).collect()
    }
}
