//! Which task starts where and when: the tasks that are claimed and not yet started, the limits, and the handler threads that take them.
//!
//! One short lock. It is taken once a batch by a handler thread, once a task by an event loop, and never held across a wait.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::engine::consume::task::{Chunk, Holder, Task};

/// Below this mean run time a thread takes 32 tasks at once.
const FAST_US: f64 = 100.0;
/// Below this, 8.
const QUICK_US: f64 = 1_000.0;
/// From this on, no more is claimed than can run now.
const SLOW_US: f64 = 100_000.0;
/// Weight of a new batch in the moving average.
const EWMA: f64 = 0.3;
/// Work that one more thread would find, before it is woken: below this the threads at work are done sooner than it would wake.
const WORTH_WAKING_US: f64 = 1_000.0;
/// A handler slower than this completes out of order; few ids a claim keep its set of ids small.
const SCATTERED_US: f64 = 1_000.0;
/// That few.
const SCATTERED_IDS: usize = 64;

/// One type's limits.
#[derive(Debug, Clone)]
pub struct Kind {
    /// The type's name.
    pub name: String,
    /// Whether its handler is a coroutine function.
    pub is_async: bool,
    /// How many of its handlers may run at once.
    pub workers: usize,
    /// How long an attempt may take.
    pub timeout: Option<Duration>,
}

#[derive(Debug)]
struct KindState {
    kind: Kind,
    queue: VecDeque<Task>,
    running: usize,
    /// Mean run time in microseconds; `None` before the first.
    mean_us: Option<f64>,
}

/// A handler thread's place: what it runs, and what it took and has not started (which an idle thread may steal).
#[derive(Debug, Default)]
pub struct Slot {
    inner: Mutex<SlotState>,
}

#[derive(Debug, Default)]
struct SlotState {
    local: VecDeque<Task>,
    current: Option<Current>,
    written_off: bool,
}

#[derive(Debug)]
struct Current {
    task: Task,
    started: Instant,
}

impl Slot {
    /// The next task of this thread's batch, now running. `None`: the batch is done, or the thread was written off.
    pub fn begin(&self, now: Instant) -> Option<Task> {
        let mut slot = self.inner.lock();
        if slot.written_off {
            return None;
        }
        let task = slot.local.pop_front();
        slot.current = task.as_ref().map(|t| Current { task: t.clone(), started: now });
        task
    }

    /// The current task's handler has ended. False: its attempt ended before (timed out), so its result must not count.
    pub fn finish(&self) -> bool {
        let mut slot = self.inner.lock();
        slot.current.take().is_some() && !slot.written_off
    }

    /// Whether the thread was replaced and should leave.
    pub fn is_written_off(&self) -> bool {
        self.inner.lock().written_off
    }
}

/// An async task that runs.
#[derive(Debug)]
struct AsyncRun {
    task: Task,
    started: Instant,
}

/// For the event loop: what to do, and with which run.
#[derive(Debug)]
pub enum Message {
    /// Start this task; the number names the run.
    Start(u64, Task),
    /// Cancel this run: its attempt has ended.
    Cancel(u64, Task),
}

/// What a claim may bring, one entry a type that wants something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Index of the type.
    pub kind: usize,
    /// Tasks, at most.
    pub tasks: usize,
    /// Whether what is claimed must be able to start at once.
    pub slow: bool,
}

/// What a claim may bring in all.
#[derive(Debug, Default)]
pub struct Wants {
    /// By type.
    pub types: Vec<Want>,
    /// Of all fast types together.
    pub tasks: usize,
    /// Bytes of payload.
    pub bytes: usize,
}

/// What a handler thread does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Take {
    /// Its slot holds a batch of this type.
    Batch(usize),
    /// There is nothing; wait.
    Empty,
    /// It is no longer needed.
    Leave,
}

