//! The store: one SQLite file that all processes of a project write and read.
//!
//! WAL mode, so that readers and the writer do not wait for each other; `synchronous=OFF`, because
//! what a killed process has committed is safe in the system's memory, and events need not survive
//! a power cut. Writers are queued by `FileLock`, which must be held for `open` and all that writes.

use std::collections::HashSet;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::ffi::ErrorCode;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};

use crate::bus::Publication;
use crate::error::{Error, Result};
use crate::event::Format;
use crate::event_id::EventId;
use crate::frame::Body;
use crate::history::Limits;
use crate::hub::Arrival;

/// The layout below; a store of another one has another name.
const VERSION: i32 = 1;

/// Marks the file as ours: "sse1".
const APPLICATION: i32 = 0x7373_6531;

/// Events that a channel keeps at the least, so that a process that was slow finds them.
const FEWEST: i64 = 1000;

/// The longest wait for another program that writes to the store, a shell perhaps.
const BUSY: Duration = Duration::from_secs(5);

/// Milliseconds for which an event is kept in any case, unless the channel is too large.
const YOUNG: u64 = 10_000;

/// Events of a channel that one transaction forgets at the most: of those that are too many, and when
/// their bytes are too many.
const MOST_TRIMMED: i64 = 250;
const MOST_FREED: i64 = 500;

/// What a store consists of, by what is added to its name.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// A file's device and number.
type Identity = (u64, u64);

/// After so many transactions a publisher looks at age and size of the whole store.
const CHECK_EVERY: u32 = 32;

/// Bits of a row's number that count within its millisecond.
const COUNTER_BITS: u32 = 20;

/// Bytes that an event takes beside its text.
const OVERHEAD: i64 = 64;

/// A place in the order, as the rows are numbered: milliseconds, then a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(i64);

impl Position {
    /// The beginning of a millisecond.
    pub fn at(ms: u64) -> Position {
        Position(i64::try_from(ms).unwrap_or(i64::MAX).saturating_mul(1 << COUNTER_BITS))
    }

    fn next(self) -> Position {
        Position(self.0.saturating_add(1))
    }

    /// As a ring has it, for processes of this machine.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_ne_bytes()
    }

    /// Back from `to_bytes`.
    pub fn from_bytes(bytes: [u8; 8]) -> Position {
        Position(i64::from_ne_bytes(bytes))
    }
}

impl From<Position> for EventId {
    fn from(position: Position) -> EventId {
        let number = position.0.unsigned_abs();
        EventId { ms: number >> COUNTER_BITS, n: number & ((1 << COUNTER_BITS) - 1) }
    }
}

impl From<EventId> for Position {
    /// An id that no row can have becomes the nearest one that is not before it.
    fn from(id: EventId) -> Position {
        let start = Position::at(id.ms);
        if id.n < 1 << COUNTER_BITS {
            Position(start.0.saturating_add(i64::try_from(id.n).unwrap_or(i64::MAX)))
        } else {
            Position(Position::at(id.ms.saturating_add(1)).0.saturating_sub(1))
        }
    }
}

/// What one transaction of a publisher did.
#[derive(Debug)]
pub struct Written {
    /// The newest event before it.
    pub before: Position,
    /// Where each publication stands.
    pub positions: Vec<Position>,
    /// The bells of the processes that listen.
    pub bells: Vec<String>,
    /// What is to be forgotten once the others are rung, if anything.
    pub untidy: Option<Untidy>,
}

/// What a transaction left to `Store::tidy`.
#[derive(Debug, Default)]
pub struct Untidy {
    /// Channels that may have too much.
    channels: Vec<Kept>,
    /// Whether it is time to look at all of them together.
    looks_at_all: bool,
    /// What is here or after it was just written: others have not read it yet.
    first: Position,
}

/// What a reader found after its position.
#[derive(Debug, Default)]
pub struct Read {
    /// The events in order.
    pub arrivals: Vec<Arrival>,
    /// Where to go on.
    pub position: Position,
    /// Whether there may be more.
    pub is_full: bool,
    /// Channels that are not among `known` have lost what was before this.
    pub forgotten: Position,
    /// Those that have a row, if that matters.
    pub known: HashSet<String>,
    /// Channels of which events were let go of before they were read here, and up to where.
    pub gaps: Vec<(Arc<str>, Position)>,
}

