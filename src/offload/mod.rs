//! Offload: streams that leave Python. A server's connection is handed over, with the head of its
//! response, to a thread of this process that writes to all of them and needs no interpreter.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `piece` | frames in the bytes of a connection, encoded once for all of it |
//! | `connection` | one connection, and what waits for it |
//! | `shard` | one I/O thread |
//! | `clock` | its time |

mod clock;
mod connection;
mod piece;
mod shard;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use socket2::{SockRef, TcpKeepalive};

use crate::bus::Bus;
use crate::clients::{Farewell, Slot};
use crate::descriptors::{self, Own};
use crate::error::{Error, Result};
use crate::event_id::EventId;
use crate::hub::{Hub, Outlet, Revoked};
use crate::metrics::Reason;
use crate::queue::Client;
use crate::survey::Report;
use crate::sync::{Mutex, lock};

use clock::Clock;
use connection::Connection;
use piece::Piece;
use shard::{Inbox, Item, Joining};

pub use connection::{Backlog, Backlogged};
pub use piece::{Form, Framing};
pub use shard::Shard;
#[cfg(feature = "shuttle")]
pub use shard::{Inbox as CheckedInbox, Item as CheckedItem};

/// A peer that acknowledges nothing for so long is given up by the kernel.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// Bytes that the kernel keeps for a client beyond what is under way to it.
const UNSENT: u32 = 64 << 10;

/// Another thread begins when each has so many connections: for fewer, a second one to wake costs more
/// than it saves.
const ENOUGH: usize = 1000;

/// How long the end of all streams may take, well within a server's graceful timeout.
const FAREWELL: Duration = Duration::from_secs(2);

/// The I/O threads of a process, begun at the first connection.
#[derive(Debug, Default)]
pub struct Offload {
    /// Held to begin or to end them, and to choose one.
    running: Mutex<Running>,
    /// Streams that were offloaded since the process began.
    taken: AtomicU64,
    /// Of all threads.
    clock: Clock,
}

#[derive(Debug, Default)]
struct Running {
    threads: Vec<(Arc<Inbox>, Receiver<()>)>,
    /// Set when all of it comes to its end: until then.
    deadline: Option<Instant>,
}

/// A stream to be offloaded.
#[derive(Debug)]
pub struct Handover<'a> {
    /// The stream's hub.
    pub hub: &'a Arc<Hub>,
    /// To be told when the client has left.
    pub bus: Option<Weak<dyn Bus>>,
    /// The stream, which is ended.
    pub client: &'a Arc<Client>,
    /// Where it was registered.
    pub cursor: EventId,
    /// The number of the descriptor that somebody else holds.
    pub fd: RawFd,
    /// What that number is to mean from then on, if not the connection.
    pub instead: Option<RawFd>,
    /// The head of the response.
    pub head: &'a [u8],
    /// The first frames of the body, as they are before any coding.
    pub body: &'a [u8],
    /// What the body looks like.
    pub form: Form,
    /// What may wait for it.
    pub backlog: Backlog,
    /// The heartbeat.
    pub heartbeat: Option<Duration>,
    /// The client's place in the process.
    pub slot: Option<Arc<Slot>>,
    /// I/O threads at the most.
    pub threads: usize,
}

impl Offload {
    /// One whose only thread is the caller, who has `Shard::turn` do its work and `Shard::pass` move
    /// its clock: what a test needs to have everything happen in the order that it wants.
    ///
    /// # Errors
    /// `Io` when there are no descriptors.
    pub fn by_hand() -> Result<(Offload, Shard)> {
        let clock = Clock::by_hand();
        let (inbox, ended, shard) = prepare(0, clock.clone())?;
        let running = Running { threads: vec![(inbox, ended)], deadline: None };
        Ok((Offload { running: Mutex::new(running), taken: AtomicU64::new(0), clock }, shard))
    }

    /// Hands a connection over. False: the stream has ended already, and nothing was done.
    ///
    /// # Errors
    /// `Io` when the process has no more descriptors, `Bus` when it is ending; nothing was done.
    pub fn take(&self, handover: Handover<'_>) -> Result<bool> {
        let inbox = self.choose(handover.threads)?;
        let taken = give(&inbox, handover);
        if matches!(taken, Ok(true)) {
            self.taken.fetch_add(1, Relaxed);
        } else {
            inbox.connections.fetch_sub(1, Relaxed);
        }
        // Also of none: a thread at its end has waited for it.
        inbox.ring();
        taken
    }

    /// The thread with the fewest connections, begun if it is time for it. One more is counted as its
    /// own already, so that it does not end before that has come.
    fn choose(&self, threads: usize) -> Result<Arc<Inbox>> {
        let mut running = lock(&self.running);
        if running.deadline.is_some() {
            return Err(Error::Bus("the process is ending".to_owned()));
        }
        let connections = |inbox: &Inbox| inbox.connections.load(Relaxed);
        let fewest = running.threads.iter().map(|(inbox, _)| inbox).min_by_key(|i| connections(i));
        let number = running.threads.len();
        let chosen = match fewest.cloned() {
            Some(fewest) if number >= threads || connections(&fewest) < ENOUGH => fewest,
            fewest => match begin(number, self.clock.clone()) {
                Ok((inbox, ended)) => {
                    running.threads.push((Arc::clone(&inbox), ended));
                    inbox
                }
                // Those that run serve it as well.
                Err(error) => fewest.ok_or(error)?,
            },
        };
        chosen.connections.fetch_add(1, Relaxed);
        Ok(chosen)
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        let running = lock(&self.running);
        running.threads.iter().map(|(inbox, _)| inbox.connections.load(Relaxed)).sum()
    }

