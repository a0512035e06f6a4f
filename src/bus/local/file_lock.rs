//! The lock that queues the writers of all processes.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::TryLockError;

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, fstat, lstat, open};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, fcntl_getlk};

use crate::descriptors::Inherited;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard, lock};

/// A file to lock. A lock of `fcntl` belongs to the process: a forked child does not have it, and
/// a process that is killed gives it back. It must be opened here alone: closing any descriptor of
/// the file gives the lock back.
#[derive(Debug)]
pub struct FileLock {
    /// Queues the threads of this process, among whom the file excludes nobody.
    turn: Mutex<()>,
    // Before the descriptor: fields are dropped in this order.
    _closed_in_children: Inherited,
    file: OwnedFd,
    path: PathBuf,
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub struct Locked<'a> {
    file_lock: &'a FileLock,
    _turn: MutexGuard<'a, ()>,
}

impl FileLock {
    /// Opens the file in `directory`.
    ///
    /// # Errors
    /// `Bus` when it cannot be made.
    pub fn open(directory: &Path) -> Result<FileLock> {
        let path = directory.join("lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| {
            let reason = std::io::Error::from(errno);
            Error::Bus(format!(
                "the lock {} cannot be opened: {reason}; make room, or name another directory: \
                 BUS = \"local:///a/directory\"",
                path.display()
            ))
        })?;
        let closed_in_children = Inherited::new(file.as_raw_fd());
        Ok(FileLock { turn: Mutex::new(()), _closed_in_children: closed_in_children, file, path })
    }

    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// `Io` when the file system has no locks.
    pub fn try_lock(&self) -> Result<Option<Locked<'_>>> {
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        match fcntl_lock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Locked { file_lock: self, _turn: turn })),
            Err(Errno::ACCESS | Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// `Io` when the file system has no locks.
    pub fn lock(&self) -> Result<Locked<'_>> {
        let turn = lock(&self.turn);
        loop {
            match fcntl_lock(&self.file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Locked { file_lock: self, _turn: turn }),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the others lock the same file.
    pub fn is_current(&self) -> bool {
        let (Ok(own), Ok(others)) = (fstat(&self.file), lstat(&self.path)) else { return false };
        (own.st_dev, own.st_ino) == (others.st_dev, others.st_ino)
    }

    /// Who has the lock, in words.
    pub fn holder(&self) -> String {
        let path = self.path.display();
        match fcntl_getlk(&self.file, &Flock::from(FlockType::WriteLock)) {
            Ok(Some(Flock { pid: Some(pid), .. })) => {
                format!("the process {} holds the lock {path}", pid.as_raw_nonzero())
            }
            _ => format!("no other process holds the lock {path}"),
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Our own lock on our own descriptor: nothing can fail that could be mended here.
        let _ = fcntl_lock(&self.file_lock.file, FlockOperation::Unlock);
    }
}