/// A transaction that writes; undone unless it is committed. rusqlite's own parses its SQL anew each
/// time, which is a good part of what a publish costs.
struct Transaction<'a>(&'a Connection);

impl Transaction<'_> {
    fn commit(self) -> rusqlite::Result<()> {
        self.0.prepare_cached("COMMIT")?.execute([]).map(drop)
    }
}

impl Deref for Transaction<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.0
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // Committed, or undone by SQLite itself.
        if !self.0.is_autocommit() {
            // One that cannot be undone is in the way of the next, which says so.
            let _ = self.0.execute_batch("ROLLBACK");
        }
    }
}

/// One connection to the store. It must not live through a fork: SQLite's locks are the process's.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
    /// Which files they are (the database, its log and its index), so that others in their place
    /// are noticed.
    identity: [Option<Identity>; 3],
    limit: u64,
    /// Transactions of this connection.
    writes: u32,
}

impl Store {
    /// Opens the store in `directory`, and makes it if it is not there: nothing in it is older than
    /// `now`. A file that is no store any more is put aside. Needs the file lock.
    ///
    /// # Errors
    /// `Bus` when it cannot be opened or made.
    pub fn open(directory: &Path, now: Position, limit: u64) -> Result<Store> {
        let path = store_path(directory);
        if identity_of(&path, "").is_none() {
            // A log without its database is no log of the next one.
            remove_log(&path);
        }
        match Store::open_file(&path, now, limit) {
            Err(error) if is_broken(&error) => {
                put_aside(&path)?;
                Store::open_file(&path, now, limit).map_err(|error| explain(&error, &path))
            }
            Err(error) => Err(explain(&error, &path)),
            Ok(store) => {
                store.check_version()?;
                Ok(store)
            }
        }
    }

