//! The hub: publishers beside registration, replay, the end of clients and handing over.

use std::sync::Arc;

use _sse_channel::clients::{Admission, Full, Holder, Most};
use _sse_channel::control::{self, Control, Revocation};
use _sse_channel::event::Format;
use _sse_channel::event_id::EventId;
use _sse_channel::history::Limits;
use _sse_channel::hub::{Arrival, ChannelKey, First, Hub, Outlet, Passed, Resume};
use _sse_channel::metrics::Reason;
use _sse_channel::offload::Offload;
use _sse_channel::queue::{Client, Kind, Overflow, Taken};
use _sse_channel::sync::{Mutex, lock};

use crate::parts::*;

pub const MODELS: Models = &[
    ("publishers_meet_registrations", publishers_meet_registrations),
    ("a_client_of_two_channels_has_one_order", a_client_of_two_channels_has_one_order),
    ("a_channel_is_forgotten_while_one_resumes", a_channel_is_forgotten_while_one_resumes),
    ("a_channel_is_forgotten_and_heard_anew", a_channel_is_forgotten_and_heard_anew),
    ("a_close_meets_publishers_and_registrations", a_close_meets_publishers_and_registrations),
    ("a_client_ends_once", a_client_ends_once),
    ("who_is_revoked_gets_nothing_more", who_is_revoked_gets_nothing_more),
    ("two_disconnects_are_done_when_they_are_told", two_disconnects_are_done_when_they_are_told),
    ("a_stream_is_handed_over_while_events_come", a_stream_is_handed_over_while_events_come),
    ("a_stream_that_is_behind_is_handed_over", a_stream_that_is_behind_is_handed_over),
    ("a_private_channel_goes_while_one_reads", a_private_channel_goes_while_one_reads),
    ("places_are_bounded_and_given_back", places_are_bounded_and_given_back),
];

fn publisher(hub: &Arc<Hub>, key: ChannelKey, count: usize) -> JoinHandle<Vec<EventId>> {
    let hub = Arc::clone(hub);
    go(move || (0..count).map(|_| hub.publish(key, draft("x")).unwrap()).collect())
}

fn publishers_meet_registrations() {
    let (hub, key) = hub_with_channel();
    let before = hub.publish(key, draft("before")).unwrap();
    let publishers = [publisher(&hub, key, 2), publisher(&hub, key, 2)];
    let resumed = {
        let hub = Arc::clone(&hub);
        go(move || {
            let (client, registered) = join(&hub, &[key], Kind::Queue, Resume::After(before));
            assert_eq!(registered.gap, None);
            // All four come, or this one sleeps for ever.
            let read: Vec<EventId> = (0..4).map(|_| next(&client)).collect();
            assert!(waiting(&client).is_empty());
            read
        })
    };
    let (fresh, registered) = join(&hub, &[key], Kind::Stream, Resume::Fresh);
    let mut all = publishers.map(done).concat();
    all.sort();
    assert_eq!(done(resumed), all);
    all.retain(|id| *id > registered.cursor);
    assert_eq!(waiting(&fresh), all);
}

fn next(client: &Client) -> EventId {
    match client.take_blocking(None) {
        Taken::Event(event) => id(&event),
        other => panic!("{other:?}"),
    }
}

fn a_client_of_two_channels_has_one_order() {
    let hub = Arc::new(Hub::default());
    let keys = [hub.channel("a", 9), hub.channel("b", 9)];
    let before = hub.newest();
    let publishers = keys.map(|key| publisher(&hub, key, 2));
    let (client, registered) = join(&hub, &keys, Kind::Stream, Resume::After(before));
    assert_eq!(registered.gap, None);
    let all = publishers.map(done);
    assert_shared_out(&all.concat(), &[waiting(&client)]);
}

/// A bus of one channel: its store, and its order.
struct Bus {
    hub: Arc<Hub>,
    key: ChannelKey,
    stored: Mutex<Vec<EventId>>,
}

impl Bus {
    fn new() -> Arc<Bus> {
        // The ids are small numbers, and so from long ago.
        let hub = Arc::new(Hub::new(Limits { age: u64::MAX, ..Limits::default() }, false));
        let key = hub.channel("a", 9);
        Arc::new(Bus { hub, key, stored: Mutex::default() })
    }

    fn publish(&self, n: u64) {
        let mut stored = lock(&self.stored);
        let at = EventId { ms: 1, n };
        stored.push(at);
        self.hub.deliver([arrival(at)]);
    }

    /// Registers a client, as a process does: what the hub lacks is brought first.
    fn listen(&self, resume: Resume) -> Arc<Client> {
        let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
        loop {
            if !self.hub.lack(&[self.key], resume).is_nothing() {
                let stored = lock(&self.stored);
                let newest = stored.last().copied().unwrap_or_default();
                self.hub.hear("a", newest);
                if let Resume::After(_) = resume {
                    let all = stored.iter().map(|id| arrival(*id)).collect();
                    self.hub.read_back("a", EventId::default(), all);
                }
            }
            let registered = self.hub.register(&client, &[self.key], resume, Box::new(()));
            if let Some(registered) = registered.unwrap() {
                assert_eq!(registered.gap, None, "the store has all of it");
                return client;
            }
        }
    }
}

