//! History: what a channel remembers for clients that come back.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::event::Event;
use crate::event_id::EventId;

/// What bounds a channel's history beside its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one channel.
    pub bytes: usize,
    /// Milliseconds that an event is kept.
    pub age: u64,
}

impl Default for Limits {
    /// 64 MiB and a day.
    fn default() -> Self {
        Limits { bytes: 64 << 20, age: 86_400_000 }
    }
}

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

/// The newest events of a channel, bounded by count, bytes and age.
#[derive(Debug)]
pub struct History {
    events: VecDeque<Arc<Event>>,
    /// The id before the oldest event kept: what a client may have seen last and still resume.
    floor: EventId,
    limit: usize,
    limits: Limits,
    bytes: usize,
}

impl History {
    /// Remembers up to `limit` events after `floor`.
    pub fn new(limit: usize, limits: Limits, floor: EventId) -> Self {
        History { events: VecDeque::new(), floor, limit, limits, bytes: 0 }
    }

    /// Remembers at least `limit` events: the largest that anyone asked for holds.
    pub fn raise_limit(&mut self, limit: usize) {
        self.limit = self.limit.max(limit);
    }

    /// Events that it keeps at the most.
    pub fn limit(&self) -> usize {
        self.limit
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
    pub fn push(&mut self, event: &Arc<Event>, now: u64, discarded: &mut Vec<Arc<Event>>) {
        self.bytes += event.weight();
        self.events.push_back(Arc::clone(event));
        self.trim(now, discarded);
    }

    /// Adds an event in its place, which is the newest but for channels whose ids differ.
    pub fn insert(&mut self, event: &Arc<Event>, now: u64, discarded: &mut Vec<Arc<Event>>) {
        let at = self.events.partition_point(|known| known.id <= event.id);
        self.bytes += event.weight();
        self.events.insert(at, Arc::clone(event));
        self.trim(now, discarded);
    }

    /// Forgets what is too much or too old at `now`, in milliseconds since the epoch.
    pub fn trim(&mut self, now: u64, discarded: &mut Vec<Arc<Event>>) {
        let oldest_kept = now.saturating_sub(self.limits.age);
        while let Some(oldest) = self.events.front() {
            let is_too_old = oldest.id.is_some_and(|id| id.ms < oldest_kept);
            if self.events.len() <= self.limit && self.bytes <= self.limits.bytes && !is_too_old {
                return;
            }
            if let Some(oldest) = self.events.pop_front() {
                self.bytes -= oldest.weight();
                self.floor = oldest.id.unwrap_or(self.floor).max(self.floor);
                discarded.push(oldest);
            }
        }
    }

    /// Takes what a store still has from before the oldest event kept here: all of its `events`
    /// after `floor`, oldest first. Keeps the newest of them that its limits allow.
    pub fn prepend(&mut self, floor: EventId, mut events: Vec<Arc<Event>>) {
        let before = self.events.len();
        while let Some(event) = events.pop() {
            let weight = event.weight();
            let Some(id) = event.id else { continue };
            if id > self.floor {
                continue;
            }
            if self.events.len() >= self.limit || self.bytes + weight > self.limits.bytes {
                if self.events.len() > before {
                    self.floor = id;
                }
                return;
            }
            self.bytes += weight;
            self.events.push_front(event);
        }
        self.floor = self.floor.min(floor);
    }

    /// Forgets everything: what comes after `floor` is what it knows.
    pub fn restart(&mut self, floor: EventId, discarded: &mut Vec<Arc<Event>>) {
        discarded.extend(self.events.drain(..));
        self.bytes = 0;
        self.floor = floor;
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
        let mut history = History::new(3, Limits::default(), id(0));
        let mut discarded = Vec::new();
        for n in 1..=5 {
            history.push(&event(n), 1, &mut discarded);
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
        let mut history = History::new(0, Limits::default(), id(0));
        history.push(&event(1), 1, &mut Vec::new());
        assert_eq!(history.gap_after(id(1), id(1)), None);
        assert_eq!(history.gap_after(id(0), id(1)), Some(Gap::TooOld));
        assert_eq!(history.bytes(), 0);
    }

    #[test]
    fn bytes_bound_it_as_well() {
        let limits = Limits { bytes: 1 << 20, ..Limits::default() };
        let mut history = History::new(usize::MAX, limits, id(0));
        let mut discarded = Vec::new();
        let data = "x".repeat(limits.bytes / 4);
        for n in 1..=8 {
            let fields = crate::frame::Fields { data: Some(&data), ..Default::default() };
            let draft = Draft {
                body: crate::frame::Body::encode(&fields, usize::MAX).ok(),
                format: Format::Text,
                has_message: true,
                decoded: None,
            };
            history.push(&Arc::new(Event::seal(draft, Some(id(n)), None)), 1, &mut discarded);
            assert!(history.bytes() <= limits.bytes);
        }
        assert_eq!((history.len(), discarded.len()), (3, 5));
    }

    #[test]
    fn age_bounds_it_as_well() {
        let limits = Limits { age: 10, ..Limits::default() };
        let mut history = History::new(9, limits, id(0));
        let mut discarded = Vec::new();
        for n in 1..=3 {
            history.push(&event(n), n, &mut discarded);
        }
        history.trim(11, &mut discarded);
        assert_eq!(history.len(), 3);
        history.trim(12, &mut discarded);
        assert_eq!((history.len(), history.floor(), discarded.len()), (0, id(3), 3));
    }

    #[test]
    fn a_store_gives_what_was_before() {
        let mut history = History::new(4, Limits::default(), id(5));
        history.push(&event(6), 1, &mut Vec::new());
        history.prepend(id(2), vec![event(3), event(4), event(5), event(6)]);
        assert_eq!((after(&history, 0), history.floor()), (vec![3, 4, 5, 6], id(2)));
        let mut history = History::new(2, Limits::default(), id(5));
        history.push(&event(6), 1, &mut Vec::new());
        history.prepend(id(2), vec![event(3), event(4), event(5)]);
        assert_eq!((after(&history, 0), history.floor()), (vec![5, 6], id(4)));
        history.restart(id(9), &mut Vec::new());
        assert_eq!((history.len(), history.bytes(), history.floor()), (0, 0, id(9)));
    }
}
