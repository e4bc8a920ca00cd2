//! A claimed task in memory, and what becomes of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::consume::moment::Moment;
use crate::engine::run_options::RunOptions;
use crate::engine::wire::{Elements, i64_of};

/// What one claim took of one chunk: tasks that are alike, with their content in one buffer.
#[derive(Debug)]
pub struct Chunk {
    /// Which registration of this consumer claimed it.
    pub epoch: u32,
    /// The claim's number.
    pub no: i64,
    /// Index of the handler in the settings.
    pub kind: usize,
    /// The type's name.
    pub name: Arc<str>,
    /// The queue's name.
    pub queue: Arc<str>,
    /// 0 ordinary, 1 front, 2 careful, 3 and 4 alone.
    pub track: i16,
    /// Runs charged before this one.
    pub attempts: i16,
    /// Runs in all before a task fails for good.
    pub max_attempts: i16,
    ids: Vec<i64>,
    created_ats: Vec<i64>,
    formats: Vec<u8>,
    ends: Vec<u32>,
    payloads: Vec<u8>,
    /// Until when each may start; empty: for ever.
    expiries: Vec<Option<Moment>>,
    /// What each says of its own runs; behind its end: nothing.
    options: Vec<Option<RunOptions>>,
    /// Tasks that are not here, since what they say of their runs can't be read: why.
    unreadable: Vec<(i64, String)>,
    /// Places of the tasks that its claim no longer holds, or whose time is up, and that were running here. Here and not with each run:
    /// it costs nothing where nobody cancels, and is there as long as anybody looks.
    lost: Mutex<Vec<u32>>,
}

impl Chunk {
    /// A chunk without content, to be filled.
    #[allow(clippy::too_many_arguments, reason = "the columns of one row, named at the only caller")]
    pub fn new(
        epoch: u32,
        no: i64,
        kind: usize,
        queue: Arc<str>,
        track: i16,
        attempts: i16,
        max_attempts: i16,
    ) -> Self {
        let (ids, created_ats, formats, ends, payloads, expiries, options, unreadable, lost) = Default::default();
        Self {
            epoch,
            no,
            kind,
            name: Arc::default(),
            queue,
            track,
            attempts,
            max_attempts,
            ids,
            created_ats,
            formats,
            ends,
            payloads,
            expiries,
            options,
            unreadable,
            lost,
        }
    }

    /// Takes the content from the claim's arrays: one copy a chunk, none a task. Where some have run options, each is looked at.
    pub fn fill(
        &mut self,
        ids: Elements<'_>,
        created_ats: Elements<'_>,
        formats: Elements<'_>,
        payloads: Elements<'_>,
    ) {
        let formats: Vec<u8> = formats.map(|f| f.first().copied().unwrap_or(b'b')).collect();
        if formats.iter().any(|&format| has_options(format)) {
            for (((id, created_at), format), payload) in ids.zip(created_ats).zip(formats).zip(payloads) {
                self.push(i64_of(id), i64_of(created_at), format, payload);
            }
            return;
        }
        self.ids.extend(ids.map(i64_of));
        self.created_ats.extend(created_ats.map(i64_of));
        self.formats = formats;
        self.ends.reserve(payloads.len());
        for payload in payloads {
            self.payloads.extend_from_slice(payload);
            self.ends.push(u32::try_from(self.payloads.len()).unwrap_or(u32::MAX));
        }
    }

    /// Those of its tasks expire that have so many microseconds left `now`.
    pub fn expire(&mut self, lefts: &HashMap<i64, i64>, now: Moment) {
        let left = |us: i64| Duration::from_micros(us.max(0).unsigned_abs());
        self.expiries = self.ids.iter().map(|id| lefts.get(id).map(|&us| now + left(us))).collect();
    }

    /// Adds one task's content, or the task to what can't be read.
    pub fn push(&mut self, id: i64, created_at: i64, format: u8, stored: &[u8]) {
        let (mut format, mut payload) = (format, stored);
        if has_options(format) {
            match RunOptions::split(stored) {
                Ok((options, rest)) => {
                    (format, payload) = (format.to_ascii_lowercase(), rest);
                    self.options.resize(self.ids.len(), None);
                    self.options.push(Some(options));
                }
                Err(why) => return self.unreadable.push((id, why)),
            }
        }
        self.ids.push(id);
        self.created_ats.push(created_at);
        self.formats.push(format);
        self.payloads.extend_from_slice(payload);
        self.ends.push(u32::try_from(self.payloads.len()).unwrap_or(u32::MAX));
    }

    /// Whether it took this task, readable or not.
    pub fn knows(&self, id: i64) -> bool {
        self.ids.contains(&id) || self.unreadable.iter().any(|(unreadable, _)| *unreadable == id)
    }

    /// The tasks that it took and can't give to a handler, with the reasons.
    pub fn unreadable(&self) -> &[(i64, String)] {
        &self.unreadable
    }

    /// Whether any of its tasks has a timeout of its own.
    pub fn has_timeouts(&self) -> bool {
        self.options.iter().flatten().any(|options| options.timeout.is_some())
    }

    /// Lost once before: it starts before what others have waiting.
    pub fn is_careful(&self) -> bool {
        self.track >= 2
    }

    /// Lost again: it runs while nothing else does.
    pub fn is_alone(&self) -> bool {
        self.track >= 3
    }

