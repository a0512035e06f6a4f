//! An unbounded channel for the checker, with as much of crossbeam's as the core uses.
//!
//! What is checked is how the core uses a channel, not crossbeam: it is taken at its word. Time has
//! no meaning to the checker, so a deadline may pass at any moment, by chance.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

pub use crossbeam_channel::{RecvError, RecvTimeoutError, SendError, TryRecvError};
use shuttle::rand::{Rng, thread_rng};

use super::{Condvar, Mutex, lock};

/// How often a deadline may be looked at before it has passed.
const MOST_LOOKS: u32 = 3;

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    waiting: VecDeque<T>,
    is_open: bool,
}

/// The end that sends; the channel ends with it.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

/// The end that receives, from any number of threads.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Shared<T>>);

/// Both ends of a channel.
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    let state = Mutex::new(State { waiting: VecDeque::new(), is_open: true });
    let shared = Arc::new(Shared { state, changed: Condvar::new() });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Puts something in and wakes one that receives.
    ///
    /// # Errors
    /// None: a client has both ends.
    pub fn send(&self, item: T) -> Result<(), SendError<T>> {
        lock(&self.0.state).waiting.push_back(item);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        lock(&self.0.state).is_open = false;
        self.0.changed.notify_all();
    }
}

impl<T> Receiver<T> {
    /// Takes the oldest without waiting.
    ///
    /// # Errors
    /// `Empty`, or `Disconnected` when nothing will come.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        take(&mut lock(&self.0.state))
    }

    /// Takes the oldest, waiting for it.
    ///
    /// # Errors
    /// When nothing will come.
    pub fn recv(&self) -> Result<T, RecvError> {
        let mut state = lock(&self.0.state);
        loop {
            match take(&mut state) {
                Ok(item) => return Ok(item),
                Err(TryRecvError::Disconnected) => return Err(RecvError),
                Err(TryRecvError::Empty) => {}
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the oldest, waiting until the deadline, which passes by chance.
    ///
    /// # Errors
    /// `Timeout`, or `Disconnected` when nothing will come.
    pub fn recv_deadline(&self, _: Instant) -> Result<T, RecvTimeoutError> {
        for _ in 0..thread_rng().gen_range(0..MOST_LOOKS) {
            match self.try_recv() {
                Ok(item) => return Ok(item),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => shuttle::thread::yield_now(),
            }
        }
        Err(RecvTimeoutError::Timeout)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        lock(&self.0.state).waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn take<T>(state: &mut State<T>) -> Result<T, TryRecvError> {
    match state.waiting.pop_front() {
        Some(item) => Ok(item),
        None if state.is_open => Err(TryRecvError::Empty),
        None => Err(TryRecvError::Disconnected),
    }
}
