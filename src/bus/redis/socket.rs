//! A TCP connection that ends for its peer when it ends here.
//!
//! A forked child inherits a copy of the descriptor. It closes it (`descriptors`); but a connection
//! that was only closed here would live on for Redis as long as any copy does, and one that is shut
//! down first does not.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::descriptors::Inherited;

/// A connection that is shut down when it is dropped.
#[derive(Debug)]
pub struct Socket {
    // Before the descriptor: fields are dropped in this order.
    _closed_in_children: Inherited,
    stream: TcpStream,
}

impl Socket {
    /// Takes a connection over.
    pub fn new(stream: TcpStream) -> Socket {
        Socket { _closed_in_children: Inherited::new(stream.as_raw_fd()), stream }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A connection that the peer has ended already cannot be shut down, and need not.
        let _ = SockRef::from(&self.stream).shutdown(Shutdown::Both);
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
