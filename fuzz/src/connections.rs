//! Offloaded connections beside a model of them: whatever clients do, each gets whole frames of its
//! channels, in order and once, in a body that can be read to its end.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use _sse_channel::clients::{Admission, Farewell, Holder};
use _sse_channel::coding::Coding;
use _sse_channel::event::{Draft, Format};
use _sse_channel::event_id::EventId;
use _sse_channel::frame::{self, Body, Fields, HEARTBEAT};
use _sse_channel::hub::{ChannelKey, Hub, Resume};
use _sse_channel::metrics::Reason;
use _sse_channel::offload::{Backlog, Form, Framing, Handover, Offload, Shard};
use _sse_channel::queue::{Client, Kind, Overflow};
use arbitrary::{Arbitrary, Unstructured};
use flate2::bufread::GzDecoder;
use mio::Events;
use socket2::SockRef;

const CHANNELS: usize = 3;
const MOST_CLIENTS: usize = 6;
const MOST_STEPS: usize = 200;

/// Bytes of all events together, so that an input takes milliseconds.
const MOST_PUBLISHED: usize = 80_000;

/// Bytes of an event; those of the largest are more than a piece takes with others.
const SIZES: [usize; 6] = [0, 10, 100, 1000, 9000, LARGEST];
const LARGEST: usize = 70_000;

/// So many events of the same length are not the same.
const DIFFERENT: usize = 997;

/// What every response begins with.
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";

/// Bytes that a client may send.
const MOST_UNREAD: usize = 64 << 10;

/// For so long a client may take nothing, though something waits.
const STALLED: Duration = Duration::from_secs(30);

/// After so long the end of everything is cut off.
const FAREWELL: Duration = Duration::from_secs(2);

/// Events of history that a connection is given at a time; who missed no more has them at once.
const STEP: usize = 64;

const RETRY: u64 = 1000;

#[derive(Arbitrary, Debug)]
enum Step {
    Publish {
        channel: u8,
        events: u8,
        size: u8,
        has_message: bool,
    },
    Connect(Wish),
    Turn,
    Read {
        client: u8,
        bytes: u16,
    },
    ReadAll {
        client: u8,
    },
    Send {
        client: u8,
        bytes: u16,
    },
    /// It closes its side.
    Finish {
        client: u8,
    },
    /// It closes all, with what it has not read.
    Vanish {
        client: u8,
    },
    Revoke {
        channel: Option<u8>,
        user: Option<u8>,
    },
    Pass {
        milliseconds: u16,
    },
    /// Everything comes to its end.
    End,
}

/// What a connection is to be like.
#[derive(Arbitrary, Debug)]
struct Wish {
    channels: u8,
    form: u8,
    overflow: u8,
    frames: u8,
    kilobytes: u8,
    heartbeat: u8,
    buffer: u8,
    user: u8,
    /// It resumes after the event of this number.
    after: Option<u8>,
}

struct Published {
    id: EventId,
    channel: usize,
    frame: Vec<u8>,
}

/// A client at the other end of its connection, and what it should have.
struct Peer {
    socket: Option<UnixStream>,
    got: Vec<u8>,
    /// The connection's end was read.
    is_over: bool,
    form: Form,
    limits: Backlog,
    has_heartbeat: bool,
    user: Arc<str>,
    channels: Vec<usize>,
    /// The first text of its body.
    opening: Vec<u8>,
    /// It is to get what comes after this, unless it lost some.
    after: EventId,
    /// Some of what it missed was forgotten: what it gets of that is not known.
    may_miss_until: EventId,
    /// It missed so many that it is given history by and by.
    is_behind: bool,
    /// Events that were published before it came.
    before: usize,
    sent: usize,
    /// It has closed its side, so that anything may be cut off.
    has_left: bool,
    /// How many events were published when its right was taken away.
    revoked: Option<usize>,
    /// Whether something may wait for it, and for how long it has certainly taken nothing.
    may_wait: bool,
    stalled: Duration,
    longest_stall: Duration,
    /// Everything was at its end for so long that it may have been cut off.
    was_hurried: bool,
    /// It has read all that there was, and nothing happened since.
    is_drained: bool,
    /// The connection has looked after that.
    was_served: bool,
}

