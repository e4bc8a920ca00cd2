//! Log records on their way to Python's `logging`: a bounded ring, so that the I/O thread waits for nobody.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::engine::error::Error;

/// Records kept until Python fetches them; more drop the oldest, and say how many.
const CAPACITY: usize = 1_000;
/// A trouble that comes back within this time was said enough.
const QUIET: Duration = Duration::from_secs(10);
/// Kinds of trouble that are remembered.
const KINDS: usize = 8;

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

/// What was said of a trouble, so that each kind of it is said once for as long as it lasts, however often it is met.
#[derive(Debug, Default)]
pub struct Said(Vec<Kind>);

#[derive(Debug)]
struct Kind {
    name: String,
    at: Instant,
    lasts: bool,
}

impl Said {
    /// Whether this error is to be logged: its kind was not yet, in this trouble or a moment ago.
    pub fn is_news(&mut self, e: &Error) -> bool {
        let now = Instant::now();
        if let Some(kind) = self.0.iter_mut().find(|kind| kind.name == e.trouble()) {
            if kind.lasts || now.saturating_duration_since(kind.at) < QUIET {
                return false;
            }
            (kind.at, kind.lasts) = (now, true);
            return true;
        }
        if self.0.len() == KINDS {
            self.0.remove(0);
        }
        self.0.push(Kind { name: e.trouble().to_owned(), at: now, lasts: true });
        true
    }

    /// It works again; whether that is to be logged, since the trouble was.
    pub fn end(&mut self) -> bool {
        let was_said = self.0.iter().any(|kind| kind.lasts);
        self.0.iter_mut().for_each(|kind| kind.lasts = false);
        was_said
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::error::Kind as ErrorKind;

    fn refusal(code: &str) -> Error {
        Error::new(ErrorKind::Database { sqlstate: code.to_owned(), transient: true }, "no")
    }

    #[test]
    fn each_kind_of_trouble_is_said_once() {
        let mut said = Said::default();
        assert!(said.is_news(&Error::lost("refused")));
        assert!(!said.is_news(&Error::lost("ended")));
        assert!(said.is_news(&refusal("53100")));
        assert!(!said.is_news(&refusal("53100")));
        assert!(said.end());
        // It comes and goes: said enough.
        assert!(!said.is_news(&refusal("53100")));
        assert!(!said.end());
        said.0.iter_mut().for_each(|kind| kind.at -= QUIET);
        assert!(said.is_news(&refusal("53100")));
        assert!(said.end());
    }

    #[test]
    fn kinds_are_forgotten_before_they_fill_the_memory() {
        let mut said = Said::default();
        for n in 0..100 {
            assert!(said.is_news(&refusal(&n.to_string())));
        }
        assert_eq!(said.0.len(), KINDS);
    }
}
