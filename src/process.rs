//! What belongs to one process id: its hub and its timer, begun at first use.
//!
//! A forked child has none of its parent's threads, and its copies of their locks may be taken
//! for ever. It forgets all of it without touching it, and begins anew.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::Result;
use crate::hub::{Hub, WeakHub};
use crate::metrics::Reason;
use crate::sync::lock;
use crate::timer::Timer;

static FORKS: AtomicU64 = AtomicU64::new(0);

/// Held for a clone, by threads that hold the interpreter: so never across a fork.
static CURRENT: Mutex<Option<Arc<Process>>> = Mutex::new(None);

/// How many forks lie between the first process and this one.
pub fn generation() -> u64 {
    FORKS.load(Relaxed)
}

/// To be called in a forked child before anything else of this library.
pub fn forked() {
    FORKS.fetch_add(1, Relaxed);
}

/// The state of this process.
#[derive(Debug)]
pub struct Process {
    generation: u64,
    hub: Arc<Hub>,
    /// Hubs of private channels, so that the end of the process reaches their clients too.
    private: Mutex<Vec<WeakHub>>,
    timer: OnceLock<Timer>,
}

impl Process {
    /// This process's state, made at the first call after a start or a fork.
    pub fn current() -> Arc<Process> {
        let mut current = lock(&CURRENT);
        if let Some(process) = current.as_ref() {
            if process.generation == generation() {
                return Arc::clone(process);
            }
        }
        let process = Arc::new(Process {
            generation: generation(),
            hub: Arc::default(),
            private: Mutex::default(),
            timer: OnceLock::new(),
        });
        // The parent's state is left as it is: dropping it would touch its locks.
        std::mem::forget(current.replace(Arc::clone(&process)));
        process
    }

    /// The hub of all named channels.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// A hub of its own for a private channel.
    pub fn private_hub(&self) -> Arc<Hub> {
        let hub = Arc::default();
        let mut private = lock(&self.private);
        if private.len() == private.capacity() {
            private.retain(|hub| hub.strong_count() > 0);
        }
        private.push(Arc::downgrade(&hub));
        hub
    }

    /// The timer, started at the first call.
    ///
    /// # Errors
    /// `Io` when the machine gives no thread.
    pub fn timer(&self) -> Result<&Timer> {
        if let Some(timer) = self.timer.get() {
            return Ok(timer);
        }
        let timer = Timer::start()?;
        Ok(self.timer.get_or_init(|| timer))
    }

    /// Ends every client of every channel.
    pub fn close(&self, reason: Reason) {
        self.hub.close(reason);
        let private: Vec<_> = lock(&self.private).iter().filter_map(WeakHub::upgrade).collect();
        for hub in private {
            hub.close(reason);
        }
    }
}
