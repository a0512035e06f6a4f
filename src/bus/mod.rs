//! The bus: orders, numbers and stores events, and brings them to the hub of every process.

pub mod local;
pub mod memory;
pub mod redis;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::event::Format;
use crate::event_id::EventId;
use crate::frame::Body;
use crate::history::Limits;
use crate::host::HostFigures;
use crate::hub::{ChannelKey, Hub, Resume};
use crate::process::Named;
use crate::runtime::Runtime;
use crate::ticket::Answering;

pub use local::LocalBus;
pub use memory::MemoryBus;
pub use redis::RedisBus;

/// An event on its way to the bus.
#[derive(Debug)]
pub struct Publication {
    /// The channel's name.
    pub channel: Arc<str>,
    /// Events that the channel is to remember at least.
    pub history: usize,
    /// The encoded event.
    pub body: Body,
    /// How a reader gets the message back.
    pub format: Format,
    /// Where is noted how many processes it was sent to, by a bus that knows, before it is answered.
    pub heard_by: Option<Arc<OnceLock<u64>>>,
}

/// Something the bus does at once, or has to wait for.
#[derive(Debug)]
pub enum Attempt<T> {
    /// Done, in one way or the other.
    Done(Result<EventId>),
    /// It would have to wait: given back.
    Waits(T),
}

/// Figures of the bus as this process sees it.
#[derive(Clone, Debug, Default)]
pub struct BusFigures {
    /// Seconds between the ordering of the newest event that arrived and its delivery here.
    pub lag: f64,
    /// Publishes that wait for the bus.
    pub waiting: usize,
    /// Whether the bus can be reached.
    pub connected: bool,
    /// How often a connection or a store was lost and found again.
    pub reconnects: u64,
}

/// What a process must know to take part in a bus.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `memory://`, `local://…` or `redis://…`.
    pub url: String,
    /// What all processes of a project have in common and no other project has.
    pub project: String,
    /// What bounds the history of each channel.
    pub limits: Limits,
}

impl Settings {
    /// Whether the URL names a bus.
    ///
    /// # Errors
    /// `Bus` with what is wrong with it.
    pub fn check(&self) -> Result<()> {
        self.open(&Runtime::default()).map(drop)
    }

    /// Where the processes of the project find each other's figures, if not elsewhere.
    fn default_directory(&self) -> PathBuf {
        local::directory::default_path(&self.project)
    }

    /// The bus, which touches nothing yet, and its hub. What it does later, it does on `runtime`.
    ///
    /// # Errors
    /// `Bus` with what is wrong with the URL.
    pub fn open(&self, runtime: &Runtime) -> Result<Named> {
        let (scheme, rest) = self.url.split_once("://").unwrap_or((&self.url, ""));
        match scheme {
            "memory" if self.url == "memory://" => {
                let figures = HostFigures::of(self.default_directory(), "memory");
                let hub = Arc::new(Hub::counting(self.limits, true, figures));
                Ok(Named { bus: Arc::new(MemoryBus::new(Arc::clone(&hub))), hub })
            }
            "redis" | "rediss" => {
                let shown = redis::shown(&self.url)?;
                // Of two servers, or two prefixes, the figures are not those of one bus.
                let figures = HostFigures::of(self.default_directory(), &shown);
                let hub = Arc::new(Hub::counting(self.limits, false, figures));
                let (of_bus, runtime) = (Arc::clone(&hub), runtime.clone());
                let bus = Arc::new(RedisBus::new(&self.url, self.limits, of_bus, runtime)?);
                Ok(Named { bus, hub })
            }
            "local" if rest.contains('\0') => {
                Err(Error::Bus("whose path has a NUL, which no directory's has".to_owned()))
            }
            "local" if rest.is_empty() || rest.starts_with('/') => {
                let path = (!rest.is_empty()).then_some(Path::new(rest));
                let directory = path.map_or_else(|| self.default_directory(), Path::to_owned);
                let figures = HostFigures::of(directory, "local");
                let hub = Arc::new(Hub::counting(self.limits, false, figures));
                let bus = LocalBus::new(Arc::clone(&hub), path, &self.project, self.limits);
                Ok(Named { bus, hub })
            }
            _ => Err(Error::Bus(
                "which is no bus: name memory://, local://, local:///a/directory or \
                 redis://host:port/db"
                    .to_owned(),
            )),
        }
    }
}

/// A doorbell that somebody watches, as long as this lives.
pub trait Doorbell: Send + Sync {
    /// The descriptor to watch for reading.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Silences it and delivers what is there.
    fn answer(&self);
}

/// What every bus does. It delivers to the one hub that it was made with.
///
/// None of it needs the interpreter, so that a caller who holds it can wait elsewhere.
pub trait Bus: fmt::Debug + Send + Sync {
    /// The URL without a password.
    fn url(&self) -> &str;

    /// Publishes without waiting for anything but a processor, and delivers in this process; or
    /// gives it back.
    fn try_publish(&self, publication: Publication) -> Attempt<Publication>;

    /// Publishes from a thread of the bus's own, and answers when the event is ordered and
    /// stored. Publications of one process keep their order.
    fn publish(&self, publication: Publication, answering: Answering);

    /// Brings the hub to where a client of `channels` can register and resume, or gives `()` back
    /// when that has to be waited for. Gives the newest id.
    fn try_prepare(&self, channels: &[ChannelKey], resume: Resume) -> Attempt<()>;

    /// The same from a thread of the bus's own.
    fn prepare(&self, channels: Vec<ChannelKey>, resume: Resume, answering: Answering);

    /// A client is gone: channels without any need not be heard any more.
    fn left(&self);

    /// Why a publication was not answered in time, for the one who waited.
    fn excuse(&self) -> String;

    /// Its figures.
    fn figures(&self) -> BusFigures;

    /// What rings when another process has published, for a thread that waits anyway: it then
    /// delivers itself, and is not woken by way of another thread. `None` when nothing rings now.
    fn doorbell(&self) -> Option<Box<dyn Doorbell>> {
        None
    }

    /// Before a fork: lets go of what must not be inherited, and begins nothing until `forked`.
    fn before_fork(&self) {}

    /// After a fork, in the process that goes on with it.
    fn after_fork(&self) {}

    /// Ends it: who waits gets an error, other processes are told.
    fn close(&self);
}
