//! One connection to Redis, ready for use: found, encrypted, let in, its scripts loaded.

use std::future::ready;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{BoxFuture, TryFutureExt};
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Cmd, ProtocolVersion, PushInfo, RedisConnectionInfo, Value, cmd,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::{JoinHandle, unconstrained};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use crate::bus::redis::entry::{self, Entry, Page};
use crate::bus::redis::lookup::Lookup;
use crate::bus::redis::script::{self, Scripts};
use crate::bus::redis::socket::Socket;
use crate::bus::redis::target::{Keys, Target, Tls};
use crate::bus::redis::trouble::Trouble;
use crate::event_id::EventId;
use crate::history::Limits;

/// What Redis may take to answer one command, and to let us in.
const PATIENCE: Duration = Duration::from_secs(5);

/// A peer that is silent for so long is asked by the kernel whether it is there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(15);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMES: u32 = 3;

/// What the kernel sent and nobody acknowledged for so long ends the connection.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// Commands that wait to be written, at the most: more than channels and publications there can be, since
/// one that had to wait for room could be overtaken. An empty queue takes no memory for it.
const QUEUE: usize = 1 << 20;

/// A page of a stream has so many bytes, or one event: well below what Redis lets a subscriber
/// fall behind by.
const PAGE_BYTES: usize = 1 << 20;
const PAGE_EVENTS: usize = 200;

/// The answer to a command that was given.
pub type Call<T> = BoxFuture<'static, Result<T, Trouble>>;

/// What commands are given to: cheap to copy.
#[derive(Clone, Debug)]
pub struct Line {
    connection: MultiplexedConnection,
    /// What runs inside this server.
    pub scripts: Arc<Scripts>,
    /// Whether Pub/Sub is sharded: Redis 7 and newer.
    sharded: bool,
}

/// A connection: ends when it is dropped.
#[derive(Debug)]
pub struct Link {
    /// For commands.
    pub line: Line,
    /// What Redis sends unasked, in the order of its doing. It ends with the connection.
    pub pushes: UnboundedReceiver<PushInfo>,
    driver: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// What is in the way.
    pub async fn open(target: &Target, lookup: &mut Lookup) -> Result<Link, Trouble> {
        match timeout(PATIENCE, Link::open_at_leisure(target, lookup)).await {
            Ok(opened) => opened,
            Err(_elapsed) => {
                let hint = if target.tls.is_some() { "; is this its port for TLS?" } else { "" };
                Err(Trouble::Lost(format!("no answer within {PATIENCE:?}{hint}")))
            }
        }
    }

    async fn open_at_leisure(target: &Target, lookup: &mut Lookup) -> Result<Link, Trouble> {
        let socket = connect(target, lookup).await?;
        match &target.tls {
            None => Link::enter(target, socket).await,
            Some(tls) => {
                let config = trust(tls)?;
                let name = ServerName::try_from(target.host.clone())
                    .map_err(|problem| Trouble::Refused(problem.to_string()))?;
                let encrypted = TlsConnector::from(Arc::new(config)).connect(name, socket).await;
                Link::enter(target, encrypted.map_err(|problem| not_trusted(&problem))?).await
            }
        }
    }

    async fn enter<S>(target: &Target, stream: S) -> Result<Link, Trouble>
    where
        S: Unpin + tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
    {
        let (sender, pushes) = unbounded_channel();
        let mut info = RedisConnectionInfo::default()
            .set_db(target.db)
            .set_protocol(ProtocolVersion::RESP3)
            .set_lib_name("sse_channel", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &target.user {
            info = info.set_username(user);
        }
        if let Some(password) = &target.password {
            info = info.set_password(&password.0);
        }
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(Some(PATIENCE))
            .set_connection_timeout(None)
            .set_pipeline_buffer_size(QUEUE)
            .set_push_sender(sender);
        let (connection, driver) =
            MultiplexedConnection::new_with_config(&info, stream, config).await?;
        let driver = tokio::spawn(driver);
        let no_scripts = Scripts {
            publish: String::new(),
            look: String::new(),
            read: String::new(),
            announce: "",
        };
        let line = Line { connection, scripts: Arc::new(no_scripts), sharded: false };
        // From here on dropping it ends the driver.
        let mut link = Link { line, pushes, driver };
        link.line.sharded = link.line.is_sharded().await?;
        link.line.scripts = Arc::new(Scripts {
            publish: link.line.load(script::PUBLISH).await?,
            look: link.line.load(script::LOOK).await?,
            read: link.line.load(script::READ).await?,
            announce: if link.line.sharded { "SPUBLISH" } else { "PUBLISH" },
        });
        Ok(link)
    }
}

impl Line {
    /// Gives one command, at once: what is called first is sent first, whoever looks at the answers and
    /// when.
    ///
    /// # Errors
    /// What Redis says, or that it says nothing.
    pub fn call(&self, command: Cmd) -> Call<Value> {
        let mut connection = self.connection.clone();
        let query = async move { Ok(command.query_async::<Value>(&mut connection).await?) };
        // Sent by the first poll, which is why that is here. Without bounds: tokio would have a task that
        // gives many at once stop in the middle of them, and go on with the last of the rest.
        let mut query = Box::pin(unconstrained(query));
        match query.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => Box::pin(ready(answer)),
            Poll::Pending => query,
        }
    }

    async fn load(&self, script: &str) -> Result<String, Trouble> {
        let mut load = cmd("SCRIPT");
        load.arg("LOAD").arg(script);
        let reply = self.call(load).await?;
        let sha = entry::bytes(&reply).map(|sha| String::from_utf8_lossy(sha).into_owned());
        sha.ok_or_else(|| strange("SCRIPT LOAD"))
    }

