//! `local://`: every process of one user and project on this host, and no server.
//!
//! A publisher writes to the store under the file lock, then rings the bells of the processes that
//! have clients; each of them reads what it has not read yet. The publisher's own process is given
//! the event before `publish` returns.
//!
//! Locks are taken in this order: file, reader, writer. So who waits for another process holds
//! nothing that a thread of this one needs, and who holds reader or writer does local work only.
//! No lock is held while anybody is woken.

pub mod directory;
mod doorbell;
mod file_lock;
mod store;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::bus::{Attempt, Bus, BusFigures, Doorbell, Publication};
use crate::error::{Error, Result};
use crate::event_id::{EventId, now_ms};
use crate::history::Limits;
use crate::hub::{Arrival, ChannelKey, Hub, Lack, Resume};
use crate::sync::{Condvar, Mutex, MutexGuard, lock};
use crate::ticket::Answering;
use crate::wake::WakeBatch;

use doorbell::{Bell, Ring, Ringer, Rung};
use file_lock::{FileLock, Locked};
use store::{Position, Read, Store, Written};

/// Events that one transaction takes at the most.
const LARGEST_BATCH: usize = 1000;

/// Events that one look into the store takes.
const READ_AHEAD: usize = 500;

/// Publications that may wait for the writer's thread.
const MOST_WAITING: usize = 100_000;

/// Of a transaction with more events, a ring says only that there is something to read.
const MOST_RINGS: usize = 4;

/// Every so many transactions a publisher looks at all files of the store. One whose log alone was
/// deleted is noticed by processes with clients at once.
const LOOK_CLOSELY_EVERY: u32 = 16;

/// How long a process without clients stays ready for the next.
const LINGER: Duration = Duration::from_secs(5);

/// How long a channel without clients stays in memory while others have some.
const UNUSED: Duration = Duration::from_secs(60);

/// How long a thread that watches the bell beside its own thread may take to deliver.
const HEAD_START: Duration = Duration::from_millis(1);

/// After so long a failure to read is tried again, then after twice as long, up to the longest.
const SHORTEST_PATIENCE: Duration = Duration::from_millis(20);
const LONGEST_PATIENCE: Duration = Duration::from_secs(2);

/// The longest wait for a fork that is under way.
const LONGEST_FORK: Duration = Duration::from_secs(10);

/// The bus of one host.
#[derive(Debug)]
pub struct LocalBus {
    myself: Weak<LocalBus>,
    hub: Arc<Hub>,
    url: String,
    path: PathBuf,
    limits: Limits,
    /// What queues the writers of all processes. Held to copy it; opened at first use.
    file_lock: Mutex<Option<Arc<FileLock>>>,
    /// What writes, under the file lock. Held for a transaction.
    writer: Mutex<Option<Writer>>,
    /// What delivers: who holds it may read and deliver, so that deliveries keep the order and
    /// registration meets none.
    reader: Mutex<Reader>,
    /// The way to the writer's thread, begun at first use.
    jobs: Mutex<Option<Sender<Job>>>,
    waiting: AtomicUsize,
    /// Forks that are under way: meanwhile nothing is opened.
    forking: Mutex<usize>,
    forked: Condvar,
    lag_ms: AtomicU64,
    recoveries: AtomicU64,
}

#[derive(Debug)]
struct Writer {
    store: Store,
    ringer: Ringer,
    dead_bells: Vec<String>,
    /// How often the files were looked at.
    looks: u32,
}

#[derive(Debug, Default)]
struct Reader {
    store: Option<Store>,
    /// Everything up to here was delivered.
    position: Position,
    /// Rung by publishers, as long as there are clients.
    bell: Option<Arc<Bell>>,
    /// Whether the store was found to be damaged.
    is_broken: bool,
}

impl Reader {
    /// Has the bell's own thread look into the store, and mend what is wrong.
    fn call_for_mending(&self) {
        if let Some(bell) = &self.bell {
            bell.call_for_mending();
        }
    }
}

