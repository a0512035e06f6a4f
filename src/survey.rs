//! Surveys: one process asks all that have streams, and each answers for itself, over the bus.
//!
//! A question and its answers are events of two channels of the library's own. Who answers needs no
//! interpreter: a worker that is busy, or waits in `accept`, does. One that is stopped does not.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use serde_json::{Value, json};
use url::form_urlencoded;

use crate::bus::{Bus, Publication};
use crate::clients::Slot;
use crate::event::{Event, Format};
use crate::event_id::{EventId, now_ms};
use crate::frame::{Body, Fields};
use crate::host::REFUSALS;
use crate::hub::{ChannelFigures, Hub, Outlet, Passed};
use crate::metrics::{Counted, Reason};
use crate::offload::{Backlogged, Offload};
use crate::sync::lock;
use crate::ticket::Answering;

/// The channel of questions, which every process with streams hears.
pub const QUESTIONS: &str = "sse_channel.questions";

/// The channel of answers, heard by those who ask.
pub const ANSWERS: &str = "sse_channel.answers";

/// Events of either that are remembered: none is of use to who comes later.
pub const HISTORY: usize = 16;

/// Clients that an answer names, those that are the furthest behind.
pub const SLOWEST: usize = 10;

/// Channels that an answer to `About::Figures` names, the largest.
const LARGEST: usize = 100;

