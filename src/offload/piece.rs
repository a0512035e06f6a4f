//! Pieces: frames as they go onto one kind of connection, encoded once and shared by all of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use smallvec::SmallVec;

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

/// Whole frames, in the bytes of the connection.
#[derive(Debug)]
pub struct Piece {
    bytes: Vec<u8>,
    frames: u32,
    /// What its delivery adds to, with frames and bytes of each channel.
    tallies: SmallVec<[(Arc<Counters>, u32, u32); 1]>,
}

impl Piece {
    /// `body` as it is on the wire, counted nowhere. Without `framing` it is that already.
    pub fn plain(framing: Option<Framing>, body: &[u8]) -> Piece {
        let mut bytes = Vec::with_capacity(body.len() + 24);
        match framing {
            Some(framing) => put(&mut bytes, framing, body.len(), [body]),
            None => bytes.extend_from_slice(body),
        }
        Piece { bytes, frames: 0, tallies: SmallVec::new() }
    }

    /// Pieces of `events`, in their order.
    pub fn of_events<'a>(
        framing: Framing,
        events: impl IntoIterator<Item = &'a Arc<Event>>,
    ) -> SmallVec<[Arc<Piece>; 1]> {
        let mut pieces = SmallVec::new();
        let mut run: SmallVec<[&Event; 4]> = SmallVec::new();
        let mut size = 0;
        for event in events {
            if !run.is_empty() && size + event.frame.len() > LARGEST {
                pieces.push(Arc::new(Piece::of_run(framing, &run, size)));
                run.clear();
                size = 0;
            }
            size += event.frame.len();
            run.push(event);
        }
        if !run.is_empty() {
            pieces.push(Arc::new(Piece::of_run(framing, &run, size)));
        }
        pieces
    }

    fn of_run(framing: Framing, run: &[&Event], size: usize) -> Piece {
        let mut bytes = Vec::with_capacity(size + 24);
        put(&mut bytes, framing, size, run.iter().map(|event| &*event.frame));
        let mut piece = Piece { bytes, frames: 0, tallies: SmallVec::new() };
        for event in run {
            piece.frames += 1;
            let Some(counters) = &event.counters else { continue };
            let length = u32::try_from(event.frame.len()).unwrap_or(u32::MAX);
            match piece.tallies.iter_mut().find(|tally| Arc::ptr_eq(&tally.0, counters)) {
                Some((_, frames, bytes)) => {
                    *frames += 1;
                    *bytes = bytes.saturating_add(length);
                }
                None => piece.tallies.push((Arc::clone(counters), 1, length)),
            }
        }
        piece
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Frames of events in it.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Counts that `times` connections took all of it.
    pub fn count_delivered(&self, times: u64) {
        for (counters, frames, bytes) in &self.tallies {
            counters.delivered.fetch_add(times * u64::from(*frames), Relaxed);
            counters.bytes.fetch_add(times * u64::from(*bytes), Relaxed);
        }
    }

    /// Counts that a connection did not get it.
    pub fn count_dropped(&self) {
        for (counters, frames, _) in &self.tallies {
            counters.dropped.fetch_add(u64::from(*frames), Relaxed);
        }
    }
}

/// What ends a body.
pub fn end(framing: Framing) -> &'static [u8] {
    match framing {
        Framing::Chunked => b"0\r\n\r\n",
        Framing::UntilClose => b"",
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
    use crate::event::{Draft, Format};
    use crate::event_id::EventId;
    use crate::frame::{Body, Fields};

    fn event(n: u64, text: &str) -> Arc<Event> {
        let fields = Fields { data: Some(text), ..Fields::default() };
        let body = Body::encode(&fields, 1 << 20).ok();
        let draft = Draft { body, format: Format::Text, has_message: true, decoded: None };
        Arc::new(Event::seal(draft, Some(EventId { ms: 0, n }), Some(Arc::default())))
    }

    #[test]
    fn frames_share_one_chunk_with_its_length_in_front() {
        let events = [event(1, "a"), event(2, "b")];
        let pieces = Piece::of_events(Framing::Chunked, &events);
        assert_eq!(pieces.len(), 1);
        assert_eq!(
            pieces[0].bytes(),
            b"22\r\nid: 0-1\ndata: a\n\nid: 0-2\ndata: b\n\n\r\n".as_slice()
        );
        let raw = Piece::of_events(Framing::UntilClose, &events);
        assert_eq!(raw[0].bytes(), b"id: 0-1\ndata: a\n\nid: 0-2\ndata: b\n\n".as_slice());
        assert_eq!(raw[0].frames(), 2);
    }

    #[test]
    fn a_long_backlog_is_several_pieces_of_whole_frames() {
        let text = "x".repeat(LARGEST / 3);
        let events: Vec<_> = (0..4).map(|n| event(n, &text)).collect();
        let pieces = Piece::of_events(Framing::UntilClose, &events);
        assert_eq!(pieces.iter().map(|piece| piece.frames()).collect::<Vec<_>>(), [2, 2]);
        assert!(pieces.iter().all(|piece| piece.bytes().ends_with(b"\n\n")));
    }

    #[test]
    fn nothing_is_no_chunk() {
        assert_eq!(Piece::plain(Some(Framing::Chunked), b"").bytes(), b"");
        assert_eq!(Piece::of_events(Framing::Chunked, &[]).len(), 0);
    }
}
