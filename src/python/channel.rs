//! Channels as Python sees them: publishing, registering, listing and figures.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyWeakrefReference};

use crate::bus::{Bus, Publication};
use crate::control;
use crate::error::Error;
use crate::event::{Draft, Format};
use crate::frame::{self, Body, Fields};
use crate::hub::{ChannelFigures, ChannelKey, Hub, Registered, Resume};
use crate::metrics::{BOUNDS, Counters, Reason, Snapshot};
use crate::process::{self, Process};
use crate::python::bus;
use crate::python::client::{Client, Owner};
use crate::python::message::utf8;
use crate::python::queue::Queue;
use crate::python::stream::Stream;
use crate::queue::Kind;
use crate::sync::lock;

/// A channel by name, or a private one without.
#[pyclass(frozen, weakref, module = "sse_channel._sse_channel")]
pub struct Channel {
    name: Option<Arc<str>>,
    history: usize,
    /// Where it is in this process; found anew after a fork. Held for a look.
    place: Mutex<Option<Place>>,
}

/// Where a channel is in this process.
#[derive(Clone)]
pub struct Place {
    generation: u64,
    era: u64,
    /// Its hub.
    pub hub: Arc<Hub>,
    /// Its place there.
    pub key: ChannelKey,
    counters: Arc<Counters>,
    /// `None` for a private channel: its hub orders and remembers.
    pub bus: Option<Arc<dyn Bus>>,
}

impl Channel {
    fn is_current(&self, place: &Place) -> bool {
        place.generation == process::generation()
            && (place.era == process::era() || self.name.is_none())
    }

    fn place(&self, py: Python<'_>) -> PyResult<Place> {
        if let Some(known) = lock(&self.place).as_ref()
            && self.is_current(known)
        {
            return Ok(known.clone());
        }
        // Before the bus is asked for: if another comes meanwhile, it is looked for again.
        let era = process::era();
        let (hub, bus) = match self.name {
            Some(_) => {
                let named = bus::named(py)?;
                (named.hub, Some(named.bus))
            }
            None => (Process::current().private_hub(), None),
        };
        let key = hub.channel(self.name.as_deref().unwrap_or_default(), self.history);
        let mut place = lock(&self.place);
        if let Some(known) = place.as_ref() {
            // Another thread was here meanwhile.
            if self.is_current(known) {
                return Ok(known.clone());
            }
        }
        let counters = hub.counters(key).unwrap_or_default();
        let generation = process::generation();
        let found = Place { generation, era, hub, key, counters, bus };
        let former = place.replace(found.clone());
        drop(place);
        if former.as_ref().is_some_and(|former| former.generation != generation) {
            // The parent's hub is left as it is: dropping it would touch its locks.
            std::mem::forget(former);
        }
        Ok(found)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let place = lock(&self.place).take();
        if place.as_ref().is_some_and(|place| place.generation != process::generation()) {
            // The parent's hub, and locks that a lost thread may hold.
            std::mem::forget(place);
        }
    }
}

#[pymethods]
impl Channel {
    #[new]
    fn new(name: Option<&Bound<'_, PyString>>, history: usize) -> PyResult<Channel> {
        let name = name.map(|name| utf8(name, "the channel's name")).transpose()?;
        Ok(Channel { name: name.map(Arc::from), history, place: Mutex::new(None) })
    }

    #[getter]
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Encodes and publishes; gives the event's id.
    #[pyo3(signature = (data, *, json, event, retry, comment, limit, timeout, message))]
    #[allow(clippy::too_many_arguments, reason = "named arguments of one internal call")]
    fn publish(
        &self,
        py: Python<'_>,
        data: Option<&Bound<'_, PyString>>,
        json: bool,
        event: Option<&Bound<'_, PyString>>,
        retry: Option<u64>,
        comment: Option<&Bound<'_, PyString>>,
        limit: usize,
        timeout: f64,
        message: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let fields = fields(data, event, retry, comment)?;
        let body = Body::encode(&fields, limit)?;
        let format = if json { Format::Json } else { Format::Text };
        let place = self.place(py)?;
        let id = match (&self.name, &place.bus) {
            (Some(name), Some(bus)) => {
                let channel = Arc::clone(name);
                let history = self.history;
                let publication = Publication { channel, history, body, format, heard_by: None };
                bus::publish(py, bus, publication, Duration::from_secs_f64(timeout))?
            }
            _ => {
                let has_message = body.has_data();
                let decoded = message.map(|message| Box::new(message) as _);
                let draft = Draft { body: Some(body), format, has_message, decoded };
                place.hub.publish(place.key, draft)?
            }
        };
        place.counters.published().fetch_add(1, Relaxed);
        Ok(id.to_string())
    }

