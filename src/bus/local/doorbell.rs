//! The doorbell: how a publisher tells other processes that there is something to read.
//!
//! A process that has clients binds one datagram socket in the store's directory. A ring brings
//! the event and the place of the one before it, so that a process that knows that one need not
//! look into the store. Whatever does not fit (a ring that was lost in a full socket, a large
//! event, rings that two threads took) is read from the store: a ring says no more than that.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::bus::Publication;
use crate::bus::local::store::Position;
use crate::descriptors::Inherited;
use crate::error::{Error, Result};
use crate::event::Format;
use crate::frame::Body;
use crate::hub::Arrival;
use crate::sync::{Mutex, lock};
use crate::wake::Wakeups;

/// Tells the bells of one process apart: a new one must never have the name of one that is gone.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// The largest ring in bytes; a larger event is read from the store. Small, since memory that was not
/// touched for a while is slow, and a reader provides all of it.
const LARGEST_RING: usize = 4 << 10;

/// What comes before the texts of a ring: its version, flags, two lengths and two places.
const HEAD: usize = 22;

/// The layout of a ring.
const VERSION: u8 = 1;

/// This process's bell. Its file goes with it.
#[derive(Debug)]
pub struct Bell {
    name: String,
    path: PathBuf,
    /// Something could not be read, or was deleted: its own thread must mend that, and nobody else
    /// watches it meanwhile.
    must_mend: AtomicBool,
    /// Held for a look or a change.
    watch: Mutex<Watch>,
    // Before the descriptors, the nudge's too: fields are dropped in this order.
    _closed_in_children: [Option<Inherited>; 3],
    /// Wakes its own thread, whether that watches the socket or not.
    nudge: Wakeups,
    socket: UnixDatagram,
    /// Tells that something in the directory was deleted; `None` where it cannot be watched.
    deletions: Option<OwnedFd>,
}

/// Who hears a bell.
#[derive(Debug, Default)]
struct Watch {
    /// Threads beside its own that watch it, and deliver when it rings.
    watchers: usize,
    /// Its own thread leaves it to them: a ring wakes those alone.
    is_left_to_them: bool,
}

/// Why a wait for the bell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Somebody rang.
    Bell,
    /// Who watched it beside its own thread has gone.
    Unwatched,
    /// A file of the directory, or the directory, is gone; or something must be mended.
    Deletion,
    /// Nothing, for the whole time.
    Nothing,
}

impl Bell {
    /// Binds a bell in `directory`.
    ///
    /// # Errors
    /// `Bus` when the socket cannot be made.
    pub fn new(directory: &Path) -> Result<Bell> {
        let pid = std::process::id();
        // Not by the process's number alone: containers that share a directory share numbers.
        let random = RandomState::new().build_hasher().finish() & 0xff_ffff;
        let name = format!("bell-{pid}-{}-{random:06x}", COUNT.fetch_add(1, Relaxed));
        let path = directory.join(&name);
        let bound = UnixDatagram::bind(&path).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        let socket = bound.map_err(|error| {
            Error::Bus(format!(
                "the doorbell {} cannot be made: {error}; name another directory: BUS = \
                 \"local:///a/directory\"",
                path.display()
            ))
        })?;
        let deletions = watch_deletions(directory);
        let nudge = Wakeups::new()?;
        let closed_in_children = [
            Some(Inherited::new(socket.as_raw_fd())),
            Some(Inherited::new(nudge.fd().as_raw_fd())),
            deletions.as_ref().map(|watch| Inherited::new(watch.as_raw_fd())),
        ];
        Ok(Bell {
            must_mend: AtomicBool::new(false),
            name,
            path,
            watch: Mutex::default(),
            nudge,
            _closed_in_children: closed_in_children,
            socket,
            deletions,
        })
    }

    /// Its name in the directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether others can still ring it.
    pub fn is_reachable(&self) -> bool {
        self.path.symlink_metadata().is_ok()
    }

