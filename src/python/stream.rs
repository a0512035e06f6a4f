//! The stream that a Python server pulls bytes from: whole frames, several a step when they wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use pyo3::exceptions::{PyRuntimeError, PyStopIteration, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::clients::{Holder, Most};
use crate::coding::{Blocks, Coding, GZIP_HEADER, Sum, gzip_end};
use crate::event::Event;
use crate::event_id::{EventId, now_ms};
use crate::frame::HEARTBEAT;
use crate::metrics::Reason;
use crate::process::Process;
use crate::python::client::{Client, duration};
use crate::python::{errors, message, wait};
use crate::queue::{Kind, Taken, drain};
use crate::sync::lock;

/// A step ends after this many bytes, so that a long backlog is not one huge object.
const STEP: usize = 64 << 10;

/// A client whose frames a Python server takes.
#[pyclass(frozen, subclass, extends = Client, module = "sse_channel._sse_channel")]
pub struct Stream {
    /// Tests change it, so that waiting for events has an end.
    heartbeat: Mutex<Option<Duration>>,
    /// What goes out before anything live: the opening, a reset.
    prelude: Mutex<VecDeque<Bytes>>,
    /// Where it was registered.
    cursor: OnceLock<EventId>,
    /// Makes the first payload, once, after the prelude.
    initial: Mutex<Option<Py<PyAny>>>,
    ended: AtomicBool,
    /// Opens the stream at its first step, where that could not be done at once: a callable, told
    /// whether it may wait itself.
    opener: Mutex<Option<Py<PyAny>>>,
    has_opener: AtomicBool,
    /// Where its gzip stream is, if it is to be one.
    gzip: Mutex<Option<Gzip>>,
}

/// How far a gzip stream is.
#[derive(Default)]
struct Gzip {
    is_begun: bool,
    /// Of the text so far.
    sum: Sum,
}

/// What a step begins with.
enum Step<'py> {
    /// Bytes for the wire.
    Chunk(Bound<'py, PyBytes>),
    /// The callable whose result comes next.
    Initial(Py<PyAny>),
    /// Nothing waits.
    Idle,
    /// The stream is over.
    End,
}

impl Stream {
    /// Adds to what goes out first.
    pub fn prepend(&self, frames: impl IntoIterator<Item = Bytes>) {
        lock(&self.prelude).extend(frames);
    }

    /// How long it may be idle until a heartbeat is sent.
    pub fn every(&self) -> Option<Duration> {
        *lock(&self.heartbeat)
    }

    /// Notes where it was registered.
    pub fn set_cursor(&self, cursor: EventId) {
        // A stream registers once.
        let _ = self.cursor.set(cursor);
    }

    /// Where it was registered, and what goes out before anything live; `None` for one that is not
    /// open, or of which something was taken already.
    pub fn beginning(&self) -> Option<(EventId, Vec<u8>)> {
        let prelude = lock(&self.prelude);
        if prelude.is_empty() || self.ended.load(Relaxed) {
            return None;
        }
        Some((*self.cursor.get()?, prelude.iter().flatten().copied().collect()))
    }

    /// How its bytes are coded.
    pub fn coding(&self) -> Coding {
        if lock(&self.gzip).is_some() { Coding::Gzip } else { Coding::Identity }
    }

    /// It gives nothing more: it is through, or its client was taken over.
    pub fn set_ended(&self) {
        self.ended.store(true, Relaxed);
        lock(&self.prelude).clear();
    }

