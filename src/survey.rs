//! Surveys: one process asks all that have streams, and each answers for itself, over the bus.
//!
//! A question and its answers are events of two channels of the library's own. Who answers needs no
//! interpreter: a worker that is busy, or waits in `accept`, does. One that is stopped does not.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use serde_json::{Value, json};
use url::form_urlencoded;

use crate::bus::{Bus, Publication};
use crate::clients::Slot;
use crate::control::{self, Told};
use crate::event::Format;
use crate::event_id::now_ms;
use crate::frame::{Body, Fields};
use crate::host::{ProcessFigures, REFUSALS};
use crate::hub::{ChannelFigures, Hub, Outlet, Passed};
use crate::metrics::{Counted, Reason, Snapshot};
use crate::offload::{Backlogged, Offload};
use crate::queue::Client;
use crate::sync::{Mutex, lock};
use crate::ticket::Answering;

/// The channel of questions, which every process with streams hears.
pub const QUESTIONS: &str = "sse_channel.questions";

/// The channel of answers, heard by those who ask.
pub const ANSWERS: &str = "sse_channel.answers";

/// Events of either that are remembered: none is of use to who comes later.
pub const HISTORY: usize = 16;

/// The form of answers, and of what is made of them: it changes with their fields, so that processes
/// of two versions do not take each other's for their own.
pub const FORM: u32 = 1;

/// Clients that an answer names, those that are the furthest behind.
pub const SLOWEST: usize = 10;

/// Channels that a summary names, the largest.
const LARGEST: usize = 100;

/// Whether a channel is of the library's own, and its events are soon of no use.
pub fn is_passing(channel: &str) -> bool {
    channel.starts_with(control::OWN) && channel != control::CHANNEL
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
    asked: Told,
}

impl Respondent {
    /// Answers from now on what is asked on the bus.
    pub fn install(hub: &Arc<Hub>, bus: &Arc<dyn Bus>, offload: &Arc<Offload>) {
        let respondent = Arc::new(Respondent {
            hub: Arc::downgrade(hub),
            bus: Arc::downgrade(bus),
            offload: Arc::downgrade(offload),
            began: Instant::now(),
            asked: Told::default(),
        });
        hub.add_own(QUESTIONS, HISTORY, &(respondent as _));
    }