/// Whether a channel is one of the two.
pub fn is_one_of_its(channel: &str) -> bool {
    channel == QUESTIONS || channel == ANSWERS
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum About {
    /// How many clients a channel has, or each that has any.
    Clients(Option<String>),
    /// What the process has counted, and which of its clients are slow.
    Figures,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    /// What its answers repeat.
    token: String,
    about: About,
}

impl Question {
    /// What travels: `token`, `about` and `channel`, as a form. `None` for what is not known here:
    /// of a later version, perhaps.
    fn parse(text: &[u8]) -> Option<Question> {
        let (mut token, mut about, mut channel) = (None, None, None);
        for (name, value) in form_urlencoded::parse(text) {
            match &*name {
                "token" => token = Some(value.into_owned()),
                "about" => about = Some(value.into_owned()),
                "channel" => channel = Some(value.into_owned()),
                _ => return None,
            }
        }
        let about = match (about?.as_str(), channel) {
            ("clients", channel) => About::Clients(channel),
            ("figures", None) => About::Figures,
            _ => return None,
        };
        Some(Question { token: token?, about })
    }
}

/// Answers for this process.
#[derive(Debug)]
pub struct Respondent {
    hub: Weak<Hub>,
    bus: Weak<dyn Bus>,
    offload: Weak<Offload>,
    began: Instant,
    began_at: u64,
    /// Asked and not yet answered. Held for a push, also under the hub's lock.
    asked: Mutex<Vec<Arc<Event>>>,
}

impl Respondent {
    /// Answers from now on what is asked on the bus.
    pub fn install(hub: &Arc<Hub>, bus: &Arc<dyn Bus>, offload: &Arc<Offload>) {
        let respondent = Arc::new(Respondent {
            hub: Arc::downgrade(hub),
            bus: Arc::downgrade(bus),
            offload: Arc::downgrade(offload),
            began: Instant::now(),
            began_at: now_ms(),
            asked: Mutex::default(),
        });
        hub.add_own(QUESTIONS, HISTORY, &(respondent as _));
    }

    fn answer(&self, question: Question) {
        let (Some(hub), Some(bus)) = (self.hub.upgrade(), self.bus.upgrade()) else { return };
        let mut facts = json!({
            "token": question.token,
            "host": host_name(),
            "process": std::process::id(),
            // Tells it from another one with that number, of another container or time.
            "began": self.began_at,
        });
        let report = match question.about {
            About::Clients(channel) => {
                facts["clients"] = clients(&hub.all_figures(), channel.as_deref());
                Report::new(&bus, facts)
            }
            About::Figures => {
                facts["seconds"] = self.began.elapsed().as_secs_f64().into();
                facts["memory"] = memory().into();
                let figures = bus.figures();
                facts["bus"] = json!({
                    "connected": figures.connected,
                    "lag": figures.lag,
                    "waiting": figures.waiting,
                });
                let refused = hub.host().own().refused;
                let refused = REFUSALS.iter().zip(refused).filter(|(_, count)| *count > 0);
                facts["refused"] = refused.map(|(name, count)| (*name, count)).collect();
                put_figures(&mut facts, hub.all_figures());
                let report = Report::new(&bus, facts);
                report.add(slow_streams(&hub));
                if let Some(offload) = self.offload.upgrade() {
                    offload.survey(&report);
                }
                report
            }
        };
        // Sent when the last thread that has something to add has let go of it.
        drop(report);
    }
}

impl Outlet for Respondent {
    fn put(&self, passed: Passed) {
        if let Passed::Event { event, .. } = passed {
            lock(&self.asked).push(event);
        }
    }

    fn ring(&self) {
        for event in std::mem::take(&mut *lock(&self.asked)) {
            if let Some(question) = event.data.as_deref().and_then(Question::parse) {
                self.answer(question);
            }
        }
    }
}

/// A client that is behind.
#[derive(Clone, Debug)]
pub struct SlowClient {
    /// Seconds since the oldest event that waits for it was ordered.
    behind: f64,
    told: Value,
}

impl SlowClient {
    /// What is told of it; `None` for one that has nothing to wait for.
    pub fn new(
        kind: Counted,
        slot: Option<&Slot>,
        channels: &[Arc<str>],
        waiting: Backlogged,
    ) -> Option<SlowClient> {
        let behind = now_ms().saturating_sub(waiting.since?) as f64 / 1000.0;
        let holder = slot.map(|slot| &slot.holder);
        let mut channels: Vec<&str> = channels.iter().map(|name| &**name).collect();
        channels.sort_unstable();
        channels.dedup();
        let told = json!({
            "client": slot.map(|slot| format!("{}-{}", std::process::id(), slot.number)),
            "kind": kind.name(),
            "channels": channels,
            "user": holder.and_then(|holder| holder.user.as_deref()),
            "address": holder.and_then(|holder| holder.address.as_deref()),
            "behind": behind,
            "frames": waiting.frames,
            "bytes": waiting.bytes,
            "seconds": slot.map(|slot| slot.since.elapsed().as_secs_f64()),
        });
        Some(SlowClient { behind, told })
    }
}

/// An answer that several threads add to. It is sent when the last has let go of it.
#[derive(Debug)]
pub struct Report {
    bus: Weak<dyn Bus>,
    facts: Value,
    /// Held for a push.
    slow: Mutex<Vec<SlowClient>>,
}

impl Report {
    fn new(bus: &Arc<dyn Bus>, facts: Value) -> Arc<Report> {
        Arc::new(Report { bus: Arc::downgrade(bus), facts, slow: Mutex::default() })
    }

    /// Adds clients that are behind; of all, the slowest are told.
    pub fn add(&self, more: impl IntoIterator<Item = SlowClient>) {
        let mut more: Vec<SlowClient> = more.into_iter().collect();
        keep_slowest(&mut more);
        let mut slow = lock(&self.slow);
        slow.append(&mut more);
        keep_slowest(&mut slow);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let Some(bus) = self.bus.upgrade() else { return };
        let slowest = std::mem::take(&mut *lock(&self.slow));
        self.facts["slowest"] = slowest.into_iter().map(|client| client.told).collect();
        let text = self.facts.to_string();
        let fields = Fields { data: Some(&text), ..Fields::default() };
        let Ok(body) = Body::encode(&fields, usize::MAX) else { return };
        // Nobody waits for what becomes of it: who asked does not wait for ever.
        let (_, answering) = Answering::new();
        bus.publish(
            Publication {
                channel: ANSWERS.into(),
                history: HISTORY,
                body,
                format: Format::Json,
                heard_by: None,
            },
            answering,
        );
    }
}

fn keep_slowest(clients: &mut Vec<SlowClient>) {
    clients.sort_by(|one, other| other.behind.total_cmp(&one.behind));
    clients.truncate(SLOWEST);
}

/// Streams that a Python server has not taken everything for.
fn slow_streams(hub: &Hub) -> Vec<SlowClient> {
    let slow = hub.slow_streams().into_iter();
    let told = slow.filter_map(|(client, channels)| {
        let since = client.oldest().map(|EventId { ms, .. }| ms);
        let waiting = Backlogged { since, frames: client.len(), bytes: None };
        SlowClient::new(Counted::Stream, client.slot().as_deref(), &channels, waiting)
    });
    told.collect()
}

fn clients(all: &[ChannelFigures], channel: Option<&str>) -> Value {
    let wanted = all.iter().filter(|its| channel.is_none_or(|name| *its.name == *name));
    let counts = wanted.map(|its| (its.name.to_string(), its.streams + its.sockets));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// Puts in the sums over all channels, and the channels with the most clients.
fn put_figures(facts: &mut Value, mut all: Vec<ChannelFigures>) {
    let of_kinds = |its: &ChannelFigures| [its.queues, its.streams, its.sockets];
    let mut kinds = [0; 3];
    let mut counts = [0; 5];
    let mut disconnected = [0; Reason::ALL.len()];
    let mut delays = Vec::new();
    let mut channels = Vec::new();
    all.sort_by_cached_key(|its| std::cmp::Reverse(of_kinds(its).iter().sum::<usize>()));
    for its in &all {
        let snapshot = its.counters.snapshot();
        let own = [
            snapshot.published(),
            snapshot.received(),
            snapshot.delivered(),
            snapshot.dropped(),
            snapshot.bytes(),
        ];
        add(&mut kinds, of_kinds(its));
        add(&mut counts, own);
        add(&mut disconnected, Reason::ALL.map(|reason| snapshot.disconnected(reason)));
        delays.resize(snapshot.delays().len(), 0);
        add(&mut delays, snapshot.delays().iter().copied());
        if channels.len() < LARGEST {
            let mut told = counted(own);
            told["name"] = (*its.name).into();
            told["clients"] = by_kind(of_kinds(its));
            channels.push(told);
        }
    }
    let mut totals = counted(counts);
    totals["clients"] = by_kind(kinds);
    totals["disconnected"] =
        Reason::ALL.iter().zip(disconnected).map(|(reason, count)| (reason.name(), count)).collect();
    totals["delays"] = delays.into();
    facts["totals"] = totals;
    facts["more_channels"] = (all.len() - channels.len()).into();
    facts["channels"] = channels.into();
}

fn add<T: std::ops::AddAssign>(sums: &mut [T], more: impl IntoIterator<Item = T>) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum += more;
    }
}

fn counted([published, received, delivered, dropped, bytes]: [u64; 5]) -> Value {
    json!({
        "published": published,
        "received": received,
        "delivered": delivered,
        "dropped": dropped,
        "bytes": bytes,
    })
}

fn by_kind(counts: [usize; 3]) -> Value {
    let kinds = [Counted::Queue, Counted::Stream, Counted::Socket];
    kinds.iter().zip(counts).map(|(kind, count)| (kind.name(), count)).collect()
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Bytes of memory that the process has for itself or shares; `None` where that is not told.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_understood_or_left_alone() {
        let parse = |text: &str| Question::parse(text.as_bytes()).map(|its| its.about);
        assert_eq!(parse("token=a&about=clients"), Some(About::Clients(None)));
        let of_one = Some(About::Clients(Some("ü &".to_owned())));
        assert_eq!(parse("token=a&about=clients&channel=%C3%BC+%26"), of_one);
        assert_eq!(parse("about=figures&token="), Some(About::Figures));
        for strange in ["", "about=figures", "token=a", "token=a&about=later", "\u{fffd}=&&"] {
            assert_eq!(parse(strange), None, "{strange:?}");
        }
        assert_eq!(parse("token=a&about=figures&later=1"), None);
    }
}