/// A body as its client has it.
#[derive(Debug)]
struct Received {
    text: Vec<u8>,
    is_whole: bool,
}

/// Does what `bytes` say, and holds every connection to the model.
pub fn connections(bytes: &[u8]) {
    let mut given = Unstructured::new(bytes);
    let history = [0, 3, 100, 1000][given.int_in_range(0..=3).unwrap_or(0)];
    let mut world = World::new(history);
    for _ in 0..MOST_STEPS {
        if given.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut given) else { break };
        world.take(step);
    }
    world.settle();
    world.end();
    world.check();
}

struct World {
    hub: Arc<Hub>,
    keys: Vec<ChannelKey>,
    /// Events that a channel remembers.
    history: usize,
    offload: Offload,
    shard: Shard,
    events: Events,
    admission: Admission,
    published: Vec<Published>,
    bytes: usize,
    peers: Vec<Peer>,
    /// How many events were published when everything was ended.
    ended: Option<usize>,
    since_end: Duration,
    is_over: bool,
}

impl World {
    fn new(history: usize) -> World {
        let hub = Arc::new(Hub::default());
        let keys = ["a", "b", "c"].iter().map(|name| hub.channel(name, history)).collect();
        let (offload, shard) = Offload::by_hand().expect("there are descriptors");
        World {
            hub,
            keys,
            history,
            offload,
            shard,
            events: Events::with_capacity(64),
            admission: Admission::default(),
            published: Vec::new(),
            bytes: 0,
            peers: Vec::new(),
            ended: None,
            since_end: Duration::ZERO,
            is_over: false,
        }
    }

