//! The load generator of `benches/streams.py`, and the floor that all servers are held against.
//!
//! `load clients ADDRESS PATH COUNT [BUFFER [EVENTS]]` opens COUNT streams from one epoll loop, each
//! with a receive buffer of BUFFER bytes (0 for the system's), that get EVENTS at once; then it does
//! what lines on standard input say, and answers each with a line of JSON:
//!
//! - `expect K`: wait until every client has K more events. Each event's data has `"n":` (0, 1, 2, …
//!   for each client, which is checked) and `"t":` (nanoseconds of CLOCK_MONOTONIC at its publish
//!   call); the answer has the quantiles of the delay until the read, and when the last one came.
//! - `stop N`: from now on read nothing from the first N clients.
//! - `count`: how many are connected.
//!
//! `load follow ADDRESS CHURN PATH=COUNT…` is for `scripts/soak.py`: clients that leave, CHURN a second,
//! come back as browsers do, and check that they get each event once and in order over all of their
//! connections (`follow.rs`). Events have `"p":`, who published them, `"n":`, its number among theirs,
//! and `"t":`. It answers to `figures`, and to `finish`, after which nobody leaves or stops reading.
//!
//! `load floor PORT` is a server that does nothing but `send()` to one socket after the other when
//! told `publish FIRST COUNT`: no server of streams with one thread can be faster.

mod follow;
mod order;
mod received;

use std::collections::HashMap;
use std::error::Error;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

/// Connections that are being opened at one time.
const OPENING: usize = 64;

/// A run without a word from any server ends after this.
const PATIENCE_NS: u64 = 60_000_000_000;

const LINES: Token = Token(usize::MAX);
const LISTENER: Token = Token(usize::MAX - 1);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    raise_limit();
    match words[..] {
        ["clients", address, path, count] => {
            Clients::open(address.parse()?, path, count.parse()?, None)?.serve()
        }
        ["clients", address, path, count, buffer] => {
            Clients::open(address.parse()?, path, count.parse()?, Some(buffer.parse()?))?.serve()
        }
        ["clients", address, path, count, buffer, events] => {
            let (count, buffer) = (count.parse()?, buffer.parse()?);
            let mut clients = Clients::open(address.parse()?, path, count, Some(buffer))?;
            clients.expect(events.parse()?, 0, count);
            clients.serve()
        }
        ["follow", address, churn, ref groups @ ..] => {
            follow::Followers::new(address.parse()?, churn.parse()?, groups)?.serve()
        }
        ["floor", port] => floor(port.parse()?),
        _ => Err("usage: load clients ADDRESS PATH COUNT [BUFFER [EVENTS]] | load floor PORT | \
                  load follow ADDRESS CHURN PATH=COUNT…"
            .into()),
    }
}

fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What is not allowed shows when the descriptors run out.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Nanoseconds of CLOCK_MONOTONIC, as Python's `time.monotonic_ns()`.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Lines of standard input, told to `poll` by a waker.
fn lines(poll: &Poll) -> io::Result<Receiver<String>> {
    let waker = Waker::new(poll.registry(), LINES)?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(io::Result::ok) {
            if sender.send(line).is_err() || waker.wake().is_err() {
                return;
            }
        }
        drop(sender);
        let _ = waker.wake();
    });
    Ok(receiver)
}

struct Client {
    stream: TcpStream,
    phase: Phase,
    /// A line that is not whole yet.
    line: Vec<u8>,
    /// Events received.
    events: u64,
    reads: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Connecting,
    Asked,
    Open,
    Closed,
}

struct Clients {
    poll: Poll,
    clients: Vec<Client>,
    lines: Receiver<String>,
    address: SocketAddr,
    request: Vec<u8>,
    wanted: usize,
    buffer: Option<usize>,
    opening: usize,
    open: usize,
    failures: HashMap<String, u64>,
    expected: Option<Expected>,
}

/// What an `expect` waits for.
struct Expected {
    events: u64,
    missing: usize,
    delays: Vec<u64>,
    begun: u64,
    last: u64,
    heard: u64,
}

impl Clients {
    fn open(
        address: SocketAddr,
        path: &str,
        wanted: usize,
        buffer: Option<usize>,
    ) -> Result<Clients> {
        let poll = Poll::new()?;
        let lines = lines(&poll)?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/event-stream\r\n\r\n");
        Ok(Clients {
            poll,
            clients: Vec::with_capacity(wanted),
            lines,
            address,
            request: request.into_bytes(),
            wanted,
            buffer,
            opening: 0,
            open: 0,
            failures: HashMap::new(),
            expected: None,
        })
    }

