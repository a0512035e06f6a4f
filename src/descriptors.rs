//! What is done to descriptors by their number: those that a forked child must close, because its
//! copy would keep a connection or a socket alive after the parent's end, and those that a server
//! in Python holds.

#![allow(unsafe_code, reason = "a number says nothing of who owns the descriptor")]

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::error::{Error, Result};

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

/// Refuses what stands for no descriptor: a closed socket of Python's has the number -1.
fn check(fd: RawFd) -> Result<()> {
    if fd < 0 { Err(rustix::io::Errno::BADF.into()) } else { Ok(()) }
}

/// A descriptor of our own for the socket that somebody else holds as `fd`.
///
/// # Errors
/// `Io` for a number that is none, or when the process has no more.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    check(fd)?;
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
    check(fd)?;
    check(by)?;
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
    if check(epoll).and(check(fd)).is_err() {
        return;
    }
    // SAFETY: as in `duplicate`; the kernel refuses a number that is no epoll set.
    let (epoll, fd) = unsafe { (BorrowedFd::borrow_raw(epoll), BorrowedFd::borrow_raw(fd)) };
    // It is in there only if its owner ever waited for it.
    let _ = rustix::event::epoll::delete(epoll, fd);
}

/// Elsewhere loops forget a descriptor by its number.
#[cfg(not(target_os = "linux"))]
pub fn unwatch(_: RawFd, _: RawFd) {}

/// The first `bytes` of a file as memory that other processes see at once; it stays for the life of the
/// process. What is touched must have been written to the file before: where a full file system has
/// no room for it, a touch is a fatal signal.
///
/// # Errors
/// `Io` when there is no room in the address space, `Bus` for a length that is none.
pub fn map_shared(file: &OwnedFd, bytes: usize) -> Result<&'static [AtomicU64]> {
    if bytes == 0 || !bytes.is_multiple_of(size_of::<AtomicU64>()) {
        return Err(Error::Bus(format!("{bytes} bytes of a file cannot be mapped")));
    }
    // SAFETY: at a place of the kernel's choice, so that nothing that is there is replaced.
    let start = unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0)
    }?;
    // SAFETY: mapped for reading and writing, never unmapped, aligned to a page. Any bits are a u64,
    // and whoever else writes to it does so by atomics.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), bytes / size_of::<AtomicU64>()) })
}

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

impl Own {
    /// The descriptor.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.fd
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_descriptor_is_refused() -> Result<()> {
        let file = OwnedFd::from(std::fs::File::open("/dev/null")?);
        assert!(duplicate(-1).is_err() && duplicate(RawFd::MAX).is_err());
        assert!(replace(-1, file.as_raw_fd()).is_err() && replace(file.as_raw_fd(), -1).is_err());
        unwatch(-1, file.as_raw_fd());
        unwatch(file.as_raw_fd(), -1);
        assert!(duplicate(file.as_raw_fd()).is_ok());
        Ok(())
    }

    #[test]
    fn a_mapping_is_the_file() -> Result<()> {
        let path = std::env::temp_dir().join(format!("sse-map-{}", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let file = OwnedFd::from(file);
        rustix::io::pwrite(&file, &[0; 4096], 0)?;
        let (one, other) = (map_shared(&file, 4096)?, map_shared(&file, 4096)?);
        one[511].fetch_add(258, SeqCst);
        assert_eq!((one.len(), other[511].load(SeqCst)), (512, 258));
        let mut last = [0; 8];
        rustix::io::pread(&file, &mut last, 511 * 8)?;
        assert_eq!(u64::from_ne_bytes(last), 258);
        assert!(map_shared(&file, 0).is_err() && map_shared(&file, 9).is_err());
        Ok(())
    }
}
