//! `redis://`: any number of hosts. Redis orders, numbers, stores and announces; each process has
//! one connection, and an engine on the runtime that does all that waits.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `target` | the URL, and the keys of a channel |
//! | `script` | what runs inside Redis |
//! | `entry` | events as Redis gives them |
//! | `trouble` | what goes wrong, in words that help |
//! | `lookup` | where its name leads to |
//! | `socket`, `connection` | one connection |
//! | `engine` | publishing, hearing, and finding back after a loss |

mod connection;
mod engine;
pub mod entry;
mod lookup;
mod script;
mod socket;
mod target;
mod trouble;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::bus::redis::engine::Engine;
use crate::bus::redis::target::Target;
use crate::bus::{Attempt, Bus, BusFigures, Publication};
use crate::error::{Error, Result};
use crate::history::Limits;
use crate::hub::{ChannelKey, Hub, Resume};
use crate::runtime::Runtime;
use crate::sync::{Mutex, lock};
use crate::ticket::Answering;
use crate::wake::WakeBatch;

/// Publications that wait for Redis, at the most: what comes then is refused at once.
const MOST_WAITING: usize = 10_000;
/// And their bytes.
const MOST_WAITING_BYTES: usize = 64 << 20;

/// The bus of many hosts.
#[derive(Debug)]
pub struct RedisBus {
    shared: Arc<Shared>,
    runtime: Runtime,
}

/// What the callers and the engine share.
#[derive(Debug)]
struct Shared {
    target: Target,
    limits: Limits,
    hub: Arc<Hub>,
    /// Held to put something in or to take it out. Taken before a ticket's lock.
    inbox: Mutex<Inbox>,
    /// Told when there is something in the inbox.
    work: Notify,
    /// Publications that Redis was given and that have no answer yet.
    under_way: AtomicUsize,
    /// Held for a look or a change.
    status: Mutex<Status>,
}

#[derive(Debug, Default)]
struct Inbox {
    publications: VecDeque<Waiting>,
    bytes: usize,
    prepares: Vec<Prepare>,
    /// A client left.
    left: bool,
    engine: Running,
}

#[derive(Debug, Default)]
enum Running {
    #[default]
    NotYet,
    Yes(AbortHandle),
    Over,
}

/// A publication that Redis was not given yet.
#[derive(Debug)]
struct Waiting {
    publication: Publication,
    answering: Answering,
}

impl Waiting {
    fn weight(&self) -> usize {
        let body = &self.publication.body;
        body.frame().len() + body.beside().map_or(0, <[u8]>::len) + size_of::<Waiting>()
    }
}

/// Somebody who wants to register clients.
#[derive(Debug)]
struct Prepare {
    channels: Vec<ChannelKey>,
    resume: Resume,
    answering: Answering,
    /// Whether Redis was asked how far the channels are.
    asked: bool,
}

#[derive(Debug)]
struct Status {
    connected: bool,
    /// Since when it is or is not.
    since: Instant,
    problem: String,
    reconnects: u64,
    lag: f64,
}

impl Inbox {
    fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.publications.pop_front()?;
        self.bytes -= waiting.weight();
        Some(waiting)
    }

    /// Lets go of what nobody waits for any more.
    fn sweep(&mut self) {
        self.publications.retain(|waiting| !waiting.answering.is_withdrawn());
        self.bytes = self.publications.iter().map(Waiting::weight).sum();
        self.prepares.retain(|prepare| !prepare.answering.is_withdrawn());
    }

    fn is_full(&self, weight: usize) -> bool {
        self.publications.len() >= MOST_WAITING || self.bytes + weight > MOST_WAITING_BYTES
    }
}

impl Shared {
    fn excuse(&self) -> String {
        let status = lock(&self.status);
        let place = self.target.place();
        let seconds = status.since.elapsed().as_secs();
        if status.connected {
            return format!("Redis at {place} is connected and slow to answer");
        }
        match status.problem.as_str() {
            "" => format!("Redis at {place} has not answered yet"),
            problem => {
                format!("Redis at {place} cannot be reached since {seconds} s: {problem}")
            }
        }
    }
}

impl RedisBus {
    /// The bus at `url`, for a hub that is not the bus itself. It connects at its first use, on
    /// `runtime`.
    ///
    /// # Errors
    /// `Bus` with what is wrong with the URL, as the end of a sentence about it.
    pub fn new(url: &str, limits: Limits, hub: Arc<Hub>, runtime: Runtime) -> Result<RedisBus> {
        let shared = Shared {
            target: Target::parse(url)?,
            limits,
            hub,
            inbox: Mutex::default(),
            work: Notify::new(),
            under_way: AtomicUsize::new(0),
            status: Mutex::new(Status {
                connected: false,
                since: Instant::now(),
                problem: String::new(),
                reconnects: 0,
                lag: 0.0,
            }),
        };
        Ok(RedisBus { shared: Arc::new(shared), runtime })
    }

