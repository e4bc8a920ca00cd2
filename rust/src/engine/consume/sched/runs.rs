//! Runs on an event loop: fed into its inbox, fetched in batches, begun and ended one by one.

use std::time::Duration;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::sched::{AsyncRun, Message, Sched};
use crate::engine::consume::task::Task;

/// What became of a run that the loop was about to start.
#[derive(Debug)]
pub enum Begun {
    /// It counts as running: call its handler.
    Run,
    /// Nothing may start here now: give it back.
    Late(Task),
    /// It has expired.
    Over(Task),
    /// It was taken away meanwhile: others have it, or will.
    Gone,
}

impl Sched {
    /// Moves async tasks that may run now into the loop's inbox.
    pub fn feed(&mut self) {
        while !self.stopping && self.running + self.reserved < self.concurrency && !self.is_others_turn(true) {
            let Some(at) = self.next_startable(true) else { return };
            let Some(task) = self.kinds[at].queue.pop_front() else { return };
            self.unbuffer(&task);
            self.next_kind = (at + 1) % self.kinds.len();
            self.kinds[at].running += 1;
            self.running += 1;
            self.next_run += 1;
            self.inbox.push_back(Message::Start(self.next_run, task));
        }
    }

    /// Whether the loop must be woken: something waits and it was told of nothing yet.
    pub fn disarm(&mut self) -> bool {
        if self.inbox.is_empty() {
            return false;
        }
        std::mem::replace(&mut self.armed, false)
    }

    /// Up to `limit` messages for the loop, each start of which it begins by `begin_run`. Empty: armed again.
    pub fn receive(&mut self, limit: usize, may_start: bool) -> Vec<Message> {
        let mut messages = Vec::with_capacity(limit.min(self.inbox.len()));
        while messages.len() < limit {
            match self.inbox.pop_front() {
                Some(Message::Start(run, task)) if !may_start => {
                    self.inbox.push_front(Message::Start(run, task));
                    break;
                }
                Some(Message::Start(run, task)) => {
                    self.runs.insert(run, AsyncRun { task: task.clone(), started: None });
                    messages.push(Message::Start(run, task));
                }
                Some(cancel) => messages.push(cancel),
                None => break,
            }
        }
        if messages.is_empty() {
            self.armed = true;
        }
        messages
    }

    /// The loop has come to this run, perhaps long after it fetched it: hundreds are fetched together, and each one's first step may
    /// take its time. Only from here on it is named as running, and may be charged.
    pub fn begin_run(&mut self, run: u64, now: Moment, may_start: impl FnOnce() -> bool) -> Begun {
        let Some(found) = self.runs.get_mut(&run) else { return Begun::Gone };
        let is_over = found.task.is_over(now);
        let may_start = may_start();
        if may_start && !is_over {
            found.started = Some(now);
            return Begun::Run;
        }
        let Some(late) = self.runs.remove(&run) else { return Begun::Gone };
        self.ended(late.task.chunk.kind);
        if may_start { Begun::Over(late.task) } else { Begun::Late(late.task) }
    }

    /// An async task has ended. `None`: its attempt had ended before.
    pub fn finish_run(&mut self, run: u64, now: Moment) -> Option<Duration> {
        let ended = self.runs.remove(&run)?;
        let kind = ended.task.chunk.kind;
        let time = now.since(ended.started.unwrap_or(now));
        self.ended(kind);
        self.learn(kind, 1, time);
        self.feed();
        Some(time)
    }
}
