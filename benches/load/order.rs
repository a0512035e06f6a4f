//! The one order of a stream's events, as all its clients together have seen it.

use std::collections::BTreeMap;

/// Milliseconds and the counter behind them.
pub type Id = (u64, u64);

/// An id `ms-n`.
pub fn id(text: &[u8]) -> Option<Id> {
    let (ms, n) = std::str::from_utf8(text).ok()?.split_once('-')?;
    Some((ms.parse().ok()?, n.parse().ok()?))
}

/// Who published an event, and its number among theirs.
pub type Numbered = Option<(u64, u64)>;

/// An event, and the place of the client that was the furthest behind when it got it.
struct Place {
    id: Id,
    from: Id,
}

/// The ids of a stream in the order in which they came, with what was wrong with any client's.
///
/// The first client that gets an event sets it down; every other one must get the same in the same
/// place. An event may be set down behind later ones, when all who have those began after it.
#[derive(Default)]
pub struct Order {
    places: Vec<Place>,
    /// Of each publisher, the events by their numbers.
    published: BTreeMap<u64, BTreeMap<u64, Id>>,
    /// Events without a publisher's number.
    pub unnumbered: u64,
    pub lost: u64,
    pub doubled: u64,
    pub out_of_order: u64,
    /// The first things that went wrong, in words.
    pub complaints: Vec<String>,
}

impl Order {
    /// Events so far.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// How many events a client at `cursor` has not got yet.
    pub fn behind(&self, cursor: Id) -> usize {
        self.places.len() - self.places.partition_point(|known| known.id <= cursor)
    }

    /// Of each publisher, how many events there are.
    pub fn counts(&self) -> impl Iterator<Item = (u64, u64)> {
        self.published.iter().map(|(publisher, events)| (*publisher, events.len() as u64))
    }

    /// Events that nobody has got, by their publishers' numbers: for a while, when nobody is there.
    pub fn missing(&self) -> u64 {
        let missing = |events: &BTreeMap<u64, Id>| {
            events.last_key_value().map_or(0, |(last, _)| last + 1 - events.len() as u64)
        };
        self.published.values().map(missing).sum()
    }

    /// Takes an event of a client that is at `cursor`; the place where the client is now.
    ///
    /// `may_skip` after a reset: the client was told that something is missing.
    pub fn take(&mut self, cursor: Id, id: Id, numbered: Numbered, may_skip: bool) -> Id {
        if id <= cursor {
            if self.places.binary_search_by_key(&id, |known| known.id).is_ok() {
                self.doubled += 1;
                self.complain(format!("{id:?} again, at {cursor:?}"));
            } else {
                self.out_of_order += 1;
                self.complain(format!("{id:?} behind {cursor:?}"));
            }
            return cursor;
        }
        let at = self.places.partition_point(|known| known.id <= cursor);
        let place = at + self.places[at..].partition_point(|known| known.id < id);
        if place > at && !may_skip {
            self.lost += (place - at) as u64;
            self.complain(format!("{} lost between {cursor:?} and {id:?}", place - at));
        }
        // Whose gap was told of, or counted, has no other one.
        let from = if place > at || may_skip { id } else { cursor };
        match self.places.get_mut(place) {
            Some(known) if known.id == id => known.from = known.from.min(from),
            next => {
                if next.is_some_and(|next| next.from < id) {
                    self.lost += 1;
                    self.complain(format!("{id:?} was not there for another client"));
                }
                self.places.insert(place, Place { id, from });
                self.number(id, numbered);
            }
        }
        id
    }

    fn number(&mut self, id: Id, numbered: Numbered) {
        let Some((publisher, number)) = numbered else {
            self.unnumbered += 1;
            return;
        };
        let events = self.published.entry(publisher).or_default();
        let is_before = events.range(..number).next_back().is_none_or(|(_, known)| *known < id);
        let is_after = events.range(number + 1..).next().is_none_or(|(_, known)| id < *known);
        if let Some(known) = events.insert(number, id) {
            self.doubled += 1;
            self.complain(format!("{number} of {publisher} at {known:?} and at {id:?}"));
        } else if !(is_before && is_after) {
            self.out_of_order += 1;
            self.complain(format!("{number} of {publisher} is out of order at {id:?}"));
        }
    }

    /// Notes what went wrong, as long as there are few.
    pub fn complain(&mut self, what: String) {
        if self.complaints.len() < 10 {
            self.complaints.push(what);
        }
    }
}