    /// What there is without waiting.
    fn step<'py>(slf: &Bound<'py, Self>) -> Step<'py> {
        let py = slf.py();
        let stream = slf.get();
        let client = slf.as_super().get();
        if client.is_foreign() {
            return Step::End;
        }
        let prelude = std::mem::take(&mut *lock(&stream.prelude));
        if !prelude.is_empty() {
            let text: Vec<u8> = prelude.iter().flatten().copied().collect();
            let is_all = stream.ended.load(Relaxed);
            return Step::Chunk(stream.coded(py, &text, is_all));
        }
        if stream.ended.load(Relaxed) {
            return Step::End;
        }
        let initial = lock(&stream.initial).take();
        if let Some(initial) = initial {
            return Step::Initial(initial);
        }
        match client.core.take() {
            Taken::Event(event) => Step::Chunk(stream.chunk(py, client, &event)),
            Taken::Empty => Step::Idle,
            Taken::Closed => {
                stream.set_ended();
                let farewell = client.core.farewell().map(|farewell| farewell.frame());
                if farewell.is_none() && stream.coding() == Coding::Identity {
                    return Step::End;
                }
                Step::Chunk(stream.coded(py, farewell.unwrap_or_default().as_bytes(), true))
            }
        }
    }

    /// Frames that are this stream's alone, as they go out; with `is_last`, the end behind them.
    fn coded<'py>(&self, py: Python<'py>, text: &[u8], is_last: bool) -> Bound<'py, PyBytes> {
        if self.coding() == Coding::Identity {
            return PyBytes::new(py, text);
        }
        let blocks = py.detach(|| Blocks::of(text));
        let mut chunk = Vec::with_capacity(blocks.bytes().len() + 20);
        self.gzip_more(&blocks, &mut chunk);
        if is_last && let Some(gzip) = &*lock(&self.gzip) {
            chunk.extend_from_slice(&gzip_end(gzip.sum));
        }
        PyBytes::new(py, &chunk)
    }

    /// Goes on with the gzip stream in `chunk`.
    fn gzip_more(&self, blocks: &Blocks, chunk: &mut Vec<u8>) {
        if let Some(gzip) = &mut *lock(&self.gzip) {
            if !std::mem::replace(&mut gzip.is_begun, true) {
                chunk.extend_from_slice(&GZIP_HEADER);
            }
            gzip.sum.append(blocks.part());
            chunk.extend_from_slice(blocks.bytes());
        }
    }

    /// `first` and what waits behind it, as one object.
    fn chunk<'py>(&self, py: Python<'py>, client: &Client, first: &Event) -> Bound<'py, PyBytes> {
        let coding = self.coding();
        let mut size = first.frame.len();
        if coding == Coding::Identity && (size >= STEP || client.core.is_empty()) {
            client.core.count_taken(first, size, now_ms());
            return PyBytes::new(py, &first.frame);
        }
        let more = if size >= STEP {
            VecDeque::new()
        } else {
            drain(&client.core, |event| {
                size += event.frame.len();
                size >= STEP
            })
        };
        let mut chunk = Vec::with_capacity(size);
        let now = now_ms();
        for event in std::iter::once(first).chain(more.iter().map(Arc::as_ref)) {
            if coding == Coding::Identity {
                client.core.count_taken(event, event.frame.len(), now);
                chunk.extend_from_slice(&event.frame);
                continue;
            }
            if !event.is_compressed() {
                // It takes a while, or another thread is at it.
                py.detach(|| event.compressed());
            }
            client.core.count_taken(event, event.compressed().bytes().len(), now);
            self.gzip_more(event.compressed(), &mut chunk);
        }
        PyBytes::new(py, &chunk)
    }

    fn finish(slf: &Bound<'_, Self>, reason: Reason) {
        let client = slf.as_super().get();
        if !client.is_foreign() {
            slf.get().set_ended();
            client.end(reason);
        }
    }
}

/// The first payload's bytes, from its callable; none for an empty one.
#[cold]
fn first_payload<'py>(initial: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let py = initial.py();
    let first = initial.call1((false,)).map_err(|raised| {
        if !raised.is_instance_of::<PyStopIteration>(py) {
            return raised;
        }
        // As in a generator: it must not look like the end of the stream.
        let error = PyRuntimeError::new_err("initial raised StopIteration");
        error.set_cause(py, Some(raised));
        error
    })?;
    let first = first.cast_into::<PyBytes>()?;
    Ok(Some(first).filter(|first| !first.as_bytes().is_empty()))
}

