//! Between the caller of `enqueue_many`, who encodes, and the I/O thread, which sends: one batch waits at most.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::engine::error::{Error, Kind, Result};
use crate::engine::produce::copy::Batch;
use crate::engine::produce::ids::EnqueuedIds;

/// What the caller hands over.
#[derive(Debug)]
pub(super) enum Message {
    /// The next tasks.
    Batch(Box<Batch>),
    /// All were handed over: commit.
    Finish,
    /// Roll back what is open.
    Abort,
}

#[derive(Debug, Default)]
struct Slot {
    batch: Option<Box<Batch>>,
    is_finished: bool,
    is_aborted: bool,
    outcome: Option<Result<EnqueuedIds>>,
}

/// One streaming call.
#[derive(Debug, Default)]
pub struct Handoff {
    slot: Mutex<Slot>,
    /// For the caller: there is room, or an outcome.
    room: Condvar,
    /// For the I/O thread: there is a message.
    news: Notify,
    /// Grows with each task that the iterable gives.
    given: AtomicU64,
    has_ended: AtomicBool,
    committed: AtomicU64,
}

impl Handoff {
    /// The iterable gave a task.
    pub fn touch(&self) {
        // Only the caller writes.
        self.given.store(self.given.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// The call is over before its end: it failed, or waited too long for its iterable.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// How many tasks are in the database for good.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Hands a batch over; waits up to `limit` for room and gives it back when there is none. Once the call has ended, batches vanish.
    pub fn offer(&self, batch: Box<Batch>, limit: Duration) -> Option<Box<Batch>> {
        let mut slot = self.slot.lock();
        if slot.batch.is_some() && !self.has_ended() {
            self.room.wait_for(&mut slot, limit);
        }
        if self.has_ended() {
            return None;
        }
        if slot.batch.is_some() {
            return Some(batch);
        }
        slot.batch = Some(batch);
        self.news.notify_one();
        None
    }

    /// All tasks were handed over.
    pub fn finish(&self) {
        self.slot.lock().is_finished = true;
        self.news.notify_one();
    }

    /// No more tasks come, and what they left without a commit is rolled back. With `commit_every`, whole transactions that were
    /// handed over still go in.
    pub fn abort(&self, has_commits: bool) {
        let mut slot = self.slot.lock();
        slot.batch.take_if(|batch| !(batch.commit && has_commits));
        slot.is_aborted = true;
        self.news.notify_one();
    }

    /// Waits up to `limit` for the outcome.
    pub fn wait(&self, limit: Duration) -> Option<Result<EnqueuedIds>> {
        let mut slot = self.slot.lock();
        if slot.outcome.is_none() {
            self.room.wait_for(&mut slot, limit);
        }
        slot.outcome.take()
    }

    pub(super) fn add_committed(&self, n: u64) {
        self.committed.fetch_add(n, Ordering::Relaxed);
    }

    /// The next message. With a limit, None: the iterable gave nothing for that long.
    pub(super) async fn next(&self, limit: Option<Duration>) -> Option<Message> {
        let mut seen = self.given.load(Ordering::Relaxed);
        let mut since = Instant::now();
        loop {
            {
                let mut slot = self.slot.lock();
                if let Some(batch) = slot.batch.take() {
                    self.room.notify_one();
                    return Some(Message::Batch(batch));
                }
                if slot.is_aborted {
                    return Some(Message::Abort);
                }
                if slot.is_finished {
                    return Some(Message::Finish);
                }
            }
            let Some(limit) = limit else {
                self.news.notified().await;
                continue;
            };
            tokio::select! {
                () = self.news.notified() => {}
                // When the iterable gave its last task is known to an eighth of the limit: a clock read per task would cost more.
                () = sleep(limit / 8) => {
                    let given = self.given.load(Ordering::Relaxed);
                    if given != seen {
                        seen = given;
                        since = Instant::now();
                    } else if since.elapsed() >= limit {
                        return None;
                    }
                }
            }
        }
    }

    fn end(&self, outcome: Result<EnqueuedIds>) {
        let mut slot = self.slot.lock();
        if !self.has_ended.swap(true, Ordering::Relaxed) {
            slot.batch = None;
            slot.outcome = Some(outcome);
            self.room.notify_all();
        }
    }
}

/// The I/O thread's duty to end a call: dropped early, it says that something broke.
#[derive(Debug)]
pub(super) struct Ending(Arc<Handoff>);

impl Ending {
    pub(super) fn new(handoff: Arc<Handoff>) -> Self {
        Self(handoff)
    }

    pub(super) fn handoff(&self) -> &Handoff {
        &self.0
    }

    /// The first outcome counts; the one that the drop adds does not.
    pub(super) fn end(self, outcome: Result<EnqueuedIds>) {
        self.0.end(outcome);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let kind = Kind::ConnectionLost { in_doubt: true };
        self.0.end(Err(Error::new(kind, "the producer's I/O thread ended before it answered")));
    }
}
