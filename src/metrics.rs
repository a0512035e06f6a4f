//! Figures of a channel: relaxed atomics, read as a snapshot.

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
    /// All reasons, in the order of `Counters::disconnected`.
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

/// The upper bounds of the buckets of a `Histogram` but the last, in milliseconds.
pub const BOUNDS: [u64; 13] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000];

/// How long something took, counted in buckets.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Histogram {
    /// For each bound, what took as long at the most and longer than the bound before; at last what
    /// took longer than all of them.
    counts: [AtomicU64; BOUNDS.len() + 1],
    /// Milliseconds of all together.
    sum: AtomicU64,
}

impl Histogram {
    /// Counts `times` that took so many milliseconds each.
    pub fn count(&self, milliseconds: u64, times: u64) {
        let bucket = BOUNDS.partition_point(|bound| *bound < milliseconds);
        self.counts[bucket].fetch_add(times, Relaxed);
        self.sum.fetch_add(milliseconds.saturating_mul(times), Relaxed);
    }

    /// The counts of the buckets, each for itself.
    pub fn counts(&self) -> [u64; BOUNDS.len() + 1] {
        self.counts.each_ref().map(|count| count.load(Relaxed))
    }

    /// Milliseconds of all together.
    pub fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }
}

/// What happened on one channel of this process since it began.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Counters {
    /// Events that this process published.
    pub published: AtomicU64,
    /// Events, of whatever process, that were offered to the clients here.
    pub received: AtomicU64,
    /// Messages that a reader took, and frames that a server took.
    pub delivered: AtomicU64,
    /// Events that a full queue did not keep.
    pub dropped: AtomicU64,
    /// Bytes of the frames that servers took, compressed ones as they went out.
    pub bytes: AtomicU64,
    /// Clients gone, by reason.
    disconnected: [AtomicU64; Reason::ALL.len()],
    /// From the ordering of an event to its delivery. Of what a client missed and was given when it
    /// came back, nothing is counted.
    pub delay: Histogram,
}

impl Counters {
    /// Counts a client that is gone.
    pub fn count_disconnect(&self, reason: Reason) {
        self.disconnected[reason as usize].fetch_add(1, Relaxed);
    }

    /// Clients gone for `reason`.
    pub fn disconnected(&self, reason: Reason) -> u64 {
        self.disconnected[reason as usize].load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_what_took_as_long_as_its_bound_at_the_most() {
        let delay = Histogram::default();
        for (milliseconds, times) in [(0, 1), (1, 2), (2, 4), (3, 8), (5, 16), (10_000, 32)] {
            delay.count(milliseconds, times);
        }
        delay.count(10_001, 64);
        assert_eq!(delay.counts(), [3, 4, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 64]);
        assert_eq!(delay.sum(), 2 + 8 + 24 + 80 + 320_000 + 640_064);
    }
}
