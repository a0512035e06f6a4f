//! A client's queue: what has been delivered to it and not yet been read, and who waits for it.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use smallvec::SmallVec;

use crate::clients::{Farewell, Slot};
use crate::error::{Error, Result};
use crate::event::{Attachment, Event};
use crate::event_id::EventId;
use crate::hub::{ChannelKey, Hub, Membership};
use crate::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use crate::sync::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};
use crate::sync::{Mutex, lock, touch};
use crate::timer::Timed;
use crate::wake::{Park, Parked, Token, Waiter, WakeBatch, Wakeups};

/// What reads a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Code that takes messages.
    Queue,
    /// A server that takes frames.
    Stream,
    /// What makes the events of a rendering; it is no client that anybody counts.
    Renderer,
}

impl Kind {
    /// Whether `event` has anything for such a client.
    pub fn takes(self, event: &Event) -> bool {
        match self {
            Kind::Queue => event.has_message,
            Kind::Stream => !event.frame.is_empty(),
            Kind::Renderer => event.has_message || !event.frame.is_empty(),
        }
    }
}

/// What happens to an event for which a client has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The oldest waiting event makes room.
    DropOldest,
    /// The new event is not kept.
    DropNewest,
    /// The client is disconnected: what waits is still delivered, then the end.
    Disconnect,
}

/// What became of an event offered to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It waits in the queue.
    Queued,
    /// It waits, and an older one does not any more.
    DroppedOldest,
    /// The queue did not keep it.
    DroppedNewest,
    /// The queue did not keep it and is closed now.
    Disconnected,
    /// Not for this client, or the client has left.
    Skipped,
}

/// What a reader found.
#[derive(Debug)]
pub enum Taken {
    /// The oldest event.
    Event(Arc<Event>),
    /// Nothing yet.
    Empty,
    /// Nothing, and nothing will come.
    Closed,
}

/// A client of the hub: a bounded queue of events with its waiters.
#[derive(Debug)]
pub struct Client {
    kind: Kind,
    overflow: Overflow,
    capacity: usize,
    /// `capacity` plus what of the replay at registration still waits: a resumed backlog is no overflow.
    limit: AtomicUsize,
    /// Events in the channel; raised before a send, lowered after a receive.
    depth: AtomicUsize,
    dropped: AtomicU64,
    /// Whether the bus lost events that it should have had.
    gap: AtomicBool,
    /// The newest event that it missed and was given at its registration.
    replayed: OnceLock<EventId>,
    /// What waits behind the front. Unbounded, because a bounded one allocates its capacity at
    /// once; `depth` bounds it.
    receiver: Receiver<Arc<Event>>,
    /// Guards the front and the sender against the close, and the waiters against the delivery,
    /// so that no wake-up falls between a look and a wait. Held for a few instructions; taken
    /// after the hub's lock, never before it.
    state: Mutex<State>,
    hub: OnceLock<Weak<Hub>>,
    /// What it is told after all else, set before it is closed.
    farewell: OnceLock<Arc<Farewell>>,
}

#[derive(Debug, Default)]
struct State {
    /// Dropped at the close, which ends every blocked receive once the queue is drained.
    sender: Option<Sender<Arc<Event>>>,
    /// The oldest event, if the queue was empty when it came and no thread blocked in a receive:
    /// a client that keeps up never touches the channel's memory.
    front: Option<Arc<Event>>,
    /// Threads blocked in the channel's receive, which does not see the front.
    blocked: usize,
    waiters: SmallVec<[Waiter; 1]>,
    /// The moment at which the timer looks after this client next.
    timer_at: Option<Instant>,
    memberships: SmallVec<[Membership; 1]>,
    /// The binding's object for this client, given to who asks for the listeners.
    owner: Option<Attachment>,
    /// For a renderer: where it is announced when it has something.
    desk: Option<Desk>,
    /// For a stream: its place among those of the process.
    slot: Option<Arc<Slot>>,
}

