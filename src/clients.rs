//! The clients of a process as a whole: how many there may be, and what all are told at its end.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Counts the streams of a process.
#[derive(Debug, Default)]
pub struct Admission(Arc<AtomicUsize>);

impl Admission {
    /// A place for one more; `None` when `most` are taken. 0 is no limit.
    pub fn take(&self, most: usize) -> Option<Slot> {
        let count = self.0.fetch_add(1, Relaxed);
        // Gives the place back when it is dropped, in any case.
        let slot = Slot(Arc::clone(&self.0));
        (most == 0 || count < most).then_some(slot)
    }

    /// Places that are taken now.
    pub fn taken(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// The place of a stream, wherever it is, until this is dropped.
#[derive(Debug)]
pub struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Numbers that differ in each process.
#[derive(Debug, Default)]
pub struct Chance(RandomState);

impl Chance {
    /// A number from 0 to below 1, always the same for one `seed`.
    pub fn of(&self, seed: u64) -> f64 {
        let mut hasher = self.0.build_hasher();
        hasher.write_u64(seed);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What the clients of a process that ends are told: when to come back.
#[derive(Debug)]
pub struct Farewell {
    /// Milliseconds after which clients come back in general.
    retry: u64,
    /// Clients that are told: the more there are, the longer they are spread over.
    clients: usize,
    chance: Chance,
    told: AtomicUsize,
}

impl Farewell {
    /// For so many clients.
    pub fn new(retry: u64, clients: usize) -> Farewell {
        Farewell { retry, clients, chance: Chance::default(), told: AtomicUsize::new(0) }
    }

    /// The frame for one more client.
    pub fn frame(&self) -> String {
        let chance = self.chance.of(self.told.fetch_add(1, Relaxed) as u64);
        // Thousands must not come back in one instant: one each millisecond, at the most.
        let spread = self.retry.max(self.clients as u64) as f64;
        format!("retry: {}\n\n", self.retry / 2 + (chance * spread) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_and_given_back() {
        let admission = Admission::default();
        let one = admission.take(2);
        let other = admission.take(2);
        assert!(one.is_some() && other.is_some());
        assert!(admission.take(2).is_none());
        assert_eq!(admission.taken(), 2);
        drop(one);
        assert!(admission.take(2).is_some());
        assert_eq!(admission.taken(), 1);
        assert!(admission.take(0).is_some());
    }

    #[test]
    fn clients_come_back_one_after_the_other() {
        let farewell = Farewell::new(1000, 5000);
        let times: Vec<u64> = (0..5000)
            .filter_map(|_| {
                let frame = farewell.frame();
                frame.strip_prefix("retry: ")?.strip_suffix("\n\n")?.parse().ok()
            })
            .collect();
        assert_eq!(times.len(), 5000);
        assert!(times.iter().all(|time| (500..5500).contains(time)));
        let in_one_second = times.iter().filter(|time| (2000..3000).contains(*time)).count();
        assert!((800..1200).contains(&in_one_second), "{in_one_second}");
    }
}