#[derive(Debug)]
enum Job {
    Publish(Box<Publication>, Answering),
    Prepare(Vec<ChannelKey>, Resume, Answering),
}

/// What the writer needs to begin; `None` when it has to be waited for.
type Begun<'a> = Option<MutexGuard<'a, Option<Writer>>>;

/// Why nothing was written, though nothing failed for good.
#[derive(Debug)]
enum NotWritten {
    /// The file that was opened is not the one that others find, or it is damaged.
    Lost,
    /// Another program holds a transaction open.
    Busy,
}

impl LocalBus {
    /// The bus whose store lies in `path`, or where all processes of `project` look for it.
    /// Touches nothing yet.
    pub fn new(hub: Arc<Hub>, path: Option<&Path>, project: &str, limits: Limits) -> Arc<LocalBus> {
        let url = path.map_or("local://".to_owned(), |path| format!("local://{}", path.display()));
        let path = path.map_or_else(|| directory::default_path(project), Path::to_owned);
        Arc::new_cyclic(|myself| LocalBus {
            myself: Weak::clone(myself),
            hub,
            url,
            path,
            limits,
            writer: Mutex::default(),
            file_lock: Mutex::default(),
            reader: Mutex::default(),
            jobs: Mutex::default(),
            waiting: AtomicUsize::new(0),
            forking: Mutex::new(0),
            forked: Condvar::new(),
            lag_ms: AtomicU64::new(0),
            recoveries: AtomicU64::new(0),
        })
    }

    /// The newest id that this process knows of: none is handed out before it.
    fn known(&self) -> Position {
        self.hub.newest().into()
    }

    fn note_lag(&self, newest: EventId) {
        let lag = now_ms().saturating_sub(newest.ms);
        self.lag_ms.store(lag, Relaxed);
        self.hub.host().note_lag(lag);
    }