/// What a client that left is let go of with: to be dropped without a lock.
#[derive(Debug)]
pub struct Leftover {
    _owner: Option<Attachment>,
    _token: Option<Arc<Event>>,
    _slot: Option<Arc<Slot>>,
}

/// Where many clients are announced to few readers.
#[derive(Debug)]
pub struct Desk {
    /// The readers' queue.
    pub queue: Arc<Client>,
    /// What is put there.
    pub token: Arc<Event>,
    /// It is there, or with a reader.
    pub is_announced: bool,
}

impl Client {
    /// A client of no channel yet, with room for `capacity` events.
    pub fn new(kind: Kind, capacity: usize, overflow: Overflow) -> Client {
        let (sender, receiver) = unbounded();
        Client {
            kind,
            overflow,
            capacity,
            limit: AtomicUsize::new(capacity),
            depth: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            gap: AtomicBool::new(false),
            replayed: OnceLock::new(),
            receiver,
            state: Mutex::new(State { sender: Some(sender), ..State::default() }),
            hub: OnceLock::new(),
            farewell: OnceLock::new(),
        }
    }

    /// What reads it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The room it was made with, in events.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Events waiting now.
    pub fn len(&self) -> usize {
        self.depth.load(Acquire)
    }

    /// Whether nothing waits now.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the next event finds no room.
    pub fn is_full(&self) -> bool {
        self.len() >= self.limit.load(Relaxed)
    }

    /// Events that this client lost to overflow.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Notes what it is to be told after all else.
    pub fn set_farewell(&self, farewell: &Arc<Farewell>) {
        // The first holds.
        let _ = self.farewell.set(Arc::clone(farewell));
    }

    /// What it is to be told after all else.
    pub fn farewell(&self) -> Option<&Farewell> {
        self.farewell.get().map(|farewell| &**farewell)
    }

    /// Notes that the bus lost events that it should have had.
    pub fn note_gap(&self) {
        self.gap.store(true, Relaxed);
    }

    /// Whether that was noted.
    pub fn has_gap(&self) -> bool {
        self.gap.load(Relaxed)
    }

    /// Counts that its reader has `event`, as so many bytes, at `now` (milliseconds since the epoch).
    pub fn count_taken(&self, event: &Event, bytes: usize, now: u64) {
        let Some(counters) = &event.counters else { return };
        counters.delivered().fetch_add(1, Relaxed);
        if bytes > 0 {
            counters.bytes().fetch_add(bytes as u64, Relaxed);
        }
        // What it missed waited for the client and not the client for it.
        if let Some(id) = event.id.filter(|_| !self.is_replayed(event)) {
            counters.count_delay(now.saturating_sub(id.ms), 1);
        }
    }

    /// Whether it missed the event and was given it at its registration.
    fn is_replayed(&self, event: &Event) -> bool {
        self.replayed.get().is_some_and(|last| event.id.is_some_and(|id| id <= *last))
    }

    /// Whether it takes no more events.
    pub fn is_closed(&self) -> bool {
        lock(&self.state).sender.is_none()
    }

    /// The hub it is registered with, while that lives.
    pub fn hub(&self) -> Option<Arc<Hub>> {
        self.hub.get().and_then(Weak::upgrade)
    }

    /// Runs `look` on the binding's object.
    pub fn with_owner<R>(&self, look: impl FnOnce(Option<&Attachment>) -> R) -> R {
        look(lock(&self.state).owner.as_ref())
    }

    /// When the oldest event that waits was ordered; `None` for one without an id, and for none.
    pub fn oldest(&self) -> Option<EventId> {
        let mut state = lock(&self.state);
        if state.front.is_none() && state.blocked == 0 {
            // Where only the next reader looks, who comes to this lock first.
            state.front = self.receiver.try_recv().ok();
        }
        state.front.as_ref().and_then(|event| event.id)
    }

    /// Takes the oldest event without waiting.
    pub fn take(&self) -> Taken {
        self.take_locked(&mut lock(&self.state))
    }