#[pymethods]
impl Stream {
    #[new]
    #[pyo3(signature = (capacity, overflow, heartbeat, *, most=Some((0, 0, 0)), user=None, address=None, channels=None))]
    #[pyo3(
        text_signature = "(capacity, overflow, heartbeat, *, most=(0, 0, 0), user=None, address=None, channels=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "named arguments of one internal call")]
    fn new(
        py: Python<'_>,
        capacity: usize,
        overflow: &str,
        heartbeat: Option<&Bound<'_, PyAny>>,
        most: Option<(usize, usize, usize)>,
        user: Option<&Bound<'_, PyString>>,
        address: Option<&Bound<'_, PyString>>,
        channels: Option<&Bound<'_, PyString>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let below = |seconds: &Bound<'_, PyAny>| seconds.extract().is_ok_and(|s: f64| s <= 0.0);
        let is_none = heartbeat.is_some_and(below);
        let heartbeat =
            if is_none { Some(Duration::ZERO) } else { duration(heartbeat, "heartbeat")? };
        if heartbeat.is_some_and(|every| every.is_zero()) {
            return Err(PyValueError::new_err(
                "'heartbeat' must be more than 0 seconds, or None for no heartbeat",
            ));
        }
        let client = Client::new(Kind::Stream, capacity, overflow)?;
        let process = Process::current();
        let mut prelude = VecDeque::new();
        let farewell = process.farewell();
        if let Some(farewell) = &farewell {
            // All that it has to say, even in a full process: all streams end.
            prelude.push_back(Bytes::from(farewell.frame()));
            client.end(Reason::Exit);
        } else {
            let text = |text: Option<&Bound<'_, PyString>>, what| {
                text.map(|text| message::utf8(text, what).map(Arc::from)).transpose()
            };
            let holder = Holder {
                user: text(user, "the user")?,
                address: text(address, "the address")?,
                channels: text(channels, "the channels")?,
            };
            let most =
                most.map(|(streams, of_user, of_address)| Most { streams, of_user, of_address });
            let slot = process.admission().take(most, holder);
            let slot = slot.map_err(|full| errors::full(py, full.name()))?;
            client.core.set_slot(Arc::new(slot));
        }
        let stream = Stream {
            heartbeat: Mutex::new(heartbeat),
            prelude: Mutex::new(prelude),
            cursor: OnceLock::new(),
            initial: Mutex::new(None),
            ended: AtomicBool::new(farewell.is_some()),
            opener: Mutex::new(None),
            has_opener: AtomicBool::new(false),
            gzip: Mutex::new(None),
        };
        Ok(PyClassInitializer::from(client).add_subclass(stream))
    }

    /// Seconds of idleness after which a comment is sent; None for never.
    #[getter]
    fn heartbeat(&self) -> Option<f64> {
        self.every().map(|every| every.as_secs_f64())
    }

    /// From the next step on.
    fn _set_heartbeat(&self, heartbeat: &Bound<'_, PyAny>) -> PyResult<()> {
        let heartbeat = duration(Some(heartbeat), "heartbeat")?;
        *lock(&self.heartbeat) = heartbeat;
        Ok(())
    }

    fn __iter__<'py>(slf: Bound<'py, Self>) -> Bound<'py, Self> {
        slf
    }

    /// One or more whole frames, waiting for them in the way of the caller, as `Queue.get`.
    ///
    /// What is raised while it waits, or by the first payload's callable, ends the stream.
    fn __next__<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let py = slf.py();
        let stream = slf.get();
        let client = slf.as_super().get();
        if let Some(opener) = stream._take_opener()
            && let Err(raised) = opener.call0(py)
        {
            Stream::finish(slf, Reason::Closed);
            return Err(raised);
        }
        loop {
            let stepped = match Stream::step(slf) {
                Step::Chunk(chunk) => return Ok(Some(chunk)),
                Step::End => return Ok(None),
                Step::Initial(initial) => first_payload(initial.bind(py))
                    .map(|first| first.map(|first| stream._coded(&first))),
                Step::Idle => wait::take(py, client, stream.every()).map(|taken| match taken {
                    Taken::Event(event) => Some(stream.chunk(py, client, &event)),
                    Taken::Empty => Some(stream.coded(py, HEARTBEAT, false)),
                    Taken::Closed => None,
                }),
            };
            match stepped {
                Ok(Some(chunk)) => return Ok(Some(chunk)),
                // An empty first payload, or the end: the next look tells.
                Ok(None) => {}
                Err(raised) => {
                    // As a generator would: what is raised through it ends it.
                    Stream::finish(slf, Reason::Closed);
                    return Err(raised);
                }
            }
        }
    }

    /// Without waiting: bytes, b"" when nothing waits, None at the end, or the callable of the
    /// first payload.
    fn _step<'py>(slf: &Bound<'py, Self>) -> Option<Bound<'py, PyAny>> {
        let py = slf.py();
        match Stream::step(slf) {
            Step::Chunk(chunk) => Some(chunk.into_any()),
            Step::Initial(initial) => Some(initial.into_bound(py)),
            Step::Idle => Some(PyBytes::new(py, b"").into_any()),
            Step::End => None,
        }
    }

    /// Have it give a gzip stream; to be called before its first step.
    fn _compress(&self) {
        lock(&self.gzip).get_or_insert_default();
    }

    /// Whether it gives a gzip stream.
    #[getter]
    fn _is_compressed(&self) -> bool {
        self.coding() == Coding::Gzip
    }

    /// Frames from elsewhere as this stream gives them, in their place.
    fn _coded<'py>(&self, frames: &Bound<'py, PyBytes>) -> Bound<'py, PyBytes> {
        if self.coding() == Coding::Identity {
            return frames.clone();
        }
        self.coded(frames.py(), frames.as_bytes(), false)
    }

    /// Have the first step open the stream by calling `opener`.
    fn _set_opener(&self, opener: Py<PyAny>) {
        *lock(&self.opener) = Some(opener);
        self.has_opener.store(true, Relaxed);
    }

    /// What opens the stream, given once; None for one that is open, or closed already.
    fn _take_opener(&self) -> Option<Py<PyAny>> {
        if !self.has_opener.swap(false, Relaxed) || self.ended.load(Relaxed) {
            return None;
        }
        lock(&self.opener).take()
    }

    fn _set_initial(&self, initial: Py<PyAny>) {
        *lock(&self.initial) = Some(initial);
    }

    /// The callable of the first payload, given once: its argument says whether somebody can await.
    fn _take_initial(&self) -> Option<Py<PyAny>> {
        lock(&self.initial).take()
    }

    /// End the stream at once: a waiting step ends, what waits is not sent.
    fn close(slf: &Bound<'_, Self>) {
        Stream::finish(slf, Reason::Closed);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(initial) = self.initial.try_lock()
            && let Some(initial) = initial.as_ref()
        {
            visit.call(initial)?;
        }
        if let Ok(opener) = self.opener.try_lock()
            && let Some(opener) = opener.as_ref()
        {
            visit.call(opener)?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let _initial = lock(&self.initial).take();
        let _opener = lock(&self.opener).take();
    }
}