    fn wait_for_fork(&self) {
        let forking = lock(&self.forking);
        let _done = self
            .forked
            .wait_timeout_while(forking, LONGEST_FORK, |forking| *forking > 0)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// What queues the writers. Another one if the others queue at another file.
    fn file_lock(&self) -> Result<Arc<FileLock>> {
        let mut file_lock = lock(&self.file_lock);
        match file_lock.as_ref() {
            Some(current) if current.is_current() => Ok(Arc::clone(current)),
            _ => {
                directory::prepare(&self.path)?;
                let opened = Arc::new(FileLock::open(&self.path)?);
                *file_lock = Some(Arc::clone(&opened));
                Ok(opened)
            }
        }
    }

    /// Opens what writes, if it is not open.
    fn open_writer<'a>(
        &self,
        writer: &'a mut Option<Writer>,
        _locked: &Locked<'_>,
    ) -> Result<&'a mut Writer> {
        if writer.is_none() {
            self.wait_for_fork();
            let opened = self.new_writer();
            self.hub.host().note_connected(opened.is_ok());
            *writer = Some(opened?);
        }
        writer.as_mut().ok_or_else(|| Error::Bus("the store was closed".to_owned()))
    }

    fn new_writer(&self) -> Result<Writer> {
        directory::prepare(&self.path)?;
        let now = Position::at(now_ms()).max(self.known());
        let store = Store::open(&self.path, now, directory::store_limit(&self.path))?;
        let ringer = Ringer::new(&self.path)?;
        Ok(Writer { store, ringer, dead_bells: Vec::new(), looks: 0 })
    }

    /// Stores publications in one transaction.
    fn write<'a>(
        &self,
        writer: &mut Writer,
        _locked: &Locked<'_>,
        publications: impl IntoIterator<Item = &'a Publication> + Clone,
        waits: bool,
    ) -> Result<std::result::Result<Written, NotWritten>> {
        writer.looks = writer.looks.wrapping_add(1);
        let is_there = if writer.looks % LOOK_CLOSELY_EVERY == 1 {
            writer.store.is_current()
        } else {
            writer.store.is_there()
        };
        if !is_there {
            return Ok(Err(NotWritten::Lost));
        }
        let dead = std::mem::take(&mut writer.dead_bells);
        let known = self.known();
        let write = |store: &mut Store| {
            let now = Position::at(now_ms());
            store.write(publications.clone(), known, now, self.limits, &dead, waits)
        };
        let mut written = write(&mut writer.store);
        if written.as_ref().is_err_and(store::is_full) && writer.store.make_room().is_ok() {
            written = write(&mut writer.store);
        }
        match written {
            Ok(written) => {
                self.hub.host().note_connected(true);
                Ok(Ok(written))
            }
            Err(error) => {
                self.hub.host().note_connected(store::is_busy(&error));
                writer.dead_bells = dead;
                if store::is_broken(&error) {
                    writer.store.put_aside()?;
                    return Ok(Err(NotWritten::Lost));
                }
                if store::is_busy(&error) && !waits {
                    return Ok(Err(NotWritten::Busy));
                }
                Err(writer.store.explain(&error))
            }
        }
    }

    /// Tells the others and this process's clients what was written, and after that forgets what is
    /// too much.
    fn announce(
        &self,
        locked: Locked<'_>,
        mut guard: MutexGuard<'_, Option<Writer>>,
        mut written: Written,
        publications: Vec<Publication>,
        own: Option<&Bell>,
    ) {
        // Mostly there is nothing to forget, and the next publisher need not wait for the rest.
        let locked = written.untidy.is_some().then_some(locked);
        if let Some(writer) = guard.as_mut() {
            self.ring(writer, &mut written, &publications, own.map(Bell::name));
        }
        drop(guard);
        self.deliver_written(&written, publications);
        if let Some(untidy) = &written.untidy
            && let Some(mut guard) = self.try_begin()
            && let Some(writer) = guard.as_mut()
        {
            // What fails is tried again after a later publish; one that finds no room makes some.
            let _ = writer.store.tidy(untidy, Position::at(now_ms()), self.limits);
        }
        drop(locked);
    }

    /// Rings the others; this process is not rung but delivers itself.
    fn ring(
        &self,
        writer: &mut Writer,
        written: &mut Written,
        publications: &[Publication],
        own: Option<&str>,
    ) {
        let mut bells = std::mem::take(&mut written.bells);
        bells.retain(|bell| Some(&**bell) != own);
        if bells.is_empty() {
            return;
        }
        let rings: Vec<Vec<u8>> = if publications.len() <= MOST_RINGS {
            let befores = std::iter::once(written.before).chain(written.positions.iter().copied());
            let places = befores.zip(&written.positions);
            let events = places.zip(publications);
            events.map(|((before, at), event)| Ring::bytes(before, *at, event)).collect()
        } else {
            vec![Ring::look()]
        };
        for bell in bells {
            if !rings.iter().all(|ring| writer.ringer.ring(&bell, ring)) {
                writer.dead_bells.push(bell);
            }
        }
    }

    /// Delivers what rings have brought, or what is in the store where they do not follow on what
    /// was delivered.
    fn answer(&self, reader: &mut Reader, rings: Vec<Ring>) -> Result<()> {
        let mut arrivals = Vec::new();
        // Several at once may be all that a full socket took.
        let mut looks = rings.len() > 1;
        for ring in rings {
            match ring {
                Ring::Event { position, .. } if position <= reader.position => {}
                Ring::Event { before, position, arrival } if before == reader.position => {
                    self.note_lag(arrival.id);
                    reader.position = position;
                    arrivals.push(arrival);
                }
                Ring::Event { .. } | Ring::Look => looks = true,
            }
        }
        self.hub.deliver(arrivals);
        if looks { self.pump(reader) } else { Ok(()) }
    }

    /// Delivers in this process what was just written, if it has clients.
    fn deliver_written(&self, written: &Written, publications: Vec<Publication>) {
        let mut reader = lock(&self.reader);
        if reader.bell.is_none() {
            let newest = written.positions.last().copied().unwrap_or(written.before);
            self.hub.observe(newest.into());
            return;
        }
        if reader.position != written.before {
            // Others were first. What fails is tried again by the bell's own thread.
            if self.pump(&mut reader).is_err() {
                reader.call_for_mending();
            }
            return;
        }
        let arrivals = publications.into_iter().zip(&written.positions).map(|(publication, at)| {
            let Publication { channel, body, format, .. } = publication;
            Arrival { channel, id: (*at).into(), body, format }
        });
        self.hub.deliver(arrivals);
        reader.position = written.positions.last().copied().unwrap_or(reader.position);
    }

    /// Delivers everything that is stored and not yet delivered.
    fn pump(&self, reader: &mut Reader) -> Result<()> {
        if reader.bell.is_none() {
            return Ok(());
        }
        loop {
            let position = reader.position;
            let store = self.open_reader(reader)?;
            let read = match store.after(position, READ_AHEAD) {
                Ok(read) => read,
                Err(error) => {
                    let explained = store.explain(&error);
                    reader.is_broken |= store::is_broken(&error);
                    return Err(explained);
                }
            };
            if read.forgotten > position {
                self.mark_forgotten(&read);
            }
            for (channel, floor) in read.gaps {
                if self.hub.newest_of(&channel).is_some_and(|newest| newest < floor.into()) {
                    self.hub.mark_gap(&channel, floor.into());
                }
            }
            if let Some(newest) = read.arrivals.last() {
                self.note_lag(newest.id);
            }
            self.hub.deliver(read.arrivals);
            reader.position = read.position;
            self.hub.observe(read.position.into());
            if !read.is_full {
                return Ok(());
            }
        }
    }

    /// Channels that the store knew nothing of any more have lost what was before that.
    fn mark_forgotten(&self, read: &Read) {
        let forgotten = read.forgotten.into();
        for (channel, _) in self.hub.heard() {
            let is_behind = self.hub.newest_of(&channel).is_some_and(|id| id < forgotten);
            if is_behind && !read.known.contains(&*channel) {
                self.hub.mark_gap(&channel, forgotten);
            }
        }
    }

    /// Opens what reads, if it is not open. The store must be there: only a writer makes one.
    fn open_reader<'a>(&self, reader: &'a mut Reader) -> Result<&'a mut Store> {
        if reader.store.is_none() {
            self.wait_for_fork();
            reader.store = Some(Store::join(&self.path)?);
        }
        reader.store.as_mut().ok_or_else(|| Error::Bus("the store was closed".to_owned()))
    }

    /// Has publishers ring this process, if they do not yet.
    fn attach(&self, reader: &mut Reader, writer: &mut Writer, _locked: &Locked<'_>) -> Result<()> {
        if reader.bell.is_some() {
            return Ok(());
        }
        let bell = Arc::new(Bell::new(&self.path)?);
        self.open_reader(reader)?;
        let attached = writer.store.attach(bell.name());
        let position = attached.map_err(|error| writer.store.explain(&error))?;
        reader.position = position.max(self.known());
        self.hub.observe(reader.position.into());
        let (bus, rung) = (Weak::clone(&self.myself), Arc::clone(&bell));
        thread::Builder::new()
            .name("sse-channel-bell".to_owned())
            .spawn(move || answer_the_bell(&bus, &rung))?;
        reader.bell = Some(bell);
        Ok(())
    }

    /// Brings the hub to where a client can register; attached and up to date already.
    fn make_ready(&self, reader: &mut Reader, lack: &Lack, resume: Resume) -> Result<EventId> {
        let position = reader.position;
        for channel in &lack.unheard {
            self.hub.hear(channel, position.into());
        }
        if let Resume::After(_) = resume {
            for channel in &lack.unread {
                let store = self.open_reader(reader)?;
                let count = self.hub.history_limit(channel);
                let (floor, arrivals) = store
                    .history(channel, position, count)
                    .map_err(|error| store.explain(&error))?;
                self.hub.read_back(channel, floor.into(), arrivals);
            }
        }
        Ok(position.into())
    }

    /// Locks what writes and opens it, without waiting for another process or thread.
    fn try_begin(&self) -> Begun<'_> {
        match self.writer.try_lock() {
            Ok(writer) if writer.is_some() => Some(writer),
            Err(TryLockError::Poisoned(writer)) if writer.get_ref().is_some() => {
                Some(writer.into_inner())
            }
            _ => None,
        }
    }

    fn submit(&self, job: Job) {
        let mut jobs = lock(&self.jobs);
        if self.waiting.load(Relaxed) >= MOST_WAITING {
            drop(jobs);
            refuse(job, &format!("{MOST_WAITING} events wait for the store; {}", self.excuse()));
            return;
        }
        if jobs.is_none() {
            let (sender, receiver) = unbounded();
            let bus = Weak::clone(&self.myself);
            let begun = thread::Builder::new()
                .name("sse-channel-bus".to_owned())
                .spawn(move || work(&bus, &receiver));
            match begun {
                Ok(_) => *jobs = Some(sender),
                Err(error) => {
                    drop(jobs);
                    refuse(job, &format!("the machine gives no thread to publish from: {error}"));
                    return;
                }
            }
        }
        if let Some(jobs) = jobs.as_ref() {
            self.waiting.fetch_add(1, Relaxed);
            // The thread lives as long as the bus.
            let _ = jobs.send(job);
        }
    }

    /// Publishes what was handed over, in one transaction. What was withdrawn until the file lock
    /// is there is left out.
    fn publish_all(&self, jobs: Vec<(Publication, Answering)>) {
        let (mut publications, mut answers) = (Vec::new(), Vec::new());
        let mut jobs = Some(jobs);
        let published = self.write_after_waiting(|| {
            for (publication, answering) in jobs.take().into_iter().flatten() {
                if answering.claim() {
                    publications.push(publication);
                    answers.push(answering);
                }
            }
            std::mem::take(&mut publications)
        });
        // Not even begun: the store cannot be opened.
        answers.extend(jobs.into_iter().flatten().map(|(_, answering)| answering));
        let mut wakes = WakeBatch::default();
        match published {
            Ok(positions) => {
                for (answering, position) in answers.into_iter().zip(positions) {
                    answering.answer(Ok(position.into()), &mut wakes);
                }
            }
            Err(error) => {
                let message = error.to_string();
                for answering in answers {
                    answering.answer(Err(Error::Bus(message.clone())), &mut wakes);
                }
            }
        }
        wakes.flush();
    }

    /// Waits for whoever is at it, and then publishes what `claim` gives.
    fn write_after_waiting(
        &self,
        claim: impl FnOnce() -> Vec<Publication>,
    ) -> Result<Vec<Position>> {
        let file_lock = self.file_lock()?;
        let locked = file_lock.lock()?;
        let publications = claim();
        if publications.is_empty() {
            return Ok(Vec::new());
        }
        let own = lock(&self.reader).bell.clone();
        for _ in 0..3 {
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard, &locked)?;
            match self.write(writer, &locked, &publications, true)? {
                Ok(written) => {
                    let positions = written.positions.clone();
                    self.announce(locked, guard, written, publications, own.as_deref());
                    return Ok(positions);
                }
                Err(_) => {
                    drop(guard);
                    self.recover(&locked)?;
                }
            }
        }
        Err(Error::Bus(format!(
            "the store in {} was lost again and again: does something delete it?",
            self.path.display()
        )))
    }

    /// Where the store is gone or damaged, begins another, in which nothing is older than what was
    /// known.
    fn recover(&self, locked: &Locked<'_>) -> Result<()> {
        let mut reader = lock(&self.reader);
        // What was stored before the loss can still be read through the open file.
        let has_all = self.pump(&mut reader).is_ok();
        let mut guard = lock(&self.writer);
        let is_current = |store: &Store| store.is_current();
        if !reader.is_broken
            && guard.as_ref().is_none_or(|writer| is_current(&writer.store))
            && reader.store.as_ref().is_none_or(is_current)
        {
            // Another thread was here first, or it is something else.
            return Ok(());
        }
        let stores = [guard.as_ref().map(|writer| &writer.store), reader.store.as_ref()];
        let is_torn = reader.is_broken || stores.iter().flatten().any(|store| store.is_torn());
        if is_torn && let Some(store) = stores.into_iter().flatten().next() {
            store.put_aside()?;
        }
        *guard = None;
        reader.store = None;
        let writer = self.open_writer(&mut guard, locked)?;
        if reader.bell.is_some() {
            let born = writer.store.born();
            self.hang_another_bell(&mut reader, writer, locked)?;
            if has_all {
                // That the new store has nothing from before it is no loss.
                reader.position = reader.position.max(born.unwrap_or_default());
            }
        }
        reader.is_broken = false;
        drop(guard);
        self.recoveries.fetch_add(1, Relaxed);
        let pumped = self.pump(&mut reader);
        if is_torn {
            // Without its log nobody knows what was in the store.
            for (channel, _) in self.hub.heard() {
                self.hub.mark_gap(&channel, reader.position.into());
            }
        }
        pumped
    }

    /// Has publishers ring another bell in place of one that they cannot reach, and goes on where
    /// the reader is: what others have stored meanwhile did not ring.
    fn hang_another_bell(
        &self,
        reader: &mut Reader,
        writer: &mut Writer,
        locked: &Locked<'_>,
    ) -> Result<()> {
        let (bell, position) = (reader.bell.take(), reader.position);
        let attached = self.attach(reader, writer, locked);
        reader.position = position;
        match attached {
            Ok(()) => bell.iter().for_each(|bell| bell.end()),
            Err(_) => reader.bell = bell,
        }
        attached
    }

    /// Something in the directory was deleted, or could not be read: makes sure that this process
    /// is still reached, and has what it missed.
    fn mend(&self) -> Result<()> {
        let file_lock = self.file_lock()?;
        let locked = file_lock.lock()?;
        self.recover(&locked)?;
        let mut reader = lock(&self.reader);
        if let Some(bell) = reader.bell.clone() {
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard, &locked)?;
            if bell.is_reachable() {
                // Its entry may have been in a store that is gone.
                let attached = writer.store.attach(bell.name());
                attached.map_err(|error| writer.store.explain(&error))?;
            } else {
                self.hang_another_bell(&mut reader, writer, &locked)?;
            }
        }
        drop(locked);
        self.pump(&mut reader)
    }

    /// Takes the entry of a bell away that was ended. Left behind, it goes at the next ring.
    fn take_down(&self, bell: &Bell, locked: Option<Locked<'_>>) {
        if locked.is_some()
            && let Some(mut guard) = self.try_begin()
            && let Some(writer) = guard.as_mut()
        {
            let _ = writer.store.detach(bell.name());
        }
    }

    fn prepare_now(&self, channels: &[ChannelKey], resume: Resume) -> Result<EventId> {
        let is_attached = lock(&self.reader).bell.is_some();
        if !is_attached {
            let file_lock = self.file_lock()?;
            let locked = file_lock.lock()?;
            self.recover(&locked)?;
            let mut reader = lock(&self.reader);
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard, &locked)?;
            self.attach(&mut reader, writer, &locked)?;
        }
        let mut reader = lock(&self.reader);
        if let Err(error) = self.pump(&mut reader) {
            drop(reader);
            self.mend().map_err(|_| error)?;
            reader = lock(&self.reader);
        }
        let lack = self.hub.lack(channels, resume);
        self.make_ready(&mut reader, &lack, resume)
    }
}