    fn take_locked(&self, state: &mut State) -> Taken {
        if let Some(event) = state.front.take() {
            return self.taken(event);
        }
        if self.is_empty() {
            return if state.sender.is_none() { Taken::Closed } else { Taken::Empty };
        }
        match self.receiver.try_recv() {
            Ok(event) => self.taken(event),
            // A blocked thread has it and is about to lower the depth.
            Err(TryRecvError::Empty) => Taken::Empty,
            Err(TryRecvError::Disconnected) => Taken::Closed,
        }
    }

    /// Takes the oldest event, blocking this thread until `deadline` (for ever without one).
    pub fn take_blocking(&self, deadline: Option<Instant>) -> Taken {
        {
            let mut state = lock(&self.state);
            match self.take_locked(&mut state) {
                Taken::Empty => state.blocked += 1,
                found => return found,
            }
        }
        let received = match deadline {
            Some(deadline) => self.receiver.recv_deadline(deadline),
            None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        lock(&self.state).blocked -= 1;
        match received {
            Ok(event) => self.taken(event),
            Err(RecvTimeoutError::Timeout) => Taken::Empty,
            Err(RecvTimeoutError::Disconnected) => Taken::Closed,
        }
    }

    fn taken(&self, event: Arc<Event>) -> Taken {
        self.depth.fetch_sub(1, Release);
        // After the depth: the other way round there would seem to be no room meanwhile.
        if self.limit.load(Relaxed) > self.capacity && self.is_replayed(&event) {
            self.limit.fetch_sub(1, Relaxed);
        }
        Taken::Event(event)
    }

    /// Reads where `deliver` is about to write, so that the cache has it.
    pub fn touch(&self) {
        std::hint::black_box(self.depth.load(Relaxed));
        touch(&self.state);
    }

    /// Offers an event under the overflow policy. An event that falls out goes to `discarded`.
    pub fn deliver(
        &self,
        event: &Arc<Event>,
        wakes: &mut WakeBatch,
        discarded: &mut Vec<Arc<Event>>,
    ) -> Delivery {
        if !self.kind.takes(event) {
            return Delivery::Skipped;
        }
        let mut state = lock(&self.state);
        if state.sender.is_none() {
            return Delivery::Skipped;
        }
        let mut delivery = Delivery::Queued;
        if self.is_full() && !self.is_about_to_have_room(&state) {
            match self.overflow {
                Overflow::DropNewest => {
                    self.dropped.fetch_add(1, Relaxed);
                    return Delivery::DroppedNewest;
                }
                Overflow::Disconnect => {
                    self.dropped.fetch_add(1, Relaxed);
                    state.close(wakes);
                    return Delivery::Disconnected;
                }
                // A reader may have emptied it meanwhile; then there is room.
                Overflow::DropOldest => {
                    if let Taken::Event(oldest) = self.take_locked(&mut state) {
                        self.dropped.fetch_add(1, Relaxed);
                        discarded.push(oldest);
                        delivery = Delivery::DroppedOldest;
                    }
                }
            }
        }
        self.push(&mut state, event, wakes);
        delivery
    }

    /// Whether the depth only counts what a blocked thread has received and is about to give.
    #[cold]
    fn is_about_to_have_room(&self, state: &State) -> bool {
        self.receiver.len() + usize::from(state.front.is_some()) < self.limit.load(Relaxed)
    }

    /// Adds an event to this queue alone, whatever the policy.
    ///
    /// # Errors
    /// `Full` without room, `Closed` after the close.
    pub fn put(&self, event: &Arc<Event>, wakes: &mut WakeBatch) -> Result<()> {
        let mut state = lock(&self.state);
        if state.sender.is_none() {
            return Err(Error::Closed);
        }
        if self.is_full() {
            return Err(Error::Full);
        }
        self.push(&mut state, event, wakes);
        Ok(())
    }

    fn push(&self, state: &mut State, event: &Arc<Event>, wakes: &mut WakeBatch) {
        let Some(sender) = &state.sender else { return };
        let was_empty = self.depth.fetch_add(1, Relaxed) == 0;
        if was_empty && state.blocked == 0 {
            state.front = Some(Arc::clone(event));
        } else {
            // This client holds a receiver, so the send cannot fail.
            let _ = sender.send(Arc::clone(event));
        }
        state.wake_one(wakes);
        state.announce(wakes);
    }

    /// From now on it is announced at `desk` when it has something.
    pub fn set_desk(&self, desk: Desk) {
        lock(&self.state).desk = Some(desk);
    }

    /// A reader that was told of it at its desk is done with it for now.
    pub fn rest(&self) {
        let mut wakes = WakeBatch::default();
        {
            let mut state = lock(&self.state);
            if let Some(desk) = &mut state.desk {
                desk.is_announced = false;
            }
            if !self.is_empty() {
                state.announce(&mut wakes);
            }
        }
        wakes.flush();
    }

    /// Registers it with a hub: what was missed first, which then is no overflow.
    pub(crate) fn enter(
        &self,
        hub: Weak<Hub>,
        memberships: SmallVec<[Membership; 1]>,
        owner: Attachment,
        replay: &[Arc<Event>],
    ) -> Result<()> {
        let mut state = lock(&self.state);
        if state.sender.is_none() || self.hub.set(hub).is_err() {
            return Err(Error::Closed);
        }
        state.memberships = memberships;
        state.owner = Some(owner);
        self.limit.fetch_add(replay.len(), Relaxed);
        if let Some(newest) = replay.last().and_then(|event| event.id) {
            // A client registers once.
            let _ = self.replayed.set(newest);
        }
        let mut nobody_waits_yet = WakeBatch::default();
        for event in replay {
            self.push(&mut state, event, &mut nobody_waits_yet);
        }
        Ok(())
    }

    /// Closes it and gives what the hub and the binding must let go of.
    pub(crate) fn leave(&self, wakes: &mut WakeBatch) -> (SmallVec<[Membership; 1]>, Leftover) {
        let mut state = lock(&self.state);
        state.close(wakes);
        let leftover = Leftover {
            _owner: state.owner.take(),
            _token: state.desk.take().map(|desk| desk.token),
            _slot: state.slot.take(),
        };
        (std::mem::take(&mut state.memberships), leftover)
    }

    /// Gives it its place among the streams of the process, until it leaves.
    pub fn set_slot(&self, slot: Arc<Slot>) {
        lock(&self.state).slot = Some(slot);
    }

    /// Its place among the streams of the process.
    pub fn slot(&self) -> Option<Arc<Slot>> {
        lock(&self.state).slot.clone()
    }

    /// The channels that it is registered with.
    pub fn channels(&self) -> SmallVec<[ChannelKey; 1]> {
        lock(&self.state).memberships.iter().map(|its| its.channel).collect()
    }

    /// Whether it is registered with a channel of `hub` that `is_it`.
    pub fn is_member(&self, hub: &Arc<Hub>, is_it: impl Fn(ChannelKey) -> bool) -> bool {
        let is_its = self.hub.get().is_some_and(|its| std::ptr::eq(its.as_ptr(), &raw const **hub));
        is_its && lock(&self.state).memberships.iter().any(|its| is_it(its.channel))
    }
}

impl Park for Client {
    fn park(&self, waiter: Waiter) -> Parked {
        let mut state = lock(&self.state);
        if !self.is_empty() || state.sender.is_none() {
            return Parked::Ready;
        }
        let arm = waiter.deadline.filter(|at| state.timer_at.is_none_or(|known| *at < known));
        if arm.is_some() {
            state.timer_at = arm;
        }
        state.waiters.push(waiter);
        Parked::Waiting { arm }
    }

