//! What several models need.

use std::sync::Arc;

use _sse_channel::event::{Draft, Event, Format};
use _sse_channel::event_id::EventId;
use _sse_channel::frame::{Body, Fields};
use _sse_channel::hub::{ChannelKey, Hub, Registered, Resume};
use _sse_channel::metrics::Reason;
use _sse_channel::queue::{Client, Delivery, Kind, Overflow, Taken, drain};
use _sse_channel::wake::WakeBatch;
use _sse_channel::wake::Wakeups;
#[cfg(feature = "shuttle")]
pub use shuttle::thread::{JoinHandle, spawn as go, yield_now};
#[cfg(not(feature = "shuttle"))]
pub use std::thread::{JoinHandle, spawn as go, yield_now};

/// Models of one file: their names, and what each runs.
pub type Models = &'static [(&'static str, fn())];

/// Sleeps until a bell was rung.
#[cfg(feature = "shuttle")]
pub fn wait_for_the_bell(wakeups: &Wakeups) {
    wakeups.rings().wait();
}

/// Sleeps until a bell was rung.
#[cfg(not(feature = "shuttle"))]
pub fn wait_for_the_bell(wakeups: &Wakeups) {
    use rustix::event::{PollFd, PollFlags, poll};
    let fd = wakeups.fd();
    while poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) != Ok(1) {}
}

/// What a thread of the model gave; its failure is the model's.
pub fn done<R>(thread: JoinHandle<R>) -> R {
    thread.join().unwrap()
}

pub fn body(text: &str) -> Body {
    Body::encode(&Fields { data: Some(text), ..Fields::default() }, 1 << 20).unwrap()
}

pub fn draft(text: &str) -> Draft {
    Draft { body: Some(body(text)), format: Format::Text, has_message: true, decoded: None }
}

/// An event of no channel.
pub fn event(n: u64) -> Arc<Event> {
    Arc::new(Event::seal(draft("x"), Some(EventId { ms: 0, n }), None))
}

pub fn id(event: &Event) -> EventId {
    event.id.expect("what is ordered has an id")
}

/// A hub that is the whole bus, and a channel of it.
pub fn hub_with_channel() -> (Arc<Hub>, ChannelKey) {
    let hub = Arc::new(Hub::default());
    let key = hub.channel("a", 100);
    (hub, key)
}

pub fn join(
    hub: &Arc<Hub>,
    channels: &[ChannelKey],
    kind: Kind,
    resume: Resume,
) -> (Arc<Client>, Registered) {
    let client = Arc::new(Client::new(kind, 100, Overflow::Disconnect));
    let registered = hub.register(&client, channels, resume, Box::new(())).unwrap();
    (client, registered.expect("a hub that is the bus hears all"))
}

/// A queue of a hub of its own, by which it is closed.
pub fn queue(capacity: usize, overflow: Overflow) -> (Arc<Hub>, Arc<Client>) {
    let (hub, key) = hub_with_channel();
    let client = Arc::new(Client::new(Kind::Queue, capacity, overflow));
    hub.register(&client, &[key], Resume::Fresh, Box::new(())).unwrap();
    (hub, client)
}

pub fn close(hub: &Arc<Hub>, client: &Arc<Client>) {
    hub.unregister(client, Reason::Closed);
}

/// Offers events, and gives what became of each and which fell out.
pub fn offer(client: &Client, numbers: std::ops::RangeInclusive<u64>) -> Offered {
    let mut offered = Offered::default();
    for n in numbers {
        let mut wakes = WakeBatch::default();
        let mut discarded = Vec::new();
        let delivery = client.deliver(&event(n), &mut wakes, &mut discarded);
        wakes.flush();
        match delivery {
            Delivery::Queued | Delivery::DroppedOldest => offered.kept.push(n),
            Delivery::DroppedNewest | Delivery::Disconnected => offered.refused.push(n),
            Delivery::Skipped => offered.skipped.push(n),
        }
        offered.discarded.extend(discarded.iter().map(|event| id(event).n));
    }
    offered
}

/// What became of events.
#[derive(Default)]
pub struct Offered {
    pub kept: Vec<u64>,
    pub discarded: Vec<u64>,
    pub refused: Vec<u64>,
    pub skipped: Vec<u64>,
}

/// All that comes until the end, by a thread that blocks.
pub fn read_to_the_end(client: &Client) -> Vec<EventId> {
    let mut read = Vec::new();
    loop {
        match client.take_blocking(None) {
            Taken::Event(event) => read.push(id(&event)),
            Taken::Closed => return read,
            Taken::Empty => panic!("it was not to wait for a time"),
        }
    }
}

pub fn waiting(client: &Client) -> Vec<EventId> {
    drain(client, |_| false).iter().map(|event| id(event)).collect()
}

pub fn numbers(ids: &[EventId]) -> Vec<u64> {
    ids.iter().map(|id| id.n).collect()
}

pub fn assert_in_order<T: Ord + std::fmt::Debug>(read: &[T]) {
    assert!(read.windows(2).all(|pair| pair[0] < pair[1]), "out of order or doubled: {read:?}");
}

/// Each of `all` is in exactly one of `parts`, and each part is in order.
pub fn assert_shared_out<T: Ord + Clone + std::fmt::Debug>(all: &[T], parts: &[Vec<T>]) {
    for part in parts {
        assert_in_order(part);
    }
    let mut together = parts.concat();
    together.sort();
    let mut all = all.to_vec();
    all.sort();
    assert_eq!(together, all, "lost or doubled");
}
