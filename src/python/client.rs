//! What queues and streams have in common.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::history::Gap;
use crate::metrics::Reason;
use crate::process;
use crate::python::parking::Parking;
use crate::python::{channel, wait};
use crate::queue::{Client as Core, Kind, Overflow};
use crate::wake::Token;

/// Longer waits are for ever: the clock's arithmetic ends before ten thousand years do.
const FOR_EVER: f64 = 1e9;

/// Seconds from Python: `None` and very long ones mean without end.
pub fn duration(seconds: Option<&Bound<'_, PyAny>>, what: &str) -> PyResult<Option<Duration>> {
    let seconds: Option<f64> = match seconds {
        None => None,
        Some(given) => match given.extract::<f64>() {
            // An int of more digits than a float has.
            Err(error) if error.is_instance_of::<PyOverflowError>(given.py()) => {
                Some(if given.lt(0)? { f64::NEG_INFINITY } else { f64::INFINITY })
            }
            extracted => Some(extracted.map_err(|_| no_number(given, what))?),
        },
    };
    match seconds {
        None => Ok(None),
        Some(seconds) if seconds.is_nan() || seconds < 0.0 => Err(no_duration(seconds, what)),
        Some(seconds) if seconds > FOR_EVER => Ok(None),
        Some(seconds) => Ok(Some(Duration::from_secs_f64(seconds))),
    }
}

#[cold]
#[inline(never)]
fn no_number(given: &Bound<'_, PyAny>, what: &str) -> PyErr {
    let name = given.get_type().name().map_or_else(|_| "that".into(), |name| name.to_string());
    PyTypeError::new_err(format!("'{what}' must be a number of seconds or None, not {name}"))
}

#[cold]
#[inline(never)]
fn no_duration(seconds: f64, what: &str) -> PyErr {
    PyValueError::new_err(format!(
        "'{what}' must be a non-negative number of seconds, not {seconds}"
    ))
}

/// Reads the name of an overflow policy.
pub fn overflow(name: &str) -> PyResult<Overflow> {
    match name {
        "drop_oldest" => Ok(Overflow::DropOldest),
        "drop_newest" => Ok(Overflow::DropNewest),
        "disconnect" => Ok(Overflow::Disconnect),
        _ => Err(PyValueError::new_err(format!(
            "overflow must be \"drop_oldest\", \"drop_newest\" or \"disconnect\", not {name:?}"
        ))),
    }
}

/// How the hub holds a client's Python object.
pub enum Owner {
    /// A queue listens until it is told not to, as the list it replaces held it.
    Queue(Py<PyAny>),
    /// A stream ends when nobody holds it any more.
    Stream(Py<PyWeakrefReference>),
}

impl Owner {
    /// The object, while it lives.
    pub fn upgrade<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        match self {
            Owner::Queue(object) => Some(object.bind(py).clone()),
            Owner::Stream(weak) => weak.bind(py).upgrade(),
        }
    }
}

/// A client of a channel, whoever reads it.
#[pyclass(frozen, subclass, weakref, module = "sse_channel._sse_channel")]
pub struct Client {
    /// The core's client.
    pub core: Arc<Core>,
    born: u64,
    reset: OnceLock<&'static str>,
}

impl Client {
    /// A client that is not registered yet.
    pub fn new(kind: Kind, capacity: usize, policy: &str) -> PyResult<Client> {
        if capacity == 0 {
            return Err(PyValueError::new_err("capacity must be at least 1 event, not 0"));
        }
        let core = Arc::new(Core::new(kind, capacity, overflow(policy)?));
        Ok(Client { core, born: process::generation(), reset: OnceLock::new() })
    }

    /// Notes why it did not get exactly what it missed.
    pub fn set_reset(&self, reason: Option<&'static str>) {
        if let Some(reason) = reason {
            // A client registers once.
            let _ = self.reset.set(reason);
        }
    }

    /// Whether it was made by a process that this one was forked from.
    pub fn is_foreign(&self) -> bool {
        self.born != process::generation()
    }

    /// Ends it. Gives whether it was registered.
    pub fn end(&self, reason: Reason) -> bool {
        if self.is_foreign() {
            return false;
        }
        match self.core.hub() {
            Some(hub) => {
                let was_registered = hub.unregister(&self.core, reason);
                if was_registered {
                    channel::tell_left(&hub);
                }
                was_registered
            }
            None => {
                let mut wakes = crate::wake::WakeBatch::default();
                self.core.leave(&mut wakes);
                wakes.flush();
                false
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.is_foreign() {
            // Dropping the parent's queue would touch locks that a lost thread may hold.
            std::mem::forget(Arc::clone(&self.core));
        } else {
            // Only a stream gets here while registered: the hub itself holds a queue.
            self.end(Reason::Abandoned);
        }
    }
}

#[pymethods]
impl Client {
    /// Events that it lost because it had no room for them.
    #[getter]
    fn dropped(&self) -> u64 {
        self.core.dropped()
    }

    /// Why it was not given exactly what came after its last event id; None if it was.
    ///
    /// ``"too-old"``: history does not reach back so far, or the bus lost events while it listened.
    /// ``"future"``: the id is newer than the newest event. ``"unknown"``: it is no id of ours.
    #[getter]
    fn reset(&self) -> Option<&'static str> {
        let lost = || self.core.has_gap().then_some(Gap::TooOld.reason());
        self.reset.get().copied().or_else(lost)
    }

    /// Whether it gets nothing more; what is left can still be read.
    ///
    /// True in a process that was forked from the one that made it.
    #[getter]
    fn closed(&self) -> bool {
        self.is_foreign() || self.core.is_closed()
    }

    /// Parks an asyncio future; None when there is something to look at already.
    fn _park(
        &self,
        parking: &Parking,
        future: Py<PyAny>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Token>> {
        if self.is_foreign() {
            return Ok(None);
        }
        let timeout = duration(timeout, "timeout")?;
        let deadline = timeout.and_then(|wait| Instant::now().checked_add(wait));
        wait::park(&self.core, parking, future, deadline)
    }

    fn _unpark(&self, parking: &Parking, token: Token) {
        if self.is_foreign() {
            parking.remove(token);
        } else {
            wait::unpark(&self.core, parking, token);
        }
    }
}
