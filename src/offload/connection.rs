//! One client's connection: what waits for it, and how it is written.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, shutdown,
};
use smallvec::SmallVec;
use socket2::SockRef;

use crate::clients::Slot;
use crate::coding::{Coding, Sum};
use crate::descriptors::Own;
use crate::event_id::{EventId, now_ms};
use crate::metrics::Reason;
use crate::offload::piece::{Form, Piece};
use crate::queue::Overflow;

/// Pieces that one vectored write takes.
const VECTOR: usize = 16;

/// Bytes that a client may send after its request, which nobody reads: more is no browser.
const MOST_UNREAD: usize = 64 << 10;

/// What bounds what waits for one client.
#[derive(Clone, Copy, Debug)]
pub struct Backlog {
    /// Frames.
    pub frames: usize,
    /// Bytes.
    pub bytes: usize,
    /// What happens to what is over it.
    pub overflow: Overflow,
}

/// What waits for a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlogged {
    /// When the oldest event of it was ordered, in milliseconds since the epoch; `None` without one.
    pub since: Option<u64>,
    /// Its frames.
    pub frames: usize,
    /// Its bytes, where they are known.
    pub bytes: Option<usize>,
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It reads history after this id, a few events at a time.
    Behind {
        /// The last event that it was given.
        cursor: EventId,
        /// It was told that it misses some, up to here.
        told: Option<EventId>,
    },
    /// It gets what is passed after this place in the hub's order.
    Live(u64),
    /// It is written to its end, and then no more.
    Ending,
    /// It was written to its end: the peer is given the time to read it, until this moment of its shard.
    Lingering(u64),
}

/// A piece that waits.
#[derive(Debug)]
struct Waiting {
    piece: Arc<Piece>,
    /// It counts against the limits; what leads to the first live event, or is history, does not.
    is_live: bool,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// All of it.
    All,
    /// The socket takes no more now.
    Blocked,
    /// The connection is over.
    Gone(Reason),
}

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    socket: Own,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its route, and its place among the route's members.
    pub route: usize,
    /// See `route`.
    pub place: usize,
    /// What its body looks like.
    pub form: Form,
    /// Milliseconds of idleness after which a heartbeat is sent; 0 for never.
    pub heartbeat: u32,
    /// When it last took bytes, or something began to wait for it, in milliseconds of its shard.
    pub written_at: u64,
    /// Tells it from another one in the same place.
    pub number: u64,
    limits: Backlog,
    /// What waits, oldest first; the first is sent up to `sent`.
    backlog: VecDeque<Waiting>,
    sent: usize,
    /// Frames and bytes of what counts against the limits.
    frames: usize,
    bytes: usize,
    /// Bytes that the socket took.
    taken: u64,
    /// Of the text in pieces that the socket took whole, where it is compressed.
    sum: Sum,
    /// It waits to be given more of history.
    pub is_queued: bool,
    unread: usize,
    /// Why it ends, if it is not the end of all.
    pub is_revoked: bool,
    /// Given back with the connection.
    slot: Option<Arc<Slot>>,
}

