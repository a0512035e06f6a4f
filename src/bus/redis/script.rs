//! What runs inside Redis: each script is one step that nothing comes between.
//!
//! A channel is a stream and a hash beside it, its *state*: `last` (the newest id, or where the
//! channel began), `history` (the largest that anybody asked for), `size` (a running mean of an
//! entry's bytes), `renew` (when to move the expiry on) and for each process that published lately
//! `p:<producer>`, its last sequence number here and the id that it got.

use redis::{Cmd, cmd};

use crate::bus::Publication;
use crate::bus::redis::target::Keys;
use crate::event::Format;
use crate::event_id::EventId;
use crate::history::Limits;
use crate::survey;

/// Entries of a stream that are kept in any case, so that a listener that was away for a moment
/// finds what it missed.
const SLACK: usize = 1000;

/// More than any history needs, and within what Lua counts exactly.
const MOST_EVENTS: usize = 1_000_000_000;

/// Ten years: Redis refuses an expiry that overflows.
const LONGEST_AGE: u64 = 315_360_000_000;

/// Orders, stores and announces one event, and gives its id and how many were told. The first write
/// is the one that Redis refuses when it is full: then nothing is done.
///
/// A sequence number that is not above the producer's last was here before, by a connection that
/// was given up: it gets the id from then, alone. So a publication lands once, and late bytes of a
/// dead connection cannot undo the order.
pub const PUBLISH: &str = r"
local stream, state = KEYS[1], KEYS[2]
local producer, sequence = ARGV[1], tonumber(ARGV[2])
local history, age, bytes, slack =
    tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local flags, frame, beside, announce, announced =
    ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local mark = producer .. ' ' .. ARGV[2]

local known = redis.call('HMGET', state, 'last', 'history', 'size', 'renew', producer)
local latest, latest_id = string.match(known[5] or '', '^(%d+) (%S+)$')
if latest and tonumber(latest) >= sequence then
    local before = '+'
    for _ = 1, 64 do
        local page = redis.call('XREVRANGE', stream, before, '-', 'COUNT', 64)
        for _, entry in ipairs(page) do
            for i = 1, #entry[2], 2 do
                if entry[2][i] == 'mark' and entry[2][i + 1] == mark then return entry[1] end
            end
            before = '(' .. entry[1]
        end
        if #page < 64 then break end
    end
    return latest_id
end

local time = redis.call('TIME')
local ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local n = tonumber(time[2]) % 1000
local last = known[1]
if not last then
    local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
    last = newest and newest[1] or string.format('%.0f-%.0f', ms, n)
end
local last_ms, last_n = string.match(last, '^(%d+)%-(%d+)$')
last_ms, last_n = tonumber(last_ms), tonumber(last_n)
if ms < last_ms or (ms == last_ms and n <= last_n) then ms, n = last_ms, last_n + 1 end
local id = string.format('%.0f-%.0f', ms, n)

history = math.max(history, tonumber(known[2]) or 0)
local weight = #frame + #beside + 100
local size = tonumber(known[3]) or weight
size = size + (weight - size) / 16
local keep = math.max(1, math.min(math.max(history, slack), math.floor(bytes / size)))
redis.call('XADD', stream, 'MAXLEN', '~', string.format('%.0f', keep), id, 'prev', last,
    'mark', mark, 'flags', flags, 'frame', frame, 'beside', beside)

local renew = tonumber(known[4]) or 0
if ms >= renew then
    renew = ms + math.floor(age / 16)
    redis.call('PEXPIRE', stream, string.format('%.0f', age + age / 8))
end
redis.call('HSET', state, 'last', id, 'history', string.format('%.0f', history), 'size',
    string.format('%.0f', size), 'renew', string.format('%.0f', renew),
    producer, ARGV[2] .. ' ' .. id)
if renew > (tonumber(known[4]) or 0) then
    redis.call('PEXPIRE', state, string.format('%.0f', 2 * (age + age / 8)))
end
if not latest and redis.call('HLEN', state) > 20 then
    local all = redis.call('HGETALL', state)
    for i = 1, #all, 2 do
        local at = string.match(all[i], '^p:') and string.match(all[i + 1], ' (%d+)%-')
        if at and tonumber(at) < ms - 3600000 then redis.call('HDEL', state, all[i]) end
    end
