//! The consumer: claims tasks, hands them to handler threads and event loops, and stores what became of them.
//!
//! ```text
//! claimer ──► Sched ──► handler threads, event loop ──► Outcomes ──► completer
//!    ▲                                                                   │
//!    └── control: listener, heartbeat, tick (lease, rescue, promotion) ◄─┘ books: claims held
//! ```
//!
//! Claimer, completer and control are three loops of the one I/O thread, each with its own connection. They share `Books` without a lock.
//! Handler threads see only `Sched` and `Outcomes`, under short locks.

pub mod books;
pub mod cancel;
pub mod claim;
pub mod complete;
pub mod control;
pub mod counters;
pub mod moment;
pub mod outcomes;
pub mod retain;
pub mod sched;
pub mod task;
pub mod trouble;
pub mod tx;
pub mod upkeep;
mod watch;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::engine::connect::{Link, Target};
use crate::engine::error::{Error, Kind as ErrorKind, Result};
use crate::engine::logs::{Level, Outbox};
use crate::engine::{process, rights, service};
use books::Books;
use counters::Counters;
use moment::Moment;
use outcomes::{Ended, Outcomes};
use retain::Retentions;
use sched::{Begun, Expired, Kind, Message, Sched, Slot, Take};
use task::{Holder, Outcome, Task};
use tx::{Tx, Undone};

/// All that a consumer's engine is told.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "the fields are those of fastq.settings.ConsumerSettings, documented there")]
pub struct Settings {
    pub dsn: String,
    pub schema: String,
    pub kinds: Vec<Kind>,
    pub queues: Option<Vec<String>>,
    pub concurrency: usize,
    pub prefetch: usize,
    pub prefetch_bytes: usize,
    pub heartbeat_interval: Duration,
    pub dead_after: Duration,
    pub lease: Duration,
    pub poll_interval: Duration,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub listen: bool,
    pub retention: Retentions,
    pub upkeep: bool,
    pub result_limit: usize,
    pub ageing: usize,
}

/// Where the engine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Made, not started.
    New,
    /// Claiming and running.
    Running,
    /// Claims nothing more; handlers that run go on.
    Stopping,
    /// Waits for no handler any more.
    Abandoned,
    /// The I/O thread is gone.
    Ended,
}

/// What the I/O thread, the handler threads and the event loop share.
pub struct Shared {
    /// The settings.
    pub settings: Settings,
    /// Log records and requests for threads, on their way to Python.
    pub outbox: Arc<Outbox>,
    /// Outcomes on their way to the completer.
    pub outcomes: Outcomes,
    /// What was done so far.
    pub counters: Counters,
    /// Tasks that are completed in transactions of their handlers'.
    pub tx: Tx,
    sched: Mutex<Sched>,
    work: Condvar,
    /// A `Moment`: until then nobody takes our tasks.
    alive_until: AtomicU64,
    /// Registrations before this one were found gone.
    lost_before: AtomicU32,
    round_trip_us: AtomicU64,
    hungry: AtomicBool,
    claim_news: Notify,
    control_news: Notify,
    phase: AtomicU8,
    /// When it was abandoned, and how long its parts have from then on.
    last_time: Mutex<Option<(Instant, Duration)>>,
    /// What ended the I/O thread, if it was no stop.
    failure: Mutex<Option<String>>,
    ended: Mutex<bool>,
    ended_news: Condvar,
    expired: Mutex<Vec<Expired>>,
    /// Attempts that ran out of time, or whose transaction was rolled back, and whose failure is not yet among the outcomes.
    expiring: AtomicUsize,
    waker: Mutex<Option<Waker>>,
    /// The process that it was started in: no child of it has its threads.
    pub pid: u32,
}

/// Wakes the event loop; called from the I/O thread and from handlers, must not block.
pub type Waker = Box<dyn Fn() + Send + Sync>;

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

impl Shared {
    fn new(settings: Settings) -> Self {
        let sched =
            Sched::new(settings.kinds.clone(), settings.concurrency, settings.prefetch, settings.prefetch_bytes);
        Self {
            settings,
            outbox: Arc::default(),
            outcomes: Outcomes::default(),
            counters: Counters::default(),
            tx: Tx::default(),
            sched: Mutex::new(sched),
            work: Condvar::new(),
            alive_until: AtomicU64::new(0),
            lost_before: AtomicU32::new(0),
            round_trip_us: AtomicU64::new(1_000),
            hungry: AtomicBool::new(false),
            claim_news: Notify::new(),
            control_news: Notify::new(),
            phase: AtomicU8::new(Phase::New as u8),
            last_time: Mutex::new(None),
            failure: Mutex::new(None),
            ended: Mutex::new(false),
            ended_news: Condvar::new(),
            expired: Mutex::default(),
            expiring: AtomicUsize::new(0),
            waker: Mutex::new(None),
            pid: process::id(),
        }
    }