impl Connection {
    /// A connection that has sent nothing.
    pub fn new(
        socket: Own,
        form: Form,
        limits: Backlog,
        heartbeat: u32,
        slot: Option<Arc<Slot>>,
    ) -> Connection {
        Connection {
            socket,
            phase: Phase::Live(0),
            route: 0,
            place: 0,
            form,
            heartbeat,
            written_at: 0,
            number: 0,
            limits,
            backlog: VecDeque::new(),
            sent: 0,
            frames: 0,
            bytes: 0,
            taken: 0,
            sum: Sum::default(),
            is_queued: false,
            unread: 0,
            is_revoked: false,
            slot,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Own {
        &self.socket
    }

    /// Its place among the streams of the process.
    pub fn slot(&self) -> Option<&Slot> {
        self.slot.as_deref()
    }

    /// When the oldest event that waits for it was ordered, in milliseconds since the epoch.
    pub fn behind_since(&self) -> Option<u64> {
        self.backlog.iter().find_map(|waiting| waiting.piece.ordered())
    }

    /// What waits for it.
    pub fn waiting(&self) -> Backlogged {
        let pieces = self.backlog.iter().map(|waiting| &waiting.piece);
        let frames = pieces.clone().map(|piece| piece.frames() as usize).sum();
        let bytes: usize = pieces.map(|piece| piece.bytes().len()).sum();
        Backlogged { since: self.behind_since(), frames, bytes: Some(bytes - self.sent) }
    }

    /// Drops what waits, but for the rest of what is sent in part, and the head of the response: without
    /// it the end would be none. Gives whether there was any.
    pub fn cut(&mut self) -> bool {
        let dropped = self.backlog.split_off(usize::from(self.sent > 0));
        let is_any = !dropped.is_empty();
        let head = dropped.front().and_then(|first| first.piece.head_alone(self.form));
        if let Some(head) = head {
            self.push(Arc::new(head));
        }
        for Waiting { piece, is_live } in dropped {
            if is_live {
                self.frames -= piece.frames() as usize;
                self.bytes -= piece.bytes().len();
            }
            piece.count_dropped();
        }
        is_any
    }

    /// Whether nothing waits.
    pub fn is_idle(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Bytes that the socket took from what waited.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Adds to what waits, whatever its limits say: what leads to the first live event, or ends all.
    pub fn push(&mut self, piece: Arc<Piece>) {
        if !piece.bytes().is_empty() {
            self.backlog.push_back(Waiting { piece, is_live: false });
        }
    }

    /// Adds to what waits, and counts it against the limits.
    fn push_live(&mut self, piece: Arc<Piece>) {
        self.frames += piece.frames() as usize;
        self.bytes += piece.bytes().len();
        self.backlog.push_back(Waiting { piece, is_live: true });
    }

    /// Adds an event's piece under the limits. False: the client is to be disconnected.
    pub fn offer(&mut self, piece: &Arc<Piece>) -> bool {
        let (frames, bytes) = (piece.frames() as usize, piece.bytes().len());
        // One alone may be larger than all that is allowed.
        while self.bytes > 0
            && (self.frames + frames > self.limits.frames || self.bytes + bytes > self.limits.bytes)
        {
            match self.limits.overflow {
                Overflow::Disconnect => {
                    piece.count_dropped();
                    return false;
                }
                Overflow::DropNewest => {
                    piece.count_dropped();
                    return true;
                }
                Overflow::DropOldest => {
                    // One that is partly sent must be sent whole, and one of no event opens or
                    // ends the stream.
                    let is_begun = usize::from(self.sent > 0);
                    let mut after = self.backlog.range(is_begun..);
                    let Some(at) = after.position(|waiting| waiting.is_live) else { break };
                    let Some(dropped) = self.backlog.remove(is_begun + at) else { break };
                    self.frames -= dropped.piece.frames() as usize;
                    self.bytes -= dropped.piece.bytes().len();
                    dropped.piece.count_dropped();
                }
            }
        }
        self.push_live(Arc::clone(piece));
        true
    }

    /// Writes a piece to a connection for which nothing waits. What is left of it waits.
    pub fn write(&mut self, piece: &Arc<Piece>) -> Wrote {
        let bytes = piece.bytes();
        loop {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) if count == bytes.len() => {
                    add_up(&mut self.sum, self.form, piece);
                    return Wrote::All;
                }
                Ok(count) => {
                    self.push_live(Arc::clone(piece));
                    self.sent = count;
                    return Wrote::Blocked;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => {
                    self.push_live(Arc::clone(piece));
                    return Wrote::Blocked;
                }
                Err(errno) => return Wrote::Gone(reason_of(errno)),
            }
        }
    }

    /// Writes what waits, several pieces at once; counts those that are through.
    pub fn flush(&mut self) -> Wrote {
        while !self.backlog.is_empty() {
            let sent = {
                let mut slices: SmallVec<[IoSlice<'_>; VECTOR]> = SmallVec::new();
                let mut from = self.sent;
                for waiting in self.backlog.iter().take(VECTOR) {
                    // What is sent of the first is less than all of it.
                    slices
                        .push(IoSlice::new(waiting.piece.bytes().get(from..).unwrap_or_default()));
                    from = 0;
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                sendmsg(&self.socket, &slices, &mut SendAncillaryBuffer::default(), flags)
            };
            match sent {
                Ok(count) => self.advance(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Wrote::Blocked,
                Err(errno) => return Wrote::Gone(reason_of(errno)),
            }
        }
        Wrote::All
    }

    fn advance(&mut self, count: usize) {
        self.taken += count as u64;
        let mut left = self.sent + count;
        let mut now = None;
        while let Some(Waiting { piece, is_live }) = self.backlog.front() {
            if left < piece.bytes().len() {
                break;
            }
            left -= piece.bytes().len();
            if *is_live {
                self.frames -= piece.frames() as usize;
                self.bytes -= piece.bytes().len();
            }
            piece.count_delivered(1, is_live.then(|| *now.get_or_insert_with(now_ms)));
            add_up(&mut self.sum, self.form, piece);
            self.backlog.pop_front();
        }
        if self.backlog.is_empty() {
            // A client that was slow once keeps no room for it.
            self.backlog = VecDeque::new();
        }
        self.sent = left;
    }

    /// What ends the body, with a `last` text after all that waits: of that, nothing may be dropped any
    /// more.
    pub fn end_of_body(&self, last: &[u8]) -> Piece {
        let mut sum = self.sum;
        self.backlog.iter().for_each(|waiting| sum.append(waiting.piece.part()));
        Piece::end(self.form, sum, last)
    }

    /// Takes what the peer sent, which means nothing; or tells that it is gone.
    pub fn read_away(&mut self, scratch: &mut [u8]) -> Option<Reason> {
        loop {
            match recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Some(Reason::Left),
                Ok((_, count)) => {
                    self.unread += count;
                    if self.unread > MOST_UNREAD {
                        return Some(Reason::Flood);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(errno) => return Some(reason_of(errno)),
            }
        }
    }

    /// Tells the peer that nothing more comes.
    pub fn finish(&self) {
        // It may be gone already.
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    /// Ends the connection, also for copies of it that a forked child may have. `at_once` frees what
    /// the kernel keeps for a peer that does not read.
    pub fn end(&self, at_once: bool) {
        if at_once {
            let _ = SockRef::from(&self.socket.as_fd()).set_linger(Some(std::time::Duration::ZERO));
        }
        // It may be gone already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

/// Counts that a piece went out whole.
fn add_up(sum: &mut Sum, form: Form, piece: &Piece) {
    if form.coding == Coding::Gzip {
        sum.append(piece.part());
    }
}

fn reason_of(errno: Errno) -> Reason {
    match errno {
        Errno::TIMEDOUT => Reason::Timeout,
        _ => Reason::Left,
    }
}
