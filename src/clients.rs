//! The clients of a process as a whole: how many there may be, whose they are, and what all are told
//! at its end.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use url::form_urlencoded;

use crate::event::{Draft, Event, Format};
use crate::frame::{Body, Fields};
use crate::metrics::Reason;
use crate::queue::Client;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use crate::sync::{Mutex, lock};
use crate::wake::WakeBatch;

/// Whose a stream is.
#[derive(Clone, Debug, Default)]
pub struct Holder {
    /// The user.
    pub user: Option<Arc<str>>,
    /// The address that it came from.
    pub address: Option<Arc<str>>,
    /// What it listens to, for those who are told of it.
    pub channels: Option<Arc<str>>,
}

/// How many streams a process may have at the most, in all, of one user and of one address. 0 is no
/// limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Most {
    /// In all.
    pub streams: usize,
    /// Of one user.
    pub of_user: usize,
    /// Of one address.
    pub of_address: usize,
}

/// Why there is no place for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Full {
    /// The process has all that it may.
    Process,
    /// Its user has.
    User,
    /// Its address has.
    Address,
}

impl Full {
    /// The name in `stats()`.
    pub fn name(self) -> &'static str {
        match self {
            Full::Process => "full",
            Full::User => "user",
            Full::Address => "address",
        }
    }
}

/// Counts the streams of a process.
#[derive(Debug, Default)]
pub struct Admission(Arc<Taken>);

#[derive(Debug, Default)]
struct Taken {
    streams: AtomicUsize,
    numbers: AtomicU64,
    /// By user and by address. Held for a look.
    held: Mutex<HashMap<(Full, Arc<str>), usize>>,
    /// Where it is told which streams begin and end.
    watcher: OnceLock<Arc<Client>>,
}

impl Admission {
    /// A place for one more; without `most` it is beside those that are counted.
    ///
    /// # Errors
    /// Why there is none.
    pub fn take(&self, most: Option<Most>, holder: Holder) -> Result<Slot, Full> {
        let count = self.0.streams.fetch_add(usize::from(most.is_some()), Relaxed);
        // Gives the place back when it is dropped, in any case.
        let mut slot = Slot {
            taken: Arc::clone(&self.0),
            number: self.0.numbers.fetch_add(1, Relaxed) + 1,
            holder,
            is_one: most.is_some(),
            is_counted: false,
            since: Instant::now(),
            reason: OnceLock::new(),
            is_told: OnceLock::new(),
        };
        let Some(most) = most else { return Ok(slot) };
        if most.streams > 0 && count >= most.streams {
            return Err(Full::Process);
        }
        let mut held = lock(&self.0.held);
        for (which, limit) in [(Full::User, most.of_user), (Full::Address, most.of_address)] {
            let Some(name) = slot.holder.name(which) else { continue };
            if limit > 0 && held.get(&(which, Arc::clone(name))).is_some_and(|its| *its >= limit) {
                drop(held);
                return Err(which);
            }
        }
        for which in [Full::User, Full::Address] {
            if let Some(name) = slot.holder.name(which) {
                *held.entry((which, Arc::clone(name))).or_default() += 1;
            }
        }
        drop(held);
        slot.is_counted = true;
        Ok(slot)
    }

    /// Places that are taken now.
    pub fn taken(&self) -> usize {
        self.0.streams.load(Relaxed)
    }

    /// Has it told to `watcher` which streams begin and end. The first holds.
    pub fn watch(&self, watcher: &Arc<Client>) {
        let _ = self.0.watcher.set(Arc::clone(watcher));
    }
}

impl Holder {
    fn name(&self, which: Full) -> Option<&Arc<str>> {
        match which {
            Full::Process => None,
            Full::User => self.user.as_ref(),
            Full::Address => self.address.as_ref(),
        }
    }
}

/// The place of a stream, wherever it is, until this is dropped.
#[derive(Debug)]
pub struct Slot {
    taken: Arc<Taken>,
    /// Tells it from all other streams of the process.
    pub number: u64,
    /// Whose it is.
    pub holder: Holder,
    /// Whether it is one of the streams that are counted.
    is_one: bool,
    /// Whether it is counted with its user and address.
    is_counted: bool,
    /// When it began.
    pub since: Instant,
    reason: OnceLock<Reason>,
    is_told: OnceLock<()>,
}