impl Bus for LocalBus {
    fn url(&self) -> &str {
        &self.url
    }

    fn try_publish(&self, publication: Publication) -> Attempt<Publication> {
        if self.waiting.load(Relaxed) > 0 {
            // Others wait already: one transaction for all.
            return Attempt::Waits(publication);
        }
        let Some(file_lock) = lock(&self.file_lock).clone() else {
            return Attempt::Waits(publication);
        };
        let locked = match file_lock.try_lock() {
            Ok(Some(locked)) => locked,
            Ok(None) => return Attempt::Waits(publication),
            Err(error) => return Attempt::Done(Err(error)),
        };
        let Some(mut guard) = self.try_begin() else { return Attempt::Waits(publication) };
        let Some(writer) = guard.as_mut() else { return Attempt::Waits(publication) };
        match self.write(writer, &locked, [&publication], false) {
            Ok(Ok(written)) => {
                let own = match self.reader.try_lock() {
                    Ok(reader) => reader.bell.clone(),
                    // Rung once too often, at worst.
                    Err(_) => None,
                };
                let id = written.positions.first().copied().unwrap_or(written.before);
                self.announce(locked, guard, written, vec![publication], own.as_deref());
                Attempt::Done(Ok(id.into()))
            }
            Ok(Err(_)) => Attempt::Waits(publication),
            Err(error) => Attempt::Done(Err(error)),
        }
    }

