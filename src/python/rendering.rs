//! Renderings as Python sees them: the events of the sources go out, what became of them comes in.

use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyString, PyWeakrefReference};

use crate::event::{Draft, Event, Format};
use crate::event_id::EventId;
use crate::frame::{self, Body};
use crate::history::Gap;
use crate::hub::{Hub, Missing, Rendered, Resume, render};
use crate::metrics::Reason;
use crate::python::channel::{self, Channel, Place};
use crate::python::client::{Client, Owner, duration};
use crate::python::queue::Queue;
use crate::python::stream::Stream;
use crate::python::{bus, message};
use crate::queue::{Desk, Kind, Taken};
use crate::sync::lock;

/// An event of a source, to be rendered.
#[pyclass(frozen, module = "sse_channel._sse_channel")]
pub struct SourceEvent {
    event: Arc<Event>,
}

#[pymethods]
impl SourceEvent {
    /// The message, the same object for every reader of this process.
    #[getter]
    fn message(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        message::of(py, &self.event)
    }

    /// Whether it has one: a comment or a reconnection time alone is passed on as it is.
    #[getter]
    fn has_message(&self) -> bool {
        self.event.has_message
    }

    /// The event name.
    #[getter]
    fn event(&self) -> Option<&str> {
        frame::event_name(&self.event.frame)
    }

    #[getter]
    fn id(&self) -> Option<String> {
        self.event.id.map(|id| id.to_string())
    }
}

/// What the events of some channels are turned into, for all clients that share it. As a client
/// of those channels it takes their events.
#[pyclass(frozen, subclass, extends = Client, module = "sse_channel._sse_channel")]
pub struct Rendering {
    place: OnceLock<(Weak<Hub>, Rendered)>,
    /// What was made of events from before its beginning. Held for a push.
    back: Mutex<Back>,
}

#[derive(Default)]
struct Back {
    events: Vec<Arc<Event>>,
    /// They are all after the one, up to the other.
    range: Option<(EventId, EventId)>,
}

impl Rendering {
    fn hub(&self) -> Option<(Arc<Hub>, Rendered)> {
        let (hub, at) = self.place.get()?;
        Some((hub.upgrade()?, *at))
    }
}

/// An event, or what belongs before those that are there.
fn place(slf: &Bound<'_, Rendering>, source: &SourceEvent, event: Option<Arc<Event>>, back: bool) {
    let rendering = slf.get();
    if back {
        lock(&rendering.back).events.extend(event);
    } else if let Some((hub, at)) = rendering.hub() {
        slf.py().detach(|| match (source.event.id, &event) {
            (Some(id), event) => hub.put_rendered(at, id, event.as_ref()),
            (None, Some(notice)) => hub.lose_rendered(at, None, notice),
            (None, None) => {}
        });
    }
}

#[pymethods]
impl Rendering {
    #[new]
    #[pyo3(signature = (capacity, *_args, **_kwargs))]
    fn new(
        capacity: usize,
        _args: &Bound<'_, pyo3::types::PyTuple>,
        _kwargs: Option<&Bound<'_, pyo3::types::PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let client = Client::new(Kind::Renderer, capacity, "drop_oldest")?;
        let rendering = Rendering { place: OnceLock::new(), back: Mutex::default() };
        Ok(PyClassInitializer::from(client).add_subclass(rendering))
    }

    /// Begins: from now on it is put into `desk` when it has something to take.
    fn begin(
        slf: &Bound<'_, Self>,
        channels: Vec<Bound<'_, Channel>>,
        desk: &Bound<'_, Queue>,
        timeout: f64,
    ) -> PyResult<()> {
        let py = slf.py();
        let places = channel::places_of(py, &channels)?;
        let Some(first) = places.first() else { return Ok(()) };
        let keys: Vec<_> = places.iter().map(|place| place.key).collect();
        let heard = channel::heard_by_streams(&places);
        let core = &slf.as_super().get().core;
        let token = Draft {
            body: None,
            format: Format::Json,
            has_message: true,
            decoded: Some(Box::new(slf.clone().into_any().unbind())),
        };
        let mut desk = Some(Desk {
            queue: Arc::clone(&desk.as_super().get().core),
            token: Arc::new(Event::seal(token, None, None)),
            is_announced: false,
        });
        let at = loop {
            if let Some(bus) = &first.bus {
                let timeout = Duration::from_secs_f64(timeout);
                if let Err(error) = bus::prepare(py, bus, &heard, Resume::Fresh, timeout) {
                    slf.as_super().get().end(Reason::Closed);
                    return Err(error);
                }
            }
            if let Some(desk) = desk.take() {
                // Not before the bus is there: it holds this object until the end.
                core.set_desk(desk);
            }
            // None: between the two the bus let go of a channel that had no client.
            match first.hub.begin_rendering(&keys, core, Box::new(())) {
                Ok(Some(at)) => break at,
                Ok(None) => {}
                Err(error) => {
                    slf.as_super().get().end(Reason::Closed);
                    return Err(error.into());
                }
            }
        };
        // It begins once: the second time the client was refused.
        let _ = slf.get().place.set((Arc::downgrade(&first.hub), at));
        Ok(())
    }

    /// The next event of the sources, None when there is none now.
    fn take(slf: &Bound<'_, Self>) -> Option<SourceEvent> {
        let client = slf.as_super().get();
        if client.is_foreign() {
            return None;
        }
        match client.core.take() {
            Taken::Event(event) => Some(SourceEvent { event }),
            Taken::Empty | Taken::Closed => None,
        }
    }

    /// Events that wait to be taken.
    fn waiting(slf: &Bound<'_, Self>) -> usize {
        slf.as_super().get().core.len()
    }

