//! The engine: one task per process that gives Redis what waits, brings to the hub what comes, and
//! finds back after a loss.
//!
//! All goes over one connection, whose answers and messages come in the order of Redis's doing.
//! So when an answer is looked at, everything that happened before it is in the hub already.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, FuturesUnordered, StreamExt, TryStreamExt};
use redis::{PushInfo, PushKind, Value};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::time::{sleep, sleep_until};

use crate::bus::redis::connection::{Call, Line, Link};
use crate::bus::redis::entry::{self, Entry};
use crate::bus::redis::lookup::Lookup;
use crate::bus::redis::script::Producer;
use crate::bus::redis::target::Keys;
use crate::bus::redis::trouble::Trouble;
use crate::bus::redis::{Prepare, Shared, Waiting};
use crate::control;
use crate::error::Error;
use crate::event_id::{EventId, now_ms};
use crate::hub::Arrival;
use crate::sync::lock;
use crate::wake::WakeBatch;

/// Publications that Redis is given before it has answered the first of them. What waits behind
/// them can still be withdrawn.
const MOST_UNDER_WAY: usize = 512;
/// And their bytes, unless it is one.
const MOST_BYTES_UNDER_WAY: usize = 8 << 20;

/// A channel without clients is looked at after so long, and is let go of at the second look.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A publisher's answer waits so long for the delivery in its own process.
const DELIVERY: Duration = Duration::from_secs(1);

/// Between two attempts to connect: the first and the longest wait.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Others are back after a loss of Redis within so long, or count as gone.
const GATHERING: Duration = Duration::from_secs(5);

/// Streams that are read back at the same time: Redis ends a subscriber's connection that has
/// too much to fetch.
const READERS: usize = 4;

/// Messages that are delivered in one go.
const BURST: usize = 256;

const BEGINNING: EventId = EventId { ms: 0, n: 0 };

/// The state of the task; it holds no lock while it waits.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    producer: Producer,
    /// The last sequence number given to a publication.
    sequence: u64,
    /// What Redis was given, in that order: after a loss it is given again.
    under_way: VecDeque<Sent>,
    under_way_bytes: usize,
    /// Ordered and stored, and not delivered in this process yet.
    held: VecDeque<Held>,
    /// Channels that are subscribed to, by the name that their events are announced on.
    tuned: HashMap<Vec<u8>, Tuned>,
    /// Prepares, by the channel that they wait for now.
    preparing: HashMap<Arc<str>, Vec<Prepare>>,
    /// Channels whose stream is being read back.
    reading: HashSet<Arc<str>>,
    readers: Arc<Semaphore>,
    /// Prepares that wait for the server's time.
    asking: Vec<Prepare>,
    /// Channels that had no client at the last look.
    idle: HashSet<Arc<str>>,
    look_at: Option<Instant>,
    /// Random numbers for pauses.
    random: RandomState,
}

#[derive(Debug)]
struct Sent {
    sequence: u64,
    weight: usize,
    waiting: Waiting,
}

#[derive(Debug)]
struct Held {
    channel: Arc<str>,
    id: EventId,
    until: Instant,
    waiting: Waiting,
}

#[derive(Debug)]
struct Tuned {
    name: Arc<str>,
    hearing: Hearing,
}

#[derive(Debug)]
enum Hearing {
    /// Where the channel is, is not known yet: what came meanwhile.
    Soon(Vec<Entry>),
    /// Everything up to that id was delivered, or is told to be lost.
    From(EventId),
}

/// Something that was asked of Redis beside publishing.
enum Job {
    Tune(Arc<str>, Result<EventId, Trouble>),
    ReadBack(Arc<str>, Result<(Option<EventId>, Vec<Entry>), Trouble>),
    /// With how many had asked when it was sent.
    Time(usize, Result<EventId, Trouble>),
    Detune(Result<(), Trouble>),
}

/// What the engine waits for beside pushes.
enum Event {
    Reply(Result<Value, Trouble>),
    Job(Job),
    Deadline,
}

type Jobs = FuturesUnordered<BoxFuture<'static, Job>>;