    /// Puts something into the inbox of an engine that runs.
    fn hand_over(&self, put: impl FnOnce(&mut Inbox) -> Result<()>) -> Result<()> {
        let mut inbox = lock(&self.shared.inbox);
        match inbox.engine {
            Running::Yes(ref task) if !task.is_finished() => {}
            Running::Over => return Err(Error::Bus("the bus was closed".to_owned())),
            Running::NotYet | Running::Yes(_) => {
                lock(&self.shared.status).since = Instant::now();
                let engine = Engine::new(Arc::clone(&self.shared));
                let task = self.runtime.handle()?.spawn(engine.run());
                inbox.engine = Running::Yes(task.abort_handle());
            }
        }
        put(&mut inbox)?;
        drop(inbox);
        self.shared.work.notify_one();
        Ok(())
    }
}

/// The URL without a password.
///
/// # Errors
/// `Bus` with what is wrong with it, as the end of a sentence about it.
pub fn shown(url: &str) -> Result<String> {
    Ok(Target::parse(url)?.shown)
}

fn refuse(answering: Answering, error: Error) {
    let mut wakes = WakeBatch::default();
    answering.answer(Err(error), &mut wakes);
    wakes.flush();
}

impl Bus for RedisBus {
    fn url(&self) -> &str {
        &self.shared.target.shown
    }

    fn try_publish(&self, publication: Publication) -> Attempt<Publication> {
        Attempt::Waits(publication)
    }

    fn publish(&self, publication: Publication, answering: Answering) {
        let mut waiting = Some(Waiting { publication, answering });
        let handed = self.hand_over(|inbox| {
            let weight = waiting.as_ref().map_or(0, Waiting::weight);
            if inbox.is_full(weight) {
                inbox.sweep();
            }
            if inbox.is_full(weight) {
                let count = inbox.publications.len();
                let excuse = self.shared.excuse();
                return Err(Error::Bus(format!(
                    "not sent: {count} publishes wait for the bus already; {excuse}"
                )));
            }
            inbox.bytes += weight;
            inbox.publications.extend(waiting.take());
            Ok(())
        });
        if let (Err(error), Some(waiting)) = (handed, waiting) {
            refuse(waiting.answering, error);
        }
    }

    fn try_prepare(&self, channels: &[ChannelKey], resume: Resume) -> Attempt<()> {
        let hub = &self.shared.hub;
        if hub.lack(channels, resume).is_nothing() {
            return Attempt::Done(Ok(hub.newest()));
        }
        Attempt::Waits(())
    }

    fn prepare(&self, channels: Vec<ChannelKey>, resume: Resume, answering: Answering) {
        let mut prepare = Some(Prepare { channels, resume, answering, asked: false });
        let handed = self.hand_over(|inbox| {
            inbox.prepares.extend(prepare.take());
            Ok(())
        });
        if let (Err(error), Some(prepare)) = (handed, prepare) {
            refuse(prepare.answering, error);
        }
    }

    fn left(&self) {
        let mut inbox = lock(&self.shared.inbox);
        if matches!(inbox.engine, Running::Yes(_)) && !inbox.left {
            inbox.left = true;
            drop(inbox);
            self.shared.work.notify_one();
        }
    }

    fn excuse(&self) -> String {
        self.shared.excuse()
    }

    fn figures(&self) -> BusFigures {
        let waiting = lock(&self.shared.inbox).publications.len();
        let waiting = waiting + self.shared.under_way.load(Relaxed);
        let status = lock(&self.shared.status);
        BusFigures {
            lag: status.lag,
            waiting,
            connected: status.connected,
            reconnects: status.reconnects,
        }
    }

    fn close(&self) {
        let mut inbox = lock(&self.shared.inbox);
        if let Running::Yes(task) = std::mem::replace(&mut inbox.engine, Running::Over) {
            // What it holds is answered when it is dropped.
            task.abort();
        }
        let left = (std::mem::take(&mut inbox.publications), std::mem::take(&mut inbox.prepares));
        inbox.bytes = 0;
        drop(inbox);
        drop(left);
        lock(&self.shared.status).connected = false;
    }
}