    /// Opens the store that is there, to read it. Needs no lock.
    ///
    /// # Errors
    /// `Bus` when there is none of this version.
    pub fn join(directory: &Path) -> Result<Store> {
        let path = store_path(directory);
        let open = || -> rusqlite::Result<Store> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(&path, flags)?;
            connection.busy_timeout(Duration::from_millis(100))?;
            connection.set_prepared_statement_cache_capacity(64);
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
            connection.execute_batch("PRAGMA synchronous = OFF; PRAGMA cache_size = -2048;")?;
            connection.query_row("SELECT born FROM store", [], |_| Ok(()))?;
            let identity = FILES.map(|suffix| identity_of(&path, suffix));
            Ok(Store { connection, path: path.clone(), identity, limit: 0, writes: 0 })
        };
        let mut opened = open();
        for _ in 0..5 {
            // Two that open it at once can be in each other's way.
            if !opened.as_ref().is_err_and(is_busy) {
                break;
            }
            opened = open();
        }
        let store = opened.map_err(|error| explain(&error, &path))?;
        store.check_version()?;
        Ok(store)
    }

    fn open_file(path: &Path, now: Position, limit: u64) -> rusqlite::Result<Store> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.set_prepared_statement_cache_capacity(64);
        // The last connection of all would checkpoint, and a fork closes them often.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        let pages = limit / 1024 * 3 / 2 + 1024;
        connection.execute_batch(&format!(
            "PRAGMA page_size = 1024;
             PRAGMA journal_mode = WAL;
             PRAGMA wal_autocheckpoint = 4000;
             PRAGMA synchronous = OFF;
             PRAGMA temp_store = MEMORY;
             PRAGMA cache_size = -2048;
             PRAGMA journal_size_limit = 4194304;
             PRAGMA max_page_count = {pages};"
        ))?;
        let version: i32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if version == 0 {
            connection.execute_batch(&format!(
                "BEGIN IMMEDIATE;
                 CREATE TABLE IF NOT EXISTS store (born INTEGER NOT NULL, trimmed INTEGER NOT NULL);
                 CREATE TABLE IF NOT EXISTS channel (key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
                     history INTEGER NOT NULL, floor INTEGER NOT NULL,
                     events INTEGER NOT NULL, bytes INTEGER NOT NULL);
                 CREATE TABLE IF NOT EXISTS event (id INTEGER PRIMARY KEY,
                     channel INTEGER NOT NULL, json INTEGER NOT NULL, has_data INTEGER NOT NULL,
                     frame TEXT NOT NULL, message TEXT);
                 CREATE INDEX IF NOT EXISTS event_of_channel ON event (channel);
                 CREATE TABLE IF NOT EXISTS listener (bell TEXT PRIMARY KEY) WITHOUT ROWID;
                 CREATE VIEW IF NOT EXISTS readable AS
                     SELECT (event.id >> {COUNTER_BITS}) || '-' || (event.id & {mask}) AS id,
                         datetime((event.id >> {COUNTER_BITS}) / 1000, 'unixepoch') AS utc,
                         channel.name AS channel, event.frame AS frame
                     FROM event JOIN channel ON channel.key = event.channel ORDER BY event.id;
                 INSERT INTO store VALUES ({now}, 0);
                 PRAGMA application_id = {APPLICATION};
                 PRAGMA user_version = {VERSION};
                 COMMIT;",
                mask = (1 << COUNTER_BITS) - 1,
                now = now.0,
            ))?;
        }
        let identity = FILES.map(|suffix| identity_of(path, suffix));
        Ok(Store { connection, path: path.to_owned(), identity, limit, writes: 0 })
    }

    fn check_version(&self) -> Result<()> {
        let number = |pragma| self.connection.query_row(pragma, [], |row| row.get::<_, i32>(0));
        let found = (number("PRAGMA application_id"), number("PRAGMA user_version"));
        match found {
            (Ok(APPLICATION), Ok(VERSION)) => Ok(()),
            (_, version) => Err(Error::Bus(format!(
                "the store {} was written by another version of sse_channel (layout {}, this one \
                 knows {VERSION}): stop the project's processes, delete the file, and start them",
                self.path.display(),
                version.map_or_else(|_| "unknown".to_owned(), |version| version.to_string()),
            ))),
        }
    }

    /// Whether the files that were opened are still those that others would open.
    pub fn is_current(&self) -> bool {
        FILES.iter().zip(self.identity).all(|(suffix, own)| identity_of(&self.path, suffix) == own)
    }

    /// Whether the database is still the one that others would open: what can be asked at every
    /// publish. Each look at a file costs.
    pub fn is_there(&self) -> bool {
        self.identity.first() == Some(&identity_of(&self.path, ""))
    }

    /// Whether the database is the one that was opened, but without its log or its index: then
    /// nobody knows what it lost. Needs the file lock.
    pub fn is_torn(&self) -> bool {
        self.is_there() && !self.is_current()
    }

    /// Takes a damaged file out of the way, so that the next to open the store makes another.
    ///
    /// # Errors
    /// `Bus` when the file cannot be moved.
    pub fn put_aside(&self) -> Result<()> {
        if self.is_there() { put_aside(&self.path) } else { Ok(()) }
    }

    /// Says what an error of SQLite means for the caller.
    pub fn explain(&self, error: &rusqlite::Error) -> Error {
        explain(error, &self.path)
    }

    /// Orders and stores the publications in one transaction, after everything that is stored and
    /// after `known`. Needs the file lock.
    ///
    /// # Errors
    /// When nothing was stored.
    pub fn write<'a>(
        &mut self,
        publications: impl IntoIterator<Item = &'a Publication>,
        known: Position,
        now: Position,
        limits: Limits,
        dead_bells: &[String],
        waits: bool,
    ) -> rusqlite::Result<Written> {
        self.writes = self.writes.wrapping_add(1);
        // The bounds of the whole need no look at every event.
        let looks_at_all = self.writes % CHECK_EVERY == 1;
        let mut untidy = Untidy { looks_at_all, ..Untidy::default() };
        let transaction = self.begin(waits)?;
        let before = newest(&transaction)?.max(known);
        let mut last = before;
        let mut positions = Vec::new();
        {
            let mut channel = transaction.prepare_cached(
                "INSERT INTO channel (name, history, floor, events, bytes)
                 VALUES (?1, ?2, (SELECT born FROM store), 1, ?3)
                 ON CONFLICT (name) DO UPDATE SET history = max(history, excluded.history),
                     events = events + 1, bytes = bytes + excluded.bytes
                 RETURNING key, history, events, bytes",
            )?;
            let mut event = transaction.prepare_cached(
                "INSERT INTO event (id, channel, json, has_data, frame, message)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            for Publication { channel: name, history, body, format, .. } in publications {
                last = last.next().max(now);
                let message = body.beside();
                let text = body.frame().len() + message.map_or(0, <[u8]>::len);
                let bytes = i64::try_from(text).unwrap_or(i64::MAX).saturating_add(OVERHEAD);
                let history = i64::try_from(*history).unwrap_or(i64::MAX);
                let (key, history, events, kept): (i64, i64, i64, i64) = channel
                    .query_row(params![&**name, history, bytes], |row| {
                        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
                    })?;
                event.execute(params![
                    last.0,
                    key,
                    *format == Format::Json,
                    body.has_data(),
                    text_of(body.frame()),
                    message.map(text_of),
                ])?;
                let kept = Kept { key, history: history.max(FEWEST), events, bytes: kept };
                if kept.is_too_large(limits) || kept.has_too_many(&transaction, now)? {
                    untidy.channels.retain(|other| other.key != key);
                    untidy.channels.push(kept);
                }
                positions.push(last);
            }
            if !dead_bells.is_empty() {
                let mut gone =
                    transaction.prepare_cached("DELETE FROM listener WHERE bell = ?1")?;
                for bell in dead_bells {
                    gone.execute([bell])?;
                }
            }
        }
        let bells = transaction
            .prepare_cached("SELECT bell FROM listener")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        transaction.commit()?;
        untidy.first = positions.first().copied().unwrap_or(last);
        let untidy = (looks_at_all || !untidy.channels.is_empty()).then_some(untidy);
        Ok(Written { before, positions, bells, untidy })
    }

    /// Forgets what is too much, in a transaction of its own, so that nobody waits for it to get an
    /// event. Needs the file lock, still the one of `write`.
    ///
    /// # Errors
    /// When nothing was forgotten; a later publish tries again.
    pub fn tidy(&mut self, untidy: &Untidy, now: Position, limits: Limits) -> rusqlite::Result<()> {
        let limit = i64::try_from(self.limit).unwrap_or(i64::MAX);
        let transaction = self.begin(false)?;
        for kept in &untidy.channels {
            trim(&transaction, kept, untidy.first, now, limits)?;
        }
        if untidy.looks_at_all {
            forget_before(&transaction, Position(now.0 - Position::at(limits.age).0))?;
            let total = total(&transaction)?;
            if total > limit {
                forget_oldest(&transaction, total - limit / 8 * 7)?;
            }
        }
        transaction.commit()
    }

    /// Begins a transaction that writes. Who has the file lock waits for other programs only, and
    /// only if it `waits`.
    fn begin(&mut self, waits: bool) -> rusqlite::Result<Transaction<'_>> {
        self.connection.busy_timeout(if waits { BUSY } else { Duration::ZERO })?;
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(Transaction(&self.connection))
    }

    /// Forgets an eighth of all events, the oldest, because nothing more fits. Needs the file lock.
    ///
    /// # Errors
    /// When not even that can be done.
    pub fn make_room(&mut self) -> rusqlite::Result<()> {
        let transaction = self.begin(true)?;
        let total = total(&transaction)?;
        forget_oldest(&transaction, total / 8 + 1)?;
        transaction.commit()
    }

    /// Adds a bell to those that publishers ring; every later event rings it. Gives the newest
    /// event. Needs the file lock.
    ///
    /// # Errors
    /// When nothing was stored.
    pub fn attach(&mut self, bell: &str) -> rusqlite::Result<Position> {
        let transaction = self.begin(true)?;
        transaction.execute("INSERT OR IGNORE INTO listener VALUES (?1)", [bell])?;
        let position = newest(&transaction)?;
        transaction.commit()?;
        Ok(position)
    }

    /// Takes a bell away. Needs the file lock.
    ///
    /// # Errors
    /// When it is still there.
    pub fn detach(&mut self, bell: &str) -> rusqlite::Result<()> {
        self.connection.busy_timeout(BUSY)?;
        self.connection.execute("DELETE FROM listener WHERE bell = ?1", [bell]).map(drop)
    }

    /// Up to `count` events after `position`.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn after(&mut self, position: Position, count: usize) -> rusqlite::Result<Read> {
        let snapshot = self.connection.transaction()?;
        let (trimmed, born): (i64, i64) = snapshot
            .prepare_cached("SELECT trimmed, born FROM store")?
            .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let mut read = Read { position, forgotten: Position(born), ..Read::default() };
        if trimmed.max(born) > position.0 {
            let mut floors =
                snapshot.prepare_cached("SELECT name, floor FROM channel WHERE floor > ?1")?;
            let gap = |row: &Row<'_>| {
                Ok((row.get::<_, String>(0)?.into(), Position(row.get::<_, i64>(1)?)))
            };
            read.gaps = floors.query_map([position.0], gap)?.collect::<rusqlite::Result<_>>()?;
        }
        if born > position.0 {
            // Of the same moment: one that is published to now has a row that says nothing of this.
            let mut names = snapshot.prepare_cached("SELECT name FROM channel")?;
            read.known = names.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        }
        {
            let mut events = snapshot.prepare_cached(
                "SELECT event.id, channel.name, json, has_data, frame, message
                 FROM event JOIN channel ON channel.key = event.channel
                 WHERE event.id > ?1 ORDER BY event.id LIMIT ?2",
            )?;
            let limit = i64::try_from(count).unwrap_or(i64::MAX);
            let mut rows = events.query(params![position.0, limit])?;
            let mut seen = 0;
            while let Some(row) = rows.next()? {
                seen += 1;
                read.position = Position(row.get(0)?);
                read.arrivals.extend(arrival(row)?);
            }
            read.is_full = seen == count;
        }
        snapshot.commit()?;
        Ok(read)
    }

    /// What is before this was never in the store, or is forgotten of channels without a row.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn born(&self) -> rusqlite::Result<Position> {
        self.connection
            .prepare_cached("SELECT born FROM store")?
            .query_row([], |row| row.get(0).map(Position))
    }

    /// The newest `count` events of a channel up to `position`, and what they come after.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn history(
        &mut self,
        name: &str,
        position: Position,
        count: usize,
    ) -> rusqlite::Result<(Position, Vec<Arrival>)> {
        let snapshot = self.connection.transaction()?;
        let channel: Option<(i64, i64)> = snapshot
            .prepare_cached("SELECT key, floor FROM channel WHERE name = ?1")?
            .query_row([name], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some((key, floor)) = channel else {
            let born = snapshot.query_row("SELECT born FROM store", [], |row| row.get(0))?;
            return Ok((Position(born), Vec::new()));
        };
        let mut arrivals = Vec::new();
        let mut floor = Position(floor);
        {
            let mut events = snapshot.prepare_cached(
                "SELECT event.id, ?2, json, has_data, frame, message FROM event
                 WHERE channel = ?1 AND event.id <= ?3 ORDER BY event.id DESC LIMIT ?4",
            )?;
            // One more tells what the last of them comes after.
            let limit = i64::try_from(count).unwrap_or(i64::MAX).saturating_add(1);
            let mut rows = events.query(params![key, name, position.0, limit])?;
            while let Some(row) = rows.next()? {
                if arrivals.len() == count {
                    floor = Position(row.get(0)?);
                    break;
                }
                arrivals.extend(arrival(row)?);
            }
        }
        arrivals.reverse();
        snapshot.commit()?;
        Ok((floor, arrivals))
    }
}