/// What is to be brought to the hub, in order.
enum Step {
    Lost { name: Arc<str>, until: EventId },
    Event(Arrival),
}

impl Step {
    fn channel(&self) -> &Arc<str> {
        match self {
            Step::Lost { name, .. } => name,
            Step::Event(arrival) => &arrival.channel,
        }
    }
}

impl Engine {
    /// The engine of a bus that begins.
    pub fn new(shared: Arc<Shared>) -> Engine {
        let random = RandomState::new();
        // The time and the process id beside it: forks can have the same random numbers.
        let mut producer = random.build_hasher();
        producer.write_u32(std::process::id());
        producer.write_u64(now_ms());
        Engine {
            shared,
            producer: Producer(format!("p:{:016x}", producer.finish())),
            sequence: 0,
            under_way: VecDeque::new(),
            under_way_bytes: 0,
            held: VecDeque::new(),
            tuned: HashMap::new(),
            preparing: HashMap::new(),
            reading: HashSet::new(),
            readers: Arc::new(Semaphore::new(READERS)),
            asking: Vec::new(),
            idle: HashSet::new(),
            look_at: None,
            random,
        }
    }

    /// Serves until the task is aborted.
    pub async fn run(mut self) {
        let mut pause = SHORTEST_PAUSE;
        let mut was_connected = false;
        let mut lookup = Lookup::default();
        loop {
            let opened = Link::open(&self.shared.target, &mut lookup).await;
            let began = Instant::now();
            let trouble = match opened {
                Ok(mut link) => match self.catch_up(&mut link).await {
                    Ok(()) => {
                        self.note_connected(was_connected);
                        was_connected = true;
                        self.serve(&mut link).await
                    }
                    Err(trouble) => trouble,
                },
                Err(trouble) => trouble,
            };
            // One that held for longer than the pause before it was worth an attempt at once: a
            // server that accepts and ends connections is still left alone half of the time.
            if began.elapsed() > pause {
                pause = SHORTEST_PAUSE;
            }
            self.note_lost(&trouble);
            self.release_held(true);
            self.shared.under_way.store(self.under_way.len(), Relaxed);
            if let Trouble::Refused(text) | Trouble::Demoted(text) = &trouble {
                self.refuse_all(text);
            }
            lock(&self.shared.inbox).sweep();
            // Between half of it and all of it: not all processes at once.
            let jitter = 0.5 + (self.random.hash_one(began) % 1000) as f64 / 2000.0;
            sleep(pause.mul_f64(jitter)).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn note_connected(&self, again: bool) {
        let mut status = lock(&self.shared.status);
        status.connected = true;
        self.shared.hub.host().note_connected(true);
        status.since = Instant::now();
        status.problem.clear();
        status.reconnects += u64::from(again);
    }

    fn note_lost(&self, trouble: &Trouble) {
        let mut status = lock(&self.shared.status);
        self.shared.hub.host().note_connected(false);
        if status.connected {
            status.connected = false;
            status.since = Instant::now();
        }
        trouble.text().clone_into(&mut status.problem);
    }

    fn keys(&self, name: &str) -> Keys {
        let target = &self.shared.target;
        Keys::new(&target.prefix, target.db, name)
    }

    /// Hears all channels again and brings what they missed, in the order of the ids.
    async fn catch_up(&mut self, link: &mut Link) -> Result<(), Trouble> {
        // What was begun and not finished begins anew.
        self.tuned.retain(|_, tuned| matches!(tuned.hearing, Hearing::From(_)));
        self.reading.clear();
        let heard: Vec<(Vec<u8>, Arc<str>, EventId)> = self
            .tuned
            .iter()
            .filter_map(|(key, tuned)| match tuned.hearing {
                Hearing::From(newest) => Some((key.clone(), Arc::clone(&tuned.name), newest)),
                Hearing::Soon(_) => None,
            })
            .collect();
        let mut missed: Vec<(EventId, Step)> = Vec::new();
        let mut positions = Vec::new();
        let limits = self.shared.limits;
        let line = &link.line;
        let looks: FuturesOrdered<_> = heard
            .iter()
            .map(|(_, name, newest)| {
                let keys = self.keys(name);
                async move {
                    line.subscribe(&keys).await?;
                    line.look(&keys, *newest, limits).await
                }
            })
            .collect();
        let now_at: Vec<EventId> = looks.try_collect().await?;
        // The control channel last: what was told before anything that is read of others is read.
        let is_control = |name: &Arc<str>| **name == *control::CHANNEL;
        let mut looked: Vec<_> = heard.iter().zip(now_at).collect();
        looked.sort_by_key(|((_, name, _), _)| is_control(name));
        for ((key, name, newest), last) in looked {
            if last <= *newest {
                continue;
            }
            let (_, entries) = line.read(&self.keys(name), *newest).await?;
            let mut at = *newest;
            for entry in entries {
                at = step_over(name, at, entry, |id, step| missed.push((id, step)));
            }
            if at < last {
                let name = Arc::clone(name);
                missed.push((last, Step::Lost { name, until: last }));
                at = last;
            }
            positions.push((key, at));
        }
        // All is read: from here on nothing can fail and leave a channel ahead of its clients.
        for (key, at) in positions {
            if let Some(tuned) = self.tuned.get_mut(key) {
                tuned.hearing = Hearing::From(at);
            }
        }
        // And done first: where a clock was set back, its ids may be later than those of what
        // followed.
        missed.sort_by_key(|(id, step)| (!is_control(step.channel()), *id));
        self.take(missed.into_iter().map(|(_, step)| step).collect());
        Ok(())
    }

    /// Brings steps to the hub.
    fn take(&self, steps: Vec<Step>) {
        let hub = &self.shared.hub;
        let mut newest = None;
        let mut arrivals = Vec::new();
        for step in steps {
            match step {
                Step::Event(arrival) => {
                    newest = Some(arrival.id);
                    arrivals.push(arrival);
                }
                Step::Lost { name, until } => {
                    hub.deliver(std::mem::take(&mut arrivals));
                    hub.mark_gap(&name, until);
                }
            }
        }
        hub.deliver(arrivals);
        if let Some(newest) = newest {
            let lag = now_ms().saturating_sub(newest.ms);
            lock(&self.shared.status).lag = lag as f64 / 1000.0;
            self.shared.hub.host().note_lag(lag);
        }
    }

    /// Serves a connection until it is of no use any more.
    async fn serve(&mut self, link: &mut Link) -> Trouble {
        let mut jobs = Jobs::new();
        let mut replies = FuturesOrdered::new();
        let mut demoted = None;
        for sent in &self.under_way {
            replies.push_back(self.give(&link.line, sent));
        }
        let preparing = self.preparing.drain().flat_map(|(_, prepares)| prepares);
        let unfinished: Vec<Prepare> = preparing.chain(self.asking.drain(..)).collect();
        for prepare in unfinished {
            if !prepare.answering.is_withdrawn() {
                self.advance(prepare, &link.line, &mut jobs);
            }
        }
        loop {
            if demoted.is_none() {
                while let Some(sent) = self.next_publication() {
                    replies.push_back(self.give(&link.line, &sent));
                    self.under_way_bytes += sent.weight;
                    self.under_way.push_back(sent);
                }
            }
            self.shared.under_way.store(self.under_way.len(), Relaxed);
            self.take_in_the_rest(&link.line, &mut jobs);
            let deadline = [self.look_at, self.held.front().map(|held| held.until)];
            let deadline = deadline.into_iter().flatten().min();
            let deadline = async {
                match deadline {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let mut first = None;
            let mut event = None;
            tokio::select! {
                biased;
                push = link.pushes.recv() => first = Some(push.ok_or_else(ended)),
                Some(reply) = replies.next(), if !replies.is_empty() => {
                    event = Some(Event::Reply(reply));
                }
                Some(job) = jobs.next(), if !jobs.is_empty() => event = Some(Event::Job(job)),
                () = self.shared.work.notified() => {}
                () = deadline => event = Some(Event::Deadline),
            };
            // Before an answer: what Redis did before it.
            let done = match self.hear(first, link).await {
                Err(trouble) => Err(trouble),
                Ok(()) => match event {
                    Some(Event::Reply(reply)) => self.conclude(reply),
                    Some(Event::Job(job)) => self.finish(job, link, &mut jobs).await,
                    Some(Event::Deadline) => {
                        self.look_for_idle(&link.line, &mut jobs);
                        Ok(())
                    }
                    None => Ok(()),
                },
            };
            match done {
                Ok(()) => {}
                Err(Trouble::Demoted(text)) => demoted = Some(text),
                Err(trouble) => return trouble,
            }
            self.release_held(false);
            if let Some(text) = demoted.as_ref().filter(|_| self.under_way.is_empty()) {
                // Its name may lead to the primary by now.
                return Trouble::Lost(text.clone());
            }
        }
    }

    /// Takes what waits, up to what may be under way at once.
    fn next_publication(&mut self) -> Option<Sent> {
        loop {
            let is_full = self.under_way.len() >= MOST_UNDER_WAY
                || self.under_way_bytes >= MOST_BYTES_UNDER_WAY;
            if is_full {
                return None;
            }
            let waiting = lock(&self.shared.inbox).pop()?;
            if waiting.answering.claim() {
                self.sequence += 1;
                let weight = waiting.weight();
                return Some(Sent { sequence: self.sequence, weight, waiting });
            }
        }
    }

    fn give(&self, line: &Line, sent: &Sent) -> Call<Value> {
        let publication = &sent.waiting.publication;
        let keys = self.keys(&publication.channel);
        let limits = self.shared.limits;
        let call = line.scripts.publish(&keys, &self.producer, sent.sequence, publication, limits);
        line.call(call)
    }

    /// The answer to the oldest publication under way.
    fn conclude(&mut self, reply: Result<Value, Trouble>) -> Result<(), Trouble> {
        if let Err(Trouble::Lost(text)) = reply {
            return Err(Trouble::Lost(text));
        }
        let Some(sent) = self.under_way.pop_front() else { return Ok(()) };
        self.under_way_bytes = self.under_way_bytes.saturating_sub(sent.weight);
        let waiting = sent.waiting;
        let refused = match reply {
            Ok(value) => match entry::published(&value) {
                Some((id, heard)) => {
                    let heard_by = waiting.publication.heard_by.as_ref();
                    let heard = heard.filter(|_| !self.is_back_lately());
                    // Once, whatever was given up before.
                    let _ = heard_by.zip(heard).map(|(known, heard)| known.set(heard));
                    self.shared.hub.observe(id);
                    let channel = Arc::clone(&waiting.publication.channel);
                    let until = Instant::now() + DELIVERY;
                    self.held.push_back(Held { channel, id, until, waiting });
                    return Ok(());
                }
                None => Trouble::Refused("its answer is no id".to_owned()),
            },
            Err(trouble) => trouble,
        };
        let mut wakes = WakeBatch::default();
        waiting.answering.answer(Err(self.refusal(refused.text())), &mut wakes);
        wakes.flush();
        match refused {
            Trouble::Demoted(text) => Err(Trouble::Demoted(text)),
            Trouble::Refused(_) | Trouble::Lost(_) => Ok(()),
        }
    }

    /// Whether the server may have been away a moment ago: others are not all back yet.
    fn is_back_lately(&self) -> bool {
        let status = lock(&self.shared.status);
        status.reconnects > 0 && status.since.elapsed() < GATHERING
    }

    fn refusal(&self, text: &str) -> Error {
        Error::Bus(format!("Redis at {} refuses: {text}", self.shared.target.place()))
    }

    /// Answers publishers whose event was delivered here, or is not wanted here.
    fn release_held(&mut self, all: bool) {
        let mut wakes = WakeBatch::default();
        while let Some(held) = self.held.front() {
            let tuned = self.tuned.get(self.keys(&held.channel).announced.as_bytes());
            let is_to_come = match tuned.map(|tuned| &tuned.hearing) {
                Some(Hearing::From(newest)) => *newest < held.id,
                Some(Hearing::Soon(_)) | None => false,
            };
            if is_to_come && !all && Instant::now() < held.until {
                break;
            }
            if let Some(Held { id, waiting, .. }) = self.held.pop_front() {
                waiting.answering.answer(Ok(id), &mut wakes);
            }
        }
        wakes.flush();
    }

    /// Answers all that wait with an error that will not pass by itself.
    fn refuse_all(&mut self, text: &str) {
        let (publications, prepares) = {
            let mut inbox = lock(&self.shared.inbox);
            inbox.bytes = 0;
            (std::mem::take(&mut inbox.publications), std::mem::take(&mut inbox.prepares))
        };
        let under_way = self.under_way.drain(..).map(|sent| sent.waiting);
        let publications = under_way.chain(publications).map(|waiting| waiting.answering);
        let preparing = self.preparing.drain().flat_map(|(_, prepares)| prepares);
        let prepares = preparing.chain(self.asking.drain(..)).chain(prepares);
        let refused: Vec<_> =
            publications.chain(prepares.map(|prepare| prepare.answering)).collect();
        self.under_way_bytes = 0;
        let mut wakes = WakeBatch::default();
        for answering in refused {
            answering.answer(Err(self.refusal(text)), &mut wakes);
        }
        wakes.flush();
    }

    /// Brings to the hub what was pushed: `first`, and all that is there already.
    async fn hear(
        &mut self,
        first: Option<Result<PushInfo, Trouble>>,
        link: &mut Link,
    ) -> Result<(), Trouble> {
        let mut steps = Vec::new();
        let mut next = first;
        loop {
            let push = match next.take() {
                Some(push) => push,
                None => match link.pushes.try_recv() {
                    Ok(push) => Ok(push),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => Err(ended()),
                },
            };
            let push = match push {
                Ok(push) if push.kind != PushKind::Disconnection => push,
                Ok(_) | Err(_) => {
                    self.take(steps);
                    return Err(ended());
                }
            };
            if let Some((key, entry)) = message(&push) {
                self.place(key, entry, &mut steps, &link.line).await?;
            }
            if steps.len() >= BURST {
                self.take(std::mem::take(&mut steps));
            }
        }
        self.take(steps);
        Ok(())
    }

    /// Finds the place of an entry that came live; what is missing before it is read.
    async fn place(
        &mut self,
        key: &[u8],
        entry: Entry,
        steps: &mut Vec<Step>,
        line: &Line,
    ) -> Result<(), Trouble> {
        let Some(tuned) = self.tuned.get_mut(key) else { return Ok(()) };
        let name = Arc::clone(&tuned.name);
        let mut at = match &mut tuned.hearing {
            Hearing::Soon(early) => {
                early.push(entry);
                return Ok(());
            }
            Hearing::From(newest) => *newest,
        };
        if entry.prev > at && entry.id > at {
            // What is known goes first: the reading may fail.
            self.take(std::mem::take(steps));
            let (_, missed) = line.read(&self.keys(&name), at).await?;
            // No further: what was told on other channels before what follows is still to come.
            for entry in missed.into_iter().filter(|missed| missed.id <= entry.id) {
                at = step_over(&name, at, entry, |_, step| steps.push(step));
            }
        }
        at = step_over(&name, at, entry, |_, step| steps.push(step));
        if let Some(tuned) = self.tuned.get_mut(key) {
            tuned.hearing = Hearing::From(at);
        }
        Ok(())
    }

    /// Takes what is in the inbox beside publications.
    fn take_in_the_rest(&mut self, line: &Line, jobs: &mut Jobs) {
        let (prepares, left) = {
            let mut inbox = lock(&self.shared.inbox);
            (std::mem::take(&mut inbox.prepares), std::mem::take(&mut inbox.left))
        };
        if left {
            self.look_soon();
        }
        for prepare in prepares {
            self.advance(prepare, line, jobs);
        }
    }

    /// Does the next thing for a client that is to register, or answers that all is done.
    fn advance(&mut self, prepare: Prepare, line: &Line, jobs: &mut Jobs) {
        let lack = self.shared.hub.lack(&prepare.channels, prepare.resume);
        for name in &lack.unheard {
            self.tune(name, line, jobs);
        }
        for name in lack.unread.iter().filter(|name| !lack.unheard.contains(name)) {
            self.read_back(name, line, jobs);
        }
        if let Some(name) = lack.unheard.into_iter().chain(lack.unread).next() {
            self.preparing.entry(name).or_default().push(prepare);
        } else if lack.is_behind && !prepare.asked {
            self.asking.push(prepare);
            if self.asking.len() == 1 {
                self.ask(line, jobs);
            }
        } else {
            let mut wakes = WakeBatch::default();
            prepare.answering.answer(Ok(self.shared.hub.newest()), &mut wakes);
            wakes.flush();
        }
    }

    fn tune(&mut self, name: &Arc<str>, line: &Line, jobs: &mut Jobs) {
        let keys = self.keys(name);
        let key = keys.announced.clone().into_bytes();
        if self.tuned.contains_key(&key) {
            return;
        }
        let hearing = Hearing::Soon(Vec::new());
        self.tuned.insert(key, Tuned { name: Arc::clone(name), hearing });
        let (name, line, limits) = (Arc::clone(name), line.clone(), self.shared.limits);
        // Now: behind what ended it the last time.
        let subscribed = line.subscribe(&keys);
        jobs.push(Box::pin(async move {
            let position = match subscribed.await {
                Ok(()) => line.look(&keys, BEGINNING, limits).await,
                Err(trouble) => Err(trouble),
            };
            Job::Tune(name, position)
        }));
    }

    fn read_back(&mut self, name: &Arc<str>, line: &Line, jobs: &mut Jobs) {
        if !self.reading.insert(Arc::clone(name)) {
            return;
        }
        let (keys, name, line) = (self.keys(name), Arc::clone(name), line.clone());
        let readers = Arc::clone(&self.readers);
        jobs.push(Box::pin(async move {
            // Never closed: there is a turn for everyone.
            let _turn = readers.acquire().await;
            let read = line.read(&keys, BEGINNING).await;
            Job::ReadBack(name, read)
        }));
    }

    fn ask(&self, line: &Line, jobs: &mut Jobs) {
        let (line, count) = (line.clone(), self.asking.len());
        jobs.push(Box::pin(async move { Job::Time(count, line.time().await) }));
    }

    /// Goes on after the answer to a job.
    async fn finish(&mut self, job: Job, link: &Link, jobs: &mut Jobs) -> Result<(), Trouble> {
        let line = &link.line;
        match job {
            Job::Tune(name, Ok(position)) => {
                self.shared.hub.hear(&name, position);
                self.look_soon();
                let key = self.keys(&name).announced.into_bytes();
                let hearing = Hearing::From(position);
                let tuned = Tuned { name: Arc::clone(&name), hearing };
                let before = self.tuned.insert(key.clone(), tuned);
                if let Some(Tuned { hearing: Hearing::Soon(early), .. }) = before {
                    let mut steps = Vec::new();
                    for entry in early {
                        self.place(&key, entry, &mut steps, line).await?;
                    }
                    self.take(steps);
                }
                self.go_on(&name, line, jobs);
                Ok(())
            }
            Job::ReadBack(name, Ok((last, entries))) => {
                self.reading.remove(&name);
                self.give_back(&name, last, entries);
                self.go_on(&name, line, jobs);
                Ok(())
            }
            Job::Time(count, Ok(time)) => {
                // Everything that happened before is in the hub.
                self.shared.hub.observe(time);
                let later = self.asking.split_off(count.min(self.asking.len()));
                for mut prepare in std::mem::replace(&mut self.asking, later) {
                    prepare.asked = true;
                    self.advance(prepare, line, jobs);
                }
                if !self.asking.is_empty() {
                    self.ask(line, jobs);
                }
                Ok(())
            }
            Job::Detune(Ok(()) | Err(Trouble::Refused(_))) => Ok(()),
            Job::Tune(name, Err(trouble)) => {
                let keys = self.keys(&name);
                self.tuned.remove(keys.announced.as_bytes());
                self.detune(keys, line, jobs);
                self.refuse(&name, trouble)
            }
            Job::ReadBack(name, Err(trouble)) => {
                self.reading.remove(&name);
                self.refuse(&name, trouble)
            }
            Job::Time(_, Err(trouble)) | Job::Detune(Err(trouble)) => Err(trouble),
        }
    }

    /// What the store has of a channel, for those who come back from long ago.
    fn give_back(&self, name: &Arc<str>, last: Option<EventId>, entries: Vec<Entry>) {
        let hub = &self.shared.hub;
        let first = entries.first().map(|entry| entry.prev);
        let Some(mut floor) = first.or(last).or_else(|| hub.newest_of(name)) else { return };
        let mut at = floor;
        let mut arrivals = Vec::new();
        for entry in entries {
            if entry.prev > at {
                // Trimmed while it was read.
                arrivals.clear();
                floor = entry.prev;
            }
            at = entry.id;
            arrivals.push(arrival(name, entry));
        }
        hub.read_back(name, floor, arrivals);
    }

    /// Goes on for those who waited for a channel.
    fn go_on(&mut self, name: &str, line: &Line, jobs: &mut Jobs) {
        for prepare in self.preparing.remove(name).unwrap_or_default() {
            self.advance(prepare, line, jobs);
        }
    }

    /// Answers those who waited for a channel that they cannot have; gives back what ends the
    /// connection.
    fn refuse(&mut self, name: &str, trouble: Trouble) -> Result<(), Trouble> {
        if let Trouble::Lost(text) = trouble {
            return Err(Trouble::Lost(text));
        }
        let mut wakes = WakeBatch::default();
        for prepare in self.preparing.remove(name).unwrap_or_default() {
            prepare.answering.answer(Err(self.refusal(trouble.text())), &mut wakes);
        }
        wakes.flush();
        match trouble {
            Trouble::Demoted(text) => Err(Trouble::Demoted(text)),
            Trouble::Refused(_) | Trouble::Lost(_) => Ok(()),
        }
    }

    fn look_soon(&mut self) {
        self.look_at.get_or_insert_with(|| Instant::now() + LOOK_EVERY);
    }

    /// Lets go of channels that have had no client for two looks.
    fn look_for_idle(&mut self, line: &Line, jobs: &mut Jobs) {
        if self.look_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.look_at = None;
        let mut idle = HashSet::new();
        for (name, _) in self.shared.hub.heard().into_iter().filter(|(_, clients)| *clients == 0) {
            if self.idle.contains(&name) && self.shared.hub.retire(&name) {
                let keys = self.keys(&name);
                self.tuned.remove(keys.announced.as_bytes());
                self.detune(keys, line, jobs);
            } else {
                idle.insert(name);
            }
        }
        if !idle.is_empty() {
            self.look_soon();
        }
        self.idle = idle;
    }

    fn detune(&self, keys: Keys, line: &Line, jobs: &mut Jobs) {
        let unsubscribed = line.unsubscribe(&keys);
        jobs.push(Box::pin(async move { Job::Detune(unsubscribed.await) }));
    }
}

/// Puts an entry after `at`, with what is lost between, unless it was there before. Gives where
/// the channel is then.
fn step_over(
    name: &Arc<str>,
    at: EventId,
    entry: Entry,
    mut put: impl FnMut(EventId, Step),
) -> EventId {
    if entry.id <= at {
        return at;
    }
    if entry.prev > at {
        put(entry.prev, Step::Lost { name: Arc::clone(name), until: entry.prev });
    }
    let id = entry.id;
    put(id, Step::Event(arrival(name, entry)));
    id
}

fn arrival(name: &Arc<str>, entry: Entry) -> Arrival {
    let Entry { id, body, format, .. } = entry;
    Arrival { channel: Arc::clone(name), id, body, format }
}

/// The channel and the event of a push that is a message of ours.
fn message(push: &PushInfo) -> Option<(&[u8], Entry)> {
    if !matches!(push.kind, PushKind::Message | PushKind::SMessage) {
        return None;
    }
    let [channel, payload] = push.data.as_slice() else { return None };
    Some((entry::bytes(channel)?, Entry::from_message(entry::bytes(payload)?)?))
}

fn ended() -> Trouble {
    Trouble::Lost("the connection ended".to_owned())
}