    /// The ids it holds.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Bytes of payload.
    pub fn bytes(&self) -> usize {
        self.payloads.len()
    }
}

/// Whether the format says that a line of run options comes before the payload.
fn has_options(format: u8) -> bool {
    matches!(format, b'J' | b'B')
}

/// One claimed task: a place in its chunk.
#[derive(Debug, Clone)]
pub struct Task {
    /// The chunk.
    pub chunk: Arc<Chunk>,
    /// Its place.
    pub at: u32,
}

impl Task {
    /// The task's id.
    pub fn id(&self) -> i64 {
        self.chunk.ids[self.at as usize]
    }

    /// When it was enqueued: microseconds since 2000-01-01 UTC.
    pub fn created_at(&self) -> i64 {
        self.chunk.created_ats[self.at as usize]
    }

    /// Whether the payload is JSON; else raw bytes.
    pub fn is_json(&self) -> bool {
        self.chunk.formats[self.at as usize] == b'j'
    }

    /// The payload's bytes.
    pub fn payload(&self) -> &[u8] {
        let at = self.at as usize;
        let start = if at == 0 { 0 } else { self.chunk.ends[at - 1] as usize };
        &self.chunk.payloads[start..self.chunk.ends[at] as usize]
    }

    /// Whether it has expired: it must not start any more.
    pub fn is_over(&self, now: Moment) -> bool {
        self.chunk.expiries.get(self.at as usize).is_some_and(|until| until.is_some_and(|until| until <= now))
    }

    /// What it says of its own runs.
    pub fn options(&self) -> RunOptions {
        self.chunk.options.get(self.at as usize).copied().flatten().unwrap_or_default()
    }

    /// Which claim holds it.
    pub fn holder(&self) -> Holder {
        Holder { epoch: self.chunk.epoch, no: self.chunk.no, id: self.id() }
    }

    /// From here on nothing that comes of its run counts: it was cancelled, or its time is up. False: it was so before.
    pub fn lose(&self) -> bool {
        let mut lost = self.chunk.lost.lock();
        let is_news = !lost.contains(&self.at);
        if is_news {
            lost.push(self.at);
        }
        is_news
    }

    /// Whether `lose` was called.
    pub fn is_lost(&self) -> bool {
        self.chunk.lost.lock().contains(&self.at)
    }
}

/// A task as the database knows it in flight: registration, claim, id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holder {
    /// Which registration of this consumer.
    pub epoch: u32,
    /// The claim's number.
    pub no: i64,
    /// The task's id.
    pub id: i64,
}

/// How a failed attempt ends.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Seconds until the next run; `None`: failed for good.
    pub delay: Option<f64>,
    /// The error as text.
    pub error: String,
    /// Its traceback.
    pub traceback: String,
}

/// What a handler returned, to be kept for those who wait for it.
#[derive(Debug)]
pub struct Returned {
    /// Seconds that it is kept.
    pub seconds: f64,
    /// Whether the value is JSON; else raw bytes.
    pub is_json: bool,
    /// The value's bytes.
    pub value: Vec<u8>,
}

/// What became of a task that was claimed.
#[derive(Debug)]
pub enum Outcome {
    /// Its handler returned.
    Completed,
    /// The same, and what it returned is kept.
    Returned(Box<Returned>),
    /// Its handler raised, or ran out of time.
    Failed(Box<Failure>),
    /// Its handler asked to be run again in so many seconds, and that is no attempt.
    Snoozed(f64),
    /// It was not started in time.
    Expired,
    /// It was not started.
    GivenBack,
    /// Its run counted no longer, and its handler ended it for that: there is nothing to store.
    Dropped,
}

impl Outcome {
    /// Something came of a run: it is to be named if it can't be stored.
    pub fn is_result(&self) -> bool {
        !matches!(self, Self::Expired | Self::GivenBack | Self::Dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::run_options::Retry;

    #[test]
    fn run_options_belong_to_their_tasks_and_what_is_damaged_is_left_out() {
        let mut chunk = Chunk::new(0, 1, 0, Arc::from("default"), 0, 0, 3);
        chunk.push(1, 0, b'j', b"1\n");
        chunk.push(2, 0, b'J', b"{\"timeout\":5");
        chunk.push(3, 0, b'B', b"{\"retry\":{\"constant\":5}}\n\n3");
        chunk.push(4, 0, b'b', b"{}\n4");
        chunk.push(5, 0, b'J', b"{\"timeout\":5}\n5");
        chunk.push(6, 0, b'j', b"6");
        assert_eq!(chunk.unreadable().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2]);
        assert!(chunk.knows(2) && chunk.knows(3) && !chunk.knows(7));
        let chunk = Arc::new(chunk);
        let found: Vec<_> = (0..5)
            .map(|at| {
                let task = Task { chunk: Arc::clone(&chunk), at };
                (task.id(), task.is_json(), task.payload().to_vec(), task.options())
            })
            .collect();
        let none = RunOptions::default();
        let retry = RunOptions { retry: Some(Retry::Constant(5.0)), ..none };
        let timeout = RunOptions { timeout: Some(5.0), ..none };
        let expected = [
            (1, true, b"1\n".to_vec(), none),
            (3, false, b"\n3".to_vec(), retry),
            (4, false, b"{}\n4".to_vec(), none),
            (5, true, b"5".to_vec(), timeout),
            (6, true, b"6".to_vec(), none),
        ];
        assert_eq!(found, expected);
    }
}
