//! Live streams for Django: the map of the crate.
//!
//! ```text
//! publish ──> bus (orders, numbers, stores) ──> hub ──> client's queue ──> reader
//! ```
//!
//! | file | what it holds |
//! | --- | --- |
//! | `event_id` | ids `ms-n` and the clock that hands them out |
//! | `frame` | the bytes of an event on the wire, encoded once |
//! | `coding` | frames compressed, each on its own, and what makes a client's stream of them whole |
//! | `event` | an event in the forms its clients take |
//! | `history` | what a channel remembers |
//! | `queue` | a client: its bounded queue and who waits for it |
//! | `hub` | channels, their order, registration and fan-out |
//! | `hub/rendering` | what a channel's events become, once for all clients that share it |
//! | `wake` | one bell per event loop |
//! | `timer` | deadlines of all waits, one thread per process |
//! | `bus/` | what orders, numbers and stores events, and brings them to every process |
//! | `ticket` | what a publisher holds until the bus has answered |
//! | `runtime` | the thread that waits on sockets |
//! | `process` | what belongs to one process id and not to its forks |
//! | `offload/` | streams that leave Python: connections that I/O threads write to |
//! | `clients` | how many streams there may be, whose they are, what they are told at the end |
//! | `control` | what one process tells all others about their clients |
//! | `survey` | what one process asks all others about their clients |
//! | `descriptors` | what is done to descriptors by their number; the only file with unsafe code |
//! | `metrics` | what is counted of a channel |
//! | `host` | the counts of all processes of this host, where each can read them |
//! | `error`, `sync` | the error type, the way to lock |
//! | `python/` | the only files that know Python |

pub mod bus;
pub mod clients;
pub mod coding;
pub mod control;
pub mod descriptors;
pub mod error;
pub mod event;
pub mod event_id;
pub mod frame;
pub mod history;
pub mod host;
pub mod hub;
pub mod metrics;
pub mod offload;
pub mod process;
pub mod queue;
pub mod runtime;
pub mod survey;
pub mod sync;
pub mod ticket;
pub mod timer;
pub mod wake;

#[cfg(feature = "python")]
mod python;
