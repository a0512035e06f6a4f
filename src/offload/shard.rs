//! One I/O thread: its connections, what it is passed, and when it looks after whom.
//!
//! The hub passes an event once to each thread. Here it is encoded once for each kind of connection,
//! and written to one connection after the other; nobody is woken for it. What does not fit into a
//! socket waits, and the system tells when there is room again.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use smallvec::SmallVec;

use crate::bus::Bus;
use crate::clients::{Chance, Farewell};
use crate::descriptors::Inherited;
use crate::error::Result;
use crate::event::Event;
use crate::event_id::now_ms;
use crate::frame::{self, HEARTBEAT};
use crate::history::Gap;
use crate::hub::{ChannelNumber, First, Outlet, Passed, Revoked, Route};
use crate::metrics::{Counted, Reason};
use crate::offload::clock::Clock;
use crate::offload::connection::{Connection, Phase, Wrote};
use crate::offload::piece::{Form, Piece};
use crate::survey::{Report, SLOWEST, SlowClient};
use crate::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use crate::sync::{Mutex, lock};
use crate::wake::Wakeups;

/// The bell's place among what is watched.
const BELL: Token = Token(usize::MAX);

/// Events that a connection which is behind is given at a time.
pub const STEP: usize = 64;

/// Connections whose memory is fetched before the first of them is written to.
const LOOKAHEAD: usize = 16;

/// Connections that are behind and are served before a look at all others.
const TURN: usize = 64;

/// A peer that takes nothing for so long, though something waits, is given up: milliseconds.
const STALLED: u64 = 30_000;

/// Connections are looked after together in steps of so long, so that thousands of them do not wake
/// the thread a thousand times a second: milliseconds.
const TICK: u64 = 100;

/// Between two looks at a connection at the most, also where heartbeats are rarer: milliseconds.
const LOOK_EVERY: u32 = 15_000;

/// How long a peer may take to read the end before the connection is closed: milliseconds.
const LINGER: u64 = 500;

/// What a thread is told.
#[derive(Debug)]
pub enum Item {
    /// An event, or the end of a channel.
    Passed(Passed),
    /// A new connection.
    Join(Box<Joining>),
    /// Everything is to come to its end until then.
    End {
        /// When what is left is cut off.
        deadline: Instant,
        /// What clients are told.
        farewell: Arc<Farewell>,
    },
    /// Some have no right to their stream any more.
    Revoke(Arc<Revoked>),
    /// Somebody wants to know which are slow.
    Survey(Arc<Report>),
}

/// A connection on its way to its thread.
#[derive(Debug)]
pub struct Joining {
    /// The connection; the head of its response and all that comes before events waits in it.
    pub connection: Connection,
    /// What it listens to.
    pub route: Route,
    /// What it is given first.
    pub first: First,
    /// From where on in the hub's order it is live.
    pub sequence: u64,
    /// To be told when a client left.
    pub bus: Option<Weak<dyn Bus>>,
}

/// The way to an I/O thread.
#[derive(Debug)]
pub struct Inbox {
    /// Held to put or to take, also under a hub's lock. Nothing at all once the thread has ended.
    items: Mutex<Option<Vec<Item>>>,
    bell: Wakeups,
    /// Rung and not yet answered.
    is_rung: AtomicBool,
    /// How many revocations were put in.
    revocations: AtomicUsize,
    /// Connections of this thread, those on their way included.
    pub connections: AtomicUsize,
}

impl Inbox {
    /// Takes one descriptor.
    ///
    /// # Errors
    /// `Io` when there is none.
    pub fn new() -> Result<Inbox> {
        Ok(Inbox {
            items: Mutex::new(Some(Vec::new())),
            bell: Wakeups::new()?,
            is_rung: AtomicBool::new(false),
            revocations: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        })
    }

    /// Puts something in; `ring` tells of it.
    ///
    /// # Errors
    /// Gives it back when the thread has ended.
    pub fn push(&self, item: Item) -> std::result::Result<(), Item> {
        match &mut *lock(&self.items) {
            Some(items) => {
                if matches!(item, Item::Revoke(_)) {
                    self.revocations.fetch_add(1, Release);
                }
                items.push(item);
                Ok(())
            }
            None => Err(item),
        }
    }

    /// Takes what is left, and refuses all that comes later.
    pub fn close(&self) -> Vec<Item> {
        lock(&self.items).take().unwrap_or_default()
    }

