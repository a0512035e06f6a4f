//! Event ids: `ms-n`, milliseconds since the epoch, then a counter within that millisecond.
//!
//! They never run backwards, are safe in a CORS header (digits and one hyphen), and are short.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest text an id can have: two `u64` and the hyphen.
pub const MAX_TEXT: usize = 41;

/// The position of an event in its bus's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EventId {
    /// Milliseconds since the epoch when the event was ordered.
    pub ms: u64,
    /// Counts the events of one millisecond.
    pub n: u64,
}

impl EventId {
    /// The id right before it.
    pub fn before(self) -> EventId {
        match (self.ms, self.n) {
            (0, 0) => self,
            (ms, 0) => EventId { ms: ms - 1, n: u64::MAX },
            (ms, n) => EventId { ms, n: n - 1 },
        }
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.n)
    }
}

/// The text is not an id of ours.
#[derive(Debug, PartialEq, Eq)]
pub struct NotAnId;

impl FromStr for EventId {
    type Err = NotAnId;

    /// Accepts exactly what `Display` writes, so that an id has one spelling.
    fn from_str(text: &str) -> Result<Self, NotAnId> {
        fn number(digits: &str) -> Result<u64, NotAnId> {
            let canonical = digits == "0" || !digits.starts_with('0');
            if !canonical || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(NotAnId);
            }
            digits.parse().map_err(|_| NotAnId)
        }
        if text.len() > MAX_TEXT {
            return Err(NotAnId);
        }
        let (ms, n) = text.split_once('-').ok_or(NotAnId)?;
        Ok(EventId { ms: number(ms)?, n: number(n)? })
    }
}

/// Hands out ids that rise even when the machine's clock is set back.
#[derive(Debug)]
pub struct IdClock {
    last: EventId,
}

impl IdClock {
    /// A clock whose first id comes after `now_ms`-0, the floor of an empty history.
    pub fn starting_at(now_ms: u64) -> Self {
        IdClock { last: EventId { ms: now_ms, n: 0 } }
    }

    /// The newest id handed out, or the floor if none was.
    pub fn last(&self) -> EventId {
        self.last
    }

    /// Notes an id that another clock has handed out.
    pub fn observe(&mut self, id: EventId) {
        self.last = self.last.max(id);
    }

    /// The next id, at `now_ms` or right after the newest, whichever is later.
    pub fn next(&mut self, now_ms: u64) -> EventId {
        self.last = if now_ms > self.last.ms {
            EventId { ms: now_ms, n: 0 }
        } else {
            EventId { ms: self.last.ms, n: self.last.n.saturating_add(1) }
        };
        self.last
    }
}

/// Milliseconds since the epoch by the machine's clock; 0 for a clock set before 1970.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_when_the_clock_is_set_back() {
        let mut clock = IdClock::starting_at(100);
        let ids: Vec<String> =
            [100, 101, 101, 50, 102].iter().map(|ms| clock.next(*ms).to_string()).collect();
        assert_eq!(ids, ["100-1", "101-0", "101-1", "101-2", "102-0"]);
    }

    #[test]
    fn an_id_has_one_spelling() {
        for text in ["0-0", "1763881200123-0", "1-18446744073709551615"] {
            assert_eq!(text.parse::<EventId>().map(|id| id.to_string()), Ok(text.to_owned()));
        }
        for text in [
            "",
            "-",
            "1",
            "1-",
            "-1",
            "01-0",
            "1-00",
            "+1-0",
            "1-+0",
            " 1-0",
            "1-0 ",
            "1-0-0",
            "1-18446744073709551616",
            "a-b",
            "١-٠",
            &"9".repeat(10_000),
        ] {
            assert_eq!(text.parse::<EventId>(), Err(NotAnId), "{text:?}");
        }
    }
}
