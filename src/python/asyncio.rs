//! Waiting for the bus on asyncio: one future an operation, by pyo3-async-runtimes.
//!
//! That library keeps a runtime in a static that knows nothing of forks, so it is given this
//! process's own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use pyo3::{IntoPyObjectExt, intern};
use pyo3_async_runtimes::TaskLocals;
use pyo3_async_runtimes::generic::{self, ContextExt, JoinError, Runtime};
use tokio::runtime::Handle;
use tokio::time::timeout_at;

use crate::bus::Bus;
use crate::error::Result;
use crate::event_id::EventId;
use crate::process::Process;
use crate::python::bus::{no_answer, not_sent};
use crate::ticket::{Answer, Ticket};

tokio::task_local! {
    static LOCALS: TaskLocals;
}

/// This process's runtime, as the library sees it.
struct OwnRuntime;

/// A task of the runtime; over at once when there was none to begin it.
struct Task(Option<tokio::task::JoinHandle<()>>);

/// Why a task ended without an end.
struct Ended(tokio::task::JoinError);

impl JoinError for Ended {
    fn is_panic(&self) -> bool {
        self.0.is_panic()
    }

    fn into_panic(self) -> Box<dyn std::any::Any + Send + 'static> {
        self.0.into_panic()
    }
}

impl Future for Task {
    type Output = std::result::Result<(), Ended>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Some(task) => Pin::new(task).poll(context).map(|ended| ended.map_err(Ended)),
            None => Poll::Ready(Ok(())),
        }
    }
}

/// The runtime of the thread that asks; a thread that has none is Python's, and holds the
/// interpreter.
fn handle() -> Option<Handle> {
    Handle::try_current().ok().or_else(|| Process::current().runtime().ok())
}

impl Runtime for OwnRuntime {
    type JoinError = Ended;
    type JoinHandle = Task;

    fn spawn<F>(future: F) -> Task
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Task(handle().map(|handle| handle.spawn(future)))
    }

    fn spawn_blocking<F>(work: F) -> Task
    where
        F: FnOnce() + Send + 'static,
    {
        Task(handle().map(|handle| handle.spawn_blocking(work)))
    }
}

impl ContextExt for OwnRuntime {
    fn scope<F, R>(locals: TaskLocals, future: F) -> Pin<Box<dyn Future<Output = R> + Send>>
    where
        F: Future<Output = R> + Send + 'static,
    {
        Box::pin(LOCALS.scope(locals, future))
    }

    fn get_task_locals() -> Option<TaskLocals> {
        LOCALS.try_with(TaskLocals::clone).ok()
    }
}

/// What became of an operation. An error's class is looked up by the thread that gives it to the loop, and
/// has the interpreter: the one that waits on sockets must never wait for that.
struct Outcome<T>(Result<T>);

impl<'py, T: IntoPyObject<'py>> IntoPyObject<'py> for Outcome<T> {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.0?.into_bound_py_any(py)
    }
}

/// An awaitable for the bus's answer; cancelled, it withdraws what the bus has not begun.
pub fn awaitable<'py, T>(
    py: Python<'py>,
    bus: Arc<dyn Bus>,
    ticket: Arc<Ticket>,
    timeout: Duration,
    convert: impl FnOnce(EventId) -> T + Send + 'static,
) -> PyResult<Bound<'py, PyAny>>
where
    T: for<'a> IntoPyObject<'a> + Send + 'static,
{
    // Asked for here, where its failure can be raised.
    Process::current().runtime()?;
    let withdrawal = Withdrawal(Arc::clone(&ticket));
    let event_loop = Bound::new(py, Loop(pyo3_async_runtimes::get_running_loop(py)?.unbind()))?;
    let answer = async move { Ok(Outcome(answer_of(&*bus, ticket, timeout).await.map(convert))) };
    let awaitable = generic::future_into_py_with_locals::<OwnRuntime, _, Outcome<T>>(
        py,
        TaskLocals::new(event_loop.into_any()),
        answer,
    )?;
    awaitable.call_method1(intern!(py, "add_done_callback"), (withdrawal,))?;
    Ok(awaitable)
}

/// The loop of an awaitable, as the library uses it. One that is closed takes no answer: nobody is
/// left who could want it, and the library would print that it cannot be given.
#[pyclass(frozen, module = "sse_channel._sse_channel")]
struct Loop(Py<PyAny>);

#[pymethods]
impl Loop {
    fn create_future<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.0.bind(py).call_method0(intern!(py, "create_future"))
    }

    #[pyo3(signature = (*args, **options))]
    fn call_soon_threadsafe<'py>(
        &self,
        args: &Bound<'py, PyTuple>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<()> {
        let py = args.py();
        let event_loop = self.0.bind(py);
        match event_loop.call_method(intern!(py, "call_soon_threadsafe"), args, options) {
            Err(_) if event_loop.call_method0(intern!(py, "is_closed"))?.is_truthy()? => Ok(()),
            called => called.map(drop),
        }
    }
}

/// Called when an awaitable is done: one that was cancelled is withdrawn before its task goes on,
/// and not only when the runtime gets to it.
#[pyclass(frozen, module = "sse_channel._sse_channel")]
struct Withdrawal(Arc<Ticket>);

#[pymethods]
impl Withdrawal {
    fn __call__(&self, future: &Bound<'_, PyAny>) -> PyResult<()> {
        if future.call_method0(intern!(future.py(), "cancelled"))?.is_truthy()? {
            self.0.withdraw();
        }
        Ok(())
    }
}

async fn answer_of(bus: &dyn Bus, ticket: Arc<Ticket>, timeout: Duration) -> Result<EventId> {
    let mut answer = Answer(Arc::clone(&ticket));
    // What the bus has begun may be stored: it is given as long again to tell.
    for _ in 0..2 {
        let deadline = tokio::time::Instant::now() + timeout;
        if let Ok(answer) = timeout_at(deadline, &mut answer).await {
            return answer;
        }
        if ticket.withdraw() {
            return Err(not_sent(bus, timeout));
        }
    }
    ticket.take().unwrap_or_else(|| Err(no_answer(bus)))
}
