//! Log records on their way to Python's `logging`: a bounded ring, so that the I/O thread waits for nobody.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Records kept until Python fetches them; more drop the oldest, and say how many.
const CAPACITY: usize = 1_000;

/// Levels as in Python's `logging`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Level {
    Debug = 10,
    Info = 20,
    Warning = 30,
    Error = 40,
}

/// One record: no message holds a password or a payload.
#[derive(Debug, Clone)]
pub struct Record {
    /// How grave it is.
    pub level: Level,
    /// The part that speaks; its logger is `fastq.<part>`.
    pub part: &'static str,
    /// What happened.
    pub message: String,
}

#[derive(Debug, Default)]
struct Ring {
    records: VecDeque<Record>,
    dropped: u64,
    threads: usize,
    poked: bool,
    ended: bool,
}

/// What the I/O thread has to say to its Python housekeeper.
#[derive(Debug, Default)]
pub struct Outbox {
    ring: Mutex<Ring>,
    news: Condvar,
}

impl Outbox {
    /// Adds a record.
    pub fn log(&self, level: Level, part: &'static str, message: impl Into<String>) {
        let mut ring = self.ring.lock();
        if ring.records.len() == CAPACITY {
            ring.records.pop_front();
            ring.dropped += 1;
        }
        ring.records.push_back(Record { level, part, message: message.into() });
        self.news.notify_all();
    }

    /// Asks for another handler thread.
    pub fn ask_thread(&self) {
        self.ring.lock().threads += 1;
        self.news.notify_all();
    }

    /// Lets `wait` return: there is something to fetch elsewhere.
    pub fn poke(&self) {
        self.ring.lock().poked = true;
        self.news.notify_all();
    }

    /// Says that the I/O thread has ended; nothing comes after it.
    pub fn end(&self) {
        self.ring.lock().ended = true;
        self.news.notify_all();
    }

    /// Waits up to `limit` for news: records, handler threads asked for, and whether the thread has ended.
    pub fn wait(&self, limit: Duration) -> (Vec<Record>, usize, bool) {
        let mut ring = self.ring.lock();
        if ring.records.is_empty() && ring.threads == 0 && !ring.poked && !ring.ended {
            self.news.wait_for(&mut ring, limit);
        }
        ring.poked = false;
        let mut records: Vec<_> = ring.records.drain(..).collect();
        if ring.dropped > 0 {
            let message = format!("{} log records were dropped: they came faster than they were read", ring.dropped);
            records.push(Record { level: Level::Warning, part: "engine", message });
            ring.dropped = 0;
        }
        (records, std::mem::take(&mut ring.threads), ring.ended)
    }
}
