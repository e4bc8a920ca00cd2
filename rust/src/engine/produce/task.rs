//! A task on its way in: what it holds and the limits on it, checked before anything is written.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::engine::error::{Error, Kind, Result};

/// Characters that a type, a queue or a token may have.
pub const TEXT_LIMIT: usize = 255;
/// Longest delay, a hundred years in seconds (`DURATION_LIMIT` of settings.py): well inside what PostgreSQL and Python hold as a time.
pub const DELAY_LIMIT: f64 = 3_155_760_000.0;

/// Highest priority; the lowest, and the default, is 0 (`PRIORITY_LIMIT` of task.py).
pub const PRIORITY_LIMIT: i16 = 9;

/// Which lane a task goes to: its queue, type and priority.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LaneKey {
    /// The queue's name.
    pub queue: String,
    /// The task's type.
    pub kind: String,
    /// The higher is claimed first within the queue.
    pub priority: i16,
}

impl LaneKey {
    /// Checks all three.
    pub fn new(queue: &str, kind: &str, priority: i16) -> Result<Arc<Self>> {
        check_text("type", kind)?;
        check_text("queue", queue)?;
        if !(0..=PRIORITY_LIMIT).contains(&priority) {
            return Err(refused(format!("priority is {priority}, but must be a whole number, 0 to {PRIORITY_LIMIT}")));
        }
        Ok(Arc::new(Self { queue: queue.to_owned(), kind: kind.to_owned(), priority }))
    }
}

/// How a payload is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON in UTF-8.
    Json,
    /// Raw bytes.
    Bytes,
    /// JSON, behind a line of the task's own run options.
    JsonWithOptions,
    /// Raw bytes, behind the same.
    BytesWithOptions,
}

impl Format {
    /// As it stands in the column `format`.
    pub fn code(self) -> i8 {
        match self {
            Self::Json => b'j'.cast_signed(),
            Self::Bytes => b'b'.cast_signed(),
            Self::JsonWithOptions => b'J'.cast_signed(),
            Self::BytesWithOptions => b'B'.cast_signed(),
        }
    }
}

/// When a delayed task may start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// Seconds from its enqueue, by the database's clock.
    After(f64),
    /// A time: microseconds since the Unix epoch.
    At(i64),
}

impl When {
    /// A delay in seconds; 0 is none.
    pub fn after(seconds: f64) -> Result<Option<Self>> {
        if !(0.0..=DELAY_LIMIT).contains(&seconds) {
            return Err(refused(format!("delay is {seconds}, but must be 0 to {DELAY_LIMIT:.0} seconds")));
        }
        Ok((seconds > 0.0).then_some(Self::After(seconds)))
    }

    /// The two forms as `delay_tasks.sql` takes them: seconds, or the time itself.
    pub fn columns(self) -> (Option<f64>, Option<SystemTime>) {
        match self {
            Self::After(seconds) => (Some(seconds), None),
            Self::At(us) => (None, time_of(us)),
        }
    }
}

/// The time so many microseconds after the Unix epoch.
fn time_of(us: i64) -> Option<SystemTime> {
    let distance = Duration::from_micros(us.unsigned_abs());
    if us < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }
}

/// When tasks expire, as a column; empty where none does, which a statement takes for so many NULLs.
pub fn expiries(times: impl Iterator<Item = Option<i64>> + Clone) -> Vec<Option<SystemTime>> {
    if times.clone().all(|us| us.is_none()) {
        return Vec::new();
    }
    times.map(|us| us.and_then(time_of)).collect()
}

/// Among which tasks a token is unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// Those of its task's type.
    #[default]
    Type,
    /// Those of its task's queue.
    Queue,
    /// All.
    Global,
}

impl Scope {
    /// A token as it stands in the table: with no type that a task may have, beside those that are unique for one.
    pub fn key<'a>(self, queue: &str, token: &'a str) -> Cow<'a, str> {
        match self {
            Self::Type => Cow::Borrowed(token),
            Self::Queue => Cow::Owned(format!("{}:{queue}:{token}", queue.len())),
            Self::Global => Cow::Owned(format!(":{token}")),
        }
    }
}

/// What an enqueue does that meets its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnConflict {
    /// It answers the id of the task that has it.
    #[default]
    Existing,
    /// It fails.
    Raise,
    /// It answers the id, and changes that task while it waits.
    Replace {
        /// The payload becomes the new task's.
        payload: bool,
        /// And the time, where the new task has one.
        time: bool,
    },
}

