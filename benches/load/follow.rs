//! Clients that stay for hours: they leave, come back as browsers do, and check what they get.
//!
//! Each client follows one path. Once a second some of them leave: by FIN, by RST, with one half of
//! the connection, or for good, in favour of one that begins anew. Those whose stream ends come
//! back when they were told to. Every tenth takes gzip; every hundredth stops reading now and then.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde_json::{Value, json};

use crate::order::{self, Id, Order};
use crate::received::{Event, Response};
use crate::{LINES, Result, field, lines, now};

const SECOND: u64 = 1_000_000_000;
/// Connections that are being opened at one time.
const OPENING: usize = 256;
/// For an answer to a request.
const PATIENCE: u64 = 60 * SECOND;
/// Until a browser comes back that was told nothing; also after a refusal.
const RETRY: u64 = SECOND;
/// A client that has ended its own half waits so long for the server's.
const HALF_CLOSED: u64 = 5 * SECOND;
/// Bytes that the system receives for a client that stops reading. Less than a packet of the
/// loopback's would have it wait for timers when it reads on.
const SLOW_BUFFER: usize = 128 << 10;

/// What is due for a client; the last is the connection that it is meant for.
type Due = (Reverse<u64>, usize, Task, u64);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Connect,
    Close,
    StopReading,
    ReadOn,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Away,
    Connecting,
    Asked,
    Open,
}

struct Client {
    path: usize,
    takes_gzip: bool,
    is_slow: bool,
    phase: Phase,
    stream: Option<TcpStream>,
    response: Response,
    /// How many connections it has had.
    connection: u64,
    reads: bool,
    /// It has ended its own half of the connection.
    is_half_closed: bool,
    /// The id of its last event, and where that is.
    last_event_id: Option<Vec<u8>>,
    cursor: Option<Id>,
    /// It was told that something is missing.
    was_reset: bool,
    /// Events that its place was moved over; lost, unless a reset follows.
    moved: u64,
    /// Of each publisher, the number of the next event: where events have no ids.
    next: Vec<(u64, u64)>,
    /// When it asked, was answered, and had bytes last.
    asked_at: u64,
    opened_at: u64,
    heard_at: u64,
}

struct Path {
    name: String,
    has_ids: bool,
    order: Order,
}

/// What is counted of all clients.
struct Counts {
    connections: u64,
    left: BTreeMap<&'static str, u64>,
    ended: u64,
    cut: u64,
    events: u64,
    bytes: u64,
    resets: u64,
    failures: BTreeMap<String, u64>,
    silence: u64,
    /// Microseconds until a request was answered, and from a publish to its receipt.
    opening: Histogram<u64>,
    delay: Histogram<u64>,
}

pub struct Followers {
    poll: Poll,
    lines: Receiver<String>,
    address: SocketAddr,
    /// Clients that leave in a second.
    churn: u64,
    paths: Vec<Path>,
    clients: Vec<Client>,
    due: BinaryHeap<Due>,
    /// Who will connect as soon as not too many do.
    waiting: VecDeque<usize>,
    opening: usize,
    counts: Counts,
    chance: fastrand::Rng,
    is_finishing: bool,
}

impl Followers {
    /// Clients of `groups`, each `PATH=COUNT`; `queue:PATH=COUNT` where events have no ids.
    pub fn new(address: SocketAddr, churn: u64, groups: &[&str]) -> Result<Followers> {
        let poll = Poll::new()?;
        let lines = lines(&poll)?;
        let mut paths = Vec::new();
        let mut clients = Vec::new();
        for group in groups {
            let (name, count) = group.rsplit_once('=').ok_or("a group is PATH=COUNT")?;
            let has_ids = !name.starts_with("queue:");
            let name = name.trim_start_matches("queue:").to_owned();
            for number in 0..count.parse()? {
                clients.push(Client::new(paths.len(), number));
            }
            paths.push(Path { name, has_ids, order: Order::default() });
        }
        let mut chance = fastrand::Rng::new();
        let mut waiting: Vec<usize> = (0..clients.len()).collect();
        chance.shuffle(&mut waiting);
        Ok(Followers {
            poll,
            lines,
            address,
            churn,
            paths,
            clients,
            due: BinaryHeap::new(),
            waiting: waiting.into(),
            opening: 0,
            counts: Counts {
                connections: 0,
                left: BTreeMap::new(),
                ended: 0,
                cut: 0,
                events: 0,
                bytes: 0,
                resets: 0,
                failures: BTreeMap::new(),
                silence: 0,
                opening: histogram()?,
                delay: histogram()?,
            },
            chance,
            is_finishing: false,
        })
    }

