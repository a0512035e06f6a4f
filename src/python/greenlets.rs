//! gevent: which hub runs in this thread, and switching to and from it.
//!
//! gevent is never imported from here. Once somebody else has, its hub of this thread (if there
//! is one) is asked to watch one descriptor for all of the thread's waiting greenlets.

use std::sync::Arc;
use std::time::Instant;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyWeakrefReference;

use crate::python::parking::Parking;
use crate::python::wait;
use crate::wake::{Park, Token};

struct Gevent {
    get_hub_if_exists: Py<PyAny>,
    getcurrent: Py<PyAny>,
    /// Keeps the parking of each thread's hub, weakly named: gevent never frees a hub, and a later
    /// one must not be taken for it. A thread-local of Python, not of Rust, whose destructors run
    /// without the interpreter.
    thread_local: Py<PyAny>,
}

static GEVENT: PyOnceLock<Gevent> = PyOnceLock::new();

/// What is used of gevent, once somebody has imported it.
fn gevent(py: Python<'_>) -> PyResult<Option<&Gevent>> {
    if let Some(gevent) = GEVENT.get(py) {
        return Ok(Some(gevent));
    }
    let modules = py.import("sys")?.getattr(intern!(py, "modules"))?;
    if !modules.contains(intern!(py, "gevent.hub"))? {
        return Ok(None);
    }
    let gevent = GEVENT.get_or_try_init(py, || {
        // The interpreter's own, whether the patched one is the greenlets' or not.
        let original = py.import("gevent.monkey")?.getattr("get_original")?;
        let thread_local = original.call1(("_thread", "_local"))?.call0()?;
        PyResult::Ok(Gevent {
            get_hub_if_exists: py
                .import("gevent._hub_local")?
                .getattr("get_hub_if_exists")?
                .unbind(),
            getcurrent: py.import("greenlet")?.getattr("getcurrent")?.unbind(),
            thread_local: thread_local.unbind(),
        })
    })?;
    Ok(Some(gevent))
}

/// The hub of this thread, if gevent was imported and runs here.
#[inline(never)]
pub fn hub(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    let Some(gevent) = gevent(py)? else { return Ok(None) };
    let hub = gevent.get_hub_if_exists.bind(py).call0()?;
    Ok((!hub.is_none()).then_some(hub))
}

/// A greenlet that may wait.
pub struct Greenlet<'py> {
    hub: Bound<'py, PyAny>,
    current: Bound<'py, PyAny>,
}

/// Who calls.
pub enum Caller<'py> {
    /// Code of a thread without a hub.
    Thread,
    /// A greenlet of this thread's hub.
    Greenlet(Greenlet<'py>),
    /// The hub itself, in a callback: it can wait for nobody.
    Hub,
}

/// Who calls, by the hub of this thread.
#[inline(never)]
pub fn caller(py: Python<'_>) -> PyResult<Caller<'_>> {
    let (Some(hub), Some(gevent)) = (hub(py)?, GEVENT.get(py)) else {
        return Ok(Caller::Thread);
    };
    let current = gevent.getcurrent.bind(py).call0()?;
    if current.is(&hub) {
        return Ok(Caller::Hub);
    }
    Ok(Caller::Greenlet(Greenlet { hub, current }))
}

impl<'py> Greenlet<'py> {
    /// Lets the hub run others until there is something, `deadline` has passed or the
    /// greenlet is switched to by somebody else; the caller looks which.
    pub fn wait<T: Park + 'static>(self, on: &Arc<T>, deadline: Option<Instant>) -> PyResult<()> {
        let py = self.hub.py();
        let Some((parking, token)) = self.park(on, deadline)? else { return Ok(()) };
        // Straight to the next greenlet of this turn, if there is one: by way of the hub it would
        // cost two switches instead of one.
        let resumed = match parking.get().next_in_turn() {
            Some(next) => switch_to(next.bind(py)),
            None => self.hub.call_method0(intern!(py, "switch")),
        };
        if parking.get().remove(token).is_some() {
            gave_up(on, &parking, token)?;
        }
        resumed.map(drop)
    }

    // What a greenlet has on the C stack while it waits is copied at every switch: what is done
    // before and after is kept out of that frame.
    #[inline(never)]
    fn park<T: Park + 'static>(
        &self,
        on: &Arc<T>,
        deadline: Option<Instant>,
    ) -> PyResult<Option<(Bound<'py, Parking>, Token)>> {
        let parking = self.parking()?;
        let current = self.current.clone().unbind();
        let Some(token) = wait::park(on, parking.get(), current, deadline)? else {
            return Ok(None);
        };
        if let Err(error) = parking.get().watch_while_waiting(self.hub.py()) {
            wait::unpark(on, parking.get(), token);
            return Err(error);
        }
        Ok(Some((parking, token)))
    }

    /// The hub's parking, made at its first wait.
    fn parking(&self) -> PyResult<Bound<'py, Parking>> {
        match parking_of(&self.hub)? {
            Some(parking) if !parking.get().is_foreign() => Ok(parking),
            _ => self.new_parking(),
        }
    }

    #[cold]
    #[inline(never)]
    fn new_parking(&self) -> PyResult<Bound<'py, Parking>> {
        let py = self.hub.py();
        let parking = py.get_type::<Parking>().call0()?.cast_into::<Parking>()?;
        Parking::bind(&parking, &self.hub)?;
        let hub = PyWeakrefReference::new(&self.hub)?;
        let here = gevent(py)?.map(|gevent| gevent.thread_local.bind(py));
        if let Some(here) = here {
            here.setattr(intern!(py, "parking"), (hub, &parking))?;
            let end = HubsEnd(parking.clone().unbind());
            here.setattr(intern!(py, "hubs_end"), Bound::new(py, end)?)?;
        }
        Ok(parking)
    }
}