    /// After all that was taken: it is put into the desk again when there is more.
    fn rest(slf: &Bound<'_, Self>) {
        let client = slf.as_super().get();
        if !client.is_foreign() {
            client.core.rest();
        }
    }

    /// Gives the clients what became of `source`, under its id. With `back`, it is from before the
    /// beginning, and kept until `read_back`.
    #[pyo3(signature = (source, data, *, json, event, retry, comment, limit, back))]
    #[allow(clippy::too_many_arguments, reason = "named arguments of one internal call")]
    fn put(
        slf: &Bound<'_, Self>,
        source: &SourceEvent,
        data: Option<&Bound<'_, PyString>>,
        json: bool,
        event: Option<&Bound<'_, PyString>>,
        retry: Option<u64>,
        comment: Option<&Bound<'_, PyString>>,
        limit: usize,
        back: bool,
    ) -> PyResult<()> {
        let body = Body::encode(&channel::fields(data, event, retry, comment)?, limit)?;
        let format = if json { Format::Json } else { Format::Text };
        let draft = Draft { has_message: body.has_data(), body: Some(body), format, decoded: None };
        let event = Arc::new(render(&source.event, draft));
        place(slf, source, Some(event), back);
        Ok(())
    }

    /// `source` gives the clients nothing.
    fn skip(slf: &Bound<'_, Self>, source: &SourceEvent, back: bool) {
        place(slf, source, None, back);
    }

    /// Gives the clients `source` as it is.
    fn pass_on(slf: &Bound<'_, Self>, source: &SourceEvent, back: bool) {
        place(slf, source, Some(Arc::clone(&source.event)), back);
    }

    /// Tells the clients that events were lost before `next`.
    fn lose(slf: &Bound<'_, Self>, next: &SourceEvent) {
        if let Some((hub, at)) = slf.get().hub() {
            let notice = Arc::new(Event::notice(frame::reset(Gap::TooOld.reason())));
            slf.py().detach(|| hub.lose_rendered(at, next.event.id, &notice));
        }
    }

    /// Whether something must be rendered before a client can resume after `last_event_id`.
    fn lacks(&self, last_event_id: &str) -> bool {
        let last = last_event_id.parse();
        let lacks = |(hub, at): (Arc<Hub>, _)| last.is_ok_and(|id| hub.lacks_rendered(at, id));
        self.hub().is_some_and(lacks)
    }

    /// Has the bus bring all that came after `last_event_id`.
    fn prepare(
        &self,
        py: Python<'_>,
        channels: Vec<Bound<'_, Channel>>,
        last_event_id: &str,
        timeout: f64,
    ) -> PyResult<()> {
        let Ok(last) = last_event_id.parse::<EventId>() else { return Ok(()) };
        let places = channel::places_of(py, &channels)?;
        if let Some(Place { bus: Some(bus), .. }) = places.first() {
            let timeout = Duration::from_secs_f64(timeout);
            let heard = channel::heard_by_streams(&places);
            bus::prepare(py, bus, &heard, Resume::After(last), timeout)?;
        }
        Ok(())
    }

    /// What the sources have after `last_event_id` and from before the beginning, oldest first.
    fn missing(&self, last_event_id: &str) -> Vec<SourceEvent> {
        let mut back = lock(&self.back);
        *back = Back::default();
        let (Some((hub, at)), Ok(last)) = (self.hub(), last_event_id.parse()) else {
            return Vec::new();
        };
        let Missing { events, floor, until } = hub.missing_rendered(at, last);
        back.range = Some((floor, until));
        events.into_iter().map(|event| SourceEvent { event }).collect()
    }

    /// Puts what was kept since `missing` before all that is there.
    fn read_back(&self) {
        let Back { events, range } = std::mem::take(&mut *lock(&self.back));
        if let (Some((hub, at)), Some(range)) = (self.hub(), range) {
            hub.read_back_rendered(at, range, events);
        }
    }

    /// Registers a stream. False when the rendering is over; otherwise why the stream does not get
    /// exactly what it missed, if so.
    fn register(
        &self,
        listener: &Bound<'_, Stream>,
        last_event_id: Option<&Bound<'_, PyString>>,
        retry: u64,
    ) -> PyResult<Registration> {
        let Some((hub, at)) = self.hub() else { return Ok(Registration::Over(false)) };
        let client = listener.as_super().get();
        let owner = Owner::Stream(PyWeakrefReference::new(listener)?.unbind());
        let resume = channel::resume_of(last_event_id);
        match hub.register_rendered(&client.core, at, resume, Box::new(owner))? {
            Some(registered) => Ok(Registration::Done(channel::open(listener, registered, retry))),
            None => Ok(Registration::Over(false)),
        }
    }

    /// Whether it has clients.
    #[getter]
    fn in_use(&self) -> bool {
        self.hub().is_some_and(|(hub, at)| hub.has_rendered_clients(at))
    }

    /// Ends it, if it had no client for `patience` seconds. Gives whether it is over.
    fn end(slf: &Bound<'_, Self>, patience: &Bound<'_, PyAny>) -> PyResult<bool> {
        let client = slf.as_super().get();
        let patience = duration(Some(patience), "patience")?.unwrap_or(Duration::MAX);
        if client.is_foreign() {
            return Ok(true);
        }
        let Some((hub, at)) = slf.get().hub() else {
            client.end(Reason::Closed);
            return Ok(true);
        };
        let is_over = hub.end_rendering(at, &client.core, patience);
        if is_over {
            channel::tell_left(&hub);
        }
        Ok(is_over)
    }
}

/// How a registration went, as Python is told.
#[derive(IntoPyObject)]
pub enum Registration {
    /// There is no rendering any more.
    Over(bool),
    /// Why the client does not get exactly what it missed, if so.
    Done(Option<&'static str>),
}