    /// Takes what was put in, for who was rung.
    pub fn take(&self) -> Vec<Item> {
        // Silenced before it can ring again, and all of that before the look: who puts something in
        // after the look rings. (A ring that comes late wakes once for nothing.)
        if self.is_rung.load(Acquire) {
            self.bell.take();
            self.is_rung.store(false, Release);
        }
        lock(&self.items).as_mut().map(std::mem::take).unwrap_or_default()
    }
}

#[cfg(feature = "shuttle")]
impl Inbox {
    /// What stands for the descriptor under the checker.
    pub fn rings(&self) -> &crate::sync::Rings {
        self.bell.rings()
    }
}

impl Outlet for Inbox {
    fn put(&self, passed: Passed) {
        // A thread that has ended has nobody to give it to.
        let _ = self.push(Item::Passed(passed));
    }

    fn ring(&self) {
        if !self.is_rung.swap(true, AcqRel) {
            self.bell.ring();
        }
    }
}

/// What several connections have in common: the same channels.
#[derive(Debug)]
struct Group {
    route: Route,
    bus: Option<Weak<dyn Bus>>,
    members: Vec<usize>,
}

/// An event with its channel and its place in the hub's order.
type Numbered = (ChannelNumber, u64, Arc<Event>);

type GroupName = SmallVec<[ChannelNumber; 1]>;

/// The thread's own state.
#[derive(Debug)]
pub struct Shard {
    // Before the bell and the poll: fields are dropped in this order, and a number that is closed
    // and still marked may be another's already, which a forked child would close.
    _inherited: [Inherited; 2],
    inbox: Arc<Inbox>,
    poll: Poll,
    connections: Slab<Connection>,
    groups: Slab<Group>,
    group_of: HashMap<GroupName, usize>,
    groups_of: HashMap<ChannelNumber, SmallVec<[usize; 1]>>,
    /// When a connection is looked after next: milliseconds, its place, its number.
    due: BinaryHeap<Reverse<(u64, usize, u64)>>,
    /// Those that are behind and can be written to.
    behind: VecDeque<(usize, u64)>,
    /// How many revocations were taken out of the inbox.
    revocations: usize,
    /// For each form.
    heartbeats: [Arc<Piece>; Form::ALL.len()],
    clock: Clock,
    started: Instant,
    chance: Chance,
    numbers: u64,
    scratch: Vec<u8>,
    /// Set when everything ends.
    end: Option<(Instant, Arc<Farewell>)>,
    /// Dropped at the thread's end.
    _alive: Sender<()>,
}

impl Shard {
    /// A thread's state; it begins with `run`.
    ///
    /// # Errors
    /// `Io` when there are no descriptors.
    pub fn new(inbox: Arc<Inbox>, alive: Sender<()>, clock: Clock) -> Result<Shard> {
        let poll = Poll::new()?;
        let bell = inbox.bell.fd().as_raw_fd();
        poll.registry().register(&mut SourceFd(&bell), BELL, Interest::READABLE)?;
        let inherited = [Inherited::new(poll.as_raw_fd()), Inherited::new(bell)];
        Ok(Shard {
            _inherited: inherited,
            inbox,
            poll,
            connections: Slab::new(),
            groups: Slab::new(),
            group_of: HashMap::new(),
            groups_of: HashMap::new(),
            due: BinaryHeap::new(),
            behind: VecDeque::new(),
            revocations: 0,
            heartbeats: Form::ALL.map(|form| Arc::new(Piece::plain(form, HEARTBEAT))),
            started: clock.now(),
            clock,
            chance: Chance::default(),
            numbers: 0,
            scratch: vec![0; 4096],
            end: None,
            _alive: alive,
        })
    }

