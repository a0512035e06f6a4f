//! Where a name leads to. The system's resolver blocks, for as long as a name server is silent, and
//! cannot be told to stop: it has a thread of its own, so that nothing else waits behind it.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::thread;

use tokio::sync::oneshot;

type Found = io::Result<Vec<SocketAddr>>;

/// Looks up one name, again and again, but never twice at a time.
#[derive(Debug, Default)]
pub struct Lookup {
    /// One that was begun, and given up by who waited for it: its answer is the next one's.
    under_way: Option<oneshot::Receiver<Found>>,
}

impl Lookup {
    /// The addresses of a host. Who gives up waiting has begun nothing that another cannot use.
    ///
    /// # Errors
    /// What the resolver says, or that the machine gives no thread.
    pub async fn find(&mut self, host: &str, port: u16) -> Found {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let told = match &mut self.under_way {
            Some(told) => told,
            none => none.insert(begin(host, port)?),
        };
        let found = told.await;
        self.under_way = None;
        found.unwrap_or_else(|_| Err(io::Error::other("the lookup ended without an answer")))
    }
}

fn begin(host: &str, port: u16) -> io::Result<oneshot::Receiver<Found>> {
    let (tell, told) = oneshot::channel();
    let host = host.to_owned();
    thread::Builder::new().name("sse-channel-dns".to_owned()).spawn(move || {
        let found = (host.as_str(), port).to_socket_addrs().map(Iterator::collect);
        // Nobody may wait for it any more.
        let _ = tell.send(found);
    })?;
    Ok(told)
}
