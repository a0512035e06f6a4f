//! One way to take a lock, and where the core has its locks, atomics and channels from.
//!
//! The standard library's mutex keeps no state outside itself, so that a forked child finds
//! nothing half taken by a thread that it does not have, as a global parking table could be.
//!
//! With the feature `shuttle` all of it is the checker's, which runs one thread at a time and decides
//! at each step which: `races/` runs the core so. Whoever takes them from here can be checked.

use std::sync::PoisonError;

#[cfg(not(feature = "shuttle"))]
pub use crossbeam_channel as channel;
#[cfg(feature = "shuttle")]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(feature = "shuttle"))]
pub use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(feature = "shuttle")]
pub mod channel;

/// Locks, and goes on after a panic elsewhere: every guarded state is valid between statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads where a mutex is, so that the cache has it.
#[inline]
pub fn touch<T>(mutex: &Mutex<T>) {
    #[cfg(not(feature = "shuttle"))]
    std::hint::black_box(mutex.is_poisoned());
    #[cfg(feature = "shuttle")]
    let _ = mutex;
}

/// A descriptor that can be rung, for the checker: what the kernel does otherwise.
#[cfg(feature = "shuttle")]
#[derive(Debug, Default)]
pub struct Rings {
    state: Mutex<Rung>,
    changed: Condvar,
}

#[cfg(feature = "shuttle")]
#[derive(Debug, Default)]
struct Rung {
    is_readable: bool,
    /// Not yet told to who watches for edges.
    is_new: bool,
}

#[cfg(feature = "shuttle")]
impl Rings {
    /// Makes it readable.
    pub fn ring(&self) {
        *lock(&self.state) = Rung { is_readable: true, is_new: true };
        self.changed.notify_all();
    }

    /// Reads it until nothing is left.
    pub fn silence(&self) {
        lock(&self.state).is_readable = false;
    }

    /// Waits as `poll` does, until it is readable.
    pub fn wait(&self) {
        let mut state = lock(&self.state);
        while !state.is_readable {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits as an edge-triggered `epoll` does, until it was rung since the last time.
    pub fn wait_for_edge(&self) {
        let mut state = lock(&self.state);
        while !(state.is_readable && state.is_new) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_new = false;
    }
}