impl Slot {
    /// Notes why it ends.
    pub fn set_reason(&self, reason: Reason) {
        // The first holds.
        let _ = self.reason.set(reason);
    }

    /// Tells who watched already when it was opened that it has begun.
    pub fn tell_begin(&self) {
        let is_watched = self.holder.channels.is_some() && self.taken.watcher.get().is_some();
        if is_watched && self.is_told.set(()).is_ok() {
            self.tell(&[("told", "connected")]);
        }
    }

    fn tell(&self, what: &[(&str, &str)]) {
        let Some(watcher) = self.taken.watcher.get() else { return };
        let mut text = form_urlencoded::Serializer::new(String::new());
        text.append_pair("number", &self.number.to_string());
        let Holder { user, address, channels } = &self.holder;
        for (name, value) in [("user", user), ("address", address), ("channels", channels)] {
            if let Some(value) = value {
                text.append_pair(name, value);
            }
        }
        let text = text.extend_pairs(what).finish();
        let fields = Fields { data: Some(&text), ..Fields::default() };
        let Ok(body) = Body::encode(&fields, usize::MAX) else { return };
        let draft =
            Draft { body: Some(body), format: Format::Text, has_message: true, decoded: None };
        let mut wakes = WakeBatch::default();
        // Refused by one that is closed: then nobody is told any more.
        let _ = watcher.put(&Arc::new(Event::seal(draft, None, None)), &mut wakes);
        wakes.flush();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.taken.streams.fetch_sub(usize::from(self.is_one), Relaxed);
        if self.is_counted {
            let mut held = lock(&self.taken.held);
            for which in [Full::User, Full::Address] {
                let Some(name) = self.holder.name(which) else { continue };
                let key = (which, Arc::clone(name));
                if let Some(count) = held.get_mut(&key) {
                    *count -= 1;
                    if *count == 0 {
                        held.remove(&key);
                    }
                }
            }
        }
        if self.is_told.get().is_some() {
            let reason = self.reason.get().copied().unwrap_or(Reason::Closed);
            let seconds = self.since.elapsed().as_secs_f64().to_string();
            self.tell(&[
                ("told", "disconnected"),
                ("reason", reason.name()),
                ("seconds", &seconds),
            ]);
        }
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

    fn holder(user: &str, address: &str) -> Holder {
        let text = |text: &str| (!text.is_empty()).then(|| Arc::from(text));
        Holder { user: text(user), address: text(address), channels: None }
    }

    #[test]
    fn places_are_counted_and_given_back() {
        let admission = Admission::default();
        let most = Most { streams: 2, ..Most::default() };
        let take = |most| admission.take(Some(most), Holder::default());
        let (one, other) = (take(most), take(most));
        assert!(one.is_ok() && other.is_ok());
        assert_eq!(take(most).err(), Some(Full::Process));
        assert_eq!(admission.taken(), 2);
        drop(one);
        assert!(take(most).is_ok());
        assert_eq!(admission.taken(), 1);
        let beside = admission.take(None, holder("u", "a"));
        assert!(beside.is_ok() && lock(&admission.0.held).is_empty());
        assert_eq!(admission.taken(), 1);
        drop(beside);
        assert_eq!(admission.taken(), 1);
        assert!(take(Most::default()).is_ok());
    }

    #[test]
    fn users_and_addresses_have_limits_of_their_own() {
        let admission = Admission::default();
        let most = Most { streams: 0, of_user: 1, of_address: 2 };
        let take = |user, address| admission.take(Some(most), holder(user, address));
        let (one, nobody) = (take("1", "a"), take("", "a"));
        assert!(one.is_ok() && nobody.is_ok());
        assert_eq!(take("1", "b").err(), Some(Full::User));
        assert_eq!(take("2", "a").err(), Some(Full::Address));
        // Names of one kind are not those of the other.
        let other = take("a", "1");
        assert!(other.is_ok());
        assert_eq!(admission.taken(), 3, "a refusal takes no place");
        drop(one);
        assert!(take("1", "a").is_ok());
        drop((nobody, other));
        assert!(lock(&admission.0.held).is_empty());
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
