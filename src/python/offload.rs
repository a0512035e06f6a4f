//! Handing a server's connection over to the I/O threads.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::descriptors;
use crate::offload::{Backlog, Framing, Handover};
use crate::process::Process;
use crate::python::client::overflow;
use crate::python::stream::Stream;

/// Takes over the connection `fd` that a server holds, and the stream with it.
///
/// `head` is sent first, then what the stream opens with, then `body`. False, and nothing was done,
/// for a stream that has ended or given something already. `instead` is what the number `fd` means
/// afterwards.
#[pyfunction]
#[pyo3(signature = (stream, fd, head, body, *, instead=None, chunked, policy, frames, bytes, threads))]
#[allow(clippy::too_many_arguments, reason = "named arguments of one internal call")]
pub fn offload(
    stream: &Bound<'_, Stream>,
    fd: RawFd,
    head: &[u8],
    body: &[u8],
    instead: Option<RawFd>,
    chunked: bool,
    policy: &str,
    frames: usize,
    bytes: usize,
    threads: usize,
) -> PyResult<bool> {
    let py = stream.py();
    let client = stream.as_super().get();
    let overflow = overflow(policy)?;
    if client.is_foreign() {
        return Ok(false);
    }
    let (Some((cursor, mut first)), Some(hub)) = (stream.get().beginning(), client.core.hub())
    else {
        return Ok(false);
    };
    first.extend_from_slice(body);
    let process = Process::current();
    let named = process.named().filter(|named| Arc::ptr_eq(&named.hub, &hub));
    let handover = Handover {
        hub: &hub,
        bus: named.map(|named| Arc::downgrade(&named.bus)),
        client: &client.core,
        cursor,
        fd,
        instead,
        head,
        body: &first,
        framing: if chunked { Framing::Chunked } else { Framing::UntilClose },
        backlog: Backlog { frames, bytes, overflow },
        heartbeat: stream.get().every(),
        slot: client.core.slot(),
        threads,
    };
    let taken = py.detach(|| process.offload().take(handover))?;
    if taken {
        stream.get().set_ended();
    }
    Ok(taken)
}

/// Connections of this process that left Python: now, and since it began.
#[pyfunction]
pub fn offload_figures(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let process = Process::current();
    let dict = PyDict::new(py);
    dict.set_item("connections", process.offload().connections())?;
    dict.set_item("taken", process.offload().taken())?;
    Ok(dict)
}

/// Ends all streams, telling each client when to come back; those that begin later are told the same.
/// With `wait` it returns when those that left Python are ended, which takes two seconds at the most;
/// then streams can begin again. `retry` is the time after which clients come back, in milliseconds:
/// each is told one around it.
#[pyfunction]
pub fn end_streams(py: Python<'_>, wait: bool, retry: u64) {
    let process = Process::current();
    py.detach(|| {
        process.set_retry(retry);
        process.end_streams();
        if wait {
            process.finish_streams();
        }
    });
}

/// Takes a descriptor out of the epoll set of somebody else's loop.
#[pyfunction]
pub fn unwatch(epoll: RawFd, fd: RawFd) {
    descriptors::unwatch(epoll, fd);
}
