//! The hub: the channels of this process, their clients and their order.
//!
//! One lock orders all channels of a hub, so that an id is a position in every channel at once
//! and a client of several channels gets them in one order. Registration takes the same lock,
//! so that replay and live delivery meet without a gap and without a double.

mod rendering;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use slab::Slab;
use smallvec::SmallVec;

use crate::clients::{Farewell, Slot};
use crate::control;
use crate::error::{Error, Result};
use crate::event::{Attachment, Draft, Event, Format};
use crate::event_id::{EventId, IdClock, now_ms};
use crate::frame::{self, Body};
use crate::history::{Gap, History, Limits};
use crate::host::HostFigures;
use crate::metrics::{Counted, Counters, Reason};
use crate::queue::{Client, Delivery, Kind, Leftover, drain};
use crate::sync::{Mutex, lock};
use crate::wake::WakeBatch;

pub use rendering::{Missing, Rendered, render};

/// Clients whose memory is fetched before the first of them is written to. Atomic writes wait for
/// all reads before them, so that without it thousands of clients are thousands of cache misses
/// one after the other.
const LOOKAHEAD: usize = 16;

/// Readers of a burst are woken after so long at the latest.
const BATCH: Duration = Duration::from_millis(2);

/// A channel of one hub.
pub type ChannelKey = usize;

/// A client's place in a channel.
#[derive(Clone, Copy, Debug)]
pub struct Membership {
    /// The channel.
    pub channel: ChannelKey,
    place: usize,
}

/// Where a client wants to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// With what is published from now on.
    Fresh,
    /// After the last event that it has seen.
    After(EventId),
    /// After something that is not an id of ours.
    Unknown,
}

/// How a registration went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// The position from which the client goes on: what its opening frame carries.
    pub cursor: EventId,
    /// Why it does not get exactly what it missed, if so.
    pub gap: Option<Gap>,
}

/// An event that the bus has ordered and stored.
#[derive(Debug)]
pub struct Arrival {
    /// The channel's name.
    pub channel: Arc<str>,
    /// Its place in the order.
    pub id: EventId,
    /// What it says.
    pub body: Body,
    /// How a reader gets the message back.
    pub format: Format,
}

/// What a bus must do before a client can register.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lack {
    /// Channels that are not heard yet.
    pub unheard: Vec<Arc<str>>,
    /// Channels whose memory does not go back as far as the client, and whose store might.
    pub unread: Vec<Arc<str>>,
    /// The client knows an id that this process has not heard of.
    pub is_behind: bool,
}

impl Lack {
    /// Whether a client can register as it is.
    pub fn is_nothing(&self) -> bool {
        *self == Lack::default()
    }
}

/// The figures of one channel.
#[derive(Clone, Debug)]
pub struct ChannelFigures {
    /// The channel's name, empty for a private one.
    pub name: Arc<str>,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// Queues registered now.
    pub queues: usize,
    /// Streams registered now.
    pub streams: usize,
    /// Offloaded connections now.
    pub sockets: usize,
    /// Events that history keeps now.
    pub history_events: usize,
    /// Bytes reckoned for them.
    pub history_bytes: usize,
}

/// Tells all channels of all hubs of a process apart.
pub type ChannelNumber = u64;

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// What a hub passes to an outlet, in its order.
#[derive(Debug)]
pub enum Passed {
    /// An event of a channel, and its place in the hub's order.
    Event {
        /// The channel.
        channel: ChannelNumber,
        /// Its place among all that the hub passed on.
        sequence: u64,
        /// The event.
        event: Arc<Event>,
    },
    /// A private channel is gone: after what was passed comes nothing more.
    End(ChannelNumber),
}

/// Where events go whose clients the hub does not hold one by one: one outlet fans out to thousands
/// of connections of its own.
pub trait Outlet: fmt::Debug + Send + Sync {
    /// Takes something. Called under the hub's lock: it must not wait.
    fn put(&self, passed: Passed);

    /// Tells that something was put. Called after the lock.
    fn ring(&self);
}

/// What an outlet's connection listens to.
#[derive(Clone, Debug)]
pub struct Route {
    /// The hub of its channels.
    pub hub: Weak<Hub>,
    /// The channels.
    pub channels: SmallVec<[(ChannelKey, ChannelNumber); 1]>,
}

/// Which connections of an outlet are to be disconnected.
#[derive(Debug)]
pub struct Revoked {
    channels: Option<Vec<ChannelNumber>>,
    user: Option<Arc<str>>,
}

impl Revoked {
    /// Whether it is about that channel.
    pub fn covers(&self, channel: ChannelNumber) -> bool {
        self.channels.as_ref().is_none_or(|channels| channels.contains(&channel))
    }

    /// Whether it is about a stream in that place.
    pub fn is_of(&self, slot: Option<&Slot>) -> bool {
        self.user.is_none() || slot.is_some_and(|slot| slot.holder.user == self.user)
    }
}

/// What a stream is given first when an outlet takes it over.
#[derive(Debug)]
pub enum First {
    /// These events.
    Events(Vec<Arc<Event>>),
    /// History after this id, to be read by `Hub::read_on`: it is long.
    After(EventId),
}

/// A step through history.
#[derive(Debug)]
pub struct ReadOn {
    /// The next events.
    pub events: Vec<Arc<Event>>,
    /// From where to go on.
    pub cursor: EventId,
    /// Some were forgotten before they were read. What is lost up to here is told by that.
    pub lost: Option<EventId>,
    /// Set once there are no more: the place in the hub's order from which on the outlet has them.
    pub live_from: Option<u64>,
}

/// The channels of a process, or one private channel.
#[derive(Debug)]
pub struct Hub {
    /// Orders events and registrations. Held while an event is put into the clients' queues
    /// (tens of nanoseconds each) and never while anybody is woken or Python runs.
    state: Mutex<State>,
    limits: Limits,
    /// Whether a channel is heard from its beginning: there is no bus but this hub.
    is_the_bus: bool,
    /// Where the figures of its channels are counted.
    figures: HostFigures,
}

#[derive(Debug)]
struct State {
    clock: IdClock,
    /// Counts what was passed to outlets.
    sequence: u64,
    names: HashMap<Arc<str>, ChannelKey>,
    /// Those with a name stay; renderings go.
    channels: Slab<Channel>,
    /// The library's own, by which processes tell each other of clients, the control channel first:
    /// heard as long as there are streams.
    own: SmallVec<[ChannelKey; 2]>,
    /// How often the control channel began to be heard: what was told before is not known.
    control_begun: u64,
    /// Set at the end of all: why who comes later is ended at once.
    closed: Option<Reason>,
}

#[derive(Debug)]
struct Channel {
    name: Arc<str>,
    history: History,
    /// The newest event, or where the history began.
    newest: EventId,
    /// Whether every event after `newest` will be delivered here. A client registers only then.
    heard: bool,
    /// Whether the history has all that the store could give.
    read: bool,
    number: ChannelNumber,
    clients: Slab<Arc<Client>>,
    streams: usize,
    /// Those among the clients that make the events of renderings.
    renderers: usize,
    /// For a rendering: what it renders.
    sources: SmallVec<[ChannelKey; 1]>,
    /// For any other: what renders it.
    renderings: SmallVec<[ChannelKey; 1]>,
    /// The outlets that have connections of it.
    taps: SmallVec<[Tap; 1]>,
    /// Its own, or those of all that a rendering renders.
    counters: SmallVec<[Arc<Counters>; 1]>,
    /// Since when it has no client.
    idle_since: Instant,
}