    fn serve(mut self) -> Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 64 << 10];
        let begun = now();
        let mut is_told = false;
        loop {
            while self.opening < OPENING && self.clients.len() < self.wanted {
                self.connect()?;
            }
            if !is_told && self.clients.len() == self.wanted && self.opening == 0 {
                is_told = true;
                let seconds = (now() - begun) as f64 / 1e9;
                println!(
                    "{{\"open\":{},\"seconds\":{seconds:.3},\"failures\":{:?}}}",
                    self.open, self.failures
                );
            }
            if let Err(error) = self.poll.poll(&mut events, Some(Duration::from_millis(500)))
                && error.kind() != ErrorKind::Interrupted
            {
                return Err(error.into());
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
            self.answer();
        }
    }

    fn connect(&mut self) -> Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        if let Some(bytes) = self.buffer.filter(|bytes| *bytes > 0) {
            rustix::net::sockopt::set_socket_recv_buffer_size(&stream, bytes)?;
        }
        let token = Token(self.clients.len());
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, token, both)?;
        let phase = Phase::Connecting;
        self.clients.push(Client { stream, phase, line: Vec::new(), events: 0, reads: true });
        self.opening += 1;
        Ok(())
    }

    fn fail(&mut self, at: usize, why: impl Into<String>) {
        let client = &mut self.clients[at];
        match client.phase {
            Phase::Closed => return,
            Phase::Open => self.open -= 1,
            Phase::Connecting | Phase::Asked => self.opening -= 1,
        }
        client.phase = Phase::Closed;
        *self.failures.entry(why.into()).or_default() += 1;
        if let Some(expected) = &mut self.expected {
            expected.missing = expected.missing.saturating_sub(1);
        }
    }

    fn advance(&mut self, at: usize, buffer: &mut [u8]) {
        let client = &mut self.clients[at];
        if client.phase == Phase::Connecting {
            if client.stream.peer_addr().is_err() {
                if let Ok(Some(error)) = client.stream.take_error() {
                    self.fail(at, error.kind().to_string());
                }
                return;
            }
            // A request fits into any socket's buffer.
            if let Err(error) = client.stream.write_all(&self.request) {
                return self.fail(at, error.kind().to_string());
            }
            client.phase = Phase::Asked;
        }
        while self.clients[at].reads && self.clients[at].phase != Phase::Closed {
            match self.clients[at].stream.read(buffer) {
                Ok(0) => self.fail(at, "ended"),
                Ok(count) => self.take(at, &buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => self.fail(at, error.kind().to_string()),
            }
        }
    }

    fn take(&mut self, at: usize, mut bytes: &[u8]) {
        let read_at = now();
        if self.clients[at].phase == Phase::Asked {
            self.clients[at].phase = Phase::Open;
            self.opening -= 1;
            self.open += 1;
            if !bytes.starts_with(b"HTTP/1.1 200") {
                let status = String::from_utf8_lossy(&bytes[..bytes.len().min(24)]).into_owned();
                return self.fail(at, status);
            }
        }
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            bytes = rest;
            let client = &mut self.clients[at];
            let mut whole = std::mem::take(&mut client.line);
            let line = if whole.is_empty() {
                line
            } else {
                whole.extend_from_slice(line);
                &whole
            };
            let Some(json) = line.strip_prefix(b"data:") else { continue };
            let (Some(n), Some(sent)) = (field(json, b"\"n\":"), field(json, b"\"t\":")) else {
                continue;
            };
            if n != client.events {
                let why = format!("event {n} instead of {}", client.events);
                return self.fail(at, why);
            }
            client.events += 1;
            if let Some(expected) = &mut self.expected {
                expected.delays.push(read_at.saturating_sub(sent));
                expected.begun = expected.begun.min(sent);
                expected.last = read_at;
                expected.heard = read_at;
                expected.missing -= usize::from(client.events == expected.events);
            }
        }
        self.clients[at].line.extend_from_slice(bytes);
    }

    /// Waits for `more` events after `have` from each of `missing` clients.
    fn expect(&mut self, more: u64, have: u64, missing: usize) {
        let delays = Vec::with_capacity(missing * more as usize);
        let (begun, last, heard) = (u64::MAX, 0, now());
        self.expected = Some(Expected { events: have + more, missing, delays, begun, last, heard });
    }

    /// Does what standard input says; false at its end.
    fn obey(&mut self) -> bool {
        loop {
            let line = match self.lines.try_recv() {
                Ok(line) => line,
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return false,
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["expect", count] => {
                    let more: u64 = count.parse().unwrap_or(0);
                    let open = || self.clients.iter().filter(|c| c.phase == Phase::Open && c.reads);
                    let have = open().map(|client| client.events).next().unwrap_or(0);
                    let missing = open().count();
                    self.expect(more, have, missing);
                    println!("{{\"expecting\":{missing}}}");
                }
                ["stop", count] => {
                    let count = count.parse().unwrap_or(0);
                    self.clients.iter_mut().take(count).for_each(|client| client.reads = false);
                    println!("{{\"stopped\":{count}}}");
                }
                ["count"] => {
                    println!("{{\"open\":{},\"failures\":{:?}}}", self.open, self.failures);
                }
                _ => println!("{{\"error\":\"what is {line:?}?\"}}"),
            }
        }
    }

    fn answer(&mut self) {
        let is_over = |expected: &Expected| {
            expected.missing == 0 || now().saturating_sub(expected.heard) > PATIENCE_NS
        };
        let Some(mut expected) = self.expected.take_if(|expected| is_over(expected)) else {
            return;
        };
        expected.delays.sort_unstable();
        let quantile = |q: f64| {
            let at = (expected.delays.len() as f64 * q) as usize;
            let delay = expected.delays.get(at.min(expected.delays.len().saturating_sub(1)));
            delay.map_or(-1.0, |delay| *delay as f64 / 1e6)
        };
        println!(
            "{{\"missing\":{},\"deliveries\":{},\"first\":{:.3},\"p50\":{:.3},\"p90\":{:.3},\"p99\":{:.3},\
             \"max\":{:.3},\"begun\":{},\"last\":{},\"failures\":{:?}}}",
            expected.missing,
            expected.delays.len(),
            quantile(0.0),
            quantile(0.5),
            quantile(0.9),
            quantile(0.99),
            quantile(1.0),
            expected.begun,
            expected.last,
            self.failures,
        );
    }
}

