//! Pieces: frames as they go onto one kind of connection, encoded once and shared by all of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use smallvec::SmallVec;

use crate::coding::{Blocks, Coding, GZIP_HEADER, Part, Sum, gzip_end};
use crate::event::Event;
use crate::metrics::Counters;

/// A piece ends after this many bytes; a larger frame is one of its own.
const LARGEST: usize = 64 << 10;

/// How the body of a response is delimited (RFC 9112, sections 6.3 and 7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Chunks: HTTP/1.1.
    Chunked,
    /// By the end of the connection: HTTP/1.0.
    UntilClose,
}

/// What the body of a connection looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Its delimitation.
    pub framing: Framing,
    /// Its content coding.
    pub coding: Coding,
}

impl Form {
    /// All forms, in the order of their `number`.
    pub const ALL: [Form; 4] = [
        Form { framing: Framing::Chunked, coding: Coding::Identity },
        Form { framing: Framing::Chunked, coding: Coding::Gzip },
        Form { framing: Framing::UntilClose, coding: Coding::Identity },
        Form { framing: Framing::UntilClose, coding: Coding::Gzip },
    ];

    /// Its place among `ALL`.
    pub fn number(self) -> usize {
        2 * self.framing as usize + self.coding as usize
    }
}

/// Whole frames, in the bytes of the connection.
#[derive(Debug)]
pub struct Piece {
    bytes: Vec<u8>,
    /// Bytes of a response's head in front.
    head: usize,
    frames: u32,
    /// The sum of its text, where it is compressed.
    part: Part,
    /// What its delivery adds to.
    tallies: SmallVec<[Tally; 1]>,
}

/// What a piece has of one channel.
#[derive(Debug)]
struct Tally {
    counters: Arc<Counters>,
    frames: u32,
    bytes: u32,
    /// The milliseconds in which its events were ordered, and how many were in each.
    ordered: SmallVec<[(u64, u32); 1]>,
}

impl Piece {
    /// `text` as it is on the wire, counted nowhere.
    pub fn plain(form: Form, text: &[u8]) -> Piece {
        Piece::behind(&[], form, &[], text)
    }

    /// What a connection begins with: the head of the response, and the first `text` of its body.
    pub fn first(head: &[u8], form: Form, text: &[u8]) -> Piece {
        let begin: &[u8] = match form.coding {
            Coding::Identity => b"",
            Coding::Gzip => &GZIP_HEADER,
        };
        Piece::behind(head, form, begin, text)
    }

    /// What is left of a connection's first piece without its text; `None` for any other piece.
    pub fn head_alone(&self, form: Form) -> Option<Piece> {
        let head = self.bytes.get(..self.head).filter(|head| !head.is_empty())?;
        Some(Piece::first(head, form, b""))
    }

    /// What ends the body of a connection, whose text so far has this sum, with a `last` text. One piece:
    /// who is cut off within it has been told, and is not told again.
    pub fn end(form: Form, mut sum: Sum, last: &[u8]) -> Piece {
        let Piece { mut bytes, part, .. } = Piece::plain(form, last);
        sum.append(&part);
        if form.coding == Coding::Gzip {
            let end = gzip_end(sum);
            put(&mut bytes, form.framing, end.len(), [end.as_slice()]);
        }
        bytes.extend_from_slice(match form.framing {
            Framing::Chunked => b"0\r\n\r\n",
            Framing::UntilClose => b"",
        });
        Piece { bytes, head: 0, frames: 0, part: Part::default(), tallies: SmallVec::new() }
    }

    /// `text` with `begin` before it in the body, and the body after `head`.
    fn behind(head: &[u8], form: Form, begin: &[u8], text: &[u8]) -> Piece {
        let blocks = (form.coding == Coding::Gzip).then(|| Blocks::of(text));
        let body = blocks.as_ref().map_or(text, Blocks::bytes);
        let size = begin.len() + body.len();
        let mut bytes = Vec::with_capacity(head.len() + size + 24);
        bytes.extend_from_slice(head);
        put(&mut bytes, form.framing, size, [begin, body]);
        let part = blocks.map_or_else(Part::default, |blocks| *blocks.part());
        Piece { bytes, head: head.len(), frames: 0, part, tallies: SmallVec::new() }
    }

