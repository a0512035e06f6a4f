//! The doorbell: how a publisher tells other processes that there is something to read.
//!
//! A process that has clients binds one datagram socket in the store's directory. A ring is one
//! byte; what it means is in the store, so a lost one costs nothing once another follows, and a
//! full socket is rung already.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::inherited::Inherited;

/// Tells the bells of one process apart: a new one must never have the name of one that is gone.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// This process's bell. Its file goes with it.
#[derive(Debug)]
pub struct Bell {
    name: String,
    path: PathBuf,
    // Before the descriptors: fields are dropped in this order.
    _closed_in_children: [Option<Inherited>; 2],
    socket: UnixDatagram,
    /// Tells that something in the directory was deleted; `None` where it cannot be watched.
    deletions: Option<OwnedFd>,
}

/// Why a wait for the bell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Somebody rang.
    Bell,
    /// A file of the directory, or the directory, is gone.
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
        let name = format!("bell-{pid}-{}", COUNT.fetch_add(1, Relaxed));
        let path = directory.join(&name);
        // Left by a process that had this number before and was killed.
        let _ = std::fs::remove_file(&path);
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
        let closed_in_children = [
            Some(Inherited::new(socket.as_raw_fd())),
            deletions.as_ref().map(|watch| Inherited::new(watch.as_raw_fd())),
        ];
        Ok(Bell { name, path, _closed_in_children: closed_in_children, socket, deletions })
    }

    /// Its name in the directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until somebody rings, for ever without a `timeout`, and silences it.
    pub fn wait(&self, timeout: Option<Duration>) -> Rung {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut watched = vec![PollFd::new(&self.socket, PollFlags::IN)];
        if let Some(deletions) = &self.deletions {
            watched.push(PollFd::from_borrowed_fd(deletions.as_fd(), PollFlags::IN));
        }
        match poll(&mut watched, timeout.as_ref()) {
            Ok(0) => return Rung::Nothing,
            Ok(_) | Err(Errno::INTR) => {}
            // Nothing can be waited for: not to spin is all that is left.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
        let is_deletion = watched.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let mut buffer = [0; 16];
        while self.socket.recv(&mut buffer).is_ok() {}
        if is_deletion {
            let mut events = [0; 4096];
            if let Some(deletions) = &self.deletions {
                while rustix::io::read(deletions, &mut events).is_ok_and(|count| count > 0) {}
            }
            return Rung::Deletion;
        }
        Rung::Bell
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
    directory: PathBuf,
}

impl Ringer {
    /// Rings bells of `directory`.
    ///
    /// # Errors
    /// `Io` when the machine gives no socket.
    pub fn new(directory: &Path) -> Result<Ringer> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Ringer { socket, directory: directory.to_owned() })
    }

    /// Rings one; false when nobody hears it any more.
    pub fn ring(&self, name: &str) -> bool {
        // A name out of the store must not lead elsewhere.
        if !name.starts_with("bell-") || name.contains('/') {
            return false;
        }
        let path = self.directory.join(name);
        loop {
            match self.socket.send_to(&[1], &path) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionRefused | ErrorKind::NotFound
                    ) =>
                {
                    // Its process was killed: the file is all that is left.
                    let _ = std::fs::remove_file(&path);
                    return false;
                }
                // Sent, or full: then it is rung already.
                _ => return true,
            }
        }
    }
}
