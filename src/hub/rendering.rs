//! Renderings: what a channel's events are turned into for many clients at once.
//!
//! A rendering is a channel beside its sources, in the same hub and under the same ids: a client
//! of it resumes, is offloaded and is counted like any other. A renderer, which is a client of the
//! sources, takes each event; what becomes of it is put into the rendering, in the same order.

use std::sync::Arc;
use std::time::Duration;

use super::{Aftermath, Channel, ChannelKey, ChannelNumber, Hub, Registered, Resume, State};
use crate::error::Result;
use crate::event::{Attachment, Draft, Event};
use crate::event_id::{EventId, now_ms};
use crate::history::History;
use crate::metrics::Reason;
use crate::queue::Client;
use crate::sync::lock;

/// A rendering of a hub.
#[derive(Clone, Copy, Debug)]
pub struct Rendered {
    /// Its place among the channels.
    pub key: ChannelKey,
    number: ChannelNumber,
}

/// What has to be rendered before a client can resume.
#[derive(Debug, Default)]
pub struct Missing {
    /// The events, oldest first.
    pub events: Vec<Arc<Event>>,
    /// The id after which these are all.
    pub floor: EventId,
    /// The id after which they are rendered already.
    pub until: EventId,
}

impl Hub {
    /// Begins a rendering of `sources`, whose events `renderer` takes from now on. `None` when one
    /// of them is not heard: the bus must hear it first.
    ///
    /// # Errors
    /// `Closed` for a renderer that was registered before.
    pub fn begin_rendering(
        self: &Arc<Self>,
        sources: &[ChannelKey],
        renderer: &Arc<Client>,
        owner: Attachment,
    ) -> Result<Option<Rendered>> {
        let mut once: Vec<ChannelKey> = Vec::with_capacity(sources.len());
        for key in sources {
            // Given twice, it would remember and count everything twice.
            if !once.contains(key) {
                once.push(*key);
            }
        }
        let sources = &once[..];
        let mut state = lock(&self.state);
        // From here on the renderer keeps both of them heard.
        if !state.hears_own() || sources.iter().any(|key| !state.channels[*key].heard) {
            return Ok(None);
        }
        let its = || sources.iter().map(|key| &state.channels[*key]);
        let floor = its().map(|source| source.newest).max().unwrap_or_default();
        let limit = state.limit_of(sources);
        let mut rendering = Channel::new("".into(), History::new(limit, self.limits, floor));
        rendering.sources.extend_from_slice(sources);
        rendering.counters = its().flat_map(|source| source.counters.iter().cloned()).collect();
        let number = rendering.number;
        state.enter(self, renderer, sources, owner, &[])?;
        let key = state.channels.insert(rendering);
        for source in sources {
            state.channels[*source].renderings.push(key);
        }
        Ok(Some(Rendered { key, number }))
    }

    /// Registers a client with a rendering, as `register` does. `None` when it is over.
    ///
    /// # Errors
    /// `Closed` for a client that was registered before.
    pub fn register_rendered(
        self: &Arc<Self>,
        client: &Arc<Client>,
        at: Rendered,
        resume: Resume,
        owner: Attachment,
    ) -> Result<Option<Registered>> {
        let mut after = Aftermath::default();
        let mut state = lock(&self.state);
        if state.rendering(at).is_none() || !state.hears_own() {
            return Ok(None);
        }
        let registered = state.register(self, client, &[at.key], resume, owner, &mut after);
        drop(state);
        after.settle();
        registered.map(Some)
    }

    /// Puts what became of the source's event `id` into a rendering: an event of that id, or nothing.
    pub fn put_rendered(&self, at: Rendered, id: EventId, event: Option<&Arc<Event>>) {
        let mut after = Aftermath::default();
        {
            let mut state = lock(&self.state);
            let Some(channel) = state.rendering(at) else { return };
            channel.newest = channel.newest.max(id);
            if let Some(event) = event {
                channel.history.insert(event, now_ms(), &mut after.discarded);
                state.offer(at.key, event, &mut after);
            }
        }
        after.settle();
    }

