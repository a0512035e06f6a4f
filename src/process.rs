//! What belongs to one process id: its hub and its timer, begun at first use.
//!
//! A forked child has none of its parent's threads, and its copies of their locks may be taken
//! for ever. It forgets all of it without touching it, and begins anew.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use crate::bus::{Bus, Settings};
use crate::error::Result;
use crate::hub::{Hub, WeakHub};
use crate::metrics::Reason;
use crate::offload::Offload;
use crate::runtime::Runtime;
use crate::sync::lock;
use crate::timer::Timer;

static FORKS: AtomicU64 = AtomicU64::new(0);

/// Held for a clone, by threads that hold the interpreter: so never across a fork. Threads of this
/// library's own must not take it.
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
    /// The bus and the hub of all named channels, begun at the first of them.
    named: OnceLock<Named>,
    /// Hubs of private channels, so that the end of the process reaches their clients too.
    private: Mutex<Vec<WeakHub>>,
    timer: OnceLock<Timer>,
    runtime: Runtime,
    offload: Offload,
}

/// What all named channels of a process share.
#[derive(Clone, Debug)]
pub struct Named {
    /// Delivers to the clients.
    pub hub: Arc<Hub>,
    /// Orders, stores, and brings in what others publish.
    pub bus: Arc<dyn Bus>,
}

impl Process {
    /// This process's state, made at the first call after a start or a fork.
    pub fn current() -> Arc<Process> {
        let mut current = lock(&CURRENT);
        if let Some(process) = current.as_ref()
            && process.generation == generation()
        {
            return Arc::clone(process);
        }
        let process = Arc::new(Process {
            generation: generation(),
            named: OnceLock::new(),
            private: Mutex::default(),
            timer: OnceLock::new(),
            runtime: Runtime::default(),
            offload: Offload::default(),
        });
        // The parent's state is left as it is: dropping it would touch its locks.
        std::mem::forget(current.replace(Arc::clone(&process)));
        process
    }

    /// The bus and its hub, if a named channel was used.
    pub fn named(&self) -> Option<&Named> {
        self.named.get()
    }

    /// The bus and its hub, begun by `settings` at the first call.
    ///
    /// # Errors
    /// `Bus` for settings that cannot be.
    pub fn open(&self, settings: &Settings) -> Result<&Named> {
        if let Some(named) = self.named.get() {
            return Ok(named);
        }
        let named = settings.open(&self.runtime)?;
        Ok(self.named.get_or_init(|| named))
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

    /// The way to the runtime that waits on sockets, started at the first call.
    ///
    /// # Errors
    /// `Io` when the machine gives no thread, `Bus` when the process is ending.
    pub fn runtime(&self) -> Result<tokio::runtime::Handle> {
        self.runtime.handle()
    }

    /// The connections of this process that left Python.
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// Ends every client of every channel, the bus and the runtime.
    pub fn close(&self, reason: Reason) {
        self.offload.shut_down();
        if let Some(named) = self.named.get() {
            named.hub.close(reason);
            named.bus.close();
        }
        let private: Vec<_> = lock(&self.private).iter().filter_map(WeakHub::upgrade).collect();
        for hub in private {
            hub.close(reason);
        }
        self.runtime.shut_down();
    }
}
