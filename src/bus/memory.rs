//! `memory://`: this process only. The hub itself orders and remembers.

use std::sync::Arc;

use crate::bus::{Attempt, Bus, BusFigures, Publication};
use crate::event::Draft;
use crate::event_id::EventId;
use crate::hub::{ChannelKey, Hub, Resume};
use crate::ticket::Answering;
use crate::wake::WakeBatch;

/// The bus of one process.
#[derive(Debug)]
pub struct MemoryBus {
    hub: Arc<Hub>,
}

impl MemoryBus {
    /// The bus of `hub`, which must be one that is the whole bus.
    pub fn new(hub: Arc<Hub>) -> MemoryBus {
        hub.host().note_connected(true);
        MemoryBus { hub }
    }

    fn send(&self, publication: Publication) -> crate::error::Result<EventId> {
        let Publication { channel, history, body, format, .. } = publication;
        let key = self.hub.channel(&channel, history);
        let has_message = body.has_data();
        self.hub.publish(key, Draft { body: Some(body), format, has_message, decoded: None })
    }
}

impl Bus for MemoryBus {
    fn url(&self) -> &str {
        "memory://"
    }

    fn try_publish(&self, publication: Publication) -> Attempt<Publication> {
        Attempt::Done(self.send(publication))
    }

    fn publish(&self, publication: Publication, answering: Answering) {
        if answering.claim() {
            let mut wakes = WakeBatch::default();
            answering.answer(self.send(publication), &mut wakes);
            wakes.flush();
        }
    }

    fn try_prepare(&self, _: &[ChannelKey], _: Resume) -> Attempt<()> {
        Attempt::Done(Ok(self.hub.newest()))
    }

    fn prepare(&self, _: Vec<ChannelKey>, _: Resume, answering: Answering) {
        let mut wakes = WakeBatch::default();
        answering.answer(Ok(self.hub.newest()), &mut wakes);
        wakes.flush();
    }

    fn left(&self) {}

    fn excuse(&self) -> String {
        "this process is too busy".to_owned()
    }

    fn figures(&self) -> BusFigures {
        BusFigures { connected: true, ..BusFigures::default() }
    }

    fn close(&self) {}
}