    /// Events were lost: before `next`, or those that the sources do not have either. What was
    /// before is of no use to who resumes; the clients are told by `notice`.
    pub fn lose_rendered(&self, at: Rendered, next: Option<EventId>, notice: &Arc<Event>) {
        let mut after = Aftermath::default();
        {
            let mut state = lock(&self.state);
            let Some(channel) = state.rendering(at) else { return };
            let (newest, sources) = (channel.newest, channel.sources.clone());
            let floors = sources.iter().map(|key| state.channels[*key].history.floor());
            let floor = match next {
                Some(next) => next.before(),
                None => floors.max().unwrap_or(newest),
            };
            let Some(channel) = state.rendering(at) else { return };
            channel.history.restart(newest.max(floor), &mut after.discarded);
            state.offer(at.key, notice, &mut after);
        }
        after.settle();
    }

    /// Whether something has to be rendered first for a client that resumes after `last`.
    pub fn lacks_rendered(&self, at: Rendered, last: EventId) -> bool {
        let mut state = lock(&self.state);
        let Some(channel) = state.rendering(at) else { return false };
        last < channel.history.floor() || last > channel.newest
    }

    /// The events after `last` that the sources still have and that were not rendered.
    pub fn missing_rendered(&self, at: Rendered, last: EventId) -> Missing {
        let mut state = lock(&self.state);
        let Some(channel) = state.rendering(at) else { return Missing::default() };
        let until = channel.history.floor();
        let sources = channel.sources.clone();
        let limit = state.limit_of(&sources);
        if let Some(channel) = state.rendering(at) {
            channel.history.raise_limit(limit);
        }
        let histories = || sources.iter().map(|key| &state.channels[*key].history);
        let floor = histories().map(History::floor).max().unwrap_or_default().max(last);
        let mut events: Vec<Arc<Event>> = histories()
            .flat_map(|history| history.after(floor))
            .filter(|event| event.id.is_some_and(|id| id <= until))
            .map(Arc::clone)
            .collect();
        events.sort_by_key(|event| event.id);
        events.dedup_by_key(|event| event.id);
        Missing { events, floor, until }
    }

    /// Gives a rendering what was made of `missing_rendered`, oldest first; of no use if it has
    /// forgotten more meanwhile.
    pub fn read_back_rendered(
        &self,
        at: Rendered,
        (floor, until): (EventId, EventId),
        events: Vec<Arc<Event>>,
    ) {
        let mut state = lock(&self.state);
        if let Some(channel) = state.rendering(at).filter(|it| it.history.floor() == until) {
            channel.history.prepend(floor, events);
        }
    }

    /// Whether a rendering has clients.
    pub fn has_rendered_clients(&self, at: Rendered) -> bool {
        lock(&self.state).rendering(at).is_some_and(|channel| !channel.is_unused())
    }

    /// Ends a rendering and its renderer, if it had no client for so long. Gives whether it is over.
    pub fn end_rendering(&self, at: Rendered, renderer: &Arc<Client>, patience: Duration) -> bool {
        let mut after = Aftermath::default();
        let is_over = {
            let mut state = lock(&self.state);
            let in_use = state.rendering(at).is_some_and(|channel| {
                !channel.is_unused() || channel.idle_since.elapsed() < patience
            });
            if !in_use {
                if let Some(gone) = state.take_rendering(at) {
                    let Channel { mut history, .. } = gone;
                    history.restart(EventId::default(), &mut after.discarded);
                }
                state.remove(renderer, Reason::Closed, &mut after);
            }
            !in_use
        };
        after.settle();
        is_over
    }
}

impl State {
    fn rendering(&mut self, at: Rendered) -> Option<&mut Channel> {
        self.channels.get_mut(at.key).filter(|channel| channel.number == at.number)
    }

    fn take_rendering(&mut self, at: Rendered) -> Option<Channel> {
        self.rendering(at)?;
        let gone = self.channels.try_remove(at.key)?;
        for source in &gone.sources {
            self.channels[*source].renderings.retain(|key| *key != at.key);
        }
        Some(gone)
    }

    /// Events that a rendering of those channels remembers: as many as all of them.
    fn limit_of(&self, sources: &[ChannelKey]) -> usize {
        let limits = sources.iter().map(|key| self.channels[*key].history.limit());
        limits.fold(0, usize::saturating_add)
    }
}

/// What `source` was turned into, in its place.
pub fn render(source: &Event, draft: Draft) -> Event {
    Event::seal(draft, source.id, source.counters.clone())
}