    pub fn serve(mut self) -> Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 64 << 10];
        let mut next_second = now() + SECOND;
        loop {
            while self.opening < OPENING
                && let Some(at) = self.waiting.pop_front()
            {
                self.connect(at);
            }
            let due = self.due.peek().map_or(u64::MAX, |(Reverse(due), ..)| *due);
            let pause = due.min(next_second).saturating_sub(now());
            match self.poll.poll(&mut events, Some(Duration::from_nanos(pause))) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
            for event in &events {
                if event.token() == LINES {
                    if !self.obey() {
                        return Ok(());
                    }
                } else {
                    self.advance(event.token().0, &mut buffer);
                }
            }
            while self.due.peek().is_some_and(|(Reverse(due), ..)| *due <= now()) {
                let Some((_, at, task, connection)) = self.due.pop() else { break };
                if self.clients[at].connection == connection {
                    self.perform(at, task, &mut buffer);
                }
            }
            if now() >= next_second {
                next_second += SECOND;
                self.look_after_all();
            }
        }
    }

    /// Does what standard input says; false at its end.
    fn obey(&mut self) -> bool {
        loop {
            match self.lines.try_recv().as_deref() {
                Ok("figures") => println!("{}", self.figures()),
                Ok("finish") => {
                    self.is_finishing = true;
                    for at in 0..self.clients.len() {
                        self.put_off(at, Task::ReadOn, 0);
                    }
                    println!("{}", self.figures());
                }
                Ok(line) => println!("{}", json!({"error": format!("what is {line:?}?")})),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Has `task` done after `pause` nanoseconds, if the client's connection is still this one.
    fn put_off(&mut self, at: usize, task: Task, pause: u64) {
        self.due.push((Reverse(now() + pause), at, task, self.clients[at].connection));
    }

    fn perform(&mut self, at: usize, task: Task, buffer: &mut [u8]) {
        match task {
            Task::Connect => self.waiting.push_back(at),
            Task::Close => self.away(at, RETRY),
            Task::StopReading if !self.is_finishing => {
                self.clients[at].reads = false;
                // The server gives up after 30 seconds, and not before.
                let pause = self.chance.u64(1..40 * SECOND);
                self.put_off(at, Task::ReadOn, pause);
            }
            Task::StopReading => {}
            Task::ReadOn => {
                self.clients[at].reads = true;
                if self.clients[at].phase == Phase::Open {
                    if self.clients[at].is_slow && !self.is_finishing {
                        let pause = self.chance.u64(SECOND..30 * SECOND);
                        self.put_off(at, Task::StopReading, pause);
                    }
                    self.advance(at, buffer);
                }
            }
        }
    }

    fn connect(&mut self, at: usize) {
        let client = &mut self.clients[at];
        client.connection += 1;
        client.response = Response::default();
        client.is_half_closed = false;
        client.reads = true;
        client.next.clear();
        client.asked_at = now();
        client.phase = Phase::Connecting;
        self.opening += 1;
        let registry = self.poll.registry();
        let is_slow = client.is_slow;
        let opened = TcpStream::connect(self.address).and_then(|mut stream| {
            if is_slow {
                rustix::net::sockopt::set_socket_recv_buffer_size(&stream, SLOW_BUFFER)?;
            }
            registry.register(&mut stream, Token(at), Interest::READABLE | Interest::WRITABLE)?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => client.stream = Some(stream),
            Err(error) => self.fail(at, error.to_string()),
        }
    }

    /// Its connection is over; it comes back after a pause.
    fn away(&mut self, at: usize, pause: u64) {
        let client = &mut self.clients[at];
        if matches!(client.phase, Phase::Connecting | Phase::Asked) {
            self.opening -= 1;
        }
        client.phase = Phase::Away;
        client.stream = None;
        self.put_off(at, Task::Connect, pause);
    }

    fn fail(&mut self, at: usize, why: String) {
        *self.counts.failures.entry(why).or_default() += 1;
        self.away(at, RETRY);
    }

    fn advance(&mut self, at: usize, buffer: &mut [u8]) {
        let client = &mut self.clients[at];
        let Some(stream) = &mut client.stream else { return };
        if client.phase == Phase::Connecting {
            if stream.peer_addr().is_err() {
                if let Ok(Some(error)) = stream.take_error() {
                    self.fail(at, error.to_string());
                }
                return;
            }
            let path = &self.paths[client.path];
            let mut request = format!(
                "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\n",
                path.name, self.address
            );
            if client.takes_gzip {
                request += "Accept-Encoding: gzip\r\n";
            }
            if let Some(id) = client.last_event_id.as_ref().filter(|_| path.has_ids) {
                request += &format!("Last-Event-ID: {}\r\n", String::from_utf8_lossy(id));
            }
            // A request fits into any socket's buffer.
            if let Err(error) = stream.write_all(format!("{request}\r\n").as_bytes()) {
                return self.fail(at, error.to_string());
            }
            client.phase = Phase::Asked;
        }
        while self.clients[at].reads {
            let Some(stream) = &mut self.clients[at].stream else { return };
            match stream.read(buffer) {
                Ok(0) => return self.ended(at, None),
                Ok(count) => {
                    if let Err(why) = self.take(at, &buffer[..count]) {
                        return self.fail(at, why);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.ended(at, Some(error.to_string())),
            }
        }
    }

    /// The server has ended the connection.
    fn ended(&mut self, at: usize, error: Option<String>) {
        let client = &self.clients[at];
        if !client.response.has_begun() {
            return self.fail(at, error.unwrap_or_else(|| "no answer, and the end".into()));
        }
        if client.response.is_over() {
            self.counts.ended += 1;
        } else if !client.is_half_closed {
            self.counts.cut += 1;
        }
        let pause = client.response.retry().map_or(RETRY, |retry| retry * 1_000_000);
        self.away(at, pause);
    }

    fn take(&mut self, at: usize, bytes: &[u8]) -> std::result::Result<(), String> {
        let read_at = now();
        let client = &mut self.clients[at];
        let Path { order, has_ids, .. } = &mut self.paths[client.path];
        let counts = &mut self.counts;
        counts.bytes += bytes.len() as u64;
        if client.phase == Phase::Open && !client.is_slow {
            counts.silence = counts.silence.max(read_at.saturating_sub(client.heard_at));
        }
        client.heard_at = read_at;
        let mut failure = None;
        let mut response = std::mem::take(&mut client.response);
        let taken = response.take(bytes, &mut |event| {
            // After the head: what was published before may be late for that alone.
            let opened_at = if client.phase == Phase::Open { client.opened_at } else { read_at };
            if let Some(sent) = field(event.data, b"\"t\":")
                && sent > opened_at
                && !client.is_slow
            {
                counts.delay.saturating_record((read_at.saturating_sub(sent)) / 1000);
            }
            if event.kind == b"stream-reset" {
                counts.resets += 1;
            }
            counts.events += u64::from(!event.data.is_empty());
            if let Err(why) = client.take(event, order, *has_ids) {
                failure = Some(why);
            }
        });
        client.response = response;
        taken?;
        if let Some(why) = failure {
            return Err(why.into());
        }
        if client.phase == Phase::Asked && client.response.has_begun() {
            client.phase = Phase::Open;
            client.opened_at = read_at;
            self.opening -= 1;
            counts.connections += 1;
            counts.opening.saturating_record((read_at - client.asked_at) / 1000);
            if client.is_slow && !self.is_finishing {
                let pause = self.chance.u64(SECOND..30 * SECOND);
                self.put_off(at, Task::StopReading, pause);
            }
        }
        Ok(())
    }

    /// Once a second: some leave, and who waits for too long is noticed.
    fn look_after_all(&mut self) {
        let now = now();
        for at in 0..self.clients.len() {
            let client = &self.clients[at];
            match client.phase {
                Phase::Connecting | Phase::Asked if now - client.asked_at > PATIENCE => {
                    self.fail(at, "no answer within a minute".into());
                }
                Phase::Open if client.reads && !client.is_slow => {
                    let silence = now.saturating_sub(client.heard_at);
                    self.counts.silence = self.counts.silence.max(silence);
                }
                _ => {}
            }
        }
        if self.is_finishing || self.clients.is_empty() {
            return;
        }
        for _ in 0..self.churn {
            let at = self.chance.usize(..self.clients.len());
            self.leave(at);
        }
    }

    fn leave(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let Some(stream) = client.stream.as_mut().filter(|_| client.phase == Phase::Open) else {
            return;
        };
        let way = ["FIN", "RST", "half", "anew"][self.chance.usize(..4)];
        *self.counts.left.entry(way).or_default() += 1;
        if way == "half" {
            // Also when it fails: it is closed then.
            let _ = stream.shutdown(Shutdown::Write);
            client.is_half_closed = true;
            client.reads = true;
            return self.put_off(at, Task::Close, HALF_CLOSED);
        }
        if way == "RST" {
            let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
        if way == "anew" {
            client.last_event_id = None;
            client.cursor = None;
        }
        let pause = self.chance.u64(SECOND / 20..2 * SECOND);
        self.away(at, pause);
    }

    fn figures(&self) -> Value {
        let count = |phase| self.clients.iter().filter(|client| client.phase == phase).count();
        let quantiles = |histogram: &Histogram<u64>| {
            let quantile = |q| histogram.value_at_quantile(q) as f64 / 1000.0;
            json!({"p50": quantile(0.5), "p99": quantile(0.99), "max": quantile(1.0)})
        };
        let sum = |of: fn(&Order) -> u64| -> u64 { self.paths.iter().map(|p| of(&p.order)).sum() };
        // Events that clients have not got yet; who is not here has not got what comes, either.
        let behind: usize = self
            .clients
            .iter()
            .map(|client| {
                let path = &self.paths[client.path];
                match client.cursor {
                    _ if client.phase != Phase::Open => 1,
                    Some(cursor) if path.has_ids => path.order.behind(cursor),
                    _ => 0,
                }
            })
            .sum();
        let paths: serde_json::Map<String, Value> = self
            .paths
            .iter()
            .map(|path| {
                let publishers: BTreeMap<String, u64> =
                    path.order.counts().map(|(name, count)| (name.to_string(), count)).collect();
                let figures = json!({
                    "clients": self.clients.iter()
                        .filter(|client| self.paths[client.path].name == path.name).count(),
                    "has_ids": path.has_ids,
                    "events": path.order.len(),
                    "unnumbered": path.order.unnumbered,
                    "publishers": publishers,
                });
                (path.name.clone(), figures)
            })
            .collect();
        // While nobody is there, an event may be nobody's yet.
        let missing = if self.is_finishing { sum(Order::missing) } else { 0 };
        let complaints: Vec<&String> =
            self.paths.iter().flat_map(|path| &path.order.complaints).collect();
        json!({
            "open": count(Phase::Open),
            "connections": self.counts.connections,
            "left": self.counts.left,
            "ended": self.counts.ended,
            "cut": self.counts.cut,
            "failures": self.counts.failures,
            "events": self.counts.events,
            "bytes": self.counts.bytes,
            "lost": missing + sum(|order| order.lost),
            "doubled": sum(|order| order.doubled),
            "out_of_order": sum(|order| order.out_of_order),
            "complaints": complaints,
            "resets": self.counts.resets,
            "behind": behind,
            "silence": self.counts.silence as f64 / SECOND as f64,
            "opening": quantiles(&self.counts.opening),
            "delay": quantiles(&self.counts.delay),
            "paths": paths,
        })
    }
}

/// Of microseconds, up to ten minutes.
fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
}

impl Client {
    fn new(path: usize, number: usize) -> Client {
        Client {
            path,
            takes_gzip: number % 10 == 3,
            is_slow: number % 100 == 7,
            phase: Phase::Away,
            stream: None,
            response: Response::default(),
            connection: 0,
            reads: true,
            is_half_closed: false,
            last_event_id: None,
            cursor: None,
            was_reset: false,
            moved: 0,
            next: Vec::new(),
            asked_at: 0,
            opened_at: 0,
            heard_at: 0,
        }
    }

    /// Checks one event's place.
    fn take(
        &mut self,
        event: Event,
        order: &mut Order,
        has_ids: bool,
    ) -> std::result::Result<(), &'static str> {
        let publisher = field(event.data, b"\"p\":");
        let numbered = publisher.zip(field(event.data, b"\"n\":"));
        if !has_ids {
            if let Some((publisher, number)) = numbered {
                self.count(publisher, number, order);
            }
            return Ok(());
        }
        if event.kind == b"stream-reset" {
            self.was_reset = true;
            self.moved = 0;
            order.complain(String::from_utf8_lossy(event.data).into_owned());
            return Ok(());
        }
        let Some(text) = event.id else {
            // The first payload of a client, which is nobody's event.
            return if numbered.is_none() { Ok(()) } else { Err("an event without an id") };
        };
        let id = order::id(text).ok_or("an id that is none")?;
        self.last_event_id = Some(text.to_vec());
        self.cursor = Some(match self.cursor {
            // At the opening a client is told where it is.
            None if event.data.is_empty() => id,
            None => return Err("an event before the client's place"),
            // A place that is said again, or, with a reset behind it, one further on.
            Some(cursor) if event.data.is_empty() => {
                self.moved += order.behind(cursor).saturating_sub(order.behind(id)) as u64;
                id.max(cursor)
            }
            Some(cursor) => {
                let moved = std::mem::take(&mut self.moved);
                if moved > 0 {
                    order.lost += moved;
                    order.complain(format!("{moved} lost up to its opening at {cursor:?}"));
                }
                let may_skip = std::mem::take(&mut self.was_reset);
                order.take(cursor, id, numbered, may_skip)
            }
        });
        Ok(())
    }

    /// Checks the number of an event where there are no ids.
    fn count(&mut self, publisher: u64, number: u64, order: &mut Order) {
        let known = self.next.iter_mut().find(|(name, _)| *name == publisher);
        let Some((_, next)) = known else {
            self.next.push((publisher, number + 1));
            return;
        };
        let expected = std::mem::replace(next, number + 1);
        if number > expected {
            order.lost += number - expected;
        } else if number < expected {
            order.doubled += 1;
        } else {
            return;
        }
        order.complain(format!("{number} of {publisher} instead of {expected}"));
    }
}
