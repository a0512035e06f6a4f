//! An event as Redis gives it, in a stream or in a message. Whatever does not look like one of
//! ours is left out: others may write there.

use redis::Value;

use crate::event::Format;
use crate::event_id::EventId;
use crate::frame::Body;

/// An event out of Redis.
#[derive(Debug)]
pub struct Entry {
    /// Its place in the channel's order.
    pub id: EventId,
    /// The id before it, whatever became of that event.
    pub prev: EventId,
    /// What it says.
    pub body: Body,
    /// How a reader gets the message back.
    pub format: Format,
}

/// A page of a stream.
#[derive(Debug)]
pub struct Page {
    /// The newest id of the channel; `None` when it has none.
    pub last: Option<EventId>,
    /// What could be read of the entries, oldest first.
    pub entries: Vec<Entry>,
    /// Where the next page goes on, if there is one.
    pub next: Option<EventId>,
}

impl Entry {
    /// Reads a message: `id prev flags length`, a line end, the frame of that length, and what
    /// stands beside it.
    pub fn from_message(message: &[u8]) -> Option<Entry> {
        let end = message.iter().position(|byte| *byte == b'\n')?;
        let (head, rest) = message.split_at_checked(end)?;
        let rest = rest.get(1..)?;
        let mut words = std::str::from_utf8(head).ok()?.split(' ');
        let id = words.next()?.parse().ok()?;
        let prev = words.next()?.parse().ok()?;
        let flags = words.next()?;
        let length = words.next()?.parse().ok()?;
        if words.next().is_some() {
            return None;
        }
        let (frame, beside) = rest.split_at_checked(length)?;
        Entry::new(id, prev, flags.as_bytes(), frame, beside)
    }

    /// Reads an entry of a stream.
    pub fn from_stream(entry: &Value) -> Option<Entry> {
        let (id, fields) = halves(entry)?;
        let (mut prev, mut flags, mut frame, mut beside) = (None, None, None, &b""[..]);
        for pair in fields.chunks_exact(2) {
            let [name, value] = pair else { continue };
            let value = bytes(value)?;
            match bytes(name)? {
                b"prev" => prev = parse(value),
                b"flags" => flags = Some(value),
                b"frame" => frame = Some(value),
                b"beside" => beside = value,
                _ => {}
            }
        }
        Entry::new(id, prev?, flags?, frame?, beside)
    }

    fn new(id: EventId, prev: EventId, flags: &[u8], frame: &[u8], beside: &[u8]) -> Option<Entry> {
        if prev >= id {
            return None;
        }
        let format = if flags.contains(&b'j') { Format::Json } else { Format::Text };
        let has_data = flags.contains(&b'd');
        let beside = (has_data && !beside.is_empty()).then_some(beside);
        Some(Entry { id, prev, body: Body::restore(frame, beside, has_data)?, format })
    }
}

impl Page {
    /// Reads what `READ` gave.
    pub fn from_reply(reply: &Value) -> Option<Page> {
        let Value::Array(parts) = reply else { return None };
        let [last, Value::Array(entries), more] = parts.as_slice() else { return None };
        let next = match (more, entries.last()) {
            (Value::Int(1), Some(entry)) => Some(halves(entry)?.0),
            _ => None,
        };
        let last = bytes(last).and_then(parse);
        let entries = entries.iter().filter_map(Entry::from_stream).collect();
        Some(Page { last, entries, next })
    }
}

/// The id of what was published, and how many were told of it if that is known.
pub fn published(reply: &Value) -> Option<(EventId, Option<u64>)> {
    let text = std::str::from_utf8(bytes(reply)?).ok()?;
    let (id, heard) = text.split_once(' ').map_or((text, None), |(id, it)| (id, Some(it)));
    Some((id.parse().ok()?, heard.and_then(|count| count.parse().ok())))
}

/// The id in a reply that is nothing else.
pub fn id(reply: &Value) -> Option<EventId> {
    bytes(reply).and_then(parse)
}

