//! Waking those who wait without a thread of their own: one bell per event loop.
//!
//! A client that gets something moves its waiter's token to the loop's ready list; the first
//! token on an empty list rings the bell, a descriptor that the loop watches. A burst over
//! thousands of clients of one loop rings once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

#[cfg(not(feature = "shuttle"))]
use rustix::io::{Errno, read, write};

use crate::error::Result;
#[cfg(feature = "shuttle")]
use crate::sync::Rings;
use crate::sync::atomic::{AtomicBool, Ordering::Relaxed};
use crate::sync::{Mutex, lock};
use crate::timer::Timed;

/// Names a waiter within its loop; what it stands for only the loop knows.
pub type Token = u64;

/// A descriptor that becomes readable when rung: an eventfd, a pipe where there is none.
#[derive(Debug)]
struct Bell {
    readable: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    writable: OwnedFd,
    /// In place of the descriptor, which the checker knows nothing of.
    #[cfg(feature = "shuttle")]
    rings: Rings,
}

impl Bell {
    #[cfg(target_os = "linux")]
    fn new() -> Result<Bell> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Bell {
            readable: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            #[cfg(feature = "shuttle")]
            rings: Rings::default(),
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> Result<Bell> {
        use rustix::io::{FdFlags, fcntl_setfd, ioctl_fionbio};
        let (readable, writable) = rustix::pipe::pipe()?;
        for fd in [&readable, &writable] {
            fcntl_setfd(fd, FdFlags::CLOEXEC)?;
            ioctl_fionbio(fd, true)?;
        }
        Ok(Bell {
            readable,
            writable,
            #[cfg(feature = "shuttle")]
            rings: Rings::default(),
        })
    }

    #[cfg(feature = "shuttle")]
    fn ring(&self) {
        self.rings.ring();
    }

    #[cfg(feature = "shuttle")]
    fn silence(&self) {
        self.rings.silence();
    }

    #[cfg(not(feature = "shuttle"))]
    fn ring(&self) {
        #[cfg(target_os = "linux")]
        let writable = &self.readable;
        #[cfg(not(target_os = "linux"))]
        let writable = &self.writable;
        // A bell that is full is rung already; no other failure is possible on our own descriptor.
        while write(writable, &1u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }

    #[cfg(not(feature = "shuttle"))]
    fn silence(&self) {
        let mut buffer = [0u8; 64];
        loop {
            match read(&self.readable, &mut buffer) {
                Err(Errno::INTR) => {}
                // A pipe may hold more rings than one read takes; an eventfd never does.
                Ok(count) if count == buffer.len() => {}
                _ => return,
            }
        }
    }
}

/// The ready list and the bell of one event loop (a gevent hub, an asyncio loop, a lone thread).
#[derive(Debug)]
pub struct Wakeups {
    bell: Bell,
    /// Held for a push or a take, never while anything runs.
    ready: Mutex<Ready>,
    /// Set when nobody will ever hear the bell again.
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Ready {
    /// To be resumed.
    tokens: Vec<Token>,
    /// Somebody is about to look, and need not be rung.
    is_attended: bool,
}

impl Wakeups {
    /// Takes one descriptor (two where a pipe serves).
    pub fn new() -> Result<Wakeups> {
        Ok(Wakeups { bell: Bell::new()?, ready: Mutex::default(), closed: AtomicBool::new(false) })
    }

    /// The descriptor to watch for reading.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.bell.readable.as_fd()
    }

    /// What stands for the descriptor under the checker.
    #[cfg(feature = "shuttle")]
    pub fn rings(&self) -> &Rings {
        &self.bell.rings
    }

    /// The loop is gone: its waiters must not be given a wake-up that another could use.
    pub fn close(&self) {
        self.closed.store(true, Relaxed);
    }

    /// Whether the loop is gone.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Makes `tokens` ready and rings if nothing was ready before.
    fn wake(&self, tokens: &[Token]) {
        let first = {
            let mut ready = lock(&self.ready);
            let first = ready.tokens.is_empty() && !ready.is_attended;
            ready.tokens.extend_from_slice(tokens);
            first
        };
        if first {
            self.bell.ring();
        }
    }

    /// Takes all ready tokens in the order of their waking.
    pub fn take(&self) -> Vec<Token> {
        // Silence first: a ring after it finds its token taken, or stays for the next turn.
        self.bell.silence();
        self.take_silently()
    }

    /// `take` where the bell did not ring.
    pub fn take_silently(&self) -> Vec<Token> {
        std::mem::take(&mut lock(&self.ready).tokens)
    }

    /// Runs `work` on the thread that waits for the bell: what becomes ready meanwhile does not ring.
    /// Gives whether something is ready.
    pub fn attend(&self, work: impl FnOnce()) -> bool {
        lock(&self.ready).is_attended = true;
        work();
        let mut ready = lock(&self.ready);
        ready.is_attended = false;
        !ready.tokens.is_empty()
    }

    /// Rings without a token: what was taken is not all resumed yet.
    pub fn ring(&self) {
        self.bell.ring();
    }
}

/// Somebody parked on a client until it has something or the deadline passes.
#[derive(Debug)]
pub struct Waiter {
    /// Whom to tell.
    pub wakeups: Arc<Wakeups>,
    /// What to tell.
    pub token: Token,
    /// When to tell even though nothing came.
    pub deadline: Option<Instant>,
}

/// Whether a waiter was parked.
#[derive(Debug, PartialEq, Eq)]
pub enum Parked {
    /// There is something to look at already; the waiter was not kept.
    Ready,
    /// The waiter will be woken; `arm` is when the timer must look after it, if the timer does not
    /// know of an early enough moment yet.
    Waiting {
        /// The moment to schedule.
        arm: Option<Instant>,
    },
}

/// What a waiter can be parked on.
pub trait Park: Timed {
    /// Parks a waiter, unless there is something to look at.
    fn park(&self, waiter: Waiter) -> Parked;

    /// Takes a waiter back, whether it was woken or not.
    fn unpark(&self, token: Token, wakeups: &Arc<Wakeups>);

    /// The moment that `park` asked for could not be scheduled: the next waiter asks again.
    fn disarm(&self) {}
}

/// Waiters to be woken once the locks are released, grouped by loop.
#[derive(Debug, Default)]
pub struct WakeBatch {
    groups: Vec<(Arc<Wakeups>, Vec<Token>)>,
}

impl WakeBatch {
    /// Adds one waiter.
    pub fn add(&mut self, waiter: Waiter) {
        let same = |group: &&mut (Arc<Wakeups>, _)| Arc::ptr_eq(&group.0, &waiter.wakeups);
        match self.groups.iter_mut().find(same) {
            Some((_, tokens)) => tokens.push(waiter.token),
            None => self.groups.push((waiter.wakeups, vec![waiter.token])),
        }
    }

    /// Wakes them all, one ring per loop at the most.
    pub fn flush(self) {
        for (wakeups, tokens) in self.groups {
            wakeups.wake(&tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn rung(wakeups: &Wakeups) -> bool {
        let fd = wakeups.fd();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)) == Ok(1)
    }

    fn batch(wakeups: &Arc<Wakeups>, tokens: &[Token]) -> WakeBatch {
        let mut batch = WakeBatch::default();
        for token in tokens {
            let wakeups = Arc::clone(wakeups);
            batch.add(Waiter { wakeups, token: *token, deadline: None });
        }
        batch
    }

    #[test]
    fn a_burst_rings_once() -> Result<()> {
        let (one, other) = (Arc::new(Wakeups::new()?), Arc::new(Wakeups::new()?));
        assert!(!rung(&one));
        batch(&one, &[1, 2, 3]).flush();
        batch(&one, &[4]).flush();
        assert!(rung(&one) && !rung(&other));
        assert_eq!(one.take(), [1, 2, 3, 4]);
        assert!(!rung(&one));
        assert_eq!(one.take(), [] as [Token; 0]);
        one.ring();
        assert!(rung(&one));
        Ok(())
    }

    #[test]
    fn who_attends_need_not_be_rung() -> Result<()> {
        let wakeups = Arc::new(Wakeups::new()?);
        assert!(!wakeups.attend(|| ()));
        assert!(wakeups.attend(|| batch(&wakeups, &[1]).flush()));
        assert!(!rung(&wakeups));
        assert_eq!(wakeups.take_silently(), [1]);
        batch(&wakeups, &[2]).flush();
        assert!(rung(&wakeups));
        Ok(())
    }
}
