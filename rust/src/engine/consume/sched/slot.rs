//! A handler thread's place: what it runs, what it took and has not started, and what has ended there.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::consume::micros;
use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::{Ended, Outcomes};
use crate::engine::consume::sched::Expired;
use crate::engine::consume::task::{Holder, Outcome, Task};

/// See the module. What is not started an idle thread may steal, and a stop or a death takes it away. What has ended is here, and not
/// with the thread, so that others can hand it over while the thread's next handler takes its time.
#[derive(Debug, Default)]
pub struct Slot {
    inner: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    local: VecDeque<Task>,
    current: Option<Current>,
    /// Not handed over yet.
    ended: Vec<Ended>,
    written_off: bool,
}

#[derive(Debug)]
struct Current {
    task: Task,
    started: Moment,
}

/// What a thread does next with its batch.
#[derive(Debug)]
pub enum Next {
    /// This task counts as running: call its handler.
    Run(Task),
    /// Nothing may start here now, these among it: give them back.
    Late(Vec<Task>),
    /// The batch is done, or the thread was written off.
    Done,
}

impl Slot {
    /// The next task of this thread's batch. `may_start` is asked under the lock under which a death takes away what has not started:
    /// after it a new registration makes starts possible again, and nothing that was lost may be here then. What has expired is passed over, and
    /// ends as that.
    ///
    /// `now` is the end of the task before. A machine or process that stands still after it was read, and before the handler's first
    /// line, starts one task late: no check can be one with the start. That run's result is refused.
    pub fn begin(&self, now: Moment, may_start: impl FnOnce() -> bool) -> Next {
        let mut slot = self.inner.lock();
        if slot.written_off || slot.local.is_empty() {
            return Next::Done;
        }
        if !may_start() {
            return Next::Late(slot.local.drain(..).collect());
        }
        while let Some(task) = slot.local.pop_front() {
            if task.is_over(now) {
                slot.ended.push(Ended { holder: task.holder(), took_us: 0, outcome: Outcome::Expired });
                continue;
            }
            slot.current = Some(Current { task: task.clone(), started: now });
            return Next::Run(task);
        }
        Next::Done
    }

    /// The current task's handler has ended. Does nothing where its attempt ended before (timed out): its result must not count.
    pub fn finish(&self, now: Moment, outcome: Outcome) {
        let mut slot = self.inner.lock();
        if let Some(current) = slot.current.take() {
            let took_us = micros(now.since(current.started));
            slot.ended.push(Ended { holder: current.task.holder(), took_us, outcome });
        }
    }

    /// Hands over what has ended. Within the lock: a thread that finds nothing left to hand over may report its end.
    pub fn hand_over(&self, outcomes: &Outcomes) {
        outcomes.append(&mut self.inner.lock().ended);
    }

    /// Whether the thread was replaced and should leave.
    pub fn is_written_off(&self) -> bool {
        self.inner.lock().written_off
    }

    pub(super) fn give(&self, tasks: impl IntoIterator<Item = Task>) {
        self.inner.lock().local.extend(tasks);
    }

    /// The type of what is here and not started.
    pub(super) fn kind(&self) -> Option<usize> {
        self.inner.lock().local.front().map(|t| t.chunk.kind)
    }

    /// Half of what is here and not started, the later one.
    pub(super) fn steal(&self) -> VecDeque<Task> {
        let mut slot = self.inner.lock();
        let keep = slot.local.len() / 2;
        slot.local.split_off(keep)
    }

    /// All that is here and not started.
    pub(super) fn drain(&self) -> Vec<Task> {
        self.inner.lock().local.drain(..).collect()
    }

    pub(super) fn has_unstarted(&self) -> bool {
        !self.inner.lock().local.is_empty()
    }

    /// Takes out what has not started of the tasks that are gone, and marks what runs of them: gives that if it is news. Under one lock:
    /// what has not started may start at any time.
    pub(super) fn lose(&self, is_gone: impl Fn(&Task) -> bool) -> (VecDeque<Task>, Option<Task>) {
        let mut slot = self.inner.lock();
        let (gone, left) = std::mem::take(&mut slot.local).into_iter().partition(&is_gone);
        slot.local = left;
        let current = slot.current.as_ref().map(|c| &c.task);
        (gone, current.filter(|t| is_gone(t) && t.lose()).cloned())
    }

    /// What runs here, since when.
    pub(super) fn current(&self) -> Option<(Holder, Moment)> {
        self.inner.lock().current.as_ref().map(|c| (c.task.holder(), c.started))
    }

    /// What runs here.
    pub(super) fn running(&self) -> Option<Holder> {
        self.inner.lock().current.as_ref().map(|c| c.task.holder())
    }

    /// Writes the thread off if its task has run for longer than its `limit` allows, and hands over what ended before: the attempt
    /// that ran out of time, and what had not started.
    pub(super) fn expire(
        &self,
        now: Moment,
        limit: impl FnOnce(&Task) -> Option<Duration>,
        outcomes: &Outcomes,
    ) -> Option<(Expired, Vec<Task>)> {
        let mut slot = self.inner.lock();
        let timeout = limit(&slot.current.as_ref()?.task)?;
        let current = slot.current.take_if(|c| now.since(c.started) >= timeout)?;
        slot.written_off = true;
        outcomes.append(&mut slot.ended);
        let was_lost = !current.task.lose();
        let expired = Expired { task: current.task, started: current.started, timeout, was_lost };
        Some((expired, slot.local.drain(..).collect()))
    }
}