/// Kept by a thread for its hub: dropped at the end of the thread, or when that has another hub. The
/// greenlets that wait keep the parking itself, and nobody tells of a hub's end.
#[pyclass(frozen, module = "sse_channel._sse_channel")]
struct HubsEnd(Py<Parking>);

impl Drop for HubsEnd {
    fn drop(&mut self) {
        self.0.get().pass_on();
    }
}

/// The parking of this thread's hub, if there is one and that is it.
fn parking_of<'py>(hub: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, Parking>>> {
    let py = hub.py();
    let Some(gevent) = gevent(py)? else { return Ok(None) };
    let here = gevent.thread_local.bind(py).getattr_opt(intern!(py, "parking"))?;
    let Some(here) = here else { return Ok(None) };
    let (of, parking) = here.extract::<(Bound<'_, PyWeakrefReference>, Bound<'_, Parking>)>()?;
    let is_its = of.upgrade().is_some_and(|known| known.is(hub));
    Ok(is_its.then_some(parking))
}

/// Killed, timed out by gevent, or switched to by a stranger: not by us.
#[cold]
#[inline(never)]
fn gave_up<T: Park>(on: &Arc<T>, parking: &Bound<'_, Parking>, token: Token) -> PyResult<()> {
    wait::unpark(on, parking.get(), token);
    parking.get().watch_while_waiting(parking.py())
}

/// `greenlet.switch`, looked up once: a greenlet's own attributes are cold memory.
fn switch_to<'py>(greenlet: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static SWITCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = greenlet.py();
    let switch = SWITCH.get_or_try_init(py, || {
        PyResult::Ok(py.import("greenlet")?.getattr("greenlet")?.getattr("switch")?.unbind())
    })?;
    switch.bind(py).call1((greenlet,))
}

/// Runs a greenlet, and those of its turn that it hands on to, until one switches to the hub;
/// what is raised is the hub's to report.
pub fn resume(greenlet: &Bound<'_, PyAny>, hub: &Bound<'_, PyAny>) -> PyResult<()> {
    let Err(error) = switch_to(greenlet) else { return Ok(()) };
    report(error, greenlet, hub)
}

#[cold]
#[inline(never)]
fn report(error: PyErr, greenlet: &Bound<'_, PyAny>, hub: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = hub.py();
    let arguments = (greenlet, error.get_type(py), error.value(py), error.traceback(py));
    hub.call_method1(intern!(py, "handle_error"), arguments).map(drop)
}

/// In a forked child: this thread's hub came along, its bell belongs to the parent.
pub fn forked(py: Python<'_>) -> PyResult<()> {
    if GEVENT.get(py).is_none() {
        return Ok(());
    }
    let Some(hub) = hub(py)? else { return Ok(()) };
    let Some(parking) = parking_of(&hub)? else { return Ok(()) };
    let event_loop = hub.getattr(intern!(py, "loop"))?;
    for waiter in parking.get().unwatch(py)? {
        // It finds that its client belongs to the parent.
        let switch = waiter.getattr(py, intern!(py, "switch"))?;
        event_loop.call_method1(intern!(py, "run_callback"), (switch,))?;
    }
    Ok(())
}
