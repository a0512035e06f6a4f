//! Descriptors that a forked child must close: its copy would keep a connection or a socket alive
//! after the parent's end.

#![allow(unsafe_code, reason = "closing a descriptor by its number")]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

/// No lock, which a lost thread could hold in the child: a fixed number of places.
static PLACES: [AtomicI32; 64] = [const { AtomicI32::new(FREE) }; 64];

const FREE: RawFd = -1;

/// Marks a descriptor, as long as this lives, to be closed in forked children. It must be dropped
/// before the descriptor is closed.
#[derive(Debug)]
pub struct Inherited(Option<usize>);

impl Inherited {
    /// Marks `fd`. With no place left, a child keeps its copy.
    pub fn new(fd: RawFd) -> Inherited {
        let take = |place: &AtomicI32| place.compare_exchange(FREE, fd, SeqCst, SeqCst).is_ok();
        Inherited(PLACES.iter().position(take))
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            PLACES[place].store(FREE, SeqCst);
        }
    }
}

/// Closes them; to be called in a forked child before anything opens a descriptor.
pub fn close_all() {
    for place in &PLACES {
        let fd = place.swap(FREE, SeqCst);
        if fd != FREE {
            // SAFETY: the descriptor belongs to an object of the parent, which the child never
            // touches again, so that nothing else closes or uses the number in this process.
            unsafe { rustix::io::close(fd) };
        }
    }
}
