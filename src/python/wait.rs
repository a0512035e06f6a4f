//! Waiting for a client to have something, in the way of the caller, with the GIL released.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::Error;
use crate::python::client::Client;
use crate::python::greenlets::{Caller, caller};
use crate::queue::{Parked, Taken};
use crate::wake::{Waiter, Wakeups};

/// Takes the oldest event, waiting up to `timeout` (for ever without one).
///
/// An event is taken only to be given to the caller: an exception raised meanwhile leaves it in
/// the queue.
pub fn take(py: Python<'_>, client: &Client, timeout: Option<Duration>) -> PyResult<Taken> {
    if client.is_foreign() {
        return Ok(Taken::Closed);
    }
    match client.core.take() {
        Taken::Empty => {}
        found => return Ok(found),
    }
    take_later(py, client, timeout)
}

#[inline(never)]
fn take_later(py: Python<'_>, client: &Client, timeout: Option<Duration>) -> PyResult<Taken> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        match caller(py)? {
            Caller::Hub => return Ok(Taken::Empty),
            Caller::Greenlet(greenlet) => greenlet.wait(client, deadline)?,
            Caller::Thread if is_main_thread() => wait_for_signals_too(py, client, deadline)?,
            Caller::Thread => return Ok(block_thread(py, client, deadline)),
        }
        if client.is_foreign() {
            // This greenlet waited through a fork, and is its copy in the child.
            return Ok(Taken::Closed);
        }
        match client.core.take() {
            Taken::Empty if deadline.is_some_and(|at| at <= Instant::now()) => {
                return Ok(Taken::Empty);
            }
            Taken::Empty => {}
            found => return Ok(found),
        }
    }
}

#[inline(never)]
fn block_thread(py: Python<'_>, client: &Client, deadline: Option<Instant>) -> Taken {
    py.detach(|| client.core.take_blocking(deadline))
}

/// Whether this thread is the one that Python's signal handlers run in.
#[cfg(target_os = "linux")]
fn is_main_thread() -> bool {
    rustix::thread::gettid() == rustix::process::getpid()
}

/// Elsewhere every thread waits in the way that costs a descriptor and suits the main one.
#[cfg(not(target_os = "linux"))]
fn is_main_thread() -> bool {
    true
}

/// Waits in `poll`, which a signal interrupts: a futex, as in crossbeam's receive, is resumed.
#[inline(never)]
fn wait_for_signals_too(
    py: Python<'_>,
    client: &Client,
    deadline: Option<Instant>,
) -> PyResult<()> {
    const TOKEN: u64 = 0;
    let wakeups = Arc::new(Wakeups::new()?);
    let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: TOKEN, deadline: None };
    if client.core.park(waiter) == Parked::Ready {
        return Ok(());
    }
    let waited = loop {
        let polled = py.detach(|| {
            let fd = wakeups.fd();
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], left.as_ref())
        });
        match polled {
            // A signal that came while this thread waited for the GIL is raised before the take.
            Ok(_) => break py.check_signals(),
            Err(Errno::INTR) => {
                if let Err(raised) = py.check_signals() {
                    break Err(raised);
                }
            }
            Err(errno) => break Err(Error::from(errno).into()),
        }
    };
    client.core.unpark(TOKEN, &wakeups);
    waited
}
