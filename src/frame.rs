//! Frames: the bytes of one event on the wire, encoded once and shared by reference.
//!
//! Field order and line ends follow the HTML standard, section 9.2.5 "Parsing an event stream".

use std::fmt::Write as _;
use std::ops::Range;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::event_id::{EventId, MAX_TEXT};

/// What an idle stream carries to stay known as alive: a comment, which no browser dispatches.
pub const HEARTBEAT: &[u8] = b": heartbeat\n\n";

/// The event name that tells a client that it missed events nobody can give it any more.
pub const RESET_EVENT: &str = "stream-reset";

/// Room kept in front of an encoded body, so that the id can be written there without a copy.
const HEADROOM: usize = "id: \n".len() + MAX_TEXT;

/// What an event can carry; each field is absent from the wire when `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields<'a> {
    /// The message; its line ends become `data:` lines. Without it no browser dispatches.
    pub data: Option<&'a str>,
    /// The event name, `message` in the browser when absent.
    pub event: Option<&'a str>,
    /// Milliseconds that the browser waits before it reconnects.
    pub retry: Option<u64>,
    /// Text that reaches the wire and no listener.
    pub comment: Option<&'a str>,
}

/// An encoded event that has no id yet: the bus gives it one when it has ordered the event.
#[derive(Debug)]
pub struct Body {
    buffer: Vec<u8>,
    data: Option<DataAt>,
}

#[derive(Debug)]
enum DataAt {
    /// One line: the message is a piece of the frame.
    Inside(Range<usize>),
    /// Several lines: the message stands beside the frame as it was.
    Beside(Bytes),
}

impl Body {
    /// Encodes `fields`, or says which of them the wire cannot carry.
    ///
    /// `limit` is the largest body in bytes.
    pub fn encode(fields: &Fields<'_>, limit: usize) -> Result<Body> {
        check_event_name(fields.event)?;
        let mut text = String::with_capacity(
            HEADROOM
                + 64
                + fields.data.map_or(0, str::len)
                + fields.event.map_or(0, str::len)
                + fields.comment.map_or(0, str::len),
        );
        text.extend(std::iter::repeat_n(' ', HEADROOM));
        if let Some(comment) = fields.comment {
            push_lines(&mut text, ": ", comment);
        }
        if let Some(event) = fields.event {
            push_lines(&mut text, "event: ", event);
        }
        if let Some(retry) = fields.retry {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "retry: {retry}");
        }
        let data = fields.data.map(|data| {
            if data.contains(['\r', '\n']) {
                push_lines(&mut text, "data: ", data);
                DataAt::Beside(Bytes::copy_from_slice(data.as_bytes()))
            } else {
                text.push_str("data: ");
                let start = text.len();
                text.push_str(data);
                let at = start..text.len();
                text.push('\n');
                DataAt::Inside(at)
            }
        });
        text.push('\n');
        let size = text.len() - HEADROOM;
        if size > limit {
            return Err(Error::TooLarge { size, limit });
        }
        Ok(Body { buffer: text.into_bytes(), data })
    }

    /// The frame without an id, as a store keeps it.
    pub fn frame(&self) -> &[u8] {
        &self.buffer[HEADROOM..]
    }

    /// The message, where the frame alone does not tell how its lines ended.
    pub fn beside(&self) -> Option<&[u8]> {
        match &self.data {
            Some(DataAt::Beside(bytes)) => Some(bytes),
            Some(DataAt::Inside(_)) | None => None,
        }
    }

    /// Whether there is a message: an event of comment or retry alone has none.
    pub fn has_data(&self) -> bool {
        self.data.is_some()
    }

    /// A body out of a store, from what `frame`, `beside` and `has_data` gave; `None` for bytes
    /// that those never give.
    pub fn restore(frame: &[u8], beside: Option<&[u8]>, has_data: bool) -> Option<Body> {
        let mut buffer = Vec::with_capacity(HEADROOM + frame.len());
        buffer.resize(HEADROOM, b' ');
        buffer.extend_from_slice(frame);
        std::str::from_utf8(frame).ok()?;
        let data = match beside {
            Some(bytes) => Some(DataAt::Beside(Bytes::copy_from_slice(bytes))),
            None if has_data => {
                // One line of data is the last of the frame.
                let line = frame.strip_suffix(b"\n\n")?;
                let start = line.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
                let message = line[start..].strip_prefix(b"data: ")?;
                let end = HEADROOM + line.len();
                Some(DataAt::Inside(end - message.len()..end))
            }
            None => frame.ends_with(b"\n").then_some(None)?,
        };
        Some(Body { buffer, data })
    }

    /// Writes the id in front and freezes the frame; also gives the message as it was.
    pub fn seal(mut self, id: Option<EventId>) -> (Bytes, Option<Bytes>) {
        let line = id.map_or_else(String::new, |id| format!("id: {id}\n"));
        let start = HEADROOM - line.len();
        self.buffer[start..HEADROOM].copy_from_slice(line.as_bytes());
        let buffer = Bytes::from(self.buffer);
        let data = self.data.map(|data| match data {
            DataAt::Inside(at) => buffer.slice(at),
            DataAt::Beside(bytes) => bytes,
        });
        (buffer.slice(start..), data)
    }
}