    /// One that had been woken already passes its turn on, so that a cancelled reader never
    /// swallows the wake-up of the next.
    fn unpark(&self, token: Token, wakeups: &Arc<Wakeups>) {
        let mut wakes = WakeBatch::default();
        {
            let mut state = lock(&self.state);
            let mine = |w: &Waiter| w.token == token && Arc::ptr_eq(&w.wakeups, wakeups);
            if let Some(at) = state.waiters.iter().position(mine) {
                state.waiters.remove(at);
            } else if !self.is_empty() {
                state.wake_one(&mut wakes);
            }
        }
        wakes.flush();
    }

    fn disarm(&self) {
        lock(&self.state).timer_at = None;
    }
}

impl Timed for Client {
    fn is_due_at(&self, at: Instant) -> bool {
        lock(&self.state).timer_at == Some(at)
    }

    fn expire(&self, at: Instant, now: Instant, wakes: &mut WakeBatch) -> Option<Instant> {
        let mut state = lock(&self.state);
        if state.timer_at != Some(at) {
            // An earlier moment was scheduled since; that one looks after this client.
            return None;
        }
        let passed = |waiter: &Waiter| waiter.deadline.is_some_and(|deadline| deadline <= now);
        let mut kept = SmallVec::new();
        for waiter in std::mem::take(&mut state.waiters) {
            if passed(&waiter) {
                wakes.add(waiter);
            } else {
                kept.push(waiter);
            }
        }
        state.waiters = kept;
        state.timer_at = state.waiters.iter().filter_map(|waiter| waiter.deadline).min();
        state.timer_at
    }
}

impl State {
    /// Wakes the waiter that came first and whose loop still runs.
    fn wake_one(&mut self, wakes: &mut WakeBatch) {
        while !self.waiters.is_empty() {
            let waiter = self.waiters.remove(0);
            if !waiter.wakeups.is_closed() {
                wakes.add(waiter);
                return;
            }
        }
    }

