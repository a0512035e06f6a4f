//! Figures of a channel: relaxed atomics, on the heap or where other processes see them, read as a
//! snapshot.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a client is no longer registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// `unlisten`, or `close` by its own user: a browser that left, too.
    Closed,
    /// Its queue was full under the policy `disconnect`.
    Overflow,
    /// Nobody held the stream any more.
    Abandoned,
    /// The interpreter ended.
    Exit,
    /// The peer of an offloaded connection closed or reset it.
    Left,
    /// The peer of an offloaded connection did not read, or was not there, for too long.
    Timeout,
    /// The peer of an offloaded connection sent more than a client of a stream has to say.
    Flood,
    /// `disconnect`: it has no right to the stream any more.
    Revoked,
}

impl Reason {
    /// All reasons, in the order in which they are counted.
    pub const ALL: [Reason; 8] = [
        Reason::Closed,
        Reason::Overflow,
        Reason::Abandoned,
        Reason::Exit,
        Reason::Left,
        Reason::Timeout,
        Reason::Flood,
        Reason::Revoked,
    ];

    /// The name in `stats()`.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Closed => "closed",
            Reason::Overflow => "overflow",
            Reason::Abandoned => "abandoned",
            Reason::Exit => "exit",
            Reason::Left => "left",
            Reason::Timeout => "timeout",
            Reason::Flood => "flood",
            Reason::Revoked => "revoked",
        }
    }
}

/// The upper bounds of the buckets of the delay but the last, in milliseconds.
pub const BOUNDS: [u64; 13] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000];

/// Figures of one channel.
pub const WORDS: usize = CLIENTS + 3;

// Their places; other processes rely on them: see `host::PREFIX`.
const PUBLISHED: usize = 0;
const RECEIVED: usize = 1;
const DELIVERED: usize = 2;
const DROPPED: usize = 3;
const BYTES: usize = 4;
const DISCONNECTED: usize = 5;
const DELAY: usize = DISCONNECTED + Reason::ALL.len();
const DELAY_SUM: usize = DELAY + BOUNDS.len() + 1;
const CLIENTS: usize = DELAY_SUM + 1;

/// What a client is to who counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// A queue.
    Queue,
    /// A stream that a Python server iterates.
    Stream,
    /// An offloaded connection.
    Socket,
}

impl Counted {
    /// The name in `stats()`.
    pub fn name(self) -> &'static str {
        match self {
            Counted::Queue => "queue",
            Counted::Stream => "stream",
            Counted::Socket => "socket",
        }
    }
}

/// What happened on one channel of this process since it began, and the clients it has now.
#[derive(Debug)]
pub enum Counters {
    /// Seen by this process alone.
    Own(Box<[AtomicU64; WORDS]>),
    /// Seen by others, too.
    Shared(&'static [AtomicU64; WORDS]),
}

impl Default for Counters {
    fn default() -> Counters {
        Counters::Own(Box::new(array::from_fn(|_| AtomicU64::new(0))))
    }
}

impl Counters {
    fn words(&self) -> &[AtomicU64; WORDS] {
        match self {
            Counters::Own(words) => words,
            Counters::Shared(words) => words,
        }
    }

    /// Events that this process published.
    pub fn published(&self) -> &AtomicU64 {
        &self.words()[PUBLISHED]
    }

    /// Events, of whatever process, that were offered to the clients here.
    pub fn received(&self) -> &AtomicU64 {
        &self.words()[RECEIVED]
    }

    /// Messages that a reader took, and frames that a server took.
    pub fn delivered(&self) -> &AtomicU64 {
        &self.words()[DELIVERED]
    }

    /// Events that a full queue did not keep.
    pub fn dropped(&self) -> &AtomicU64 {
        &self.words()[DROPPED]
    }

    /// Bytes of the frames that servers took, compressed ones as they went out.
    pub fn bytes(&self) -> &AtomicU64 {
        &self.words()[BYTES]
    }