    fn answer(&self, question: Question) {
        let (Some(hub), Some(bus)) = (self.hub.upgrade(), self.bus.upgrade()) else { return };
        let mut facts = json!({
            "token": question.token,
            "form": FORM,
            "host": host_name(),
            "process": std::process::id(),
            "instance": hub.host().own().instance,
        });
        let report = match question.about {
            About::Clients(channel) => {
                facts["clients"] = clients(&hub.all_figures(), channel.as_deref());
                Report::new(&hub, &bus, facts)
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
                facts["refused"] = refusals(hub.host().own().refused);
                let mut summary = Summary::default();
                summary.add_own(&hub.all_figures());
                summary.put_into(&mut facts);
                let report = Report::new(&hub, &bus, facts);
                report.add(slowest_streams(&hub));
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
        self.asked.put(passed);
    }

    fn ring(&self) {
        for text in self.asked.take() {
            if let Some(question) = Question::parse(&text) {
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
    hub: Weak<Hub>,
    bus: Weak<dyn Bus>,
    facts: Value,
    /// Held for a push.
    slow: Mutex<Vec<SlowClient>>,
}

impl Report {
    fn new(hub: &Arc<Hub>, bus: &Arc<dyn Bus>, facts: Value) -> Arc<Report> {
        let (hub, bus) = (Arc::downgrade(hub), Arc::downgrade(bus));
        Arc::new(Report { hub, bus, facts, slow: Mutex::default() })
    }

    /// Whether it is about clients of that hub: those of private channels are told nobody.
    pub fn covers(&self, hub: &Weak<Hub>) -> bool {
        self.hub.ptr_eq(hub)
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

/// Of the streams that a Python server has not taken everything for, those that are the furthest
/// behind.
fn slowest_streams(hub: &Hub) -> Vec<SlowClient> {
    let since = |client: Arc<Client>| Some((client.oldest()?.ms, client));
    let mut behind: Vec<(u64, Arc<Client>)> =
        hub.slow_streams().into_iter().filter_map(since).collect();
    behind.sort_by_key(|(since, _)| *since);
    let told = behind.into_iter().take(SLOWEST).filter_map(|(since, client)| {
        let waiting = Backlogged { since: Some(since), frames: client.len(), bytes: None };
        let channels = hub.names_of_client(&client);
        SlowClient::new(Counted::Stream, client.slot().as_deref(), &channels, waiting)
    });
    told.collect()
}

fn clients(all: &[ChannelFigures], channel: Option<&str>) -> Value {
    let wanted = all.iter().filter(|its| channel.is_none_or(|name| *its.name == *name));
    let counts = wanted.map(|its| (its.name.to_string(), its.streams + its.sockets));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// What was counted of some channels: the sums over all, and the largest of them.
#[derive(Debug, Default)]
pub struct Summary {
    channels: HashMap<String, (Snapshot, [u64; KINDS.len()])>,
}

/// The kinds of clients, in the order in which they are counted here.
const KINDS: [Counted; 3] = [Counted::Queue, Counted::Stream, Counted::Socket];

impl Summary {
    /// Adds what a process has counted of a channel, which has so many clients of each kind.
    pub fn add(&mut self, channel: &str, snapshot: &Snapshot, clients: [u64; KINDS.len()]) {
        let (counted, kinds) = self.channels.entry(channel.to_owned()).or_default();
        // The clients stand beside it.
        counted.add_departed(snapshot);
        add(kinds, clients);
    }

    /// The same, of a process that counts where others see it.
    pub fn add_shared(&mut self, channel: &str, snapshot: &Snapshot) {
        self.add(channel, snapshot, KINDS.map(|kind| snapshot.clients(kind)));
    }

    /// The same, of channels of this process.
    pub fn add_own(&mut self, all: &[ChannelFigures]) {
        for its in all {
            let clients = [its.queues, its.streams, its.sockets].map(|count| count as u64);
            self.add(&its.name, &its.counters.snapshot(), clients);
        }
    }

    /// Puts it into `facts`, as `totals`, `channels` and `more_channels`.
    pub fn put_into(self, facts: &mut Value) {
        let mut all_counted = Snapshot::default();
        let mut all_kinds = [0; KINDS.len()];
        for (counted, kinds) in self.channels.values() {
            all_counted.add_departed(counted);
            add(&mut all_kinds, *kinds);
        }
        let reasons = Reason::ALL.iter();
        let mut totals = told(&all_counted, all_kinds);
        totals["disconnected"] =
            reasons.map(|reason| (reason.name(), all_counted.disconnected(*reason))).collect();
        totals["delays"] = all_counted.delays().into();
        facts["totals"] = totals;
        // The sum of those that had no room by name is none of them.
        let mut channels: Vec<_> =
            self.channels.into_iter().filter(|(name, _)| !name.is_empty()).collect();
        channels.sort_by_cached_key(|(name, (counted, kinds))| {
            (Reverse((kinds.iter().sum::<u64>(), counted.delivered())), name.clone())
        });
        facts["more_channels"] = channels.len().saturating_sub(LARGEST).into();
        let largest = channels.into_iter().take(LARGEST).map(|(name, (counted, kinds))| {
            let mut its = told(&counted, kinds);
            its["name"] = name.into();
            its
        });
        facts["channels"] = largest.collect();
    }
}

fn add(sums: &mut [u64], more: impl IntoIterator<Item = u64>) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum = sum.saturating_add(more);
    }
}

fn told(counted: &Snapshot, kinds: [u64; KINDS.len()]) -> Value {
    json!({
        "published": counted.published(),
        "received": counted.received(),
        "delivered": counted.delivered(),
        "dropped": counted.dropped(),
        "bytes": counted.bytes(),
        "clients": KINDS.iter().map(|kind| kind.name()).zip(kinds).collect::<Value>(),
    })
}

/// What all processes of this host have counted, also those without streams: `processes`, each as it
/// would answer, and `host`, the sums over all that live or did.
pub fn host_view(hub: &Hub) -> Value {
    let (own, others) = (hub.host().own(), hub.host().read());
    let all = hub.all_figures();
    let mut sum = Summary::default();
    let mut refused = own.refused;
    let mut processes = Vec::new();
    if !all.is_empty() {
        sum.add_own(&all);
        let mut its = Summary::default();
        its.add_own(&all);
        processes.push(view_of(&own, its));
    }
    for process in &others.processes {
        let mut its = Summary::default();
        for (name, snapshot) in &process.channels {
            its.add_shared(name, snapshot);
            sum.add_shared(name, snapshot);
        }
        add(&mut refused, process.refused);
        processes.push(view_of(process, its));
    }
    for (name, snapshot) in &others.departed.channels {
        sum.add(name, snapshot, [0; KINDS.len()]);
    }
    add(&mut refused, others.departed.refused);
    let mut host = json!({ "refused": refusals(refused) });
    sum.put_into(&mut host);
    json!({ "name": host_name(), "processes": processes, "host": host })
}

fn view_of(process: &ProcessFigures, its: Summary) -> Value {
    let mut view = json!({
        "process": process.pid,
        "instance": process.instance,
        "bus": { "connected": process.is_connected, "lag": process.lag as f64 / 1000.0 },
        "refused": refusals(process.refused),
    });
    its.put_into(&mut view);
    view
}

fn refusals(counts: [u64; REFUSALS.len()]) -> Value {
    let counted = REFUSALS.iter().zip(counts).filter(|(_, count)| *count > 0);
    counted.map(|(reason, count)| (*reason, count)).collect()
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
