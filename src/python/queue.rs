//! The queue that Python code reads: `queue.Queue`'s reading side.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::event::{Draft, Event, Format};
use crate::event_id::now_ms;
use crate::metrics::Reason;
use crate::python::client::{Client, duration};
use crate::python::{errors, message, wait};
use crate::queue::{Kind, Taken};
use crate::wake::WakeBatch;

const FOREIGN: &str = "this queue belongs to the process that this one was forked from; \
                       call listen() again in this process";

/// A client whose messages Python code takes.
#[pyclass(frozen, subclass, extends = Client, module = "sse_channel._sse_channel")]
pub struct Queue {
    /// Whether a reader was told that it is closed.
    told_closed: AtomicBool,
}

/// Anything that Python takes for true or false, as `queue.Queue` does.
struct Truth(bool);

impl<'py> FromPyObject<'_, 'py> for Truth {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Truth> {
        object.is_truthy().map(Truth)
    }
}

/// Its id, its frame and its message.
type TakenEvent<'py> = (Option<String>, Bound<'py, PyBytes>, Py<PyAny>);

fn client<'a>(slf: &'a Bound<'_, Queue>) -> &'a Client {
    slf.as_super().get()
}

/// The message, or the exception that says why there is none.
#[inline(never)]
fn give(py: Python<'_>, client: &Client, taken: Taken) -> PyResult<Py<PyAny>> {
    match taken {
        Taken::Event(event) => {
            client.core.count_taken(&event, 0, now_ms());
            message::of(py, &event)
        }
        Taken::Empty => Err(errors::empty(py)),
        Taken::Closed if client.is_foreign() => Err(errors::closed(py, FOREIGN)),
        Taken::Closed => Err(errors::closed(py, "the queue is closed and nothing is left in it")),
    }
}

fn take_now(client: &Client) -> Taken {
    if client.is_foreign() { Taken::Closed } else { client.core.take() }
}

impl Queue {
    /// Waits as an empty queue would, from the second time on that a reader learns of the close:
    /// a loop that knows only `Empty` and answers it with a heartbeat would spin otherwise.
    #[cold]
    #[inline(never)]
    fn pause_if_told(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<()> {
        if self.told_closed.swap(true, Relaxed) && timeout.is_some() {
            let never_anything = Client::new(Kind::Queue, 1, "drop_oldest")?;
            wait::take(py, &never_anything, timeout)?;
        }
        Ok(())
    }
}

#[pymethods]
impl Queue {
    #[new]
    fn new(capacity: usize, overflow: &str) -> PyResult<PyClassInitializer<Self>> {
        let client = Client::new(Kind::Queue, capacity, overflow)?;
        Ok(PyClassInitializer::from(client)
            .add_subclass(Queue { told_closed: AtomicBool::new(false) }))
    }

    /// Take the oldest message, waiting for one if `block`.
    ///
    /// A thread waits with the GIL released, a greenlet lets its hub run others; in the main
    /// thread, signals (Ctrl-C) interrupt the wait. What raises out of it leaves the message in
    /// the queue. In a coroutine it would block the loop: `aget` is for there.
    ///
    /// Args:
    ///     block: whether to wait at all.
    ///     timeout: seconds to wait; None waits for ever.
    ///
    /// Raises:
    ///     queue.Empty: nothing came within `timeout`, or there is nothing and `block` is false,
    ///         or it is called from a callback of gevent's hub, which cannot wait.
    ///     ChannelClosed: the queue is closed and nothing is left in it.
    ///     TypeError: a `timeout` that is no number.
    ///     ValueError: a negative `timeout`.
    #[pyo3(signature = (block = Truth(true), timeout = None))]
    #[pyo3(text_signature = "($self, block=True, timeout=None)")]
    fn get(
        slf: &Bound<'_, Self>,
        py: Python<'_>,
        block: Truth,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let Truth(block) = block;
        let client = client(slf);
        let timeout = duration(timeout, "timeout")?;
        let taken = if block { wait::take(py, client, timeout)? } else { take_now(client) };
        if matches!(taken, Taken::Closed) {
            slf.get().pause_if_told(py, timeout.filter(|_| block))?;
        }
        give(py, client, taken)
    }

    /// Whether a reader was told of the close before; from now on one was.
    fn _tell_closed(&self) -> bool {
        self.told_closed.swap(true, Relaxed)
    }

    /// The oldest event without waiting: its id, its frame (b"" for an object that has no wire form)
    /// and its message. None when there is none.
    fn _take_event<'py>(
        slf: &Bound<'py, Self>,
        py: Python<'py>,
    ) -> PyResult<Option<TakenEvent<'py>>> {
        let client = client(slf);
        let Taken::Event(event) = take_now(client) else { return Ok(None) };
        let id = event.id.map(|id| id.to_string());
        let frame = PyBytes::new(py, &event.frame);
        Ok(Some((id, frame, give(py, client, Taken::Event(event))?)))
    }

    /// Take the oldest message without waiting.
    ///
    /// Raises:
    ///     queue.Empty: there is none.
    ///     ChannelClosed: the queue is closed and nothing is left in it.
    fn get_nowait(slf: &Bound<'_, Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        give(py, client(slf), take_now(client(slf)))
    }

    /// Put `item` into this queue alone.
    ///
    /// Raises:
    ///     queue.Full: it holds `maxsize` messages, whatever the overflow policy.
    ///     ChannelClosed: it is closed.
    fn put_nowait(slf: &Bound<'_, Self>, item: Py<PyAny>) -> PyResult<()> {
        let client = client(slf);
        if client.is_foreign() {
            return Err(errors::closed(slf.py(), FOREIGN));
        }
        let draft = Draft {
            body: None,
            format: Format::Json,
            has_message: true,
            decoded: Some(Box::new(item)),
        };
        let mut wakes = WakeBatch::default();
        client.core.put(&Arc::new(Event::seal(draft, None, None)), &mut wakes)?;
        wakes.flush();
        Ok(())
    }

    /// How many messages wait now.
    fn qsize(slf: &Bound<'_, Self>) -> usize {
        client(slf).core.len()
    }

    /// Whether no message waits now.
    fn empty(slf: &Bound<'_, Self>) -> bool {
        client(slf).core.is_empty()
    }

    /// Whether the next message finds no room.
    fn full(slf: &Bound<'_, Self>) -> bool {
        client(slf).core.is_full()
    }

    /// How many messages may wait, not counting those replayed by `listen`.
    #[getter]
    fn maxsize(slf: &Bound<'_, Self>) -> usize {
        client(slf).core.capacity()
    }

    /// Stop listening, and wake who waits; twice is no error.
    fn close(slf: &Bound<'_, Self>) {
        client(slf).end(Reason::Closed);
    }

    fn __iter__<'py>(slf: Bound<'py, Self>) -> Bound<'py, Self> {
        slf
    }

    /// Take the oldest message, waiting for ever; the iteration ends with the close.
    fn __next__(slf: &Bound<'_, Self>, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let client = client(slf);
        match wait::take(py, client, None)? {
            Taken::Closed => Ok(None),
            taken => give(py, client, taken).map(Some),
        }
    }
}