/// An attempt that ran out of time.
#[derive(Debug)]
pub struct Expired {
    /// The task.
    pub task: Task,
    /// Since when it ran.
    pub started: Instant,
    /// Its limit.
    pub timeout: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Sched {
    kinds: Vec<KindState>,
    concurrency: usize,
    prefetch: usize,
    prefetch_bytes: usize,
    /// Claimed and not started, in `queue`s.
    buffered: usize,
    buffered_bytes: usize,
    running: usize,
    /// Slots promised to a claim under way that must start what it brings at once.
    reserved: usize,
    /// Of those, slots that came free while none could be promised, and how many more of the next ones are to be kept.
    saved: usize,
    owed: usize,
    /// The type that they are kept for.
    saved_kind: usize,
    /// A task that runs alone: nothing else starts while it is wanted or runs.
    alone: bool,
    slots: Vec<Arc<Slot>>,
    idle: usize,
    asked: usize,
    takes: u64,
    next_kind: usize,
    runs: HashMap<u64, AsyncRun>,
    next_run: u64,
    inbox: VecDeque<Message>,
    armed: bool,
    stopping: bool,
}

impl Sched {
    /// An empty one.
    pub fn new(kinds: Vec<Kind>, concurrency: usize, prefetch: usize, prefetch_bytes: usize) -> Self {
        let kinds = kinds
            .into_iter()
            .map(|kind| KindState { kind, queue: VecDeque::new(), running: 0, mean_us: None })
            .collect();
        Self {
            kinds,
            concurrency,
            prefetch,
            prefetch_bytes,
            buffered: 0,
            buffered_bytes: 0,
            running: 0,
            reserved: 0,
            saved: 0,
            owed: 0,
            saved_kind: 0,
            alone: false,
            slots: Vec::new(),
            idle: 0,
            asked: 0,
            takes: 0,
            next_kind: 0,
            runs: HashMap::new(),
            next_run: 0,
            inbox: VecDeque::new(),
            armed: true,
            stopping: false,
        }
    }

    // --- claiming -------------------------------------------------------------------------------------------------------------------

    fn free_slots(&self) -> usize {
        self.concurrency.saturating_sub(self.running + self.reserved)
    }

    /// What to claim now. `round_trip` is the time of a claim: a type is prefetched for its rate over two of them and 5 ms.
    pub fn wants(&self, round_trip: Duration) -> Wants {
        let mut wants = Wants {
            tasks: self.prefetch.saturating_sub(self.buffered),
            bytes: self.prefetch_bytes.saturating_sub(self.buffered_bytes),
            ..Wants::default()
        };
        if self.stopping || self.alone || wants.tasks == 0 || wants.bytes == 0 {
            return wants;
        }
        // Slow types share the free slots; those with a cap of their own are served first, in turn.
        let queued_slow: usize = self.kinds.iter().filter(|k| is_slow(k)).map(|k| k.queue.len()).sum();
        let mut free = self.free_slots().saturating_sub(queued_slow);
        let count = self.kinds.len();
        for step in 0..count {
            let at = (self.next_kind + step) % count;
            let state = &self.kinds[at];
            let can_run = state.kind.workers.saturating_sub(state.running + state.queue.len());
            if is_slow(state) {
                // One in hand where nothing of it is here: else a type whose backlog refills every slot kept it out for ever.
                let in_hand = usize::from(state.running + state.queue.len() == 0);
                let tasks = can_run.min(free.max(in_hand));
                if tasks > 0 {
                    wants.types.push(Want { kind: at, tasks, slow: true });
                    // A type without a cap shares what is left with the others; the claim's own total keeps the sum right.
                    if state.kind.workers < self.concurrency {
                        free = free.saturating_sub(tasks);
                    }
                }
                continue;
            }
            let tasks = self.target(state, round_trip).saturating_sub(state.queue.len());
            let scattered = state.mean_us.is_some_and(|us| us >= SCATTERED_US);
            let tasks = if scattered { tasks.min(SCATTERED_IDS) } else { tasks };
            if tasks > 0 && state.queue.len() <= self.target(state, round_trip) / 2 {
                wants.types.push(Want { kind: at, tasks: tasks.min(wants.tasks), slow: false });
            }
        }
        wants
    }