    /// Pieces of `events`, in their order. Those that are to be compressed are, if nobody did it yet.
    pub fn of_events<'a>(
        form: Form,
        events: impl IntoIterator<Item = &'a Arc<Event>>,
    ) -> SmallVec<[Arc<Piece>; 1]> {
        let mut pieces = SmallVec::new();
        let mut run: SmallVec<[&Event; 4]> = SmallVec::new();
        let mut size = 0;
        for event in events {
            let length = event.coded(form.coding).len();
            if !run.is_empty() && size + length > LARGEST {
                pieces.push(Arc::new(Piece::of_run(form, &run, size)));
                run.clear();
                size = 0;
            }
            size += length;
            run.push(event);
        }
        if !run.is_empty() {
            pieces.push(Arc::new(Piece::of_run(form, &run, size)));
        }
        pieces
    }

    fn of_run(form: Form, run: &[&Event], size: usize) -> Piece {
        let mut bytes = Vec::with_capacity(size + 24);
        put(&mut bytes, form.framing, size, run.iter().map(|event| event.coded(form.coding)));
        let part = Part::default();
        let mut piece = Piece { bytes, head: 0, frames: 0, part, tallies: SmallVec::new() };
        for event in run {
            piece.frames += 1;
            if form.coding == Coding::Gzip {
                piece.part.append(event.compressed().part());
            }
            let Some(counters) = &event.counters else { continue };
            let length = u32::try_from(event.coded(form.coding).len()).unwrap_or(u32::MAX);
            let known = piece.tallies.iter().position(|it| Arc::ptr_eq(&it.counters, counters));
            let at = known.unwrap_or_else(|| {
                let counters = Arc::clone(counters);
                let ordered = SmallVec::new();
                piece.tallies.push(Tally { counters, frames: 0, bytes: 0, ordered });
                piece.tallies.len() - 1
            });
            let tally = &mut piece.tallies[at];
            tally.frames += 1;
            tally.bytes = tally.bytes.saturating_add(length);
            let Some(id) = event.id else { continue };
            match tally.ordered.last_mut() {
                Some((ms, count)) if *ms == id.ms => *count += 1,
                _ => tally.ordered.push((id.ms, 1)),
            }
        }
        piece
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The sum of its text, where it is compressed.
    pub fn part(&self) -> &Part {
        &self.part
    }

    /// Frames of events in it.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// When the oldest of its events was ordered, in milliseconds since the epoch.
    pub fn ordered(&self) -> Option<u64> {
        let first = |tally: &Tally| tally.ordered.first().map(|(ms, _)| *ms);
        self.tallies.iter().filter_map(first).min()
    }

    /// Counts that `times` connections took all of it: `now`, in milliseconds since the epoch, if it
    /// was live.
    pub fn count_delivered(&self, times: u64, now: Option<u64>) {
        for Tally { counters, frames, bytes, ordered } in &self.tallies {
            counters.delivered().fetch_add(times * u64::from(*frames), Relaxed);
            counters.bytes().fetch_add(times * u64::from(*bytes), Relaxed);
            let Some(now) = now else { continue };
            for (ms, count) in ordered {
                counters.count_delay(now.saturating_sub(*ms), times * u64::from(*count));
            }
        }
    }

    /// Counts that a connection did not get it.
    pub fn count_dropped(&self) {
        for Tally { counters, frames, .. } in &self.tallies {
            counters.dropped().fetch_add(u64::from(*frames), Relaxed);
        }
    }
}