/// An outlet, and how many of its connections listen to a channel.
#[derive(Debug)]
struct Tap {
    outlet: Arc<dyn Outlet>,
    sockets: usize,
}

/// What must be let go of after the lock: waiters to wake, objects whose end may run code.
#[derive(Debug, Default)]
struct Aftermath {
    wakes: WakeBatch,
    outlets: SmallVec<[Arc<dyn Outlet>; 2]>,
    discarded: Vec<Arc<Event>>,
    leftovers: Vec<Leftover>,
    clients: Vec<Arc<Client>>,
}

impl Aftermath {
    fn settle(self) {
        self.wakes.flush();
        for outlet in &self.outlets {
            outlet.ring();
        }
    }
}

impl Default for Hub {
    /// A hub that is the whole bus.
    fn default() -> Self {
        Hub::new(Limits::default(), true)
    }
}

impl Hub {
    /// A hub whose channels remember within `limits`; without `is_the_bus`, a bus delivers to it.
    pub fn new(limits: Limits, is_the_bus: bool) -> Hub {
        Hub::counting(limits, is_the_bus, HostFigures::default())
    }

    /// The same, counting where `figures` says.
    pub fn counting(limits: Limits, is_the_bus: bool, figures: HostFigures) -> Hub {
        let state = State {
            clock: IdClock::starting_at(if is_the_bus { now_ms() } else { 0 }),
            sequence: 0,
            names: HashMap::new(),
            channels: Slab::new(),
            own: SmallVec::new(),
            control_begun: 0,
            closed: None,
        };
        Hub { state: Mutex::new(state), limits, is_the_bus, figures }
    }

