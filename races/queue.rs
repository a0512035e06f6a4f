//! A client's queue and its readers: threads that block, loops that are woken, deadlines.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use _sse_channel::queue::{Client, Overflow, Taken};
use _sse_channel::sync::{Condvar, Mutex, lock};
use _sse_channel::timer::Timed;
use _sse_channel::wake::{Park, Parked, Waiter, WakeBatch, Wakeups};

use crate::parts::*;

pub const MODELS: Models = &[
    ("several_threads_share_a_queue", several_threads_share_a_queue),
    ("a_thread_whose_time_passes_loses_nothing", a_thread_whose_time_passes_loses_nothing),
    ("threads_that_block_and_threads_that_look", threads_that_block_and_threads_that_look),
    ("the_oldest_makes_room_while_one_reads", the_oldest_makes_room_while_one_reads),
    ("the_newest_is_refused_while_one_reads", the_newest_is_refused_while_one_reads),
    (
        "a_full_client_is_disconnected_while_one_reads",
        a_full_client_is_disconnected_while_one_reads,
    ),
    ("loops_share_a_queue", loops_share_a_queue),
    ("a_loop_and_a_thread_share_a_queue", a_loop_and_a_thread_share_a_queue),
    ("who_gives_up_passes_its_turn_on", who_gives_up_passes_its_turn_on),
    ("a_loop_that_is_gone_passes_its_turn_on", a_loop_that_is_gone_passes_its_turn_on),
    ("a_deadline_meets_an_event", a_deadline_meets_an_event),
];

fn several_threads_share_a_queue() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let readers = [0, 1].map(|_| {
        let client = Arc::clone(&client);
        go(move || numbers(&read_to_the_end(&client)))
    });
    let publisher = {
        let client = Arc::clone(&client);
        go(move || offer(&client, 1..=3))
    };
    // Whatever is offered before the end is delivered before it, and nothing after.
    close(&hub, &client);
    let offered = done(publisher);
    assert!(offered.refused.is_empty() && offered.discarded.is_empty());
    assert_shared_out(&offered.kept, &readers.map(done));
    assert!(client.is_empty() && matches!(client.take(), Taken::Closed));
}

fn read_with_deadlines(client: &Client) -> Vec<u64> {
    let mut read = Vec::new();
    loop {
        match client.take_blocking(Some(Instant::now())) {
            Taken::Event(event) => read.push(id(&event).n),
            Taken::Empty => yield_now(),
            Taken::Closed => return read,
        }
    }
}

fn a_thread_whose_time_passes_loses_nothing() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let timed = {
        let client = Arc::clone(&client);
        go(move || read_with_deadlines(&client))
    };
    let patient = {
        let client = Arc::clone(&client);
        go(move || numbers(&read_to_the_end(&client)))
    };
    let kept = offer(&client, 1..=3).kept;
    close(&hub, &client);
    assert_shared_out(&kept, &[done(timed), done(patient)]);
}

fn threads_that_block_and_threads_that_look() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let blocked = {
        let client = Arc::clone(&client);
        go(move || numbers(&read_to_the_end(&client)))
    };
    let looking = {
        let client = Arc::clone(&client);
        go(move || {
            let mut read = Vec::new();
            for _ in 0..3 {
                // The monitor looks at it, too, and must not take it out of turn.
                client.oldest();
                if let Taken::Event(event) = client.take() {
                    read.push(id(&event).n);
                }
            }
            read
        })
    };
    let kept = offer(&client, 1..=3).kept;
    let looked = done(looking);
    close(&hub, &client);
    assert_shared_out(&kept, &[done(blocked), looked]);
}

/// One reads while more is offered than there is room for.
fn overflow(policy: Overflow) -> (Offered, Vec<u64>, u64) {
    let (hub, client) = queue(1, policy);
    let reader = {
        let client = Arc::clone(&client);
        go(move || numbers(&read_to_the_end(&client)))
    };
    let offered = offer(&client, 1..=3);
    assert!(client.len() <= 1 + 1, "its capacity, and what a reader is about to give");
    close(&hub, &client);
    (offered, done(reader), client.dropped())
}

fn the_oldest_makes_room_while_one_reads() {
    let (offered, read, dropped) = overflow(Overflow::DropOldest);
    assert_eq!(offered.kept, [1, 2, 3]);
    assert_eq!(dropped, offered.discarded.len() as u64);
    assert_eq!(read.last(), Some(&3), "the newest stays");
    assert_shared_out(&offered.kept, &[read, offered.discarded]);
}

fn the_newest_is_refused_while_one_reads() {
    let (offered, read, dropped) = overflow(Overflow::DropNewest);
    assert_eq!(dropped, offered.refused.len() as u64);
    assert_eq!(read, offered.kept);
    assert_eq!(read.first(), Some(&1), "there was room for the first");
}

fn a_full_client_is_disconnected_while_one_reads() {
    let (offered, read, dropped) = overflow(Overflow::Disconnect);
    assert_eq!(dropped, offered.refused.len() as u64);
    assert!(offered.refused.len() <= 1, "it is disconnected once");
    assert_eq!(read, offered.kept);
}