fn newest(connection: &Connection) -> rusqlite::Result<Position> {
    // What was handed out, also when it is forgotten already.
    let mut newest = connection.prepare_cached(
        "SELECT max((SELECT max(born, trimmed) FROM store), coalesce((SELECT max(id) FROM event), 0))",
    )?;
    newest.query_row([], |row| row.get(0)).map(Position)
}

/// What a channel has, and how much of it should be.
#[derive(Debug)]
struct Kept {
    key: i64,
    history: i64,
    events: i64,
    bytes: i64,
}

impl Kept {
    fn is_too_large(&self, limits: Limits) -> bool {
        self.bytes > i64::try_from(limits.bytes).unwrap_or(i64::MAX)
    }

    /// Whether there are too many that are not so young that a slow process may not have read them.
    /// Not at every event: a channel keeps up to an eighth more than it must.
    fn has_too_many(&self, connection: &Connection, now: Position) -> rusqlite::Result<bool> {
        if self.events <= self.history.saturating_add(self.history / 8) {
            return Ok(false);
        }
        let oldest: i64 = connection
            .prepare_cached("SELECT min(id) FROM event WHERE channel = ?1")?
            .query_row([self.key], |row| row.get(0))?;
        Ok(oldest < young(now).0 - Position::at(YOUNG / 100).0)
    }
}

