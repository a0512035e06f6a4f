//! The core's errors as Python's.

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::error::Error;

static EMPTY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static FULL: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static BUS_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static CHANNEL_CLOSED: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// `queue.Empty`, which `gevent.queue.Empty` is as well.
pub fn empty(py: Python<'_>) -> PyErr {
    raise(EMPTY.import(py, "queue", "Empty"), ())
}

/// `queue.Full`, which says of what.
pub fn full(py: Python<'_>, what: &'static str) -> PyErr {
    raise(FULL.import(py, "queue", "Full"), (what,))
}

/// The class `ChannelClosed`, a `queue.Empty`.
pub fn channel_closed(py: Python<'_>) -> PyResult<Bound<'_, PyType>> {
    let class = CHANNEL_CLOSED.get_or_try_init(py, || {
        let base = py.import("queue")?.getattr("Empty")?.cast_into::<PyType>()?;
        PyErr::new_type(
            py,
            c"sse_channel.ChannelClosed",
            Some(
                c"The queue is closed and nothing is left in it.\n\nA subclass of ``queue.Empty``, \
                for code that catches only that.",
            ),
            Some(&base),
            None,
        )
    })?;
    Ok(class.bind(py).clone())
}

/// The class `BusError`, an `OSError`.
pub fn bus_error(py: Python<'_>) -> PyResult<Bound<'_, PyType>> {
    let class = BUS_ERROR.get_or_try_init(py, || {
        let base = py.get_type::<PyOSError>();
        PyErr::new_type(
            py,
            c"sse_channel.BusError",
            Some(
                c"The bus cannot be used, or did not answer in time; the message says why and what \
                to do.\n\nAn ``OSError``. Nothing was sent, unless the message says that it may \
                have been.",
            ),
            Some(&base),
            None,
        )
    })?;
    Ok(class.bind(py).clone())
}

fn bus(py: Python<'_>, message: String) -> PyErr {
    match bus_error(py) {
        Ok(class) => PyErr::from_type(class, message),
        Err(error) => error,
    }
}

/// `ChannelClosed` with a message.
pub fn closed(py: Python<'_>, message: &'static str) -> PyErr {
    match channel_closed(py) {
        Ok(class) => PyErr::from_type(class, message),
        Err(error) => error,
    }
}

fn raise<A>(class: PyResult<&Bound<'_, PyType>>, args: A) -> PyErr
where
    A: pyo3::PyErrArguments + Send + Sync + 'static,
{
    match class {
        Ok(class) => PyErr::from_type(class.clone(), args),
        Err(error) => error,
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::InvalidField(_) | Error::TooLarge { .. } => {
                PyValueError::new_err(error.to_string())
            }
            Error::NotEncodable => PyTypeError::new_err(error.to_string()),
            Error::Bus(message) => Python::attach(|py| bus(py, message)),
            Error::Full => Python::attach(|py| full(py, "the queue is full")),
            Error::Closed => Python::attach(|py| closed(py, "the queue is closed")),
            Error::Io(error) => PyOSError::new_err((error.raw_os_error(), error.to_string())),
        }
    }
}