    /// With no engine behind it, which never starts: for tasks that are made to test handlers.
    pub fn detached() -> Self {
        Self::new(Settings::default())
    }

    /// Where the engine is in its life.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::New,
            1 => Phase::Running,
            2 => Phase::Stopping,
            3 => Phase::Abandoned,
            _ => Phase::Ended,
        }
    }

    /// Goes on to `phase`, never back.
    fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.claim_news.notify_one();
        self.control_news.notify_one();
        self.outcomes.wake();
    }

    fn log(&self, level: Level, part: &'static str, message: impl Into<String>) {
        self.outbox.log(level, part, message);
    }

    // --- liveness -------------------------------------------------------------------------------------------------------------------

    /// A beat that was sent at `sent` arrived: until the dead time has passed since then, nobody takes our tasks.
    fn beaten(&self, sent: Moment) {
        self.alive_until.store((sent + self.settings.dead_after).as_nanos(), Ordering::Release);
    }

    /// This registration of ours is gone: others take its tasks, whenever the last beat was.
    fn lose(&self, epoch: u32) {
        self.alive_until.store(0, Ordering::Release);
        self.lost_before.store(epoch + 1, Ordering::Release);
    }

    /// Whether nothing that comes of this task's run counts any more, as far as is known here.
    pub fn is_lost(&self, task: &Task) -> bool {
        task.chunk.epoch < self.lost_before.load(Ordering::Acquire) || task.is_lost()
    }

    /// Whether what we hold is surely still ours to start: the monotonic deadline, also after a SIGSTOP and after sleep.
    pub fn may_start(&self, now: Moment) -> bool {
        now.as_nanos() < self.alive_until.load(Ordering::Acquire)
    }

    fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_us.load(Ordering::Relaxed))
    }

    // --- handler threads ------------------------------------------------------------------------------------------------------------

    /// A handler thread comes in.
    pub fn join_thread(&self) -> Arc<Slot> {
        self.sched.lock().join_thread()
    }

    /// A handler thread goes.
    pub fn leave_thread(&self, slot: &Arc<Slot>) {
        self.sched.lock().leave_thread(slot);
        self.outcomes.wake();
    }

    /// Ends the thread's last batch and takes the next; wakes another thread where that pays.
    pub fn take(&self, slot: &Arc<Slot>, last: Option<(usize, u32, Duration)>, now: Moment) -> Take {
        let mut sched = self.sched.lock();
        let take = sched.take(slot, last, self.may_start(now));
        if let Take::Batch(_) = take {
            self.rouse(&mut sched);
        }
        self.feed_claimer(&sched);
        // A handler that ended may have made room for async tasks, too.
        sched.feed();
        let wake = sched.disarm();
        drop(sched);
        if wake {
            self.wake_loop();
        }
        if self.phase() >= Phase::Stopping {
            self.outcomes.wake();
        }
        take
    }

    /// Waits, detached, for work; `None` after `limit` without any.
    pub fn wait_for_work(&self, slot: &Arc<Slot>, limit: Duration) -> Take {
        let mut sched = self.sched.lock();
        let until = Instant::now() + limit;
        loop {
            let take = sched.take(slot, None, self.may_start(Moment::now()));
            if take != Take::Empty {
                if let Take::Batch(_) = take {
                    self.rouse(&mut sched);
                }
                self.feed_claimer(&sched);
                return take;
            }
            sched.idle(1);
            let timed_out = self.work.wait_until(&mut sched, until).timed_out();
            sched.idle(-1);
            if timed_out {
                return if sched.threads() > 1 { Take::Leave } else { Take::Empty };
            }
        }
    }

    /// Something may start now: hands it to the event loop, and wakes a thread where that pays.
    fn spread(&self) {
        let mut sched = self.sched.lock();
        sched.feed();
        self.rouse(&mut sched);
        self.feed_claimer(&sched);
        let wake = sched.disarm();
        drop(sched);
        if wake {
            self.wake_loop();
        }
    }

    /// One more thread, if it would find enough to do.
    fn rouse(&self, sched: &mut Sched) {
        if sched.wants_thread() {
            self.rouse_one(sched);
        }
    }

    fn rouse_one(&self, sched: &mut Sched) {
        if sched.idle_threads() > 0 {
            self.work.notify_one();
        } else if sched.ask_thread() {
            self.outbox.ask_thread();
        }
    }

    /// Wakes the claimer if it waits for room and there is some.
    fn feed_claimer(&self, sched: &Sched) {
        if self.hungry.load(Ordering::Acquire)
            && sched.is_low(self.round_trip())
            && self.hungry.swap(false, Ordering::AcqRel)
        {
            self.claim_news.notify_one();
        }
    }

    // --- event loop -----------------------------------------------------------------------------------------------------------------

    /// How the event loop is woken.
    pub fn set_waker(&self, waker: Waker) {
        *self.waker.lock() = Some(waker);
        self.wake_loop();
    }

    fn wake_loop(&self) {
        if let Some(waker) = &*self.waker.lock() {
            waker();
        }
    }

    /// Messages for the event loop, which begins each start by `begin_run`.
    pub fn receive(&self, limit: usize) -> Vec<Message> {
        self.sched.lock().receive(limit, self.may_start(Moment::now()))
    }

    /// The event loop calls this run's handler now. False: it must not; whose task it is has been seen to.
    pub fn begin_run(&self, run: u64) -> bool {
        let now = Moment::now();
        let mut sched = self.sched.lock();
        match sched.begin_run(run, now, || self.may_start(now)) {
            Begun::Run => {
                self.counters.started(1);
                true
            }
            // Within the lock, as in `finish_run`.
            Begun::Late(task) => {
                self.outcomes.push(Ended::given_back(task.holder()));
                false
            }
            Begun::Over(task) => {
                self.outcomes.push(Ended { holder: task.holder(), took_us: 0, outcome: Outcome::Expired });
                self.feed_claimer(&sched);
                false
            }
            Begun::Gone => false,
        }
    }

    /// An async handler has ended. False: its attempt had ended before, and the result does not count.
    pub fn finish_run(&self, run: u64, task: &Task, outcome: Outcome) -> bool {
        let now = Moment::now();
        let mut sched = self.sched.lock();
        let Some(time) = sched.finish_run(run, now) else { return false };
        // Within the lock: who sees that nothing runs any more must see the last outcome, too.
        self.outcomes.push(Ended { holder: task.holder(), took_us: micros(time), outcome });
        self.feed_claimer(&sched);
        let wake = sched.disarm();
        if wake || sched.wants_thread() {
            self.rouse(&mut sched);
        }
        drop(sched);
        if wake {
            self.wake_loop();
        }
        true
    }

    /// Attempts that ran out of time and whose failure is yet to be stored, for Python to say how they are retried.
    pub fn take_expired(&self) -> Vec<Expired> {
        std::mem::take(&mut *self.expired.lock())
    }

    /// Stores what became of an attempt that ran out of time.
    pub fn end_expired(&self, expired: &Expired, outcome: Outcome) {
        let took_us = micros(Moment::now().since(expired.started));
        self.outcomes.push(Ended { holder: expired.task.holder(), took_us, outcome });
        self.expiring.fetch_sub(1, Ordering::AcqRel);
        self.outcomes.wake();
    }

    /// Stores what becomes of an attempt whose handler returned although its transaction was rolled back.
    pub fn end_undone(&self, undone: &Undone, outcome: Outcome) {
        self.outcomes.push(Ended { holder: undone.task.holder(), took_us: undone.took_us, outcome });
        self.expiring.fetch_sub(1, Ordering::AcqRel);
        self.outcomes.wake();
    }

    /// Since when this task's handler runs; `None`: it does not, or its attempt has ended.
    pub fn started(&self, holder: &Holder) -> Option<Moment> {
        self.sched.lock().started(holder)
    }

    /// Handlers that run now.
    pub fn running(&self) -> usize {
        self.sched.lock().running()
    }

    /// Sync handlers that go on although their time is up.
    pub fn stuck(&self) -> usize {
        self.sched.lock().stuck()
    }

    // --- the end --------------------------------------------------------------------------------------------------------------------

    /// Claims no more, gives back what has not started; handlers that run go on.
    pub fn stop(&self) {
        let mut sched = self.sched.lock();
        sched.stop();
        let unstarted = sched.take_unstarted();
        // After that: a thread now ends at most the task that it runs, and then hands that over itself.
        sched.hand_over(&self.outcomes);
        drop(sched);
        self.give_back(unstarted);
        self.advance(Phase::Stopping);
        self.work.notify_all();
    }

    /// Tasks that were claimed and are not to start here.
    pub fn give_back(&self, tasks: Vec<Task>) {
        let mut ended: Vec<Ended> = tasks.iter().map(|t| Ended::given_back(t.holder())).collect();
        self.outcomes.append(&mut ended);
    }

    /// Waits for no handler any more, and ends within `limit`, whatever the database does: what is not stored by then is named.
    pub fn abandon(&self, limit: Duration) {
        self.last_time.lock().get_or_insert_with(|| (Instant::now(), limit));
        self.stop();
        self.advance(Phase::Abandoned);
    }

    /// Returns once the engine was abandoned and `share` of its last time is over.
    async fn out_of_time(&self, share: f64) {
        loop {
            let last_time = *self.last_time.lock();
            if let Some((since, limit)) = last_time {
                return tokio::time::sleep_until((since + limit.mul_f64(share)).into()).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What ended the engine, if it was no stop.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// Waits until the I/O thread has ended. False: not within `limit`.
    pub fn join(&self, limit: Duration) -> bool {
        let mut ended = self.ended.lock();
        if !*ended {
            self.ended_news.wait_for(&mut ended, limit);
        }
        *ended
    }
}

/// Whole microseconds, as many as fit.
pub fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Starts the engine: connects, checks the schema, registers the consumer. Blocks until that is done or has failed.
pub fn start(settings: Settings) -> Result<Arc<Shared>> {
    let target =
        |part| Target::new(&settings.dsn, &settings.schema, part, settings.connect_timeout, settings.statement_timeout);
    let mut targets = (target("claim")?, target("complete")?, target("control")?);
    targets.2.statement_timeout = targets.2.statement_timeout.min(control_limit(&settings));
    let shared = Arc::new(Shared::new(settings));
    let (report, started) = mpsc::channel::<Result<()>>();
    let (inner, end) = (Arc::clone(&shared), Arc::clone(&shared));
    let main = move || async move {
        match prepare(&inner, &targets.2).await {
            Ok((link, books)) => {
                inner.advance(Phase::Running);
                drop(report.send(Ok(())));
                Box::pin(run(&inner, targets, link, books)).await;
            }
            Err(e) => drop(report.send(Err(e))),
        }
    };
    let on_end = move |cause| {
        *end.failure.lock() = cause;
        end.advance(Phase::Ended);
        end.sched.lock().stop();
        end.work.notify_all();
        *end.ended.lock() = true;
        end.ended_news.notify_all();
    };
    service::spawn("fastq-io", Arc::clone(&shared.outbox), main, on_end)?;
    started.recv().unwrap_or_else(|_| Err(Error::new(ErrorKind::Consumer, "the engine died while it started")))?;
    Ok(shared)
}

/// How long the control connection waits for anything: a link that went silent is found out, and another made, while there is still time
/// for a beat before others take us for dead.
fn control_limit(settings: &Settings) -> Duration {
    (settings.dead_after.saturating_sub(settings.heartbeat_interval) / 2).max(Duration::from_millis(50))
}

async fn prepare(shared: &Shared, target: &Target) -> Result<(Link, Rc<RefCell<Books>>)> {
    let link = target.connect(false).await?;
    // First: without them the schema's version can't be read.
    rights::check(&link, "worker").await?;
    link.check_schema().await?;
    let books = Books { epochs: vec![control::register(shared, &link).await?], ..Books::default() };
    Ok((link, Rc::new(RefCell::new(books))))
}

async fn run(shared: &Shared, mut targets: (Target, Target, Target), link: Link, books: Rc<RefCell<Books>>) {
    targets.2.connect_timeout = targets.2.connect_timeout.min(control_limit(&shared.settings));
    let claimer = claim::Claimer::new(shared, targets.0, Rc::clone(&books));
    let completer = complete::Completer::new(shared, targets.1, Rc::clone(&books));
    let control = control::Control::new(shared, targets.2, link, books);
    tokio::join!(claimer.run(), completer.run(), control.run(), watch::threads(shared), watch::time(shared));
}
