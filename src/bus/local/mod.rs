//! `local://`: every process of one user and project on this host, and no server.
//!
//! A publisher writes to the store under the file lock, then rings the bells of the processes that
//! have clients; each of them reads what it has not read yet. The publisher's own process is given
//! the event before `publish` returns.
//!
//! Locks are taken in this order: reader, writer, file. No lock is held while anybody is woken.

mod directory;
mod doorbell;
mod file_lock;
mod store;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::bus::{Attempt, Bus, BusFigures, Doorbell, Publication};
use crate::error::{Error, Result};
use crate::event_id::{EventId, now_ms};
use crate::history::Limits;
use crate::hub::{Arrival, ChannelKey, Hub, Lack, Resume};
use crate::sync::lock;
use crate::ticket::Answering;
use crate::wake::WakeBatch;

use doorbell::{Bell, Ring, Ringer, Rung};
use file_lock::FileLock;
use store::{Position, Store, Written};

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
    /// What writes. Held for a transaction, and while the file lock is waited for.
    writer: Mutex<Option<Writer>>,
    /// The file lock again, to ask who has it while the writer waits for it.
    file_lock: Mutex<Weak<FileLock>>,
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
    file_lock: Arc<FileLock>,
    ringer: Ringer,
    dead_bells: Vec<String>,
    /// How often the files were looked at.
    looks: u32,
}

impl Writer {
    /// Whether others write to the same files, under the same lock.
    fn is_current(&self) -> bool {
        self.store.is_current() && self.file_lock.is_current()
    }
}

#[derive(Debug, Default)]
struct Reader {
    store: Option<Store>,
    /// Everything up to here was delivered.
    position: Position,
    /// Rung by publishers, as long as there are clients.
    bell: Option<Arc<Bell>>,
}

#[derive(Debug)]
enum Job {
    Publish(Box<Publication>, Answering),
    Prepare(Vec<ChannelKey>, Resume, Answering),
}

/// What the writer needs to begin; `None` when it has to be waited for.
type Begun<'a> = Option<MutexGuard<'a, Option<Writer>>>;