    /// Wakes who waits, now and at every later wait: another bell has taken its place.
    pub fn end(&self) {
        // Whether it is reachable by its name or not.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.nudge();
    }

    /// Has its own thread mend what is wrong.
    pub fn call_for_mending(&self) {
        self.must_mend.store(true, Relaxed);
        self.nudge();
    }

    /// Wakes its own thread.
    pub fn nudge(&self) {
        self.nudge.ring();
    }

    /// Counts a watcher in, unless something must be mended first: gives whether it did.
    pub fn begin_watching(&self) -> bool {
        if self.must_mend.load(Relaxed) {
            return false;
        }
        lock(&self.watch).watchers += 1;
        true
    }

    /// Whether somebody beside its own thread watches it.
    pub fn is_watched(&self) -> bool {
        lock(&self.watch).watchers > 0
    }

    /// Counts a watcher out. Its own thread hears it again after the last.
    pub fn end_watching(&self) {
        let must_take_over = {
            let mut watch = lock(&self.watch);
            watch.watchers -= 1;
            watch.watchers == 0 && std::mem::take(&mut watch.is_left_to_them)
        };
        if must_take_over {
            self.nudge();
        }
    }

    /// The descriptor that is readable once somebody rang.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the rings that are there, in their order.
    pub fn take(&self) -> Vec<Ring> {
        let mut rings = Vec::new();
        let mut buffer = [0; LARGEST_RING];
        // Nothing more comes out of one that was ended.
        while let Ok(count) = self.socket.recv(&mut buffer)
            && count > 0
        {
            rings.push(Ring::parse(&buffer[..count]));
        }
        rings
    }

    /// Waits until somebody rings whom nobody else hears, for ever without a `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> Rung {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let is_left_to_others = {
            let mut watch = lock(&self.watch);
            watch.is_left_to_them = watch.watchers > 0;
            watch.is_left_to_them
        };
        let nudge = self.nudge.fd();
        let mut watched = vec![PollFd::new(&nudge, PollFlags::IN)];
        if let Some(deletions) = &self.deletions {
            watched.push(PollFd::from_borrowed_fd(deletions.as_fd(), PollFlags::IN));
        }
        if !is_left_to_others {
            watched.push(PollFd::new(&self.socket, PollFlags::IN));
        }
        match poll(&mut watched, timeout.as_ref()) {
            Ok(0) => return Rung::Nothing,
            Ok(_) | Err(Errno::INTR) => {}
            // Nothing can be waited for: not to spin is all that is left.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
        if !watched[0].revents().is_empty() {
            self.nudge.take();
        }
        let is_deleted = self.deletions.is_some() && !watched[1].revents().is_empty();
        if is_deleted {
            self.forget_deletions();
        }
        // Taken after the nudge that it came with.
        if self.must_mend.swap(false, Relaxed) || is_deleted {
            Rung::Deletion
        } else if is_left_to_others {
            Rung::Unwatched
        } else {
            Rung::Bell
        }
    }

    fn forget_deletions(&self) {
        let mut events = [0; 4096];
        if let Some(deletions) = &self.deletions {
            while rustix::io::read(deletions, &mut events).is_ok_and(|count| count > 0) {}
        }
    }
}

/// What a ring says.
#[derive(Debug)]
pub enum Ring {
    /// An event, and the place of the one before it.
    Event {
        /// The newest place before it.
        before: Position,
        /// Its place.
        position: Position,
        /// The event.
        arrival: Arrival,
    },
    /// There is something in the store.
    Look,
}