    fn peer(&mut self, at: u8) -> Option<&mut Peer> {
        let at = usize::from(at).checked_rem(self.peers.len())?;
        self.peers.get_mut(at)
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Publish { channel, events, size, has_message } => {
                let size = SIZES[usize::from(size) % SIZES.len()];
                for _ in 0..=events % 100 {
                    self.publish(usize::from(channel) % CHANNELS, size, has_message);
                }
            }
            Step::Connect(wish) => {
                if self.peers.len() < MOST_CLIENTS {
                    self.connect(&wish);
                }
            }
            Step::Turn => self.turn(),
            Step::Read { client, bytes } => {
                if let Some(peer) = self.peer(client) {
                    peer.read(bytes.into());
                }
            }
            Step::ReadAll { client } => {
                if let Some(peer) = self.peer(client) {
                    peer.read(usize::MAX);
                }
            }
            Step::Send { client, bytes } => {
                if let Some(peer) = self.peer(client)
                    && let Some(mut socket) = peer.socket.as_ref()
                {
                    peer.sent += socket.write(&vec![b'x'; bytes.into()]).unwrap_or(0);
                }
            }
            Step::Finish { client } => {
                if let Some(peer) = self.peer(client)
                    && let Some(socket) = &peer.socket
                {
                    // It may have been closed at the other end.
                    let _ = socket.shutdown(Shutdown::Write);
                    peer.has_left = true;
                }
            }
            Step::Vanish { client } => {
                if let Some(peer) = self.peer(client) {
                    peer.socket = None;
                    peer.has_left = true;
                }
            }
            Step::Revoke { channel, user } => self.revoke(channel, user),
            Step::Pass { milliseconds } => self.pass(milliseconds.into()),
            Step::End => self.begin_end(),
        }
    }

    fn publish(&mut self, channel: usize, size: usize, has_message: bool) {
        if self.bytes + size > MOST_PUBLISHED {
            return;
        }
        self.bytes += size;
        let number = self.published.len();
        let text = &noise()[number % DIFFERENT..][..size];
        let (fields, field) = if has_message {
            (Fields { data: Some(text), ..Fields::default() }, "data")
        } else {
            (Fields { comment: Some(text), ..Fields::default() }, "")
        };
        let body = Body::encode(&fields, 1 << 20).ok();
        let draft = Draft { body, format: Format::Text, has_message, decoded: None };
        let id = self.hub.publish(self.keys[channel], draft).expect("it has a wire form");
        let frame = format!("id: {id}\n{field}: {text}\n\n").into_bytes();
        self.published.push(Published { id, channel, frame });
        for peer in self.peers.iter_mut().filter(|peer| peer.channels.contains(&channel)) {
            peer.expect();
        }
    }

    fn connect(&mut self, wish: &Wish) {
        let chosen = (0..CHANNELS).filter(|at| wish.channels >> at & 1 == 1);
        let mut channels: Vec<usize> = chosen.collect();
        if channels.is_empty() {
            channels.push(0);
        }
        let keys: Vec<ChannelKey> = channels.iter().map(|at| self.keys[*at]).collect();
        let resume = match wish.after {
            None => Resume::Fresh,
            Some(at) => {
                let at = usize::from(at).checked_rem(self.published.len());
                at.map_or(Resume::Unknown, |at| Resume::After(self.published[at].id))
            }
        };
        let overflow = [Overflow::DropOldest, Overflow::DropNewest, Overflow::Disconnect];
        let limits = Backlog {
            frames: usize::from(wish.frames).max(1),
            bytes: usize::from(wish.kilobytes).max(1) << 10,
            overflow: overflow[usize::from(wish.overflow) % 3],
        };
        let client = Arc::new(Client::new(Kind::Stream, 1000, limits.overflow));
        let registered = self.hub.register(&client, &keys, resume, Box::new(()));
        let registered = registered.expect("it is new").expect("all is heard on this bus");
        let newest = self.hub.newest();
        let (after, may_miss_until) = match (resume, registered.gap) {
            (Resume::After(last), None) => (last, last),
            (Resume::After(last), Some(_)) => (last, newest),
            _ => (newest, newest),
        };
        let mut opening = frame::opening(RETRY, registered.cursor).to_vec();
        if let Some(gap) = registered.gap {
            opening.extend_from_slice(&frame::reset(gap.reason()));
        }
        let user: Arc<str> = ["ada", "bob"][usize::from(wish.user) % 2].into();
        let holder = Holder { user: Some(Arc::clone(&user)), ..Holder::default() };
        let slot = self.admission.take(None, holder).expect("there is no limit");
        let (own, theirs) = UnixStream::pair().expect("there are descriptors");
        own.set_nonblocking(true).expect("a socket can be that");
        let buffer = [0, 1 << 14, 1 << 18][usize::from(wish.buffer) % 3];
        SockRef::from(&theirs).set_send_buffer_size(buffer).expect("the least is taken for less");
        let form = Form::ALL[usize::from(wish.form) % Form::ALL.len()];
        let heartbeat = [None, Some(Duration::from_secs(1)), Some(Duration::from_secs(60))];
        let heartbeat = heartbeat[usize::from(wish.heartbeat) % 3];
        let taken = self.offload.take(Handover {
            hub: &self.hub,
            bus: None,
            client: &client,
            cursor: registered.cursor,
            fd: theirs.as_raw_fd(),
            instead: None,
            head: HEAD,
            body: &opening,
            form,
            backlog: limits,
            heartbeat,
            slot: Some(Arc::new(slot)),
            threads: 1,
        });
        if self.ended.is_some() {
            assert!(taken.is_err(), "nothing begins any more");
            self.hub.unregister(&client, Reason::Closed);
            return;
        }
        assert!(matches!(taken, Ok(true)), "{taken:?}");
        let its = |event: &&Published| channels.contains(&event.channel) && event.id > after;
        let is_behind = self.published.iter().filter(its).count() > STEP;
        self.peers.push(Peer {
            socket: Some(own),
            got: Vec::new(),
            is_over: false,
            form,
            limits,
            has_heartbeat: heartbeat.is_some(),
            user,
            channels,
            opening,
            after,
            may_miss_until,
            is_behind,
            before: self.published.len(),
            sent: 0,
            has_left: false,
            revoked: None,
            may_wait: true,
            stalled: Duration::ZERO,
            longest_stall: Duration::ZERO,
            was_hurried: false,
            is_drained: false,
            was_served: false,
        });
    }

    fn turn(&mut self) {
        if self.is_over {
            return;
        }
        self.is_over = !self.shard.turn(&mut self.events, Some(Duration::ZERO));
        for peer in &mut self.peers {
            if peer.is_drained && !peer.was_served {
                // What waited for it found room, this once: it reads no more meanwhile.
                peer.stalled = Duration::ZERO;
            }
            peer.was_served = peer.is_drained;
        }
    }

    fn pass(&mut self, milliseconds: u64) {
        let time = Duration::from_millis(milliseconds);
        self.shard.pass(time);
        if self.ended.is_some() {
            self.since_end += time;
        }
        if self.since_end >= FAREWELL {
            self.peers.iter_mut().for_each(|peer| peer.was_hurried = true);
        }
        for peer in self.peers.iter_mut().filter(|peer| peer.may_wait) {
            peer.stalled += time;
            peer.longest_stall = peer.longest_stall.max(peer.stalled);
        }
        self.turn();
        // A heartbeat may wait from now on, where those before it have filled the socket.
        self.peers.iter_mut().filter(|peer| peer.has_heartbeat).for_each(Peer::expect);
    }

    fn revoke(&mut self, channel: Option<u8>, user: Option<u8>) {
        let channel = channel.map(|at| usize::from(at) % CHANNELS);
        let user = user.map(|at| ["ada", "bob"][usize::from(at) % 2]);
        let name = channel.map(|at| ["a", "b", "c"][at]);
        let revoked = self.hub.revoke(name, user.map(Arc::from)).expect("it is known");
        self.offload.revoke(&Arc::new(revoked));
        let count = self.published.len();
        for peer in &mut self.peers {
            if channel.is_none_or(|at| peer.channels.contains(&at))
                && user.is_none_or(|user| *peer.user == *user)
            {
                peer.revoked.get_or_insert(count);
                peer.expect();
            }
        }
    }

    fn begin_end(&mut self) {
        if self.ended.is_none() {
            self.ended = Some(self.published.len());
            self.offload.end(&Arc::new(Farewell::new(RETRY, self.peers.len())));
            self.peers.iter_mut().for_each(Peer::expect);
        }
    }

    /// Everybody reads all that there is, until nothing more comes.
    fn settle(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            self.turn();
            let read: usize = self.peers.iter_mut().map(|peer| peer.read(usize::MAX)).sum();
            quiet = if read == 0 { quiet + 1 } else { 0 };
        }
        if self.ended.is_none() {
            let forgotten = self.forgotten();
            for peer in &self.peers {
                peer.check(&self.published, &forgotten, None, false);
            }
        }
    }

    /// Of each event, whether its channel has forgotten it.
    fn forgotten(&self) -> Vec<bool> {
        let mut newer = [0; CHANNELS];
        let of_one = |event: &Published| {
            newer[event.channel] += 1;
            newer[event.channel] > self.history
        };
        let mut forgotten: Vec<bool> = self.published.iter().rev().map(of_one).collect();
        forgotten.reverse();
        forgotten
    }

    /// Ends everything, and waits for it.
    fn end(&mut self) {
        self.begin_end();
        for _ in 0..20 {
            if !self.is_over {
                self.settle();
                self.pass(150);
            }
        }
        assert!(self.is_over, "the end comes");
        self.peers.iter_mut().map(|peer| peer.read(usize::MAX)).for_each(drop);
    }

    fn check(&self) {
        assert_eq!(self.offload.connections(), 0, "who is gone is not counted");
        // What is published at the end may be sent or not.
        let (mut missed, mut is_certain) = (0, self.ended == Some(self.published.len()));
        let forgotten = self.forgotten();
        for peer in &self.peers {
            assert!(peer.is_over || peer.has_left, "each is told of the end");
            let (its, is_all) = peer.check(&self.published, &forgotten, self.ended, true);
            missed += its;
            is_certain &= is_all;
        }
        let counters = self.keys.iter().filter_map(|key| self.hub.counters(*key));
        let dropped: u64 = counters.map(|its| its.snapshot().dropped()).sum();
        assert!(missed <= dropped, "{missed} are missing, {dropped} were counted");
        assert!(!is_certain || missed == dropped, "{dropped} were counted, {missed} are missing");
        for key in &self.keys {
            assert_eq!(self.hub.client_count(*key), 0, "the hub knows that they are gone");
        }
    }
}