/// The file that was opened is not the one that others find.
#[derive(Debug)]
struct Lost;

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

    fn wait_for_fork(&self) {
        let forking = lock(&self.forking);
        let _done = self
            .forked
            .wait_timeout_while(forking, LONGEST_FORK, |forking| *forking > 0)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Opens what writes, if it is not open.
    fn open_writer<'a>(&self, writer: &'a mut Option<Writer>) -> Result<&'a mut Writer> {
        if writer.is_none() {
            self.wait_for_fork();
            directory::prepare(&self.path)?;
            let file_lock = Arc::new(FileLock::open(&self.path)?);
            *lock(&self.file_lock) = Arc::downgrade(&file_lock);
            let locked = file_lock.lock()?;
            let store = self.open_store()?;
            drop(locked);
            let ringer = Ringer::new(&self.path)?;
            *writer = Some(Writer { store, file_lock, ringer, dead_bells: Vec::new(), looks: 0 });
        }
        writer.as_mut().ok_or_else(|| Error::Bus("the store was closed".to_owned()))
    }

    /// Opens a connection; the file lock must be held.
    fn open_store(&self) -> Result<Store> {
        let now = Position::at(now_ms()).max(self.known());
        Store::open(&self.path, now, directory::store_limit(&self.path))
    }

    /// Stores publications in one transaction and rings. `Ok(Err(Lost))` when the store is not
    /// there any more. The file lock must be held and is given back.
    fn write<'a>(
        &self,
        writer: &mut Writer,
        locked: file_lock::Locked<'_>,
        publications: impl IntoIterator<Item = &'a Publication>,
    ) -> Result<std::result::Result<Written, Lost>> {
        let dead = std::mem::take(&mut writer.dead_bells);
        writer.looks = writer.looks.wrapping_add(1);
        let is_there = if writer.looks % LOOK_CLOSELY_EVERY == 1 {
            writer.is_current()
        } else {
            writer.store.is_there()
        };
        if !is_there {
            return Ok(Err(Lost));
        }
        let now = Position::at(now_ms());
        let written = writer.store.write(publications, self.known(), now, self.limits, &dead);
        drop(locked);
        match written {
            Ok(written) => Ok(Ok(written)),
            Err(error) => {
                writer.dead_bells = dead;
                if store::is_broken(&error) {
                    let _locked = writer.file_lock.lock()?;
                    writer.store.put_aside()?;
                    return Ok(Err(Lost));
                }
                Err(writer.store.explain(&error))
            }
        }
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
                    self.lag_ms.store(now_ms().saturating_sub(arrival.id.ms), Relaxed);
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
            // Others were first; a failure comes up again at the next ring.
            let _ = self.pump(&mut reader);
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
            let read = store.after(position, READ_AHEAD).map_err(|error| store.explain(&error))?;
            for (channel, floor) in read.gaps {
                if self.hub.newest_of(&channel).is_some_and(|newest| newest < floor.into()) {
                    self.hub.mark_gap(&channel, floor.into());
                }
            }
            if let Some(newest) = read.arrivals.last() {
                self.lag_ms.store(now_ms().saturating_sub(newest.id.ms), Relaxed);
            }
            self.hub.deliver(read.arrivals);
            reader.position = read.position;
            self.hub.observe(read.position.into());
            if !read.is_full {
                return Ok(());
            }
        }
    }

    fn open_reader<'a>(&self, reader: &'a mut Reader) -> Result<&'a mut Store> {
        if reader.store.is_none() {
            let mut writer = lock(&self.writer);
            let writer = self.open_writer(&mut writer)?;
            let locked = writer.file_lock.lock()?;
            reader.store = Some(self.open_store()?);
            drop(locked);
        }
        reader.store.as_mut().ok_or_else(|| Error::Bus("the store was closed".to_owned()))
    }

    /// Has publishers ring this process, if they do not yet. The writer must be open and is locked
    /// by the caller.
    fn attach(&self, reader: &mut Reader, writer: &mut Writer) -> Result<()> {
        if reader.bell.is_some() {
            return Ok(());
        }
        let bell = Arc::new(Bell::new(&self.path)?);
        let position = {
            let _locked = writer.file_lock.lock()?;
            if reader.store.is_none() {
                reader.store = Some(self.open_store()?);
            }
            let attached = writer.store.attach(bell.name());
            attached.map_err(|error| writer.store.explain(&error))?
        };
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
        let mut claim = Some(claim);
        let mut publications = Vec::new();
        let mut has_recovered = false;
        loop {
            let own = lock(&self.reader).bell.clone();
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard)?;
            let file_lock = Arc::clone(&writer.file_lock);
            let locked = file_lock.lock()?;
            if let Some(claim) = claim.take() {
                publications = claim();
            }
            if publications.is_empty() {
                return Ok(Vec::new());
            }
            match self.write(writer, locked, &publications)? {
                Ok(mut written) => {
                    let own = own.as_ref().map(|bell| bell.name());
                    self.ring(writer, &mut written, &publications, own);
                    drop(guard);
                    self.deliver_written(&written, publications);
                    return Ok(written.positions);
                }
                Err(Lost) if !has_recovered => {
                    drop(guard);
                    self.recover()?;
                    has_recovered = true;
                }
                Err(Lost) => {
                    return Err(Error::Bus(format!(
                        "the store in {} was lost twice in a row: does something delete it?",
                        self.path.display()
                    )));
                }
            }
        }
    }

    /// The store is gone or damaged: begins another, in which nothing is older than what was known.
    fn recover(&self) -> Result<()> {
        let mut reader = lock(&self.reader);
        // What was stored before the loss can still be read through the open file.
        let _ = self.pump(&mut reader);
        let mut guard = lock(&self.writer);
        if guard.as_ref().is_some_and(Writer::is_current)
            && reader.store.as_ref().is_none_or(Store::is_current)
        {
            // Another thread was here first.
            return Ok(());
        }
        let stores = [guard.as_ref().map(|writer| &writer.store), reader.store.as_ref()];
        let is_torn = stores.into_iter().flatten().any(Store::is_torn);
        if let Some(writer) = guard.as_ref().filter(|_| is_torn) {
            let _locked = writer.file_lock.lock()?;
            writer.store.put_aside()?;
        }
        *guard = None;
        reader.store = None;
        let writer = self.open_writer(&mut guard)?;
        if reader.bell.is_some() {
            self.hang_another_bell(&mut reader, writer)?;
        }
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
    fn hang_another_bell(&self, reader: &mut Reader, writer: &mut Writer) -> Result<()> {
        let (bell, position) = (reader.bell.take(), reader.position);
        let attached = self.attach(reader, writer);
        reader.position = position;
        match attached {
            Ok(()) => bell.iter().for_each(|bell| bell.end()),
            Err(_) => reader.bell = bell,
        }
        attached
    }

    /// Something in the directory was deleted: makes sure that this process is still reached.
    fn mend(&self) -> Result<()> {
        self.recover()?;
        let mut reader = lock(&self.reader);
        if reader.bell.as_ref().is_some_and(|bell| !bell.is_reachable()) {
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard)?;
            self.hang_another_bell(&mut reader, writer)?;
        }
        self.pump(&mut reader)
    }

    /// Has nobody ring this process any more.
    fn detach(&self, reader: &mut Reader, waits: bool) {
        let Some(bell) = reader.bell.take() else { return };
        reader.store = None;
        bell.end();
        let mut guard = if waits { Some(lock(&self.writer)) } else { self.try_begin() };
        if let Some(writer) = guard.as_deref_mut().and_then(Option::as_mut) {
            let file_lock = Arc::clone(&writer.file_lock);
            let locked =
                if waits { file_lock.lock().ok() } else { file_lock.try_lock().ok().flatten() };
            if locked.is_some() {
                // Left behind, its entry goes at the next ring.
                let _ = writer.store.detach(bell.name());
            }
        }
    }

    fn prepare_now(&self, channels: &[ChannelKey], resume: Resume) -> Result<EventId> {
        let mut reader = lock(&self.reader);
        if reader.bell.is_none() {
            let mut guard = lock(&self.writer);
            let writer = self.open_writer(&mut guard)?;
            if writer.is_current() {
                self.attach(&mut reader, writer)?;
            } else {
                drop(guard);
                drop(reader);
                self.recover()?;
                reader = lock(&self.reader);
                let mut guard = lock(&self.writer);
                let writer = self.open_writer(&mut guard)?;
                self.attach(&mut reader, writer)?;
            }
        }
        self.pump(&mut reader)?;
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
        let Some(mut guard) = self.try_begin() else { return Attempt::Waits(publication) };
        let Some(writer) = guard.as_mut() else { return Attempt::Waits(publication) };
        let file_lock = Arc::clone(&writer.file_lock);
        let locked = match file_lock.try_lock() {
            Ok(Some(locked)) => locked,
            Ok(None) => return Attempt::Waits(publication),
            Err(error) => return Attempt::Done(Err(error)),
        };
        match self.write(writer, locked, [&publication]) {
            Ok(Ok(mut written)) => {
                let publications = vec![publication];
                let own = match self.reader.try_lock() {
                    Ok(reader) => reader.bell.clone(),
                    // Rung once too often, at worst.
                    Err(_) => None,
                };
                let own = own.as_ref().map(|bell| bell.name());
                self.ring(writer, &mut written, &publications, own);
                drop(guard);
                let id = written.positions.first().copied().unwrap_or(written.before);
                self.deliver_written(&written, publications);
                Attempt::Done(Ok(id.into()))
            }
            Ok(Err(Lost)) => Attempt::Waits(publication),
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
        if let Err(error) = self.pump(&mut reader) {
            return Attempt::Done(Err(error));
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
        let bell = match self.reader.try_lock() {
            Ok(reader) => reader.bell.clone(),
            // It is being rung, and looks.
            Err(_) => None,
        };
        if let Some(bell) = bell
            && let Ok(ringer) = Ringer::new(&self.path)
        {
            ringer.ring(bell.name(), &Ring::look());
        }
    }

    fn excuse(&self) -> String {
        let file_lock = lock(&self.file_lock).upgrade();
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
        bell.count_watcher(true);
        Some(Box::new(Watched { bus: self.myself.upgrade()?, bell }))
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
        self.detach(&mut lock(&self.reader), false);
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
        if reader.bell.as_ref().is_some_and(|current| Arc::ptr_eq(current, &self.bell)) {
            // What fails is tried again by the bell's own thread.
            if self.bus.answer(&mut reader, self.bell.take()).is_err() {
                self.bell.ring_again();
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.bell.count_watcher(false);
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
                    bus.publish_all(std::mem::take(&mut publications));
                    let mut wakes = WakeBatch::default();
                    answering.answer(bus.prepare_now(&channels, resume), &mut wakes);
                    wakes.flush();
                }
            }
        }
        bus.publish_all(publications);
        bus.waiting.fetch_sub(count, Relaxed);
    }
}