    fn publish(&self, publication: Publication, answering: Answering) {
        self.submit(Job::Publish(Box::new(publication), answering));
    }

    fn try_prepare(&self, channels: &[ChannelKey], resume: Resume) -> Attempt<()> {
        let Ok(mut reader) = self.reader.try_lock() else { return Attempt::Waits(()) };
        if reader.bell.is_none() || reader.store.is_none() {
            return Attempt::Waits(());
        }
        if self.pump(&mut reader).is_err() {
            // Somebody else mends it, and knows whether that can be done.
            return Attempt::Waits(());
        }
        let lack = self.hub.lack(channels, resume);
        Attempt::Done(self.make_ready(&mut reader, &lack, resume))
    }

    fn prepare(&self, channels: Vec<ChannelKey>, resume: Resume, answering: Answering) {
        self.submit(Job::Prepare(channels, resume, answering));
    }

    fn left(&self) {
        if !self.hub.is_idle() {
            return;
        }
        // The thread of the bell looks, and lingers.
        if let Some(bell) = &lock(&self.reader).bell {
            bell.nudge();
        }
    }

    fn excuse(&self) -> String {
        let file_lock = lock(&self.file_lock).clone();
        file_lock.map_or_else(
            || format!("the store in {} is not open", self.path.display()),
            |file_lock| file_lock.holder(),
        )
    }

