//! Events on the wire.

use std::io::Read;

use _sse_channel::coding::{Blocks, GZIP_HEADER, Sum, gzip_end};
use _sse_channel::event_id::EventId;
use _sse_channel::frame::{Body, Fields};
use arbitrary::{Arbitrary, Unstructured};
use flate2::read::GzDecoder;

/// The largest body that is encoded here, in bytes.
const LIMIT: usize = 1 << 16;

#[derive(Arbitrary, Debug)]
struct Given<'a> {
    data: Option<&'a str>,
    event: Option<&'a str>,
    retry: Option<u64>,
    comment: Option<&'a str>,
    id: Option<(u64, u64)>,
}

/// What a browser has after it read a stream.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    /// Name and data of each event that it dispatches.
    dispatched: Vec<(String, String)>,
    last_event_id: String,
    retry: Option<u64>,
}

/// Reads a stream as the HTML standard says, section 9.2.6.
fn read(stream: &str) -> Seen {
    let mut seen = Seen::default();
    let (mut data, mut name, mut id) = (String::new(), String::new(), String::new());
    let stream = stream.replace("\r\n", "\n").replace('\r', "\n");
    let Some((whole, _)) = stream.rsplit_once('\n') else { return seen };
    for line in whole.split('\n') {
        if line.is_empty() {
            seen.last_event_id.clone_from(&id);
            if let Some(text) = data.strip_suffix('\n') {
                let named = if name.is_empty() { "message" } else { name.as_str() };
                seen.dispatched.push((named.to_owned(), text.to_owned()));
            }
            data.clear();
            name.clear();
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => data.extend([value, "\n"]),
            "event" => value.clone_into(&mut name),
            "id" if !value.contains('\0') => value.clone_into(&mut id),
            "retry" if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) => {
                seen.retry = value.parse().ok();
            }
            _ => {}
        }
    }
    seen
}

/// An event is read as what was published, and as nothing else.
pub fn frames(bytes: &[u8]) {
    let Ok(given) = Given::arbitrary(&mut Unstructured::new(bytes)) else { return };
    let Given { data, event, retry, comment, id } = given;
    let fields = Fields { data, event, retry, comment };
    let Ok(body) = Body::encode(&fields, LIMIT) else { return };
    let again = Body::restore(body.frame(), body.beside(), body.has_data());
    let id = id.map(|(ms, n)| EventId { ms, n });
    let sealed = body.seal(id);
    let again = again.expect("a store gives back what it was given").seal(id);
    assert_eq!(sealed, again);
    let (frame, message) = sealed;
    let frame = std::str::from_utf8(&frame).expect("the wire is UTF-8");
    let seen = read(frame);
    let lines = |text: &str| text.replace("\r\n", "\n").replace('\r', "\n");
    let expected = data.map(|data| {
        let name = event.filter(|name| !name.is_empty()).unwrap_or("message");
        (name.to_owned(), lines(data))
    });
    assert_eq!(seen.dispatched, Vec::from_iter(expected), "{frame:?}");
    assert_eq!(seen.retry, retry);
    assert_eq!(seen.last_event_id, id.map_or_else(String::new, |id| id.to_string()));
    assert_eq!(message.as_deref(), data.map(str::as_bytes), "a queue gets it as it was");
}

/// What a store gives is refused, or a frame that can be sent.
pub fn restored(bytes: &[u8]) {
    let mut given = Unstructured::new(bytes);
    let Ok((frame, beside, has_data)) = <(&[u8], Option<&[u8]>, bool)>::arbitrary(&mut given)
    else {
        return;
    };
    let Some(body) = Body::restore(frame, beside, has_data) else { return };
    assert_eq!(body.has_data(), has_data || beside.is_some());
    let (sealed, _) = body.seal(Some(EventId { ms: u64::MAX, n: u64::MAX }));
    assert!(sealed.ends_with(frame));
}

/// An id has one spelling.
pub fn ids(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(id) = text.parse::<EventId>() {
        assert_eq!(id.to_string(), text);
        assert!(id.before() <= id);
    }
}

/// Frames that are compressed one by one are one gzip stream of all of them.
pub fn compressed(bytes: &[u8]) {
    let Ok(texts) = Vec::<&[u8]>::arbitrary(&mut Unstructured::new(bytes)) else { return };
    let mut stream = GZIP_HEADER.to_vec();
    let mut sum = Sum::default();
    for text in &texts {
        let blocks = Blocks::of(text);
        stream.extend_from_slice(blocks.bytes());
        sum.append(blocks.part());
    }
    stream.extend_from_slice(&gzip_end(sum));
    let mut read = Vec::new();
    GzDecoder::new(stream.as_slice()).read_to_end(&mut read).expect("a whole gzip stream");
    assert_eq!(read, texts.concat());
}
