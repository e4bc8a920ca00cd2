//! What ends from outside: attempts whose time is up, and all that has not started when the consumer stops or was declared dead.

use std::time::Duration;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::outcomes::Outcomes;
use crate::engine::consume::sched::{Expired, Message, Sched};
use crate::engine::consume::task::{Holder, Task};

impl Sched {
    /// Ends the attempts whose time is up: their threads are written off, their coroutines told to stop. What such a thread had done
    /// before is handed over here: once its place is free nobody waits for it.
    pub fn expire(&mut self, now: Moment, outcomes: &Outcomes) -> Vec<Expired> {
        let mut expired = Vec::new();
        for slot in self.slots.clone() {
            let limit = |task: &Task| self.timeout(task);
            let Some((late, left)) = slot.expire(now, limit, outcomes) else { continue };
            self.slots.retain(|s| !std::sync::Arc::ptr_eq(s, &slot));
            self.stuck += 1;
            self.ended(late.task.chunk.kind);
            self.requeue(left);
            expired.push(late);
        }
        let is_late = |run: &super::AsyncRun| {
            let timeout = self.timeout(&run.task)?;
            run.started.filter(|started| now.since(*started) >= timeout)
        };
        let late: Vec<u64> = self.runs.iter().filter(|(_, run)| is_late(run).is_some()).map(|(run, _)| *run).collect();
        for number in late {
            let Some(run) = self.runs.remove(&number) else { continue };
            let kind = run.task.chunk.kind;
            self.ended(kind);
            self.inbox.push_back(Message::Cancel(number, run.task.clone()));
            let was_lost = !run.task.lose();
            if let (Some(started), Some(timeout)) = (run.started, self.timeout(&run.task)) {
                expired.push(Expired { task: run.task, started, timeout, was_lost });
            }
        }
        if !expired.is_empty() {
            self.feed();
        }
        expired
    }

    /// How long an attempt of this task may take: as it says itself, else as its type does.
    fn timeout(&self, task: &Task) -> Option<Duration> {
        task.options().timeout().or(self.kinds[task.chunk.kind].kind.timeout)
    }

    /// Whether any type has a timeout, or any task that ever came here.
    pub fn has_timeouts(&self) -> bool {
        self.has_timeouts
    }

    /// The tasks whose handlers run, for the heartbeat: those that are about to be called, too, but none that only waits for its turn.
    pub fn running_holders(&self) -> Vec<Holder> {
        let threads = self.slots.iter().filter_map(|s| s.running());
        let runs = self.runs.values().filter(|r| r.started.is_some()).map(|r| r.task.holder());
        threads.chain(runs).collect()
    }

    /// Since when this task's handler runs; `None`: it does not, or its attempt has ended.
    pub fn started(&self, holder: &Holder) -> Option<Moment> {
        let threads = self.slots.iter().filter_map(|s| s.current());
        let runs = self.runs.values().filter_map(|r| Some((r.task.holder(), r.started?)));
        threads.chain(runs).find(|(one, _)| one == holder).map(|(_, started)| started)
    }

    /// Takes out everything that has not started: at a stop to give it back, after a death because others have it now.
    pub fn take_unstarted(&mut self) -> Vec<Task> {
        let mut out: Vec<Task> = Vec::new();
        for kind in &mut self.kinds {
            out.extend(kind.queue.drain(..));
        }
        for slot in &self.slots {
            out.extend(slot.drain());
        }
        let inbox = std::mem::take(&mut self.inbox);
        for message in inbox {
            match message {
                Message::Start(_, task) => {
                    self.ended(task.chunk.kind);
                    out.push(task);
                }
                cancel @ (Message::Cancel(..) | Message::Interrupt(..)) => self.inbox.push_back(cancel),
            }
        }
        // Fetched by the loop, which has not come to them.
        let waiting: Vec<u64> = self.runs.iter().filter(|(_, r)| r.started.is_none()).map(|(run, _)| *run).collect();
        for number in waiting {
            let Some(run) = self.runs.remove(&number) else { continue };
            self.ended(run.task.chunk.kind);
            out.push(run.task);
        }
        self.buffered = 0;
        self.buffered_bytes = 0;
        out
    }

    /// Hands over what has ended in threads that may be long in coming to it, stuck in their next handlers.
    pub fn hand_over(&self, outcomes: &Outcomes) {
        for slot in &self.slots {
            slot.hand_over(outcomes);
        }
    }

    /// Nothing starts any more.
    pub fn stop(&mut self) {
        self.stopping = true;
    }
}
