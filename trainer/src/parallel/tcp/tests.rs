//! Ranks in threads of one process, that come, go, fall silent and disagree.

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
        let expected: Vec<Vec<Vec<u8>>> = std::iter::once(all.clone()).chain(all.iter().map(|one| vec![one.clone()])).collect();
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
