//! Parking: the greenlets or futures of one event loop that wait for a client.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use std::os::fd::AsRawFd;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use slab::Slab;

use crate::python::greenlets;
use crate::sync::lock;
use crate::wake::{Park, Token, Wakeups};
use crate::{descriptors, process};

/// A turn of the loop resumes waiters for this long; the rest comes in the next, after the loop's
/// other work. gevent gives its own callbacks the same.
const TURN: Duration = Duration::from_millis(5);

/// The clock is read once for so many waiters.
const CLOCK_EVERY: u64 = 32;

/// The waiters of one event loop and the descriptor by which they are woken.
#[pyclass(frozen, weakref, module = "sse_channel._sse_channel")]
pub struct Parking {
    wakeups: Arc<Wakeups>,
    born: u64,
    /// Known before a forked child is told that it is one: the ends of its parent's threads come first.
    process: u32,
    /// Who waits, by token, and whose turn it is. Taken for an insert or a removal, never while a
    /// waiter runs.
    waiting: Mutex<Waiting>,
    resumed: AtomicU64,
    gevent: Mutex<Option<Gevent>>,
    /// Whether gevent's watcher is started.
    watching: AtomicBool,
}

/// One that waits.
struct Slot {
    version: u32,
    /// A greenlet or a future.
    waiter: Py<PyAny>,
    /// What it waits for.
    on: Weak<dyn Park>,
}

#[derive(Default)]
struct Waiting {
    slots: Slab<Slot>,
    version: u32,
    /// Whose futures were resolved in the last turn: their tasks go on before the next.
    resolved: Vec<(Token, Weak<dyn Park>)>,
    /// Tokens that this turn of the loop resumes still.
    turn: VecDeque<Token>,
    turn_ends: Option<Instant>,
}

impl Waiting {
    fn remove(&mut self, token: Token) -> Option<Slot> {
        let index = (token & u64::from(u32::MAX)) as usize;
        let version = (token >> 32) as u32;
        let known = self.slots.get(index).is_some_and(|slot| slot.version == version);
        known.then(|| self.slots.remove(index))
    }
}

fn token_of(index: usize, version: u32) -> Token {
    (u64::from(version) << 32) | index as u64
}

/// What a parking of greenlets holds of gevent.
struct Gevent {
    watcher: Py<PyAny>,
    /// The watcher's callback, `Parking.resume`.
    resume: Py<PyAny>,
}

impl Parking {
    /// The core's side.
    pub fn wakeups(&self) -> &Arc<Wakeups> {
        &self.wakeups
    }

    /// Whether it was made by a process that this one was forked from.
    pub fn is_foreign(&self) -> bool {
        self.born != process::generation()
    }

    /// Keeps a waiter (a greenlet or a future) under a token that no other waiter has meanwhile.
    pub fn add(&self, waiter: Py<PyAny>, on: Weak<dyn Park>) -> Token {
        let mut waiting = lock(&self.waiting);
        waiting.version = waiting.version.wrapping_add(1);
        let version = waiting.version;
        let index = waiting.slots.insert(Slot { version, waiter, on });
        token_of(index, version)
    }

    /// Forgets a waiter; `None` if it was resumed or forgotten before.
    pub fn remove(&self, token: Token) -> Option<Py<PyAny>> {
        Some(lock(&self.waiting).remove(token)?.waiter)
    }

    /// The next waiter of this turn, taken out: who gets it must resume it.
    pub fn next_in_turn(&self) -> Option<Py<PyAny>> {
        self.next(false)
    }

    fn next(&self, is_future: bool) -> Option<Py<PyAny>> {
        let mut waiting = lock(&self.waiting);
        if self.resumed.load(Relaxed).is_multiple_of(CLOCK_EVERY)
            && waiting.turn_ends.is_some_and(|end| end <= Instant::now())
        {
            return None;
        }
        while let Some(token) = waiting.turn.pop_front() {
            if let Some(slot) = waiting.remove(token) {
                self.resumed.fetch_add(1, Relaxed);
                if is_future {
                    waiting.resolved.push((token, slot.on));
                }
                return Some(slot.waiter);
            }
        }
        None
    }

    fn nobody_waits(&self) -> bool {
        lock(&self.waiting).slots.is_empty()
    }

    /// Binds it to a hub, by one watcher.
    pub fn bind(slf: &Bound<'_, Parking>, hub: &Bound<'_, PyAny>) -> PyResult<()> {
        const READ: i32 = 1;
        let py = slf.py();
        let event_loop = hub.getattr(intern!(py, "loop"))?;
        let watcher = event_loop.call_method1(intern!(py, "io"), (slf.get().fileno(), READ))?;
        *lock(&slf.get().gevent) = Some(Gevent {
            watcher: watcher.unbind(),
            resume: slf.getattr(intern!(py, "resume"))?.unbind(),
        });
        Ok(())
    }

    /// Ends the watching, in a forked child: a shared bell must be heard by the parent alone. Gives
    /// the waiters, which would wait for it for ever.
    pub fn unwatch(&self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        let gevent = lock(&self.gevent).take();
        if let Some(gevent) = gevent {
            gevent.watcher.call_method0(py, intern!(py, "stop"))?;
            gevent.watcher.call_method0(py, intern!(py, "close"))?;
        }
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        Ok(waiting.slots.into_iter().map(|(_, slot)| slot.waiter).collect())
    }