    /// Slots that a claim of slow or careful tasks may fill at once.
    pub fn startable(&self) -> usize {
        let queued_slow: usize = self.kinds.iter().filter(|k| is_slow(k)).map(|k| k.queue.len()).sum();
        self.free_slots().saturating_sub(queued_slow)
    }

    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        clippy::cast_possible_truncation,
        reason = "a rate, clamped to the prefetch"
    )]
    fn target(&self, state: &KindState, round_trip: Duration) -> usize {
        let slots = state.kind.workers.min(self.concurrency);
        let Some(mean) = state.mean_us else { return slots };
        let ahead = 2.0 * round_trip.as_secs_f64() * 1e6 + 5_000.0;
        let target = slots as f64 * ahead / mean.max(0.1);
        (target as usize).saturating_add(slots).min(self.prefetch)
    }

    /// Careful tasks (`track` 2) start as they are claimed: keeps slots free for up to `want` of type `kind` until `release`. Where none
    /// is free, those that come free next are saved for them: a backlog that fills every slot at once must not keep them waiting.
    pub fn reserve(&mut self, kind: usize, want: usize) -> usize {
        if self.stopping || self.alone {
            return 0;
        }
        let state = &self.kinds[kind];
        let saved = if self.saved_kind == kind { self.saved } else { 0 };
        let room = want.min(state.kind.workers.saturating_sub(state.running));
        let tasks = room.min(saved + self.startable());
        let from_saved = tasks.min(saved);
        self.saved -= from_saved;
        self.reserved += tasks - from_saved;
        if tasks == 0 && (self.saved_kind == kind || self.saved + self.owed == 0) {
            self.saved_kind = kind;
            self.owed = (self.concurrency / 4).max(1) - self.saved.min(self.concurrency / 4);
        }
        tasks
    }

    /// The claim that slots were reserved for has come back.
    pub fn release(&mut self, tasks: usize) {
        self.reserved -= tasks.min(self.reserved);
    }

    /// No careful task waits any more: what was saved for them is free.
    pub fn release_saved(&mut self) {
        self.release(self.saved);
        (self.saved, self.owed) = (0, 0);
    }

    /// Nothing more starts, so that a task of `track` 3 may run alone. True: nothing runs now.
    pub fn hold_for_alone(&mut self) -> bool {
        if self.stopping {
            return false;
        }
        self.alone = true;
        self.running == 0
    }

    /// Whether the task that runs alone is still here, waiting for its thread or running.
    pub fn is_busy_alone(&self) -> bool {
        self.running > 0 || self.kinds.iter().any(|k| k.queue.front().is_some_and(|t| t.chunk.track == 3))
    }

    /// There is no task to run alone (any more).
    pub fn release_alone(&mut self) {
        self.alone = false;
    }

    /// Takes in a claimed chunk; returns false when nothing more starts here, and the chunk must be given back.
    pub fn push(&mut self, chunk: &Arc<Chunk>) -> bool {
        if self.stopping {
            return false;
        }
        let state = &mut self.kinds[chunk.kind];
        let count = chunk.ids().len();
        let tasks = (0..u32::try_from(count).unwrap_or(0)).map(|at| Task { chunk: Arc::clone(chunk), at });
        if chunk.track == 0 {
            state.queue.extend(tasks);
        } else {
            for task in tasks.rev() {
                state.queue.push_front(task);
            }
        }
        self.buffered += count;
        self.buffered_bytes += chunk.bytes();
        self.feed();
        true
    }

    fn unbuffer(&mut self, task: &Task) {
        self.buffered -= 1;
        self.buffered_bytes = self.buffered_bytes.saturating_sub(task.payload().len());
    }

    /// Whether a type has fallen to half of what it is prefetched.
    pub fn is_low(&self, round_trip: Duration) -> bool {
        !self.wants(round_trip).types.is_empty()
    }

    /// Whether `task` may start while something is to run alone.
    fn may_start(&self, task: &Task) -> bool {
        !self.alone || (task.chunk.track == 3 && self.running == 0)
    }

    // --- handler threads ------------------------------------------------------------------------------------------------------------

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
        let left: Vec<Task> = slot.inner.lock().local.drain(..).collect();
        for task in left.into_iter().rev() {
            self.buffered += 1;
            self.buffered_bytes += task.payload().len();
            self.kinds[task.chunk.kind].queue.push_front(task);
        }
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
            let careful = state.queue.front().is_some_and(|t| t.chunk.track >= 2);
            let busy = (self.slots.len() - self.idle.min(self.slots.len())).max(1);
            let share = state.queue.len().div_ceil(busy);
            let batch = if careful { 1 } else { batch_size(state.mean_us).min(share) };
            self.next_kind = (at + 1) % self.kinds.len();
            self.takes += 1;
            let taken: Vec<Task> = self.kinds[at].queue.drain(..batch).collect();
            for task in &taken {
                self.unbuffer(task);
            }
            slot.inner.lock().local.extend(taken);
            self.kinds[at].running += 1;
            self.running += 1;
            return Take::Batch(at);
        }
        self.steal(slot)
    }

    /// The type whose turn it is among the sync or async ones: first those whose next task must start as it was claimed, then those of
    /// which nothing runs, then any; each in turn.
    fn next_startable(&self, is_async: bool) -> Option<usize> {
        let count = self.kinds.len();
        let in_turn = (0..count).map(|step| (self.next_kind + step) % count);
        let startable = in_turn.filter(|&at| {
            let state = &self.kinds[at];
            let kept = if at == self.saved_kind { self.saved } else { 0 };
            let mine = state.kind.is_async == is_async && state.running + kept < state.kind.workers;
            mine && state.queue.front().is_some_and(|t| self.may_start(t))
        });
        startable.min_by_key(|&at| self.rank(at))
    }

    fn rank(&self, at: usize) -> u8 {
        let state = &self.kinds[at];
        let careful = state.queue.front().is_some_and(|t| t.chunk.track >= 2);
        if careful { 0 } else { 1 + u8::from(state.running > 0) }
    }

    /// Whether the last free slot belongs to the other side (threads or event loop), whose next type comes before ours in rank and turn.
    fn is_others_turn(&self, is_async: bool) -> bool {
        if self.concurrency > self.running + self.reserved + 1 {
            return false;
        }
        let Some(theirs) = self.next_startable(!is_async) else { return false };
        let Some(ours) = self.next_startable(is_async) else { return true };
        let count = self.kinds.len();
        let turn = |at: usize| (self.rank(at), (at + count - self.next_kind % count) % count);
        turn(theirs) < turn(ours)
    }

    /// Takes half of what another thread took and has not started.
    fn steal(&mut self, thief: &Arc<Slot>) -> Take {
        for slot in &self.slots {
            if Arc::ptr_eq(slot, thief) {
                continue;
            }
            let mut victim = slot.inner.lock();
            let Some(kind) = victim.local.front().map(|t| t.chunk.kind) else { continue };
            let state = &self.kinds[kind];
            if state.running >= state.kind.workers || self.alone {
                continue;
            }
            let keep = victim.local.len() / 2;
            let stolen = victim.local.split_off(keep);
            drop(victim);
            thief.inner.lock().local.extend(stolen);
            self.kinds[kind].running += 1;
            self.running += 1;
            self.takes += 1;
            return Take::Batch(kind);
        }
        Take::Empty
    }

    fn ended(&mut self, kind: usize) {
        self.kinds[kind].running -= 1;
        self.running -= 1;
        let careful = &self.kinds[self.saved_kind];
        if self.owed > 0 && careful.running + self.saved < careful.kind.workers {
            self.owed -= 1;
            self.saved += 1;
            self.reserved += 1;
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "microseconds of a batch")]
    fn learn(&mut self, kind: usize, count: u32, time: Duration) {
        if count == 0 {
            return;
        }
        let us = time.as_secs_f64() * 1e6 / f64::from(count);
        let mean = &mut self.kinds[kind].mean_us;
        *mean = Some(mean.map_or(us, |m| m + EWMA * (us - m)));
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

    /// How often a batch was taken: when it stands still beside waiting tasks, the threads at work are stuck and another is needed.
    pub fn takes(&self) -> u64 {
        self.takes
    }

    /// Whether sync tasks wait that a further thread could run.
    pub fn has_waiting(&self) -> bool {
        self.kinds.iter().any(|k| !k.kind.is_async && !k.queue.is_empty() && k.running < k.kind.workers)
            || self.slots.iter().any(|s| !s.inner.lock().local.is_empty())
    }

    // --- event loop -----------------------------------------------------------------------------------------------------------------

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

    /// Up to `limit` messages for the loop; what is started counts as running from here on. Empty: armed again.
    pub fn receive(&mut self, limit: usize, now: Instant, may_start: bool) -> Vec<Message> {
        let mut messages = Vec::with_capacity(limit.min(self.inbox.len()));
        while messages.len() < limit {
            match self.inbox.pop_front() {
                Some(Message::Start(run, task)) if !may_start => {
                    self.inbox.push_front(Message::Start(run, task));
                    break;
                }
                Some(Message::Start(run, task)) => {
                    self.runs.insert(run, AsyncRun { task: task.clone(), started: now });
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

    /// An async task has ended. `None`: its attempt had ended before.
    pub fn finish_run(&mut self, run: u64, now: Instant) -> Option<Duration> {
        let ended = self.runs.remove(&run)?;
        let kind = ended.task.chunk.kind;
        let time = now.saturating_duration_since(ended.started);
        self.ended(kind);
        self.learn(kind, 1, time);
        self.feed();
        Some(time)
    }

    // --- time, heartbeat, end -------------------------------------------------------------------------------------------------------

    /// Ends the attempts whose time is up: their threads are written off, their coroutines told to stop.
    pub fn expire(&mut self, now: Instant) -> Vec<Expired> {
        let mut expired = Vec::new();
        let limit_of = |kinds: &[KindState], kind: usize| kinds[kind].kind.timeout;
        let mut freed = Vec::new();
        let mut left = Vec::new();
        for slot in &self.slots {
            let mut state = slot.inner.lock();
            let Some(current) = &state.current else { continue };
            let kind = current.task.chunk.kind;
            let Some(timeout) = limit_of(&self.kinds, kind) else { continue };
            if now.saturating_duration_since(current.started) < timeout {
                continue;
            }
            state.written_off = true;
            left.extend(state.local.drain(..));
            if let Some(current) = state.current.take() {
                expired.push(Expired { task: current.task, started: current.started, timeout });
            }
            freed.push((kind, Arc::clone(slot)));
        }
        for (kind, slot) in freed {
            self.slots.retain(|s| !Arc::ptr_eq(s, &slot));
            self.ended(kind);
        }
        for task in left.into_iter().rev() {
            self.buffered += 1;
            self.buffered_bytes += task.payload().len();
            self.kinds[task.chunk.kind].queue.push_front(task);
        }
        let late: Vec<u64> = self
            .runs
            .iter()
            .filter(|(_, r)| {
                limit_of(&self.kinds, r.task.chunk.kind).is_some_and(|t| now.saturating_duration_since(r.started) >= t)
            })
            .map(|(run, _)| *run)
            .collect();
        for run in late {
            if let Some(ended) = self.runs.remove(&run) {
                let kind = ended.task.chunk.kind;
                self.ended(kind);
                self.inbox.push_back(Message::Cancel(run, ended.task.clone()));
                if let Some(timeout) = limit_of(&self.kinds, kind) {
                    expired.push(Expired { task: ended.task, started: ended.started, timeout });
                }
            }
        }
        if !expired.is_empty() {
            self.feed();
        }
        expired
    }

    /// Whether any type has a timeout.
    pub fn has_timeouts(&self) -> bool {
        self.kinds.iter().any(|k| k.kind.timeout.is_some())
    }

    /// The tasks whose handlers run, for the heartbeat.
    pub fn running_holders(&self) -> Vec<Holder> {
        let threads = self.slots.iter().filter_map(|s| s.inner.lock().current.as_ref().map(|c| c.task.holder()));
        threads.chain(self.runs.values().map(|r| r.task.holder())).collect()
    }

    /// Handlers that run, and threads with a batch.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Claimed and not started.
    pub fn buffered(&self) -> usize {
        self.buffered
    }

    /// Takes out everything that has not started: at a stop to give it back, after a death because others have it now.
    pub fn take_unstarted(&mut self) -> Vec<Task> {
        let mut out: Vec<Task> = Vec::new();
        for kind in &mut self.kinds {
            out.extend(kind.queue.drain(..));
        }
        for slot in &self.slots {
            out.extend(slot.inner.lock().local.drain(..));
        }
        let inbox = std::mem::take(&mut self.inbox);
        for message in inbox {
            match message {
                Message::Start(_, task) => {
                    self.ended(task.chunk.kind);
                    out.push(task);
                }
                cancel @ Message::Cancel(..) => self.inbox.push_back(cancel),
            }
        }
        self.buffered = 0;
        self.buffered_bytes = 0;
        out
    }

    /// Nothing starts any more.
    pub fn stop(&mut self) {
        self.stopping = true;
    }
}

fn is_slow(state: &KindState) -> bool {
    state.mean_us.is_none_or(|us| us >= SLOW_US)
}

fn batch_size(mean_us: Option<f64>) -> usize {
    match mean_us {
        Some(us) if us < FAST_US => 32,
        Some(us) if us < QUICK_US => 8,
        _ => 1,
    }
}

#[cfg(test)]
#[path = "sched_tests.rs"]
mod tests;