end
local heard = redis.call(announce, announced,
    id .. ' ' .. last .. ' ' .. flags .. ' ' .. #frame .. '\n' .. frame .. beside)
return id .. ' ' .. heard
";

/// Gives the newest id of a channel. A channel without any gets the time as the place where it
/// begins; one that the caller knows further than Redis does, as after a loss of its newest
/// writes, goes on from there.
pub const LOOK: &str = r"
local stream, state = KEYS[1], KEYS[2]
local function parts(id)
    local ms, n = string.match(id, '^(%d+)%-(%d+)$')
    return tonumber(ms), tonumber(n)
end
local stored = redis.call('HGET', state, 'last')
local last = stored
if not last then
    local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
    local time = redis.call('TIME')
    last = newest and newest[1] or string.format('%.0f-%.0f',
        tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), tonumber(time[2]) % 1000)
end
local last_ms, last_n = parts(last)
local ms, n = parts(ARGV[1])
if ms > last_ms or (ms == last_ms and n > last_n) then last = ARGV[1] end
if last ~= stored then
    redis.call('HSET', state, 'last', last)
    if not stored then redis.call('PEXPIRE', state, ARGV[2]) end
end
return last
";

/// Gives a page of a stream after an id: the newest id of the channel, entries up to a number and
/// about a size (one at least), and whether there is more.
pub const READ: &str = r"
local count, bytes = tonumber(ARGV[2]), tonumber(ARGV[3])
local page = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', count)
local kept, size = {}, 0
for i, entry in ipairs(page) do
    for _, text in ipairs(entry[2]) do size = size + #text end
    if i > 1 and size > bytes then break end
    kept[i] = entry
end
local more = (#kept < #page or #page == count) and 1 or 0
return {redis.call('HGET', KEYS[2], 'last') or '', kept, more}
";

/// The scripts of one server, by what it calls them.
#[derive(Clone, Debug)]
pub struct Scripts {
    /// `PUBLISH`.
    pub publish: String,
    /// `LOOK`.
    pub look: String,
    /// `READ`.
    pub read: String,
    /// The command that announces an event.
    pub announce: &'static str,
}

/// Who publishes: the same for all publications of a process, and of no other.
#[derive(Clone, Debug)]
pub struct Producer(pub String);

impl Scripts {
    fn call(&self, sha: &str, keys: &Keys) -> Cmd {
        let mut call = cmd("EVALSHA");
        call.arg(sha).arg(2).arg(&keys.stream).arg(&keys.state);
        call
    }

    /// The call that publishes.
    pub fn publish(
        &self,
        keys: &Keys,
        producer: &Producer,
        sequence: u64,
        publication: &Publication,
        limits: Limits,
    ) -> Cmd {
        let Publication { channel, history, body, format, .. } = publication;
        let mut call = self.call(&self.publish, keys);
        call.arg(&producer.0)
            .arg(sequence)
            .arg((*history).min(MOST_EVENTS))
            .arg(age(limits))
            .arg(limits.bytes)
            .arg(if survey::is_passing(channel) { 1 } else { SLACK })
            .arg(flags(*format, body.has_data()))
            .arg(body.frame())
            .arg(body.beside().unwrap_or_default())
            .arg(self.announce)
            .arg(&keys.announced);
        call
    }

    /// The call that looks, by a caller who knows the channel up to `known`.
    pub fn look(&self, keys: &Keys, known: EventId, limits: Limits) -> Cmd {
        let mut call = self.call(&self.look, keys);
        call.arg(known.to_string()).arg(2 * age(limits));
        call
    }

    /// The call that reads a page.
    pub fn read(&self, keys: &Keys, after: EventId, count: usize, bytes: usize) -> Cmd {
        let mut call = self.call(&self.read, keys);
        call.arg(after.to_string()).arg(count).arg(bytes);
        call
    }
}

/// How the message is read back, in letters.
pub fn flags(format: Format, has_data: bool) -> &'static str {
    match (format, has_data) {
        (Format::Json, true) => "jd",
        (Format::Json, false) => "j",
        (Format::Text, true) => "td",
        (Format::Text, false) => "t",
    }
}

fn age(limits: Limits) -> u64 {
    limits.age.min(LONGEST_AGE)
}