/// The bell's thread: sleeps until it is rung, ends when nobody listens any more.
fn answer_the_bell(bus: &Weak<LocalBus>, bell: &Arc<Bell>) {
    let mut linger = Some(LINGER);
    let mut patience = SHORTEST_PATIENCE;
    loop {
        let rung = bell.wait(linger);
        if rung == Rung::Bell && bell.is_watched() {
            // Who watches it as well is given the time to deliver, on the core that it wakes on.
            thread::sleep(HEAD_START);
        }
        let Some(bus) = bus.upgrade() else { return };
        let mut done = match rung {
            Rung::Deletion => bus.mend(),
            // Who watches it as well could not read the store.
            Rung::Bell if bell.take_ring_again() => bus.mend(),
            Rung::Bell | Rung::Nothing => Ok(()),
        };
        let mut reader = lock(&bus.reader);
        if !reader.bell.as_ref().is_some_and(|current| Arc::ptr_eq(current, bell)) {
            return;
        }
        if rung == Rung::Nothing && bus.hub.retire_all() {
            bus.detach(&mut reader, true);
            return;
        }
        if done.is_ok() {
            done = bus.answer(&mut reader, bell.take());
        }
        drop(reader);
        if done.is_ok() {
            patience = SHORTEST_PATIENCE;
            linger = bus.hub.is_idle().then_some(LINGER);
        } else {
            // The store is being deleted, or its file system is full: nobody need ring when that
            // is over.
            thread::sleep(patience);
            bell.ring_again();
            patience = LONGEST_PATIENCE.min(patience * 2);
        }
    }
}
