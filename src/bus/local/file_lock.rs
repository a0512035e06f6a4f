//! The lock that queues the writers of all processes.

use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, open};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, fcntl_getlk};

use crate::error::{Error, Result};

/// A file to lock. A lock of `fcntl` belongs to the process: a forked child does not have it, and
/// a process that is killed gives it back. Within the process something else must exclude threads,
/// and the file must be opened here alone: closing any descriptor of it gives the lock back.
#[derive(Debug)]
pub struct FileLock {
    file: OwnedFd,
    path: PathBuf,
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub struct Locked<'a>(&'a FileLock);

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
        Ok(FileLock { file, path })
    }

    /// Takes the lock if no other process has it.
    ///
    /// # Errors
    /// `Io` when the file system has no locks.
    pub fn try_lock(&self) -> Result<Option<Locked<'_>>> {
        match fcntl_lock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Locked(self))),
            Err(Errno::ACCESS | Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// `Io` when the file system has no locks.
    pub fn lock(&self) -> Result<Locked<'_>> {
        loop {
            match fcntl_lock(&self.file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Locked(self)),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
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
        let _ = fcntl_lock(&self.0.file, FlockOperation::Unlock);
    }
}
