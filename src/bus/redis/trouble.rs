//! What goes wrong with Redis, told so that somebody can mend it.

use redis::{ErrorKind, RedisError, ServerErrorKind};

/// Why something was not done.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// The connection is of no use any more: another may be.
    Lost(String),
    /// Redis does not do it, and trying again will not help. The text says what would.
    Refused(String),
    /// The same from a replica, whose address may belong to the right server by now.
    Demoted(String),
}

impl Trouble {
    /// What an answer of Redis, or the want of one, means.
    pub fn from_redis(error: &RedisError) -> Trouble {
        let text = plain(error);
        let refused = |advice: &str| Trouble::Refused(format!("{text}; {advice}"));
        match error.kind() {
            ErrorKind::Io | ErrorKind::Parse => return Trouble::Lost(text),
            // Gone with a SCRIPT FLUSH: a new connection loads the scripts again.
            ErrorKind::Server(
                ServerErrorKind::NoScript
                | ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown,
            ) => return Trouble::Lost(text),
            ErrorKind::RESP3NotSupported => return refused("Redis 6.2 or newer is needed"),
            ErrorKind::Server(
                ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::CrossSlot,
            ) => {
                return refused(
                    "it is one node of a cluster, and BUS must name a single Redis (or a prefix \
                     with a {tag} that lies on this node)",
                );
            }
            _ => {}
        }
        // Older servers wrap what a script's command said.
        let says = |word: &str| text.contains(word);
        if says("WRONGPASS") || says("NOAUTH") || error.kind() == ErrorKind::AuthenticationFailed {
            refused("check the user and the password in BUS")
        } else if says("READONLY") {
            Trouble::Demoted(format!("{text}; BUS must name the primary, not a replica"))
        } else if says("OOM command not allowed") {
            refused("it is full: raise its maxmemory, or lower HISTORY_AGE or HISTORY_BYTES")
        } else if says("NOPERM") || says("ACL failure") || says("can't run this command") {
            refused(
                "grant its user what the bus needs: ~prefix* &prefix* +@read +@write +@pubsub \
                 +@scripting +@connection +time +command",
            )
        } else if says("WRONGTYPE") {
            refused("something else uses the key: choose another prefix in BUS")
        } else if says("equal or smaller than the target stream") {
            refused("something else writes to the stream: choose another prefix in BUS")
        } else if says("MISCONF") || says("NOREPLICAS") {
            refused("it refuses writes until it can keep them safe; see its log")
        } else if says("BUSY Redis") {
            Trouble::Lost(text)
        } else if says("unknown command") || says("syntax error") {
            refused(
                "Redis 6.2 or newer is needed, with all of its commands for streams and scripts",
            )
        } else {
            Trouble::Refused(text)
        }
    }

    /// The text alone.
    pub fn text(&self) -> &str {
        match self {
            Trouble::Lost(text) | Trouble::Refused(text) | Trouble::Demoted(text) => text,
        }
    }
}

impl From<RedisError> for Trouble {
    fn from(error: RedisError) -> Trouble {
        Trouble::from_redis(&error)
    }
}

/// The error as Redis worded it.
fn plain(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        (Some(code), None) => code.to_owned(),
        (None, Some(detail)) => detail.to_owned(),
        (None, None) => error.to_string(),
    }
}
