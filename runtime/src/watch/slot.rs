//! Room for one item between a thread that makes and a thread that takes, where the newest wins.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What [`Slot::take`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken<T> {
    /// The item that was in the slot.
    Item(T),
    /// There will be none any more.
    Closed,
    /// None came in time.
    TimeUp,
}

/// Items that were replaced before anybody took them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassedOver {
    /// While the taker was at work: it was too slow for them.
    pub late: u64,
    /// While the taker rested, as it was told to.
    pub early: u64,
}

/// Room for one item.
#[derive(Debug)]
pub struct Slot<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    item: Option<T>,
    closed: bool,
    aborted: bool,
    resting: bool,
    passed_over: PassedOver,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        let state = State { item: None, closed: false, aborted: false, resting: false, passed_over: PassedOver::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<T> Slot<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an item in, in place of one that is there; says whether anybody will take items any more.
    pub fn put(&self, item: T) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        if state.item.replace(item).is_some() {
            let PassedOver { late, early } = state.passed_over;
            let (late, early) = if state.resting { (late, early + 1) } else { (late + 1, early) };
            state.passed_over = PassedOver { late, early };
        }
        self.changed.notify_all();
        true
    }

    /// Waits until the slot is empty and puts an item in; says whether anybody will take items any more.
    pub fn put_in_turn(&self, item: T) -> bool {
        let waits = |state: &mut State<T>| state.item.is_some() && !state.closed;
        let mut state = self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return false;
        }
        state.item = Some(item);
        self.changed.notify_all();
        true
    }

    /// Waits for an item and takes it. What was put in before the slot was closed is still given.
    pub fn take(&self, until: Option<Instant>) -> Taken<T> {
        let mut state = self.state();
        loop {
            if let Some(item) = state.item.take() {
                self.changed.notify_all();
                return Taken::Item(item);
            }
            if state.closed {
                return Taken::Closed;
            }
            let Some(until) = until else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Taken::TimeUp;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Rests until a time, or until nothing can come any more. Items that are replaced meanwhile are not too late, but too early.
    pub fn rest(&self, until: Instant) {
        let mut state = self.state();
        state.resting = true;
        while !(state.aborted || state.closed && state.item.is_none()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.resting = false;
    }

    /// Says that nothing more will be put in.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Closes, and throws away what nobody has taken.
    pub fn abort(&self) {
        let mut state = self.state();
        (state.closed, state.aborted, state.item) = (true, true, None);
        self.changed.notify_all();
    }

    /// Whether nothing more can be put in.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Items that were replaced so far.
    pub fn passed_over(&self) -> PassedOver {
        self.state().passed_over
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_newest_wins() {
        let slot = Slot::default();
        assert_eq!(slot.take(Some(Instant::now())), Taken::TimeUp);
        for item in 1..=4 {
            assert!(slot.put(item));
        }
        assert_eq!(slot.take(None), Taken::Item(4));
        assert!(slot.put(5));
        assert_eq!(slot.passed_over(), PassedOver { late: 3, early: 0 });
        slot.close();
        assert!(!slot.put(6));
        assert_eq!((slot.take(None), slot.take(None)), (Taken::Item(5), Taken::Closed));
    }

    #[test]
    fn items_in_turn_all_arrive() {
        let slot = Slot::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                for item in 0..1000 {
                    assert!(slot.put_in_turn(item));
                }
                slot.close();
            });
            for item in 0..1000 {
                assert_eq!(slot.take(None), Taken::Item(item));
            }
        });
        assert_eq!(slot.take(None), Taken::Closed);
        assert_eq!(slot.passed_over(), PassedOver::default());
    }

    #[test]
    fn items_during_a_rest_are_early() {
        let slot = Slot::default();
        let until = Instant::now() + Duration::from_millis(50);
        slot.put(0);
        thread::scope(|scope| {
            let (begun, rested) = mpsc::channel();
            scope.spawn(move || rested.recv().unwrap());
            // The lock is taken as soon as the rest begins, and the puts wait for it.
            let resting = scope.spawn(|| slot.rest(until));
            while !slot.state().resting && Instant::now() < until {
                thread::yield_now();
            }
            for item in 1..=3 {
                slot.put(item);
            }
            resting.join().unwrap();
            begun.send(()).unwrap();
        });
        assert!(Instant::now() >= until, "the rest was cut short");
        let PassedOver { late, early } = slot.passed_over();
        assert_eq!(late + early, 3);
        assert_eq!(slot.take(None), Taken::Item(3));
        // Without a rest they are late again.
        slot.put(4);
        slot.put(5);
        assert_eq!(slot.passed_over().late, late + 1);
    }

    #[test]
    fn a_rest_ends_with_the_source_but_not_before_the_last_item() {
        // Nothing is in it and nothing will be: no use in waiting.
        let slot: Slot<u8> = Slot::default();
        slot.close();
        slot.rest(Instant::now() + LONG);
        // An item waits for its turn, unless it was thrown away.
        let slot = Slot::default();
        slot.put(1);
        slot.close();
        let until = Instant::now() + Duration::from_millis(20);
        slot.rest(until);
        assert!(Instant::now() >= until);
        slot.abort();
        slot.rest(Instant::now() + LONG);
        assert_eq!(slot.take(None), Taken::Closed);
    }

    #[test]
    fn waiting_threads_hear_of_the_end() {
        for end in [Slot::<u8>::close, Slot::<u8>::abort] {
            let slot = Slot::default();
            thread::scope(|scope| {
                let taker = scope.spawn(|| slot.take(Some(Instant::now() + LONG)));
                end(&slot);
                assert_eq!(taker.join().unwrap(), Taken::Closed);
            });
            let slot = Slot::default();
            slot.put(1);
            thread::scope(|scope| {
                let putter = scope.spawn(|| slot.put_in_turn(2));
                end(&slot);
                assert!(!putter.join().unwrap());
            });
        }
    }
}
