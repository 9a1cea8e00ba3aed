//! Times of pictures: milliseconds inside, RFC 3339 outside.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::{Timestamp, civil, tz::TimeZone};

/// A moment, to the millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(i64);

/// A time that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time: write 2026-11-23, or 2026-11-23T14:05:00Z")]
pub struct TimeError(String);

impl Time {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub fn milliseconds(self) -> i64 {
        self.0
    }

    /// The last moment that a text names: the end of the day, where it is a date.
    ///
    /// # Errors
    /// Those of reading a time.
    pub fn last_of(text: &str) -> Result<Self, TimeError> {
        const DAY: i64 = 24 * 60 * 60 * 1000;
        let first: Self = text.parse()?;
        Ok(if text.parse::<Timestamp>().is_ok() { first } else { Self(first.0 + DAY - 1) })
    }

    /// From milliseconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub fn from_milliseconds(milliseconds: i64) -> Self {
        Self(milliseconds)
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let milliseconds = |d: std::time::Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self(milliseconds(after)),
            Err(before) => Self(-milliseconds(before.duration())),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Timestamp::from_millisecond(self.0) {
            Ok(timestamp) => timestamp.fmt(f),
            Err(_) => write!(f, "{} ms", self.0),
        }
    }
}

impl FromStr for Time {
    type Err = TimeError;

    /// A date (its first moment, UTC) or an RFC 3339 time.
    fn from_str(text: &str) -> Result<Self, TimeError> {
        let error = || TimeError(text.to_owned());
        if let Ok(timestamp) = text.parse::<Timestamp>() {
            return Ok(Self(timestamp.as_millisecond()));
        }
        let date: civil::Date = text.parse().map_err(|_| error())?;
        let zoned = date.to_zoned(TimeZone::UTC).map_err(|_| error())?;
        Ok(Self(zoned.timestamp().as_millisecond()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, milliseconds, written) in [
            ("1970-01-01", 0, "1970-01-01T00:00:00Z"),
            ("2026-11-23", 1_795_392_000_000, "2026-11-23T00:00:00Z"),
            ("2024-02-29T12:00:00.250Z", 1_709_208_000_250, "2024-02-29T12:00:00.25Z"),
            ("2024-02-29T13:00:00+01:00", 1_709_208_000_000, "2024-02-29T12:00:00Z"),
        ] {
            let time: Time = text.parse().unwrap();
            assert_eq!((time.milliseconds(), time.to_string().as_str()), (milliseconds, written));
        }
        for (text, milliseconds) in [("1970-01-01", 86_399_999), ("1970-01-01T00:00:01Z", 1000)] {
            assert_eq!(Time::last_of(text).map(Time::milliseconds), Ok(milliseconds));
        }
        for text in ["yesterday", "2026-13-01", ""] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
    }
}