impl Ring {
    /// The bytes of a ring for an event; those of `Look` for one that is too large.
    pub fn bytes(before: Position, position: Position, publication: &Publication) -> Vec<u8> {
        let Publication { channel, body, format, .. } = publication;
        let (frame, beside) = (body.frame(), body.beside());
        let sizes = [channel.len(), frame.len(), beside.map_or(0, <[u8]>::len)];
        if sizes.iter().sum::<usize>() + HEAD > LARGEST_RING {
            return Ring::look();
        }
        let mut bytes = Vec::with_capacity(HEAD + sizes.iter().sum::<usize>());
        bytes.push(VERSION);
        bytes.push(
            u8::from(*format == Format::Json)
                | u8::from(body.has_data()) << 1
                | u8::from(beside.is_some()) << 2,
        );
        // All below LARGEST_RING.
        bytes.extend((sizes[0] as u16).to_ne_bytes());
        bytes.extend((sizes[1] as u16).to_ne_bytes());
        bytes.extend(before.to_bytes());
        bytes.extend(position.to_bytes());
        bytes.extend(channel.as_bytes());
        bytes.extend(frame);
        bytes.extend(beside.unwrap_or_default());
        bytes
    }

    /// The bytes of `Look`.
    pub fn look() -> Vec<u8> {
        vec![0]
    }

    /// `Look` for whatever `bytes` did not make.
    fn parse(bytes: &[u8]) -> Ring {
        Ring::parse_event(bytes).unwrap_or(Ring::Look)
    }

