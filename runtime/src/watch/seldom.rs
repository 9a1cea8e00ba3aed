//! Sentences that would be said too often.

use std::time::{Duration, Instant};

/// Lets the first of many like sentences through, and then one in a while.
#[derive(Debug)]
pub struct Seldom {
    pause: Duration,
    last: Option<Instant>,
    held: u64,
}

impl Seldom {
    /// At most one in every `pause`.
    #[must_use]
    pub fn new(pause: Duration) -> Self {
        Self { pause, last: None, held: 0 }
    }

    /// Whether to say a sentence now, and how many were held back before it.
    pub fn ask(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < self.pause) {
            self.held += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_while() {
        let (start, mut seldom) = (Instant::now(), Seldom::new(Duration::from_secs(5)));
        let said: Vec<Option<u64>> = [0, 1, 4, 5, 6, 30].map(|s| seldom.ask(start + Duration::from_secs(s))).to_vec();
        assert_eq!(said, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