/// The number that follows `name` in JSON.
fn field(json: &[u8], name: &[u8]) -> Option<u64> {
    let at = json.windows(name.len()).position(|window| window == name)? + name.len();
    let digits = json[at..].iter().skip_while(|byte| **byte == b' ');
    let mut found = None;
    for digit in digits.take_while(|byte| byte.is_ascii_digit()) {
        found = Some(found.unwrap_or(0u64) * 10 + u64::from(digit - b'0'));
    }
    found
}

fn floor(port: u16) -> Result<()> {
    let mut poll = Poll::new()?;
    let lines = lines(&poll)?;
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port)))?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut events = Events::with_capacity(64);
    let mut buffer = [0; 4096];
    println!("{{\"listening\":{port}}}");
    loop {
        poll.poll(&mut events, None)?;
        while let Ok((mut client, _)) = listener.accept() {
            client.set_nodelay(true)?;
            poll.registry().register(&mut client, Token(clients.len()), Interest::READABLE)?;
            clients.push(client);
        }
        for event in &events {
            let Some(client) = clients.get_mut(event.token().0) else { continue };
            if client.read(&mut buffer).is_ok_and(|count| count > 0) {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
                            Transfer-Encoding: chunked\r\n\r\n";
                client.write_all(head.as_bytes())?;
            }
        }
        loop {
            let line = match lines.try_recv() {
                Ok(line) => line,
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["publish", first, count] = words[..] else { continue };
            let (first, count): (u64, u64) = (first.parse()?, count.parse()?);
            for n in first..first + count {
                // As all servers send it: id, data, and the length of the chunk.
                let frame = format!(
                    "id: 1795512494275-{n}\ndata: {{\"n\":{n},\"t\":{},\"text\":\"{}\"}}\n\n",
                    now(),
                    "x".repeat(200)
                );
                let chunk = format!("{:x}\r\n{frame}\r\n", frame.len());
                for client in &mut clients {
                    // One that has left is no failure; one that misses an event says so itself.
                    let _ = client.write_all(chunk.as_bytes());
                }
            }
        }
    }
}
