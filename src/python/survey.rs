//! Asking all processes of the bus.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pyo3::prelude::*;

use crate::bus::Publication;
use crate::event::Format;
use crate::frame::{Body, Fields};
use crate::python::bus;
use crate::survey;

/// Publishes a question. Gives how many processes have it, None where the bus does not know.
#[pyfunction]
pub fn ask(py: Python<'_>, question: &str, timeout: f64) -> PyResult<Option<u64>> {
    let (publication, heard_by) = publication_of(question)?;
    let named = bus::named(py)?;
    bus::publish(py, &named.bus, publication, Duration::from_secs_f64(timeout))?;
    Ok(heard_by.get().copied())
}

/// `ask` for asyncio: what it gives, or an awaitable for it.
#[pyfunction]
pub fn ask_later<'py>(
    py: Python<'py>,
    question: &str,
    timeout: f64,
) -> PyResult<Bound<'py, PyAny>> {
    let (publication, heard_by) = publication_of(question)?;
    let named = bus::named(py)?;
    let timeout = Duration::from_secs_f64(timeout);
    bus::publish_later(py, &named.bus, publication, timeout, move |_| heard_by.get().copied())
}

/// What all processes of this host have counted, as JSON.
#[pyfunction]
pub fn host_view(py: Python<'_>) -> PyResult<String> {
    let named = bus::named(py)?;
    Ok(py.detach(|| survey::host_view(&named.hub).to_string()))
}

fn publication_of(question: &str) -> PyResult<(Publication, Arc<OnceLock<u64>>)> {
    let fields = Fields { data: Some(question), ..Fields::default() };
    let heard_by = Arc::new(OnceLock::new());
    let publication = Publication {
        channel: survey::QUESTIONS.into(),
        history: survey::HISTORY,
        body: Body::encode(&fields, usize::MAX)?,
        format: Format::Text,
        heard_by: Some(Arc::clone(&heard_by)),
    };
    Ok((publication, heard_by))
}