    /// Whether somebody is at it now: then a caller that holds what others need waits elsewhere.
    pub fn is_busy(&self) -> bool {
        matches!(self.state.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// The channel of that name, made at its first mention; it remembers `history` events or
    /// more, if somebody asked for more.
    pub fn channel(&self, name: &str, history: usize) -> ChannelKey {
        let mentioned = lock(&self.state).mentioned(name, history, self.is_the_bus);
        if let Some(key) = mentioned {
            return key;
        }
        // Not under the lock: it may touch files.
        let counters = Arc::new(self.figures.counters(name));
        let mut state = lock(&self.state);
        if let Some(key) = state.mentioned(name, history, self.is_the_bus) {
            // Another thread was here meanwhile; what it is counted with has the same name.
            return key;
        }
        let name: Arc<str> = name.into();
        let history = History::new(history, self.limits, state.clock.last());
        let mut channel = Channel::new(Arc::clone(&name), history);
        channel.heard = self.is_the_bus;
        channel.read = self.is_the_bus;
        channel.counters.push(counters);
        let key = state.channels.insert(channel);
        state.names.insert(name, key);
        key
    }

    /// Orders an event, remembers it and offers it to every client of the channel.
    ///
    /// # Errors
    /// `NotEncodable` for a draft without a body while streams are open; nothing was sent then.
    pub fn publish(&self, channel: ChannelKey, draft: Draft) -> Result<EventId> {
        let mut after = Aftermath::default();
        let id = {
            let mut state = lock(&self.state);
            if draft.body.is_none() && state.channels[channel].has_streams() {
                return Err(Error::NotEncodable);
            }
            let now = now_ms();
            let id = state.clock.next(now);
            state.accept(channel, id, draft, now, &mut after);
            id
        };
        after.settle();
        Ok(id)
    }

    /// Delivers what the bus has ordered, oldest first. What a channel has had already, and what
    /// it does not hear, is left out.
    pub fn deliver(&self, arrivals: impl IntoIterator<Item = Arrival>) {
        let mut after = Aftermath::default();
        let mut begun = Instant::now();
        for Arrival { channel, id, body, format } in arrivals {
            let is_control = {
                let mut state = lock(&self.state);
                state.clock.observe(id);
                let Some(key) = state.names.get(&channel).copied() else { continue };
                let target = &state.channels[key];
                if !target.heard || id <= target.newest {
                    continue;
                }
                let has_message = body.has_data();
                let draft = Draft { body: Some(body), format, has_message, decoded: None };
                state.accept(key, id, draft, now_ms(), &mut after);
                state.own.first() == Some(&key)
            };
            // Woken together, the readers of a burst find all of it; but nobody waits for long. What
            // the control channel tells is done before what follows: that is not for everybody.
            if is_control || begun.elapsed() > BATCH {
                std::mem::take(&mut after).settle();
                begun = Instant::now();
            }
        }
        after.settle();
    }

    /// What the bus has to do before a client of `channels` can register and resume.
    pub fn lack(&self, channels: &[ChannelKey], resume: Resume) -> Lack {
        let state = lock(&self.state);
        let mut lack = Lack::default();
        for channel in channels.iter().map(|key| &state.channels[*key]) {
            if !channel.heard {
                lack.unheard.push(Arc::clone(&channel.name));
            }
            // One that is heard anew has forgotten what it read before.
            let resumes = matches!(resume, Resume::After(_));
            if resumes && (!channel.heard || channel.is_unread(resume)) {
                lack.unread.push(Arc::clone(&channel.name));
            }
        }
        if let Resume::After(last) = resume {
            lack.is_behind = last > state.clock.last();
        }
        lack
    }

    /// From now on every event of the channel after `position` is delivered here.
    pub fn hear(&self, name: &str, position: EventId) {
        let mut discarded = Vec::new();
        let mut state = lock(&self.state);
        state.clock.observe(position);
        let Some(key) = state.names.get(name).copied() else { return };
        let is_control = state.own.first() == Some(&key);
        let channel = &mut state.channels[key];
        let begins = !channel.heard;
        if begins {
            channel.heard = true;
            channel.idle_since = Instant::now();
            channel.read = false;
            channel.newest = position;
            channel.history.restart(position, &mut discarded);
        }
        state.control_begun += u64::from(begins && is_control);
        drop(state);
    }

    /// The newest id that is known here.
    pub fn newest(&self) -> EventId {
        lock(&self.state).clock.last()
    }

    /// The newest event of a channel that is heard.
    pub fn newest_of(&self, name: &str) -> Option<EventId> {
        let state = lock(&self.state);
        let channel = &state.channels[*state.names.get(name)?];
        channel.heard.then_some(channel.newest)
    }

    /// Events that the channel of that name remembers at the most.
    pub fn history_limit(&self, name: &str) -> usize {
        let state = lock(&self.state);
        state.names.get(name).map_or(0, |key| state.channels[*key].history.limit())
    }

    /// Notes an id that others know, without an event.
    pub fn observe(&self, id: EventId) {
        lock(&self.state).clock.observe(id);
    }

    /// Gives a channel what the store has of it after `floor`, oldest first.
    pub fn read_back(&self, name: &str, floor: EventId, arrivals: Vec<Arrival>) {
        let mut state = lock(&self.state);
        let Some(key) = state.names.get(name).copied() else { return };
        let channel = &mut state.channels[key];
        let seal = |Arrival { id, body, format, .. }: Arrival| {
            let has_message = body.has_data();
            let draft = Draft { body: Some(body), format, has_message, decoded: None };
            Arc::new(Event::seal(draft, Some(id), channel.counters.first().cloned()))
        };
        let events = arrivals.into_iter().map(seal).collect();
        channel.history.prepend(floor, events);
        channel.read = true;
    }

    /// Events of a channel were lost before `position`: its streams are told, its queues can be
    /// asked.
    pub fn mark_gap(&self, name: &str, position: EventId) {
        let mut after = Aftermath::default();
        {
            let mut state = lock(&self.state);
            state.clock.observe(position);
            let Some(key) = state.names.get(name).copied() else { return };
            let channel = &mut state.channels[key];
            if !channel.heard {
                return;
            }
            channel.newest = channel.newest.max(position);
            channel.read = true;
            channel.history.restart(channel.newest, &mut after.discarded);
            for (_, client) in &channel.clients {
                client.note_gap();
            }
            let event = Arc::new(Event::notice(frame::reset(Gap::TooOld.reason())));
            state.offer(key, &event, &mut after);
        }
        after.settle();
    }

    /// The channels that are heard, with how many clients each has.
    pub fn heard(&self) -> Vec<(Arc<str>, usize)> {
        let state = lock(&self.state);
        let heard = state.named().filter(|channel| channel.heard);
        let count = |channel: &Channel| channel.clients.len() + channel.sockets();
        let mut heard: Vec<_> =
            heard.map(|channel| (Arc::clone(&channel.name), count(channel))).collect();
        if heard.iter().all(|(_, clients)| *clients == 0) {
            let own = state.own.iter().map(|key| &state.channels[*key]);
            let own = own.filter(|its| its.heard).map(|its| (Arc::clone(&its.name), 0));
            heard.extend(own);
        }
        heard
    }

    /// Whether no channel that is heard has a client.
    pub fn is_idle(&self) -> bool {
        lock(&self.state).named().all(Channel::is_unused)
    }

    /// Stops hearing a channel and forgets its history, unless it has clients. Gives whether it
    /// did.
    pub fn retire(&self, name: &str) -> bool {
        let mut discarded = Vec::new();
        let mut state = lock(&self.state);
        let Some(key) = state.names.get(name).copied() else { return true };
        let retires = if state.own.contains(&key) {
            state.named().all(Channel::is_unused)
        } else {
            state.channels[key].is_unused()
        };
        let channel = &mut state.channels[key];
        if retires {
            channel.heard = false;
            channel.history.restart(channel.newest, &mut discarded);
        }
        drop(state);
        retires
    }

    /// `retire` for every channel that had no client for so long.
    pub fn retire_unused(&self, patience: Duration) {
        let mut discarded = Vec::new();
        let mut state = lock(&self.state);
        for channel in state.named_mut().filter(|channel| channel.heard) {
            if channel.is_unused() && channel.idle_since.elapsed() >= patience {
                channel.heard = false;
                channel.history.restart(channel.newest, &mut discarded);
            }
        }
        drop(state);
    }

    /// `retire` for all channels at once, unless any has a client.
    pub fn retire_all(&self) -> bool {
        let mut discarded = Vec::new();
        let mut state = lock(&self.state);
        let retires = state.named().all(Channel::is_unused);
        if retires {
            for (_, channel) in &mut state.channels {
                channel.heard &= !channel.sources.is_empty();
                channel.history.restart(channel.newest, &mut discarded);
            }
        }
        drop(state);
        retires
    }

    /// Registers a client with `channels`: what it missed waits in its queue, then the rest.
    /// `None` when one of them is not heard, or has not read back what the client needs: the bus must do
    /// that first, again if the channel was let go of and heard anew since. After the `close`, which needs
    /// no bus, the client is ended at once.
    ///
    /// # Errors
    /// `Closed` for a client that was registered before.
    pub fn register(
        self: &Arc<Self>,
        client: &Arc<Client>,
        channels: &[ChannelKey],
        resume: Resume,
        owner: Attachment,
    ) -> Result<Option<Registered>> {
        let mut after = Aftermath::default();
        let mut state = lock(&self.state);
        let is_deaf = client.kind() == Kind::Stream && !state.hears_own();
        let is_unready = |channel: &Channel| !channel.heard || channel.is_unread(resume);
        let is_early = is_deaf || channels.iter().any(|key| is_unready(&state.channels[*key]));
        if is_early && state.closed.is_none() {
            return Ok(None);
        }
        let registered = state.register(self, client, channels, resume, owner, &mut after);
        drop(state);
        after.settle();
        registered.map(Some)
    }

    /// Ends a client; ending it twice is no error. Gives whether it was registered.
    pub fn unregister(&self, client: &Arc<Client>, reason: Reason) -> bool {
        let mut after = Aftermath::default();
        let was_registered = lock(&self.state).remove(client, reason, &mut after);
        after.settle();
        was_registered
    }

    /// Takes a stream away from its queue and gives it to `outlet`, without a gap and without a
    /// double: `join` is called with what it is given first and the place in the hub's order from
    /// which on the outlet has the rest. Gives false for a stream that has ended.
    ///
    /// `cursor` is where the stream was registered. When more than `most` events wait for it and
    /// history has them all, it is told to read those by and by.
    pub fn hand_over(
        self: &Arc<Self>,
        client: &Arc<Client>,
        cursor: EventId,
        most: usize,
        outlet: &Arc<dyn Outlet>,
        join: impl FnOnce(Route, First, u64),
    ) -> bool {
        let mut after = Aftermath::default();
        let mut waiting = Vec::new();
        let handed_over = {
            let mut state = lock(&self.state);
            let (memberships, leftover) = client.leave(&mut after.wakes);
            after.leftovers.push(leftover);
            let mut route = Route { hub: Arc::downgrade(self), channels: SmallVec::new() };
            for Membership { channel: key, place } in &memberships {
                let channel = &mut state.channels[*key];
                after.clients.extend(channel.leave(*place));
                channel.tap(outlet);
                route.channels.push((*key, channel.number));
            }
            if !memberships.is_empty() {
                waiting.extend(drain(client, |_| false));
                let has_all = |key: &ChannelKey| state.channels[*key].history.floor() <= cursor;
                let first =
                    if waiting.len() > most && route.channels.iter().all(|(key, _)| has_all(key)) {
                        First::After(cursor)
                    } else {
                        First::Events(std::mem::take(&mut waiting))
                    };
                // Under the lock: what is passed later must find it there.
                join(route, first, state.sequence);
            }
            !memberships.is_empty()
        };
        after.settle();
        handed_over
    }

    /// Up to `count` events after `cursor`, oldest first, for a connection that is behind, and was
    /// told of what is lost up to `told`.
    pub fn read_on(
        &self,
        route: &Route,
        cursor: EventId,
        told: Option<EventId>,
        count: usize,
    ) -> ReadOn {
        let state = lock(&self.state);
        let channels = || route.channels.iter().filter_map(|at| state.channel_of(*at));
        let histories = || channels().map(|channel| &channel.history);
        // The histories end at different ids: each end is a loss of its own, and is told once.
        let known = told.map_or(cursor, |told| told.max(cursor));
        let lost = histories().map(History::floor).filter(|floor| *floor > known).max();
        let mut events: Vec<Arc<Event>> = histories()
            .flat_map(|history| history.after(cursor).take(count + 1).map(Arc::clone))
            .collect();
        events.sort_by_key(|event| event.id);
        events.dedup_by_key(|event| event.id);
        let live_from = (events.len() <= count).then_some(state.sequence);
        events.truncate(count);
        let cursor = events.last().and_then(|event| event.id).unwrap_or(cursor);
        events.retain(|event| Kind::Stream.takes(event));
        ReadOn { events, cursor, lost, live_from }
    }

    /// A connection of an outlet is gone.
    pub fn let_go(&self, route: &Route, outlet: &Arc<dyn Outlet>, reason: Reason) {
        let mut gone: SmallVec<[Arc<dyn Outlet>; 1]> = SmallVec::new();
        let mut state = lock(&self.state);
        for (key, number) in &route.channels {
            let Some(channel) = state.channels.get_mut(*key).filter(|it| it.number == *number)
            else {
                continue;
            };
            channel.count_disconnect(reason);
            channel.idle_since = Instant::now();
            let Some(at) = channel.taps.iter().position(|tap| is_same(&tap.outlet, outlet)) else {
                continue;
            };
            channel.taps[at].sockets -= 1;
            channel.count_client(Counted::Socket, -1);
            if channel.taps[at].sockets == 0 {
                gone.push(channel.taps.swap_remove(at).outlet);
            }
        }
        drop(state);
    }

    /// Ends every client, those to come too.
    pub fn close(&self, reason: Reason) {
        lock(&self.state).closed.get_or_insert(reason);
        self.close_those(|_| true, reason);
    }

    /// Ends every stream that a Python server iterates, with a farewell after all that waits.
    pub fn close_streams(&self, farewell: &Arc<Farewell>) {
        let is_stream = |client: &Client| {
            let is_stream = client.kind() == Kind::Stream;
            if is_stream {
                client.set_farewell(farewell);
            }
            is_stream
        };
        self.close_those(is_stream, Reason::Exit);
    }

    /// Passes on to `outlet` what is told on a channel of the library's own, which remembers so many
    /// events. The first is the control channel.
    pub fn add_own(&self, name: &str, history: usize, outlet: &Arc<dyn Outlet>) {
        let key = self.channel(name, history);
        let mut state = lock(&self.state);
        state.own.push(key);
        let tap = Tap { outlet: Arc::clone(outlet), sockets: 0 };
        state.channels[key].taps.push(tap);
    }

    /// The library's own channels, which a stream needs to be heard.
    pub fn own(&self) -> SmallVec<[ChannelKey; 2]> {
        lock(&self.state).own.clone()
    }

    /// How often what is told on the control channel began to arrive here; `None` while it does not.
    pub fn control_begun(&self) -> Option<u64> {
        let state = lock(&self.state);
        state.hears_own().then_some(state.control_begun)
    }

    /// Disconnects the streams of a channel, or of all, that are a user's, or anybody's; what waits
    /// for them is not sent. Gives which of an outlet's connections are to go as well. `None` for a
    /// channel that is not known here.
    pub fn revoke(&self, channel: Option<&str>, user: Option<Arc<str>>) -> Option<Revoked> {
        let mut after = Aftermath::default();
        let revoked = {
            let mut state = lock(&self.state);
            let channels = match channel {
                Some(name) => {
                    let key = *state.names.get(name)?;
                    Some(state.with_renderings(key).map(|channel| channel.number).collect())
                }
                None => None,
            };
            let revoked = Revoked { channels, user };
            let all = state.channels.iter().map(|(_, channel)| channel);
            let its = all.filter(|channel| revoked.covers(channel.number));
            let clients = its.flat_map(|channel| channel.clients.iter().map(|entry| entry.1));
            let is_it = |client: &&Arc<Client>| {
                let slot = client.slot();
                client.kind() == Kind::Stream && revoked.is_of(slot.as_deref())
            };
            for client in clients.filter(is_it).cloned().collect::<Vec<Arc<Client>>>() {
                state.remove(&client, Reason::Revoked, &mut after);
                after.discarded.extend(drain(&client, |_| false));
            }
            revoked
        };
        after.settle();
        Some(revoked)
    }

    fn close_those(&self, which: impl Fn(&Client) -> bool, reason: Reason) {
        let mut after = Aftermath::default();
        {
            let mut state = lock(&self.state);
            let all = state.channels.iter().flat_map(|(_, channel)| channel.clients.iter());
            let those = all.map(|(_, client)| client).filter(|client| which(client));
            for client in those.cloned().collect::<Vec<Arc<Client>>>() {
                state.remove(&client, reason, &mut after);
            }
        }
        after.settle();
    }

    /// The clients of a channel now, those of its renderings too.
    pub fn clients(&self, channel: ChannelKey) -> Vec<Arc<Client>> {
        let state = lock(&self.state);
        let all = state.with_renderings(channel).flat_map(|channel| channel.clients.iter());
        all.map(|entry| entry.1).filter(|client| client.kind() != Kind::Renderer).cloned().collect()
    }

    /// The clients that a server iterates, and for which something waits.
    pub fn slow_streams(&self) -> Vec<Arc<Client>> {
        let state = lock(&self.state);
        let clients = state.channels.iter().flat_map(|(_, channel)| channel.clients.iter());
        let streams = clients.map(|(_, client)| client);
        let slow = streams.filter(|its| its.kind() == Kind::Stream && !its.is_empty());
        let mut slow: Vec<Arc<Client>> = slow.cloned().collect();
        drop(state);
        // One of several channels is in each of them.
        slow.sort_unstable_by_key(Arc::as_ptr);
        slow.dedup_by_key(|client| Arc::as_ptr(client));
        slow
    }

    /// The names of the channels that a client of this hub listens to.
    pub fn names_of_client(&self, client: &Client) -> Vec<Arc<str>> {
        let state = lock(&self.state);
        let channels = client.channels();
        let channels = channels.iter().filter_map(|key| state.channels.get(*key));
        channels.flat_map(|channel| state.names_of(channel)).collect()
    }

    /// The names of the channels that an outlet's connection listens to.
    pub fn names_of(&self, route: &Route) -> Vec<Arc<str>> {
        let state = lock(&self.state);
        let channels = route.channels.iter().filter_map(|at| state.channel_of(*at));
        channels.flat_map(|channel| state.names_of(channel)).collect()
    }

    /// The counters of a channel.
    pub fn counters(&self, channel: ChannelKey) -> Option<Arc<Counters>> {
        lock(&self.state).channels[channel].counters.first().cloned()
    }

    /// Where the figures of its channels are counted.
    pub fn host(&self) -> &HostFigures {
        &self.figures
    }

    /// What tells a channel from all others of the process.
    pub fn number(&self, channel: ChannelKey) -> ChannelNumber {
        lock(&self.state).channels[channel].number
    }

    /// How many clients a channel has now.
    pub fn client_count(&self, channel: ChannelKey) -> usize {
        lock(&self.state).with_renderings(channel).map(Channel::client_count).sum()
    }

    /// Whether `client` is registered with the channel, or a rendering of it.
    pub fn has_client(self: &Arc<Self>, channel: ChannelKey, client: &Arc<Client>) -> bool {
        // A client's own lock comes after the hub's.
        let state = lock(&self.state);
        let is_it =
            |key: ChannelKey| key == channel || state.channels[key].sources.contains(&channel);
        client.is_member(self, is_it)
    }

    /// The figures of one channel.
    pub fn figures(&self, channel: ChannelKey) -> ChannelFigures {
        lock(&self.state).figures(channel)
    }

    /// The figures of all channels that users name, in the order of their first mention.
    pub fn all_figures(&self) -> Vec<ChannelFigures> {
        let state = lock(&self.state);
        let users = state.named().filter(|channel| !channel.name.starts_with(control::OWN));
        let keys = users.filter_map(|channel| state.names.get(&channel.name).copied());
        let mut keys: Vec<ChannelKey> = keys.collect();
        keys.sort_unstable();
        keys.into_iter().map(|key| state.figures(key)).collect()
    }
}

impl Drop for Hub {
    /// A private channel is gone, and nobody can publish to it any more: its clients end after
    /// what is left. (A queue's object holds its client, so the client must let go of the object.)
    fn drop(&mut self) {
        let mut wakes = WakeBatch::default();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let clients = state.channels.iter().flat_map(|(_, channel)| channel.clients.iter());
        let leftovers: Vec<_> = clients.map(|(_, client)| client.leave(&mut wakes).1).collect();
        wakes.flush();
        drop(leftovers);
        for (_, channel) in &state.channels {
            for tap in &channel.taps {
                tap.outlet.put(Passed::End(channel.number));
                tap.outlet.ring();
            }
        }
    }
}

/// Whether two are one outlet, whatever they are seen through.
fn is_same(one: &Arc<dyn Outlet>, other: &Arc<dyn Outlet>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

impl State {
    /// Those that users name.
    fn named(&self) -> impl Iterator<Item = &Channel> {
        let is_it = |key, its: &Channel| its.sources.is_empty() && !self.own.contains(&key);
        self.channels.iter().filter(move |(key, its)| is_it(*key, its)).map(|its| its.1)
    }

    fn named_mut(&mut self) -> impl Iterator<Item = &mut Channel> {
        let own = &self.own;
        let is_it = |key, its: &Channel| its.sources.is_empty() && !own.contains(&key);
        self.channels.iter_mut().filter(move |(key, its)| is_it(*key, its)).map(|its| its.1)
    }

    /// The channel of that name, if there is one; it remembers `history` events or more from now on.
    fn mentioned(&mut self, name: &str, history: usize, is_the_bus: bool) -> Option<ChannelKey> {
        let key = self.names.get(name).copied()?;
        let channel = &mut self.channels[key];
        if history > channel.history.limit() {
            channel.history.raise_limit(history);
            // A store may have more of it than was asked for before.
            channel.read = is_the_bus;
        }
        Some(key)
    }

    /// Whether streams hear when they are to be disconnected.
    fn hears_own(&self) -> bool {
        self.own.iter().all(|key| self.channels[*key].heard)
    }

    /// A channel, and the renderings of it.
    fn with_renderings(&self, key: ChannelKey) -> impl Iterator<Item = &Channel> {
        let renderings = self.channels[key].renderings.iter().copied();
        std::iter::once(key).chain(renderings).filter_map(|key| self.channels.get(key))
    }

    /// Its name, or for a rendering those of what it renders.
    fn names_of(&self, channel: &Channel) -> SmallVec<[Arc<str>; 1]> {
        if channel.sources.is_empty() {
            return SmallVec::from_iter([Arc::clone(&channel.name)]);
        }
        channel.sources.iter().map(|key| Arc::clone(&self.channels[*key].name)).collect()
    }

    /// A channel that may be gone.
    fn channel_of(&self, (key, number): (ChannelKey, ChannelNumber)) -> Option<&Channel> {
        self.channels.get(key).filter(|channel| channel.number == number)
    }

    fn figures(&self, key: ChannelKey) -> ChannelFigures {
        let mut figures = self.channels[key].figures();
        let renderings = self.with_renderings(key).filter(|its| !its.sources.is_empty());
        for rendering in renderings.map(Channel::figures) {
            figures.queues += rendering.queues;
            figures.streams += rendering.streams;
            figures.sockets += rendering.sockets;
        }
        figures
    }

    fn register(
        &mut self,
        hub: &Arc<Hub>,
        client: &Arc<Client>,
        channels: &[ChannelKey],
        resume: Resume,
        owner: Attachment,
        after: &mut Aftermath,
    ) -> Result<Registered> {
        for key in channels {
            self.channels[*key].history.trim(now_ms(), &mut after.discarded);
        }
        let (registered, replay) = self.replay(client.kind(), channels, resume);
        self.enter(hub, client, channels, owner, &replay)?;
        if let Some(reason) = self.closed {
            self.remove(client, reason, after);
        }
        Ok(registered)
    }

    /// Makes `client` one of `channels`, with what it is given first.
    fn enter(
        &mut self,
        hub: &Arc<Hub>,
        client: &Arc<Client>,
        channels: &[ChannelKey],
        owner: Attachment,
        replay: &[Arc<Event>],
    ) -> Result<()> {
        let mut memberships: SmallVec<[Membership; 1]> = SmallVec::new();
        for key in channels {
            if memberships.iter().any(|membership| membership.channel == *key) {
                continue;
            }
            let place = self.channels[*key].enter(client);
            memberships.push(Membership { channel: *key, place });
        }
        let entered = client.enter(Arc::downgrade(hub), memberships.clone(), owner, replay);
        if entered.is_err() {
            for Membership { channel, place } in memberships {
                self.channels[channel].leave(place);
            }
        }
        entered
    }

    /// What a client is given first, oldest first, and the position it goes on from.
    fn replay(
        &self,
        kind: Kind,
        channels: &[ChannelKey],
        resume: Resume,
    ) -> (Registered, Vec<Arc<Event>>) {
        // The channels' own: on some buses the ids of one channel say nothing of another's.
        let newest = channels.iter().map(|key| self.channels[*key].newest).max();
        let cursor = newest.unwrap_or(self.clock.last());
        let last = match resume {
            Resume::Fresh => return (Registered { cursor, gap: None }, Vec::new()),
            Resume::Unknown => {
                let gap = Some(Gap::Unknown);
                return (Registered { cursor, gap }, Vec::new());
            }
            Resume::After(last) => last,
        };
        let histories = || channels.iter().map(|key| &self.channels[*key].history);
        let mut gap = histories().find_map(|history| history.gap_after(last, self.clock.last()));
        if gap == Some(Gap::Future) {
            return (Registered { cursor, gap }, Vec::new());
        }
        let mut replay: Vec<Arc<Event>> =
            histories().flat_map(|history| history.after(last)).map(Arc::clone).collect();
        replay.sort_by_key(|event| event.id);
        replay.dedup_by_key(|event| event.id);
        if kind == Kind::Stream && replay.iter().any(|event| event.frame.is_empty()) {
            // History has an object that a stream cannot carry: that is a gap as well.
            gap = gap.or(Some(Gap::TooOld));
        }
        replay.retain(|event| kind.takes(event));
        // Past what is lost already, so that a client that breaks off now is not told twice.
        let floor = histories().map(History::floor).min().unwrap_or(last);
        (Registered { cursor: last.max(floor), gap }, replay)
    }

    /// Remembers an event that has its place, and offers it to the clients.
    fn accept(
        &mut self,
        key: ChannelKey,
        id: EventId,
        draft: Draft,
        now: u64,
        after: &mut Aftermath,
    ) {
        let channel = &mut self.channels[key];
        let event = Arc::new(Event::seal(draft, Some(id), channel.counters.first().cloned()));
        channel.newest = id;
        channel.history.push(&event, now, &mut after.discarded);
        for counters in &channel.counters {
            counters.received().fetch_add(1, Relaxed);
        }
        self.offer(key, &event, after);
    }

    fn offer(&mut self, key: ChannelKey, event: &Arc<Event>, after: &mut Aftermath) {
        let channel = &self.channels[key];
        if !channel.taps.is_empty() && Kind::Stream.takes(event) {
            self.sequence += 1;
            for tap in &channel.taps {
                tap.outlet.put(Passed::Event {
                    channel: channel.number,
                    sequence: self.sequence,
                    event: Arc::clone(event),
                });
                if !after.outlets.iter().any(|outlet| is_same(outlet, &tap.outlet)) {
                    after.outlets.push(Arc::clone(&tap.outlet));
                }
            }
        }
        for client in self.channels[key].fan_out(event, after) {
            self.remove(&client, Reason::Overflow, after);
        }
    }

    fn remove(&mut self, client: &Arc<Client>, reason: Reason, after: &mut Aftermath) -> bool {
        if let Some(slot) = client.slot() {
            slot.set_reason(reason);
        }
        let (memberships, leftover) = client.leave(&mut after.wakes);
        for Membership { channel, place } in &memberships {
            let channel = &mut self.channels[*channel];
            after.clients.extend(channel.leave(*place));
            if client.kind() != Kind::Renderer {
                channel.count_disconnect(reason);
            }
            channel.idle_since = Instant::now();
        }
        after.leftovers.push(leftover);
        !memberships.is_empty()
    }
}

impl Channel {
    /// One that remembers nothing yet: what comes after the history's beginning is to come.
    fn new(name: Arc<str>, history: History) -> Channel {
        Channel {
            name,
            newest: history.floor(),
            history,
            heard: true,
            read: true,
            number: NUMBERS.fetch_add(1, Relaxed),
            clients: Slab::new(),
            streams: 0,
            renderers: 0,
            sources: SmallVec::new(),
            renderings: SmallVec::new(),
            taps: SmallVec::new(),
            counters: SmallVec::new(),
            idle_since: Instant::now(),
        }
    }

    /// Adds a client; gives its place.
    fn enter(&mut self, client: &Arc<Client>) -> usize {
        self.count(client.kind(), 1);
        self.clients.insert(Arc::clone(client))
    }

    /// Removes the client of that place.
    fn leave(&mut self, place: usize) -> Option<Arc<Client>> {
        let client = self.clients.try_remove(place)?;
        self.count(client.kind(), -1);
        Some(client)
    }

    fn count(&mut self, kind: Kind, change: i8) {
        match kind {
            Kind::Queue => self.count_client(Counted::Queue, change.into()),
            Kind::Stream => {
                self.streams = self.streams.saturating_add_signed(change.into());
                self.count_client(Counted::Stream, change.into());
            }
            Kind::Renderer => {
                self.renderers = self.renderers.saturating_add_signed(change.into());
            }
        }
    }

    fn count_client(&self, kind: Counted, change: i64) {
        for counters in &self.counters {
            counters.count_client(kind, change);
        }
    }

    fn count_disconnect(&self, reason: Reason) {
        for counters in &self.counters {
            counters.count_disconnect(reason);
        }
    }

    fn sockets(&self) -> usize {
        self.taps.iter().map(|tap| tap.sockets).sum()
    }

    fn client_count(&self) -> usize {
        self.clients.len() - self.renderers + self.sockets()
    }

    /// Whether its memory does not go back as far as the client, and its store might.
    fn is_unread(&self, resume: Resume) -> bool {
        matches!(resume, Resume::After(last) if !self.read && last < self.history.floor())
    }

    fn is_unused(&self) -> bool {
        self.clients.is_empty() && self.taps.is_empty()
    }

    fn has_streams(&self) -> bool {
        self.streams > 0 || !self.taps.is_empty()
    }

    /// Counts a connection of `outlet` in.
    fn tap(&mut self, outlet: &Arc<dyn Outlet>) {
        self.count_client(Counted::Socket, 1);
        match self.taps.iter_mut().find(|tap| is_same(&tap.outlet, outlet)) {
            Some(tap) => tap.sockets += 1,
            None => self.taps.push(Tap { outlet: Arc::clone(outlet), sockets: 1 }),
        }
    }

    /// Offers `event` to every client; gives those that it closed for want of room.
    fn fan_out(&self, event: &Arc<Event>, after: &mut Aftermath) -> Vec<Arc<Client>> {
        let mut dropped = 0;
        let mut overflowed = Vec::new();
        let mut clients = self.clients.iter().map(|(_, client)| client);
        loop {
            let chunk: SmallVec<[&Arc<Client>; LOOKAHEAD]> =
                clients.by_ref().take(LOOKAHEAD).collect();
            for client in &chunk {
                client.touch();
            }
            for client in &chunk {
                match client.deliver(event, &mut after.wakes, &mut after.discarded) {
                    Delivery::Queued | Delivery::Skipped => {}
                    Delivery::DroppedOldest | Delivery::DroppedNewest => dropped += 1,
                    Delivery::Disconnected => {
                        dropped += 1;
                        overflowed.push(Arc::clone(client));
                    }
                }
            }
            if chunk.len() < LOOKAHEAD {
                break;
            }
        }
        for counters in &self.counters {
            counters.dropped().fetch_add(dropped, Relaxed);
        }
        overflowed
    }

    fn figures(&self) -> ChannelFigures {
        ChannelFigures {
            name: Arc::clone(&self.name),
            counters: self.counters.first().cloned().unwrap_or_default(),
            queues: self.clients.len() - self.streams - self.renderers,
            streams: self.streams,
            sockets: self.sockets(),
            history_events: self.history.len(),
            history_bytes: self.history.bytes(),
        }
    }
}

/// A hub that may be gone.
pub type WeakHub = Weak<Hub>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Format;
    use crate::frame::{Body, Fields};
    use crate::queue::Overflow;

    fn draft(text: &str) -> Draft {
        let fields = Fields { data: Some(text), ..Fields::default() };
        Draft {
            body: Body::encode(&fields, 1 << 20).ok(),
            format: Format::Text,
            has_message: true,
            decoded: None,
        }
    }

    fn texts(client: &Client) -> Vec<String> {
        let text = |event: &Arc<Event>| {
            event.data.as_ref().map(|data| String::from_utf8_lossy(data).into_owned())
        };
        drain(client, |_| false).iter().filter_map(text).collect()
    }

    fn join(
        hub: &Arc<Hub>,
        channels: &[ChannelKey],
        capacity: usize,
        resume: Resume,
    ) -> Result<(Arc<Client>, Registered)> {
        let client = Arc::new(Client::new(Kind::Stream, capacity, Overflow::Disconnect));
        match hub.register(&client, channels, resume, Box::new(()))? {
            Some(registered) => Ok((client, registered)),
            None => Err(Error::Bus("not heard".to_owned())),
        }
    }

    #[test]
    fn a_client_of_two_channels_resumes_both_in_one_order() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let (a, b, other) = (hub.channel("a", 9), hub.channel("b", 9), hub.channel("c", 9));
        let (first, fresh) = join(&hub, &[a, b], 9, Resume::Fresh)?;
        for (channel, text) in [(a, "1"), (b, "2"), (other, "x"), (a, "3")] {
            hub.publish(channel, draft(text))?;
        }
        assert_eq!(texts(&first), ["1", "2", "3"]);
        let (again, resumed) = join(&hub, &[a, b], 9, Resume::After(fresh.cursor))?;
        assert_eq!(resumed, Registered { cursor: fresh.cursor, gap: None });
        hub.publish(b, draft("4"))?;
        assert_eq!(texts(&again), ["1", "2", "3", "4"]);
        Ok(())
    }

    #[test]
    fn what_was_replayed_is_no_overflow() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 5);
        let start = join(&hub, &[key], 1, Resume::Fresh)?.1.cursor;
        for n in 0..5 {
            hub.publish(key, draft(&n.to_string()))?;
        }
        let (client, _) = join(&hub, &[key], 1, Resume::After(start))?;
        hub.publish(key, draft("live"))?;
        assert_eq!(texts(&client), ["0", "1", "2", "3", "4", "live"]);
        // Its room is again what it was when all of that is taken.
        for n in 0..3 {
            hub.publish(key, draft(&n.to_string()))?;
        }
        assert_eq!((texts(&client), client.dropped()), (vec!["0".to_owned()], 1));
        Ok(())
    }

    #[test]
    fn what_is_lost_is_told_once_however_many_steps_follow() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let (long, short) = (hub.channel("long", 100), hub.channel("short", 1));
        let start = hub.newest();
        for n in 0..20 {
            hub.publish(long, draft(&n.to_string()))?;
        }
        for n in 20..30 {
            hub.publish(short, draft(&n.to_string()))?;
        }
        let number = |key: ChannelKey| (key, lock(&hub.state).channels[key].number);
        let channels = [number(long), number(short)].into_iter().collect();
        let route = Route { hub: Arc::downgrade(&hub), channels };
        let (mut cursor, mut told, mut losses, mut count) = (start, None, 0, 0);
        loop {
            let step = hub.read_on(&route, cursor, told, 3);
            losses += usize::from(step.lost.is_some());
            count += step.events.len();
            told = told.max(step.lost);
            cursor = step.cursor;
            if step.live_from.is_some() {
                break;
            }
        }
        assert_eq!((losses, count), (1, 21));
        Ok(())
    }

    #[test]
    fn a_gap_is_named() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 2);
        let start = join(&hub, &[key], 9, Resume::Fresh)?.1.cursor;
        for n in 0..3 {
            hub.publish(key, draft(&n.to_string()))?;
        }
        let (old, registered) = join(&hub, &[key], 9, Resume::After(start))?;
        assert_eq!(registered.gap, Some(Gap::TooOld));
        assert_eq!(texts(&old), ["1", "2"]);
        let (again, registered) = join(&hub, &[key], 9, Resume::After(registered.cursor))?;
        assert_eq!((registered.gap, texts(&again)), (None, vec!["1".into(), "2".into()]));
        let future = EventId { ms: u64::MAX, n: 0 };
        for (resume, gap) in [(Resume::After(future), Gap::Future), (Resume::Unknown, Gap::Unknown)]
        {
            let (client, registered) = join(&hub, &[key], 9, resume)?;
            assert_eq!(registered.gap, Some(gap));
            assert!(registered.cursor > start && registered.cursor < future);
            assert_eq!(texts(&client), [] as [&str; 0]);
        }
        Ok(())
    }

    #[test]
    fn a_client_that_overflows_leaves_all_its_channels() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let (a, b) = (hub.channel("a", 9), hub.channel("b", 9));
        let (client, _) = join(&hub, &[a, b], 1, Resume::Fresh)?;
        hub.publish(a, draft("1"))?;
        hub.publish(b, draft("2"))?;
        assert_eq!((hub.client_count(a), hub.client_count(b)), (0, 0));
        assert_eq!(texts(&client), ["1"]);
        let figures = hub.figures(b);
        assert_eq!(figures.counters.snapshot().disconnected(Reason::Overflow), 1);
        assert_eq!(figures.counters.dropped().load(Relaxed), 1);
        assert!(!hub.unregister(&client, Reason::Closed));
        assert_eq!(hub.figures(a).streams, 0);
        Ok(())
    }

    #[test]
    fn an_object_without_a_wire_form_meets_no_stream() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("", 9);
        let object =
            || Draft { body: None, format: Format::Json, has_message: true, decoded: None };
        let before = hub.publish(key, draft("before"))?;
        hub.publish(key, object())?;
        let (_client, registered) = join(&hub, &[key], 9, Resume::After(before))?;
        assert_eq!(registered.gap, Some(Gap::TooOld));
        assert!(matches!(hub.publish(key, object()), Err(Error::NotEncodable)));
        Ok(())
    }

    #[test]
    fn a_gap_that_the_bus_finds_is_told_to_streams_and_noted_for_queues() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 9);
        let (stream, _) = join(&hub, &[key], 9, Resume::Fresh)?;
        let queue = Arc::new(Client::new(Kind::Queue, 9, Overflow::Disconnect));
        hub.register(&queue, &[key], Resume::Fresh, Box::new(()))?;
        let position = EventId { ms: hub.newest().ms + 10, n: 0 };
        hub.mark_gap("a", position);
        let frames = drain(&stream, |_| false);
        assert!(frames.iter().any(|event| event.frame.starts_with(b"event: stream-reset")));
        assert!(queue.is_empty() && queue.has_gap() && stream.has_gap());
        let (_, resumed) = join(&hub, &[key], 9, Resume::After(position))?;
        assert_eq!(resumed.gap, None);
        Ok(())
    }

    #[test]
    fn a_channel_that_nobody_uses_is_forgotten() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let (used, unused) = (hub.channel("used", 9), hub.channel("unused", 9));
        let _client = join(&hub, &[used], 9, Resume::Fresh)?;
        for key in [used, unused] {
            hub.publish(key, draft("1"))?;
        }
        hub.retire_unused(Duration::from_secs(60));
        assert_eq!(hub.figures(unused).history_events, 1);
        hub.retire_unused(Duration::ZERO);
        assert_eq!(hub.figures(unused).history_events, 0);
        assert_eq!(hub.figures(used).history_events, 1);
        assert!(join(&hub, &[unused], 9, Resume::Fresh).is_err());
        Ok(())
    }

    #[test]
    fn a_rendering_follows_its_source_and_ends_without_clients() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 9);
        let earlier = hub.publish(key, draft("0"))?;
        let renderer = Arc::new(Client::new(Kind::Renderer, 9, Overflow::DropOldest));
        let begun = hub.begin_rendering(&[key], &renderer, Box::new(()))?;
        let at = begun.ok_or(Error::Closed)?;
        let join = |resume| {
            let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
            let registered = hub.register_rendered(&client, at, resume, Box::new(()));
            registered.map(|registered| registered.map(|done| (client, done)))
        };
        let (client, _) = join(Resume::Fresh)?.ok_or(Error::Closed)?;
        let first = hub.publish(key, draft("1"))?;
        assert_eq!((hub.client_count(key), hub.figures(key).streams), (1, 1));
        for event in drain(&renderer, |_| false) {
            let rendered = Arc::new(render(&event, draft("rendered")));
            hub.put_rendered(at, event.id.unwrap_or_default(), Some(&rendered));
        }
        assert_eq!(texts(&client), ["rendered"]);
        assert!(!hub.lacks_rendered(at, first) && hub.lacks_rendered(at, EventId::default()));
        let missing = hub.missing_rendered(at, EventId::default());
        assert_eq!(
            missing.events.iter().map(|event| event.id).collect::<Vec<_>>(),
            [Some(earlier)]
        );
        hub.read_back_rendered(at, (missing.floor, missing.until), missing.events);
        let (again, registered) = join(Resume::After(missing.floor))?.ok_or(Error::Closed)?;
        assert_eq!((registered.gap, texts(&again)), (None, vec!["0".into(), "rendered".into()]));
        assert!(!hub.end_rendering(at, &renderer, Duration::ZERO), "it has clients");
        for client in [client, again] {
            hub.unregister(&client, Reason::Closed);
        }
        assert!(!hub.end_rendering(at, &renderer, Duration::from_secs(60)), "not for long");
        assert!(hub.end_rendering(at, &renderer, Duration::ZERO) && renderer.is_closed());
        assert!(join(Resume::Fresh)?.is_none() && !hub.has_rendered_clients(at));
        assert_eq!(hub.figures(key).counters.snapshot().disconnected(Reason::Closed), 2);
        Ok(())
    }

    #[test]
    fn a_rendering_of_a_channel_that_is_named_twice_counts_once() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 9);
        let renderer = Arc::new(Client::new(Kind::Renderer, 9, Overflow::DropOldest));
        let begun = hub.begin_rendering(&[key, key], &renderer, Box::new(()))?;
        let at = begun.ok_or(Error::Closed)?;
        let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
        hub.register_rendered(&client, at, Resume::Fresh, Box::new(()))?.ok_or(Error::Closed)?;
        assert_eq!((hub.client_count(key), hub.figures(key).streams), (1, 1));
        assert_eq!((hub.clients(key).len(), hub.names_of_client(&client).len()), (1, 1));
        hub.unregister(&client, Reason::Closed);
        assert_eq!(hub.figures(key).counters.snapshot().disconnected(Reason::Closed), 1);
        assert!(hub.end_rendering(at, &renderer, Duration::ZERO));
        Ok(())
    }

    #[test]
    fn a_channel_that_was_forgotten_is_read_back_again() -> Result<()> {
        // The ids are from long ago.
        let hub = Arc::new(Hub::new(Limits { age: u64::MAX, ..Limits::default() }, false));
        let key = hub.channel("a", 9);
        let id = |n| EventId { ms: 1, n };
        let behind = Resume::After(id(1));
        for round in [5, 9] {
            let lack = hub.lack(&[key], behind);
            assert_eq!((lack.unheard.len(), lack.unread.len()), (1, 1), "round {round}");
            hub.hear("a", id(round));
            // Heard for somebody else since this client's bus looked: that alone is not enough.
            let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
            assert_eq!(hub.register(&client, &[key], behind, Box::new(()))?, None);
            hub.read_back("a", id(0), Vec::new());
            assert!(hub.lack(&[key], behind).is_nothing());
            let registered = hub.register(&client, &[key], behind, Box::new(()))?;
            assert_eq!(registered.map(|done| done.gap), Some(None));
            hub.unregister(&client, Reason::Closed);
            assert!(hub.retire("a"));
        }
        Ok(())
    }

    #[derive(Debug)]
    struct Nobody;

    impl Outlet for Nobody {
        fn put(&self, _: Passed) {}
        fn ring(&self) {}
    }

    #[test]
    fn what_may_have_been_told_while_nobody_heard_it_is_noticed() -> Result<()> {
        let hub = Arc::new(Hub::new(Limits::default(), false));
        let key = hub.channel("a", 9);
        let nobody: Arc<dyn Outlet> = Arc::new(Nobody);
        hub.add_own("control", 100, &nobody);
        hub.hear("a", EventId::default());
        let stream = |hub: &Arc<Hub>| {
            let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
            let registered = hub.register(&client, &[key], Resume::Fresh, Box::new(()));
            registered.map(|registered| registered.map(|_| client))
        };
        assert!(stream(&hub)?.is_none(), "it could not be disconnected");
        assert_eq!(hub.control_begun(), None);
        hub.hear("control", EventId::default());
        let first = hub.control_begun();
        let client = stream(&hub)?.ok_or(Error::Closed)?;
        assert!(!hub.retire("control") && !hub.retire_all(), "it has a stream to disconnect");
        assert!(hub.all_figures().iter().all(|figures| &*figures.name == "a"));
        hub.unregister(&client, Reason::Closed);
        assert!(hub.retire_all() && hub.control_begun().is_none() && stream(&hub)?.is_none());
        for name in ["a", "control"] {
            hub.hear(name, EventId::default());
        }
        assert!(hub.control_begun() > first && stream(&hub)?.is_some());
        Ok(())
    }

    /// Notes how many events of the other outlet were there when it was rung.
    #[derive(Debug, Default)]
    struct Witness {
        put: Mutex<usize>,
        other: Option<Arc<Witness>>,
        seen: Mutex<Vec<usize>>,
    }

    impl Outlet for Witness {
        fn put(&self, _: Passed) {
            *lock(&self.put) += 1;
        }

        fn ring(&self) {
            lock(&self.seen).extend(self.other.iter().map(|other| *lock(&other.put)));
        }
    }

    #[test]
    fn what_control_tells_is_done_before_what_follows_in_the_same_burst() {
        let hub = Hub::new(Limits::default(), false);
        let others = Arc::new(Witness::default());
        let control = Arc::new(Witness { other: Some(Arc::clone(&others)), ..Witness::default() });
        hub.add_own("control", 100, &(Arc::clone(&control) as _));
        hub.add_own("a", 100, &(others as _));
        for name in ["a", "control"] {
            hub.hear(name, EventId::default());
        }
        let burst = ["a", "control", "a", "a", "control"].into_iter().zip(1..);
        hub.deliver(burst.filter_map(|(channel, ms)| {
            let fields = Fields { data: Some("text"), ..Fields::default() };
            let body = Body::encode(&fields, 1 << 20).ok()?;
            let id = EventId { ms, ..EventId::default() };
            Some(Arrival { channel: channel.into(), id, body, format: Format::Text })
        }));
        assert_eq!(*lock(&control.seen), [1, 3]);
    }

    #[test]
    fn who_comes_after_the_close_is_ended_at_once() -> Result<()> {
        // Also where the bus would have to hear the channel first.
        for hub in [Hub::default(), Hub::new(Limits::default(), false)].map(Arc::new) {
            let key = hub.channel("a", 9);
            hub.close(Reason::Exit);
            for kind in [Kind::Queue, Kind::Stream] {
                let client = Arc::new(Client::new(kind, 9, Overflow::DropOldest));
                let registered = hub.register(&client, &[key], Resume::Fresh, Box::new(()))?;
                assert!(registered.is_some() && client.is_closed());
            }
            assert_eq!(hub.client_count(key), 0);
            assert_eq!(hub.figures(key).counters.snapshot().disconnected(Reason::Exit), 2);
        }
        Ok(())
    }

    #[test]
    fn a_client_registers_once() -> Result<()> {
        let hub = Arc::new(Hub::default());
        let key = hub.channel("a", 9);
        let (client, _) = join(&hub, &[key], 9, Resume::Fresh)?;
        let again = hub.register(&client, &[key], Resume::Fresh, Box::new(()));
        assert!(matches!(again, Err(Error::Closed)));
        assert_eq!(hub.client_count(key), 1);
        Ok(())
    }
}