/// The bytes of a value that has some.
pub fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

fn parse(text: &[u8]) -> Option<EventId> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn halves(entry: &Value) -> Option<(EventId, &[Value])> {
    let Value::Array(halves) = entry else { return None };
    let [at, Value::Array(fields)] = halves.as_slice() else { return None };
    Some((id(at)?, fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn stored(id: &str, fields: &[&str]) -> Value {
        Value::Array(vec![bulk(id), Value::Array(fields.iter().map(|text| bulk(text)).collect())])
    }

    fn text(entry: Entry) -> (String, Option<String>) {
        let text = |bytes: bytes::Bytes| String::from_utf8_lossy(&bytes).into_owned();
        let (frame, data) = entry.body.seal(None);
        (text(frame), data.map(text))
    }

    #[test]
    fn a_message_is_what_was_sent() {
        let one = Entry::from_message(b"2-5 1-7 jd 11\ndata: \"a\"\n\n");
        assert_eq!(
            one.as_ref().map(|entry| (entry.id, entry.prev, entry.format)),
            Some((EventId { ms: 2, n: 5 }, EventId { ms: 1, n: 7 }, Format::Json))
        );
        assert_eq!(one.map(text), Some(("data: \"a\"\n\n".into(), Some("\"a\"".into()))));
        let lines = Entry::from_message(b"2-0 1-0 td 17\ndata: a\ndata: b\n\na\r\nb");
        assert_eq!(lines.map(text), Some(("data: a\ndata: b\n\n".into(), Some("a\r\nb".into()))));
        let comment = Entry::from_message(b"2-0 1-0 t 5\n: c\n\n");
        assert_eq!(comment.map(text), Some((": c\n\n".into(), None)));
    }

    #[test]
    fn what_is_no_message_of_ours_is_nothing() {
        for message in [
            "",
            "\n",
            "hello",
            "{\"json\": 1}",
            "2-0 1-0 td\ndata: a\n\n",
            "2-0 1-0 td 99\ndata: a\n\n",
            "2-0 1-0 td 18446744073709551615\ndata: a\n\n",
            "2-0 1-0 td -1\ndata: a\n\n",
            "2-0 1-0 td 9 9\ndata: a\n\n",
            "2 1-0 td 9\ndata: a\n\n",
            "1-0 2-0 td 9\ndata: a\n\n",
            "2-0 1-0 td 4\nrest",
            "2-0 1-0 td 0\n",
        ] {
            assert!(Entry::from_message(message.as_bytes()).is_none(), "{message:?}");
        }
        assert!(Entry::from_message(b"2-0 1-0 td 9\ndata: \xff\n\n").is_none());
    }

    #[test]
    fn a_page_leaves_out_what_is_not_ours() {
        let fields = ["prev", "1-0", "mark", "x 1", "flags", "td", "frame", "data: a\n\n"];
        let page = |entries: Vec<Value>, more| {
            Page::from_reply(&Value::Array(vec![
                bulk("9-0"),
                Value::Array(entries),
                Value::Int(more),
            ]))
        };
        let entries = vec![
            stored("2-0", &fields),
            stored("3-0", &["hello", "world"]),
            stored("3-1", &fields[..7]),
            stored("0-1", &fields),
            Value::Nil,
            Value::Array(vec![]),
            stored("4-0", &[]),
        ];
        let read = page(entries, 1);
        assert_eq!(
            read.map(|page| (page.last, page.entries.len(), page.next)),
            Some((Some(EventId { ms: 9, n: 0 }), 1, Some(EventId { ms: 4, n: 0 })))
        );
        let read = page(vec![], 0);
        assert_eq!(read.map(|page| (page.entries.len(), page.next)), Some((0, None)));
        for reply in [Value::Nil, Value::Int(1), Value::Array(vec![]), bulk("x")] {
            assert!(Page::from_reply(&reply).is_none());
            assert!(Entry::from_stream(&reply).is_none());
        }
    }
}
