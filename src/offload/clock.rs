//! What time it is for the I/O threads: the system's, or one that stands until it is moved by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A clock. By default the system's.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    by_hand: Option<Arc<ByHand>>,
}

#[derive(Debug)]
struct ByHand {
    began: Instant,
    /// Milliseconds.
    passed: AtomicU64,
}

impl Clock {
    /// One that stands, for who drives a thread by hand: however long that takes, nothing is due
    /// before `pass` says so.
    pub fn by_hand() -> Clock {
        let by_hand = ByHand { began: Instant::now(), passed: AtomicU64::new(0) };
        Clock { by_hand: Some(Arc::new(by_hand)) }
    }

    /// What it shows.
    pub fn now(&self) -> Instant {
        match &self.by_hand {
            None => Instant::now(),
            Some(its) => its.began + Duration::from_millis(its.passed.load(Relaxed)),
        }
    }

    /// Moves one that stands, by whole milliseconds. The system's goes as it goes.
    pub fn pass(&self, time: Duration) {
        if let Some(its) = &self.by_hand {
            let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            its.passed.fetch_add(milliseconds, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_by_hand_stands_until_it_is_moved() {
        let clock = Clock::by_hand();
        let (began, copy) = (clock.now(), clock.clone());
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(clock.now(), began);
        copy.pass(Duration::from_secs(61));
        assert_eq!(clock.now(), began + Duration::from_secs(61));
    }

    #[test]
    fn the_systems_clock_goes_by_itself() {
        let clock = Clock::default();
        let began = clock.now();
        clock.pass(Duration::from_secs(61));
        assert!(clock.now() < began + Duration::from_secs(60));
        while clock.now() == began {}
    }
}