    fn figures(&self) -> BusFigures {
        let connected = match self.writer.try_lock() {
            Ok(writer) => writer.is_some(),
            Err(_) => true,
        };
        BusFigures {
            lag: Duration::from_millis(self.lag_ms.load(Relaxed)).as_secs_f64(),
            waiting: self.waiting.load(Relaxed),
            connected,
            reconnects: self.recoveries.load(Relaxed),
        }
    }

    fn doorbell(&self) -> Option<Box<dyn Doorbell>> {
        // Held by who delivers: then nobody has to be woken for it.
        let bell = Arc::clone(self.reader.try_lock().ok()?.bell.as_ref()?);
        let bus = self.myself.upgrade()?;
        bell.begin_watching().then(|| Box::new(Watched { bus, bell }) as Box<dyn Doorbell>)
    }

    fn before_fork(&self) {
        // In the order of all others: who is at it finishes first, and who comes next waits until
        // the fork is over.
        let mut reader = lock(&self.reader);
        let mut writer = lock(&self.writer);
        *lock(&self.forking) += 1;
        reader.store = None;
        *writer = None;
    }

    fn after_fork(&self) {
        let mut forking = lock(&self.forking);
        *forking = forking.saturating_sub(1);
        drop(forking);
        self.forked.notify_all();
    }

