//! What belongs to one process id: its hub and its timer, begun at first use.
//!
//! A forked child has none of its parent's threads, and its copies of their locks may be taken
//! for ever. It forgets all of it without touching it, and begins anew.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::bus::{Bus, Settings};
use crate::clients::{Admission, Farewell};
use crate::control::Control;
use crate::error::Result;
use crate::hub::{Hub, WeakHub};
use crate::metrics::Reason;
use crate::offload::Offload;
use crate::runtime::Runtime;
use crate::survey::Respondent;
use crate::sync::{Mutex, lock};
use crate::timer::Timer;

static FORKS: AtomicU64 = AtomicU64::new(0);

/// How many times the bus of a process was begun anew.
static ERA: AtomicU64 = AtomicU64::new(0);

/// Held for a clone, by threads that hold the interpreter: so never across a fork. Threads of this
/// library's own must not take it.
static CURRENT: Mutex<Option<Arc<Process>>> = Mutex::new(None);

/// How many forks lie between the first process and this one.
pub fn generation() -> u64 {
    FORKS.load(Relaxed)
}

/// Changes when the bus of this process, and with it the hub of all named channels, is another.
pub fn era() -> u64 {
    ERA.load(Relaxed)
}

/// To be called in a forked child before anything else of this library.
pub fn forked() {
    FORKS.fetch_add(1, Relaxed);
}

/// The state of this process.
#[derive(Debug)]
pub struct Process {
    generation: u64,
    /// The bus and the hub of all named channels, begun at the first of them. Held for a clone.
    named: Mutex<Option<Named>>,
    /// Hubs of private channels, so that the end of the process reaches their clients too.
    private: Mutex<Vec<WeakHub>>,
    timer: OnceLock<Timer>,
    runtime: Runtime,
    offload: Arc<Offload>,
    /// Does what other processes tell about clients, once there is a bus.
    control: Mutex<Option<Arc<Control>>>,
    admission: Admission,
    /// Milliseconds after which clients come back, as they were told last.
    retry: AtomicU64,
    /// Set while all streams come to their end.
    farewell: Mutex<Option<Arc<Farewell>>>,
    /// Why everything has ended, hubs to come too; set before those that are there are looked for.
    over: OnceLock<Reason>,
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
            named: Mutex::default(),
            private: Mutex::default(),
            timer: OnceLock::new(),
            runtime: Runtime::default(),
            offload: Arc::default(),
            control: Mutex::default(),
            admission: Admission::default(),
            retry: AtomicU64::new(0),
            farewell: Mutex::default(),
            over: OnceLock::new(),
        });
        // The parent's state is left as it is: dropping it would touch its locks.
        std::mem::forget(current.replace(Arc::clone(&process)));
        process
    }

    /// The bus and its hub, if a named channel was used.
    pub fn named(&self) -> Option<Named> {
        lock(&self.named).clone()
    }

    /// The bus and its hub, begun by `settings` at the first call.
    ///
    /// # Errors
    /// `Bus` for settings that cannot be.
    pub fn open(&self, settings: &Settings) -> Result<Named> {
        if let Some(named) = self.named() {
            return Ok(named);
        }
        let opened = settings.open(&self.runtime)?;
        let mut named = lock(&self.named);
        if let Some(named) = named.as_ref() {
            // Another thread was quicker.
            return Ok(named.clone());
        }
        *lock(&self.control) = Some(Control::install(&opened.hub, &self.offload));
        Respondent::install(&opened.hub, &opened.bus, &self.offload);
        self.close_if_over(&opened.hub);
        Ok(named.insert(opened).clone())
    }

    /// Ends all streams, every client of a named channel, and the bus; the next use of a named
    /// channel begins another. For tests: it waits for offloaded clients, two seconds at the most.
    pub fn begin_bus_anew(&self) {
        let named = lock(&self.named).take();
        ERA.fetch_add(1, Relaxed);
        self.end_streams();
        self.finish_streams();
        if let Some(named) = named {
            named.hub.close(Reason::Exit);
            named.bus.close();
            // Channels may hold it until their next use: its files must be closed before a fork.
            named.bus.before_fork();
            named.bus.after_fork();
        }
    }

    /// A hub of its own for a private channel.
    pub fn private_hub(&self) -> Arc<Hub> {
        let hub: Arc<Hub> = Arc::default();
        let mut private = lock(&self.private);
        if private.len() == private.capacity() {
            private.retain(|hub| hub.strong_count() > 0);
        }
        private.push(Arc::downgrade(&hub));
        self.close_if_over(&hub);
        hub
    }

    /// Of a new hub, under the lock under which it becomes known: the end finds it, or it the end.
    fn close_if_over(&self, hub: &Hub) {
        if let Some(reason) = self.over.get() {
            hub.close(*reason);
        }
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

    /// What does as other processes tell, if there is a bus.
    pub fn control(&self) -> Option<Arc<Control>> {
        lock(&self.control).clone()
    }

    /// The connections of this process that left Python.
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// The streams of this process, offloaded ones too.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Notes after how many milliseconds a client was told to come back.
    pub fn set_retry(&self, milliseconds: u64) {
        self.retry.store(milliseconds, Relaxed);
    }

    /// What streams are told, while they are all to come to their end.
    pub fn farewell(&self) -> Option<Arc<Farewell>> {
        lock(&self.farewell).clone()
    }

    /// Begins to end all streams, those to come too: what waits is sent, then when to come back.
    /// Does not wait, and may be called by a handler of signals; the second time changes nothing.
    pub fn end_streams(&self) {
        let farewell = {
            let mut farewell = lock(&self.farewell);
            let new = || Farewell::new(self.retry.load(Relaxed), self.admission.taken());
            let farewell = Arc::clone(farewell.get_or_insert_with(|| Arc::new(new())));
            self.offload.end(&farewell);
            farewell
        };
        for hub in self.hubs() {
            hub.close_streams(&farewell);
        }
    }

    /// After `end_streams`: waits until the offloaded ones are ended, two seconds at the most. From
    /// then on streams can begin again: another server may run in this process.
    pub fn finish_streams(&self) {
        self.offload.wait_for_end();
        // Both or none, for who ends them again.
        let mut farewell = lock(&self.farewell);
        self.offload.begin_anew();
        farewell.take();
    }

    fn hubs(&self) -> Vec<Arc<Hub>> {
        let private = lock(&self.private);
        let named = self.named().map(|named| named.hub);
        named.into_iter().chain(private.iter().filter_map(WeakHub::upgrade)).collect()
    }

    /// Ends every client of every channel, also those to come, the bus and the runtime.
    pub fn close(&self, reason: Reason) {
        // The first holds.
        let _ = self.over.set(reason);
        self.end_streams();
        self.offload.wait_for_end();
        for hub in self.hubs() {
            hub.close(reason);
        }
        if let Some(named) = self.named() {
            named.bus.close();
        }
        self.runtime.shut_down();
    }
}
