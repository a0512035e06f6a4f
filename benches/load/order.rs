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

/// The ids of a stream in the order in which they came, with what was wrong with any client's.
///
/// The first client that gets an event behind all others' sets it down, and says whether it is the
/// next one of its publisher; every other client must get the same one in the same place.
#[derive(Default)]
pub struct Order {
    ids: Vec<Id>,
    /// Of each publisher, the number of its next event.
    pub next: BTreeMap<u64, u64>,
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
        self.ids.len()
    }

    /// How many events a client at `cursor` has not got yet.
    pub fn behind(&self, cursor: Id) -> usize {
        self.ids.len() - self.ids.partition_point(|known| *known <= cursor)
    }

    /// Takes an event of a client that is at `cursor`; the place where the client is now.
    ///
    /// `may_skip` after a reset: the client was told that something is missing.
    pub fn take(&mut self, cursor: Id, id: Id, numbered: Numbered, may_skip: bool) -> Id {
        if id <= cursor {
            if self.ids.binary_search(&id).is_ok() {
                self.doubled += 1;
                self.complain(format!("{id:?} again, at {cursor:?}"));
            } else {
                self.out_of_order += 1;
                self.complain(format!("{id:?} behind {cursor:?}"));
            }
            return cursor;
        }
        let at = self.ids.partition_point(|known| *known <= cursor);
        let place = at + self.ids[at..].partition_point(|known| *known < id);
        if place > at && !may_skip {
            self.lost += (place - at) as u64;
            self.complain(format!("{} lost between {cursor:?} and {id:?}", place - at));
        }
        if place == self.ids.len() {
            self.ids.push(id);
            self.number(id, numbered);
        } else if self.ids[place] != id {
            // All who are behind it have been without it.
            self.out_of_order += 1;
            self.complain(format!("{id:?} was not there for others"));
            self.ids.insert(place, id);
        }
        id
    }

    fn number(&mut self, id: Id, numbered: Numbered) {
        let Some((publisher, number)) = numbered else {
            self.unnumbered += 1;
            return;
        };
        let next = self.next.entry(publisher).or_default();
        let expected = std::mem::replace(next, number + 1);
        if number > expected {
            self.lost += number - expected;
        } else if number < expected {
            self.doubled += 1;
        } else {
            return;
        }
        self.complain(format!("{id:?} is {number} of {publisher} instead of {expected}"));
    }

    /// Notes what went wrong, as long as there are few.
    pub fn complain(&mut self, what: String) {
        if self.complaints.len() < 10 {
            self.complaints.push(what);
        }
    }
}
