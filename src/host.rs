//! The figures of all processes of a bus on this host: each counts in a file of its own, mapped into
//! its memory, which all others can read at any time, also when it is busy, stopped or killed.
//!
//! A process holds a lock on its file for as long as it lives, so that others see when it has died,
//! however it did. Its counts are then added to those of all that are gone, once: the file of the
//! departed names the files that are in it already, and is replaced in one step. A reader that
//! finds another one after its look than before looks again, so that it needs no lock.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, Release},
};
use std::sync::{OnceLock, TryLockError};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, fstat, ftruncate, lstat, open};
use rustix::io::{Errno, pread, pwrite};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use crate::bus::local::directory;
use crate::control;
use crate::descriptors::{self, Own};
use crate::error::{Error, Result};
use crate::event_id::now_ms;
use crate::metrics::{Counters, Snapshot, WORDS};
use crate::sync::{Mutex, lock};

/// What the names of the files begin with. The number is the layout's: processes of another one are
/// not read, so it changes with the figures of a channel.
const PREFIX: &str = "figures1-";

/// A file that is being made.
const UNFINISHED: &str = "figures-new-";

/// A maker that has not finished its file for so long is gone.
const ABANDONED: Duration = Duration::from_secs(60);

/// Words of a record: the figures of a channel, then the length of its name, then the name.
const RECORD: usize = 72;
const NAME: usize = WORDS + 1;
const WORD: usize = size_of::<u64>();

/// The longest name in bytes.
const LONGEST_NAME: usize = (RECORD - NAME) * WORD;
const _: () = assert!(LONGEST_NAME >= 255, "more figures need larger records");

/// Channels that one process counts where others see it. A file has no memory where nothing was
/// written.
const MOST_CHANNELS: usize = 16_384;

/// Channels of which the departed are counted by name; the rest is one sum.
const MOST_DEPARTED: usize = 16_384;

/// How often a reader looks again when processes die meanwhile.
const ATTEMPTS: usize = 10;

// The words of the first record of a file.
const USED: usize = 0;
const UNSHARED: usize = 1;
const PID: usize = 2;
const CONNECTED: usize = 3;
const LAG: usize = 4;
const INSTANCE: usize = 5;
const REFUSED: usize = 8;
// Those of the file of the departed.
const VERSION: usize = 1;
const FOLDED: usize = 2;

/// Why a stream was not offloaded, or not opened at all.
pub const REFUSALS: [&str; 12] = [
    "address",
    "begun",
    "body",
    "descriptors",
    "ended",
    "full",
    "protocol",
    "server",
    "tls",
    "user",
    "wrapped",
    "other",
];

type Header = [AtomicU64; RECORD];

/// Where a process counts, and finds what others have counted.
#[derive(Debug)]
pub struct HostFigures {
    /// Nowhere for a private channel: nobody else is to see it.
    place: Option<Place>,
    /// Made at the first channel, or why it cannot be.
    sheet: OnceLock<std::result::Result<Sheet, String>>,
    /// What is counted of the process while it has no file.
    unshared: Box<Header>,
    /// Held by the thread that adds to the departed; a lock of a file excludes no thread.
    folding: Mutex<()>,
}

#[derive(Debug)]
struct Place {
    directory: PathBuf,
    /// What the names of its files begin with.
    prefix: String,
}

/// The file of this process.
#[derive(Debug)]
struct Sheet {
    name: String,
    path: PathBuf,
    /// Held for the lock on it. It must be opened here alone: closing any other descriptor of the
    /// file would give the lock back.
    file: Own,
    words: &'static [AtomicU64],
    /// Records in use. Held to take one more.
    used: Mutex<usize>,
}

