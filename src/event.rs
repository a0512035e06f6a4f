//! An event: what was published, in the forms that the three kinds of clients take.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::coding::{Blocks, Coding};
use crate::event_id::EventId;
use crate::frame::Body;
use crate::metrics::Counters;

/// How a queue's reader gets the message back from the wire's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The text is the message.
    Text,
    /// The text is JSON of the message.
    Json,
}

/// What the core keeps for the language binding without knowing what it is.
pub type Attachment = Box<dyn Any + Send + Sync>;

/// An event before the bus ordered it.
#[derive(Debug)]
pub struct Draft {
    /// The encoded frame; `None` for an object that only queues of this process can have.
    pub body: Option<Body>,
    /// How to read the message back.
    pub format: Format,
    /// Whether queues get it: an event of comment or retry alone has no message.
    pub has_message: bool,
    /// The decoded message, when it need not be decoded.
    pub decoded: Option<Attachment>,
}

/// An ordered event, shared by all clients that have it.
#[derive(Debug)]
pub struct Event {
    /// Its place in the order; `None` for one put into a single queue.
    pub id: Option<EventId>,
    /// The bytes of the wire; empty for an object that has none.
    pub frame: Bytes,
    /// The frame compressed, made by the first connection that takes it so and shared by all.
    compressed: OnceLock<Box<Blocks>>,
    /// The message's text.
    pub data: Option<Bytes>,
    /// How to read `data` back.
    pub format: Format,
    /// Whether queues get it.
    pub has_message: bool,
    /// The decoded message, made by its first reader and shared by the others.
    pub decoded: OnceLock<Attachment>,
    /// The channel's figures that its delivery adds to.
    pub counters: Option<Arc<Counters>>,
}

impl Event {
    /// Freezes a draft under its id.
    pub fn seal(draft: Draft, id: Option<EventId>, counters: Option<Arc<Counters>>) -> Event {
        let (frame, data) = match draft.body {
            Some(body) => body.seal(id),
            None => (Bytes::new(), None),
        };
        let decoded = OnceLock::new();
        if let Some(attachment) = draft.decoded {
            // A new cell is empty, so this cannot fail.
            let _ = decoded.set(attachment);
        }
        Event {
            id,
            frame,
            compressed: OnceLock::new(),
            data,
            format: draft.format,
            has_message: draft.has_message,
            decoded,
            counters,
        }
    }

    /// What only streams get, outside the order: it has no id and is not remembered.
    pub fn notice(frame: Bytes) -> Event {
        Event {
            id: None,
            frame,
            compressed: OnceLock::new(),
            data: None,
            format: Format::Text,
            has_message: false,
            decoded: OnceLock::new(),
            counters: None,
        }
    }

    /// The frame compressed. The first call compresses it, and others meanwhile wait: not to be called
    /// under a lock that many need.
    pub fn compressed(&self) -> &Blocks {
        self.compressed.get_or_init(|| Box::new(Blocks::of(&self.frame)))
    }

    /// Whether it was compressed already.
    pub fn is_compressed(&self) -> bool {
        self.compressed.get().is_some()
    }

    /// The frame's bytes in a coding; the first for a compressed one takes the time to make them.
    pub fn coded(&self, coding: Coding) -> &[u8] {
        match coding {
            Coding::Identity => &self.frame,
            Coding::Gzip => self.compressed().bytes(),
        }
    }

    /// Memory that history reckons for it, in bytes; its compressed form, if it gets one, is not among them.
    pub fn weight(&self) -> usize {
        self.frame.len() + size_of::<Event>()
    }
}
