//! The hub beside a model of it.

use std::sync::Arc;

use _sse_channel::event::{Draft, Event, Format};
use _sse_channel::event_id::EventId;
use _sse_channel::frame::{Body, Fields};
use _sse_channel::history::Gap;
use _sse_channel::hub::{ChannelKey, Hub, Resume};
use _sse_channel::metrics::Reason;
use _sse_channel::queue::{Client, Kind, Overflow, Taken};
use arbitrary::{Arbitrary, Unstructured};

const CHANNELS: usize = 3;
const MOST_CLIENTS: usize = 12;
const MOST_STEPS: usize = 300;

#[derive(Arbitrary, Debug)]
enum Step {
    Publish { channel: u8, has_message: bool },
    Listen { channels: u8, is_stream: bool, capacity: u8, overflow: u8, from: From },
    Read { client: u8, events: u8 },
    Look { client: u8 },
    Leave { client: u8 },
}

#[derive(Arbitrary, Debug)]
enum From {
    Now,
    /// After what another client has read.
    Client(u8),
    /// After an id, whose it may be.
    Id(u8, u8),
    Nonsense,
}

/// A client, and what it should have.
struct Listener {
    client: Arc<Client>,
    channels: Vec<usize>,
    /// It is to get what comes after this, unless it lost some.
    after: EventId,
    /// Some of what it missed was forgotten: what it gets of that is not known.
    may_miss_until: EventId,
    read: Vec<EventId>,
    has_left: bool,
}

impl Listener {
    /// Checks an event, and notes it.
    fn take(&mut self, event: &Event) {
        let id = event.id.expect("what was published has an id");
        assert!(self.read.last().is_none_or(|last| *last < id), "in order, and none twice");
        assert!(id > self.after, "it had that one already");
        self.read.push(id);
    }
}

/// Does what `bytes` say, and holds every client to the model.
pub fn hub(bytes: &[u8]) {
    let mut given = Unstructured::new(bytes);
    let history = given.int_in_range(0..=20).unwrap_or(5);
    let hub = Arc::new(Hub::default());
    let names = ["a", "b", "c"];
    let keys: Vec<ChannelKey> = names.iter().map(|name| hub.channel(name, history)).collect();
    let mut published: Vec<(EventId, usize, bool)> = Vec::new();
    let mut listeners: Vec<Listener> = Vec::new();
    for _ in 0..MOST_STEPS {
        if given.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut given) else { break };
        match step {
            Step::Publish { channel, has_message } => {
                let channel = usize::from(channel) % CHANNELS;
                let fields = if has_message {
                    Fields { data: Some("x"), ..Fields::default() }
                } else {
                    Fields { comment: Some("x"), ..Fields::default() }
                };
                let body = Body::encode(&fields, 100).ok();
                let draft = Draft { body, format: Format::Text, has_message, decoded: None };
                let id = hub.publish(keys[channel], draft).expect("it has a wire form");
                assert!(published.last().is_none_or(|(last, ..)| *last < id));
                published.push((id, channel, has_message));
            }
            Step::Listen { channels, is_stream, capacity, overflow, from } => {
                if listeners.len() < MOST_CLIENTS {
                    let chosen = (0..CHANNELS).filter(|at| channels >> at & 1 == 1);
                    let mut chosen: Vec<usize> = chosen.collect();
                    if chosen.is_empty() {
                        chosen.push(0);
                    }
                    let kind = if is_stream { Kind::Stream } else { Kind::Queue };
                    let overflow = match overflow % 3 {
                        0 => Overflow::DropOldest,
                        1 => Overflow::DropNewest,
                        _ => Overflow::Disconnect,
                    };
                    let client = Client::new(kind, usize::from(capacity).max(1), overflow);
                    let resume = resume_of(&from, &published, &listeners);
                    listeners.push(listen(&hub, &keys, client, chosen, resume));
                }
            }
            Step::Read { client, events } => {
                if let Some(listener) = pick(&mut listeners, client) {
                    for _ in 0..events {
                        let Taken::Event(event) = listener.client.take() else { break };
                        listener.take(&event);
                    }
                }
            }
            Step::Look { client } => {
                if let Some(listener) = pick(&mut listeners, client) {
                    let oldest = listener.client.oldest();
                    assert_eq!(oldest.is_some(), !listener.client.is_empty());
                }
            }
            Step::Leave { client } => {
                if let Some(listener) = pick(&mut listeners, client) {
                    let was_there = hub.unregister(&listener.client, Reason::Closed);
                    assert!(!was_there || !listener.has_left, "it left twice");
                    listener.has_left = true;
                    // What is published from now on is not for it.
                    drain(listener);
                }
            }
        }
    }
    for listener in &mut listeners {
        let lost = listener.client.dropped();
        let was_cut = listener.client.is_closed();
        drain(listener);
        let takes = |has_message: &bool| *has_message || listener.client.kind() == Kind::Stream;
        let its = published.iter().filter(|(id, channel, has_message)| {
            listener.channels.contains(channel) && *id > listener.after && takes(has_message)
        });
        let expected: Vec<EventId> = its.map(|(id, ..)| *id).collect();
        assert!(listener.read.iter().all(|id| expected.contains(id)), "a foreign event");
        if lost == 0 && !was_cut {
            let certain = |id: &&EventId| **id > listener.may_miss_until;
            let read: Vec<&EventId> = listener.read.iter().filter(certain).collect();
            let expected: Vec<&EventId> = expected.iter().filter(certain).collect();
            assert_eq!(read, expected, "nothing is lost that was not counted");
        }
    }
    for key in keys {
        let clients = hub.client_count(key);
        let left = listeners.iter().filter(|its| !its.client.is_closed()).count();
        assert!(clients <= left, "who is closed is no client");
    }
}

fn pick(listeners: &mut [Listener], at: u8) -> Option<&mut Listener> {
    let count = listeners.len();
    listeners.get_mut(usize::from(at).checked_rem(count)?)
}

fn drain(listener: &mut Listener) {
    while let Taken::Event(event) = listener.client.take() {
        listener.take(&event);
    }
}

fn resume_of(from: &From, published: &[(EventId, usize, bool)], listeners: &[Listener]) -> Resume {
    match from {
        From::Now => Resume::Fresh,
        From::Client(at) => {
            let at = usize::from(*at).checked_rem(listeners.len());
            let last = at.map(|at| listeners[at].read.last().unwrap_or(&listeners[at].after));
            last.map_or(Resume::Fresh, |last| Resume::After(*last))
        }
        From::Id(at, n) => {
            let at = usize::from(*at).checked_rem(published.len());
            let id = at.map_or(EventId::default(), |at| published[at].0);
            Resume::After(EventId { n: id.n + u64::from(*n % 4), ..id })
        }
        From::Nonsense => Resume::Unknown,
    }
}

fn listen(
    hub: &Arc<Hub>,
    keys: &[ChannelKey],
    client: Client,
    channels: Vec<usize>,
    resume: Resume,
) -> Listener {
    let client = Arc::new(client);
    let chosen: Vec<ChannelKey> = channels.iter().map(|at| keys[*at]).collect();
    let registered = hub.register(&client, &chosen, resume, Box::new(()));
    let registered = registered.expect("it is new").expect("all is heard on this bus");
    let newest = hub.newest();
    let (after, may_miss_until) = match (resume, registered.gap) {
        (Resume::After(last), None) => (last, last),
        (Resume::After(last), Some(Gap::TooOld)) => (last, newest),
        // From now on.
        _ => (newest, newest),
    };
    Listener { client, channels, after, may_miss_until, read: Vec::new(), has_left: false }
}
