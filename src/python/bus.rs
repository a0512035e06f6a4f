//! The bus of this process as Python uses it: begun by Python's options, waited for in the way of
//! the caller.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::bus::{Attempt, Bus, Publication, Settings};
use crate::error::Error;
use crate::event_id::EventId;
use crate::history::Limits;
use crate::hub::{ChannelKey, Resume};
use crate::process::{Named, Process};
use crate::python::{asyncio, wait};
use crate::ticket::{Answering, Ticket};

/// The bus and the hub of all named channels, begun at the first call.
pub fn named(py: Python<'_>) -> PyResult<Named> {
    let process = Process::current();
    if let Some(named) = process.named() {
        return Ok(named);
    }
    let settings: Settings =
        py.import("sse_channel.config")?.getattr("bus_settings")?.call0()?.extract()?;
    match process.open(&settings) {
        Ok(named) => Ok(named),
        Err(error) => Err(PyValueError::new_err(format!(
            "the bus cannot be begun: BUS names something {error}"
        ))),
    }
}

impl<'py> FromPyObject<'_, 'py> for Settings {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Settings> {
        let (url, project, age, bytes): (String, String, u64, usize) = object.extract()?;
        Ok(Settings { url, project, limits: Limits { age: age.saturating_mul(1000), bytes } })
    }
}

/// Why a bus URL cannot be used, or None.
#[pyfunction]
pub fn check_bus(url: String) -> Option<String> {
    let settings = Settings { url, project: String::new(), limits: Limits::default() };
    settings.check().err().map(|error| error.to_string())
}

/// The URL of the bus that this process uses, None while it uses none.
#[pyfunction]
pub fn bus_url() -> Option<String> {
    Process::current().named().map(|named| named.bus.url().to_owned())
}

/// The figures of this process's bus.
#[pyfunction]
pub fn bus_figures(py: Python<'_>) -> PyResult<Option<Bound<'_, PyDict>>> {
    let process = Process::current();
    let Some(named) = process.named() else { return Ok(None) };
    let figures = py.detach(|| named.bus.figures());
    let dict = PyDict::new(py);
    dict.set_item("url", named.bus.url())?;
    dict.set_item("lag", figures.lag)?;
    dict.set_item("waiting", figures.waiting)?;
    dict.set_item("connected", figures.connected)?;
    dict.set_item("reconnects", figures.reconnects)?;
    Ok(Some(dict))
}

/// Publishes, and returns when the bus has ordered and stored the event.
pub fn publish(
    py: Python<'_>,
    bus: &Arc<dyn Bus>,
    publication: Publication,
    timeout: Duration,
) -> PyResult<EventId> {
    match py.detach(|| bus.try_publish(publication)) {
        Attempt::Done(answer) => Ok(answer?),
        Attempt::Waits(publication) => {
            let (ticket, answering) = Answering::new();
            bus.publish(publication, answering);
            answer_of(py, bus, &ticket, timeout)
        }
    }
}

/// `publish` on asyncio: what `convert` makes of the event's id, or an awaitable for it when the bus
/// has to be waited for.
pub fn publish_later<'py, T>(
    py: Python<'py>,
    bus: &Arc<dyn Bus>,
    publication: Publication,
    timeout: Duration,
    convert: impl FnOnce(EventId) -> T + Send + 'static,
) -> PyResult<Bound<'py, PyAny>>
where
    T: for<'a> IntoPyObject<'a> + Send + 'static,
{
    match py.detach(|| bus.try_publish(publication)) {
        Attempt::Done(answer) => convert(answer?).into_bound_py_any(py),
        Attempt::Waits(publication) => {
            let (ticket, answering) = Answering::new();
            bus.publish(publication, answering);
            asyncio::awaitable(py, Arc::clone(bus), ticket, timeout, convert)
        }
    }
}

/// Brings the hub to where a client of `channels` can register.
pub fn prepare(
    py: Python<'_>,
    bus: &Arc<dyn Bus>,
    channels: &[ChannelKey],
    resume: Resume,
    timeout: Duration,
) -> PyResult<()> {
    match py.detach(|| bus.try_prepare(channels, resume)) {
        Attempt::Done(answer) => answer.map(drop)?,
        Attempt::Waits(()) => {
            let (ticket, answering) = Answering::new();
            bus.prepare(channels.to_vec(), resume, answering);
            answer_of(py, bus, &ticket, timeout)?;
        }
    }
    Ok(())
}

/// `prepare` on asyncio: an awaitable, or None when it is done.
pub fn prepare_later<'py>(
    py: Python<'py>,
    bus: &Arc<dyn Bus>,
    channels: &[ChannelKey],
    resume: Resume,
    timeout: Duration,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    match py.detach(|| bus.try_prepare(channels, resume)) {
        Attempt::Done(answer) => {
            answer?;
            Ok(None)
        }
        Attempt::Waits(()) => {
            let (ticket, answering) = Answering::new();
            bus.prepare(channels.to_vec(), resume, answering);
            asyncio::awaitable(py, Arc::clone(bus), ticket, timeout, drop).map(Some)
        }
    }
}

/// Withdraws what nobody waits for any more, when its waiting ends by an exception.
struct Withdraw<'a>(&'a Ticket);

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        self.0.withdraw();
    }
}

fn answer_of(
    py: Python<'_>,
    bus: &Arc<dyn Bus>,
    ticket: &Arc<Ticket>,
    timeout: Duration,
) -> PyResult<EventId> {
    let _withdraw = Withdraw(ticket);
    // What the bus has begun may be stored: it is given as long again to tell.
    for is_begun in [false, true] {
        let deadline = Instant::now().checked_add(timeout);
        while deadline.is_none_or(|at| at > Instant::now()) {
            if let Some(answer) = ticket.take() {
                return Ok(answer?);
            }
            wait::once(py, ticket, deadline, |until| ticket.wait_until(until))?;
        }
        if let Some(answer) = ticket.take() {
            return Ok(answer?);
        }
        if ticket.withdraw() {
            return Err(py.detach(|| not_sent(&**bus, timeout)).into());
        }
        if is_begun {
            break;
        }
    }
    Err(py.detach(|| no_answer(&**bus)).into())
}

/// The bus did not get to it in time.
pub fn not_sent(bus: &dyn Bus, timeout: Duration) -> Error {
    Error::Bus(format!(
        "nothing was sent: within {} s (PUBLISH_TIMEOUT) the bus did not get to it; {}",
        timeout.as_secs_f64(),
        bus.excuse()
    ))
}

/// The bus got to it, and what became of it is not known.
pub fn no_answer(bus: &dyn Bus) -> Error {
    Error::Bus(format!(
        "the bus was given the event and did not answer: it may arrive or not; {}",
        bus.excuse()
    ))
}

/// Called before a fork: what a child must not have is let go of.
#[pyfunction]
pub fn before_fork(py: Python<'_>) {
    if let Some(named) = Process::current().named() {
        py.detach(|| named.bus.before_fork());
    }
}

/// Called after a fork in the process that went on with it.
#[pyfunction]
pub fn after_fork() {
    if let Some(named) = Process::current().named() {
        named.bus.after_fork();
    }
}