    /// `publish` for asyncio: the id, or an awaitable for it. Not for private channels.
    #[pyo3(signature = (data, *, json, event, retry, comment, limit, timeout))]
    #[allow(clippy::too_many_arguments, reason = "named arguments of one internal call")]
    fn publish_later<'py>(
        &self,
        py: Python<'py>,
        data: Option<&Bound<'_, PyString>>,
        json: bool,
        event: Option<&Bound<'_, PyString>>,
        retry: Option<u64>,
        comment: Option<&Bound<'_, PyString>>,
        limit: usize,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let fields = fields(data, event, retry, comment)?;
        let body = Body::encode(&fields, limit)?;
        let format = if json { Format::Json } else { Format::Text };
        let place = self.place(py)?;
        let (Some(name), Some(bus)) = (&self.name, &place.bus) else {
            return Err(PyTypeError::new_err("a private channel has no bus to wait for"));
        };
        let channel = Arc::clone(name);
        let history = self.history;
        let publication = Publication { channel, history, body, format, heard_by: None };
        let timeout = Duration::from_secs_f64(timeout);
        let counters = Arc::clone(&place.counters);
        bus::publish_later(py, bus, publication, timeout, move |id| {
            counters.published().fetch_add(1, Relaxed);
            id.to_string()
        })
    }

    /// Publishes an object that has no wire form to the queues of a private channel; None, and
    /// nothing sent, when streams are open that could not have it.
    fn publish_object(&self, py: Python<'_>, message: Py<PyAny>) -> PyResult<Option<String>> {
        let draft = Draft {
            body: None,
            format: Format::Json,
            has_message: true,
            decoded: Some(Box::new(message)),
        };
        let place = self.place(py)?;
        match place.hub.publish(place.key, draft) {
            Ok(id) => {
                place.counters.published().fetch_add(1, Relaxed);
                Ok(Some(id.to_string()))
            }
            Err(Error::NotEncodable) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What tells it from all other channels of the process.
    fn number(&self, py: Python<'_>) -> PyResult<u64> {
        let place = self.place(py)?;
        Ok(place.hub.number(place.key))
    }

    /// Disconnects the streams of this channel, those of `user` alone if one is given; what
    /// waits for them is not sent. In this process.
    fn revoke(&self, py: Python<'_>, user: Option<&Bound<'_, PyString>>) -> PyResult<()> {
        let place = self.place(py)?;
        let user = user.map(|user| utf8(user, "the user").map(Arc::from)).transpose()?;
        let process = Process::current();
        // A private one has the empty name, in a hub of its own.
        let name = self.name.clone().unwrap_or_default();
        py.detach(|| control::revoke(&place.hub, Some(process.offload()), Some(name), user));
        Ok(())
    }

    fn listener_count(&self, py: Python<'_>) -> PyResult<usize> {
        let place = self.place(py)?;
        Ok(place.hub.client_count(place.key))
    }

    fn listeners<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let place = self.place(py)?;
        let clients = place.hub.clients(place.key);
        let owners = clients.iter().filter_map(|client| {
            client.with_owner(|owner| owner?.downcast_ref::<Owner>()?.upgrade(py))
        });
        PyList::new(py, owners.collect::<Vec<_>>())
    }

    fn has_listener(&self, py: Python<'_>, client: &Client) -> PyResult<bool> {
        let place = self.place(py)?;
        Ok(!client.is_foreign() && place.hub.has_client(place.key, &client.core))
    }

    fn unlisten(&self, py: Python<'_>, client: &Client) -> PyResult<bool> {
        Ok(self.has_listener(py, client)? && client.end(Reason::Closed))
    }

    fn figures<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let place = self.place(py)?;
        as_dict(py, &place.hub.figures(place.key))
    }
}

/// The fields of an event, as Rust strings.
pub fn fields<'a>(
    data: Option<&'a Bound<'_, PyString>>,
    event: Option<&'a Bound<'_, PyString>>,
    retry: Option<u64>,
    comment: Option<&'a Bound<'_, PyString>>,
) -> PyResult<Fields<'a>> {
    Ok(Fields {
        data: data.map(|data| utf8(data, "the message")).transpose()?,
        event: event.map(|event| utf8(event, "the event name")).transpose()?,
        retry,
        comment: comment.map(|comment| utf8(comment, "the comment")).transpose()?,
    })
}

