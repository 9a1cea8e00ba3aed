//! Work on many items at once, results in the order of the items.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

/// Works on items with so many threads (0 counts as 1) and emits each result in the order of its item, as soon as all before it
/// are out.
///
/// # Errors
/// The first error of `emit`; no further item is then begun.
///
/// # Panics
/// Where `work` does.
pub fn ordered_map<T: Send, R: Send, E>(
    items: impl Iterator<Item = T> + Send,
    workers: usize,
    work: impl Fn(T) -> R + Sync,
    mut emit: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    if workers <= 1 {
        return items.into_iter().try_for_each(|item| emit(work(item)));
    }
    let items = Mutex::new(items.enumerate());
    let stopped = AtomicBool::new(false);
    // Room for a few results, so that workers do not run far ahead of a slow reader.
    let (results, inbox) = mpsc::sync_channel(2 * workers);
    thread::scope(|scope| {
        for _ in 0..workers {
            let results = results.clone();
            let (items, stopped, work) = (&items, &stopped, &work);
            scope.spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((index, item)) = next else { break };
                    if results.send((index, work(item))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(results);
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        for (index, result) in inbox {
            waiting.insert(index, result);
            while let Some(result) = waiting.remove(&next) {
                next += 1;
                if let Err(error) = emit(result) {
                    stopped.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    #[test]
    fn order_is_kept() {
        for workers in [0, 1, 2, 7] {
            let mut seen = Vec::new();
            // Early items take longest.
            let work = |i: u64| {
                thread::sleep(Duration::from_millis((20 - i) / 4));
                i * i
            };
            let result: Result<(), ()> = ordered_map(0..20, workers, work, |square| {
                seen.push(square);
                Ok(())
            });
            assert_eq!(result, Ok(()));
            assert_eq!(seen, (0..20).map(|i| i * i).collect::<Vec<u64>>(), "{workers} workers");
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        for workers in [1, 3] {
            let begun = AtomicUsize::new(0);
            let work = |i: usize| {
                begun.fetch_add(1, Ordering::Relaxed);
                i
            };
            let result = ordered_map(0..1000, workers, work, |i| if i == 5 { Err(i) } else { Ok(()) });
            assert_eq!(result, Err(5));
            assert!(begun.load(Ordering::Relaxed) < 100, "{workers} workers");
        }
    }

    #[test]
    fn work_is_shared() {
        let ids = Mutex::new(std::collections::BTreeSet::new());
        let work = |_: usize| {
            thread::sleep(Duration::from_millis(5));
            ids.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{:?}", thread::current().id()));
        };
        let _: Result<(), ()> = ordered_map(0..40, 4, work, |()| Ok(()));
        assert!(ids.lock().is_ok_and(|ids| ids.len() > 1));
    }
}