fn arrival(id: EventId) -> Arrival {
    Arrival { channel: "a".into(), id, body: body("x"), format: Format::Text }
}

fn a_channel_is_forgotten_while_one_resumes() {
    let bus = Bus::new();
    bus.publish(1);
    let publisher = {
        let bus = Arc::clone(&bus);
        go(move || (2..=3).for_each(|n| bus.publish(n)))
    };
    let retirer = {
        let bus = Arc::clone(&bus);
        go(move || bus.hub.retire("a"))
    };
    let client = bus.listen(Resume::After(EventId { ms: 1, n: 1 }));
    done(publisher);
    done(retirer);
    assert_eq!(numbers(&waiting(&client)), [2, 3]);
}

fn a_channel_is_forgotten_and_heard_anew() {
    let bus = Bus::new();
    (1..=2).for_each(|n| bus.publish(n));
    let retirer = {
        let bus = Arc::clone(&bus);
        go(move || bus.hub.retire_all())
    };
    let other = {
        let bus = Arc::clone(&bus);
        go(move || bus.listen(Resume::Fresh))
    };
    // Another one may have had it heard anew since this one's look; what was read then is forgotten.
    let client = bus.listen(Resume::After(EventId { ms: 1, n: 1 }));
    done(retirer);
    let other = done(other);
    bus.publish(3);
    assert_eq!(numbers(&waiting(&client)), [2, 3]);
    assert_eq!(numbers(&waiting(&other)), [3]);
}

fn a_close_meets_publishers_and_registrations() {
    let (hub, key) = hub_with_channel();
    let (early, _) = join(&hub, &[key], Kind::Queue, Resume::Fresh);
    let reader = {
        let early = Arc::clone(&early);
        go(move || read_to_the_end(&early))
    };
    let publisher = publisher(&hub, key, 3);
    let late = {
        let hub = Arc::clone(&hub);
        go(move || join(&hub, &[key], Kind::Stream, Resume::Fresh))
    };
    hub.close(Reason::Exit);
    let all = done(publisher);
    let read = done(reader);
    assert_eq!(read, all[..read.len()], "what was published before the close, and no more");
    let (late, registered) = done(late);
    let after: Vec<EventId> = all.into_iter().filter(|id| *id > registered.cursor).collect();
    let its = waiting(&late);
    assert_eq!(its, after[..its.len()]);
    assert!(late.is_closed(), "also if it came after the close");
    assert_eq!(hub.client_count(key), 0);
}

fn a_client_ends_once() {
    let (hub, key) = hub_with_channel();
    let client = Arc::new(Client::new(Kind::Queue, 1, Overflow::Disconnect));
    hub.register(&client, &[key], Resume::Fresh, Box::new(())).unwrap();
    // Its second event is one too many.
    let publisher = publisher(&hub, key, 2);
    let reasons = [Reason::Closed, Reason::Exit];
    let enders = reasons.map(|reason| {
        let (hub, client) = (Arc::clone(&hub), Arc::clone(&client));
        go(move || u64::from(hub.unregister(&client, reason)))
    });
    done(publisher);
    let ended = enders.map(done);
    let figures = hub.figures(key).counters.snapshot();
    assert_eq!(ended.iter().sum::<u64>() + figures.disconnected(Reason::Overflow), 1);
    assert_eq!(reasons.map(|reason| figures.disconnected(reason)), ended, "the first one's");
    let counted: u64 = Reason::ALL.iter().map(|reason| figures.disconnected(*reason)).sum();
    assert_eq!((counted, hub.client_count(key)), (1, 0));
    assert!(client.is_closed());
}

fn who_is_revoked_gets_nothing_more() {
    let (hub, key) = hub_with_channel();
    let admission = Admission::default();
    let client_of = |user: &str| {
        let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
        let holder = Holder { user: Some(user.into()), ..Holder::default() };
        let slot = admission.take(Some(Most::default()), holder).unwrap();
        client.set_slot(Arc::new(slot));
        hub.register(&client, &[key], Resume::Fresh, Box::new(())).unwrap();
        client
    };
    let (gone, other) = (client_of("1"), client_of("2"));
    let publisher = publisher(&hub, key, 3);
    let reader = {
        let gone = Arc::clone(&gone);
        go(move || read_to_the_end(&gone))
    };
    hub.revoke(Some("a"), Some("1".into()));
    assert!(gone.is_closed() && matches!(gone.take(), Taken::Closed), "what waited is not sent");
    let all = done(publisher);
    let read = done(reader);
    assert_in_order(&read);
    assert!(read.iter().all(|id| all.contains(id)));
    assert_eq!(waiting(&other), all);
    assert_eq!(hub.figures(key).counters.snapshot().disconnected(Reason::Revoked), 1);
    assert_eq!(admission.taken(), 1, "its place is given back");
}