/// The bytes of an event without an id.
#[pyfunction]
#[pyo3(signature = (data, *, event, retry, comment, limit))]
pub fn encode_frame<'py>(
    py: Python<'py>,
    data: Option<&Bound<'py, PyString>>,
    event: Option<&Bound<'py, PyString>>,
    retry: Option<u64>,
    comment: Option<&Bound<'py, PyString>>,
    limit: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let body = Body::encode(&fields(data, event, retry, comment)?, limit)?;
    Ok(PyBytes::new(py, &body.seal(None).0))
}

/// Prepares the registration with channels of one bus: an awaitable, or None when it is done.
#[pyfunction]
pub fn prepare<'py>(
    py: Python<'py>,
    channels: Vec<Bound<'py, Channel>>,
    last_event_id: Option<&Bound<'py, PyString>>,
    timeout: f64,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let places = places_of(py, &channels)?;
    let Some(Place { bus: Some(bus), .. }) = places.first() else { return Ok(None) };
    let timeout = Duration::from_secs_f64(timeout);
    let keys = heard_by_streams(&places);
    bus::prepare_later(py, bus, &keys, resume_of(last_event_id), timeout)
}

/// What the bus must hear for a stream of those channels: when it is to be disconnected, too.
pub fn heard_by_streams(places: &[Place]) -> Vec<ChannelKey> {
    let own = places.first().map(|first| first.hub.own()).unwrap_or_default();
    places.iter().map(|place| place.key).chain(own).collect()
}

/// Where the channels are, which must be of one hub.
pub fn places_of(py: Python<'_>, channels: &[Bound<'_, Channel>]) -> PyResult<Vec<Place>> {
    let places = channels.iter().map(|channel| channel.get().place(py));
    let places = places.collect::<PyResult<Vec<Place>>>()?;
    let Some(first) = places.first() else {
        return Err(PyTypeError::new_err("name at least one channel"));
    };
    if places.iter().any(|place| !Arc::ptr_eq(&place.hub, &first.hub)) {
        return Err(pyo3::exceptions::PyValueError::new_err(
            "a private channel (one without a name) shares no order of events with others; \
             give each of the channels a name, or open a stream for each",
        ));
    }
    Ok(places)
}

/// Where a client with that last event id wants to begin.
pub fn resume_of(last_event_id: Option<&Bound<'_, PyString>>) -> Resume {
    match last_event_id.map(|text| text.to_str()) {
        None | Some(Ok("")) => Resume::Fresh,
        Some(Ok(text)) => text.parse().map_or(Resume::Unknown, Resume::After),
        Some(Err(_)) => Resume::Unknown,
    }
}

/// Registers a queue or a stream with channels of one bus; what it missed comes first. Gives why
/// it does not get exactly that, if so. A stream's opening goes before everything.
#[pyfunction]
pub fn register(
    listener: &Bound<'_, Client>,
    channels: Vec<Bound<'_, Channel>>,
    last_event_id: Option<&Bound<'_, PyString>>,
    retry: u64,
    timeout: f64,
) -> PyResult<Option<&'static str>> {
    let py = listener.py();
    let places = places_of(py, &channels)?;
    let Some(first) = places.first() else { return Ok(None) };
    let resume = resume_of(last_event_id);
    let client = listener.get();
    let stream = listener.cast::<Stream>().ok();
    let keys: Vec<ChannelKey> = places.iter().map(|place| place.key).collect();
    let timeout = Duration::from_secs_f64(timeout);
    let heard = if stream.is_some() { heard_by_streams(&places) } else { keys.clone() };
    let registered = loop {
        if let Some(bus) = &first.bus {
            bus::prepare(py, bus, &heard, resume, timeout)?;
        }
        let owner = match client.core.kind() {
            Kind::Stream => Owner::Stream(PyWeakrefReference::new(listener)?.unbind()),
            _ => Owner::Queue(listener.clone().into_any().unbind()),
        };
        // None: between the two the bus let go of a channel that had no client.
        if let Some(done) = first.hub.register(&client.core, &keys, resume, Box::new(owner))? {
            break done;
        }
    };
    if let Some(stream) = stream {
        return Ok(open(stream, registered, retry));
    }
    let reason = registered.gap.map(|gap| gap.reason());
    client.set_reset(reason);
    Ok(reason)
}