    /// Streams that were offloaded since the process began.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Begins to end all connections: what waits is sent, each client is told when to come back,
    /// not all at one time, and the body is ended. Does not wait; the second time changes nothing.
    pub fn end(&self, farewell: &Arc<Farewell>) {
        let mut running = lock(&self.running);
        if running.deadline.is_some() {
            return;
        }
        let deadline = self.clock.now() + FAREWELL;
        running.deadline = Some(deadline);
        for (inbox, _) in &running.threads {
            // Refused by a thread that has ended: then there is nothing to end.
            let _ = inbox.push(Item::End { deadline, farewell: Arc::clone(farewell) });
            inbox.ring();
        }
    }

    /// Disconnects those that have no right to their stream any more.
    pub fn revoke(&self, revoked: &Arc<Revoked>) {
        for (inbox, _) in &lock(&self.running).threads {
            // Refused by a thread that has ended: then there is nothing to disconnect.
            let _ = inbox.push(Item::Revoke(Arc::clone(revoked)));
            inbox.ring();
        }
    }

    /// Has each thread add its slowest connections to `report`.
    pub fn survey(&self, report: &Arc<Report>) {
        for (inbox, _) in &lock(&self.running).threads {
            // Refused by a thread that has ended: then it has nothing to add.
            let _ = inbox.push(Item::Survey(Arc::clone(report)));
            inbox.ring();
        }
    }

    /// After the end: connections can be taken again, by threads of their own.
    pub fn begin_anew(&self) {
        let mut running = lock(&self.running);
        running.deadline = None;
        running.threads.clear();
    }

    /// Waits until all connections are ended: two seconds after `end` at the most.
    pub fn wait_for_end(&self) {
        let (threads, deadline) = {
            let running = lock(&self.running);
            let Some(deadline) = running.deadline else { return };
            let ended = running.threads.iter().map(|(_, ended)| ended.clone());
            (ended.collect::<Vec<Receiver<()>>>(), deadline)
        };
        for ended in threads {
            // Told by the end of the other side. A thread that is late is left behind.
            let _ = ended.recv_deadline(deadline + Duration::from_millis(500));
        }
    }
}

/// Gives a connection to the thread that was chosen for it.
fn give(inbox: &Arc<Inbox>, handover: Handover<'_>) -> Result<bool> {
    let socket = Own::from(descriptors::duplicate(handover.fd)?);
    set_up(&socket, handover.heartbeat.is_none());
    let heartbeat = handover
        .heartbeat
        .map_or(0, |every| u32::try_from(every.as_millis()).unwrap_or(u32::MAX).max(1));
    let mut connection =
        Connection::new(socket, handover.form, handover.backlog, heartbeat, handover.slot);
    connection.push(Arc::new(Piece::first(handover.head, handover.form, handover.body)));
    let outlet: Arc<dyn Outlet> = Arc::clone(inbox) as _;
    let bus = handover.bus;
    let mut connection = Some(connection);
    let mut late = None;
    if let Some(instead) = handover.instead {
        // First, so that there are never two who write to it.
        descriptors::replace(handover.fd, instead)?;
    }
    let is_taken = handover.hub.hand_over(
        handover.client,
        handover.cursor,
        shard::STEP,
        &outlet,
        |route, first, sequence| {
            let Some(connection) = connection.take() else { return };
            let joining = Joining { connection, route, first, sequence, bus };
            late = inbox.push(Item::Join(Box::new(joining))).err();
        },
    );
    if let Some(Item::Join(joining)) = late {
        // The thread was late with its end and did not wait for it.
        handover.hub.let_go(&joining.route, &outlet, Reason::Exit);
        joining.connection.end(false);
        inbox.connections.fetch_sub(1, Relaxed);
    } else if !is_taken && let (Some(connection), Some(_)) = (&connection, handover.instead) {
        descriptors::replace(handover.fd, connection.socket().as_raw_fd())?;
    }
    Ok(is_taken)
}

/// What an I/O thread needs: the way to it, what tells of its end, and its state.
fn prepare(number: usize, clock: Clock) -> Result<(Arc<Inbox>, Receiver<()>, Shard)> {
    if number == 0 {
        descriptors::raise_limit();
    }
    let inbox = Arc::new(Inbox::new()?);
    let (alive, ended) = bounded(0);
    let shard = Shard::new(Arc::clone(&inbox), alive, clock)?;
    Ok((inbox, ended, shard))
}

/// Begins an I/O thread. Gives the way to it, and what tells of its end.
fn begin(number: usize, clock: Clock) -> Result<(Arc<Inbox>, Receiver<()>)> {
    let (inbox, ended, shard) = prepare(number, clock)?;
    thread::Builder::new().name(format!("sse-channel-io{number}")).spawn(move || shard.run())?;
    Ok((inbox, ended))
}

/// What a connection of a stream should be like; a Unix socket has none of it.
fn set_up(socket: &Own, needs_keepalive: bool) {
    let fd = socket.as_fd();
    let socket = SockRef::from(&fd);
    // An event is to go at once, and it is one write already.
    let _ = socket.set_tcp_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    let _ = socket.set_tcp_notsent_lowat(UNSENT);
    if needs_keepalive {
        let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(UNACKNOWLEDGED));
    }
}