/// Where the events begin that are too young to be forgotten.
fn young(now: Position) -> Position {
    Position(now.0 - Position::at(YOUNG).0)
}

/// Forgets the oldest events of a channel, not many at once: old ones that are too many, or whatever
/// is too large.
///
/// What is at `first` or after it was just written.
fn trim(
    connection: &Connection,
    kept: &Kept,
    first: Position,
    now: Position,
    limits: Limits,
) -> rusqlite::Result<()> {
    let Kept { key, history, events, .. } = *kept;
    let (surplus, before) = if kept.is_too_large(limits) {
        ((events / 8).clamp(1, MOST_FREED), first)
    } else {
        ((events - history).min(MOST_TRIMMED), young(now))
    };
    let (count, freed, floor): (i64, i64, Option<i64>) = connection
        .prepare_cached(
            "SELECT count(*), coalesce(sum(bytes), 0), max(id) FROM (
                 SELECT id, length(CAST(frame AS BLOB)) + coalesce(length(CAST(message AS BLOB)), 0)
                     + ?4 AS bytes
                 FROM event WHERE channel = ?1 AND id < ?2 ORDER BY id LIMIT ?3)",
        )?
        .query_row(params![key, before.0, surplus, OVERHEAD], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    let Some(floor) = floor else { return Ok(()) };
    connection
        .prepare_cached("DELETE FROM event WHERE channel = ?1 AND id <= ?2")?
        .execute([key, floor])?;
    lower(connection, key, count, freed, floor)
}

