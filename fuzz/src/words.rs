//! What comes over the bus, and what names it.

use std::sync::Arc;

use _sse_channel::bus::redis::entry::{Entry, Page, published};
use _sse_channel::bus::{Attempt, Bus, MemoryBus, Publication, Settings};
use _sse_channel::control::{self, Control, Revocation};
use _sse_channel::event::Format;
use _sse_channel::frame::{Body, Fields};
use _sse_channel::history::Limits;
use _sse_channel::hub::{Hub, Resume};
use _sse_channel::metrics::Reason;
use _sse_channel::offload::Offload;
use _sse_channel::queue::{Client, Kind, Overflow, Taken};
use _sse_channel::survey::{self, Respondent};
use arbitrary::{Arbitrary, Unstructured};
use redis::Value;

/// Orders and questions are understood or left alone, and answers are JSON.
pub fn words(bytes: &[u8]) {
    // Counted nowhere: the figures of a process are a file, and mapped for ever.
    let hub = Arc::new(Hub::default());
    let bus: Arc<dyn Bus> = Arc::new(MemoryBus::new(Arc::clone(&hub)));
    let offload = Arc::new(Offload::default());
    let control = Control::install(&hub, &offload);
    Respondent::install(&hub, &bus, &offload);
    let (channel, answers) = (hub.channel("a", 5), hub.channel(survey::ANSWERS, 0));
    let stream = Arc::new(Client::new(Kind::Stream, 9, Overflow::DropOldest));
    let asker = Arc::new(Client::new(Kind::Queue, 1000, Overflow::DropOldest));
    for (client, channel) in [(&stream, channel), (&asker, answers)] {
        let registered = hub.register(client, &[channel], Resume::Fresh, Box::new(()));
        assert!(matches!(registered, Ok(Some(_))));
    }
    let mut given = Unstructured::new(bytes);
    while !given.is_empty() {
        let Ok((is_question, text)) = <(bool, &str)>::arbitrary(&mut given) else { break };
        let fields = Fields { data: Some(text), ..Fields::default() };
        let Ok(body) = Body::encode(&fields, 1 << 16) else { continue };
        let to = if is_question { survey::QUESTIONS } else { control::CHANNEL };
        let publication = Publication {
            channel: to.into(),
            history: 0,
            body,
            format: Format::Text,
            heard_by: None,
        };
        assert!(matches!(bus.try_publish(publication), Attempt::Done(Ok(_))));
        if !is_question {
            let order = Revocation::parse(text.as_bytes());
            if let Some(order) = &order {
                let again = Revocation::parse(order.to_text().as_bytes());
                assert_eq!(again.as_ref(), Some(order));
            }
        }
    }
    let _ = control.done();
    while let Taken::Event(answer) = asker.take() {
        let text = answer.data.as_deref().expect("an answer says something");
        let facts: serde_json::Value = serde_json::from_slice(text).expect("an answer is JSON");
        assert_eq!(facts["form"], survey::FORM);
        assert!(facts["token"].is_string() && facts["slowest"].is_array());
    }
    hub.unregister(&stream, Reason::Closed);
}

/// A value as it may come from Redis, or from who speaks like it.
fn value(given: &mut Unstructured<'_>, depth: usize) -> arbitrary::Result<Value> {
    Ok(match given.int_in_range(0..=if depth > 0 { 5 } else { 4 })? {
        0 => Value::Nil,
        1 => Value::Int(i64::arbitrary(given)?),
        2 => Value::BulkString(Vec::arbitrary(given)?),
        3 => Value::SimpleString(String::arbitrary(given)?),
        4 => {
            let (ms, n) = <(u64, u64)>::arbitrary(given)?;
            Value::BulkString(format!("{ms}-{n}").into_bytes())
        }
        _ => {
            let count = given.int_in_range(0..=6)?;
            Value::Array((0..count).map(|_| value(given, depth - 1)).collect::<Result<_, _>>()?)
        }
    })
}

/// Entries of a stream, messages and answers are read or left alone.
pub fn replies(bytes: &[u8]) {
    if let Some(entry) = Entry::from_message(bytes) {
        assert!(entry.prev < entry.id);
        let (frame, _) = entry.body.seal(Some(entry.id));
        assert!(std::str::from_utf8(&frame).is_ok());
    }
    let Ok(value) = value(&mut Unstructured::new(bytes), 4) else { return };
    let _ = published(&value);
    if let Some(page) = Page::from_reply(&value) {
        assert!(page.entries.iter().all(|entry| entry.prev < entry.id));
    }
}

/// A URL names a bus, or the error says what is wrong; a password is in neither.
pub fn urls(bytes: &[u8]) {
    let mut given = Unstructured::new(bytes);
    let Ok((scheme, rest)) = <(u8, &str)>::arbitrary(&mut given) else { return };
    let scheme = ["redis://", "rediss://", "local://", "memory://", ""][usize::from(scheme % 5)];
    let secret = "hunter2hunter2";
    for text in [format!("{scheme}{rest}"), format!("{scheme}:{secret}@{rest}")] {
        let said = match settings(&text).check() {
            Ok(()) => match _sse_channel::bus::redis::shown(&text) {
                Ok(shown) => shown,
                Err(_) => continue,
            },
            Err(error) => error.to_string(),
        };
        let is_named = rest.contains(secret);
        assert!(is_named || !said.contains(secret), "{said}");
    }
}

fn settings(url: &str) -> Settings {
    Settings { url: url.to_owned(), project: "fuzz".to_owned(), limits: Limits::default() }
}
