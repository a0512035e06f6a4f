//! Waiting for a client to have something, in the way of the caller, with the GIL released.

use std::cell::RefCell;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::Error;
use crate::process::{self, Named, Process};
use crate::python::client::Client;
use crate::python::greenlets::{Caller, caller};
use crate::python::parking::Parking;
use crate::queue::Taken;
use crate::wake::{Park, Parked, Token, Waiter, Wakeups};

/// Parks a greenlet or a future until something comes or `deadline`; the timer knows of it.
pub fn park<T: Park + 'static>(
    on: &Arc<T>,
    parking: &Parking,
    waiter: Py<PyAny>,
    deadline: Option<Instant>,
) -> PyResult<Option<Token>> {
    let weak: Weak<T> = Arc::downgrade(on);
    let token = parking.add(waiter, weak);
    let wakeups = Arc::clone(parking.wakeups());
    match on.park(Waiter { wakeups, token, deadline }) {
        Parked::Ready => {
            parking.remove(token);
            return Ok(None);
        }
        Parked::Waiting { arm: None } => {}
        Parked::Waiting { arm: Some(at) } => {
            if let Err(error) = schedule(on, at) {
                on.disarm();
                unpark(on, parking, token);
                return Err(error);
            }
        }
    }
    Ok(Some(token))
}

#[inline(never)]
fn schedule<T: Park + 'static>(on: &Arc<T>, at: Instant) -> PyResult<()> {
    let weak: Weak<T> = Arc::downgrade(on);
    Process::current().timer()?.schedule(at, weak);
    Ok(())
}

/// Takes a waiter back, whether it was woken or not.
pub fn unpark<T: Park>(on: &Arc<T>, parking: &Parking, token: Token) {
    parking.remove(token);
    on.unpark(token, parking.wakeups());
}

/// Waits once, in the way of the caller, until something may be there or `deadline`. `block` is
/// how a thread does that.
pub fn once<T, R, B>(
    py: Python<'_>,
    on: &Arc<T>,
    deadline: Option<Instant>,
    block: B,
) -> PyResult<()>
where
    T: Park + 'static,
    B: FnOnce(Instant) -> R + Send,
    R: Send,
{
    match caller(py)? {
        Caller::Greenlet(greenlet) => greenlet.wait(on, deadline),
        Caller::Thread if is_main_thread() => wait_for_signals_too(py, on, deadline),
        // A hub's callback cannot let others run: it waits as a thread.
        Caller::Thread | Caller::Hub => {
            // Without an end, in pieces: the caller looks and comes again.
            let until = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            py.detach(|| block(until));
            Ok(())
        }
    }
}

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
            Caller::Greenlet(greenlet) => greenlet.wait(&client.core, deadline)?,
            Caller::Thread if is_main_thread() => wait_for_signals_too(py, &client.core, deadline)?,
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
fn wait_for_signals_too<T: Park>(
    py: Python<'_>,
    on: &Arc<T>,
    deadline: Option<Instant>,
) -> PyResult<()> {
    const TOKEN: u64 = 0;
    let wakeups = own_wakeups()?;
    let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: TOKEN, deadline: None };
    if on.park(waiter) == Parked::Ready {
        return Ok(());
    }
    let process = Process::current();
    let waited = match py.detach(|| poll_once(&wakeups, process.named().as_ref(), deadline)) {
        // A signal that came while this thread waited for the GIL is raised before the take; and
        // its handler may have waited itself, and taken this thread's rings: the caller looks.
        Ok(()) | Err(Errno::INTR) => py.check_signals(),
        Err(errno) => Err(Error::from(errno).into()),
    };
    on.unpark(TOKEN, &wakeups);
    waited
}

/// This thread's bell for its waits: made once, since a wait must cost little. After a fork it is
/// another, as the parent has the first.
fn own_wakeups() -> PyResult<Arc<Wakeups>> {
    thread_local! {
        static OWN: RefCell<Option<(u64, Arc<Wakeups>)>> = const { RefCell::new(None) };
    }
    OWN.with_borrow_mut(|own| match own {
        Some((born, wakeups)) if *born == process::generation() => {
            // What became ready after the last wait. If it rang, the next poll returns at once.
            wakeups.take_silently();
            Ok(Arc::clone(wakeups))
        }
        _ => {
            let wakeups = Arc::new(Wakeups::new()?);
            *own = Some((process::generation(), Arc::clone(&wakeups)));
            Ok(wakeups)
        }
    })
}

/// Polls until something is there, `deadline`, or a signal. Where another process's publish rings,
/// this thread hears it and delivers itself: woken by way of the bus's thread it would come later.
fn poll_once(
    wakeups: &Wakeups,
    named: Option<&Named>,
    deadline: Option<Instant>,
) -> Result<(), Errno> {
    loop {
        // Each time: another bell may have taken its place.
        let doorbell = named.and_then(|named| named.bus.doorbell());
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let own = wakeups.fd();
        let mut watched = vec![PollFd::new(&own, PollFlags::IN)];
        if let Some(doorbell) = &doorbell {
            watched.push(PollFd::from_borrowed_fd(doorbell.fd(), PollFlags::IN));
        }
        let count = poll(&mut watched, left.as_ref())?;
        if count == 0 {
            return Ok(());
        }
        if !watched[0].revents().is_empty() {
            wakeups.take();
            return Ok(());
        }
        if let Some(doorbell) = &doorbell
            && wakeups.attend(|| doorbell.answer())
        {
            return Ok(());
        }
    }
}
