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

/// What happened on one channel of this process since it began.
#[derive(Debug, Default)]
pub struct Counters {
    /// Events that this process published.
    pub published: AtomicU64,
    /// Events, of whatever process, that were offered to the clients here.
    pub received: AtomicU64,
    /// Messages that a reader took, and frames that a server took.
    pub delivered: AtomicU64,
    /// Events that a full queue did not keep.
    pub dropped: AtomicU64,
    /// Bytes of the frames that servers took.
    pub bytes: AtomicU64,
    /// Clients gone, by reason.
    disconnected: [AtomicU64; Reason::ALL.len()],
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
