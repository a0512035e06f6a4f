//! Tickets: a publisher that gives up beside the bus that begins and answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use _sse_channel::event_id::EventId;
use _sse_channel::sync::{Mutex, lock};
use _sse_channel::ticket::{Answer, Answering};
use _sse_channel::wake::{Park, Parked, Waiter, WakeBatch, Wakeups};

#[cfg(feature = "shuttle")]
use shuttle::future::block_on;

use crate::parts::*;

pub const MODELS: Models = &[
    ("a_ticket_is_withdrawn_or_done", a_ticket_is_withdrawn_or_done),
    ("an_answer_wakes_a_thread", an_answer_wakes_a_thread),
    ("an_answer_wakes_a_loop", an_answer_wakes_a_loop),
    ("an_answer_wakes_a_task", an_answer_wakes_a_task),
];

#[cfg(not(feature = "shuttle"))]
fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(future)
}

const ID: EventId = EventId { ms: 1, n: 1 };

/// The bus, which answers what it could begin, or ends before. Gives whether it did it.
fn bus(answering: Answering, is_ending: bool) -> JoinHandle<bool> {
    go(move || {
        if is_ending || !answering.claim() {
            return false;
        }
        let mut wakes = WakeBatch::default();
        answering.answer(Ok(ID), &mut wakes);
        wakes.flush();
        true
    })
}

fn a_ticket_is_withdrawn_or_done() {
    let (ticket, answering) = Answering::new();
    let bus = bus(answering, false);
    // Its time is over at once, and it is withdrawn by two that do not know of each other.
    let withdrawals = [0, 1].map(|_| {
        let ticket = Arc::clone(&ticket);
        go(move || {
            ticket.wait_until(Instant::now());
            ticket.withdraw()
        })
    });
    let withdrawn = withdrawals.map(done).into_iter().filter(|its| *its).count();
    let was_done = done(bus);
    assert_eq!(withdrawn + usize::from(was_done), 1, "never both, and one of them");
    assert_eq!(ticket.take().is_some(), was_done);
    assert!(ticket.take().is_none(), "an answer is given once");
}

fn an_answer_wakes_a_thread() {
    for is_ending in [false, true] {
        let (ticket, answering) = Answering::new();
        let bus = bus(answering, is_ending);
        ticket.wait_until(Instant::now() + Duration::from_secs(86_400));
        let answer = ticket.take().expect("it was woken by an answer");
        assert_eq!(answer.is_ok(), done(bus));
    }
}

fn an_answer_wakes_a_loop() {
    for is_ending in [false, true] {
        let (ticket, answering) = Answering::new();
        let bus = bus(answering, is_ending);
        let wakeups = Arc::new(Wakeups::new().unwrap());
        let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: 1, deadline: None };
        if ticket.park(waiter) != Parked::Ready {
            wait_for_the_bell(&wakeups);
            assert_eq!(wakeups.take(), [1]);
        }
        let answer = ticket.take().expect("it was woken by an answer");
        assert_eq!(answer.is_ok(), done(bus));
    }
}

fn an_answer_wakes_a_task() {
    for is_ending in [false, true] {
        let (ticket, answering) = Answering::new();
        let bus = bus(answering, is_ending);
        let answer = block_on(Answer(ticket));
        assert_eq!((answer.is_ok(), done(bus)), (!is_ending, !is_ending));
    }
    let (ticket, answering) = Answering::new();
    let bus = bus(answering, false);
    let cancelled = {
        let (ticket, answering) = Answering::new();
        let begun = Arc::new(Mutex::new(false));
        let its_bus = {
            let begun = Arc::clone(&begun);
            go(move || *lock(&begun) = answering.claim())
        };
        drop(Answer(Arc::clone(&ticket)));
        done(its_bus);
        (*lock(&begun), ticket.withdraw())
    };
    assert!(!cancelled.1, "what was dropped is withdrawn, unless the bus had begun");
    let answer = block_on(Answer(ticket));
    assert_eq!(answer.ok(), Some(ID));
    assert!(done(bus));
}
