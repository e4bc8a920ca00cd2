//! Which task starts where and when: the tasks that are claimed and not yet started, the limits, and the handler threads that take them.
//!
//! One short lock. It is taken once a batch by a handler thread, twice a task by an event loop, and never held across a wait.

mod ends;
mod lost;
mod runs;
mod slot;
mod threads;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::consume::moment::Moment;
use crate::engine::consume::task::{Chunk, Task};

pub use lost::Lost;
pub use runs::Begun;
pub use slot::{Next, Slot};

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
    /// The type's name, or how types begin and a `*`.
    pub name: String,
    /// Whether its handler is a coroutine function.
    pub is_async: bool,
    /// How many of its handlers may run at once.
    pub workers: usize,
    /// How long an attempt may take.
    pub timeout: Option<Duration>,
    /// How long what its handlers return is kept.
    pub result_ttl: Option<Duration>,
}

impl Kind {
    /// How the types begin that it is for; `None`: it is for one type.
    pub fn prefix(&self) -> Option<&str> {
        self.name.strip_suffix('*')
    }
}

/// Which of them is for this type: its own, else the one with the longest prefix.
pub fn kind_of(kinds: &[Kind], name: &str) -> Option<usize> {
    let own = kinds.iter().position(|k| k.prefix().is_none() && k.name == name);
    own.or_else(|| {
        let matching = kinds.iter().enumerate().filter(|(_, k)| k.prefix().is_some_and(|p| name.starts_with(p)));
        matching.max_by_key(|(_, k)| k.name.len()).map(|(at, _)| at)
    })
}

#[derive(Debug)]
struct KindState {
    kind: Kind,
    queue: VecDeque<Task>,
    running: usize,
    /// Mean run time in microseconds; `None` before the first.
    mean_us: Option<f64>,
}

/// An async task that runs.
#[derive(Debug)]
struct AsyncRun {
    task: Task,
    /// `None`: the loop has fetched it and not come to it yet.
    started: Option<Moment>,
}

/// For the event loop: what to do, and with which run.
#[derive(Debug)]
pub enum Message {
    /// Start this task; the number names the run.
    Start(u64, Task),
    /// Cancel this run: its attempt has ended.
    Cancel(u64, Task),
    /// Cancel this run, whose task was cancelled. It goes on to its end, which is told as any other's.
    Interrupt(u64, Task),
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
    pub started: Moment,
    /// Its limit.
    pub timeout: Duration,
    /// It was cancelled before: nothing is to be stored.
    pub was_lost: bool,
}

/// See the module.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a state of its own, and none excludes another")]
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
    /// Threads written off whose handlers have not ended yet.
    stuck: usize,
    idle: usize,
    asked: usize,
    takes: u64,
    next_kind: usize,
    runs: HashMap<u64, AsyncRun>,
    next_run: u64,
    inbox: VecDeque<Message>,
    armed: bool,
    stopping: bool,
    /// A type has a timeout, or a task that came here.
    has_timeouts: bool,
}

impl Sched {
    /// An empty one.
    pub fn new(kinds: Vec<Kind>, concurrency: usize, prefetch: usize, prefetch_bytes: usize) -> Self {
        let has_timeouts = kinds.iter().any(|kind| kind.timeout.is_some());
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
            stuck: 0,
            idle: 0,
            asked: 0,
            takes: 0,
            next_kind: 0,
            runs: HashMap::new(),
            next_run: 0,
            inbox: VecDeque::new(),
            armed: true,
            stopping: false,
            has_timeouts,
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

    /// Nothing more starts, so that a task of track 3 may run alone. True: nothing runs now. What was saved for careful tasks is given up
    /// until then: they can't be claimed meanwhile, and the task alone would find no slot beside what is kept for them.
    pub fn hold_for_alone(&mut self) -> bool {
        if self.stopping {
            return false;
        }
        self.alone = true;
        self.release_saved();
        self.running == 0
    }

    /// Whether the task that runs alone is still here, waiting for its thread or running.
    pub fn is_busy_alone(&self) -> bool {
        self.running > 0 || self.kinds.iter().any(|k| k.queue.front().is_some_and(|t| t.chunk.is_alone()))
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
        self.has_timeouts |= chunk.has_timeouts();
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
        !self.alone || (task.chunk.is_alone() && self.running == 0)
    }

    // --- turns ----------------------------------------------------------------------------------------------------------------------

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
        let careful = state.queue.front().is_some_and(|t| t.chunk.is_careful());
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

    /// What a thread had taken and not started goes back to where it was, in front.
    fn requeue(&mut self, tasks: Vec<Task>) {
        for task in tasks.into_iter().rev() {
            self.buffered += 1;
            self.buffered_bytes += task.payload().len();
            self.kinds[task.chunk.kind].queue.push_front(task);
        }
    }

    /// Handlers that run, and threads with a batch.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Claimed and not started.
    pub fn buffered(&self) -> usize {
        self.buffered
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
mod tests;