/// Gives a stream that is registered its opening. Gives why it does not get exactly what it missed.
pub fn open(
    stream: &Bound<'_, Stream>,
    registered: Registered,
    retry: u64,
) -> Option<&'static str> {
    let reason = registered.gap.map(|gap| gap.reason());
    let client = stream.as_super().get();
    client.set_reset(reason);
    stream.get().set_cursor(registered.cursor);
    stream.get().prepend([frame::opening(retry, registered.cursor)]);
    stream.get().prepend(reason.map(frame::reset));
    if let Some(slot) = client.core.slot() {
        slot.tell_begin();
    }
    let process = Process::current();
    process.set_retry(retry);
    if let Some(farewell) = process.farewell() {
        // The end of all streams may have come before it was one of them.
        client.core.set_farewell(&farewell);
        client.end(Reason::Exit);
    }
    reason
}

/// Tells the bus, if it is that hub's, that a client is gone.
pub fn tell_left(hub: &Arc<Hub>) {
    if let Some(named) = Process::current().named()
        && Arc::ptr_eq(&named.hub, hub)
    {
        named.bus.left();
    }
}

/// How often streams of named channels were disconnected here; None while nobody would tell of it.
#[pyfunction]
pub fn revocations() -> Option<u64> {
    let process = Process::current();
    let named = process.named()?;
    let begun = named.hub.control_begun()?;
    Some(begun + process.control().map_or(0, |control| control.done()))
}

/// Puts into `watcher` which streams begin and end, as URL-encoded text; the first watcher holds.
#[pyfunction]
pub fn watch_streams(watcher: &Bound<'_, Queue>) {
    Process::current().admission().watch(&watcher.as_super().get().core);
}

/// The figures of every named channel of this process.
#[pyfunction]
pub fn figures(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let all = PyDict::new(py);
    if let Some(named) = Process::current().named() {
        for channel in named.hub.all_figures() {
            all.set_item(&*channel.name, as_dict(py, &channel)?)?;
        }
    }
    Ok(all)
}

/// Ends all streams and the bus; the next use of a named channel begins it by the options of then.
#[pyfunction]
pub fn begin_bus_anew(py: Python<'_>) {
    let process = Process::current();
    py.detach(|| process.begin_bus_anew());
}

/// Ends every client of this process, at the interpreter's exit.
#[pyfunction]
pub fn close_all(py: Python<'_>) {
    let process = Process::current();
    // Threads that hand a result over need the interpreter to come to their end.
    py.detach(|| process.close(Reason::Exit));
}

fn as_dict<'py>(py: Python<'py>, figures: &ChannelFigures) -> PyResult<Bound<'py, PyDict>> {
    let clients = [figures.queues, figures.streams, figures.sockets];
    let dict = snapshot_as_dict(py, &figures.counters.snapshot(), clients)?;
    let history = PyDict::new(py);
    history.set_item("events", figures.history_events)?;
    history.set_item("bytes", figures.history_bytes)?;
    dict.set_item("history", history)?;
    Ok(dict)
}

/// The figures of a channel, with its queues, streams and sockets.
pub fn snapshot_as_dict<'py>(
    py: Python<'py>,
    snapshot: &Snapshot,
    [queues, streams, sockets]: [usize; 3],
) -> PyResult<Bound<'py, PyDict>> {
    let clients = PyDict::new(py);
    clients.set_item("queue", queues)?;
    clients.set_item("stream", streams)?;
    clients.set_item("socket", sockets)?;
    let disconnected = PyDict::new(py);
    for reason in Reason::ALL {
        disconnected.set_item(reason.name(), snapshot.disconnected(reason))?;
    }
    let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
    let delay = PyDict::new(py);
    delay.set_item("le", BOUNDS.map(seconds))?;
    delay.set_item("counts", snapshot.delays())?;
    delay.set_item("sum", seconds(snapshot.delay_sum()))?;
    let dict = PyDict::new(py);
    dict.set_item("clients", clients)?;
    dict.set_item("published", snapshot.published())?;
    dict.set_item("received", snapshot.received())?;
    dict.set_item("delivered", snapshot.delivered())?;
    dict.set_item("dropped", snapshot.dropped())?;
    dict.set_item("bytes", snapshot.bytes())?;
    dict.set_item("disconnected", disconnected)?;
    dict.set_item("delay", delay)?;
    Ok(dict)
}
