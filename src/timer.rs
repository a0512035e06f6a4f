//! The timer: one thread per process that wakes waiters whose deadline has passed.
//!
//! It sleeps until the earliest deadline and not at all while nobody waits with one. A client
//! that waits again and again keeps one entry, moved on when it comes up, so that a wait that
//! ends early costs no entry and no wake-up of this thread.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::time::sleep_until;

use crate::error::Result;
use crate::sync::{Mutex, lock};
use crate::wake::WakeBatch;

/// Something that waits until a moment.
pub trait Timed: std::fmt::Debug + Send + Sync {
    /// Whether it has to be looked after at `at`; if not, an earlier moment stands.
    fn is_due_at(&self, at: Instant) -> bool;

    /// Called at a moment scheduled before: wakes whose deadline has passed and says when to come
    /// again.
    fn expire(&self, at: Instant, now: Instant, wakes: &mut WakeBatch) -> Option<Instant>;
}

/// Entries below which it is not worth looking for those of clients that left.
const SWEEP_FLOOR: usize = 1024;

/// A handle to the timer's thread.
#[derive(Clone, Debug)]
pub struct Timer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Held for a push, a pop or a sweep, and taken before a client's lock; clients are woken
    /// without it.
    heap: Mutex<Heap>,
    earlier: Notify,
}

#[derive(Debug)]
struct Heap {
    entries: BinaryHeap<Entry>,
    sweep_at: usize,
}

#[derive(Debug)]
struct Entry {
    at: Instant,
    timed: Weak<dyn Timed>,
}

impl Entry {
    /// Whether it is there still and no earlier moment has taken its place.
    fn is_current(&self) -> bool {
        self.timed.upgrade().is_some_and(|timed| timed.is_due_at(self.at))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives its greatest first: the earliest is the greatest.
        other.at.cmp(&self.at)
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl Timer {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Io` when the machine gives no thread.
    pub fn start() -> Result<Timer> {
        let timer = Timer::idle();
        let running = timer.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        std::thread::Builder::new()
            .name("sse-channel".to_owned())
            .spawn(move || runtime.block_on(running.run()))?;
        Ok(timer)
    }

    fn idle() -> Timer {
        let heap = Heap { entries: BinaryHeap::new(), sweep_at: SWEEP_FLOOR };
        Timer { shared: Arc::new(Shared { heap: Mutex::new(heap), earlier: Notify::new() }) }
    }

    /// Looks after `timed` at `at`.
    pub fn schedule(&self, at: Instant, timed: Weak<dyn Timed>) {
        let earliest = {
            let mut heap = lock(&self.shared.heap);
            if heap.entries.len() >= heap.sweep_at {
                heap.entries.retain(Entry::is_current);
                heap.sweep_at = SWEEP_FLOOR.max(2 * heap.entries.len());
            }
            let earliest = heap.entries.peek().is_none_or(|entry| at < entry.at);
            heap.entries.push(Entry { at, timed });
            earliest
        };
        if earliest {
            self.shared.earlier.notify_one();
        }
    }

    async fn run(self) {
        loop {
            let now = tokio::time::Instant::now().into_std();
            match self.fire(now) {
                Some(at) => {
                    tokio::select! {
                        () = sleep_until(at.into()) => {}
                        () = self.shared.earlier.notified() => {}
                    }
                }
                None => self.shared.earlier.notified().await,
            }
        }
    }

    /// Wakes all whose moment has come and gives the next moment.
    fn fire(&self, now: Instant) -> Option<Instant> {
        let mut due = Vec::new();
        {
            let mut heap = lock(&self.shared.heap);
            while heap.entries.peek().is_some_and(|entry| entry.at <= now) {
                due.extend(heap.entries.pop());
            }
        }
        let mut wakes = WakeBatch::default();
        due.retain_mut(|entry| {
            let Some(timed) = entry.timed.upgrade() else { return false };
            match timed.expire(entry.at, now, &mut wakes) {
                Some(next) => {
                    entry.at = next;
                    true
                }
                None => false,
            }
        });
        let next = {
            let mut heap = lock(&self.shared.heap);
            heap.entries.extend(due);
            heap.entries.peek().map(|entry| entry.at)
        };
        wakes.flush();
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::{Client, Kind, Overflow};
    use crate::wake::{Park, Parked, Waiter, Wakeups};
    use std::time::Duration;

    fn as_timed(client: &Arc<Client>) -> Weak<dyn Timed> {
        let timed: Arc<dyn Timed> = Arc::clone(client) as _;
        Arc::downgrade(&timed)
    }

    fn client() -> Arc<Client> {
        Arc::new(Client::new(Kind::Queue, 1, Overflow::DropOldest))
    }

    #[tokio::test(start_paused = true)]
    async fn wakes_at_the_deadline_and_not_before() -> Result<()> {
        let timer = Timer::idle();
        tokio::spawn(timer.clone().run());
        let wakeups = Arc::new(Wakeups::new()?);
        let clients = [client(), client()];
        let start = tokio::time::Instant::now();
        for (token, (client, seconds)) in clients.iter().zip([10, 5]).enumerate() {
            let deadline = Some((start + Duration::from_secs(seconds)).into_std());
            let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: token as u64, deadline };
            let Parked::Waiting { arm: Some(at) } = client.park(waiter) else {
                unreachable!("an idle client parks its first waiter")
            };
            timer.schedule(at, as_timed(client));
        }
        tokio::time::sleep(Duration::from_millis(4_990)).await;
        assert_eq!(wakeups.take(), [] as [u64; 0]);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(wakeups.take(), [1]);
        tokio::time::sleep(Duration::from_millis(5_000)).await;
        assert_eq!(wakeups.take(), [0]);
        assert!(lock(&timer.shared.heap).entries.is_empty());
        Ok(())
    }

    #[test]
    fn clients_that_left_do_not_pile_up() {
        let timer = Timer::idle();
        let far = Instant::now() + Duration::from_secs(86_400);
        for _ in 0..100_000 {
            timer.schedule(far, as_timed(&client()));
        }
        assert!(lock(&timer.shared.heap).entries.len() <= SWEEP_FLOOR);
    }

    #[test]
    fn moments_that_an_earlier_one_replaced_do_not_pile_up() -> Result<()> {
        let (timer, client) = (Timer::idle(), client());
        let wakeups = Arc::new(Wakeups::new()?);
        let start = Instant::now();
        let park = |seconds| {
            let deadline = Some(start + Duration::from_secs(seconds));
            let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: 1, deadline };
            if let Parked::Waiting { arm: Some(at) } = client.park(waiter) {
                timer.schedule(at, as_timed(&client));
            }
            client.unpark(1, &wakeups);
        };
        for round in 0..10_000 {
            // A long wait that is answered, then a short one that is not.
            park(86_400 + round);
            park(round);
            timer.fire(start + Duration::from_secs(round));
        }
        assert!(lock(&timer.shared.heap).entries.len() <= SWEEP_FLOOR);
        Ok(())
    }
}
