//! Outcomes on their way to the completer. Never dropped: the vector grows, and claiming stops while it is long.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::engine::consume::task::{Holder, Outcome};

/// One ended task.
#[derive(Debug)]
pub struct Ended {
    /// Which claim held it.
    pub holder: Holder,
    /// Run time in microseconds.
    pub took_us: u32,
    /// What became of it.
    pub outcome: Outcome,
}

impl Ended {
    /// Bytes of a result that is to be kept.
    pub fn bytes(&self) -> usize {
        match &self.outcome {
            Outcome::Returned(returned) => returned.value.len(),
            _ => 0,
        }
    }

    /// Of a task that was not started.
    pub fn given_back(holder: Holder) -> Self {
        Self { holder, took_us: 0, outcome: Outcome::GivenBack }
    }

    /// Of a run that counts no longer.
    pub fn dropped(holder: Holder) -> Self {
        Self { holder, took_us: 0, outcome: Outcome::Dropped }
    }
}

/// The vector between handler threads and the completer.
#[derive(Debug, Default)]
pub struct Outcomes {
    ended: Mutex<Vec<Ended>>,
    waiting: AtomicBool,
    unflushed: AtomicUsize,
    unflushed_bytes: AtomicUsize,
    news: Notify,
}

impl Outcomes {
    /// Adds what `batch` holds and empties it; wakes the completer if it sleeps.
    pub fn append(&self, batch: &mut Vec<Ended>) {
        if batch.is_empty() {
            return;
        }
        self.unflushed.fetch_add(batch.len(), Ordering::Relaxed);
        let bytes: usize = batch.iter().map(Ended::bytes).sum();
        if bytes > 0 {
            self.unflushed_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.ended.lock().append(batch);
        self.wake();
    }

    /// Adds one.
    pub fn push(&self, ended: Ended) {
        self.unflushed.fetch_add(1, Ordering::Relaxed);
        self.unflushed_bytes.fetch_add(ended.bytes(), Ordering::Relaxed);
        self.ended.lock().push(ended);
        self.wake();
    }

    /// Wakes the completer if it waits: one system call a flush, not one an outcome.
    pub fn wake(&self) {
        if self.waiting.swap(false, Ordering::AcqRel) {
            self.news.notify_one();
        }
    }

    /// Takes up to `limit` outcomes, oldest first.
    pub fn take(&self, limit: usize) -> Vec<Ended> {
        let mut ended = self.ended.lock();
        if ended.len() <= limit {
            return std::mem::take(&mut *ended);
        }
        let rest = ended.split_off(limit);
        std::mem::replace(&mut *ended, rest)
    }

    /// Outcomes that wait to be taken.
    pub fn len(&self) -> usize {
        self.ended.lock().len()
    }

    /// Whether none waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Outcomes that are not yet in the database.
    pub fn unflushed(&self) -> usize {
        self.unflushed.load(Ordering::Relaxed)
    }

    /// Bytes of their results.
    pub fn unflushed_bytes(&self) -> usize {
        self.unflushed_bytes.load(Ordering::Relaxed)
    }

    /// The completer stored `count` of them, with so many bytes of results.
    pub fn flushed(&self, count: usize, bytes: usize) {
        self.unflushed.fetch_sub(count, Ordering::Relaxed);
        self.unflushed_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Waits until `append`, `push` or `wake` was called since the last `take`.
    pub async fn wait(&self) {
        self.waiting.store(true, Ordering::Release);
        if self.is_empty() {
            self.news.notified().await;
        }
        self.waiting.store(false, Ordering::Release);
    }
}