impl Peer {
    /// Something is on its way to it.
    fn expect(&mut self) {
        self.may_wait = true;
        self.is_drained = false;
        self.was_served = false;
    }

    /// Reads up to so many bytes. Gives how many there were.
    fn read(&mut self, most: usize) -> usize {
        let Some(mut socket) = self.socket.as_ref() else { return 0 };
        let mut buffer = [0; 4096];
        let mut count = 0;
        while count < most && !self.is_over {
            let most = buffer.len().min(most - count);
            match socket.read(&mut buffer[..most]) {
                Ok(0) => self.is_over = true,
                Ok(read) => {
                    count += read;
                    // What has found room since may be all that there is room for.
                    self.is_drained = false;
                    self.was_served = false;
                    self.got.extend_from_slice(&buffer[..read]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if count == 0 && self.was_served {
                        self.may_wait = false;
                        self.stalled = Duration::ZERO;
                    }
                    self.is_drained = true;
                    break;
                }
                // Reset: it had sent something that nobody has read.
                Err(_) => self.is_over = true,
            }
        }
        count
    }

    /// Whether the connection may have ended in the middle of something.
    fn may_be_cut(&self, published: &[Published]) -> bool {
        let live = published[self.before..].iter();
        let sizes = live.filter(|event| self.channels.contains(&event.channel));
        let sizes: Vec<usize> = sizes.map(|event| event.frame.len() + 64).collect();
        // Heartbeats count as well.
        let is_much = sizes.len() > self.limits.frames
            || sizes.iter().sum::<usize>() + 1000 > self.limits.bytes;
        self.has_left
            || self.was_hurried
            || self.sent > MOST_UNREAD
            || self.longest_stall >= STALLED
            || (self.limits.overflow == Overflow::Disconnect && is_much)
    }

    /// What it got so far, without the head and what carries the body.
    fn received(&self) -> Received {
        let head = &self.got[..self.got.len().min(HEAD.len())];
        assert!(HEAD.starts_with(head), "the head comes first");
        let rest = &self.got[head.len()..];
        let (body, mut is_whole) = match self.form.framing {
            Framing::Chunked => unchunked(rest),
            Framing::UntilClose => (rest.to_vec(), self.is_over),
        };
        if self.form.coding == Coding::Identity {
            return Received { text: body, is_whole };
        }
        let mut text = Vec::new();
        let mut decoder = GzDecoder::new(body.as_slice());
        let decoded = decoder.read_to_end(&mut text);
        match decoded {
            Ok(_) => assert!(decoder.into_inner().is_empty(), "nothing follows the stream"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{error}");
                assert!(self.form.framing == Framing::UntilClose || !is_whole, "{error}");
                is_whole = false;
            }
        }
        Received { text, is_whole }
    }

    /// Holds what it got to the model. Gives how many events it certainly should have and has not,
    /// and whether that is all there is to know of it.
    fn check(
        &self,
        published: &[Published],
        forgotten: &[bool],
        ended: Option<usize>,
        is_final: bool,
    ) -> (u64, bool) {
        let Received { text, is_whole } = self.received();
        let may_be_cut = self.may_be_cut(published);
        // The end of a connection alone does not tell.
        let shows_its_end =
            self.form.framing == Framing::Chunked || self.form.coding == Coding::Gzip;
        let is_whole = is_whole && (shows_its_end || !may_be_cut || text.ends_with(b"\n\n"));
        if is_final || self.is_over {
            assert!(
                is_whole || may_be_cut,
                "cut off without a cause: {:?}, {:?}, stalled for {:?}, ends with {:?}",
                self.form,
                self.limits,
                self.longest_stall,
                String::from_utf8_lossy(&text[text.len().saturating_sub(60)..])
            );
        }
        let opening = &text[..text.len().min(self.opening.len())];
        assert!(self.opening.starts_with(opening), "the opening comes first");
        let mut rest = &text[opening.len()..];
        let mut readable = begin_of_text(rest);
        let its: Vec<(usize, &Published)> = published
            .iter()
            .enumerate()
            .filter(|(_, event)| self.channels.contains(&event.channel) && event.id > self.after)
            .collect();
        let (mut next, mut missed, mut is_all) = (0, 0, !may_be_cut && self.revoked.is_none());
        let mut is_told = false;
        // Channels forget at different places, and what is lost of all of them is told once, before
        // the first of it.
        let mut is_told_of_others = false;
        let mut farewells = 0;
        while let Some(end) = readable.find("\n\n") {
            let (frame, later) = rest.split_at(end + 2);
            (rest, readable) = (later, &readable[end + 2..]);
            assert_eq!(
                farewells,
                0,
                "nothing follows the farewell: {:?}",
                String::from_utf8_lossy(&frame[..frame.len().min(80)])
            );
            if frame == HEARTBEAT {
                assert!(self.has_heartbeat, "it asked for none");
                continue;
            }
            if frame.starts_with(b"event: stream-reset\n") {
                is_told = true;
                is_told_of_others = self.channels.len() > 1;
                is_all = false;
                continue;
            }
            if frame.starts_with(b"retry: ") {
                assert!(ended.is_some() || self.is_over, "nobody says farewell yet");
                farewells += 1;
                continue;
            }
            let found = its[next..].iter().position(|(_, event)| event.frame == frame);
            let found = found.expect("an event of its channels, after those that it had");
            let gap = &its[next..next + found];
            let lost = gap.iter().filter(|(number, event)| {
                event.id > self.may_miss_until && !(is_told_of_others && forgotten[*number])
            });
            missed += if is_told { 0 } else { lost.count() as u64 };
            is_told = false;
            next += found + 1;
            let (number, _) = its[next - 1];
            assert!(self.revoked.is_none_or(|at| number < at), "it has no right to that");
        }
        if is_whole {
            assert!(rest.is_empty(), "the last frame is not whole");
        } else if !rest.is_empty() {
            let mut begun = its[next..].iter().map(|(_, event)| event.frame.as_slice());
            let others = [HEARTBEAT, b"event: stream-reset\n", b"retry: "];
            let is_other = others.iter().any(|it| it.starts_with(rest) || rest.starts_with(it));
            assert!(is_other || begun.any(|frame| frame.starts_with(rest)), "a foreign frame");
        }
        if !may_be_cut && self.revoked.is_none() {
            // Everything that came before the end is its; one that reads history comes back for it.
            let is_behind = self.is_behind && ended.is_some();
            is_all &= !is_behind;
            let until = ended.unwrap_or(published.len());
            let left = its[next..].iter().filter(|(number, event)| {
                let is_told = is_told || (is_told_of_others && forgotten[*number]);
                *number < until && event.id > self.may_miss_until && !is_told && !is_behind
            });
            missed += left.count() as u64;
            assert!(!is_final || farewells == 1, "each is told when to come back");
        }
        let never_drops = self.limits.overflow == Overflow::Disconnect;
        assert!(missed == 0 || !never_drops, "{missed} events are missing");
        (missed, is_all)
    }
}

/// What comes before anything that is cut off within a character, or compressed. A text is searched by
/// the standard library, which the fuzzer does not slow down.
fn begin_of_text(bytes: &[u8]) -> &str {
    bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
}

/// Letters that cannot be compressed away.
fn noise() -> &'static str {
    static NOISE: OnceLock<String> = OnceLock::new();
    NOISE.get_or_init(|| {
        let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
        let letters = (0..LARGEST + DIFFERENT).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b'0' + (state % 75) as u8)
        });
        letters.collect()
    })
}

/// A chunked body, as RFC 9112 has it in section 7.1, and whether it came to its end.
fn unchunked(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = begin_of_text(&rest[..rest.len().min(20)]).find("\r\n") else {
            let digits = rest.strip_suffix(b"\r").unwrap_or(rest);
            assert!(digits.len() < 8 && digits.iter().all(u8::is_ascii_hexdigit), "no length");
            return (body, false);
        };
        let digits = std::str::from_utf8(&rest[..end]).expect("a length");
        assert!(digits.bytes().all(|byte| byte.is_ascii_hexdigit()), "no length: {digits:?}");
        let length = usize::from_str_radix(digits, 16).expect("a length");
        rest = &rest[end + 2..];
        body.extend_from_slice(&rest[..rest.len().min(length)]);
        if rest.len() < length + 2 {
            let end = rest.get(length..).unwrap_or_default();
            assert!(b"\r\n".starts_with(end), "a chunk has an end");
            return (body, false);
        }
        assert_eq!(&rest[length..length + 2], b"\r\n", "a chunk has an end");
        rest = &rest[length + 2..];
        if length == 0 {
            assert!(rest.is_empty(), "nothing follows the body");
            return (body, true);
        }
    }
}
