//! Bells: who wakes, who listens, who attends, and the inbox of an I/O thread.

use std::sync::Arc;

#[cfg(feature = "shuttle")]
use _sse_channel::hub::{Outlet, Passed};
#[cfg(feature = "shuttle")]
use _sse_channel::offload::{CheckedInbox as Inbox, CheckedItem as Item};
use _sse_channel::wake::{Token, Waiter, WakeBatch, Wakeups};

use crate::parts::*;

pub const MODELS: Models = &[
    ("a_bell_loses_no_token", a_bell_loses_no_token),
    ("who_attends_misses_no_token", who_attends_misses_no_token),
    #[cfg(feature = "shuttle")]
    ("what_is_put_into_an_inbox_is_taken", inbox::what_is_put_into_an_inbox_is_taken),
    #[cfg(feature = "shuttle")]
    ("an_inbox_that_closes_takes_or_refuses", inbox::an_inbox_that_closes_takes_or_refuses),
];

fn wake(wakeups: &Arc<Wakeups>, tokens: &[Token]) {
    let mut batch = WakeBatch::default();
    for token in tokens {
        batch.add(Waiter { wakeups: Arc::clone(wakeups), token: *token, deadline: None });
    }
    batch.flush();
}

/// Three wake-ups by two threads.
fn wakers(wakeups: &Arc<Wakeups>) -> [JoinHandle<()>; 2] {
    let (one, other) = (Arc::clone(wakeups), Arc::clone(wakeups));
    [
        go(move || {
            wake(&one, &[1]);
            wake(&one, &[2]);
        }),
        go(move || wake(&other, &[3])),
    ]
}

fn assert_each_once(tokens: &[Token]) {
    let (others, one): (Vec<Token>, Vec<Token>) = tokens.iter().partition(|token| **token == 3);
    assert_eq!((one, others), (vec![1, 2], vec![3]));
}

fn a_bell_loses_no_token() {
    let wakeups = Arc::new(Wakeups::new().unwrap());
    let wakers = wakers(&wakeups);
    let mut tokens = Vec::new();
    while tokens.len() < 3 {
        wait_for_the_bell(&wakeups);
        tokens.extend(wakeups.take());
    }
    wakers.into_iter().for_each(done);
    assert_each_once(&tokens);
    assert_eq!(wakeups.take(), [] as [Token; 0]);
}

fn who_attends_misses_no_token() {
    let wakeups = Arc::new(Wakeups::new().unwrap());
    let wakers = wakers(&wakeups);
    let mut tokens = Vec::new();
    while tokens.len() < 3 {
        if wakeups.attend(yield_now) {
            tokens.extend(wakeups.take_silently());
        } else {
            wait_for_the_bell(&wakeups);
            tokens.extend(wakeups.take());
        }
    }
    wakers.into_iter().for_each(done);
    assert_each_once(&tokens);
}

/// The inbox of an I/O thread is nobody else's, so that the checker alone sees it.
#[cfg(feature = "shuttle")]
mod inbox {
    use super::*;

    fn passed(n: u64) -> Passed {
        Passed::Event { channel: 1, sequence: n, event: event(n) }
    }

    fn numbers_of(items: Vec<Item>) -> Vec<u64> {
        let number = |item: Item| match item {
            Item::Passed(Passed::Event { sequence, .. }) => sequence,
            other => panic!("{other:?}"),
        };
        items.into_iter().map(number).collect()
    }

    pub fn what_is_put_into_an_inbox_is_taken() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let publishers = [[1, 2], [3, 4]].map(|its| {
            let inbox = Arc::clone(&inbox);
            go(move || {
                for n in its {
                    inbox.put(passed(n));
                    inbox.ring();
                }
            })
        });
        let mut taken = Vec::new();
        while taken.len() < 4 {
            // It looks between two rings as well: when a socket can be written to.
            taken.extend(numbers_of(inbox.take()));
            if taken.len() < 4 {
                inbox.rings().wait_for_edge();
                taken.extend(numbers_of(inbox.take()));
            }
        }
        publishers.into_iter().for_each(done);
        let (one, other): (Vec<u64>, Vec<u64>) = taken.iter().partition(|n| **n < 3);
        assert_eq!((one, other), (vec![1, 2], vec![3, 4]));
    }

    pub fn an_inbox_that_closes_takes_or_refuses() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let putter = {
            let inbox = Arc::clone(&inbox);
            go(move || {
                let push = |n| inbox.push(Item::Passed(passed(n)));
                let refused = [1, 2].into_iter().filter_map(|n| push(n).err());
                numbers_of(refused.collect())
            })
        };
        let mut taken = numbers_of(inbox.take());
        taken.extend(numbers_of(inbox.close()));
        assert_shared_out(&[1, 2], &[taken, done(putter)]);
        assert!(numbers_of(inbox.take()).is_empty());
    }
}