/// Notes on a channel what was forgotten of it.
fn lower(
    connection: &Connection,
    key: i64,
    count: i64,
    bytes: i64,
    floor: i64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE channel SET events = events - ?2, bytes = bytes - ?3, floor = max(floor, ?4)
             WHERE key = ?1",
        )?
        .execute([key, count, bytes, floor])?;
    connection.prepare_cached("UPDATE store SET trimmed = max(trimmed, ?1)")?.execute([floor])?;
    Ok(())
}

/// Bytes of all events.
fn total(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT coalesce(sum(bytes), 0) FROM channel")?
        .query_row([], |row| row.get(0))
}

/// Forgets what is older than `oldest`.
fn forget_before(connection: &Connection, oldest: Position) -> rusqlite::Result<()> {
    let first: Option<i64> =
        connection.prepare_cached("SELECT min(id) FROM event")?.query_row([], |row| row.get(0))?;
    match first {
        // Once a second is often enough.
        Some(first) if first < oldest.0 - Position::at(1000).0 => {
            forget_until(connection, oldest.0 - 1)?;
            // A channel without events needs no row, as long as what it forgot stays known.
            connection.execute(
                "UPDATE store SET born = max(born, coalesce(
                     (SELECT max(floor) FROM channel WHERE events = 0 AND floor < ?1), 0))",
                [oldest.0],
            )?;
            connection
                .execute("DELETE FROM channel WHERE events = 0 AND floor < ?1", [oldest.0])
                .map(drop)
        }
        _ => Ok(()),
    }
}

