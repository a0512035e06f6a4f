//! A ticket: what a publisher holds until the bus has answered.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::event_id::EventId;
use crate::sync::{Condvar, Mutex, lock};
use crate::timer::Timed;
use crate::wake::{Park, Parked, Token, Waiter, WakeBatch, Wakeups};

/// One answer, awaited by one thread, greenlet or task.
#[derive(Debug, Default)]
pub struct Ticket {
    /// Held for a look or a change, never while anybody is woken.
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    waiter: Option<Waiter>,
    task: Option<Waker>,
}

#[derive(Debug, Default)]
enum Phase {
    /// The bus has not begun: it can still be withdrawn.
    #[default]
    Waiting,
    /// The bus is at it.
    Claimed,
    /// The answer is here.
    Answered(Result<EventId>),
    /// Withdrawn, or the answer was taken.
    Over,
}

impl Ticket {
    /// Withdraws it; false when the bus has begun already.
    pub fn withdraw(&self) -> bool {
        let mut state = lock(&self.state);
        let withdrawn = matches!(state.phase, Phase::Waiting);
        if withdrawn {
            state.phase = Phase::Over;
        }
        withdrawn
    }

    /// The answer, once it is here; it is given once.
    pub fn take(&self) -> Option<Result<EventId>> {
        take(&mut lock(&self.state))
    }

    /// Blocks this thread until the answer is here or `deadline`.
    pub fn wait_until(&self, deadline: Instant) {
        let mut state = lock(&self.state);
        while matches!(state.phase, Phase::Waiting | Phase::Claimed) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.answered.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn claim(&self) -> bool {
        let mut state = lock(&self.state);
        let claimed = matches!(state.phase, Phase::Waiting);
        if claimed {
            state.phase = Phase::Claimed;
        }
        claimed
    }

    fn answer(&self, answer: Result<EventId>, wakes: &mut WakeBatch) {
        let task = {
            let mut state = lock(&self.state);
            if matches!(state.phase, Phase::Answered(_) | Phase::Over) {
                return;
            }
            state.phase = Phase::Answered(answer);
            if let Some(waiter) = state.waiter.take() {
                wakes.add(waiter);
            }
            state.task.take()
        };
        self.answered.notify_all();
        if let Some(task) = task {
            task.wake();
        }
    }
}

fn take(state: &mut State) -> Option<Result<EventId>> {
    if !matches!(state.phase, Phase::Answered(_)) {
        return None;
    }
    match std::mem::replace(&mut state.phase, Phase::Over) {
        Phase::Answered(answer) => Some(answer),
        Phase::Waiting | Phase::Claimed | Phase::Over => None,
    }
}

impl Park for Ticket {
    fn park(&self, waiter: Waiter) -> Parked {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Answered(_) | Phase::Over) {
            return Parked::Ready;
        }
        let arm = waiter.deadline;
        state.waiter = Some(waiter);
        Parked::Waiting { arm }
    }

    fn unpark(&self, token: Token, wakeups: &Arc<Wakeups>) {
        let mut state = lock(&self.state);
        let mine = |w: &Waiter| w.token == token && Arc::ptr_eq(&w.wakeups, wakeups);
        if state.waiter.as_ref().is_some_and(mine) {
            state.waiter = None;
        }
    }
}

impl Timed for Ticket {
    fn is_due_at(&self, at: Instant) -> bool {
        lock(&self.state).waiter.as_ref().is_some_and(|waiter| waiter.deadline == Some(at))
    }

    fn expire(&self, at: Instant, _now: Instant, wakes: &mut WakeBatch) -> Option<Instant> {
        let mut state = lock(&self.state);
        if state.waiter.as_ref().is_some_and(|waiter| waiter.deadline == Some(at))
            && let Some(waiter) = state.waiter.take()
        {
            wakes.add(waiter);
        }
        None
    }
}

/// A ticket as a future, for a runtime.
#[derive(Debug)]
pub struct Answer(pub Arc<Ticket>);

impl Future for Answer {
    type Output = Result<EventId>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.0.state);
        if let Some(answer) = take(&mut state) {
            return Poll::Ready(answer);
        }
        if matches!(state.phase, Phase::Over) {
            return Poll::Ready(Err(Error::Bus("the publish was withdrawn".to_owned())));
        }
        state.task = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Answer {
    /// A cancelled task withdraws what the bus has not begun.
    fn drop(&mut self) {
        self.0.withdraw();
    }
}

/// The bus's side of a ticket: it is answered exactly once, at the latest when this is dropped.
#[derive(Debug)]
pub struct Answering(Option<Arc<Ticket>>);

impl Answering {
    /// A ticket and the side that answers it.
    pub fn new() -> (Arc<Ticket>, Answering) {
        let ticket = Arc::new(Ticket::default());
        (Arc::clone(&ticket), Answering(Some(ticket)))
    }

    /// Begins; false when it was withdrawn, and must not be done then.
    pub fn claim(&self) -> bool {
        self.0.as_ref().is_some_and(|ticket| ticket.claim())
    }

    /// Whether nobody waits for it any more.
    pub fn is_withdrawn(&self) -> bool {
        self.0.as_ref().is_none_or(|ticket| matches!(lock(&ticket.state).phase, Phase::Over))
    }

    /// Gives the answer; the waiter is woken with the batch.
    pub fn answer(mut self, answer: Result<EventId>, wakes: &mut WakeBatch) {
        if let Some(ticket) = self.0.take() {
            ticket.answer(answer, wakes);
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(ticket) = self.0.take() {
            let mut wakes = WakeBatch::default();
            ticket.answer(Err(Error::Bus("the bus was closed".to_owned())), &mut wakes);
            wakes.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ID: EventId = EventId { ms: 1, n: 2 };

    #[test]
    fn an_answer_is_given_once() {
        let (ticket, answering) = Answering::new();
        assert!(ticket.take().is_none());
        assert!(answering.claim() && !ticket.withdraw());
        answering.answer(Ok(ID), &mut WakeBatch::default());
        ticket.wait_until(Instant::now() + Duration::from_secs(60));
        assert_eq!(ticket.take().map(Result::ok), Some(Some(ID)));
        assert!(ticket.take().is_none());
    }

    #[test]
    fn what_was_withdrawn_is_not_begun() {
        let (ticket, answering) = Answering::new();
        let soon = Instant::now() + Duration::from_millis(1);
        ticket.wait_until(soon);
        assert!(ticket.take().is_none() && !answering.is_withdrawn());
        assert!(ticket.withdraw() && !answering.claim() && answering.is_withdrawn());
        answering.answer(Ok(ID), &mut WakeBatch::default());
        assert!(ticket.take().is_none());
    }

    #[test]
    fn a_bus_that_ends_answers_all_the_same() -> Result<()> {
        let (ticket, answering) = Answering::new();
        let wakeups = Arc::new(Wakeups::new()?);
        let waiter = Waiter { wakeups: Arc::clone(&wakeups), token: 7, deadline: None };
        assert_eq!(ticket.park(waiter), Parked::Waiting { arm: None });
        drop(answering);
        assert_eq!(wakeups.take(), [7]);
        assert!(matches!(ticket.take(), Some(Err(Error::Bus(_)))));
        Ok(())
    }
}