fn put<'a>(
    bytes: &mut Vec<u8>,
    framing: Framing,
    size: usize,
    frames: impl IntoIterator<Item = &'a [u8]>,
) {
    // An empty chunk would be the end of the body.
    let is_chunk = framing == Framing::Chunked && size > 0;
    if is_chunk {
        bytes.extend_from_slice(format!("{size:x}\r\n").as_bytes());
    }
    for frame in frames {
        bytes.extend_from_slice(frame);
    }
    if is_chunk {
        bytes.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    use crate::event::{Draft, Format};
    use crate::event_id::EventId;
    use crate::frame::{Body, Fields};

    const CHUNKED: Form = Form::ALL[0];
    const CHUNKED_GZIP: Form = Form::ALL[1];
    const RAW: Form = Form::ALL[2];
    const RAW_GZIP: Form = Form::ALL[3];

    fn event(n: u64, text: &str) -> Arc<Event> {
        let fields = Fields { data: Some(text), ..Fields::default() };
        let body = Body::encode(&fields, 1 << 20).ok();
        let draft = Draft { body, format: Format::Text, has_message: true, decoded: None };
        Arc::new(Event::seal(draft, Some(EventId { ms: 0, n }), Some(Arc::default())))
    }

    /// The text of a whole gzip stream, which must be one.
    fn unzipped(stream: &[u8]) -> std::io::Result<String> {
        let mut text = String::new();
        flate2::read::GzDecoder::new(stream).read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn forms_know_their_places() {
        assert!(Form::ALL.iter().enumerate().all(|(number, form)| form.number() == number));
    }

    #[test]
    fn frames_share_one_chunk_with_its_length_in_front() {
        let events = [event(1, "a"), event(2, "b")];
        let pieces = Piece::of_events(CHUNKED, &events);
        assert_eq!(pieces.len(), 1);
        assert_eq!(
            pieces[0].bytes(),
            b"22\r\nid: 0-1\ndata: a\n\nid: 0-2\ndata: b\n\n\r\n".as_slice()
        );
        let raw = Piece::of_events(RAW, &events);
        assert_eq!(raw[0].bytes(), b"id: 0-1\ndata: a\n\nid: 0-2\ndata: b\n\n".as_slice());
        assert_eq!(raw[0].frames(), 2);
        assert!(!events[0].is_compressed());
    }

    #[test]
    fn a_long_backlog_is_several_pieces_of_whole_frames() {
        let text = "x".repeat(LARGEST / 3);
        let events: Vec<_> = (0..4).map(|n| event(n, &text)).collect();
        let pieces = Piece::of_events(RAW, &events);
        assert_eq!(pieces.iter().map(|piece| piece.frames()).collect::<Vec<_>>(), [2, 2]);
        assert!(pieces.iter().all(|piece| piece.bytes().ends_with(b"\n\n")));
        // What counts is what goes out.
        assert_eq!(Piece::of_events(RAW_GZIP, &events).len(), 1);
    }

    #[test]
    fn nothing_is_no_chunk() {
        assert_eq!(Piece::plain(CHUNKED, b"").bytes(), b"");
        assert_eq!(Piece::plain(CHUNKED_GZIP, b"").bytes(), b"");
        assert_eq!(Piece::of_events(CHUNKED, &[]).len(), 0);
    }

    #[test]
    fn a_compressed_body_is_whole_whichever_pieces_it_has() -> std::io::Result<()> {
        let events: Vec<_> = (0..4).map(|n| event(n, &"some words, ".repeat(20))).collect();
        let heartbeat = Arc::new(Piece::plain(RAW_GZIP, b": heartbeat\n\n"));
        for some in [0..0, 0..1, 1..4, 0..4] {
            let mut pieces = vec![heartbeat.clone()];
            pieces.extend(Piece::of_events(RAW_GZIP, &events[some.clone()]));
            pieces.push(heartbeat.clone());
            let first = Piece::first(b"head", RAW_GZIP, b"retry: 1\n\n");
            let (head, body) = first.bytes().split_at(4);
            assert_eq!(head, b"head");
            let (mut stream, mut sum) = (body.to_vec(), Sum::default());
            sum.append(first.part());
            for piece in pieces {
                stream.extend_from_slice(piece.bytes());
                sum.append(piece.part());
            }
            stream.extend_from_slice(Piece::end(RAW_GZIP, sum, b"").bytes());
            let frames = events[some].iter().map(|event| String::from_utf8_lossy(&event.frame));
            let text = unzipped(&stream)?;
            let expected = ["retry: 1\n\n: heartbeat\n\n", ": heartbeat\n\n"];
            assert_eq!(text, [expected[0], &frames.collect::<String>(), expected[1]].concat());
        }
        Ok(())
    }

    #[test]
    fn an_event_is_compressed_once_for_all_who_take_it_so() {
        let events = [event(1, &"some words, ".repeat(20))];
        let pieces = Piece::of_events(CHUNKED_GZIP, &events);
        assert!(events[0].is_compressed());
        let made = events[0].compressed().bytes().as_ptr();
        let framed = events[0].coded(Coding::Gzip);
        let length = format!("{:x}\r\n", framed.len());
        assert_eq!(pieces[0].bytes(), [length.as_bytes(), framed, b"\r\n"].concat());
        assert_eq!(Piece::of_events(RAW_GZIP, &events)[0].bytes(), framed);
        assert_eq!(events[0].coded(Coding::Gzip).as_ptr(), made);

        pieces[0].count_delivered(3, None);
        let bytes = events[0].counters.as_ref().map(|counters| counters.bytes().load(Relaxed));
        assert_eq!(bytes, Some(3 * framed.len() as u64));
    }

    #[test]
    fn each_event_of_a_piece_has_its_own_delay() {
        let counters: Arc<Counters> = Arc::default();
        let ordered = |ms, n| {
            let body = Body::encode(&Fields { data: Some("a"), ..Fields::default() }, 1 << 20).ok();
            let draft = Draft { body, format: Format::Text, has_message: true, decoded: None };
            let id = Some(EventId { ms, n });
            Arc::new(Event::seal(draft, id, Some(Arc::clone(&counters))))
        };
        let events = [ordered(1000, 0), ordered(1000, 1), ordered(1003, 0), ordered(1009, 0)];
        let pieces = Piece::of_events(RAW, &events);
        pieces[0].count_delivered(10, Some(1005));
        // The clock may have been set back, or be another machine's.
        assert_eq!(counters.snapshot().delays()[..4], [10, 10, 20, 0]);
        assert_eq!(counters.snapshot().delay_sum(), 10 * (5 + 5 + 2));
        pieces[0].count_delivered(1, None);
        assert_eq!(counters.snapshot().delay_sum(), 120, "what is not live has no delay");
        assert_eq!(counters.delivered().load(Relaxed), 44);
    }

    #[test]
    fn the_end_of_a_body_follows_its_form() {
        assert_eq!(Piece::end(CHUNKED, Sum::default(), b"").bytes(), b"0\r\n\r\n");
        assert_eq!(Piece::end(RAW, Sum::default(), b"").bytes(), b"");
        let last = Piece::end(CHUNKED, Sum::default(), b"retry: 1\n\n");
        assert_eq!(last.bytes(), b"a\r\nretry: 1\n\n\r\n0\r\n\r\n");
        let end = [b"a\r\n\x03\0".as_slice(), &[0; 8], b"\r\n0\r\n\r\n"].concat();
        assert_eq!(Piece::end(CHUNKED_GZIP, Sum::default(), b"").bytes(), end);
    }
}
