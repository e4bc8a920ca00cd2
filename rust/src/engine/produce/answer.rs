//! How an answer comes back: to a thread that waits for it, or to an event loop's mailbox.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::engine::error::{Error, Kind, Result};

/// The answer to a call: per task its id and whether it is new, in input order.
pub type Answer = Result<Vec<(i64, bool)>>;

/// Where a thread waits for its answer.
#[derive(Debug, Default)]
pub struct Cell {
    answer: Mutex<Option<Answer>>,
    news: Condvar,
}

impl Cell {
    /// Waits up to `limit`.
    pub fn wait(&self, limit: Duration) -> Option<Answer> {
        let mut answer = self.answer.lock();
        if answer.is_none() {
            self.news.wait_for(&mut answer, limit);
        }
        answer.take()
    }

    fn put(&self, value: Answer) {
        *self.answer.lock() = Some(value);
        self.news.notify_one();
    }
}

#[derive(Debug, Default)]
struct Letters {
    answers: Vec<(u64, Answer)>,
    next: u64,
    /// The loop was woken and has not looked since.
    is_woken: bool,
}

/// Wakes an event loop.
pub type Waker = Box<dyn Fn() + Send + Sync>;

/// An event loop's answers.
pub struct Mailbox {
    letters: Mutex<Letters>,
    waker: Waker,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").field("letters", &self.letters).finish_non_exhaustive()
    }
}

impl Mailbox {
    /// One that wakes its loop through `waker`.
    pub fn new(waker: Waker) -> Self {
        Self { letters: Mutex::default(), waker }
    }

    /// A number for the next call.
    pub fn number(&self) -> u64 {
        let mut letters = self.letters.lock();
        letters.next += 1;
        letters.next
    }

    /// All answers that are there; the next one wakes the loop again.
    pub fn take(&self) -> Vec<(u64, Answer)> {
        let mut letters = self.letters.lock();
        letters.is_woken = false;
        mem::take(&mut letters.answers)
    }

    fn put(&self, number: u64, value: Answer) {
        let mut letters = self.letters.lock();
        letters.answers.push((number, value));
        if !mem::replace(&mut letters.is_woken, true) {
            (self.waker)();
        }
    }
}

#[derive(Debug)]
enum Place {
    Cell(Arc<Cell>),
    Mailbox(Arc<Mailbox>, u64),
}

/// The right, and the duty, to answer one call: dropped unanswered, it answers that something broke, so that nobody waits for ever.
#[derive(Debug)]
pub struct Reply(Option<Place>);

impl Reply {
    /// To a thread.
    pub fn to_cell(cell: &Arc<Cell>) -> Self {
        Self(Some(Place::Cell(Arc::clone(cell))))
    }

    /// To an event loop.
    pub fn to_mailbox(mailbox: &Arc<Mailbox>, number: u64) -> Self {
        Self(Some(Place::Mailbox(Arc::clone(mailbox), number)))
    }

    /// Answers.
    pub fn send(mut self, value: Answer) {
        self.put(value);
    }

    fn put(&mut self, value: Answer) {
        match self.0.take() {
            Some(Place::Cell(cell)) => cell.put(value),
            Some(Place::Mailbox(mailbox, number)) => mailbox.put(number, value),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.0.is_some() {
            // What was under way may have been committed.
            let kind = Kind::ConnectionLost { in_doubt: true };
            self.put(Err(Error::new(kind, "the producer's I/O thread ended before it answered")));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_dropped_reply_is_an_error_not_silence() {
        let cell = Arc::new(Cell::default());
        drop(Reply::to_cell(&cell));
        assert!(cell.wait(Duration::ZERO).unwrap().is_err());
    }

    #[test]
    fn many_answers_wake_a_loop_once() {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let mailbox = Arc::new(Mailbox::new(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })));
        for _ in 0..3 {
            let number = mailbox.number();
            Reply::to_mailbox(&mailbox, number).send(Ok(vec![(1, true)]));
        }
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        assert_eq!(mailbox.take().iter().map(|a| a.0).collect::<Vec<_>>(), [1, 2, 3]);
        Reply::to_mailbox(&mailbox, 9).send(Ok(Vec::new()));
        assert_eq!(woken.load(Ordering::Relaxed), 2);
    }
}