    /// Serves until everything has ended.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        while self.turn(&mut events, self.timeout()) {}
    }

    /// One turn of `run`, for who drives it by hand: whether there are more. Waits for `timeout` at
    /// the most.
    pub fn turn(&mut self, events: &mut Events, timeout: Option<Duration>) -> bool {
        if let Err(error) = self.poll.poll(events, timeout)
            && error.kind() != ErrorKind::Interrupted
        {
            // Nothing can be waited for: not to spin is all that is left.
            std::thread::sleep(Duration::from_millis(100));
        }
        self.take_items();
        for event in &*events {
            if event.token() != BELL {
                self.look_at(event.token().0, event.is_writable());
            }
        }
        self.serve_those_behind();
        self.serve_those_due();
        let is_over = self.end.as_ref().is_some_and(|(deadline, _)| {
            self.inbox.connections.load(Relaxed) == 0 || self.clock.now() >= *deadline
        });
        if is_over {
            self.cut_off();
        }
        !is_over
    }

    /// Lets so much time pass at once, for who drives it by hand.
    pub fn pass(&self, time: Duration) {
        self.clock.pass(time);
    }

    /// Ends what is left, also what has just come, and takes nothing more.
    fn cut_off(&mut self) {
        for item in self.inbox.close() {
            if let Item::Join(joining) = item {
                self.join(*joining);
            }
        }
        let places: Vec<usize> = self.connections.iter().map(|(place, _)| place).collect();
        for place in places {
            self.remove(place, Reason::Exit);
        }
    }

    fn now(&self) -> u64 {
        let since = self.clock.now().saturating_duration_since(self.started);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.behind.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = self.now();
        let next =
            self.due.peek().map(|Reverse((at, ..))| Duration::from_millis(at.saturating_sub(now)));
        let end = self.end.as_ref().map(|(at, _)| at.saturating_duration_since(self.clock.now()));
        match (next, end) {
            (Some(next), Some(end)) => Some(next.min(end)),
            (next, end) => next.or(end),
        }
    }

    // --- What it is told ---------------------------------------------------------------------

    fn take_items(&mut self) {
        let mut events = Vec::new();
        let mut ended = Vec::new();
        let mut surveys = Vec::new();
        let mut end = None;
        for item in self.inbox.take() {
            match item {
                // Before the events of the same turn: those that it must not have are before its
                // place in the order.
                Item::Join(joining) => self.join(*joining),
                Item::Passed(Passed::Event { channel, sequence, event }) => {
                    events.push((channel, sequence, event));
                }
                Item::Passed(Passed::End(channel)) => ended.push(channel),
                // At once: those that come after it are not meant.
                Item::Revoke(revoked) => self.revoke(&revoked),
                Item::Survey(report) => surveys.push(report),
                Item::End { deadline, farewell } => end = Some((deadline, farewell)),
            }
        }
        self.fan_out(&events);
        for report in surveys {
            report.add(self.slowest_connections(&report));
        }
        for channel in ended {
            self.end_channel(channel);
        }
        if end.is_some() {
            self.end = end;
            let places: Vec<usize> = self.connections.iter().map(|(place, _)| place).collect();
            for place in places {
                self.end_after_what_waits(place);
            }
        }
    }

    fn join(&mut self, joining: Joining) {
        let Joining { mut connection, route, first, sequence, bus } = joining;
        self.numbers += 1;
        let now = self.now();
        connection.number = self.numbers;
        connection.written_at = now;
        connection.phase = match first {
            First::After(cursor) => Phase::Behind { cursor, told: None },
            First::Events(events) => {
                for piece in Piece::of_events(connection.form, &events) {
                    connection.push(piece);
                }
                Phase::Live(sequence)
            }
        };
        let name: GroupName = route.channels.iter().map(|(_, number)| *number).collect();
        let group = match self.group_of.get(&name) {
            Some(group) => *group,
            None => {
                let group = self.groups.insert(Group { route, bus, members: Vec::new() });
                for channel in &name {
                    self.groups_of.entry(*channel).or_default().push(group);
                }
                self.group_of.insert(name, group);
                group
            }
        };
        let fd = connection.socket().as_raw_fd();
        let interval = interval(&connection).min(LOOK_EVERY);
        let number = connection.number;
        connection.route = group;
        connection.place = self.groups[group].members.len();
        let place = self.connections.insert(connection);
        self.groups[group].members.push(place);
        // Told once at each change: neither reading nor writing needs another call for it.
        let both = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut SourceFd(&fd), Token(place), both).is_err() {
            self.remove(place, Reason::Left);
            return;
        }
        // Not all at one time, also of those that came at one time.
        let wait = f64::from(interval) * (0.5 + self.chance.of(number) / 2.0);
        self.schedule(now + wait as u64, place, number);
        self.go_on(place);
        if self.end.is_some() {
            // It came while everything ends.
            self.end_after_what_waits(place);
        }
    }

    /// Gives events to all connections that listen.
    fn fan_out(&mut self, events: &[Numbered]) {
        let mut of_groups: HashMap<usize, SmallVec<[&Numbered; 4]>> = HashMap::new();
        for event in events {
            for group in self.groups_of.get(&event.0).into_iter().flatten() {
                of_groups.entry(*group).or_default().push(event);
            }
        }
        // Asked once for all.
        let now = self.now();
        let mut gone = Vec::new();
        for (group, its) in of_groups {
            let Some(group) = self.groups.get(group) else { continue };
            let Some((_, first, _)) = its.first() else { continue };
            let mut shared = [const { None }; Form::ALL.len()];
            for some in group.members.chunks(LOOKAHEAD) {
                for place in some {
                    // So that memory is on its way for all of them before it is waited for.
                    std::hint::black_box(self.connections.get(*place).map(|next| next.phase));
                }
                for place in some {
                    let Some(connection) = self.connections.get_mut(*place) else { continue };
                    let Phase::Live(since) = connection.phase else { continue };
                    let form = connection.form;
                    let (own, mut own_done);
                    let (pieces, done) = if since < *first {
                        let entry = shared[form.number()].get_or_insert_with(|| {
                            (Piece::of_events(form, its.iter().map(|(_, _, event)| event)), 0)
                        });
                        (&entry.0, &mut entry.1)
                    } else {
                        let later = its.iter().filter(|(_, sequence, _)| *sequence > since);
                        own = Piece::of_events(form, later.map(|(_, _, event)| event));
                        own_done = 0;
                        (&own, &mut own_done)
                    };
                    let is_shared = since < *first;
                    // From now on it takes something, or something waits for it.
                    let was_idle = connection.is_idle();
                    let given = give(connection, pieces, done);
                    if !is_shared {
                        count_taken(pieces, done, &mut None);
                    }
                    match given {
                        Ok(()) if was_idle => connection.written_at = now,
                        Ok(()) => {}
                        Err(reason) => gone.push((*place, reason)),
                    }
                }
                // The last of thousands is served much later than the first.
                let mut taken_at = None;
                for (pieces, done) in shared.iter_mut().flatten() {
                    count_taken(pieces, done, &mut taken_at);
                }
            }
        }
        for (place, reason) in gone {
            self.remove(place, reason);
        }
    }

    /// Those that are the furthest behind.
    fn slowest_connections(&self, report: &Report) -> Vec<SlowClient> {
        let is_told = |its: &Connection| {
            self.groups.get(its.route).is_some_and(|group| report.covers(&group.route.hub))
        };
        let since = |(place, its): (usize, &Connection)| {
            its.behind_since().filter(|_| is_told(its)).map(|since| (since, place))
        };
        let mut behind: Vec<(u64, usize)> = self.connections.iter().filter_map(since).collect();
        behind.sort_unstable();
        let told = behind.into_iter().take(SLOWEST).filter_map(|(_, place)| {
            let connection = self.connections.get(place)?;
            let route = &self.groups.get(connection.route)?.route;
            let names = route.hub.upgrade()?.names_of(route);
            SlowClient::new(Counted::Socket, connection.slot(), &names, connection.waiting())
        });
        told.collect()
    }

    /// Ends those that are meant; what waits for them is not sent.
    fn revoke(&mut self, revoked: &Revoked) {
        self.revocations += 1;
        let is_it = |connection: &Connection| {
            let route = self.groups.get(connection.route).map(|group| &group.route.channels);
            let mut numbers = route.into_iter().flatten().map(|(_, number)| *number);
            revoked.is_of(connection.slot()) && numbers.any(|number| revoked.covers(number))
        };
        let those = self.connections.iter().filter(|(_, connection)| is_it(connection));
        for place in those.map(|(place, _)| place).collect::<Vec<usize>>() {
            if let Some(connection) = self.connections.get_mut(place) {
                connection.is_revoked = true;
                if connection.cut() && connection.phase == Phase::Ending {
                    // The end of its body was among that: it is ended once more.
                    connection.phase = Phase::Live(0);
                }
            }
            self.end_after_what_waits(place);
        }
    }

    /// A private channel is gone: its connections end after what is left.
    fn end_channel(&mut self, channel: ChannelNumber) {
        let groups = self.groups_of.get(&channel).cloned().unwrap_or_default();
        let members: Vec<usize> =
            groups.iter().flat_map(|group| self.groups[*group].members.clone()).collect();
        for place in members {
            self.end_after_what_waits(place);
        }
    }

    /// Ends a connection, with what is to be said when everything ends.
    fn end_after_what_waits(&mut self, place: usize) {
        let now = self.now();
        let Some(connection) = self.connections.get_mut(place) else { return };
        if matches!(connection.phase, Phase::Ending | Phase::Lingering(_)) {
            return;
        }
        connection.phase = Phase::Ending;
        if connection.is_idle() {
            connection.written_at = now;
        }
        let frame = self.end.as_ref().map(|(_, farewell)| farewell.frame()).unwrap_or_default();
        connection.push(Arc::new(connection.end_of_body(frame.as_bytes())));
        self.go_on(place);
    }

    /// Why a connection was written to its end.
    fn ending(&self, place: usize) -> Reason {
        let is_revoked = self.connections.get(place).is_some_and(|its| its.is_revoked);
        match self.end {
            _ if is_revoked => Reason::Revoked,
            Some(_) => Reason::Exit,
            None => Reason::Closed,
        }
    }

    // --- Single connections ------------------------------------------------------------------

    fn look_at(&mut self, place: usize, is_writable: bool) {
        let Some(connection) = self.connections.get_mut(place) else { return };
        if let Some(reason) = connection.read_away(&mut self.scratch) {
            let is_over = matches!(connection.phase, Phase::Lingering(_));
            self.remove(place, if is_over { self.ending(place) } else { reason });
        } else if is_writable {
            self.go_on(place);
        }
    }

    /// Writes what waits, and then what its phase says.
    fn go_on(&mut self, place: usize) {
        let now = self.now();
        let Some(connection) = self.connections.get_mut(place) else { return };
        if !connection.is_idle() {
            let before = connection.taken();
            let wrote = connection.flush();
            if connection.taken() > before {
                connection.written_at = now;
            }
            match wrote {
                Wrote::All => {}
                Wrote::Blocked => return,
                Wrote::Gone(reason) => return self.remove(place, reason),
            }
        }
        match connection.phase {
            Phase::Live(_) | Phase::Lingering(_) => {}
            Phase::Behind { .. } if connection.is_queued => {}
            Phase::Behind { .. } => {
                connection.is_queued = true;
                self.behind.push_back((place, connection.number));
            }
            Phase::Ending => {
                connection.finish();
                let until = now + LINGER;
                connection.phase = Phase::Lingering(until);
                let number = connection.number;
                self.schedule(until, place, number);
            }
        }
    }

    /// Those that are behind get the next piece of history, a few at a time.
    fn serve_those_behind(&mut self) {
        for _ in 0..TURN {
            let Some((place, number)) = self.behind.pop_front() else { return };
            let Some(connection) = self.connections.get_mut(place) else { continue };
            let phase = connection.phase;
            if connection.number != number {
                continue;
            }
            connection.is_queued = false;
            let Phase::Behind { cursor, told } = phase else { continue };
            if !connection.is_idle() {
                continue;
            }
            let group = &self.groups[connection.route];
            let Some(hub) = group.route.hub.upgrade() else {
                self.end_after_what_waits(place);
                continue;
            };
            let step = hub.read_on(&group.route, cursor, told, STEP);
            if self.inbox.revocations.load(Acquire) != self.revocations {
                // What was read may be later than its right to it, and waits for the next turn.
                connection.is_queued = true;
                self.behind.push_front((place, number));
                return;
            }
            if step.lost.is_some() {
                let reset = frame::reset(Gap::TooOld.reason());
                connection.push(Arc::new(Piece::plain(connection.form, &reset)));
            }
            for piece in Piece::of_events(connection.form, &step.events) {
                connection.push(piece);
            }
            connection.phase = match step.live_from {
                Some(sequence) => Phase::Live(sequence),
                None => Phase::Behind { cursor: step.cursor, told: told.max(step.lost) },
            };
            self.go_on(place);
        }
    }

    /// Looks after a connection at `at`, or a little before.
    fn schedule(&mut self, at: u64, place: usize, number: u64) {
        let tick = (at / TICK).max(self.now() / TICK + 1);
        self.due.push(Reverse((tick * TICK, place, number)));
    }

    fn serve_those_due(&mut self) {
        let now = self.now();
        while let Some(Reverse((at, place, number))) = self.due.peek().copied()
            && at <= now
        {
            self.due.pop();
            let chance = self.chance.of(number ^ at);
            let Some(connection) = self.connections.get_mut(place) else { continue };
            if connection.number != number {
                continue;
            }
            if let Phase::Lingering(until) = connection.phase {
                // Earlier, it is a look that was due before the end.
                if at + TICK > until {
                    self.remove(place, self.ending(place));
                }
                continue;
            }
            if !connection.is_idle() {
                // The system tells when there is room, but not when it has memory again.
                self.go_on(place);
            }
            let Some(connection) = self.connections.get_mut(place) else { continue };
            let idle = now.saturating_sub(connection.written_at);
            if !connection.is_idle() && idle >= STALLED {
                self.remove(place, Reason::Timeout);
                continue;
            }
            let interval = interval(connection);
            // Spread, so that clients that all got the same event are not all due at once.
            let patience = (f64::from(interval) * (0.75 + chance / 4.0)) as u64;
            if connection.heartbeat > 0 && connection.is_idle() && idle >= patience {
                let heartbeat = Arc::clone(&self.heartbeats[connection.form.number()]);
                match connection.write(&heartbeat) {
                    Wrote::All | Wrote::Blocked => connection.written_at = now,
                    Wrote::Gone(reason) => {
                        self.remove(place, reason);
                        continue;
                    }
                }
            }
            let next = if idle >= patience { now } else { connection.written_at } + patience;
            // A stall is noticed in time, however rare the heartbeats are.
            let soon = if connection.is_idle() { LOOK_EVERY.into() } else { STALLED / 4 };
            let next = next.min(now + soon);
            self.schedule(next, place, number);
        }
    }

    fn remove(&mut self, place: usize, reason: Reason) {
        let Some(connection) = self.connections.try_remove(place) else { return };
        // Closing it would do as well, if no forked child had a copy.
        if let Some(slot) = connection.slot() {
            slot.set_reason(reason);
        }
        let fd = connection.socket().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        connection.end(matches!(reason, Reason::Overflow | Reason::Timeout | Reason::Flood));
        self.inbox.connections.fetch_sub(1, Relaxed);
        let group = &mut self.groups[connection.route];
        group.members.swap_remove(connection.place);
        if let Some(moved) = group.members.get(connection.place)
            && let Some(moved) = self.connections.get_mut(*moved)
        {
            moved.place = connection.place;
        }
        let outlet: Arc<dyn Outlet> = Arc::clone(&self.inbox) as _;
        if let Some(hub) = group.route.hub.upgrade() {
            hub.let_go(&group.route, &outlet, reason);
        }
        if group.members.is_empty() {
            let bus = group.bus.as_ref().and_then(Weak::upgrade);
            self.forget_group(connection.route);
            if let Some(bus) = bus {
                bus.left();
            }
        }
    }

    fn forget_group(&mut self, at: usize) {
        let group = self.groups.remove(at);
        let name: GroupName = group.route.channels.iter().map(|(_, number)| *number).collect();
        for channel in &name {
            if let Some(groups) = self.groups_of.get_mut(channel) {
                groups.retain(|other| *other != at);
                if groups.is_empty() {
                    self.groups_of.remove(channel);
                }
            }
        }
        self.group_of.remove(&name);
    }
}