    fn close(&self) {
        // Without waiting for anybody: the process is ending.
        let Some(bell) = self.reader.try_lock().ok().and_then(|mut reader| reader.bell.take())
        else {
            return;
        };
        bell.end();
        let file_lock = lock(&self.file_lock).clone();
        if let Some(file_lock) = file_lock {
            self.take_down(&bell, file_lock.try_lock().ok().flatten());
        }
    }
}

/// The bell as a waiting thread watches it.
struct Watched {
    bus: Arc<LocalBus>,
    bell: Arc<Bell>,
}

impl Doorbell for Watched {
    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.fd()
    }

    fn answer(&self) {
        // The lock first: rings are answered in their order by whoever took them.
        let mut reader = lock(&self.bus.reader);
        let is_current = reader.bell.as_ref().is_some_and(|bell| Arc::ptr_eq(bell, &self.bell));
        if is_current && self.bus.answer(&mut reader, self.bell.take()).is_err() {
            reader.call_for_mending();
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.bell.end_watching();
    }
}

fn refuse(job: Job, why: &str) {
    let (Job::Publish(_, answering) | Job::Prepare(_, _, answering)) = job;
    let mut wakes = WakeBatch::default();
    answering.answer(Err(Error::Bus(why.to_owned())), &mut wakes);
    wakes.flush();
}

