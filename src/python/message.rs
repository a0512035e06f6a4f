//! Messages: Python's objects and the event's text, decoded at most once a process.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use crate::event::{Event, Format};

static LOADS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// The text of a Python string, or why UTF-8 cannot carry it.
pub fn utf8<'a>(text: &'a Bound<'_, PyString>, what: &str) -> PyResult<&'a str> {
    text.to_str().map_err(|error| {
        PyValueError::new_err(format!(
            "{what} contains a lone surrogate, which UTF-8 cannot carry ({error}); \
             decode the text with errors=\"replace\", or leave the character out"
        ))
    })
}

/// The message of an event, the same object for every reader of this process.
pub fn of(py: Python<'_>, event: &Event) -> PyResult<Py<PyAny>> {
    if let Some(message) = decoded(py, event) {
        return Ok(message);
    }
    let text = event.data.as_deref().unwrap_or_default();
    // Frames are made from `str`, so the lossy branch is never taken.
    let text = String::from_utf8_lossy(text);
    let message = match event.format {
        Format::Text => PyString::new(py, &text).into_any().unbind(),
        Format::Json => LOADS.import(py, "json", "loads")?.call1((text,))?.unbind(),
    };
    // Another thread may have decoded it meanwhile: then all keep that one.
    let _ = event.decoded.set(Box::new(message.clone_ref(py)));
    Ok(decoded(py, event).unwrap_or(message))
}

fn decoded(py: Python<'_>, event: &Event) -> Option<Py<PyAny>> {
    let attachment = event.decoded.get()?;
    attachment.downcast_ref::<Py<PyAny>>().map(|message| message.clone_ref(py))
}