/// Milliseconds of idleness that are told by a heartbeat, or noticed where there is none.
fn interval(connection: &Connection) -> u32 {
    if connection.heartbeat > 0 { connection.heartbeat } else { LOOK_EVERY }
}

/// Counts that `done` connections have just taken live pieces, at a time that is looked up once.
fn count_taken(pieces: &[Arc<Piece>], done: &mut u64, at: &mut Option<u64>) {
    if *done > 0 {
        let now = *at.get_or_insert_with(now_ms);
        pieces.iter().for_each(|piece| piece.count_delivered(*done, Some(now)));
        *done = 0;
    }
}

/// Gives pieces to a connection that is live. If the socket took all of a piece at once, that is
/// counted in `done` by one more; any other is counted when it did.
fn give(
    connection: &mut Connection,
    pieces: &[Arc<Piece>],
    done: &mut u64,
) -> std::result::Result<(), Reason> {
    if let ([piece], true) = (pieces, connection.is_idle()) {
        return match connection.write(piece) {
            Wrote::All => {
                *done += 1;
                Ok(())
            }
            Wrote::Blocked => Ok(()),
            Wrote::Gone(reason) => Err(reason),
        };
    }
    let was_idle = connection.is_idle();
    for piece in pieces {
        if !connection.offer(piece) {
            return Err(Reason::Overflow);
        }
        // One by one while they go through: a burst is no backlog.
        if was_idle && let Wrote::Gone(reason) = connection.flush() {
            return Err(reason);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendFlags, send};
    use socket2::SockRef;

    use crate::coding::Sum;
    use crate::event::{Draft, Format};
    use crate::frame::{Body, Fields};
    use crate::hub::{ChannelKey, Hub, Resume};
    use crate::offload::{Backlog, Handover, Offload};
    use crate::queue::{Client, Kind, Overflow};

    /// A thread that a test drives, and its channel.
    struct Driven {
        hub: Arc<Hub>,
        key: ChannelKey,
        offload: Offload,
        shard: Shard,
        events: Events,
    }

    impl Driven {
        fn new() -> Result<Driven> {
            let hub = Arc::new(Hub::default());
            let key = hub.channel("a", 10);
            let (offload, shard) = Offload::by_hand()?;
            Ok(Driven { hub, key, offload, shard, events: Events::with_capacity(8) })
        }

        /// The client's end of a connection with little room.
        fn connect(&self, heartbeat: Option<Duration>) -> Result<UnixStream> {
            let (own, theirs) = UnixStream::pair()?;
            self.hand_over(&theirs, Form::ALL[0], heartbeat)?;
            own.set_nonblocking(true)?;
            Ok(own)
        }

        fn hand_over(
            &self,
            theirs: &UnixStream,
            form: Form,
            heartbeat: Option<Duration>,
        ) -> Result<()> {
            let client = Arc::new(Client::new(Kind::Stream, 10, Overflow::Disconnect));
            let registered =
                self.hub.register(&client, &[self.key], Resume::Fresh, Box::new(()))?;
            let cursor = registered.map(|registered| registered.cursor).unwrap_or_default();
            SockRef::from(theirs).set_send_buffer_size(1)?;
            let taken = self.offload.take(Handover {
                hub: &self.hub,
                bus: None,
                client: &client,
                cursor,
                fd: theirs.as_raw_fd(),
                instead: None,
                head: b"head\r\n\r\n",
                body: b"retry: 1\n\n",
                form,
                backlog: Backlog { frames: 10, bytes: 1 << 20, overflow: Overflow::Disconnect },
                heartbeat,
                slot: None,
                threads: 1,
            })?;
            assert!(taken);
            Ok(())
        }

        fn revoke(&mut self) {
            let revoked = self.hub.revoke(Some("a"), None).map(Arc::new);
            revoked.iter().for_each(|revoked| self.offload.revoke(revoked));
            self.turn();
        }

        fn publish(&self, size: usize) -> Result<()> {
            let text = "x".repeat(size);
            let fields = Fields { data: Some(&text), ..Fields::default() };
            let body = Some(Body::encode(&fields, 1 << 20)?);
            let draft = Draft { body, format: Format::Text, has_message: true, decoded: None };
            self.hub.publish(self.key, draft).map(drop)
        }

        fn turn(&mut self) {
            self.shard.turn(&mut self.events, Some(Duration::ZERO));
        }

        fn pass(&mut self, seconds: u64) {
            self.shard.pass(Duration::from_secs(seconds));
            self.turn();
        }

        /// All that comes to a client that reads.
        fn read(&mut self, client: &UnixStream) -> Result<String> {
            Ok(String::from_utf8_lossy(&self.read_bytes(client)?).into_owned())
        }

        fn read_bytes(&mut self, mut client: &UnixStream) -> Result<Vec<u8>> {
            let mut got = Vec::new();
            loop {
                let before = got.len();
                match client.read_to_end(&mut got) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    ended => return Ok(ended.map(|_| got)?),
                }
                if got.len() == before {
                    return Ok(got);
                }
                self.turn();
            }
        }
    }

    #[test]
    fn patience_begins_when_something_waits() -> Result<()> {
        for heartbeat in [None, Some(Duration::from_secs(3600))] {
            let mut driven = Driven::new()?;
            let client = driven.connect(heartbeat)?;
            driven.turn();
            driven.read(&client)?;
            for _ in 0..10 {
                driven.pass(10);
            }
            // More than the socket takes, after a long time of nothing.
            driven.publish(1 << 16)?;
            driven.turn();
            driven.pass(20);
            assert_eq!(driven.offload.connections(), 1, "it has had 20 s of its 30");
            driven.pass(11);
            driven.pass(11);
            assert_eq!(driven.offload.connections(), 0);
        }
        Ok(())
    }

    #[test]
    fn a_heartbeat_that_finds_no_room_begins_the_patience() -> Result<()> {
        let mut driven = Driven::new()?;
        let client = driven.connect(Some(Duration::from_secs(60)))?;
        driven.turn();
        // Whole events until nothing waits and the next finds no room.
        while send(driven.shard.connections[0].socket(), b"x", SendFlags::DONTWAIT).is_ok() {}
        driven.pass(61);
        assert!(!driven.shard.connections[0].is_idle(), "the heartbeat waits");
        driven.pass(20);
        assert_eq!(driven.offload.connections(), 1, "it has had 20 s of its 30");
        driven.read(&client)?;
        assert!(driven.shard.connections[0].is_idle());
        Ok(())
    }

    #[test]
    fn a_body_that_was_ending_ends_when_the_right_to_it_is_taken_away() -> Result<()> {
        let mut driven = Driven::new()?;
        let client = driven.connect(None)?;
        driven.publish(1 << 16)?;
        driven.publish(1)?;
        driven.turn();
        driven.offload.end(&Arc::new(Farewell::new(1000, 1)));
        driven.turn();
        driven.revoke();
        let text = driven.read(&client)?;
        assert!(text.ends_with("\r\n0\r\n\r\n"), "{:?}", text.get(text.len() - 50..));
        assert!(!text.contains("data: x\n"), "what waited is not sent");
        Ok(())
    }

    #[test]
    fn who_is_revoked_before_the_head_was_written_gets_a_response_and_its_end() -> Result<()> {
        for form in Form::ALL {
            let mut driven = Driven::new()?;
            let (own, theirs) = UnixStream::pair()?;
            own.set_nonblocking(true)?;
            // What the server sent before has not left yet: there is no room for the head.
            SockRef::from(&theirs).set_send_buffer_size(1)?;
            while send(&theirs, b"x", SendFlags::DONTWAIT).is_ok() {}
            driven.hand_over(&theirs, form, None)?;
            drop(theirs);
            driven.publish(1)?;
            driven.turn();
            driven.revoke();
            let mut got = driven.read_bytes(&own)?;
            got.retain(|byte| *byte != b'x');
            let head = b"head\r\n\r\n";
            assert!(got.starts_with(head), "{form:?}: {:?}", String::from_utf8_lossy(&got));
            let first = Piece::first(head, form, b"");
            let end = Piece::end(form, Sum::default(), b"");
            assert_eq!(got, [first.bytes(), end.bytes()].concat(), "no text, and whole");
        }
        Ok(())
    }

    #[test]
    fn who_is_behind_reads_nothing_that_is_later_than_its_right_to_it() -> Result<()> {
        let mut driven = Driven::new()?;
        let client = driven.connect(None)?;
        driven.turn();
        driven.shard.connections[0].phase =
            Phase::Behind { cursor: driven.hub.newest(), told: None };
        driven.shard.go_on(0);
        let revoked = driven.hub.revoke(Some("a"), None).map(Arc::new);
        driven.publish(1)?;
        driven.shard.serve_those_behind();
        let text = driven.read(&client)?;
        assert!(text.ends_with("data: x\n\n\r\n"), "it has its right yet: {text:?}");

        driven.shard.connections[0].phase =
            Phase::Behind { cursor: driven.hub.newest(), told: None };
        driven.shard.go_on(0);
        revoked.iter().for_each(|revoked| driven.offload.revoke(revoked));
        driven.publish(1)?;
        driven.shard.serve_those_behind();
        driven.turn();
        assert_eq!(driven.read(&client)?, "0\r\n\r\n", "the end of the body alone");
        Ok(())
    }

    #[test]
    fn a_peer_has_its_time_to_read_the_end_whatever_was_due_before() -> Result<()> {
        let mut driven = Driven::new()?;
        let client = driven.connect(None)?;
        driven.turn();
        // The first look at it is due between 7.5 and 15 seconds.
        while driven.shard.due.peek().is_some_and(|Reverse((at, ..))| driven.shard.now() < at - 100)
        {
            driven.shard.pass(Duration::from_millis(100));
        }
        driven.turn();
        driven.revoke();
        driven.shard.pass(Duration::from_millis(200));
        driven.turn();
        assert_eq!(driven.offload.connections(), 1, "it has had 200 ms of its 500");
        driven.shard.pass(Duration::from_millis(400));
        driven.turn();
        assert_eq!(driven.offload.connections(), 0);
        drop(client);
        Ok(())
    }

    #[test]
    fn what_comes_after_the_end_of_a_thread_is_given_back() -> Result<()> {
        let inbox = Inbox::new()?;
        assert!(inbox.push(Item::Passed(Passed::End(1))).is_ok());
        assert_eq!(inbox.close().len(), 1);
        assert!(matches!(inbox.push(Item::Passed(Passed::End(2))), Err(Item::Passed(_))));
        assert!(inbox.take().is_empty() && inbox.close().is_empty());
        Ok(())
    }
}