/// How a token is meant, beside its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenRule {
    /// Among which tasks it is unique.
    pub scope: Scope,
    /// It is free once its task has ended.
    pub until_end: bool,
    /// And after this many microseconds; None: not by time.
    pub ttl: Option<i64>,
    /// What a later task does that wants it.
    pub on_conflict: OnConflict,
}

impl TokenRule {
    /// It is not held for just as long as its task is kept.
    pub fn is_lent(&self) -> bool {
        self.until_end || self.ttl.is_some()
    }

    /// A task that meets it is refused.
    pub fn raises(&self) -> bool {
        self.on_conflict == OnConflict::Raise
    }

    /// A task that meets it changes the one that has it.
    pub fn replaces(&self) -> bool {
        matches!(self.on_conflict, OnConflict::Replace { .. })
    }
}

/// One task of a single enqueue, or of a small `enqueue_many`.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// Its queue, type and priority.
    pub lane: Arc<LaneKey>,
    /// Runs in all before it fails for good.
    pub max_attempts: i16,
    /// How the payload is stored: the code of a [`Format`].
    pub format: i8,
    /// The payload, encoded, behind the line of the task's own run options if it has some.
    pub payload: Vec<u8>,
    /// None: it may start at once.
    pub when: Option<When>,
    /// Microseconds since the Unix epoch: not started by then, it has expired. None: never.
    pub expires_at: Option<i64>,
    /// Its token as it stands in the table ([`Scope::key`]).
    pub token: Option<String>,
    /// How the token is meant.
    pub rule: TokenRule,
    /// It is one of a call of many, which goes in whole or not at all.
    pub is_of_many: bool,
}

impl NewTask {
    /// The type for which its token is unique; empty: for any.
    pub fn token_kind(&self) -> &str {
        if self.rule.scope == Scope::Type { &self.lane.kind } else { "" }
    }
}

/// A task that is refused.
pub fn refused(message: impl Into<String>) -> Error {
    Error::new(Kind::Enqueue, message)
}

/// Refuses a name that is empty, too long, or holds what PostgreSQL's text can't.
pub fn check_text(what: &str, value: &str) -> Result<()> {
    if value.is_empty() {
        return Err(refused(format!("{what} is empty, but must have 1 to {TEXT_LIMIT} characters")));
    }
    // Bytes are never fewer than characters, so most names need no counting.
    if value.len() > TEXT_LIMIT {
        let characters = value.chars().count();
        if characters > TEXT_LIMIT {
            return Err(refused(format!("{what} has {characters} characters, but must have 1 to {TEXT_LIMIT}")));
        }
    }
    if value.as_bytes().contains(&0) {
        return Err(refused(format!("{what} holds a NUL character, which PostgreSQL's text can't")));
    }
    Ok(())
}

/// The error for a payload over the limit, if it is.
pub fn check_payload(is_over: bool, limit: usize) -> Result<()> {
    if is_over {
        let message = format!("payload has more than {limit} bytes once it is encoded (payload_limit)");
        return Err(Error::new(Kind::Payload, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_1_to_255_characters_and_no_nul() {
        for good in ["a", &"x".repeat(255), &"ü".repeat(255)] {
            assert!(check_text("type", good).is_ok(), "{good:?}");
        }
        for bad in ["", "a\0b", &"x".repeat(256), &"ü".repeat(256)] {
            assert!(check_text("type", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn priorities_are_0_to_9() {
        for good in [0, 9] {
            assert_eq!(LaneKey::new("q", "a", good).unwrap().priority, good);
        }
        for bad in [-1, 10] {
            assert!(LaneKey::new("q", "a", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn delays_are_finite_and_not_negative() {
        assert_eq!(When::after(0.0).unwrap(), None);
        assert_eq!(When::after(1.5).unwrap(), Some(When::After(1.5)));
        for bad in [-1.0, f64::NAN, f64::INFINITY, 1e18] {
            assert!(When::after(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_of_other_scopes_never_meet() {
        let keys = [
            Scope::Queue.key("a", "b:c"),
            Scope::Queue.key("a:b", "c"),
            Scope::Queue.key("1", ":a"),
            Scope::Global.key("a", "1:a:b"),
            Scope::Global.key("a", "b"),
            Scope::Queue.key("ü", "b"),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len(), "{keys:?}");
        assert_eq!(Scope::Type.key("a", "b"), "b");
    }

    #[test]
    fn times_before_1970_are_times_too() {
        assert_eq!(When::At(-1_000_000).columns().1, UNIX_EPOCH.checked_sub(Duration::from_secs(1)));
    }
}