    /// Puts its token on the desk, unless it is there or with a reader.
    fn announce(&mut self, wakes: &mut WakeBatch) {
        if let Some(desk) = self.desk.as_mut().filter(|desk| !desk.is_announced) {
            // Refused by readers that have ended: then nobody renders any more.
            desk.is_announced = desk.queue.put(&desk.token, wakes).is_ok();
        }
    }

    fn close(&mut self, wakes: &mut WakeBatch) {
        self.sender = None;
        for waiter in std::mem::take(&mut self.waiters) {
            wakes.add(waiter);
        }
    }
}

/// Takes what waits, oldest first, for as long as `enough` says no.
pub fn drain(client: &Client, mut enough: impl FnMut(&Event) -> bool) -> VecDeque<Arc<Event>> {
    let mut events = VecDeque::new();
    while let Taken::Event(event) = client.take() {
        let stop = enough(&event);
        events.push_back(event);
        if stop {
            break;
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Draft, Format};
    use crate::wake::Wakeups;
    use std::time::Duration;

    fn event(n: u64) -> Arc<Event> {
        let draft = Draft { body: None, format: Format::Text, has_message: true, decoded: None };
        Arc::new(Event::seal(draft, Some(EventId { ms: 0, n }), None))
    }

    fn offer(client: &Client, numbers: impl IntoIterator<Item = u64>) -> Vec<Delivery> {
        let (mut wakes, mut discarded) = (WakeBatch::default(), Vec::new());
        let deliver = |n| client.deliver(&event(n), &mut wakes, &mut discarded);
        let deliveries = numbers.into_iter().map(deliver).collect();
        wakes.flush();
        deliveries
    }

    fn read(client: &Client) -> Vec<u64> {
        drain(client, |_| false).iter().filter_map(|event| event.id).map(|id| id.n).collect()
    }

    #[test]
    fn each_overflow_policy_keeps_what_it_says_and_counts() {
        use Delivery::*;
        for (overflow, deliveries, kept, dropped) in [
            (Overflow::DropOldest, [Queued, Queued, DroppedOldest, DroppedOldest], [3, 4], 2),
            (Overflow::DropNewest, [Queued, Queued, DroppedNewest, DroppedNewest], [1, 2], 2),
            (Overflow::Disconnect, [Queued, Queued, Disconnected, Skipped], [1, 2], 1),
        ] {
            let client = Client::new(Kind::Queue, 2, overflow);
            assert_eq!(offer(&client, 1..=4), deliveries);
            assert_eq!(client.dropped(), dropped);
            assert_eq!(read(&client), kept);
            assert!(client.is_empty());
            let closed = matches!(client.take(), Taken::Closed);
            assert_eq!(closed, overflow == Overflow::Disconnect);
        }
    }

    #[test]
    fn a_waiter_is_woken_once_and_only_by_something() -> Result<()> {
        let client = Client::new(Kind::Queue, 9, Overflow::DropOldest);
        let wakeups = Arc::new(Wakeups::new()?);
        let waiter = |token| Waiter { wakeups: Arc::clone(&wakeups), token, deadline: None };
        for token in [1, 2] {
            assert_eq!(client.park(waiter(token)), Parked::Waiting { arm: None });
        }
        offer(&client, [1]);
        assert_eq!(wakeups.take(), [1]);
        assert_eq!(client.park(waiter(3)), Parked::Ready);
        // The first gives up although it was woken: the second has to look.
        client.unpark(1, &wakeups);
        assert_eq!(wakeups.take(), [2]);
        Ok(())
    }

    #[test]
    fn the_timer_keeps_one_entry_for_a_client_that_waits_again_and_again() -> Result<()> {
        let client = Client::new(Kind::Queue, 9, Overflow::DropOldest);
        let wakeups = Arc::new(Wakeups::new()?);
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let park = |token, at| {
            client.park(Waiter { wakeups: Arc::clone(&wakeups), token, deadline: Some(at) })
        };
        assert_eq!(park(1, second(10)), Parked::Waiting { arm: Some(second(10)) });
        offer(&client, [1]);
        assert_eq!((wakeups.take(), read(&client)), (vec![1], vec![1]));
        // A later deadline needs no entry of its own, an earlier one does.
        assert_eq!(park(2, second(15)), Parked::Waiting { arm: None });
        let mut wakes = WakeBatch::default();
        assert_eq!(client.expire(second(10), second(10), &mut wakes), Some(second(15)));
        assert_eq!(park(3, second(12)), Parked::Waiting { arm: Some(second(12)) });
        assert_eq!(client.expire(second(15), second(15), &mut wakes), None, "superseded");
        assert_eq!(client.expire(second(12), second(12), &mut wakes), Some(second(15)));
        wakes.flush();
        assert_eq!(wakeups.take(), [3]);
        // What could not be scheduled must be asked for again.
        client.disarm();
        assert_eq!(park(4, second(20)), Parked::Waiting { arm: Some(second(20)) });
        Ok(())
    }

    #[test]
    fn a_waiter_whose_loop_is_gone_swallows_no_wake_up() -> Result<()> {
        let client = Client::new(Kind::Queue, 9, Overflow::DropOldest);
        let (gone, alive) = (Arc::new(Wakeups::new()?), Arc::new(Wakeups::new()?));
        for wakeups in [&gone, &alive] {
            client.park(Waiter { wakeups: Arc::clone(wakeups), token: 1, deadline: None });
        }
        gone.close();
        offer(&client, [1]);
        assert_eq!((gone.take(), alive.take()), (vec![], vec![1]));
        Ok(())
    }

    #[test]
    fn a_close_ends_a_blocked_receive_after_what_is_left() {
        let client = Arc::new(Client::new(Kind::Queue, 9, Overflow::DropOldest));
        offer(&client, [1]);
        let reader = {
            let client = Arc::clone(&client);
            std::thread::spawn(move || {
                let mut count = 0;
                while let Taken::Event(_) = client.take_blocking(None) {
                    count += 1;
                }
                count
            })
        };
        client.leave(&mut WakeBatch::default());
        assert_eq!(reader.join().ok(), Some(1));
        assert_eq!(offer(&client, [2]), [Delivery::Skipped]);
    }
}
