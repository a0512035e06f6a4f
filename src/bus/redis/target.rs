//! Where Redis is and how to be let in: what a `redis://` URL says.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use url::Url;

use crate::error::{Error, Result};

const DEFAULT_PORT: u16 = 6379;
const DEFAULT_PREFIX: &str = "sse_channel:";

/// What a bus URL says, checked.
#[derive(Clone, Debug)]
pub struct Target {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The number of the database.
    pub db: i64,
    /// Who we are, if not the default user.
    pub user: Option<String>,
    /// The proof of it.
    pub password: Option<Secret>,
    /// Whether and how the connection is encrypted.
    pub tls: Option<Tls>,
    /// What all keys begin with.
    pub prefix: String,
    /// The URL without what is secret.
    pub shown: String,
}

/// What encryption needs to know.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// A file of certificates to trust instead of the machine's own.
    pub ca: Option<PathBuf>,
}

/// A text that no log must show.
#[derive(Clone)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Target {
    /// Reads `redis://[user:password@]host[:port][/db][?prefix=name]`, or `rediss://` with an
    /// optional `ca=/path`.
    ///
    /// # Errors
    /// `Bus` with what is wrong, as the end of a sentence about the URL. It never repeats a part
    /// that could be one of a password.
    pub fn parse(text: &str) -> Result<Target> {
        let wrong = |what: &str| Err(Error::Bus(what.to_owned()));
        let url = match Url::parse(text) {
            Ok(url) => url,
            Err(problem) => {
                return wrong(&format!(
                    "which is no URL: {problem} (in a password, write % as %25, / as %2F, ? as \
                     %3F, # as %23 and @ as %40)"
                ));
            }
        };
        let host = match url.host_str() {
            Some(host) if !host.is_empty() => host.trim_matches(['[', ']']).to_owned(),
            _ => return wrong("which has no host: write redis://host:port/db"),
        };
        if url.fragment().is_some() {
            return wrong("which has a #: in a password, write it as %23");
        }
        if url.query().is_some_and(|query| query.contains('@')) {
            return wrong(
                "which has an @ behind a ?: in a password, write ? as %3F; elsewhere, @ as %40",
            );
        }
        let mut tls = (url.scheme() == "rediss").then(Tls::default);
        let port = url.port().unwrap_or(DEFAULT_PORT);
        if port == 0 {
            return wrong("which has the port 0: Redis listens on 6379 unless it was told another");
        }
        let db = match url.path().trim_start_matches('/') {
            "" => 0,
            number => match number.parse() {
                Ok(db @ 0..=i64::MAX) => db,
                _ => return wrong("whose path is not the number of a database, such as /0"),
            },
        };
        let decoded = |part: &str| match percent_decode_str(part).decode_utf8() {
            Ok(part) if !part.is_empty() => Some(part.into_owned()),
            _ => None,
        };
        let user = decoded(url.username());
        let password = url.password().and_then(decoded).map(Secret);
        if user.is_some() && password.is_none() {
            return wrong(
                "which has a user and no password: write redis://user:password@host, or \
                 redis://:password@host for the default user",
            );
        }
        let mut prefix = None;
        for (option, value) in url.query_pairs() {
            match (&*option, tls.as_mut()) {
                ("prefix", _) if has_a_slot(&value) => prefix = Some(value.into_owned()),
                ("prefix", _) => {
                    return wrong("whose prefix has a {}: keys of one channel would part company");
                }
                ("ca", Some(tls)) if !value.is_empty() => tls.ca = Some(PathBuf::from(&*value)),
                ("ca", Some(_)) => return wrong("whose option ca names no file"),
                ("ca", None) => return wrong("whose option ca needs TLS: write rediss://"),
                _ => {
                    return wrong(&format!(
                        "which has an unknown option {option:?}: there are prefix and, for \
                         rediss://, ca; a password goes before the host"
                    ));
                }
            }
        }
        let mut shown = format!("{}://{}:{port}/{db}", url.scheme(), bracketed(&host));
        if let Some(prefix) = &prefix {
            shown.push_str("?prefix=");
            shown.push_str(prefix);
        }
        let prefix = prefix.unwrap_or_else(|| DEFAULT_PREFIX.to_owned());
        Ok(Target { host, port, db, user, password, tls, prefix, shown })
    }

    /// Host and port, for a sentence.
    pub fn place(&self) -> String {
        format!("{}:{}", bracketed(&self.host), self.port)
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Whether keys after `prefix` have the hash tag that keeps a channel's keys in one slot.
fn has_a_slot(prefix: &str) -> bool {
    prefix.split_once('{').is_none_or(|(_, rest)| !rest.starts_with('}'))
}

/// The keys of one channel, all in one slot of a cluster.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The stream: its events.
    pub stream: String,
    /// The Pub/Sub channel, on which events are announced. Databases of one server have keys of
    /// their own, but share all Pub/Sub channels, so that the name tells which database it is.
    pub announced: String,
    /// The hash: its newest id, and what it takes to go on from there.
    pub state: String,
}