    /// Whether the server knows both halves of sharded Pub/Sub.
    async fn is_sharded(&self) -> Result<bool, Trouble> {
        let mut info = cmd("COMMAND");
        info.arg("INFO").arg("SPUBLISH").arg("SSUBSCRIBE");
        match self.call(info).await {
            Ok(Value::Array(known)) => {
                Ok(known.len() == 2 && known.iter().all(|info| !matches!(info, Value::Nil)))
            }
            Ok(_) | Err(Trouble::Refused(_)) => Ok(false),
            Err(trouble) => Err(trouble),
        }
    }

    /// From its answer on, what is published to the channel is pushed. Sent at once, as `call`.
    ///
    /// # Errors
    /// As `call`.
    pub fn subscribe(&self, keys: &Keys) -> Call<()> {
        let mut subscribe = cmd(if self.sharded { "SSUBSCRIBE" } else { "SUBSCRIBE" });
        subscribe.arg(&keys.announced);
        Box::pin(self.call(subscribe).map_ok(drop))
    }

    /// Ends that. Sent at once, as `call`.
    ///
    /// # Errors
    /// As `call`.
    pub fn unsubscribe(&self, keys: &Keys) -> Call<()> {
        let mut unsubscribe = cmd(if self.sharded { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" });
        unsubscribe.arg(&keys.announced);
        Box::pin(self.call(unsubscribe).map_ok(drop))
    }

    /// The newest id of a channel that is known here up to `known`.
    ///
    /// # Errors
    /// As `call`.
    pub async fn look(
        &self,
        keys: &Keys,
        known: EventId,
        limits: Limits,
    ) -> Result<EventId, Trouble> {
        let reply = self.call(self.scripts.look(keys, known, limits)).await?;
        entry::id(&reply).ok_or_else(|| strange("the look at a channel"))
    }

    /// The server's time, as an id.
    ///
    /// # Errors
    /// As `call`.
    pub async fn time(&self) -> Result<EventId, Trouble> {
        let reply = self.call(cmd("TIME")).await?;
        let number =
            |value: &Value| std::str::from_utf8(entry::bytes(value)?).ok()?.parse::<u64>().ok();
        let time = match &reply {
            Value::Array(parts) => match parts.as_slice() {
                [seconds, micros] => number(seconds).zip(number(micros)),
                _ => None,
            },
            _ => None,
        };
        let (seconds, micros) = time.ok_or_else(|| strange("TIME"))?;
        Ok(EventId {
            ms: seconds.saturating_mul(1000).saturating_add(micros / 1000),
            n: micros % 1000,
        })
    }

    /// All that a stream has after an id, oldest first, and the newest id of the channel.
    ///
    /// # Errors
    /// As `call`.
    pub async fn read(
        &self,
        keys: &Keys,
        after: EventId,
    ) -> Result<(Option<EventId>, Vec<Entry>), Trouble> {
        let mut entries = Vec::new();
        let mut position = after;
        loop {
            let read = self.scripts.read(keys, position, PAGE_EVENTS, PAGE_BYTES);
            let reply = self.call(read).await?;
            let page = Page::from_reply(&reply).ok_or_else(|| strange("a page of a stream"))?;
            entries.extend(page.entries);
            match page.next {
                Some(next) if next > position => position = next,
                _ => return Ok((page.last, entries)),
            }
        }
    }
}

async fn connect(target: &Target, lookup: &mut Lookup) -> Result<Socket, Trouble> {
    let lost = |problem: io::Error| Trouble::Lost(problem.to_string());
    let found = lookup
        .find(&target.host, target.port)
        .await
        .map_err(|problem| Trouble::Lost(format!("its name cannot be looked up: {problem}")))?;
    let mut trouble = Trouble::Lost("its name has no address".to_owned());
    for address in found {
        match tokio::net::TcpStream::connect(address).await {
            Ok(stream) => {
                tune(&stream).map_err(lost)?;
                return Ok(Socket::new(stream));
            }
            Err(problem) => trouble = lost(problem),
        }
    }
    Err(trouble)
}

/// The kernel looks whether the peer is there, so that nothing here has to wake for it.
fn tune(stream: &tokio::net::TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY)
        .with_retries(KEEPALIVE_TIMES);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

fn trust(tls: &Tls) -> Result<ClientConfig, Trouble> {
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(path) => {
            let unusable = |problem: &dyn std::fmt::Display| {
                Trouble::Refused(format!("the file of BUS's option ca cannot be used: {problem}"))
            };
            let certificates =
                CertificateDer::pem_file_iter(path).map_err(|problem| unusable(&problem))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|problem| unusable(&problem))?;
                roots.add(certificate).map_err(|problem| unusable(&problem))?;
            }
            if roots.is_empty() {
                return Err(unusable(&"it has no certificate"));
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|problem| Trouble::Refused(problem.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// A certificate that is not trusted stays so; anything else may pass.
fn not_trusted(problem: &io::Error) -> Trouble {
    let inner = problem.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(_)) => Trouble::Refused(format!(
            "{problem}; for a certificate of your own authority, name its file: rediss://…?ca=/…"
        )),
        Some(rustls::Error::InvalidMessage(_)) => {
            Trouble::Refused(format!("{problem}; does it speak TLS? Without, write redis://"))
        }
        _ => Trouble::Lost(problem.to_string()),
    }
}

fn strange(what: &str) -> Trouble {
    Trouble::Refused(format!("its answer to {what} is none that Redis gives"))
}
