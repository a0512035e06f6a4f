//! What the network or a caller shapes, given anything at all. Each target is a function of bytes:
//! it must neither panic nor hang, and it checks what came out.
//!
//! | file | target | what it is given |
//! | --- | --- | --- |
//! | `frames` | `frames` | fields of an event: what is encoded must be read as it was meant |
//! | `frames` | `restored` | frames of a store that somebody else wrote |
//! | `frames` | `ids` | last event ids |
//! | `frames` | `compressed` | frames to be compressed: the whole must be read as it was |
//! | `connections` | `connections` | offloaded connections, and what their clients do: whole frames, in order, once |
//! | `hub` | `hub` | publishes, clients, resumes and reads in any order: nothing lost, doubled, or foreign |
//! | `words` | `words` | what processes tell each other, and ask |
//! | `words` | `replies` | entries, messages and answers of Redis |
//! | `words` | `urls` | the setting `BUS` |
//! | `store` | `store` | the file of the local store |

mod connections;
mod frames;
mod hub;
mod store;
mod words;

pub use connections::connections;
pub use frames::{compressed, frames, ids, restored};
pub use hub::hub;
pub use store::store;
pub use words::{replies, urls, words};

/// A function of bytes that panics when something is wrong.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const TARGETS: [(&str, Target); 10] = [
    ("compressed", compressed),
    ("connections", connections),
    ("frames", frames),
    ("hub", hub),
    ("ids", ids),
    ("replies", replies),
    ("restored", restored),
    ("store", store),
    ("urls", urls),
    ("words", words),
];
