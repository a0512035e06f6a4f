//! The runtime of this process for everything that waits on a socket: one thread, begun at first
//! use.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};

use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};

/// Threads that give results to asyncio's loops: for that they wait for the interpreter, and nothing that
/// can wait for longer may be in their way.
const BLOCKING_THREADS: usize = 2;

/// The longest wait for what is still under way at the end.
const LONGEST_END: Duration = Duration::from_secs(5);

/// A share in the runtime of one process. A forked child makes its own.
#[derive(Clone, Debug, Default)]
pub struct Runtime(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Held for the start, for the end and to copy a handle; never by the runtime's own threads.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Unused,
    Running(tokio::runtime::Runtime),
    Over,
}

impl Runtime {
    /// The way to it; its thread starts at the first call.
    ///
    /// # Errors
    /// `Io` when the machine gives no thread, `Bus` after its end.
    pub fn handle(&self) -> Result<Handle> {
        let mut state = lock(&self.0.state);
        match &*state {
            State::Running(runtime) => return Ok(runtime.handle().clone()),
            State::Over => return Err(Error::Bus("this process is ending".to_owned())),
            State::Unused => {}
        }
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("sse-channel-io")
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        *state = State::Running(runtime);
        Ok(handle)
    }

    /// Ends it. What hands a result to the interpreter at this moment is waited for: a thread that
    /// is at that while the interpreter ends would take the process down. The caller must not hold
    /// the interpreter.
    pub fn shut_down(&self) {
        let state = std::mem::replace(&mut *lock(&self.0.state), State::Over);
        if let State::Running(runtime) = state {
            runtime.shutdown_timeout(LONGEST_END);
        }
    }
}

impl Drop for Shared {
    /// A runtime that is just dropped waits for its thread.
    fn drop(&mut self) {
        let state = std::mem::take(&mut *lock(&self.state));
        if let State::Running(runtime) = state {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs_from_its_first_use_to_its_end() -> Result<()> {
        let runtime = Runtime::default();
        let name = runtime.handle()?.spawn(async { std::thread::current().name().map(str::len) });
        assert_eq!(runtime.handle()?.block_on(name).ok(), Some(Some("sse-channel-io".len())));
        runtime.shut_down();
        assert!(runtime.handle().is_err());
        Ok(())
    }
}
