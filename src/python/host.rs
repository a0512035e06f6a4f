//! The figures of all processes of this host.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::host::{ProcessFigures, REFUSALS};
use crate::hub::ChannelFigures;
use crate::metrics::{Counted, Snapshot};
use crate::process::Process;
use crate::python::bus;
use crate::python::channel::snapshot_as_dict;

/// Clients of each channel that has any, in all processes of this host; queues are not among them.
#[pyfunction]
pub fn presence(py: Python<'_>) -> PyResult<BTreeMap<String, u64>> {
    let named = bus::named(py)?;
    let counts = py.detach(|| {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for figures in named.hub.all_figures() {
            let clients = (figures.streams + figures.sockets) as u64;
            *counts.entry(figures.name.to_string()).or_default() += clients;
        }
        for process in named.hub.host().read().processes {
            for (name, snapshot) in process.channels {
                let clients = snapshot.clients(Counted::Stream) + snapshot.clients(Counted::Socket);
                *counts.entry(name).or_default() += clients;
            }
        }
        counts.retain(|_, clients| *clients > 0);
        counts
    });
    Ok(counts)
}

/// The figures of the processes of this host, and of those that are gone.
#[pyfunction]
pub fn host_figures(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let named = bus::named(py)?;
    let host = named.hub.host();
    let (channels, own, others) = py.detach(|| (named.hub.all_figures(), host.own(), host.read()));
    let processes = PyList::empty(py);
    if !channels.is_empty() {
        let dict = PyDict::new(py);
        for ChannelFigures { name, counters, queues, streams, sockets, .. } in &channels {
            let clients = [*queues, *streams, *sockets];
            dict.set_item(&**name, snapshot_as_dict(py, &counters.snapshot(), clients)?)?;
        }
        processes.append(process_as_dict(py, &own, dict)?)?;
    }
    for process in &others.processes {
        let dict = PyDict::new(py);
        for (name, snapshot) in &process.channels {
            dict.set_item(name, of_another(py, snapshot)?)?;
        }
        processes.append(process_as_dict(py, process, dict)?)?;
    }
    let gone = PyDict::new(py);
    for (name, snapshot) in &others.departed.channels {
        gone.set_item(name, of_another(py, snapshot)?)?;
    }
    let departed = PyDict::new(py);
    departed.set_item("refused", refused_as_dict(py, &others.departed.refused)?)?;
    departed.set_item("channels", gone)?;
    let dict = PyDict::new(py);
    dict.set_item("trouble", host.trouble())?;
    dict.set_item("processes", processes)?;
    dict.set_item("departed", departed)?;
    Ok(dict)
}

/// Counts a stream that was not offloaded, or not opened.
#[pyfunction]
pub fn count_refused(reason: &str) {
    if let Some(named) = Process::current().named() {
        named.hub.host().count_refused(reason);
    }
}

fn of_another<'py>(py: Python<'py>, snapshot: &Snapshot) -> PyResult<Bound<'py, PyDict>> {
    let kinds = [Counted::Queue, Counted::Stream, Counted::Socket];
    let clients = kinds.map(|kind| usize::try_from(snapshot.clients(kind)).unwrap_or(usize::MAX));
    snapshot_as_dict(py, snapshot, clients)
}

fn process_as_dict<'py>(
    py: Python<'py>,
    process: &ProcessFigures,
    channels: Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyDict>> {
    let bus = PyDict::new(py);
    bus.set_item("connected", process.is_connected)?;
    bus.set_item("lag", process.lag as f64 / 1000.0)?;
    let dict = PyDict::new(py);
    dict.set_item("process", process.pid)?;
    dict.set_item("bus", bus)?;
    dict.set_item("unshared", process.unshared)?;
    dict.set_item("refused", refused_as_dict(py, &process.refused)?)?;
    dict.set_item("channels", channels)?;
    Ok(dict)
}

fn refused_as_dict<'py>(
    py: Python<'py>,
    refused: &[u64; REFUSALS.len()],
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (reason, count) in REFUSALS.iter().zip(refused) {
        if *count > 0 {
            dict.set_item(reason, count)?;
        }
    }
    Ok(dict)
}