    fn parse_event(bytes: &[u8]) -> Option<Ring> {
        let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
        let [version, flags, c0, c1, f0, f1, places @ ..] = *head;
        if version != VERSION {
            return None;
        }
        let (before, position) = places.split_first_chunk::<8>()?;
        let before = Position::from_bytes(*before);
        let position = Position::from_bytes(*position.first_chunk::<8>()?);
        let (channel, rest) = rest.split_at_checked(u16::from_ne_bytes([c0, c1]).into())?;
        let (frame, beside) = rest.split_at_checked(u16::from_ne_bytes([f0, f1]).into())?;
        let beside = (flags & 4 != 0).then_some(beside);
        let body = Body::restore(frame, beside, flags & 2 != 0)?;
        let format = if flags & 1 != 0 { Format::Json } else { Format::Text };
        let channel: Arc<str> = std::str::from_utf8(channel).ok()?.into();
        let arrival = Arrival { channel, id: position.into(), body, format };
        Some(Ring::Event { before, position, arrival })
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // It may be gone with its directory.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(target_os = "linux")]
fn watch_deletions(directory: &Path) -> Option<OwnedFd> {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let deletions = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok()?;
    let of_a_file = WatchFlags::DELETE | WatchFlags::MOVED_FROM;
    let of_all = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
    add_watch(&deletions, directory, of_a_file | of_all | WatchFlags::ONLYDIR).ok()?;
    Some(deletions)
}

/// Elsewhere a lost store is noticed at the next publish.
#[cfg(not(target_os = "linux"))]
fn watch_deletions(_: &Path) -> Option<OwnedFd> {
    None
}

/// Rings other processes' bells.
#[derive(Debug)]
pub struct Ringer {
    socket: UnixDatagram,
    /// For the bells that `socket` has no room for.
    spare: UnixDatagram,
    directory: PathBuf,
}

/// What became of a ring.
enum Sent {
    Whole,
    /// The kernel takes no more: from this socket, or for that bell.
    Full,
    /// Nobody hears it any more.
    Dead,
}

impl Ringer {
    /// Rings bells of `directory`.
    ///
    /// # Errors
    /// `Io` when the machine gives no socket.
    pub fn new(directory: &Path) -> Result<Ringer> {
        let (socket, spare) = (sender()?, sender()?);
        Ok(Ringer { socket, spare, directory: directory.to_owned() })
    }

    /// Rings one with the bytes of a `Ring`; false when nobody hears it any more.
    pub fn ring(&mut self, name: &str, ring: &[u8]) -> bool {
        // A name out of the store must not lead elsewhere.
        if !name.starts_with("bell-") || name.contains('/') {
            return false;
        }
        let path = self.directory.join(name);
        let sent = match send(&self.socket, ring, &path) {
            // What other bells have not taken counts against the socket that sent it, so that this
            // one may have room, and nothing in it.
            Sent::Full => self.say_look(&path),
            sent => sent,
        };
        if matches!(sent, Sent::Dead) {
            // Its process was killed: the file is all that is left.
            let _ = std::fs::remove_file(&path);
            return false;
        }
        // Still full: then it is rung already.
        true
    }

    fn say_look(&mut self, path: &Path) -> Sent {
        let look = Ring::look();
        match send(&self.spare, &look, path) {
            Sent::Full => match sender() {
                // Nothing counts against this one.
                Ok(fresh) => {
                    self.spare = fresh;
                    send(&self.spare, &look, path)
                }
                Err(_) => Sent::Full,
            },
            sent => sent,
        }
    }
}

fn sender() -> Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn send(socket: &UnixDatagram, ring: &[u8], path: &Path) -> Sent {
    loop {
        match socket.send_to(ring, path) {
            Ok(_) => return Sent::Whole,
            Err(error) => match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::ConnectionRefused | ErrorKind::NotFound => return Sent::Dead,
                _ => return Sent::Full,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Fields;

    fn publication(data: &str) -> Publication {
        let fields = Fields { data: Some(data), ..Fields::default() };
        let Ok(body) = Body::encode(&fields, 1 << 20) else { unreachable!("{data:?} is valid") };
        let channel = "news".into();
        Publication { channel, history: 1, body, format: Format::Json, heard_by: None }
    }

    #[test]
    fn a_ring_brings_the_event() {
        let (before, place) = (Position::at(1), Position::at(2));
        for data in ["one line", "two\r\nlines", ""] {
            let bytes = Ring::bytes(before, place, &publication(data));
            let Ring::Event { before: b, position, arrival } = Ring::parse(&bytes) else {
                unreachable!("{data:?} fits")
            };
            assert_eq!((b, position, &*arrival.channel), (before, place, "news"));
            assert_eq!(arrival.body.seal(None), publication(data).body.seal(None));
        }
        let large = Ring::bytes(before, place, &publication(&"x".repeat(LARGEST_RING)));
        assert!(matches!(Ring::parse(&large), Ring::Look));
    }

    #[test]
    fn a_bell_is_rung_whatever_others_have_not_taken() -> Result<()> {
        let random = RandomState::new().build_hasher().finish();
        let directory = std::env::temp_dir().join(format!("sse-bells-{random:x}"));
        std::fs::create_dir(&directory)?;
        let mut ringer = Ringer::new(&directory)?;
        let bells: Vec<Bell> = (0..40).map(|_| Bell::new(&directory)).collect::<Result<_>>()?;
        let ring = vec![VERSION; LARGEST_RING];
        let [sleeping @ .., awake] = bells.as_slice() else { unreachable!("there are forty") };
        // More than the kernel keeps of one sender (some 200 KB), and than one bell has room for.
        for bell in sleeping {
            (0..30).for_each(|_| assert!(ringer.ring(bell.name(), &ring)));
        }
        assert!(ringer.ring(awake.name(), &ring));
        assert!(matches!(awake.take().as_slice(), [Ring::Look]));
        assert!(sleeping.iter().all(|bell| bell.take().len() > 1), "who was full looks");
        drop(bells);
        std::fs::remove_dir(&directory)?;
        assert!(!ringer.ring("bell-1", &ring), "nobody hears it");
        Ok(())
    }

    #[test]
    fn any_other_bytes_say_look() {
        let whole = Ring::bytes(Position::at(1), Position::at(2), &publication("text"));
        for end in 0..whole.len() {
            assert!(matches!(Ring::parse(&whole[..end]), Ring::Look), "{end}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            // Whatever it says, it is parsed without a panic.
            let _ = Ring::parse(&changed);
        }
    }
}
