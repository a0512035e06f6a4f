//! Control: what one process tells all others about their clients, over the bus.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use url::form_urlencoded;

use crate::event::Event;
use crate::hub::{Hub, Outlet, Passed};
use crate::offload::Offload;
use crate::sync::{Mutex, lock};

/// The channel that every process with streams hears.
pub const CHANNEL: &str = "sse_channel.control";

/// What the names of the library's own channels begin with; no user's does.
pub const OWN: &str = "sse_channel.";

/// Events of the control channel that are remembered: one that was missed is read back.
const HISTORY: usize = 100;

/// What came on a channel of the library's own, to be looked at after the hub's lock.
#[derive(Debug, Default)]
pub struct Told(Mutex<Vec<Arc<Event>>>);

impl Told {
    /// Keeps an event; does not wait.
    pub fn put(&self, passed: Passed) {
        if let Passed::Event { event, .. } = passed {
            lock(&self.0).push(event);
        }
    }

    /// The texts of all that came. What is done with them may need the hub's lock, under which
    /// others put: so none of it is done with this one.
    pub fn take(&self) -> impl Iterator<Item = Bytes> + use<> {
        let told = std::mem::take(&mut *lock(&self.0));
        told.into_iter().filter_map(|event| event.data.clone())
    }

    /// Does something with each text that came, also with those that another thread is at: when this
    /// is over, all is done that came before it began.
    fn each(&self, mut act: impl FnMut(&[u8])) {
        let told = lock(&self.0).clone();
        for text in told.iter().filter_map(|event| event.data.as_deref()) {
            act(text);
        }
        lock(&self.0).retain(|event| !told.iter().any(|done| Arc::ptr_eq(done, event)));
    }
}

/// The streams that are to be disconnected: those that match all that is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocation {
    /// Those of this user.
    pub user: Option<Arc<str>>,
    /// Those that listen to this channel.
    pub channel: Option<Arc<str>>,
}

impl Revocation {
    /// As it travels.
    pub fn to_text(&self) -> String {
        let mut text = form_urlencoded::Serializer::new(String::new());
        for (name, value) in [("user", &self.user), ("channel", &self.channel)] {
            if let Some(value) = value {
                text.append_pair(name, value);
            }
        }
        text.finish()
    }

    /// What `to_text` gave; `None` for what names nothing that is known here.
    pub fn parse(text: &[u8]) -> Option<Revocation> {
        let mut revocation = Revocation::default();
        for (name, value) in form_urlencoded::parse(text) {
            match &*name {
                "user" => revocation.user = Some((*value).into()),
                "channel" => revocation.channel = Some((*value).into()),
                // Of a later version: what it narrows down is not known.
                _ => return None,
            }
        }
        (revocation != Revocation::default()).then_some(revocation)
    }
}

/// What does here as it is told.
#[derive(Debug)]
pub struct Control {
    hub: Weak<Hub>,
    offload: Weak<Offload>,
    told: Told,
    done: AtomicU64,
}

impl Control {
    /// Does from now on what is told on the control channel of `hub`.
    pub fn install(hub: &Arc<Hub>, offload: &Arc<Offload>) -> Arc<Control> {
        let control = Arc::new(Control {
            hub: Arc::downgrade(hub),
            offload: Arc::downgrade(offload),
            told: Told::default(),
            done: AtomicU64::new(0),
        });
        hub.add_own(CHANNEL, HISTORY, &(Arc::clone(&control) as _));
        control
    }

    /// How often something was done; a stream that was opened meanwhile may have slipped through.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }
}

impl Outlet for Control {
    fn put(&self, passed: Passed) {
        self.told.put(passed);
    }

    fn ring(&self) {
        self.told.each(|text| {
            let told = Revocation::parse(text);
            let (Some(revocation), Some(hub)) = (told, self.hub.upgrade()) else { return };
            self.done.fetch_add(1, Relaxed);
            revoke(&hub, self.offload.upgrade().as_deref(), revocation.channel, revocation.user);
        });
    }
}

/// Disconnects streams of a hub, wherever they are.
pub fn revoke(
    hub: &Hub,
    offload: Option<&Offload>,
    channel: Option<Arc<str>>,
    user: Option<Arc<str>>,
) {
    let Some(revoked) = hub.revoke(channel.as_deref(), user) else { return };
    if let Some(offload) = offload {
        offload.revoke(&Arc::new(revoked));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_travels_arrives() {
        let text = |text: &str| Some(Arc::from(text));
        for revocation in [
            Revocation { user: text("a&b=ü\n"), channel: None },
            Revocation { user: None, channel: text("") },
            Revocation { user: text("5"), channel: text("c d") },
        ] {
            assert_eq!(Revocation::parse(revocation.to_text().as_bytes()), Some(revocation));
        }
        for strange in ["", "user", "later=1&user=5", "\u{fffd}", "=&="] {
            let parsed = Revocation::parse(strange.as_bytes());
            assert_eq!(parsed.filter(|_| strange != "user"), None, "{strange:?}");
        }
    }
}
