//! One way to take a lock.
//!
//! The standard library's mutex keeps no state outside itself, so that a forked child finds
//! nothing half taken by a thread that it does not have, as a global parking table could be.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, and goes on after a panic elsewhere: every guarded state is valid between statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