/// The first frame of a stream: the reconnection time and the cursor, and nothing to dispatch.
///
/// The id without data is committed by the browser, so that a client that breaks off before its
/// first event still resumes.
pub fn opening(retry: u64, cursor: EventId) -> Bytes {
    Bytes::from(format!("retry: {retry}\nid: {cursor}\n\n"))
}

/// The event name in a frame, if it has one.
pub fn event_name(frame: &[u8]) -> Option<&str> {
    let lines = frame.split(|byte| *byte == b'\n');
    let mut fields = lines.take_while(|line| !line.starts_with(b"data:"));
    let name = fields.find_map(|line| line.strip_prefix(b"event: "))?;
    std::str::from_utf8(name).ok()
}

/// Tells a client that what it asked to resume from cannot be resumed exactly, and why.
pub fn reset(reason: &str) -> Bytes {
    Bytes::from(format!("event: {RESET_EVENT}\ndata: {{\"reason\":\"{reason}\"}}\n\n"))
}

fn check_event_name(name: Option<&str>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let problem = if name.is_empty() {
        "an event name must not be empty; leave `event` out for the browser's \"message\""
    } else if name.contains(['\r', '\n', '\0']) {
        "an event name must not contain CR, LF or NUL: it would end the field on the wire"
    } else if name == "error" || name == "open" {
        "the event names \"error\" and \"open\" are the browser's own; choose another"
    } else {
        return Ok(());
    };
    Err(Error::InvalidField(format!("{problem} (got {name:?})")))
}