/// The figures of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessFigures {
    /// Its id, in its own namespace.
    pub pid: u64,
    /// Tells it from others of that id, in other containers or at other times.
    pub instance: u64,
    /// Channels that it counts where nobody else sees it.
    pub unshared: u64,
    /// Whether it can reach the bus; `None` while it has not used it.
    pub is_connected: Option<bool>,
    /// Milliseconds between the ordering of the newest event that arrived and its delivery here.
    pub lag: u64,
    /// How often something of `REFUSALS` was.
    pub refused: [u64; REFUSALS.len()],
    /// Its channels.
    pub channels: Vec<(String, Snapshot)>,
}

/// What those that are gone have counted.
#[derive(Clone, Debug, Default)]
pub struct Departed {
    /// How often something of `REFUSALS` was.
    pub refused: [u64; REFUSALS.len()],
    /// By channel. That of the empty name is the rest.
    pub channels: HashMap<String, Snapshot>,
    version: u64,
    /// Files that are in it.
    folded: Vec<String>,
}

/// What was read of the others.
#[derive(Clone, Debug, Default)]
pub struct Others {
    /// Those that live.
    pub processes: Vec<ProcessFigures>,
    /// Those that do not.
    pub departed: Departed,
}

impl Default for HostFigures {
    /// Seen by nobody else.
    fn default() -> HostFigures {
        let mut instance = RandomState::new().build_hasher();
        // Beside chance: forks can have the same random numbers.
        instance.write_u32(std::process::id());
        instance.write_u64(now_ms());
        let unshared: Header = std::array::from_fn(|_| AtomicU64::new(0));
        unshared[INSTANCE].store(instance.finish(), Relaxed);
        HostFigures {
            place: None,
            sheet: OnceLock::new(),
            unshared: Box::new(unshared),
            folding: Mutex::default(),
        }
    }
}

impl HostFigures {
    /// Those of one bus, in `directory`. Touches nothing yet.
    pub fn of(directory: PathBuf, bus: &str) -> HostFigures {
        let prefix = format!("{PREFIX}{:016x}-", directory::fingerprint(bus.as_bytes()));
        HostFigures { place: Some(Place { directory, prefix }), ..HostFigures::default() }
    }

    /// What a channel of this process is counted with. Where others can see it, if that is possible.
    pub fn counters(&self, channel: &str) -> Counters {
        // The library's own channels are no one's business.
        if self.place.is_none() || channel.starts_with(control::OWN) {
            return Counters::default();
        }
        let Ok(sheet) = self.open() else { return Counters::default() };
        let counters = sheet.take(channel);
        if counters.is_none() {
            sheet.header()[UNSHARED].fetch_add(1, Relaxed);
        }
        counters.map_or_else(Counters::default, Counters::Shared)
    }

    /// Notes how old the newest event was that arrived, in milliseconds.
    pub fn note_lag(&self, lag: u64) {
        self.header()[LAG].store(lag, Relaxed);
    }

    /// Notes whether the bus can be reached.
    pub fn note_connected(&self, is_connected: bool) {
        self.header()[CONNECTED].store(1 + u64::from(is_connected), Relaxed);
    }

    /// Counts a stream that was not offloaded, or not opened.
    pub fn count_refused(&self, reason: &str) {
        let at = REFUSALS.iter().position(|known| *known == reason);
        self.header()[REFUSED + at.unwrap_or(REFUSALS.len() - 1)].fetch_add(1, Relaxed);
    }

    /// What is known of this process itself but its channels.
    pub fn own(&self) -> ProcessFigures {
        let header = self.header().each_ref().map(|word| word.load(Relaxed));
        ProcessFigures { pid: std::process::id().into(), ..ProcessFigures::of_header(&header) }
    }

    /// Why others cannot see what is counted here; `None` if they can.
    pub fn trouble(&self) -> Option<String> {
        let place = self.place.as_ref()?;
        match self.sheet.get() {
            // Nothing to see yet.
            None => None,
            Some(Err(error)) => Some(error.clone()),
            Some(Ok(sheet)) if sheet.is_there() => None,
            Some(Ok(_)) => Some(format!(
                "the file of this process's figures in {} was deleted; start the process again",
                place.directory.display()
            )),
        }
    }

