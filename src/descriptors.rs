//! What is done to descriptors by their number: those that a forked child must close, because its
//! copy would keep a connection or a socket alive after the parent's end, and those that a server
//! in Python holds.

#![allow(unsafe_code, reason = "a number says nothing of who owns the descriptor")]

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use crate::error::Result;

/// One bit a descriptor. No lock, which a lost thread could hold in the child.
static MARKED: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];

const BITS: usize = u64::BITS as usize;

/// Room for a million descriptors: what systems allow a process at the most by default. Memory that
/// no descriptor touches is not there.
const WORDS: usize = (1 << 20) / BITS;

/// Duplicates get numbers from here on, where there are so many: low ones are left to the
/// application, in which `select()` may know no others.
const LEAST: RawFd = 1024;

/// Marks a descriptor, as long as this lives, to be closed in forked children. It must be dropped
/// before the descriptor is closed.
#[derive(Debug)]
pub struct Inherited(RawFd);

impl Inherited {
    /// Marks `fd`. Of one beyond all places a child keeps its copy.
    pub fn new(fd: RawFd) -> Inherited {
        if let Some((word, bit)) = place(fd) {
            word.fetch_or(bit, SeqCst);
        }
        Inherited(fd)
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        if let Some((word, bit)) = place(self.0) {
            word.fetch_and(!bit, SeqCst);
        }
    }
}

fn place(fd: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok()?;
    MARKED.get(fd / BITS).map(|word| (word, 1 << (fd % BITS)))
}

/// Closes them; to be called in a forked child before anything opens a descriptor.
pub fn close_inherited() {
    for (at, word) in MARKED.iter().enumerate() {
        // A look first: a write would give the child memory of its own.
        let mut bits = if word.load(SeqCst) == 0 { 0 } else { word.swap(0, SeqCst) };
        while bits != 0 {
            let fd = at * BITS + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if let Ok(fd) = RawFd::try_from(fd) {
                // SAFETY: the descriptor belongs to an object of the parent, which the child never
                // touches again, so that nothing else closes or uses the number in this process.
                unsafe { rustix::io::close(fd) };
            }
        }
    }
}

/// A descriptor of our own for the socket that somebody else holds as `fd`.
///
/// # Errors
/// `Io` for a number that is none, or when the process has no more.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: borrowed for this call alone. The caller holds it, and the kernel refuses a number
    // that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let high = fcntl_dupfd_cloexec(borrowed, LEAST);
    Ok(high.or_else(|_| fcntl_dupfd_cloexec(borrowed, 0))?)
}

/// Has the number `fd`, which somebody else holds, mean what `by` means from now on.
///
/// # Errors
/// `Io` for a number that is none.
pub fn replace(fd: RawFd, by: RawFd) -> Result<()> {
    // SAFETY: as in `duplicate`. The number stays its holder's, who closes it as before: it is not
    // dropped here.
    let (by, mut held) =
        unsafe { (BorrowedFd::borrow_raw(by), ManuallyDrop::new(OwnedFd::from_raw_fd(fd))) };
    rustix::io::dup2(by, &mut held)?;
    Ok(fcntl_setfd(&*held, FdFlags::CLOEXEC)?)
}

/// Takes `fd` out of the epoll set that somebody else holds as `epoll`, if it is in there.
///
/// An entry belongs to the open socket, not to the number: as long as a duplicate lives the set goes
/// on to report it, under a number that means something else by then.
#[cfg(target_os = "linux")]
pub fn unwatch(epoll: RawFd, fd: RawFd) {
    // SAFETY: as in `duplicate`; the kernel refuses a number that is no epoll set.
    let (epoll, fd) = unsafe { (BorrowedFd::borrow_raw(epoll), BorrowedFd::borrow_raw(fd)) };
    // It is in there only if its owner ever waited for it.
    let _ = rustix::event::epoll::delete(epoll, fd);
}

/// Elsewhere loops forget a descriptor by its number.
#[cfg(not(target_os = "linux"))]
pub fn unwatch(_: RawFd, _: RawFd) {}

/// A descriptor that forked children close, and that is closed with this.
#[derive(Debug)]
pub struct Own {
    // Before the descriptor: fields are dropped in this order.
    _inherited: Inherited,
    fd: OwnedFd,
}

impl From<OwnedFd> for Own {
    fn from(fd: OwnedFd) -> Own {
        Own { _inherited: Inherited::new(fd.as_raw_fd()), fd }
    }
}

impl AsFd for Own {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Own {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Raises this process's soft limit of descriptors to its hard one. Gives the limit in force.
pub fn raise_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let in_force =
        if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    in_force.unwrap_or(u64::MAX)
}
