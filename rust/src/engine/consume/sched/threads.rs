//! Handler threads: which of them takes what, and when another is worth its while.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::consume::sched::{Sched, Slot, Take, WORTH_WAKING_US, batch_size};
use crate::engine::consume::task::Task;

impl Sched {
    /// A new handler thread's slot.
    pub fn join_thread(&mut self) -> Arc<Slot> {
        self.asked = self.asked.saturating_sub(1);
        let slot = Arc::new(Slot::default());
        self.slots.push(Arc::clone(&slot));
        slot
    }

    /// A handler thread is gone; what it took and did not start goes back to its queue.
    pub fn leave_thread(&mut self, slot: &Arc<Slot>) {
        self.slots.retain(|s| !Arc::ptr_eq(s, slot));
        self.stuck -= usize::from(slot.is_written_off());
        self.requeue(slot.drain());
    }

    /// Ends the thread's last batch (`kind`, tasks run, time) and takes the next one.
    pub fn take(&mut self, slot: &Arc<Slot>, last: Option<(usize, u32, Duration)>, may_start: bool) -> Take {
        if let Some((kind, count, time)) = last {
            // A written-off thread's place was freed when it was written off.
            if slot.is_written_off() {
                return Take::Leave;
            }
            self.ended(kind);
            self.learn(kind, count, time);
        }
        if self.stopping {
            return Take::Leave;
        }
        if !may_start || self.running + self.reserved >= self.concurrency || self.is_others_turn(false) {
            return Take::Empty;
        }
        if let Some(at) = self.next_startable(false) {
            let state = &self.kinds[at];
            let careful = state.queue.front().is_some_and(|t| t.chunk.is_careful());
            let busy = (self.slots.len() - self.idle.min(self.slots.len())).max(1);
            let share = state.queue.len().div_ceil(busy);
            let batch = if careful { 1 } else { batch_size(state.mean_us).min(share) };
            self.next_kind = (at + 1) % self.kinds.len();
            self.takes += 1;
            let taken: Vec<Task> = self.kinds[at].queue.drain(..batch).collect();
            for task in &taken {
                self.unbuffer(task);
            }
            slot.give(taken);
            self.kinds[at].running += 1;
            self.running += 1;
            return Take::Batch(at);
        }
        self.steal(slot)
    }

    /// Takes half of what another thread took and has not started.
    fn steal(&mut self, thief: &Arc<Slot>) -> Take {
        for slot in &self.slots {
            if Arc::ptr_eq(slot, thief) {
                continue;
            }
            let Some(kind) = slot.kind() else { continue };
            let state = &self.kinds[kind];
            if state.running >= state.kind.workers || self.alone {
                continue;
            }
            let stolen = slot.steal();
            if stolen.is_empty() {
                continue;
            }
            thief.give(stolen);
            self.kinds[kind].running += 1;
            self.running += 1;
            self.takes += 1;
            return Take::Batch(kind);
        }
        Take::Empty
    }

    /// Whether one more thread would find enough to do: wake one, or ask for one.
    pub fn wants_thread(&self) -> bool {
        self.kinds.iter().any(|k| {
            let room = !k.kind.is_async && k.running < k.kind.workers && !k.queue.is_empty();
            #[allow(clippy::cast_precision_loss, reason = "a queue's length")]
            let worth = k.running == 0 || k.mean_us.is_none_or(|us| us * k.queue.len() as f64 > WORTH_WAKING_US);
            room && worth
        })
    }

    /// Whether a new thread should be asked for (none is idle, and there may be more).
    pub fn ask_thread(&mut self) -> bool {
        let ask = self.idle == 0 && self.asked == 0 && self.slots.len() < self.concurrency && !self.stopping;
        self.asked += usize::from(ask);
        ask
    }

    /// Counts threads that wait.
    pub fn idle(&mut self, change: isize) {
        self.idle = self.idle.saturating_add_signed(change);
    }

    /// Threads that wait for work.
    pub fn idle_threads(&self) -> usize {
        self.idle
    }

    /// Handler threads that are here, those written off left out.
    pub fn threads(&self) -> usize {
        self.slots.len()
    }

    /// Threads whose handlers go on although their time is up.
    pub fn stuck(&self) -> usize {
        self.stuck
    }

    /// How often a batch was taken: when it stands still beside waiting tasks, the threads at work are stuck and another is needed.
    pub fn takes(&self) -> u64 {
        self.takes
    }

    /// Whether sync tasks wait that a further thread could run.
    pub fn has_waiting(&self) -> bool {
        self.kinds.iter().any(|k| !k.kind.is_async && !k.queue.is_empty() && k.running < k.kind.workers)
            || self.slots.iter().any(|s| s.has_unstarted())
    }
}