/// The writer's thread: for publishers that must not wait themselves. It sleeps while there are
/// none.
fn work(bus: &Weak<LocalBus>, jobs: &Receiver<Job>) {
    while let Ok(first) = jobs.recv() {
        let Some(bus) = bus.upgrade() else { return };
        let mut publications = Vec::new();
        let mut count = 0;
        for job in std::iter::once(first).chain(jobs.try_iter().take(LARGEST_BATCH - 1)) {
            count += 1;
            match job {
                Job::Publish(publication, answering) => {
                    publications.push((*publication, answering));
                }
                Job::Prepare(channels, resume, answering) => {
                    if !publications.is_empty() {
                        bus.publish_all(std::mem::take(&mut publications));
                    }
                    let mut wakes = WakeBatch::default();
                    answering.answer(bus.prepare_now(&channels, resume), &mut wakes);
                    wakes.flush();
                }
            }
        }
        if !publications.is_empty() {
            bus.publish_all(publications);
        }
        bus.waiting.fetch_sub(count, Relaxed);
    }
}

/// The bell's thread: sleeps until it is rung, ends when nobody listens any more.
fn answer_the_bell(bus: &Weak<LocalBus>, bell: &Arc<Bell>) {
    let mut patience = SHORTEST_PATIENCE;
    let mut swept = Instant::now();
    // Since when nobody listens.
    let mut idle_since = Some(Instant::now());
    loop {
        let left = idle_since.map(|since| LINGER.saturating_sub(since.elapsed()));
        let rung = bell.wait(left);
        if rung == Rung::Unwatched || bell.is_watched() {
            // Who watches it as well mostly comes back at once, and delivers on the core that it
            // wakes on.
            thread::sleep(HEAD_START);
        }
        let Some(bus) = bus.upgrade() else { return };
        let mut done = if rung == Rung::Deletion { bus.mend() } else { Ok(()) };
        let mut reader = lock(&bus.reader);
        if !reader.bell.as_ref().is_some_and(|current| Arc::ptr_eq(current, bell)) {
            return;
        }
        if idle_since.is_some_and(|since| since.elapsed() >= LINGER) && bus.hub.retire_all() {
            reader.bell = None;
            reader.store = None;
            drop(reader);
            bell.end();
            if let Ok(file_lock) = bus.file_lock() {
                bus.take_down(bell, file_lock.lock().ok());
            }
            return;
        }
        if done.is_ok() {
            done = bus.answer(&mut reader, bell.take());
        }
        drop(reader);
        if done.is_ok() {
            patience = SHORTEST_PATIENCE;
        } else {
            // The store is being deleted, or its file system is full: nobody need ring when that
            // is over.
            bell.call_for_mending();
            thread::sleep(patience);
            patience = LONGEST_PATIENCE.min(patience * 2);
        }
        if swept.elapsed() >= UNUSED {
            bus.hub.retire_unused(UNUSED);
            swept = Instant::now();
        }
        idle_since = bus.hub.is_idle().then(|| idle_since.unwrap_or_else(Instant::now));
    }
}
