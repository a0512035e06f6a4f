//! History: what a channel remembers for clients that come back.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::event::Event;
use crate::event_id::EventId;

/// Bytes that one channel remembers at the most, whatever its count allows.
pub const MAX_BYTES: usize = 64 << 20;

/// Why a client cannot be given exactly what it missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// Its last event id is older than the oldest event kept.
    TooOld,
    /// Its last event id is newer than the newest known: the store was lost, or it is made up.
    Future,
    /// What it sent is not an id of ours.
    Unknown,
}

impl Gap {
    /// The reason in the `stream-reset` event.
    pub fn reason(self) -> &'static str {
        match self {
            Gap::TooOld => "too-old",
            Gap::Future => "future",
            Gap::Unknown => "unknown",
        }
    }
}

/// The newest events of a channel, bounded by count and by bytes.
#[derive(Debug)]
pub struct History {
    events: VecDeque<Arc<Event>>,
    /// The id before the oldest event kept: what a client may have seen last and still resume.
    floor: EventId,
    limit: usize,
    bytes: usize,
}

impl History {
    /// Remembers up to `limit` events after `floor`.
    pub fn new(limit: usize, floor: EventId) -> Self {
        History { events: VecDeque::new(), floor, limit, bytes: 0 }
    }

    /// Remembers at least `limit` events: the largest that anyone asked for holds.
    pub fn raise_limit(&mut self, limit: usize) {
        self.limit = self.limit.max(limit);
    }

    /// Events kept now.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Bytes reckoned for the events kept now.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds the newest event; what falls out goes to `discarded`, to be dropped without a lock.
    pub fn push(&mut self, event: &Arc<Event>, discarded: &mut Vec<Arc<Event>>) {
        self.bytes += event.weight();
        self.events.push_back(Arc::clone(event));
        while self.events.len() > self.limit || self.bytes > MAX_BYTES {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.weight();
            if let Some(id) = oldest.id {
                self.floor = id;
            }
            discarded.push(oldest);
        }
    }

    /// Whether a client whose last event was `last` can be given all that came after it.
    pub fn gap_after(&self, last: EventId, newest: EventId) -> Option<Gap> {
        if last > newest {
            Some(Gap::Future)
        } else if last < self.floor {
            Some(Gap::TooOld)
        } else {
            None
        }
    }

    /// The id before the oldest event kept.
    pub fn floor(&self) -> EventId {
        self.floor
    }

    /// The events after `last`, oldest first.
    pub fn after(&self, last: EventId) -> impl Iterator<Item = &Arc<Event>> {
        let start = self.events.partition_point(|event| event.id <= Some(last));
        self.events.range(start..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Draft, Format};

    fn id(n: u64) -> EventId {
        EventId { ms: 1, n }
    }

    fn event(n: u64) -> Arc<Event> {
        let draft = Draft { body: None, format: Format::Text, has_message: true, decoded: None };
        Arc::new(Event::seal(draft, Some(id(n)), None))
    }

    fn after(history: &History, last: u64) -> Vec<u64> {
        history.after(id(last)).filter_map(|event| event.id).map(|id| id.n).collect()
    }

    #[test]
    fn keeps_the_newest_and_knows_what_it_forgot() {
        let mut history = History::new(3, id(0));
        let mut discarded = Vec::new();
        for n in 1..=5 {
            history.push(&event(n), &mut discarded);
        }
        assert_eq!((history.len(), discarded.len(), history.floor()), (3, 2, id(2)));
        assert_eq!(after(&history, 2), [3, 4, 5]);
        assert_eq!(after(&history, 4), [5]);
        assert_eq!(after(&history, 5), [] as [u64; 0]);
        assert_eq!(history.gap_after(id(2), id(5)), None);
        assert_eq!(history.gap_after(id(5), id(5)), None);
        assert_eq!(history.gap_after(id(1), id(5)), Some(Gap::TooOld));
        assert_eq!(history.gap_after(id(6), id(5)), Some(Gap::Future));
    }

    #[test]
    fn without_history_only_the_newest_id_resumes() {
        let mut history = History::new(0, id(0));
        history.push(&event(1), &mut Vec::new());
        assert_eq!(history.gap_after(id(1), id(1)), None);
        assert_eq!(history.gap_after(id(0), id(1)), Some(Gap::TooOld));
        assert_eq!(history.bytes(), 0);
    }

    #[test]
    fn bytes_bound_it_as_well() {
        let mut history = History::new(usize::MAX, id(0));
        let mut discarded = Vec::new();
        let data = "x".repeat(MAX_BYTES / 4);
        for n in 1..=8 {
            let fields = crate::frame::Fields { data: Some(&data), ..Default::default() };
            let draft = Draft {
                body: crate::frame::Body::encode(&fields, usize::MAX).ok(),
                format: Format::Text,
                has_message: true,
                decoded: None,
            };
            history.push(&Arc::new(Event::seal(draft, Some(id(n)), None)), &mut discarded);
            assert!(history.bytes() <= MAX_BYTES);
        }
        assert_eq!((history.len(), discarded.len()), (3, 5));
    }
}
