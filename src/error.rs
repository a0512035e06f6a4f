//! The one error type of the core; `python::errors` maps it to Python's exceptions.

use std::io;

/// What a caller, or the machine, did that the core cannot go on with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of an event that the wire format cannot carry.
    #[error("{0}")]
    InvalidField(String),
    /// The encoded event is larger than the configured limit.
    #[error(
        "the encoded event has {size} bytes, over the limit of {limit}; \
         send a reference to the data instead, or raise MAX_EVENT_BYTES"
    )]
    TooLarge {
        /// Bytes of the encoded frame.
        size: usize,
        /// The configured limit in bytes.
        limit: usize,
    },
    /// The queue holds `capacity` messages already.
    #[error("the queue is full")]
    Full,
    /// The client left its channel, or was made to.
    #[error("the queue is closed")]
    Closed,
    /// A stream is open on the channel and the message has no wire form.
    #[error("an event without a wire form cannot be sent while streams are open")]
    NotEncodable,
    /// The bus cannot order or store: the text says why and what to do. Nothing was sent, unless
    /// it says so.
    #[error("{0}")]
    Bus(String),
    /// The operating system refused a descriptor or a thread.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Error::Io(errno.into())
    }
}

/// The core's result.
pub type Result<T> = std::result::Result<T, Error>;
