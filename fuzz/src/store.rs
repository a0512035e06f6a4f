//! The local store in a file that anybody may have written.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use _sse_channel::bus::{Publication, Settings};
use _sse_channel::event::Format;
use _sse_channel::frame::{Body, Fields};
use _sse_channel::history::Limits;
use _sse_channel::hub::Resume;
use _sse_channel::runtime::Runtime;
use _sse_channel::ticket::Answering;
use arbitrary::{Arbitrary, Unstructured};

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// A directory that goes with the run.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Arbitrary, Debug)]
struct Given<'a> {
    /// A store of ours with some bytes changed; otherwise something else altogether.
    is_whole: bool,
    at: u16,
    bytes: &'a [u8],
}

/// Whatever is in the file: a publish lands and can be resumed, or is refused with a reason.
pub fn store(bytes: &[u8]) {
    let Ok(given) = Given::arbitrary(&mut Unstructured::new(bytes)) else { return };
    let number = NUMBERS.fetch_add(1, Relaxed);
    let name = format!("sse-fuzz-{}-{number}", std::process::id());
    let directory = Directory(std::env::temp_dir().join(name));
    publish(&directory.0);
    for entry in fs::read_dir(&directory.0).into_iter().flatten().flatten() {
        let is_store = entry.file_name().to_string_lossy().starts_with("events-");
        let (true, Ok(mut content)) = (is_store, fs::read(entry.path())) else { continue };
        if given.is_whole {
            let at = usize::from(given.at).checked_rem(content.len()).unwrap_or(0);
            for (byte, other) in content[at..].iter_mut().zip(given.bytes) {
                *byte = *other;
            }
        } else {
            given.bytes.clone_into(&mut content);
        }
        fs::write(entry.path(), content).expect("the disk has room");
    }
    publish(&directory.0);
}

/// Publishes once, and has a client resume from before it.
fn publish(directory: &std::path::Path) {
    let url = format!("local://{}", directory.display());
    let settings = Settings { url, project: "fuzz".to_owned(), limits: Limits::default() };
    let named = settings.open(&Runtime::default()).expect("it is a bus");
    let fields = Fields { data: Some("x"), ..Fields::default() };
    let body = Body::encode(&fields, 100).expect("it is small");
    let publication =
        Publication { channel: "a".into(), history: 9, body, format: Format::Text, heard_by: None };
    let (ticket, answering) = Answering::new();
    named.bus.publish(publication, answering);
    let deadline = Instant::now() + Duration::from_secs(30);
    ticket.wait_until(deadline);
    let answer = ticket.take().expect("an answer in time, whatever it is");
    if let Ok(id) = answer {
        let channel = named.hub.channel("a", 9);
        let (ticket, answering) = Answering::new();
        named.bus.prepare(vec![channel], Resume::After(id.before()), answering);
        ticket.wait_until(deadline);
        ticket.take().expect("an answer in time").expect("what was stored can be read");
    }
    named.bus.close();
    named.bus.before_fork();
    named.bus.after_fork();
}