    /// What all other processes have counted. Does not wait for any of them.
    pub fn read(&self) -> Others {
        let Some(place) = &self.place else { return Others::default() };
        let own = self.sheet.get().and_then(|sheet| sheet.as_ref().ok()).map(|sheet| &sheet.name);
        let mut departed = place.departed();
        for attempt in 1.. {
            let mut others = Others { processes: Vec::new(), departed };
            let mut someone_died = false;
            for name in place.files() {
                if Some(&name) == own || others.departed.folded.contains(&name) {
                    continue;
                }
                let Some((figures, is_alive)) = place.read(&name) else { continue };
                if is_alive {
                    others.processes.push(figures);
                } else {
                    someone_died = true;
                    others.departed.add(&figures);
                }
            }
            departed = place.departed();
            if departed.version == others.departed.version || attempt == ATTEMPTS {
                if someone_died {
                    self.fold();
                }
                return others;
            }
        }
        Others::default()
    }

    /// Adds those that have died to the departed, unless somebody is at it.
    fn fold(&self) {
        let Some(place) = &self.place else { return };
        let _turn = match self.folding.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let own = self.sheet.get().and_then(|sheet| sheet.as_ref().ok()).map(|sheet| &sheet.name);
        // What fails is tried again by who reads next.
        let _ = place.fold(own);
    }

    fn header(&self) -> &Header {
        match self.sheet.get() {
            Some(Ok(sheet)) => sheet.header(),
            _ => &self.unshared,
        }
    }

    fn open(&self) -> std::result::Result<&Sheet, &String> {
        let mut is_new = false;
        let sheet = self.sheet.get_or_init(|| {
            is_new = true;
            let Some(place) = &self.place else { return Err(String::new()) };
            let sheet = Sheet::make(place).map_err(|error| error.to_string())?;
            for (word, counted) in sheet.header().iter().zip(self.unshared.iter()).skip(CONNECTED) {
                word.store(counted.load(Relaxed), Relaxed);
            }
            Ok(sheet)
        });
        if is_new && sheet.is_ok() {
            // Where nobody ever reads, those that have died are cleared away by those that come.
            self.fold();
        }
        sheet.as_ref()
    }
}

impl Sheet {
    fn make(place: &Place) -> Result<Sheet> {
        directory::prepare(&place.directory)?;
        let pid = std::process::id();
        let random = RandomState::new().build_hasher().finish();
        let unfinished = place.directory.join(format!("{UNFINISHED}{pid}-{random:016x}"));
        let name = format!("{}{pid}-{random:016x}", place.prefix);
        let path = place.directory.join(&name);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = Own::from(open(&unfinished, flags, Mode::RUSR | Mode::WUSR)?);
        let begun = || -> Result<&'static [AtomicU64]> {
            // Before it has the name by which others take it for that of a process.
            fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
            let bytes = (1 + MOST_CHANNELS) * RECORD * WORD;
            ftruncate(&file, bytes as u64)?;
            write(&file, &[0; RECORD * WORD], 0)?;
            let words = descriptors::map_shared(file.descriptor(), bytes)?;
            words[PID].store(pid.into(), Relaxed);
            fs::rename(&unfinished, &path)?;
            Ok(words)
        };
        match begun() {
            Ok(words) => Ok(Sheet { name, path, file, words, used: Mutex::new(0) }),
            Err(error) => {
                let _ = fs::remove_file(&unfinished);
                Err(error)
            }
        }
    }

    fn header(&self) -> &'static Header {
        // The mapping has thousands of records.
        self.record(0).unwrap_or(&NOTHING)
    }

    fn record(&self, at: usize) -> Option<&'static Header> {
        self.words.get(at * RECORD..)?.first_chunk()
    }

    /// The counters of one more channel, if there is room.
    fn take(&self, channel: &str) -> Option<&'static [AtomicU64; WORDS]> {
        if channel.len() > LONGEST_NAME {
            return None;
        }
        let mut used = lock(&self.used);
        let at = *used + 1;
        let record = self.record(at).filter(|_| *used < MOST_CHANNELS)?;
        // A full file system says so here; touching what is not there would be fatal.
        write(&self.file, &[0; RECORD * WORD], (at * RECORD * WORD) as u64).ok()?;
        record[NAME - 1].store(channel.len() as u64, Relaxed);
        for (word, part) in record[NAME..].iter().zip(channel.as_bytes().chunks(WORD)) {
            let mut bytes = [0; WORD];
            bytes[..part.len()].copy_from_slice(part);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
        *used = at;
        self.header()[USED].store(at as u64, Release);
        record.first_chunk()
    }

    /// Whether others find it.
    fn is_there(&self) -> bool {
        let (Ok(own), Ok(others)) = (fstat(&self.file), lstat(&self.path)) else { return false };
        (own.st_dev, own.st_ino) == (others.st_dev, others.st_ino)
    }
}