fn two_disconnects_are_done_when_they_are_told() {
    let hub = Arc::new(Hub::default());
    let offload = Arc::new(Offload::default());
    let control = Control::install(&hub, &offload);
    let told_on = hub.channel(control::CHANNEL, 9);
    let threads = ["a", "b"].map(|name| {
        let key = hub.channel(name, 9);
        let (client, _) = join(&hub, &[key], Kind::Stream, Resume::Fresh);
        let hub = Arc::clone(&hub);
        go(move || {
            let told = Revocation { channel: Some(name.into()), user: None };
            hub.publish(told_on, draft(&told.to_text())).unwrap();
            assert!(client.is_closed(), "the other thread may be at it yet");
        })
    });
    threads.into_iter().for_each(done);
    assert!(control.done() >= 2);
}

/// An outlet that keeps what it is passed.
#[derive(Debug, Default)]
struct Kept(Mutex<Vec<(u64, EventId)>>);

impl Outlet for Kept {
    fn put(&self, passed: Passed) {
        if let Passed::Event { sequence, event, .. } = passed {
            lock(&self.0).push((sequence, id(&event)));
        }
    }

    fn ring(&self) {}
}

/// Hands a stream over that is told to read on when more than `most` wait, while events come.
fn hand_over(most: usize) {
    let (hub, key) = hub_with_channel();
    let kept = Arc::new(Kept::default());
    let outlet: Arc<dyn Outlet> = Arc::clone(&kept) as _;
    // The outlet is passed all of it for a connection that it has already.
    let (earlier, registered) = join(&hub, &[key], Kind::Stream, Resume::Fresh);
    assert!(hub.hand_over(&earlier, registered.cursor, most, &outlet, |_, _, _| ()));
    let (client, registered) = join(&hub, &[key], Kind::Stream, Resume::Fresh);
    let publishers = [publisher(&hub, key, 2), publisher(&hub, key, 2)];
    let given = Mutex::default();
    let is_it = hub.hand_over(&client, registered.cursor, most, &outlet, |route, first, at| {
        *lock(&given) = Some((route, first, at));
    });
    assert!(is_it);
    let (route, first, mut live_from) = lock(&given).take().unwrap();
    let mut had: Vec<EventId> = Vec::new();
    match first {
        First::Events(events) => had.extend(events.iter().map(|event| id(event))),
        First::After(mut cursor) => loop {
            let step = hub.read_on(&route, cursor, None, 1);
            assert_eq!(step.lost, None);
            had.extend(step.events.iter().map(|event| id(event)));
            cursor = step.cursor;
            if let Some(at) = step.live_from {
                live_from = at;
                break;
            }
        },
    }
    let mut all = publishers.map(done).concat();
    all.sort();
    let live = std::mem::take(&mut *lock(&kept.0));
    had.extend(live.into_iter().filter(|(sequence, _)| *sequence > live_from).map(|its| its.1));
    assert_eq!(had, all);
    assert_eq!(hub.client_count(key), 2);
    hub.let_go(&route, &outlet, Reason::Left);
    assert_eq!(hub.client_count(key), 1);
}

fn a_stream_is_handed_over_while_events_come() {
    hand_over(64);
}

fn a_stream_that_is_behind_is_handed_over() {
    hand_over(0);
}

fn a_private_channel_goes_while_one_reads() {
    let (hub, key) = hub_with_channel();
    let (client, _) = join(&hub, &[key], Kind::Queue, Resume::Fresh);
    let reader = go(move || read_to_the_end(&client));
    let publisher = {
        let hub = Arc::clone(&hub);
        go(move || [hub.publish(key, draft("1")).unwrap(), hub.publish(key, draft("2")).unwrap()])
    };
    drop(hub);
    assert_eq!(done(reader), done(publisher));
}

fn places_are_bounded_and_given_back() {
    let admission = Arc::new(Admission::default());
    let most = Most { streams: 2, of_user: 1, of_address: 0 };
    let held = Arc::new(Mutex::new([0usize; 3]));
    let takers = [0, 0, 1, 2].map(|user: usize| {
        let (admission, held) = (Arc::clone(&admission), Arc::clone(&held));
        go(move || {
            let holder = Holder { user: Some(user.to_string().into()), ..Holder::default() };
            match admission.take(Some(most), holder) {
                Ok(slot) => {
                    let mut now = lock(&held);
                    now[user] += 1;
                    assert!(now[user] <= 1, "two places of one user");
                    assert!(now.iter().sum::<usize>() <= 2, "three places");
                    drop(now);
                    lock(&held)[user] -= 1;
                    drop(slot);
                    None
                }
                Err(full) => Some(full),
            }
        })
    });
    let [_, _, alone, other] = takers.map(done);
    assert!(![alone, other].contains(&Some(Full::User)), "it is nobody else's place");
    assert_eq!(admission.taken(), 0);
    let again = admission.take(Some(most), Holder { user: Some("0".into()), ..Holder::default() });
    assert!(again.is_ok(), "the user's place was given back");
}
