//! The local store in a file that anybody may have written.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use _sse_channel::bus::{Bus, LocalBus, Publication};
use _sse_channel::event::Format;
use _sse_channel::frame::{Body, Fields};
use _sse_channel::history::Limits;
use _sse_channel::hub::{Hub, Resume};
use _sse_channel::ticket::Answering;
use arbitrary::{Arbitrary, Unstructured};

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// The files of a store in which one event was published, by their names.
static WHOLE: OnceLock<Vec<(OsString, Vec<u8>)>> = OnceLock::new();

/// A directory that goes with the run.
struct Directory(PathBuf);

impl Directory {
    /// One that nobody else uses, in memory where the system has that and nobody says otherwise.
    fn new() -> Directory {
        let shared = Path::new("/dev/shm");
        let is_free = std::env::var_os("TMPDIR").is_none() && shared.is_dir();
        let parent = if is_free { shared.to_owned() } else { std::env::temp_dir() };
        let number = NUMBERS.fetch_add(1, Relaxed);
        Directory(parent.join(format!("sse-fuzz-{}-{number}", std::process::id())))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The store's threads may still be at it.
        while self.0.exists() {
            let _ = fs::remove_dir_all(&self.0);
        }
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
    let whole = WHOLE.get_or_init(|| {
        let directory = Directory::new();
        publish(&directory.0);
        let entries = fs::read_dir(&directory.0).expect("the store was made").flatten();
        let its =
            entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"events-"));
        its.map(|entry| (entry.file_name(), fs::read(entry.path()).expect("it is ours"))).collect()
    });
    assert!(!whole.is_empty(), "the store has files");
    let directory = Directory::new();
    fs::DirBuilder::new().mode(0o700).create(&directory.0).expect("there is room");
    for (name, content) in whole {
        let mut content = content.clone();
        if given.is_whole {
            let at = usize::from(given.at).checked_rem(content.len()).unwrap_or(0);
            for (byte, other) in content[at..].iter_mut().zip(given.bytes) {
                *byte = *other;
            }
        } else {
            given.bytes.clone_into(&mut content);
        }
        fs::write(directory.0.join(name), content).expect("there is room");
    }
    publish(&directory.0);
}

/// Publishes once, and has a client resume from before it.
fn publish(directory: &Path) {
    // Counted nowhere: the figures of a process are a file of megabytes.
    let hub = Arc::new(Hub::new(Limits::default(), false));
    let bus = LocalBus::new(Arc::clone(&hub), Some(directory), "fuzz", Limits::default());
    let fields = Fields { data: Some("x"), ..Fields::default() };
    let body = Body::encode(&fields, 100).expect("it is small");
    let publication =
        Publication { channel: "a".into(), history: 9, body, format: Format::Text, heard_by: None };
    let (ticket, answering) = Answering::new();
    bus.publish(publication, answering);
    let deadline = Instant::now() + Duration::from_secs(30);
    ticket.wait_until(deadline);
    let answer = ticket.take().expect("an answer in time, whatever it is");
    if let Ok(id) = answer {
        let channel = hub.channel("a", 9);
        let (ticket, answering) = Answering::new();
        bus.prepare(vec![channel], Resume::After(id.before()), answering);
        ticket.wait_until(deadline);
        ticket.take().expect("an answer in time").expect("what was stored can be read");
    }
    bus.close();
    bus.before_fork();
    bus.after_fork();
    let left = Arc::downgrade(&bus);
    drop(bus);
    // Its threads may be at it yet, and would make the directory again that is removed.
    while left.strong_count() > 0 {
        assert!(Instant::now() < deadline, "the threads of a bus that is closed let go of it");
        std::thread::sleep(Duration::from_micros(50));
    }
}