static NOTHING: Header = [const { AtomicU64::new(0) }; RECORD];

impl Place {
    fn departed_path(&self) -> PathBuf {
        self.directory.join(format!("{}departed", self.prefix))
    }

    /// The files of processes.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let is_of_process = |name: &String| {
            let rest = name.strip_prefix(&self.prefix);
            rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        };
        names.filter(is_of_process).collect()
    }

    /// The figures of another process, and whether it lives. It is looked for before it is read, so
    /// that nothing of one that has died is missing.
    fn read(&self, name: &str) -> Option<(ProcessFigures, bool)> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = Own::from(open(self.directory.join(name), flags, Mode::empty()).ok()?);
        let is_alive = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok()?.is_some();
        // The kernel copies aligned words whole. Once before, to know how much there is.
        let header = records(&read(&file, 0, 1).ok()?).next()?;
        let count = usize::try_from(header[USED]).ok()?.min(MOST_CHANNELS);
        let channels = read(&file, 1, count).ok()?;
        let channels = records(&channels).filter_map(|record| named(&record)).collect();
        Some((ProcessFigures { channels, ..ProcessFigures::of_header(&header) }, is_alive))
    }

    fn departed(&self) -> Departed {
        let Ok(bytes) = fs::read(self.departed_path()) else { return Departed::default() };
        let mut records = records(&bytes);
        let Some(header) = records.next() else { return Departed::default() };
        let figures = ProcessFigures::of_header(&header);
        let folded = usize::try_from(header[FOLDED]).unwrap_or(usize::MAX);
        let folded = records.by_ref().take(folded).filter_map(|record| named(&record));
        let folded = folded.map(|(name, _)| name).collect();
        let channels = records.filter_map(|record| named(&record)).collect();
        Departed { refused: figures.refused, channels, version: header[VERSION], folded }
    }

    /// Adds the dead to the departed, and removes their files.
    fn fold(&self, own: Option<&String>) -> Result<()> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = self.directory.join("figures-lock");
        let file = Own::from(open(path, flags, Mode::RUSR | Mode::WUSR)?);
        // Until the file is closed.
        match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::ACCESS | Errno::AGAIN) => return Ok(()),
            locked => locked?,
        }
        let mut departed = self.departed();
        let known = std::mem::take(&mut departed.folded);
        let mut is_more = false;
        for name in self.files() {
            if Some(&name) == own {
                continue;
            }
            if known.contains(&name) {
                departed.folded.push(name);
            } else if let Some((figures, false)) = self.read(&name) {
                departed.add(&figures);
                departed.folded.push(name);
                is_more = true;
            }
        }
        if is_more {
            departed.version = departed.version.wrapping_add(1);
            let unfinished = self.directory.join(format!("{}departed-new", self.prefix));
            fs::write(&unfinished, departed.to_bytes())?;
            fs::rename(&unfinished, self.departed_path())?;
        }
        for name in &departed.folded {
            let _ = fs::remove_file(self.directory.join(name));
        }
        self.clear_away();
        Ok(())
    }

    /// Removes what makers that were killed have left.
    fn clear_away(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let is_unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
            let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
            if is_unfinished && age().is_some_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl ProcessFigures {
    fn of_header(header: &[u64; RECORD]) -> ProcessFigures {
        let mut refused = [0; REFUSALS.len()];
        refused.copy_from_slice(&header[REFUSED..REFUSED + REFUSALS.len()]);
        ProcessFigures {
            pid: header[PID],
            instance: header[INSTANCE],
            unshared: header[UNSHARED],
            is_connected: header[CONNECTED].checked_sub(1).map(|state| state > 0),
            lag: header[LAG],
            refused,
            channels: Vec::new(),
        }
    }
}

impl Departed {
    fn add(&mut self, figures: &ProcessFigures) {
        for (sum, more) in self.refused.iter_mut().zip(&figures.refused) {
            *sum = sum.saturating_add(*more);
        }
        for (name, snapshot) in &figures.channels {
            let has_room = self.channels.len() < MOST_DEPARTED || self.channels.contains_key(name);
            let name = if has_room { name.clone() } else { String::new() };
            self.channels.entry(name).or_default().add_departed(snapshot);
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut header = [0; RECORD];
        header[VERSION] = self.version;
        header[FOLDED] = self.folded.len() as u64;
        header[REFUSED..REFUSED + REFUSALS.len()].copy_from_slice(&self.refused);
        let nothing = Snapshot::default();
        let folded = self.folded.iter().map(|name| record(name, &nothing));
        let channels = self.channels.iter().map(|(name, snapshot)| record(name, snapshot));
        let records = std::iter::once(header).chain(folded).chain(channels);
        records.flatten().flat_map(u64::to_ne_bytes).collect()
    }
}

fn record(name: &str, snapshot: &Snapshot) -> [u64; RECORD] {
    let mut record = [0; RECORD];
    record[..WORDS].copy_from_slice(&snapshot.0);
    record[NAME - 1] = name.len() as u64;
    for (word, part) in record[NAME..].iter_mut().zip(name.as_bytes().chunks(WORD)) {
        let mut bytes = [0; WORD];
        bytes[..part.len()].copy_from_slice(part);
        *word = u64::from_ne_bytes(bytes);
    }
    record
}

/// The name and the figures in a record.
fn named(record: &[u64; RECORD]) -> Option<(String, Snapshot)> {
    let name: Vec<u8> = record[NAME..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name = name.get(..usize::try_from(record[NAME - 1]).ok()?)?;
    let mut snapshot = Snapshot::default();
    snapshot.0.copy_from_slice(&record[..WORDS]);
    Some((String::from_utf8(name.to_vec()).ok()?, snapshot))
}

fn records(bytes: &[u8]) -> impl Iterator<Item = [u64; RECORD]> {
    bytes.chunks_exact(RECORD * WORD).map(|bytes| {
        let mut record = [0; RECORD];
        for (word, bytes) in record.iter_mut().zip(bytes.chunks_exact(WORD)) {
            *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
        }
        record
    })
}

/// So many records of a file, or as many as it has.
fn read(file: &Own, from: usize, count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count * RECORD * WORD];
    let mut done = 0;
    while done < bytes.len() {
        let offset = from * RECORD * WORD + done;
        match pread(file, &mut bytes[done..], offset as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

fn write(file: &Own, bytes: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pwrite(file, &bytes[done..], offset + done as u64) {
            Ok(0) => return Err(Error::Io(std::io::ErrorKind::WriteZero.into())),
            Ok(written) => done += written,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that goes with the test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let name = format!("sse-figures-{}-{name}", std::process::id());
            Directory(std::env::temp_dir().join(name))
        }

        fn figures(&self) -> HostFigures {
            HostFigures::of(self.0.clone(), "local")
        }

        fn files(&self) -> Vec<String> {
            HostFigures::of(self.0.clone(), "local").place.map_or_else(Vec::new, |its| its.files())
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    // To a process its own locks are none, so that what another object has in it counts as dead.

    #[test]
    fn what_the_dead_have_counted_is_added_once() {
        let directory = Directory::new("dead");
        let dead = directory.figures();
        dead.counters("a").published().fetch_add(3, Relaxed);
        dead.note_connected(true);
        dead.count_refused("tls");
        dead.count_refused("of a later version");
        let reader = directory.figures();
        for _ in 0..3 {
            let Others { processes, departed } = reader.read();
            assert_eq!(processes, []);
            assert_eq!(departed.channels.get("a").map(Snapshot::published), Some(3));
            let refused: u64 = departed.refused.iter().sum();
            assert_eq!((departed.refused[8], refused), (1, 2));
            assert_eq!(directory.files(), [""; 0]);
        }
        assert!(dead.trouble().is_some(), "its file is gone");
    }

    #[test]
    fn one_reads_what_another_has_counted_by_names_of_any_length() -> Result<()> {
        let directory = Directory::new("names");
        let names = [
            "a",
            "12345678",
            "grüße",
            &"x".repeat(255),
            &"x".repeat(LONGEST_NAME + 1),
            control::CHANNEL,
        ];
        let figures = directory.figures();
        for (number, name) in names.iter().enumerate() {
            figures.counters(name).bytes().fetch_add(number as u64, Relaxed);
        }
        let place = figures.place.as_ref().ok_or(Error::Closed)?;
        let (read, _) = place.read(&directory.files()[0]).ok_or(Error::Closed)?;
        let expected = names[..4].iter().zip(0..).map(|(name, bytes)| (name.to_string(), bytes));
        let its = read.channels.iter().map(|(name, snapshot)| (name.clone(), snapshot.bytes()));
        assert!(its.eq(expected), "{read:?}");
        assert_eq!((read.unshared, read.pid), (1, u64::from(std::process::id())));
        assert_eq!(read.is_connected, None);
        Ok(())
    }

    #[test]
    fn of_too_many_channels_the_departed_keep_the_sum() {
        let mut departed = Departed::default();
        let one = Counters::default();
        one.delivered().fetch_add(1, Relaxed);
        let names = 0..MOST_DEPARTED + 10;
        let channels = names.map(|n| (n.to_string(), one.snapshot())).collect();
        let figures = ProcessFigures { channels, ..ProcessFigures::default() };
        departed.add(&figures);
        departed.add(&figures);
        assert_eq!(departed.channels.get("").map(Snapshot::delivered), Some(20));
        assert_eq!(departed.channels.get("5").map(Snapshot::delivered), Some(2));
        departed.folded = vec!["figures1-x".to_owned()];
        let bytes = departed.to_bytes();
        let count = bytes.len() / WORD / RECORD;
        assert_eq!(count, 1 + 1 + MOST_DEPARTED + 1);
    }

    #[test]
    fn what_is_no_file_of_figures_is_not_read() -> Result<()> {
        let directory = Directory::new("strange");
        let figures = directory.figures();
        let _ = figures.counters("a");
        let place = figures.place.as_ref().ok_or(Error::Closed)?;
        for content in [vec![], vec![255; 100], vec![255; 5000], vec![0; RECORD * WORD]] {
            fs::write(place.departed_path(), &content)?;
            fs::write(directory.0.join(format!("{}1-0", place.prefix)), &content)?;
            let others = figures.read();
            assert!(others.processes.is_empty());
        }
        Ok(())
    }
}