fn waiter(wakeups: &Arc<Wakeups>, token: u64, deadline: Option<Instant>) -> Waiter {
    Waiter { wakeups: Arc::clone(wakeups), token, deadline }
}

fn wait_for(wakeups: &Wakeups, token: u64) {
    loop {
        wait_for_the_bell(wakeups);
        if wakeups.take().contains(&token) {
            return;
        }
    }
}

/// Reads as an event loop does: looks, parks, and sleeps until the bell rings.
fn read_on_a_loop(client: &Client, most: usize) -> Vec<u64> {
    let wakeups = Arc::new(Wakeups::new().unwrap());
    let mut read = Vec::new();
    while read.len() < most {
        match client.take() {
            Taken::Event(event) => {
                read.push(id(&event).n);
                continue;
            }
            Taken::Closed => break,
            Taken::Empty => {}
        }
        match client.park(waiter(&wakeups, 7, None)) {
            // A thread that blocks has it, and is about to lower the depth.
            Parked::Ready => yield_now(),
            Parked::Waiting { .. } => wait_for(&wakeups, 7),
        }
    }
    read
}

fn loops_share_a_queue() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let loops = [0, 1].map(|_| {
        let client = Arc::clone(&client);
        go(move || read_on_a_loop(&client, usize::MAX))
    });
    let publisher = {
        let client = Arc::clone(&client);
        go(move || offer(&client, 1..=3))
    };
    close(&hub, &client);
    assert_shared_out(&done(publisher).kept, &loops.map(done));
}

fn a_loop_and_a_thread_share_a_queue() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let on_a_loop = {
        let client = Arc::clone(&client);
        go(move || read_on_a_loop(&client, usize::MAX))
    };
    let blocked = {
        let client = Arc::clone(&client);
        go(move || numbers(&read_to_the_end(&client)))
    };
    let kept = offer(&client, 1..=3).kept;
    close(&hub, &client);
    assert_shared_out(&kept, &[done(on_a_loop), done(blocked)]);
}

/// One waits, and may be woken, but does not look; another must get what is there.
fn one_of_two_waiters_goes(before_it_goes: fn(&Wakeups)) {
    let (_hub, client) = queue(9, Overflow::DropOldest);
    let goes = {
        let client = Arc::clone(&client);
        go(move || {
            let wakeups = Arc::new(Wakeups::new().unwrap());
            client.park(waiter(&wakeups, 1, None));
            before_it_goes(&wakeups);
            client.unpark(1, &wakeups);
        })
    };
    let stays = {
        let client = Arc::clone(&client);
        go(move || read_on_a_loop(&client, 1))
    };
    offer(&client, 1..=1);
    done(goes);
    assert_eq!(done(stays), [1]);
}

fn who_gives_up_passes_its_turn_on() {
    one_of_two_waiters_goes(|_| ());
}

fn a_loop_that_is_gone_passes_its_turn_on() {
    one_of_two_waiters_goes(Wakeups::close);
}

/// Moments for the timer, which come up in their order and as soon as it looks.
#[derive(Default)]
struct Moments {
    state: Mutex<(BTreeSet<Instant>, bool)>,
    changed: Condvar,
}

impl Moments {
    fn schedule(&self, at: Instant) {
        lock(&self.state).0.insert(at);
        self.changed.notify_one();
    }

    fn end(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_one();
    }

    fn next(&self) -> Option<Instant> {
        let mut state = lock(&self.state);
        loop {
            if state.1 {
                return None;
            }
            if let Some(at) = state.0.pop_first() {
                return Some(at);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn a_deadline_meets_an_event() {
    let (hub, client) = queue(9, Overflow::DropOldest);
    let moments = Arc::new(Moments::default());
    let timer = {
        let (client, moments) = (Arc::clone(&client), Arc::clone(&moments));
        go(move || {
            while let Some(at) = moments.next() {
                let mut wakes = WakeBatch::default();
                if let Some(next) = client.expire(at, at, &mut wakes) {
                    moments.schedule(next);
                }
                wakes.flush();
            }
        })
    };
    let reader = {
        let (client, moments) = (Arc::clone(&client), Arc::clone(&moments));
        go(move || {
            let wakeups = Arc::new(Wakeups::new().unwrap());
            let start = Instant::now();
            let mut read = Vec::new();
            // The second deadline is later, the third earlier than what the timer knows of then.
            for (token, seconds) in [(1, 10), (2, 20), (3, 15)] {
                let deadline = start + Duration::from_secs(seconds);
                match client.park(waiter(&wakeups, token, Some(deadline))) {
                    Parked::Ready => {}
                    Parked::Waiting { arm } => {
                        arm.into_iter().for_each(|at| moments.schedule(at));
                        wait_for(&wakeups, token);
                    }
                }
                if let Taken::Event(event) = client.take() {
                    read.push(id(&event).n);
                }
            }
            moments.end();
            read
        })
    };
    let kept = offer(&client, 1..=2).kept;
    let read = done(reader);
    done(timer);
    close(&hub, &client);
    assert_shared_out(&kept, &[read, numbers(&waiting(&client))]);
}