/// Forgets the oldest events of all channels until `bytes` are freed.
fn forget_oldest(connection: &Connection, bytes: i64) -> rusqlite::Result<()> {
    let mut freed = 0;
    while freed < bytes {
        let last: Option<i64> = connection
            .prepare_cached("SELECT max(id) FROM (SELECT id FROM event ORDER BY id LIMIT 64)")?
            .query_row([], |row| row.get(0))?;
        let Some(last) = last else { break };
        freed += forget_until(connection, last)?;
    }
    Ok(())
}

fn forget_until(connection: &Connection, last: i64) -> rusqlite::Result<i64> {
    let gone: Vec<(i64, i64, i64, i64)> = connection
        .prepare_cached(
            "SELECT channel, count(*), max(id),
                 sum(length(CAST(frame AS BLOB)) + coalesce(length(CAST(message AS BLOB)), 0) + ?2)
             FROM event WHERE id <= ?1 GROUP BY channel",
        )?
        .query_map([last, OVERHEAD], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    connection.prepare_cached("DELETE FROM event WHERE id <= ?1")?.execute([last])?;
    let mut freed = 0;
    for (key, count, floor, bytes) in gone {
        lower(connection, key, count, bytes, floor)?;
        freed += bytes;
    }
    Ok(freed)
}

/// An event out of its row; `None` for one that no version of ours has written.
fn arrival(row: &Row<'_>) -> rusqlite::Result<Option<Arrival>> {
    let id = EventId::from(Position(row.get(0)?));
    let channel: Arc<str> = row.get_ref(1)?.as_str()?.into();
    let format = if row.get(2)? { Format::Json } else { Format::Text };
    let message = row.get_ref(5)?.as_bytes_or_null()?;
    let body = Body::restore(row.get_ref(4)?.as_bytes()?, message, row.get(3)?);
    Ok(body.map(|body| Arrival { channel, id, body, format }))
}

/// Frames are made from `str`: never lossy.
fn text_of(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn identity_of(path: &Path, suffix: &str) -> Option<Identity> {
    // Not opened: closing it would give back SQLite's own locks on it.
    let found = if suffix.is_empty() {
        std::fs::symlink_metadata(path)
    } else {
        std::fs::symlink_metadata(with_suffix(path, suffix))
    };
    found.ok().map(|found| (found.dev(), found.ino()))
}

fn store_path(directory: &Path) -> PathBuf {
    directory.join(format!("events-{VERSION}.sqlite3"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn put_aside(path: &Path) -> Result<()> {
    // One is kept, to look at.
    let aside = path.with_file_name("broken.sqlite3");
    std::fs::rename(path, aside).map_err(|error| {
        Error::Bus(format!(
            "the store {} is damaged and cannot be put aside: {error}; delete it",
            path.display()
        ))
    })?;
    remove_log(path);
    Ok(())
}

fn remove_log(path: &Path) {
    for suffix in &FILES[1..] {
        // It is gone already, or belongs to nothing any more.
        let _ = std::fs::remove_file(with_suffix(path, suffix));
    }
}

/// Whether nothing more fits.
pub fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
}

/// Whether another program is at it.
pub fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// Whether the file is no database, or not a whole one.
pub fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

fn explain(error: &rusqlite::Error, path: &Path) -> Error {
    let shown = path.display();
    let advice = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => {
            "the file system is full: make room there, or name another directory: BUS = \
             \"local:///a/directory\""
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            "make it and its directory writable for this user, or name another directory: BUS = \
             \"local:///a/directory\""
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another program holds it locked for too long, an open transaction in a shell perhaps"
        }
        Some(ErrorCode::SystemIoFailure) => {
            "the file system failed, for want of room perhaps: look there, or name another \
             directory: BUS = \"local:///a/directory\""
        }
        _ => "stop the project's processes, delete the file, and start them",
    };
    Error::Bus(format!("the store {shown} cannot be used: {error}; {advice}"))
}