    /// Counts a client that is gone.
    pub fn count_disconnect(&self, reason: Reason) {
        self.words()[DISCONNECTED + reason as usize].fetch_add(1, Relaxed);
    }

    /// Counts `times` deliveries that came so many milliseconds after the ordering of the event. Of
    /// what a client missed and was given when it came back, nothing is counted.
    pub fn count_delay(&self, milliseconds: u64, times: u64) {
        let bucket = BOUNDS.partition_point(|bound| *bound < milliseconds);
        self.words()[DELAY + bucket].fetch_add(times, Relaxed);
        self.words()[DELAY_SUM].fetch_add(milliseconds.saturating_mul(times), Relaxed);
    }

    /// Counts a client in, or with `-1` out.
    pub fn count_client(&self, kind: Counted, change: i64) {
        self.words()[CLIENTS + kind as usize].fetch_add(change.cast_unsigned(), Relaxed);
    }

    /// What they are now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.words().each_ref().map(|word| word.load(Relaxed)))
    }
}

/// What the figures of a channel were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(pub [u64; WORDS]);

impl Snapshot {
    /// See `Counters::published`.
    pub fn published(&self) -> u64 {
        self.0[PUBLISHED]
    }

    /// See `Counters::received`.
    pub fn received(&self) -> u64 {
        self.0[RECEIVED]
    }

    /// See `Counters::delivered`.
    pub fn delivered(&self) -> u64 {
        self.0[DELIVERED]
    }

    /// See `Counters::dropped`.
    pub fn dropped(&self) -> u64 {
        self.0[DROPPED]
    }

    /// See `Counters::bytes`.
    pub fn bytes(&self) -> u64 {
        self.0[BYTES]
    }

    /// Clients gone for `reason`.
    pub fn disconnected(&self, reason: Reason) -> u64 {
        self.0[DISCONNECTED + reason as usize]
    }

    /// The counts of the delay's buckets, each for itself: for each bound, what took as long at the
    /// most and longer than the bound before; at last what took longer than all of them.
    pub fn delays(&self) -> &[u64] {
        &self.0[DELAY..DELAY_SUM]
    }

    /// Milliseconds of all delays together.
    pub fn delay_sum(&self) -> u64 {
        self.0[DELAY_SUM]
    }

    /// Clients now.
    pub fn clients(&self, kind: Counted) -> u64 {
        self.0[CLIENTS + kind as usize]
    }

    /// Adds what a process that is gone has counted: it has no clients any more.
    pub fn add_departed(&mut self, other: &Snapshot) {
        for (word, more) in self.0[..CLIENTS].iter_mut().zip(&other.0) {
            *word = word.saturating_add(*more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_what_took_as_long_as_its_bound_at_the_most() {
        let counters = Counters::default();
        for (milliseconds, times) in [(0, 1), (1, 2), (2, 4), (3, 8), (5, 16), (10_000, 32)] {
            counters.count_delay(milliseconds, times);
        }
        counters.count_delay(10_001, 64);
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.delays(), [3, 4, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 64]);
        assert_eq!(snapshot.delay_sum(), 2 + 8 + 24 + 80 + 320_000 + 640_064);
    }

    #[test]
    fn the_departed_have_no_clients() {
        let counters = Counters::default();
        for (kind, change) in [(Counted::Queue, 1), (Counted::Socket, 1), (Counted::Queue, -1)] {
            counters.count_client(kind, change);
        }
        counters.count_disconnect(Reason::Revoked);
        counters.count_delay(20_000, 1);
        let (mut sum, one) = (Snapshot::default(), counters.snapshot());
        assert_eq!((one.clients(Counted::Queue), one.clients(Counted::Socket)), (0, 1));
        for _ in 0..2 {
            sum.add_departed(&one);
        }
        assert_eq!((sum.clients(Counted::Socket), sum.disconnected(Reason::Revoked)), (0, 2));
        assert_eq!((sum.delays().last(), sum.delay_sum()), (Some(&2), 40_000));
    }
}