    /// Its loop or hub runs no more: what its waiters were woken for goes on to the next that wait, and
    /// they are woken no more. Needs no interpreter.
    pub fn pass_on(&self) {
        if self.is_foreign() || self.process != std::process::id() {
            // Its clients are the parent's, with locks that a lost thread may hold.
            return;
        }
        // First: who is woken after the look is not one of these.
        self.wakeups.close();
        let mut those = Vec::new();
        {
            let mut waiting = lock(&self.waiting);
            those.append(&mut waiting.resolved);
            let slots = waiting.slots.iter();
            those.extend(slots.map(|(at, its)| (token_of(at, its.version), Weak::clone(&its.on))));
        }
        for (token, on) in those {
            if let Some(on) = on.upgrade() {
                on.unpark(token, &self.wakeups);
            }
        }
    }

    /// Has gevent's loop watch the bell while somebody waits, and only then. A started watcher
    /// keeps the loop from ending, for a publish may come from a thread that the loop knows
    /// nothing of; and it keeps itself and its hub alive.
    pub fn watch_while_waiting(&self, py: Python<'_>) -> PyResult<()> {
        let watch = !self.nobody_waits();
        if self.watching.load(Relaxed) == watch {
            return Ok(());
        }
        let gevent = lock(&self.gevent)
            .as_ref()
            .map(|gevent| (gevent.watcher.clone_ref(py), gevent.resume.clone_ref(py)));
        match gevent {
            Some((watcher, resume)) if watch => {
                watcher.call_method1(py, intern!(py, "start"), (resume,))?;
            }
            Some((watcher, _)) => {
                watcher.call_method0(py, intern!(py, "stop"))?;
            }
            None => {}
        }
        self.watching.store(watch, Relaxed);
        Ok(())
    }
}

#[pymethods]
impl Parking {
    #[new]
    fn new() -> PyResult<Parking> {
        Ok(Parking {
            wakeups: Arc::new(Wakeups::new()?),
            born: process::generation(),
            process: std::process::id(),
            waiting: Mutex::default(),
            resumed: AtomicU64::new(0),
            gevent: Mutex::new(None),
            watching: AtomicBool::new(false),
        })
    }

    /// The descriptor to watch for reading.
    fn fileno(&self) -> i32 {
        self.wakeups.fd().as_raw_fd()
    }

    /// Whether a process that this one was forked from made it.
    #[getter]
    fn foreign(&self) -> bool {
        self.is_foreign()
    }

    /// How many waiters were resumed so far.
    #[getter]
    fn resumed(&self) -> u64 {
        self.resumed.load(Relaxed)
    }

    /// How many waiters there are now.
    fn __len__(&self) -> usize {
        lock(&self.waiting).slots.len()
    }

    /// Resumes those who have something or whose time is up; the loop's reader callback.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_foreign() {
            return Ok(());
        }
        let is_of_greenlets = lock(&self.gevent).is_some();
        // A watcher's callback runs in its hub, in the thread of both.
        let hub = if is_of_greenlets { greenlets::hub(py)? } else { None };
        {
            let mut waiting = lock(&self.waiting);
            waiting.resolved.clear();
            waiting.turn.extend(self.wakeups.take());
            waiting.turn_ends = Some(Instant::now() + TURN);
        }
        let mut failure = Ok(());
        while let Some(waiter) = self.next(hub.is_none()) {
            let resumed = match &hub {
                Some(hub) => greenlets::resume(waiter.bind(py), hub),
                None => resolve(waiter.bind(py)),
            };
            // The others are resumed all the same.
            failure = failure.and(resumed);
        }
        if !lock(&self.waiting).turn.is_empty() {
            self.wakeups.ring();
        }
        failure?;
        self.watch_while_waiting(py)
    }

    /// Rings the bell, for somebody who watches it in another way.
    fn ring(&self) {
        self.wakeups.ring();
    }

    /// Lets go of the waiters: their loop is closed, and will never resume them.
    fn close(&self) {
        self.pass_on();
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        drop(waiting);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(gevent) = self.gevent.try_lock()
            && let Some(gevent) = gevent.as_ref()
        {
            visit.call(&gevent.watcher)?;
            visit.call(&gevent.resume)?;
        }
        if let Ok(waiting) = self.waiting.try_lock() {
            for (_, slot) in &waiting.slots {
                visit.call(&slot.waiter)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let _watcher = lock(&self.gevent).take();
        let _waiters = std::mem::take(&mut lock(&self.waiting).slots);
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        self.pass_on();
    }
}

/// Lets the task go on that awaits a future.
fn resolve(future: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = future.py();
    if !future.call_method0(intern!(py, "done"))?.is_truthy()? {
        future.call_method1(intern!(py, "set_result"), (py.None(),))?;
    }
    Ok(())
}

/// Called in a forked child: forgets the parent's clients, timer and bells.
#[pyfunction]
pub fn forked(py: Python<'_>) -> PyResult<()> {
    process::forked();
    descriptors::close_inherited();
    greenlets::forked(py)
}