/// One line with `prefix` for each line of `value`, which is split at CRLF, CR and LF only.
fn push_lines(text: &mut String, prefix: &str, value: &str) {
    let mut rest = value;
    loop {
        text.push_str(prefix);
        let Some(end) = rest.find(['\r', '\n']) else {
            text.push_str(rest);
            text.push('\n');
            return;
        };
        text.push_str(&rest[..end]);
        text.push('\n');
        let width = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = &rest[end + width..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(fields: Fields<'_>) -> String {
        let body = Body::encode(&fields, 1 << 20).map(|body| body.seal(None).0);
        body.map_or_else(
            |error| format!("error: {error}"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    fn data(data: &str) -> Fields<'_> {
        Fields { data: Some(data), ..Fields::default() }
    }

    #[test]
    fn data_is_split_at_crlf_cr_and_lf_only() {
        for (message, wire) in [
            ("", "data: \n\n"),
            (" ", "data:  \n\n"),
            ("a", "data: a\n\n"),
            ("a\nb", "data: a\ndata: b\n\n"),
            ("a\rb", "data: a\ndata: b\n\n"),
            ("a\r\nb", "data: a\ndata: b\n\n"),
            ("a\n\rb", "data: a\ndata: \ndata: b\n\n"),
            ("a\r\r\nb", "data: a\ndata: \ndata: b\n\n"),
            ("a\n", "data: a\ndata: \n\n"),
            ("a\n\n", "data: a\ndata: \ndata: \n\n"),
            ("\n", "data: \ndata: \n\n"),
            ("\r\n", "data: \ndata: \n\n"),
            (
                "a\u{b}b\u{c}c\u{1c}d\u{1d}e\u{1e}f\u{85}g\u{2028}h\u{2029}i",
                "data: a\u{b}b\u{c}c\u{1c}d\u{1d}e\u{1e}f\u{85}g\u{2028}h\u{2029}i\n\n",
            ),
            ("a\0b", "data: a\0b\n\n"),
            ("\u{feff}a", "data: \u{feff}a\n\n"),
            (":x", "data: :x\n\n"),
            ("data: x", "data: data: x\n\n"),
            ("日本 🎉", "data: 日本 🎉\n\n"),
        ] {
            assert_eq!(frame(data(message)), wire, "{message:?}");
        }
    }

    #[test]
    fn fields_stand_in_one_order_and_absent_ones_leave_nothing() {
        let all =
            Fields { data: Some("d"), event: Some("e"), retry: Some(1500), comment: Some("c\nc2") };
        assert_eq!(frame(all), ": c\n: c2\nevent: e\nretry: 1500\ndata: d\n\n");
        let comment = Fields { comment: Some(""), ..Fields::default() };
        assert_eq!(frame(comment), ": \n\n");
        let retry = Fields { retry: Some(0), ..Fields::default() };
        assert_eq!(frame(retry), "retry: 0\n\n");
        let spaced = Fields { event: Some(" x"), ..data("d") };
        assert_eq!(frame(spaced), "event:  x\ndata: d\n\n");
    }

    #[test]
    fn the_id_stands_in_front_and_the_message_stays_as_it_was() {
        let longest = EventId { ms: u64::MAX, n: u64::MAX };
        for id in [EventId { ms: 1, n: 0 }, longest] {
            for message in ["one line", "two\r\nlines", ""] {
                let Ok(body) = Body::encode(&data(message), 1 << 20) else {
                    unreachable!("{message:?} is valid")
                };
                let (frame, kept) = body.seal(Some(id));
                assert!(frame.starts_with(format!("id: {id}\ndata: ").as_bytes()));
                assert!(frame.ends_with(b"\n\n"));
                assert_eq!(kept.as_deref(), Some(message.as_bytes()));
            }
        }
    }

    #[test]
    fn a_stored_body_comes_back_as_it_was() {
        let messages = [Some("one line"), Some("two\r\nlines\r"), Some(""), Some("data: x"), None];
        for (message, event) in messages.into_iter().flat_map(|m| [(m, None), (m, Some("e"))]) {
            let fields = Fields { data: message, event, comment: Some("c"), ..Fields::default() };
            let body = || match Body::encode(&fields, 1 << 20) {
                Ok(body) => body,
                Err(error) => unreachable!("{error}"),
            };
            let stored = body();
            let back = Body::restore(stored.frame(), stored.beside(), stored.has_data());
            assert_eq!(back.map(|back| back.seal(None)), Some(body().seal(None)), "{message:?}");
        }
        for (frame, has_data) in
            [(&b""[..], true), (b"x\n\n", true), (b"\xff\n\n", false), (b"", false)]
        {
            assert!(Body::restore(frame, None, has_data).is_none(), "{frame:?}");
        }
    }

    #[test]
    fn names_that_break_the_wire_or_the_browser_are_refused() {
        for name in ["", "a\nb", "a\rb", "a\0b", "error", "open"] {
            let refused = Fields { event: Some(name), ..data("d") };
            assert!(frame(refused).starts_with("error: "), "{name:?}");
        }
        for name in ["Error", "opened", "message", "a b", "ü"] {
            assert!(frame(Fields { event: Some(name), ..data("d") }).starts_with("event: "));
        }
    }

    #[test]
    fn the_limit_counts_the_bytes_of_the_wire() {
        let exact = "data: aé\n\n".len();
        assert!(Body::encode(&data("aé"), exact).is_ok());
        assert!(matches!(
            Body::encode(&data("aé"), exact - 1),
            Err(Error::TooLarge { size, limit }) if size == exact && limit == exact - 1
        ));
    }

    #[test]
    fn opening_and_reset() {
        let cursor = EventId { ms: 7, n: 1 };
        assert_eq!(opening(3000, cursor), "retry: 3000\nid: 7-1\n\n");
        assert_eq!(reset("too-old"), "event: stream-reset\ndata: {\"reason\":\"too-old\"}\n\n");
    }
}