impl Keys {
    /// The keys of `channel` in the database `db`; no two channels share any.
    pub fn new(prefix: &str, db: i64, channel: &str) -> Keys {
        // A tag ends at the first brace and must not be empty.
        let tag = match channel {
            "" => "%".to_owned(),
            _ => channel.replace('%', "%25").replace('}', "%7D"),
        };
        let stream = format!("{prefix}{{{tag}}}");
        let state = format!("{stream}:state");
        let announced = if db == 0 { stream.clone() } else { format!("{stream}:{db}") };
        Keys { stream, announced, state }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(url: &str) -> String {
        Target::parse(url).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_url_says_where_and_how() -> Result<()> {
        let plain = Target::parse("redis://example.org")?;
        assert_eq!((plain.host.as_str(), plain.port, plain.db), ("example.org", 6379, 0));
        assert_eq!(plain.prefix, "sse_channel:");
        assert!(plain.tls.is_none() && plain.user.is_none() && plain.password.is_none());
        assert_eq!(plain.shown, "redis://example.org:6379/0");
        let full = Target::parse("rediss://me:p%40%2F%25@[::1]:7000/3?prefix=a%3A&ca=/ca.pem")?;
        assert_eq!((full.host.as_str(), full.port, full.db), ("::1", 7000, 3));
        assert_eq!(full.user.as_deref(), Some("me"));
        assert_eq!(full.password.as_ref().map(|secret| secret.0.as_str()), Some("p@/%"));
        assert_eq!(full.tls.as_ref().and_then(|tls| tls.ca.clone()), Some("/ca.pem".into()));
        assert_eq!(full.shown, "rediss://[::1]:7000/3?prefix=a:");
        assert_eq!(full.place(), "[::1]:7000");
        let default_user = Target::parse("redis://:word@h/")?;
        assert!(default_user.user.is_none() && default_user.password.is_some());
        Ok(())
    }

    #[test]
    fn what_is_wrong_with_a_url_is_named_and_nothing_secret() {
        for (url, named) in [
            ("redis://", "host"),
            ("redis:///0", "host"),
            ("redis://h:x", "port"),
            ("redis://h:0", "port 0"),
            ("redis://h:70000", "port"),
            ("redis://h/x", "database"),
            ("redis://h/-1", "database"),
            ("redis://h/0/1", "database"),
            ("redis://user@h", "no password"),
            ("redis://h?prefx=x", "prefx"),
            ("redis://h?ca=/x", "rediss://"),
            ("rediss://h?ca=", "no file"),
            ("redis://h?prefix=a{}b", "{}"),
            ("redis://u:secret#word@h", "password"),
            ("redis://u:secret/word@h", "password"),
            ("redis://u:12/secret@h", "database"),
            ("redis://u:12?secret@h", "%3F"),
            ("redis://u:12?prefix=secret@h", "%3F"),
            ("redis://h?password=secret", "before the host"),
        ] {
            let problem = problem(url);
            assert!(problem.contains(named), "{url}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
        let target = Target::parse("redis://u:secret@h");
        assert!(!format!("{target:?}").contains("secret"));
    }

    #[test]
    fn the_keys_of_any_channel_share_a_slot_with_no_other_channel() {
        // As Redis finds the part that it hashes.
        fn tag(key: &str) -> &str {
            match key.split_once('{').and_then(|(_, rest)| rest.split_once('}')) {
                Some((tag, _)) if !tag.is_empty() => tag,
                _ => key,
            }
        }
        let names = [
            "", "%", "a", "a}", "}", "{", "{}", "}{", "a:state", "a}:state", "%7D", "日本", "\n\0",
        ];
        let mut seen = std::collections::HashSet::new();
        for prefix in ["sse_channel:", "", "{app}:", "a{", "a}", "a{b"] {
            assert!(has_a_slot(prefix));
            for name in names {
                let keys = Keys::new(prefix, 0, name);
                assert_eq!(tag(&keys.stream), tag(&keys.state), "{prefix:?} {name:?}");
                let other = Keys::new(prefix, 7, name);
                assert_eq!(tag(&other.announced), tag(&other.stream), "{prefix:?} {name:?}");
                assert!(seen.insert(keys.stream) && seen.insert(keys.state), "{name:?}");
                assert!(seen.insert(other.announced), "{name:?}");
            }
        }
    }
}
